"""Checkpoints of a training run: safetensors with a JSON header, written atomically, never a pickle.

A checkpoint holds the trainable weights, the optimizer state and a small dictionary `info`, with a checksum of
everything. A run's folder keeps the last few; a process that writes there holds the folder's lock.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from utils import disk, distributed


def checksum(tensors: dict[str, Tensor], info: str) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of CPU tensors, and of `info`."""
    digest = hashlib.sha256(info.encode())
    for key in sorted(tensors):
        t = tensors[key].detach().contiguous()
        digest.update(f"{key} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save(path: str | Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, info: dict) -> None:
    """Save named modules, the optimizer state and `info`."""
    write_checkpoint(path, tensors_of(modules, optimizer), info)


def tensors_of(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU. Gathers sharded modules to rank 0: a collective."""
    tensors = {f"{name}.{k}": t for name, module in modules.items() for k, t in module.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": t for k, t in moments.items()}
    return distributed.gather_to_rank0(tensors)


def write_checkpoint(path: str | Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Write the tensors of a checkpoint, and `info`."""
    text = json.dumps(info)
    disk.write(path, tensors, {"info": text, "sha256": checksum(tensors, text)})


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a checkpoint, and its `info`. Raises ValueError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if checksum(tensors, header.get("info", "")) != header.get("sha256"):
        raise ValueError(f"{path}: damaged (its checksum differs)")
    return tensors, json.loads(header["info"])


def load(path: str | Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict:
    """Load what `save` wrote into the same modules and optimizer; returns its `info`.

    Raises ValueError, with nothing loaded, if the file is damaged or was saved from other modules.
    """
    tensors, info = read(path)
    restore(path, tensors, modules, optimizer)
    return info


def restore(path: str | Path, tensors: dict[str, Tensor], modules: dict, optimizer: torch.optim.Optimizer) -> None:
    """Copy the tensors of a checkpoint into modules and optimizer. Raises ValueError if they do not fit."""
    for name, module in modules.items():
        for key, t in module.state_dict().items():
            other = tensors.get(f"{name}.{key}")
            if other is None or other.shape != t.shape:
                raise ValueError(f"{path}: saved from other networks: no {name}.{key} of shape {tuple(t.shape)} in it")
    for name, module in modules.items():
        parts = {k: distributed.scatter(tensors[f"{name}.{k}"], t) for k, t in module.state_dict().items()}
        module.load_state_dict(parts)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key in (k for k in tensors if k.startswith("optimizer.")):
        _, i, name = key.split(".")
        moments.setdefault(int(i), {})[name] = distributed.scatter(tensors[key], parameters[int(i)])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by update, oldest first."""
    return dict(sorted((int(path.stem.split("-")[1]), path) for path in folder.glob("step-*.safetensors")))


def save_newest(folder: Path, tensors: dict[str, Tensor], info: dict, keep: int) -> None:
    """Save the checkpoint of `info["update"]`; remove those of later updates, and all but the last `keep`."""
    write_checkpoint(folder / f"step-{info['update']:06d}.safetensors", tensors, info)
    found = checkpoints_in(folder)
    kept = [update for update in found if update <= info["update"]][-keep:]
    for update in found.keys() - kept:
        found[update].unlink()


def load_newest(folder: Path, modules: dict, optimizer: torch.optim.Optimizer) -> dict:
    """Load the newest undamaged checkpoint and report damaged ones; returns its `info`, or {} if there are none.

    Raises ValueError if all are damaged.
    """
    found = checkpoints_in(folder)
    for path in reversed(found.values()):
        try:
            tensors, info = read(path)
        except ValueError as error:
            print(f"{error}; using the previous one", file=sys.stderr)
            continue
        restore(path, tensors, modules, optimizer)
        return info
    if found:
        raise ValueError(f"{folder}: all {len(found)} checkpoints are damaged; remove them to start from update 1")
    return {}


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files of a killed process: our `NAME.tmp`, safetensors' `.tmpABCDEF`."""
    for path in (*folder.glob("*.tmp"), *folder.glob(".tmp*")):
        path.unlink()


def truncate_log(path: Path, update: int) -> None:
    """Truncate log.jsonl after `update`; later updates will be recomputed."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["update"] > update:
                break
        except ValueError:
            break  # an incomplete line: the process was killed while writing
        kept.append(line + "\n")
    disk.write_text(path, "".join(kept))
