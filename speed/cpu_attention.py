"""Attention on a CPU in bf16, where the fused kernel's backward pass is slow for short sequences.

Without gradients, too, so that a frozen model with the same weights predicts the same to the bit (KL, DPO).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import Attention

SHORT = 256**2  # queries times keys up to which plain matrix products are faster
LONG, CHUNK = 1024, 512  # tokens from which attention head by head is faster; queries per chunk


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v of queries (B, heads, L, c), keys and values (B, heads, S, c)."""
    short = q.shape[2] * k.shape[2] <= SHORT
    if short and q.is_cpu and q.dtype == torch.bfloat16:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def long_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without gradients; of many tokens head by head, so that a chunk of the product stays in the cache.

    Only without AMX, where it was measured.
    """
    long = min(q.shape[2], k.shape[2]) >= LONG and q.is_cpu and q.dtype == torch.bfloat16
    if not long or q.requires_grad or torch.cpu._is_amx_tile_supported():
        return F.scaled_dot_product_attention(q, k, v)
    result = torch.empty_like(q)
    for image in range(len(q)):
        for head in range(q.shape[1]):
            queries, keys = q[image, head], (k[image, head] * q.shape[-1] ** -0.5).mT
            for at in range(0, len(queries), CHUNK):
                part = slice(at, at + CHUNK)
                result[image, head, part] = (queries[part] @ keys).softmax(-1) @ v[image, head]
    return result


def use_cpu_attention(unet: nn.Module, attention: Callable = attention) -> None:
    """Use `attention` in every attention layer of a UNet on a CPU, in place; before the UNet is compiled."""
    for module in unet.modules():
        if isinstance(module, Attention) and module.to_q.weight.device.type == "cpu":
            module.attention = attention
