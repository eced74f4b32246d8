"""Files from models: a UNet for diffusers or as a single file for A1111 and ComfyUI; what a weight file contains."""

import json
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from pretrained import key_names, lora, prediction, weight_files
from pretrained.configs import unet_dict
from pretrained.loading import find, load_clip, load_unet, load_vae, read_config, read_file
from pretrained.options import ADAPTER_LAYOUTS, UNET_LAYOUTS
from unet import UNet
from utils import disk

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_unet(
    unet: UNet,
    path: str | Path,
    layout: str = "diffusers",
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
    base: str | Path | None = None,
) -> None:
    """Write a UNet: "diffusers", a folder that diffusers reads, or "single-file", for A1111 and ComfyUI.

    A single file (LDM for SD1.5, SGM for SDXL) also contains the autoencoder and the text encoders of `base`, a source.
    Raises ValueError for an unknown layout, for adapters that are not merged, for a single file without a base, and
    for a path whose suffix belongs to the other layout.
    """
    unet = getattr(unet, "_orig_mod", unet)  # of a compiled one
    if any(".lora_" in key for key in unet.state_dict()):
        raise ValueError("this UNet has adapters; lora.save writes them, lora.merge folds them into the weights")
    if layout in UNET_LAYOUTS and (Path(path).suffix == ".safetensors") != (layout == "single-file"):
        raise ValueError(f"{path}: --layout single-file writes a .safetensors file, diffusers writes a folder")
    if layout == "diffusers":
        tensors = {key: t.to("cpu", dtype) for key, t in unet.state_dict().items()}
        disk.write(Path(path) / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"} | (metadata or {}))
        disk.write_text(Path(path) / "config.json", json.dumps(unet_dict(unet.config), indent=1) + "\n")
    elif layout == "single-file":
        if base is None:
            raise ValueError("a single file also contains an autoencoder and text encoders: name their base")
        tensors = single_file(unet, base, dtype)
        configs = {"config": json.dumps(component_configs(unet, base))}
        header = {"format": "pt"} | modelspec(unet, Path(path).stem) | configs | (metadata or {})
        disk.write(path, {key: t.to("cpu", dtype) for key, t in tensors.items()}, header)
    else:
        raise ValueError(f"unknown layout {layout!r} of a UNet; known: {', '.join(UNET_LAYOUTS)}")


def component_configs(unet: UNet, base: str | Path) -> dict[str, dict]:
    """The configs of all components of a single file, stored in its header."""
    components = ["vae", "text_encoder"] + ["text_encoder_2"] * bool(unet.config.pooled)
    return {"unet": unet_dict(unet.config)} | {name: read_config(base, name) for name in components}


def single_file(unet: UNet, base: str | Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of an LDM (SD1.5) or SGM (SDXL) file: the UNet, and the autoencoder and text encoders of `base`."""
    vae = load_vae(base)
    own = unet.state_dict()
    tensors = {key_names.UNET + key_names.unet_name(key, unet.config): t for key, t in own.items()}
    for key, t in vae.state_dict().items():
        name = key_names.VAE + key_names.vae_name(key, len(vae.config.channels))
        tensors[name] = t[..., None, None] if t.ndim == 2 else t  # LDM stores attention as 1x1 convolutions
    prefix = key_names.CLIP_L_SDXL if unet.config.pooled else key_names.CLIP_L
    first = load_clip(base, "text_encoder", "cpu", dtype).state_dict()
    tensors |= {f"{prefix}text_model.{key.removeprefix('text_model.')}": t for key, t in first.items()}
    if unet.config.pooled:
        second = load_clip(base, "text_encoder_2", "cpu", dtype).state_dict()
        _, names = key_names.text_layouts(second)[1]
        tensors |= key_names.fuse({key_names.CLIP_G + names[key]: t for key, t in second.items()})
    return tensors


def modelspec(unet: UNet, title: str) -> dict[str, str]:
    """Header fields that A1111 and others show (Stability AI's model metadata, 1.0.1)."""
    xl = bool(unet.config.pooled)
    side = 8 * unet.config.sample_size
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base" if xl else "stable-diffusion-v1",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "resolution": f"{side}x{side}",
        "prediction_type": "epsilon",
        "date": date.today().isoformat(),
    }
    return {f"modelspec.{key}": value for key, value in spec.items()}


def inspect(path: Path) -> str:
    """A few lines that describe a weight file: kind, number of tensors and parameters, dtypes, header."""
    tensors = read_file(path)
    count = sum(t.numel() for t in tensors.values())
    types = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    lines = [
        f"{path}: {key_names.identify(tensors)}",
        f"{len(tensors)} tensors, {count:,} parameters, {', '.join(types)}",
    ]
    lines += [f"{key}: {value[:100]}" for key, value in weight_files.read_metadata(path).items()]
    return "\n".join(lines)


def convert(source: str, path: str, layout: str, dtype: torch.dtype, base: str | None, ema: bool = False) -> None:
    """Rewrite the UNet of a source in another layout. An adapter is merged, unless the layout is an adapter's.

    base: by default the run's own, else the source itself if it contains more than a UNet.
    ema: read the EMA copy of a single file that has one.
    """
    place, run = find(source, "tuned_unet"), Path(source) / "run.json"
    if base is None and run.is_file():
        base = weight_files.read_json(run)["args"]["base"]
    if place.is_file() and key_names.is_adapter(read_file(place)):
        if base is None:
            raise ValueError(f"{place}: an adapter needs --base, the model that it adapts")
        if ema:
            raise ValueError(f"{place}: --ema: an adapter has no EMA copy")
        prediction.check(place, [])
        unet = load_unet(base)
        lora.load(unet, place)
        if layout in ADAPTER_LAYOUTS:
            return lora.save(unet, path, layout, dtype=dtype)
        lora.merge(unet)
    else:
        unet = load_unet(place, ema=ema)
    save_unet(unet, path, layout, dtype, base=base or source)
