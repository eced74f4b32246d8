"""Run the no-grad denoising steps (3/4 of ReFL's FLOPs) on an inference-optimised copy of the UNet.

On a GPU the copy is in bf16: autocast would round the float32 weights in every call and normalise in float32, whereas
the copy is rounded once per update, runs entirely in bf16, and compiles to a graph without gradients. It predicts what
autocast predicts, to the rounding of bf16. On a CPU the copy shares the weights, packed once per update.
"""

import torch
from torch import Tensor, nn

from scheduler import expand_timesteps
from speed import prepacked
from speed.fused_upsample import fuse
from speed.threads import follow_load
from utils import distributed

UNPACKED_CALLS = 9  # pack only after this many no-grad calls of a micro-batch: below, packing costs more than it saves


class InferenceCopy:
    """A UNet as the losses call it: `net` for calls with gradients, the copy of `unet` for those without.

    `net` is `unet` itself or its compiled version. Call `refresh` after every change of the weights. `dtype`: of the
    copy; None for a packed one, which computes in the UNet's own dtype. `copied=False`: for a UNet that is stored in
    `dtype` except for its adapters. It needs no copy, only its adapters are rounded once per update; its calls with
    gradients run outside autocast too, which would convert every input of its layers and normalise in float32.
    """

    def __init__(
        self,
        net,
        unet: nn.Module,
        dtype: torch.dtype | None = torch.bfloat16,
        compiled: bool = False,
        copied: bool = True,
    ):
        self.net, self.unet, self.dtype, self.calls = net, unet, dtype, 0
        if dtype is None:
            self.copy = prepacked.packed_copy(unet)
        elif copied:
            self.copy = empty_like(unet, dtype)
            self.refresh()
        else:
            self.copy = unet
            self.refresh()
        if compiled and copied:
            prepacked.prepare_for_compile(self.copy)
        self.fast = torch.compile(self.copy, dynamic=False) if compiled else self.copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the rounded weights or adapters again, or invalidate the packed ones."""
        if self.dtype is None:
            prepacked.invalidate(self.copy)
        elif self.copy is self.unet:
            for layer in (layer for layer in self.unet.modules() if hasattr(layer, "rounded")):
                layer.rounded = tuple(part.weight.to(self.dtype) for part in (layer.lora_A, layer.lora_B))
        else:
            for mine, theirs in zip(self.copy.parameters(), self.unet.parameters(), strict=True):
                mine.copy_(distributed.gather(theirs))
            fuse(self.copy)

    def __call__(self, x_t: Tensor, t: Tensor | int, context: Tensor, **conditioning: Tensor) -> Tensor:
        follow_load()
        t = expand_timesteps(t, x_t)
        if torch.is_grad_enabled():
            self.calls = 0  # the last call of a micro-batch
            return call_in_own_dtype(self.net, self.unet, x_t, t, context, **conditioning)
        if self.dtype is None:
            self.calls += 1
            return (self.unet if self.calls <= UNPACKED_CALLS else self.fast)(x_t, t, context, **conditioning)
        with torch.autocast(x_t.device.type, enabled=False):
            return self.fast(x_t, t, context.to(self.dtype), **conditioning)


def call_in_own_dtype(net, unet: nn.Module, x_t: Tensor, t, context: Tensor, **conditioning: Tensor) -> Tensor:
    """Call `net` as training does: with the weights of `unet` not in float32, in their dtype and outside autocast."""
    dtype = unet.conv_in.weight.dtype
    if dtype == torch.float32:
        return net(x_t, t, context=context, **conditioning)
    with torch.autocast(x_t.device.type, enabled=False):
        return net(x_t, t, context=context.to(dtype), **conditioning)


def empty_like(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen UNet of the same config on the same device, uninitialised; unlike deepcopy also for sharded ones."""
    with torch.device("meta"):
        copy = type(unet)(unet.config)
    device = next(unet.parameters()).device
    return copy.to(dtype).to_empty(device=device).requires_grad_(False)
