"""The state of a training run on disk: safetensors with a JSON header, never a pickle, never half-written.

A state holds the trainable weights, the optimizer's moments and a small dictionary (step, seed, settings).
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, flush it, and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0o022))
        os.chmod(temporary, 0o666 & ~mask)  # as any new file; the library makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save(path: str | Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, info: dict) -> None:
    """Save what `load` needs to go on: named modules, the optimizer's state, and `info`."""
    tensors = {f"{name}.{k}": t for name, module in modules.items() for k, t in module.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": t for k, t in moments.items()}
    write(path, {k: t.cpu().clone() for k, t in tensors.items()}, {"info": json.dumps(info)})


def load(path: str | Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict:
    """Load what `save` wrote into the same modules and optimizer; returns its `info`."""
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()["info"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name, module in modules.items():
        module.load_state_dict({k: tensors[f"{name}.{k}"] for k in module.state_dict()})
    moments: dict[int, dict[str, Tensor]] = {}
    for key in (k for k in tensors if k.startswith("optimizer.")):
        _, i, name = key.split(".")
        moments.setdefault(int(i), {})[name] = tensors[key]
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return info
