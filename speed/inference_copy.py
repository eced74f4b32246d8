"""The steps without gradients, three quarters of ReFL's arithmetic, on a copy of the UNet that is made for them.

On a GPU the copy is bf16. Under autocast each pass rounds the float32 weights again and normalises in float32; the copy
is rounded once an update, runs wholly in bf16, and compiles to a graph that knows of no gradients. It predicts what
autocast predicts, to the rounding of bf16. On a CPU the copy has the same weights, packed once an update for passes of
many steps.
"""

import copy

import torch
from torch import Tensor, nn

from scheduler import expand_timesteps
from speed import prepacked
from speed.fused_upsample import fuse
from utils import distributed

UNPACKED_CALLS = (
    9  # first calls of a pass, on a CPU: were they all, as in ImageReFL, packing would take more time than it saves
)


class InferenceCopy:
    """Stands for a UNet in the losses: `net` where gradients are recorded, the copy of `unet` elsewhere.

    `net` is `unet` itself, or what it compiled to. `refresh` is called after each change of the weights. `dtype`: of
    the copy; None for a packed one, which computes as `unet` does. `copied`: False for a UNet that is held in `dtype`
    but for its adapters, which needs no copy.
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
        else:
            self.copy = fuse(copy.deepcopy(unet).to(dtype).requires_grad_(False)) if copied else unet
        if compiled and copied:
            prepacked.prepare_for_compile(self.copy)
        self.fast = torch.compile(self.copy, dynamic=False) if compiled else self.copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights anew, into the same memory, or have them packed anew."""
        if self.dtype is None:
            prepacked.invalidate(self.copy)
        elif self.copy is not self.unet:
            for mine, theirs in zip(self.copy.parameters(), self.unet.parameters(), strict=True):
                mine.copy_(distributed.gather(theirs))
            fuse(self.copy)

    def __call__(self, x_t: Tensor, t: Tensor | int, context: Tensor, **conditioning: Tensor) -> Tensor:
        t = expand_timesteps(t, x_t)
        if torch.is_grad_enabled():
            self.calls = 0  # the pass ends with it
            return self.net(x_t, t, context=context, **conditioning)
        if self.dtype is None:
            self.calls += 1
            return (self.unet if self.calls <= UNPACKED_CALLS else self.fast)(x_t, t, context, **conditioning)
        with torch.autocast(x_t.device.type, enabled=False):
            return self.fast(x_t, t, context.to(self.dtype), **conditioning)
