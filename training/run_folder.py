"""The folder of a run: flags and table in `run.json`, one line per update in `log.jsonl`, checkpoints, the result."""

import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tqdm import tqdm

from pretrained import lora
from training import checkpoint, presets
from utils import disk
from weights import save_unet

# Flags that change no number, or only by the order of a sum.
RESUMABLE_FLAGS = {"resume", "override", "shard", "sample_every", "monitor", "save_every", "save_minutes", "keep"}
PATHS = ("base", "data", "images", "prompts", "reward_weights", "judge_weights", "dino")  # flags that may name a path


def method_name(args: Namespace) -> str:
    """The method as checkpoints, folders and reports name it: "image-draft" is DRaFT with --from-image."""
    return f"image-{args.method}" if getattr(args, "from_image", False) else args.method


def candidates(args: Namespace) -> list[Path]:
    """Where a new run may go: `--output-dir`, or by default the first free one of numbered folders."""
    name = f"runs/{method_name(args)}-{Path(args.base).name}"
    names = [args.output_dir] if args.output_dir else [name, *(f"{name}-{i}" for i in range(2, 10_000))]
    return [Path(name) for name in names]


def new_folder(args: Namespace) -> Path:
    """The first candidate without a run. Raises ValueError if there is none."""
    for folder in candidates(args):
        if not (folder / "run.json").exists():
            return folder
    raise ValueError(f"--output-dir {args.output_dir}: already holds a run; --resume it or name another folder")


@contextmanager
def claim(args: Namespace) -> Iterator[Path]:
    """Hold the folder of the run: of a new one the first that neither has a run nor is held by another process.

    Raises ValueError if another process holds the folder that was named.
    """
    for folder in [Path(args.resume)] if args.resume else candidates(args):
        if not args.resume and (folder / "run.json").exists():
            continue
        with ExitStack() as stack:
            try:
                stack.enter_context(disk.lock(folder))
            except ValueError:
                if args.resume or args.output_dir:
                    raise
                continue
            if args.resume or not (folder / "run.json").exists():  # which another process may just have written
                yield folder
                return
    raise ValueError(f"{new_folder(args)}: another process has started a run there meanwhile; start again")


def resume(args: Namespace) -> Path:
    """Take over the flags of the run that `--resume` names, in place; returns the run's folder.

    Raises ValueError for flags that would change the result, unless `--override` is given, and for runs of another
    command.
    """
    folder = Path(args.resume)
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"--resume {args.resume}: no run.json there, so no run to continue")
    try:
        metadata = json.loads(path.read_text())
        then, places = metadata["args"], metadata.get("places", {})
        free = RESUMABLE_FLAGS | ({"steps"} if then["lr_schedule"] == "constant" else set())
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--resume {args.resume}: its run.json is damaged; restore it, or start a new run") from None
    command = "tiny/pretrain.py" if then.get("method") == "diffusion" else "train.py"
    if then.get("method") is not None and (then["method"] == "diffusion") != (args.method == "diffusion"):
        raise ValueError(f"--resume {folder}: continue it with python {command} --resume {folder}")
    if then.get("cache_latents") and args.method != "diffusion":
        raise ValueError(f"--resume {folder}: was trained on cached latents, which train.py no longer has; start again")
    changed = {key: value for key, value in args.given.items() if then.get(key) != value}
    for key, place in places.items():
        if key in changed and not Path(place).exists():
            free = free | {key}
            print(f"--{key.replace('_', '-')}: {place} is gone, taken from {changed[key]}", file=sys.stderr)
        elif key not in changed and not Path(then[key]).exists() and Path(place).exists():
            then[key] = place  # the run is continued in another folder than the one it was started in
    refused = [f"--{key.replace('_', '-')} {changed[key]} (was {then.get(key)})" for key in changed if key not in free]
    if refused and not args.override:
        raise ValueError(f"{', '.join(refused)}: changes the result of {folder}; leave it out, or add --override")
    vars(args).update(then | changed)
    return folder


def begin(args: Namespace, folder: Path, update: int) -> dict:
    """Prepare the folder to continue after `update`; returns the content of its `run.json`."""
    metadata = json.loads((folder / "run.json").read_text()) if args.resume else {}
    metadata["args"] = {k: v for k, v in vars(args).items() if k not in ("resume", "override", "shard", "given")}
    paths = {key: getattr(args, key, None) for key in PATHS if key != "base" or args.base not in presets.PRESETS}
    metadata["places"] = {
        key: str(Path(path).absolute()) for key, path in paths.items() if path and Path(path).exists()
    }
    metadata.pop("finished", None)
    if args.resume:
        for name in ("states", "unet"):
            checkpoint.remove_temporaries(folder / name)
        checkpoint.truncate_log(folder / "log.jsonl", update)
        print(f"continuing after update {update} of {folder}")
    describe(folder, metadata)
    return metadata


def describe(folder: Path, metadata: dict) -> None:
    """Write `run.json`."""
    disk.write_text(folder / "run.json", json.dumps(metadata, indent=1) + "\n")


def log(folder: Path, row: dict, progress: dict, skipped: list[int]) -> None:
    """Append an update to `log.jsonl`. `skipped`: the indices of its prompts if no optimizer step was taken."""
    row = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}  # valid JSON
    if skipped:
        progress["skipped"] += 1
        values = ", ".join(f"{key} {v}" for key, v in row.items() if key not in ("update", "kind", "lr", "seconds"))
        message = f"update {row['update']} skipped ({progress['skipped']} so far): not finite: {values}"
        tqdm.write(f"{message}; prompts {skipped}", file=sys.stderr)
        row |= {"skipped": progress["skipped"], "prompts": skipped}
    disk.append(folder / "log.jsonl", json.dumps(row))


def save_checkpoint(folder: Path, tensors: dict, progress: dict, keep: int, last: bool) -> None:
    """Save a checkpoint. A failure is only reported, as the next one may succeed; at the last raises OSError."""
    try:
        checkpoint.save_newest(folder / "states", tensors, progress, keep)
    except OSError as error:
        if last:
            raise
        tqdm.write(f"checkpoint not saved, training continues: {error.filename}: {error.strerror}", file=sys.stderr)


def save_result(args: Namespace, unet, folder: Path, update: int) -> None:
    """Write the result of `update` updates: the whole UNet into `unet/`, or the adapter."""
    header = {"base": args.base, "method": method_name(args), "reward": str(args.reward), "step": str(update)}
    header["version"] = presets.VERSION
    if args.lora:
        lora.save(unet, folder, metadata=header)
    else:
        save_unet(unet, folder / "unet", metadata=header)
