"""Twice the size, in the UNet and the decoder: every pixel four times, then a 3x3 convolution.

Of the nine pixels that the convolution sees there, only four differ. Where weights stay as they are, `fold` adds up
those that meet the same pixel, once: what is left is one transposed convolution, with four of nine multiplications.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)
        self.register_buffer("kernel", None, persistent=False)  # of both steps, where they are folded

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.conv_transpose2d(x, self.kernel, self.conv.bias, stride=2, padding=1)


@torch.no_grad()
def fused_kernel(weight: Tensor) -> Tensor:
    """A 3x3 convolution's weight (C_out, C_in, 3, 3) -> the kernel (C_in, C_out, 4, 4) of both steps.

    Along a side the three taps become a, a + b, b + c, c: each doubled pixel is met by one or two of them.
    """
    pairs = torch.ones(3, 4, device=weight.device).triu().tril(1)  # 1 1 0 0, 0 1 1 0, 0 0 1 1
    exact = torch.promote_types(weight.dtype, torch.float32)
    taps = weight.to(exact).flip(2, 3).flatten(2).transpose(0, 1)  # transposed convolutions turn their kernel round
    with torch.autocast(weight.device.type, enabled=False):
        kernel = taps @ torch.kron(pairs, pairs).to(exact)  # (C_in, C_out, 16), rows times columns
    return kernel.unflatten(2, (4, 4)).to(weight.dtype)


def fuse(network: nn.Module) -> nn.Module:
    """Fold what upsamples in a network, in place. To be called again when its weights have changed.

    The convolutions keep their weights, which get no gradient any more; what goes through them does.
    """
    for module in network.modules():
        if isinstance(module, Upsample):
            kernel, old = fused_kernel(module.conv.weight), module.kernel
            same = old is not None and (old.dtype, old.device) == (kernel.dtype, kernel.device)
            module.kernel = old.copy_(kernel) if same else kernel  # in its memory, to which a graph may refer
    return network
