"""Layers on a CPU whose weights wait in the order that oneDNN computes in, for the UNets and decoders that sample.

Otherwise oneDNN puts them into that order in each call, after autocast has rounded them once more: for one image of
SD1.5 at 256 pixels that is half of a UNet's time in float32, and most of it in bf16. The results are those of the same
layers, to rounding.
"""

import copy
import ctypes
import platform
import sys

import torch
from torch import Tensor, nn

from unet import Pointwise

NOTHING_FUSED = ("none", [], "")  # no activation after a layer
LARGE = 8_000_000  # bytes of weights, after which memory is given back to the system


class Packed(nn.Module):
    """A linear layer or a convolution without gradients, packed when it is first called: in the type of that call, for
    its sizes.

    `keep`: the layer keeps its own weights too, so that `forget` can have them packed anew. Otherwise it lets go of
    them; those that are views of a file stay in memory as its pages until the system needs these.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, keep: bool):
        super().__init__()
        self.layer, self.keep, self.packed = layer, keep, None
        self.convolves = type(layer) is nn.Conv2d  # a Pointwise is a linear layer

    @property
    def weight(self) -> Tensor:
        return self.layer.weight if self.packed is None else self.packed

    def pack(self, x: Tensor, dtype: torch.dtype) -> None:
        weight, bias = self.layer.weight.detach().to(dtype), self.layer.bias
        if self.convolves:
            self.sizes = (self.layer.padding, self.layer.stride, self.layer.dilation, self.layer.groups)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.sizes, list(x.shape))
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1))
        self.bias = None if bias is None else bias.detach().to(dtype)
        if not self.keep:
            large, weight = self.layer.weight.nbytes > LARGE, None
            self.layer.weight = self.layer.bias = None
            if large and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)  # else glibc keeps much of it, beside the packed weights

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a packed layer passes no gradient on; call it in torch.no_grad(), or do not pack")
        if self.packed is None:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
            if not possible(dtype):
                return self.layer(x)
            self.pack(x, dtype)
        x = x.to(self.packed.dtype)
        if self.convolves:
            return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.sizes, *NOTHING_FUSED)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *NOTHING_FUSED)


def possible(dtype: torch.dtype) -> bool:
    """Whether layers can be packed in a type."""
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(network: nn.Module, keep: bool = False) -> nn.Module:
    """Have the layers of a network packed, in place. It takes no gradient any more; adapters stay what they are.

    Nothing happens on another device, on processors other than x86, and where torch was built without oneDNN.
    """
    here = all(p.is_cpu for p in network.parameters()) and platform.machine() in ("x86_64", "AMD64")
    if here and torch.backends.mkldnn.is_available():
        replace(network, keep)
    return network


def replace(module: nn.Module, keep: bool) -> None:
    for name, child in module.named_children():
        if type(child) in (nn.Linear, nn.Conv2d, Pointwise):
            setattr(module, name, Packed(child, keep))
        elif not hasattr(child, "lora_A"):
            replace(child, keep)


def view(network: nn.Module) -> nn.Module:
    """A packed network that shares what `network` has. Weights that are packed follow its own when `forget` says so."""
    return pack(copy.deepcopy(network, {id(p): p for p in network.parameters()}), keep=True)


def forget(network: nn.Module) -> None:
    """Have a `view` pack its weights anew, which have changed."""
    for module in network.modules():
        if isinstance(module, Packed):
            module.packed = None
