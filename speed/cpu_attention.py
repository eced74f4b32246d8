"""Attention on a CPU in bf16, where the fused kernel's backward pass is slow for short sequences.

Without gradients, too, so that a frozen model with the same weights predicts the same to the bit (KL, DPO).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import Attention

SHORT = 256**2  # queries times keys up to which plain matrix products are faster


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v of queries (B, heads, L, c), keys and values (B, heads, S, c)."""
    short = q.shape[2] * k.shape[2] <= SHORT
    if short and q.is_cpu and q.dtype == torch.bfloat16:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def use_cpu_attention(unet: nn.Module) -> None:
    """Use `attention` in every attention layer of a UNet on a CPU, in place; before the UNet is compiled."""
    for module in unet.modules():
        if isinstance(module, Attention) and module.to_q.weight.device.type == "cpu":
            module.attention = attention
