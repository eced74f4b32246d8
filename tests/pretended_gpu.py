"""An emulated GPU: CPU tensors that report the device cuda:0, to test GPU code paths without a GPU.

    python tests/pretended_gpu.py train.py --base tiny --steps 4

runs a command as on a GPU. Operations are computed on the CPU; one that mixes devices, or samples on the GPU with a CPU
generator, fails as it would on a GPU. At the end it prints the dtypes of matrix products, convolutions and norms, and
where the host synchronised with the device; `--report FILE` before the command writes this as JSON. Kernels, time,
memory, `torch.compile` and several GPUs are not emulated. It needs g++ and a CPU build of torch.
"""

import collections
import json
import math
import os
import runpy
import sys
from pathlib import Path

import gpu_guard  # noqa: F401 - must be imported before torch

# isort: split
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parent.parent
WATCHED = ("convolution", "mm", "bmm", "addmm", "native_group_norm", "native_layer_norm")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")  # need a value or size on the host
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")  # accept indices on either device
NO_CPU_SCALARS = ("cat", "stack", "mm", "bmm", "addmm", "convolution", "embedding")  # refuse even CPU scalars

types = collections.Counter()  # (operation, dtype) -> calls
waits = collections.Counter()  # (operation, file, function of the project, line) -> calls


class Gpu(torch.Tensor):
    """A tensor on cuda:0 whose values are in `inner`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        gpu = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=torch.device("cuda", 0), **layout)
        gpu.inner = inner
        return gpu

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = Gpu(self.inner.clone())
            isparameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if isparameter else copied
        return memo[id(self)]

    def __repr__(self):
        return f"Gpu({self.inner})"

    def tolist(self):
        waits["tolist", *place()] += 1
        return self.inner.tolist()


def on_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def place() -> tuple[str, str, int]:
    """(file, function, line) of the innermost project frame."""
    frame = sys._getframe(1)
    while frame:
        path, function = Path(frame.f_code.co_filename), frame.f_code.co_name
        project = ROOT in path.parents and not {"tests", "site-packages"} & set(path.parts[len(ROOT.parts) :])
        if project and function[0] != "<":
            return path.relative_to(ROOT).as_posix(), function, frame.f_lineno
        frame = frame.f_back
    return "elsewhere", "", 0


def pinned(t: torch.Tensor) -> torch.Tensor:
    """`t` in emulated pinned memory; like the real one, it does not accept overlapping elements."""
    copied = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)
    copied.is_pinned_here = True
    return copied


def compute(op, args, kwargs):
    """Compute an operation that involves the GPU on the CPU. Raises RuntimeError where a GPU would."""
    name, device = op._schema.name.split("::")[1], kwargs.get("device")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    gpu, cpu = [t for t in tensors if isinstance(t, Gpu)], [t for t in tensors if t.device.type == "cpu"]
    result_on_gpu = isinstance(args[0], Gpu) if name == "copy_" else on_gpu(device) if device is not None else bool(gpu)
    if (generator := kwargs.get("generator")) and generator.device.type != ("cuda" if result_on_gpu else "cpu"):
        raise RuntimeError(f"{name}: the generator is on another device than the result, in {place()}")
    if gpu and name in INDEXING:
        if not isinstance(args[0], Gpu):
            raise RuntimeError(f"{name}: a tensor on the CPU is indexed by one on the GPU, in {place()}")
    elif gpu and cpu and name not in ("copy_", "_to_copy") and any(t.ndim or name in NO_CPU_SCALARS for t in cpu):
        raise RuntimeError(f"{name}: tensors on the CPU and on the GPU, in {place()}")
    if name in ("copy_", "_to_copy"):
        queued = kwargs.get("non_blocking") and hasattr(cpu[-1] if cpu else None, "is_pinned_here")
        if cpu and result_on_gpu and not queued:
            waits["to the GPU", *place()] += 1
        elif gpu and not result_on_gpu:
            waits["to the CPU", *place()] += 1
    elif gpu and (name in WAITS or name in INDEXING and any(t.dtype == torch.bool for t in tensors[1:])):
        waits[name, *place()] += 1
    if gpu and name in WATCHED:
        types[name, str(gpu[0].dtype).removeprefix("torch.")] += 1

    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Gpu) else x, (args, kwargs))
    out = op(*args, **kwargs)
    if not result_on_gpu:
        return out
    inputs = {id(t.inner): t for t in gpu}  # an in-place operation returns its input

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return inputs[id(x)] if id(x) in inputs else Gpu(x)

    return tree_map(wrap, out)


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if on_gpu(kwargs.get("device")) or any(isinstance(t, Gpu) for t in tree_leaves((args, kwargs))):
            return compute(op, args, kwargs)
        return op(*args, **kwargs)


class Constructors(TorchFunctionMode):
    """`torch.tensor(..., device="cuda")`, which is not a dispatched operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and on_gpu(kwargs.get("device")):
            return function(*args, **{k: v for k, v in kwargs.items() if k != "device"}).to("cuda")
        return function(*args, **kwargs)


def pretend() -> None:
    """Patch torch to report one GPU."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `module.to` makes new parameters
    torch.Tensor.pin_memory = pinned
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "a pretended GPU"}
    answers |= dict.fromkeys(("set_device", "synchronize", "reset_peak_memory_stats", "empty_cache", "_lazy_init"))
    answers |= {"max_memory_allocated": 10**9, "memory_allocated": 10**9, "is_bf16_supported": True}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)


def main(argv: list[str]) -> None:
    report = None
    if argv[0] == "--report":
        _, report, *argv = argv
    sys.argv, sys.path[0] = argv, str(ROOT)
    pretend()
    from training import cost

    cost.matrix_rate = lambda device: math.inf  # no timing on an emulated GPU
    try:
        with Operations(), Constructors():
            runpy.run_path(os.path.join(ROOT, argv[0]), run_name="__main__")
    finally:
        rows = {"types": types, "waits": waits}
        rows = {kind: [[*key, count] for key, count in sorted(found.items())] for kind, found in rows.items()}
        if report:
            Path(report).write_text(json.dumps(rows))
        else:
            for kind, found in rows.items():
                print(kind, *(f"  {' '.join(map(str, row))}" for row in found), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
