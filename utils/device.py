"""Devices and precision: which device, which dtype, autocast, asynchronous copies."""

import argparse

import torch
from torch import Tensor


def to_device(t: Tensor, device: str | torch.device) -> Tensor:
    """`t` on `device`. From the CPU to a GPU the copy is asynchronous: the host does not wait for it."""
    if t.device.type == "cpu" and torch.device(device).type == "cuda":
        return t.contiguous().pin_memory().to(device, non_blocking=True)  # from unpinned memory the host would wait
    return t.to(device)


def choose_device(name: str | None) -> str:
    """The device called `name`, by default the GPU where there is one. Raises ValueError if it is not available."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: not available here; leave out the flag to use what is") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # so that memory is measured there
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in convolutions too
    return name


def default_dtype(device: str) -> str:
    """The default dtype of autocast: bfloat16 on a GPU and on a CPU that has bf16 instructions."""
    return "bfloat16" if device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def autocast(device: str, dtype: str | None = None):
    """Autocast to bf16 if `dtype` (default: the device's) is bfloat16; weights keep their dtype."""
    enabled = (dtype or default_dtype(device)) == "bfloat16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def frozen_dtype(args: argparse.Namespace) -> torch.dtype:
    """Dtype in which frozen networks are stored: bf16 on a GPU with --dtype bfloat16; on a CPU float32."""
    return torch.bfloat16 if args.dtype == "bfloat16" and args.device != "cpu" else torch.float32


def sampling_autocast(args: argparse.Namespace):
    """Autocast for frozen networks stored as `frozen_dtype` says.

    For bf16 weights autocast is off: it would run the norms in float32.
    """
    return autocast(args.device, args.dtype if frozen_dtype(args) == torch.float32 else "float32")


def is_out_of_memory(error: Exception) -> bool:
    """True for out-of-memory errors, on GPU or CPU."""
    phrases = ("out of memory", "allocate memory", "enough memory")
    return isinstance(error, MemoryError) or any(phrase in str(error).lower() for phrase in phrases)
