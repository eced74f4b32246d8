"""Do the paper's two ideas help other methods, and which part of ImageReFL does what?

    python benchmarks/ablations.py --device cuda --jobs 8 --minutes 9
    python benchmarks/ablations.py --rehearse          two updates per run, which measures nothing

Trains each variant with each seed on the tiny base, twice as long as ReFL in arithmetic; evaluates checkpoints on the
way; prints all tables. Call it again to continue: what is done is skipped, and one that was stopped is resumed.
Finished runs are FOLDER/NAME-SEED.json; with these files alone the tables can be made anew.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.options import ablation_args
from utils import cli

if __name__ == "__main__":
    ARGS = ablation_args(__doc__)  # before the slow imports, so that --help answers at once

import json
import os
import shutil
import subprocess
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import torch

from benchmarks import ablation_tables
from pretrained import weight_files
from pretrained.configs import unet_config, vae_config
from training import checkpoint, cost, options, presets
from utils import disk
from utils.device import choose_device
from weights import load_unet, read_config, save_unet

ROOT = Path(__file__).parent.parent
BUDGETS = 2  # arithmetic of a run, in that of ReFL's run
NEVER = 10**6


@dataclass(frozen=True)
class Variant:
    """A way to train: flags of train.py, and constants of the code that are set, as module.NAME=VALUE."""

    name: str
    title: str
    flags: tuple[str, ...]  # the method first
    constants: tuple[str, ...] = ()
    compared_with: str = ""  # the same method from noise
    method: str = field(init=False)  # as checkpoints name it
    base_steps: int = field(init=False)  # of its combined generation

    def __post_init__(self):
        method = ("image-" if "--from-image" in self.flags else "") + self.flags[0]
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "base_steps", presets.TINY.switch[method])


REFL = Variant("refl", "ReFL", ("refl",))
IMAGEREFL = Variant("imagerefl", "ImageReFL", ("imagerefl",), compared_with="refl")
GROUPS = {
    "methods": (
        REFL,
        Variant("draft", "DRaFT-3", ("draft",)),
        Variant("drtune", "DRTune-5", ("drtune",)),
        Variant("dpo", "DPO", ("dpo",)),
        IMAGEREFL,
        Variant("image-draft", "Image-DRaFT-3", ("draft", "--from-image"), compared_with="draft"),
        Variant("image-drtune", "Image-DRTune-5", ("drtune", "--from-image"), compared_with="drtune"),
        Variant("image-dpo", "Image-DPO", ("dpo", "--from-image"), compared_with="dpo"),
    ),
    "k_D": (
        IMAGEREFL,
        Variant("kd-0", "ImageReFL, k_D = 0", ("imagerefl", "--diffusion-scale", "0")),
        Variant("kd-1e-3", "ImageReFL, k_D = 1e-3", ("imagerefl", "--diffusion-scale", "1e-3")),
    ),
    "mix": (
        IMAGEREFL,
        Variant("mix-none", "ImageReFL, no ReFL updates", ("imagerefl",), (f"imagerefl.REFL_EVERY={NEVER}",)),
        Variant("mix-1-1", "ImageReFL, 1:1", ("imagerefl",), ("imagerefl.REFL_EVERY=2",)),
    ),
    "start": (
        IMAGEREFL,
        *(Variant(f"start-{i}", f"ImageReFL, t' = {i}", ("imagerefl", "--start", f"{i}")) for i in (20, 25, 35)),
    ),
    "t_f": (
        REFL,
        *(Variant(f"t_f-{n}", f"ReFL, t_f in the last {n}", ("refl",), (f"refl.T_MAX={n}",)) for n in (5, 20)),
    ),
    "k_KL": (
        IMAGEREFL,
        *(
            Variant(f"imagerefl-kl-{k}", f"ImageReFL, k_KL = {k}", ("imagerefl", "--kl-scale", k))
            for k in ("3e-4", "1e-3")
        ),
        REFL,
        *(Variant(f"refl-kl-{k}", f"ReFL, k_KL = {k}", ("refl", "--kl-scale", k)) for k in ("3e-4", "1e-3")),
    ),
}
SET_CONSTANTS = """
import importlib, runpy, sys
root, script, *rest = sys.argv[1:]
sys.path.insert(0, root)
while rest[0] != "--":
    place, _, value = rest.pop(0).partition("=")
    module, _, name = place.partition(".")
    setattr(importlib.import_module(module), name, int(value))
sys.argv = [script, *rest[1:]]
runpy.run_path(script, run_name="__main__")
"""


class OutOfTime(Exception):
    """The time limit came before the end."""


# ---- arithmetic


@cache
def parts_of(base: str) -> dict[str, float]:
    """FLOPs of each part of a step on this base."""
    args = resolved(("refl",), base)
    return cost.flops(args, unet_config(read_config(base)), vae_config(read_config(base, "vae")))


def resolved(flags: tuple[str, ...], base: str) -> Namespace:
    """The flags of train.py, with their defaults."""
    args = options.parse_args(["--base", base, "--device", "cpu", "--method", *flags])
    options.resolve(args, presets.preset_for(base, read_config(base, "unet")))
    return args


def cost_of(variant: Variant, base: str) -> float:
    """Mean FLOPs per image of an update."""
    args, parts = resolved(variant.flags, base), parts_of(base)
    constants = dict(constant.split(".")[1].split("=") for constant in variant.constants)
    before = {name: getattr(cost, name) for name in constants}
    vars(cost).update({name: int(value) for name, value in constants.items()})
    try:
        costs = cost.costs_of(args, parts)
    finally:
        vars(cost).update(before)
    return costs["3:1 mix" if args.method == "imagerefl" else args.method]


def updates_per_stage(variant: Variant, args: Namespace) -> int:
    """Updates between two checkpoints, so that all variants have done the same arithmetic at each."""
    share = cost_of(REFL, args.base) / cost_of(variant, args.base)
    return max(1, round(args.updates * share * BUDGETS / args.stages))


# ---- one run


def call(command: list[str], log: Path, args: Namespace) -> None:
    """Run a command with its output appended to a log. Raises OutOfTime at the time limit, ValueError if it fails."""
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with open(log, "a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        code = process.wait(max(0.0, args.deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()  # train.py saves what it has
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise OutOfTime from None
    if code:
        raise ValueError(f"{log}: failed: {log.read_text().strip().splitlines()[-1][:200]}")


def train(variant: Variant, seed: int, run: Path, args: Namespace) -> None:
    """Train one model, or resume it, unless it is finished. Raises OutOfTime where it stops before its end."""
    result = run / "unet" / "config.json"  # written last
    if result.exists():
        return
    per_stage = updates_per_stage(variant, args)
    flags = ["--method", *variant.flags, "--base", args.base, "--steps", str(per_stage * args.stages)]
    flags += ["--save-every", str(per_stage), "--keep", str(args.stages), "--save-minutes", "1000"]
    flags += ["--seed", str(seed), "--reward", "tiny", "--sample-every", "0", "--device", args.device]
    flags += ["--prompts", str(run.parent / "prompt.txt"), "--output-dir", str(run)]
    flags = ["--resume", str(run)] if (run / "run.json").exists() else flags
    command = [sys.executable, "-c", SET_CONSTANTS, str(ROOT), str(ROOT / "train.py"), *variant.constants, "--", *flags]
    call(command, Path(f"{run}.log"), args)
    if not result.exists():
        raise OutOfTime


def stages_of(run: Path) -> list[Path]:
    """The UNets of a run's checkpoints as folders that evaluate.py reads, in the order of their updates."""
    folders, unet = [], load_unet(run)
    for update, path in checkpoint.checkpoints_in(run / "states").items():
        tensors, _ = checkpoint.read(path)
        prefix = "ema." if any(key.startswith("ema.") for key in tensors) else "unet."
        unet.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        folders.append(run / f"stage-{update:06d}")
        save_unet(unet, folders[-1] / "unet")
    return folders


def evaluate(method: str, unets: list[Path], output: Path, args: Namespace) -> dict:
    """results.json of evaluate.py for UNets in the order of their stages."""
    flags = ["--base", args.base, "--rewards", "tiny,tiny2,rater", "--images-per-prompt", "4", "--device", args.device]
    flags += [f"--checkpoint={method}={unet}" for unet in unets]
    flags += ["--sweep", f"switch={args.switches}", "--output-dir", str(output)]
    flags += ["--limit", str(args.limit)] if args.limit else []
    call([sys.executable, str(ROOT / "evaluate.py"), *flags], Path(f"{output}.log"), args)
    return json.loads((output / "results.json").read_text())


def make(variant: Variant | None, seed: int, folder: Path, args: Namespace) -> None:
    """Train and evaluate one run unless its file exists; None: the base model, as stage 0 of all runs."""
    name = f"{variant.name}-{seed}" if variant else "base"
    done, run = folder / f"{name}.json", folder / name
    if done.exists():
        return
    if time.monotonic() > args.deadline:
        raise OutOfTime
    print(f"{name}: started", flush=True)
    if variant:
        train(variant, seed, run, args)
        unets, method = stages_of(run), variant.method
    else:
        unets, method = [weight_files.find(args.base, "unet")], "refl"
    results = evaluate(method, unets, folder / f"{name}-evaluation", args)
    curves = ablation_tables.curves_of(results)
    stages = [curves[str(unet)] for unet in unets]
    per_stage = updates_per_stage(variant, args) if variant else 0
    disk.write_text(done, json.dumps({"updates per stage": per_stage, "stages": stages}, indent=1) + "\n")
    shutil.rmtree(folder / f"{name}-evaluation")
    for path in [*run.glob("stage-*"), run / "states"]:
        shutil.rmtree(path, ignore_errors=True)
    print(f"{name}: done", flush=True)


# ---- all runs


def chosen(groups: str) -> list[Variant]:
    """The variants of some groups, each once. Raises ValueError for an unknown group."""
    unknown = [name for name in groups.split(",") if name not in GROUPS]
    if unknown:
        raise ValueError(f"--groups {groups}: {unknown[0]} is none of {', '.join(GROUPS)}")
    return list(dict.fromkeys(variant for name in groups.split(",") for variant in GROUPS[name]))


def read(path: Path) -> tuple[list[ablation_tables.Curve], int]:
    """(stages, updates per stage) of a finished run."""
    content = json.loads(path.read_text())
    stages = [{int(steps): values for steps, values in curve.items()} for curve in content["stages"]]
    return stages, content["updates per stage"]


def main(args: Namespace) -> None:
    """Train and evaluate what is missing; write and print tables.md. Raises ValueError for bad flags."""
    variants, folder = chosen(args.groups), Path(args.output_dir)
    args.device, args.deadline = choose_device(args.device), time.monotonic() + 60 * args.minutes
    torch.set_num_threads(1)  # the work is in other processes
    disk.write_text(folder / "prompt.txt", "octopus\n")  # of the table that a run prints at its end
    todo = [(None, 0), *((variant, seed) for seed in args.seeds for variant in variants)]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {which: pool.submit(make, *which, folder, args) for which in todo}
        for (variant, seed), future in futures.items():
            try:
                future.result()
            except OutOfTime:
                print(f"{variant.name if variant else 'base'}, seed {seed}: not finished; call again to continue")
            except ValueError as error:
                print(error, file=sys.stderr)
    if not (folder / "base.json").exists():
        raise ValueError("the base model is not evaluated yet, so there are no tables; call again to continue")
    (base,), _ = read(folder / "base.json")
    runs = {}
    for variant, seed in todo[1:]:
        path = folder / f"{variant.name}-{seed}.json"
        if path.exists():
            stages, per_stage = read(path)
            runs[variant.name, seed] = [base, *stages], per_stage
    text = ablation_tables.text(runs, variants, args.stages // BUDGETS, args.gain, base)
    disk.write_text(folder / "tables.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    cli.run(main, ARGS)
