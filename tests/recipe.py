"""Reproducible weights and inputs: each tensor is seeded by its key, so the golden tests need no weight files."""

import json
import math
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

import weights
from pretrained.configs import vae_dict
from unet import UNet, UNetConfig
from utils import disk
from vae import VAE, VAEConfig

GOLDEN = Path(__file__).parent / "golden"
TINY = Path(__file__).parent.parent / "tiny" / "base"


def rnd(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def fill(key: str, shape: torch.Size) -> Tensor:
    t = rnd(key, *shape)
    if len(shape) == 1:
        return 1 + 0.1 * t if key.endswith("weight") else 0.05 * t
    return t / math.sqrt(math.prod(shape[1:]))


def filled(module: nn.Module) -> nn.Module:
    """The module, with each weight seeded by its key."""
    module.load_state_dict({key: fill(key, t.shape) for key, t in module.state_dict().items()})
    return module.eval()


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def golden_config(name: str) -> dict:
    return json.loads(golden(name)[1]["config"])


def mini_base(folder: Path) -> str:
    """A base that runs fast: the tiny base's text encoder with a smaller UNet and autoencoder."""
    config = UNetConfig((16, 32), (1, 0), 1, 1, (2, 2), context=128, latent_channels=4, groups=4, sample_size=8)
    weights.save_unet(filled(UNet(config)), folder / "unet")
    vae = filled(VAE(VAEConfig((4, 4, 4, 8), 1, 4, 1)))
    disk.write(folder / "vae" / "diffusion_pytorch_model.safetensors", vae.state_dict())
    disk.write_text(folder / "vae" / "config.json", json.dumps(vae_dict(vae.config)))
    for name in ("text_encoder", "tokenizer"):
        (folder / name).symlink_to(TINY / name)
    return str(folder)
