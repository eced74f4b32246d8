"""Low-rank adapters (Hu et al. 2021) on the attention layers of a UNet: W x + (alpha / rank) B A x, with a switch.

With the switch off the UNet is bit-identical to the base model, so combined generation needs one set of weights.
Files use peft's names, which diffusers reads, or kohya's, which A1111 and ComfyUI read.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrained import key_names, weight_files
from pretrained.options import ADAPTER_LAYOUTS
from unet import UNet
from utils import disk

TARGET = re.compile(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)$")
PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}


class LoRALinear(nn.Linear):
    """A linear layer plus an adapter; shares weight and bias with the layer that it replaces.

    The adapter is stored in float32, whatever the layer's dtype, and computes in the dtype of its input.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False, device=linear.weight.device)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False, device=linear.weight.device)
        self.alpha, self.rank, self.on = alpha, rank, True

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        h = F.linear(x, self.lora_A.weight.to(x.dtype))  # (B, L, C) -> (B, L, rank)
        return y + self.alpha / self.rank * F.linear(h, self.lora_B.weight.to(x.dtype))


def targets(unet: UNet) -> dict[str, nn.Linear]:
    """The layers that can have an adapter, by name."""
    return {name: module for name, module in unet.named_modules() if TARGET.search(name)}


def adapters(unet: UNet) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by name. Raises ValueError if there are none."""
    found = {name: module for name, module in targets(unet).items() if isinstance(module, LoRALinear)}
    if not found:
        raise ValueError("this UNet has no adapters; lora.add or lora.load adds them")
    return found


def _replace(unet: UNet, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(unet.get_submodule(parent), child, module)


def _refuse_a_second(unet: UNet) -> None:
    if any(isinstance(module, LoRALinear) for module in unet.modules()):
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
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        change = layer.alpha / layer.rank * (layer.lora_B.weight @ layer.lora_A.weight)
        linear.weight = nn.Parameter((layer.weight.float() + change).to(layer.weight.dtype))
        linear.bias = layer.bias
        _replace(unet, name, linear)
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
    config = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
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
    """Give a frozen UNet the adapters of a file, in peft's or kohya's names; returns their parameters.

    Without a stored alpha it equals the rank. Raises ValueError when a key fits no attention layer of this UNet, half
    of an adapter is missing, or a shape differs.
    """
    _refuse_a_second(unet)
    path = Path(path) if Path(path).is_file() else Path(path) / weight_files.ADAPTER
    layers = targets(unet)
    found = _parts(path, layers, unet)
    unet.requires_grad_(False)
    for name, parts in found.items():
        A, B, linear = parts.get("A"), parts.get("B"), layers[name]
        if A is None or B is None:
            raise ValueError(f"{path}: only one half of the adapter of {name}; the file is not whole")
        if A.shape != (len(A), linear.in_features) or B.shape != (linear.out_features, len(A)):
            fits = f"({linear.in_features} -> {linear.out_features})"
            raise ValueError(f"{path}: {name} {fits} cannot take A {tuple(A.shape)}, B {tuple(B.shape)}; another base?")
        layer = LoRALinear(linear, len(A), float(parts.get("alpha", len(A))))
        layer.lora_A.weight.data.copy_(A)
        layer.lora_B.weight.data.copy_(B)
        _replace(unet, name, layer)
    return parameters(unet)


def _parts(path: Path, layers: dict[str, nn.Linear], unet: UNet) -> dict[str, dict]:
    """Layer -> its A, B and alpha, if stored, in the file. Raises ValueError when a key fits no layer."""
    tensors = weight_files.read_file(path)
    known = {name: name for name in layers}
    for name in layers:
        plain = "lora_unet_" + name.replace(".", "_")
        known |= dict.fromkeys((f"unet.{name}", f"base_model.model.{name}", plain, _kohya_name(name, unet)), name)
    found: dict[str, dict] = {}
    strange = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+?)\.(lora_\w+\.weight|alpha)", key)
        if match and match[1] in known and match[2] in PARTS:
            found.setdefault(known[match[1]], {})[PARTS[match[2]]] = tensor
        else:
            strange.append(key)
    if strange or not found:
        first = ", ".join(strange[:3]) or "no key at all"
        raise ValueError(
            f"{path}: {len(strange)} of {len(tensors)} keys adapt no attention layer (to_q, to_k, to_v, to_out.0) of "
            f"this UNet: {first}; the file looks like {key_names.identify(tensors)}"
        )
    _alpha_of_peft(path, found)
    return found


def _alpha_of_peft(path: Path, found: dict[str, dict]) -> None:
    """Fill in what peft keeps in the header. Raises ValueError for variants of LoRA that are not built here."""
    config = json.loads(weight_files.read_metadata(path).get("lora_adapter_metadata", "{}"))
    config = {key.removeprefix("unet."): value for key, value in config.items()}
    if config.get("use_dora") or config.get("use_rslora"):
        raise ValueError(f"{path}: DoRA and rank-stabilised adapters are not supported, only plain LoRA")
    for name, parts in found.items():
        alpha = config.get("alpha_pattern", {}).get(name, config.get("lora_alpha"))
        if alpha is not None:
            parts.setdefault("alpha", alpha)
