"""Weights and inputs by recipe: every tensor is filled from its own key, so that no weights need to be shipped."""

import json
import math
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def rnd(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def fill(key: str, shape: torch.Size) -> Tensor:
    t = rnd(key, *shape)
    if len(shape) == 1:
        return 1 + 0.1 * t if key.endswith("weight") else 0.05 * t
    return t / math.sqrt(math.prod(shape[1:]))


def filled(module: nn.Module) -> nn.Module:
    """The same module with every weight filled from its key."""
    module.load_state_dict({key: fill(key, t.shape) for key, t in module.state_dict().items()})
    return module.eval()


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def golden_config(name: str) -> dict:
    return json.loads(golden(name)[1]["config"])
