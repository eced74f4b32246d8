"""Makes autograd of a CPU build of torch accept tensors on cuda:0; import it before torch. It needs g++."""

import ctypes
import importlib.util
import subprocess
import tempfile
from pathlib import Path

# Autograd asks a device for its guard and its streams. A CPU build of torch has none for CUDA, and says there is no
# accelerator. These do nothing, and must be there before torch is.
GUARD = r"""
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
std::optional<DeviceType> at::accelerator::getAccelerator(bool) { return DeviceType::CUDA; }
"""


def load_guard() -> None:
    home = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        include = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        link = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", *include, source, "-o", library, *link], check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


load_guard()
