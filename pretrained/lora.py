"""Low-rank adapters (Hu et al. 2021) on layers of a UNet: W x + (alpha / rank) B A x, with a switch.

Training adapts the attention layers; loaded files may adapt any linear layer or convolution.

With the switch off the UNet is bit-identical to the base model, so combined generation needs one set of weights.
Files use peft's names, which diffusers reads, or kohya's, which A1111 and ComfyUI read.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrained import adapter_files, key_names, weight_files
from pretrained.options import ADAPTER_LAYOUTS
from unet import Pointwise, UNet
from utils import disk

TARGET = re.compile(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$")


class LoRALinear(nn.Linear):
    """A linear layer plus an adapter; shares weight and bias with the layer that it replaces.

    The adapter is stored in float32, whatever the layer's dtype, and computes in the dtype of its input. `rounded`: A
    and B in the layer's dtype for calls without gradients, which would convert them every time (`speed/`), or None.
    """

    rounded: tuple[Tensor, Tensor] | None = None

    def __init__(self, linear: nn.Linear | Pointwise, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape[:2]
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=linear.weight.device)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=linear.weight.device)
        self.alpha, self.rank, self.on = alpha, rank, True

    def merged(self, change: Tensor) -> nn.Module:
        kind = nn.Linear if self.weight.ndim == 2 else partial(Pointwise, kernel_size=1)
        layer = kind(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        return _with_weights(layer, self, change)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.flatten(1), self.bias)  # a Pointwise has a weight (C_out, C_in, 1, 1)
        if not self.on:
            return y
        A, B = self.lora_A.weight, self.lora_B.weight
        A, B = self.rounded if self.rounded and not torch.is_grad_enabled() else (A.to(x.dtype), B.to(x.dtype))
        h = F.linear(x, A)  # (B, L, C) -> (B, L, rank)
        # y + (alpha / rank) B h in one kernel, as launches take the time: an SDXL UNet has 560 of these layers
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.t(), alpha=self.alpha / self.rank).view_as(y)


class LoRAConv2d(nn.Module):
    """A convolution plus an adapter: A is a convolution of the same kernel to `rank` channels, B a 1x1 convolution."""

    def __init__(self, conv: nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
        c_out, c_in = conv.weight.shape[:2]
        self.lora_A = nn.Conv2d(c_in, rank, **self.geometry, bias=False, device=conv.weight.device)
        self.lora_B = nn.Conv2d(rank, c_out, 1, bias=False, device=conv.weight.device)
        self.alpha, self.rank, self.on = alpha, rank, True

    def merged(self, change: Tensor) -> nn.Module:
        c_out, c_in = self.weight.shape[:2]
        layer = nn.Conv2d(c_in, c_out, **self.geometry, bias=self.bias is not None, device="meta")
        return _with_weights(layer, self, change)

    def forward(self, x: Tensor) -> Tensor:
        stride, padding = self.geometry["stride"], self.geometry["padding"]
        y = F.conv2d(x, self.weight, self.bias, stride, padding)
        if not self.on:
            return y
        h = F.conv2d(x, self.lora_A.weight.to(x.dtype), None, stride, padding)  # (B, C, H, W) -> (B, rank, H', W')
        return y + self.alpha / self.rank * F.conv2d(h, self.lora_B.weight.to(x.dtype))


def _adapted(layer: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> LoRALinear | LoRAConv2d:
    kind = LoRALinear if isinstance(layer, nn.Linear | Pointwise) else LoRAConv2d
    return kind(layer, rank, alpha)


def _with_weights(layer: nn.Module, adapted: LoRALinear | LoRAConv2d, change: Tensor) -> nn.Module:
    """A plain layer with the weight and bias of an adapted one, and a change (C_out, C_in ...) of its weight."""
    weight = adapted.weight
    layer.weight = nn.Parameter((weight.float() + change.reshape(weight.shape)).to(weight.dtype))
    layer.bias = adapted.bias
    return layer


def targets(unet: UNet) -> dict[str, nn.Linear]:
    """The layers that training adapts, by name."""
    return {name: module for name, module in unet.named_modules() if TARGET.search(name)}


def adapters(unet: UNet) -> dict[str, LoRALinear | LoRAConv2d]:
    """The layers that have an adapter, by name. Raises ValueError if there are none."""
    found = {name: module for name, module in unet.named_modules() if isinstance(module, LoRALinear | LoRAConv2d)}
    if not found:
        raise ValueError("this UNet has no adapters; lora.add or lora.load adds them")
    return found


def _replace(unet: UNet, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(unet.get_submodule(parent), child, module)


def _refuse_a_second(unet: UNet) -> None:
    if any(isinstance(module, LoRALinear | LoRAConv2d) for module in unet.modules()):
        raise ValueError("this UNet has adapters already; lora.merge folds them into its weights")


def add(unet: UNet, rank: int, alpha: float | None = None, generator: torch.Generator | None = None) -> list:
    """Freeze a UNet and add adapters; returns their parameters, to train. The output is unchanged, as B is zero.

    A is drawn from a normal distribution with standard deviation 1 / rank; alpha defaults to the rank.
    Raises ValueError for a rank below 1.
    """
    _refuse_a_second(unet)
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be at least 1, got {rank}")
    unet.requires_grad_(False)
    for name, linear in targets(unet).items():
        layer = LoRALinear(linear, rank, rank if alpha is None else alpha)
        noise = torch.randn(rank, layer.in_features, generator=generator) / rank
        layer.lora_A.weight.data.copy_(noise)
        nn.init.zeros_(layer.lora_B.weight)
        _replace(unet, name, layer)
    return parameters(unet)


def parameters(unet: UNet) -> list[nn.Parameter]:
    """The parameters of all adapters."""
    return [p for layer in adapters(unet).values() for p in (layer.lora_A.weight, layer.lora_B.weight)]


def switch(unet: UNet, on: bool) -> None:
    """Turn every adapter on or off."""
    for layer in adapters(unet).values():
        layer.on = on


def base_and_tuned(unet: UNet) -> tuple[Callable, Callable]:
    """Base and tuned model as two callables with the UNet's arguments, over one set of weights.

    The tuned model is the UNet itself: its adapters are off only during a call of the base model.
    """
    switch(unet, True)

    def base(*args, **kwargs) -> Tensor:
        switch(unet, False)
        try:
            return unet(*args, **kwargs)
        finally:
            switch(unet, True)

    return base, unet


@torch.no_grad()
def merge(unet: UNet) -> UNet:
    """Merge the adapters into the weights, W + (alpha / rank) B A, and remove them."""
    for name, layer in adapters(unet).items():
        change = layer.alpha / layer.rank * (layer.lora_B.weight.flatten(1) @ layer.lora_A.weight.flatten(1))
        _replace(unet, name, layer.merged(change))
    return unet


def _kohya_name(name: str, unet: UNet) -> str:
    """kohya's scripts use the diffusers names for SD1.5, those of the single file (SGM) for SDXL."""
    if unet.config.pooled:
        name = key_names.unet_name(name + ".weight", unet.config).removesuffix(".weight")
    return "lora_unet_" + name.replace(".", "_")


def _peft_file(unet: UNet) -> tuple[dict[str, Tensor], dict[str, str]]:
    layers = adapters(unet)
    tensors = {f"unet.{key}": t for key, t in unet.state_dict().items() if ".lora_" in key}
    first = next(iter(layers.values()))
    attention = all(TARGET.search(name) for name in layers)
    config = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"] if attention else list(layers),
        "init_lora_weights": "gaussian",
    }
    return tensors, {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}


def _kohya_file(unet: UNet) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, layers = {}, adapters(unet)
    for name, layer in layers.items():
        kohya = _kohya_name(name, unet)
        tensors[f"{kohya}.lora_down.weight"] = layer.lora_A.weight
        tensors[f"{kohya}.lora_up.weight"] = layer.lora_B.weight
        tensors[f"{kohya}.alpha"] = torch.tensor(float(layer.alpha))
    first = next(iter(layers.values()))
    base, architecture = (
        ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base") if unet.config.pooled else ("sd_v1", "stable-diffusion-v1")
    )
    return tensors, {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": str(first.alpha),
        "ss_base_model_version": base,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
    }


def save(
    unet: UNet,
    path: str | Path,
    layout: str = "peft",
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapters to a `.safetensors` file, or to `pytorch_lora_weights.safetensors` in a folder.

    layout: "peft" or "kohya". Raises ValueError for any other.
    """
    if layout not in ADAPTER_LAYOUTS:
        raise ValueError(f"unknown layout {layout!r} of an adapter; known: {', '.join(ADAPTER_LAYOUTS)}")
    tensors, header = _peft_file(unet) if layout == "peft" else _kohya_file(unet)
    path = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / weight_files.ADAPTER
    disk.write(path, {k: t.to("cpu", dtype) for k, t in tensors.items()}, {"format": "pt"} | header | (metadata or {}))


def load(unet: UNet, path: str | Path) -> list[nn.Parameter]:
    """Freeze a UNet and add the adapters of a file or folder; returns their parameters.

    Raises ValueError if a key fits no layer of this UNet, half of an adapter is missing, a shape differs, or the
    adapters are not plain LoRA.
    """
    _refuse_a_second(unet)
    path = adapter_files.locate(path)
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    found = adapter_files.read(path, layers, unet.config)
    unet.requires_grad_(False)
    for name, stored in found.items():
        layer = _adapted(layers[name], len(stored.A), stored.alpha)
        for part, tensor in ((layer.lora_A, stored.A), (layer.lora_B, stored.B)):
            fits = tensor.numel() == part.weight.numel() and tensor.shape[:2] == part.weight.shape[:2]
            if not fits:
                shapes = f"A {tuple(stored.A.shape)}, B {tuple(stored.B.shape)}"
                weight = tuple(layer.weight.shape)
                raise ValueError(f"{path}: {name} with weight {weight} cannot take {shapes}; another base?")
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: the adapter of {name} contains NaN or infinite values")
            part.weight.data.copy_(tensor.reshape(part.weight.shape))
        _replace(unet, name, layer)
    return parameters(unet)
