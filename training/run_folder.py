"""The folder of a run: its flags and table in `run.json`, a line an update in `log.jsonl`, `states/`, the result."""

import json
import math
import sys
from pathlib import Path

from tqdm import tqdm

import weights
from pretrained import lora
from training import checkpoint, presets
from utils import disk

# No number changes with these, or by a sum's order alone.
HARMLESS = {"resume", "override", "shard", "sample_every", "monitor", "save_every", "save_minutes", "keep"}


def new_folder(args) -> Path:
    """The folder of a new run; never one that holds a run already."""
    name = f"runs/{args.method}-{Path(args.base).name}"
    folders = [args.output_dir] if args.output_dir else [name, *(f"{name}-{i}" for i in range(2, 10_000))]
    for folder in map(Path, folders):
        if not (folder / "run.json").exists():
            return folder
    raise ValueError(f"--output-dir {args.output_dir}: holds a run already; --resume it or name another folder")


def read(args) -> Path:
    """Take the flags of the run that `--resume` names, and this call's where they may differ; returns the run's folder.

    Raises ValueError for flags that would change the result, unless `--override` is given.
    """
    folder = Path(args.resume)
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"--resume {args.resume}: no run.json there, so no run to go on with")
    try:
        then = json.loads(path.read_text())["args"]
        free = HARMLESS | ({"steps"} if then["lr_schedule"] == "constant" else set())
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--resume {args.resume}: its run.json is damaged; put it back, or start anew") from None
    changed = {key: value for key, value in args.given.items() if then.get(key) != value}
    refused = [f"--{key.replace('_', '-')} {changed[key]} (was {then.get(key)})" for key in changed if key not in free]
    if refused and not args.override:
        raise ValueError(f"{', '.join(refused)}: changes the result of {folder}; leave it out, or add --override")
    vars(args).update(then | changed)
    return folder


def begin(args, folder: Path, update: int) -> dict:
    """Put the folder in order to go on after `update`; returns the content of its `run.json`."""
    about = json.loads((folder / "run.json").read_text()) if args.resume else {}
    about["args"] = {k: v for k, v in vars(args).items() if k not in ("resume", "override", "shard", "given")}
    about.pop("finished", None)
    if args.resume:
        for name in ("states", "unet"):
            checkpoint.remove_temporaries(folder / name)
        checkpoint.truncate_log(folder / "log.jsonl", update)
        print(f"going on after update {update} of {folder}")
    describe(folder, about)
    return about


def describe(folder: Path, about: dict) -> None:
    """Write `run.json`."""
    disk.write_text(folder / "run.json", json.dumps(about, indent=1) + "\n")


def note(folder: Path, row: dict, progress: dict, skipped: list[int]) -> None:
    """Add an update to `log.jsonl`. `skipped`: the indices of its prompts where no step was taken."""
    row = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}  # as JSON
    if skipped:
        progress["skipped"] += 1
        told = ", ".join(f"{key} {v}" for key, v in row.items() if key not in ("update", "kind", "lr", "seconds"))
        about = f"update {row['update']} skipped, the {progress['skipped']}. in all: not finite: {told}"
        tqdm.write(f"{about}; prompts {skipped}", file=sys.stderr)
        row |= {"skipped": progress["skipped"], "prompts": skipped}
    disk.append(folder / "log.jsonl", json.dumps(row))


def save(folder: Path, tensors: dict, progress: dict, keep: int, last: bool) -> None:
    """Save the state. Where that fails and training goes on, the next one may succeed: raises OSError at the last."""
    try:
        checkpoint.save_newest(folder / "states", tensors, progress, keep)
    except OSError as error:
        if last:
            raise
        tqdm.write(f"not saved, training goes on: {error.filename}: {error.strerror}", file=sys.stderr)


def save_result(args, m, folder: Path, update: int) -> None:
    """Write what was trained in so many updates: the whole `unet/`, or the adapter."""
    header = {"base": args.base, "method": args.method, "reward": str(args.reward), "step": str(update)}
    header["version"] = presets.VERSION
    if args.lora:
        lora.save(m.unet, folder, metadata=header)
    else:
        weights.save_unet(m.ema or m.unet, folder / "unet", metadata=header)
