"""CPU layers with weights pre-packed into oneDNN's blocked format, for UNets and decoders that run without gradients.

In eager mode oneDNN reorders a layer's weights in every call, after autocast has rounded them once more: for one image
of SD1.5 at 256 pixels that is half of a UNet's time in float32, and most of it in bf16. The results are those of the
same layers, to rounding.
"""

import copy
import ctypes
import platform
import sys

import torch
from torch import Tensor, nn

from speed.cpu_attention import long_attention, use_cpu_attention
from speed.fused_upsample import FusedUpsample, fuse, fused_kernel
from unet import Pointwise, TransformerBlock, Upsample

NO_ACTIVATION = ("none", [], "")  # oneDNN's arguments for no activation after a layer
UPSAMPLES = (Upsample, FusedUpsample)
LARGE_BYTES = 8_000_000  # layers from this size on give freed memory back to the system


class PrepackedLayer(nn.Module):
    """A linear layer, a convolution or an upsampling without gradients, packed in its first call, for that call's
    dtype and sizes.

    `keep`: keep the original weights too, so that `invalidate` can have them packed again. Otherwise the layer drops
    them; weights that are views of a file stay in the page cache until the system needs the memory.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d | Upsample | FusedUpsample, keep: bool):
        super().__init__()
        self.layer, self.keep, self.packed = layer, keep, None

    @property
    def owner(self) -> nn.Linear | nn.Conv2d:
        """The module that owns the weights."""
        return self.layer.conv if type(self.layer) in UPSAMPLES else self.layer

    @property
    def weight(self) -> Tensor:
        return self.owner.weight if self.packed is None else self.packed

    def pack(self, x: Tensor, dtype: torch.dtype) -> None:
        owner, kind = self.owner, type(self.layer)
        weight, bias = owner.weight.detach(), owner.bias
        if kind in UPSAMPLES:
            settings = ([1, 1], [0, 0], [2, 2], [1, 1], 1)  # padding, output padding, stride, dilation, groups
            weight = fused_kernel(weight).to(dtype)
            self.packed = torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *settings, list(x.shape))
            self.call = torch.ops.mkldnn._convolution_transpose_pointwise
        elif kind is nn.Conv2d:
            settings = (owner.padding, owner.stride, owner.dilation, owner.groups)
            weight = weight.to(dtype)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *settings, list(x.shape))
            self.call = torch.ops.mkldnn._convolution_pointwise
        else:  # Linear, or Pointwise as a linear layer
            settings = ()
            weight = weight.to(dtype).flatten(1)
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            self.call = torch.ops.mkldnn._linear_pointwise
        self.arguments = (None if bias is None else bias.detach().to(dtype), *settings, *NO_ACTIVATION)
        if not self.keep:
            large, weight = owner.weight.nbytes > LARGE_BYTES, None
            owner.weight = owner.bias = None
            if large and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)  # glibc would keep much of the freed memory

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a packed layer passes no gradient on; call it in torch.no_grad(), or do not pack")
        if self.packed is None:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
            if not is_supported(dtype):
                return self.layer(x)
            self.pack(x, dtype)
        return self.call(x.to(self.packed.dtype), self.packed, *self.arguments)


class TextProjection(PrepackedLayer):
    """The keys' or values' projection of cross-attention: it computes once for the text embeddings of a prompt.

    They are the same at every denoising step. A change of the tensor in place is noticed.
    """

    known: tuple[Tensor, int, Tensor] | None = None  # (context, its version, output)

    def forward(self, context: Tensor) -> Tensor:
        if context.is_inference():  # has no version
            return super().forward(context)
        if self.packed is None or self.known is None or not is_same(context, *self.known[:2]):
            self.known = context, context._version, super().forward(context)
        return self.known[2]


def is_same(x: Tensor, known: Tensor, version: int) -> bool:
    """Whether x is the known tensor, and unchanged since it had that version."""
    return x is known and x._version == version and not (torch.is_grad_enabled() and x.requires_grad)


def is_supported(dtype: torch.dtype) -> bool:
    """True if layers can be packed in this dtype on this machine."""
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prepack(network: nn.Module, keep: bool = False) -> nn.Module:
    """Pack the layers of a network, in place; it supports no gradients afterwards. Adapters are left alone.

    On other devices, on processors other than x86, and where torch was built without oneDNN, only its upsampling is
    fused.
    """
    on_x86_cpu = all(p.is_cpu for p in network.parameters()) and platform.machine() in ("x86_64", "AMD64")
    if on_x86_cpu and torch.backends.mkldnn.is_available():
        use_cpu_attention(network, long_attention)
        prepack_children(network, keep)
    else:
        fuse(network)
    return network


def has_adapter(layer: nn.Module) -> bool:
    """True if a layer, or the convolution of an Upsample, has a low-rank adapter, which packed weights would drop."""
    return hasattr(layer, "lora_A") or isinstance(layer, UPSAMPLES) and hasattr(layer.conv, "lora_A")


def prepack_children(module: nn.Module, keep: bool) -> None:
    for name, child in module.named_children():
        if isinstance(module, TransformerBlock) and name == "attn2":
            for key in ("to_k", "to_v"):
                layer = getattr(child, key)
                if type(layer) is nn.Linear and not has_adapter(layer):
                    setattr(child, key, TextProjection(layer, keep))
        if type(child) in (nn.Linear, nn.Conv2d, Pointwise, *UPSAMPLES) and not has_adapter(child):
            setattr(module, name, PrepackedLayer(child, keep))
        elif not hasattr(child, "lora_A") and not isinstance(child, PrepackedLayer):
            prepack_children(child, keep)


def prepare_for_compile(network: nn.Module) -> nn.Module:
    """Prepare a network with frozen weights for `torch.compile`, in place.

    Inductor runs frozen convolutions on a GPU in channels_last; converting the weights once saves that in every call.
    """
    return fuse(network).to(memory_format=torch.channels_last)


def packed_copy(network: nn.Module) -> nn.Module:
    """A packed network that shares its weights with `network`; call `invalidate` after they have changed."""
    return prepack(copy.deepcopy(network, {id(p): p for p in network.parameters()}), keep=True)


def invalidate(network: nn.Module) -> None:
    """Have the layers of a `packed_copy` pack their weights again."""
    layers = [module for module in network.modules() if isinstance(module, PrepackedLayer)]
    for layer in layers:
        layer.packed = None
    if not layers:
        fuse(network)
