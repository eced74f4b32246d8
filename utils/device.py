"""Tensors on their way to a GPU, for which the host does not wait."""

import torch
from torch import Tensor


def to_device(t: Tensor, device: str | torch.device) -> Tensor:
    """`t` on `device`. From the CPU to a GPU the copy is queued, before all that is computed with it."""
    if t.device.type == "cpu" and torch.device(device).type == "cuda":
        return t.contiguous().pin_memory().to(device, non_blocking=True)  # from other memory the host would wait
    return t.to(device)
