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

from speed.fused_upsample import Upsample, fuse, fused_kernel
from unet import Pointwise

NO_ACTIVATION = ("none", [], "")  # no activation after a layer
LARGE_BYTES = 8_000_000  # bytes of weights, after which memory is given back to the system


class PrepackedLayer(nn.Module):
    """A linear layer, a convolution or an Upsample without gradients, packed when it is first called: in the type of
    that call, for its sizes.

    `keep`: the layer keeps its own weights too, so that `forget` can have them packed anew. Otherwise it lets go of
    them; those that are views of a file stay in memory as its pages until the system needs these.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d | Upsample, keep: bool):
        super().__init__()
        self.layer, self.keep, self.packed = layer, keep, None

    @property
    def own(self) -> nn.Linear | nn.Conv2d:
        """What has the weights."""
        return self.layer.conv if type(self.layer) is Upsample else self.layer

    @property
    def weight(self) -> Tensor:
        return self.own.weight if self.packed is None else self.packed

    def pack(self, x: Tensor, dtype: torch.dtype) -> None:
        weight, bias, kind = self.own.weight.detach(), self.own.bias, type(self.layer)
        if kind is Upsample:
            weight, of = (
                fused_kernel(weight).to(dtype),
                ([1, 1], [0, 0], [2, 2], [1, 1], 1),
            )  # padding, of the output, stride
            self.packed = torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *of, list(x.shape))
            self.call = torch.ops.mkldnn._convolution_transpose_pointwise
        elif kind is nn.Conv2d:
            weight, of = weight.to(dtype), (self.own.padding, self.own.stride, self.own.dilation, self.own.groups)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *of, list(x.shape))
            self.call = torch.ops.mkldnn._convolution_pointwise
        else:  # a Pointwise is a linear layer
            weight, of = weight.to(dtype).flatten(1), ()
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            self.call = torch.ops.mkldnn._linear_pointwise
        self.rest = (None if bias is None else bias.detach().to(dtype), *of, *NO_ACTIVATION)
        if not self.keep:
            large, weight = self.own.weight.nbytes > LARGE_BYTES, None
            self.own.weight = self.own.bias = None
            if large and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)  # else glibc keeps much of it, beside the packed weights

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a packed layer passes no gradient on; call it in torch.no_grad(), or do not pack")
        if self.packed is None:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
            if not is_supported(dtype):
                return self.layer(x)
            self.pack(x, dtype)
        return self.call(x.to(self.packed.dtype), self.packed, *self.rest)


def is_supported(dtype: torch.dtype) -> bool:
    """Whether layers can be packed in a type."""
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prepack(network: nn.Module, keep: bool = False) -> nn.Module:
    """Have the layers of a network packed, in place. It takes no gradient any more; adapters stay what they are.

    On another device, on processors other than x86, and where torch was built without oneDNN, layers are only folded.
    """
    here = all(p.is_cpu for p in network.parameters()) and platform.machine() in ("x86_64", "AMD64")
    if here and torch.backends.mkldnn.is_available():
        prepack_children(network, keep)
    else:
        fuse(network)
    return network


def prepack_children(module: nn.Module, keep: bool) -> None:
    for name, child in module.named_children():
        if type(child) in (nn.Linear, nn.Conv2d, Pointwise, Upsample):
            setattr(module, name, PrepackedLayer(child, keep))
        elif not hasattr(child, "lora_A"):
            prepack_children(child, keep)


def prepare_for_compile(network: nn.Module) -> nn.Module:
    """Make a network ready for `torch.compile`, in place, whose weights stay as they are.

    Compiled for a GPU, convolutions without gradients compute in channels_last; here their weights are put into it once
    instead of in each call.
    """
    return fuse(network).to(memory_format=torch.channels_last)


def packed_copy(network: nn.Module) -> nn.Module:
    """A packed network that shares what `network` has. Weights that are packed follow its own when `forget` says so."""
    return prepack(copy.deepcopy(network, {id(p): p for p in network.parameters()}), keep=True)


def invalidate(network: nn.Module) -> None:
    """Have a `view` pack its weights anew, which have changed."""
    layers = [module for module in network.modules() if isinstance(module, PrepackedLayer)]
    for layer in layers:
        layer.packed = None
    if not layers:
        fuse(network)
