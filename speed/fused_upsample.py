"""2x upsampling and its 3x3 convolution as one transposed convolution, for networks whose weights do not change.

Of the nine pixels that the convolution sees after nearest-neighbour upsampling, only four differ. Adding up the weights
that meet the same pixel, once, leaves a transposed convolution with 4/9 of the multiplications.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import Upsample


class FusedUpsample(nn.Module):
    """Takes the place of an `Upsample`, with the same parameters and key names."""

    def __init__(self, upsample: Upsample):
        super().__init__()
        self.conv = upsample.conv
        self.register_buffer("kernel", None, persistent=False)
        self.refresh()

    def refresh(self) -> None:
        """Compute the kernel again, in the same memory, to which a compiled graph may refer."""
        kernel, old = fused_kernel(self.conv.weight), self.kernel
        same = old is not None and (old.dtype, old.device) == (kernel.dtype, kernel.device)
        self.kernel = old.copy_(kernel) if same else kernel

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.kernel, self.conv.bias, stride=2, padding=1)


@torch.no_grad()
def fused_kernel(weight: Tensor) -> Tensor:
    """A 3x3 convolution's weight (C_out, C_in, 3, 3) -> the fused kernel (C_in, C_out, 4, 4).

    Along each side the three taps become a, a + b, b + c, c: each upsampled pixel is seen by one or two of them.
    """
    pairs = torch.ones(3, 4, device=weight.device).triu().tril(1)  # 1 1 0 0, 0 1 1 0, 0 0 1 1
    exact = torch.promote_types(weight.dtype, torch.float32)
    taps = weight.to(exact).flip(2, 3).flatten(2).transpose(0, 1)  # transposed convolutions flip their kernel
    with torch.autocast(weight.device.type, enabled=False):
        kernel = taps @ torch.kron(pairs, pairs).to(exact)  # (C_in, C_out, 16), rows times columns
    return kernel.unflatten(2, (4, 4)).to(weight.dtype)


@torch.no_grad()
def fuse(network: nn.Module) -> nn.Module:
    """Fuse the upsampling of a network, in place. Call it again when the weights have changed.

    Gradients still flow to the input, no longer to the convolution's weights.
    """
    for module in list(network.modules()):
        if isinstance(module, FusedUpsample):
            module.refresh()
        for name, child in module.named_children():
            if type(child) is Upsample and not hasattr(child.conv, "lora_A"):  # an adapter is not part of the kernel
                setattr(module, name, FusedUpsample(child))
    return network
