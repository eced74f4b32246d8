"""Reproduce the paper: its Table 1 or 3 on official weights, or its claims on the tiny base.

    python reproduce.py --base sd15 --data COCO --check    # what is there, what will be fetched, what is missing
    python reproduce.py --base sd15 --data COCO            # train ReFL and ImageReFL, evaluate, compare with Table 1
    python reproduce.py --base sdxl --reward pickscore --data COCO    # Table 3
    python reproduce.py --base sd15 --data COCO --published           # the authors' weights, no training
    python reproduce.py            # the claims on the tiny base, three seeds: about an hour on two cores

Run it again after an interruption: it continues. Missing files are fetched from the hub. Writes `table.md` into
`runs/table-BASE-REWARD`, for the tiny base `claims.md` into `runs/reproduction`.
"""

import os

from report.options import reproduce_args as parse_args

if __name__ == "__main__":
    ARGS = parse_args(description=__doc__)  # before the slow imports, so that --help answers at once
    if ARGS.offline:  # before huggingface_hub is imported, here and in the commands that are called
        os.environ["HF_HUB_OFFLINE"] = "1"

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import evaluate
from report.claims import SeedCurves, Suite, Variant, claims, variants
from reproduction import check, official, plan, stages
from training.presets import TINY
from utils import cli, disk

ROOT = Path(__file__).parent
FULL = Suite(variants(TINY.switch, refl=30, imagerefl=60))  # 1 : 2, as in the paper
QUICK = Suite(FULL.variants, (1,), ("--limit=16", "--sweep=switch=0,10,30", "--sweep=aig=1,4"))


def call(script: str, flags: list[str], run: Path, threads: int) -> None:
    """Run a command of this folder with `threads` threads, its output appended to RUN.log."""
    command, limits = [sys.executable, str(ROOT / script), *flags], {"OMP_NUM_THREADS": str(threads)}
    with open(f"{run}.log", "a") as log:
        subprocess.run(command, env=os.environ | limits, stdout=log, stderr=subprocess.STDOUT)


def train(run: Path, variant: Variant, seed: int, threads: int) -> None:
    """Train one model unless it exists, resuming an interrupted run. Raises ValueError when training fails."""
    result = run / "unet" / "config.json"  # written last
    if result.exists():
        return
    if (run / "run.json").exists():
        flags = ["--resume", str(run)]
    else:
        flags = ["--method", variant.method, "--steps", str(variant.updates), "--seed", str(seed), *variant.flags]
        flags += ["--output-dir", str(run), "--sample-every", "25", "--monitor", "25"]
    print(f"training {run}, see {run}.log", flush=True)
    call("train.py", flags, run, threads)
    if not result.exists():
        raise ValueError(f"training stopped, see {run}.log; run reproduce.py again to continue")


def evaluation(folder: Path, output: Path, models: list[Path], suite: Suite) -> list[str]:
    """Flags of evaluate.py. All images and scores are cached in FOLDER/points, shared by all calls."""
    flags = [f"--points={folder / 'points'}", f"--output-dir={output}", "--images-per-prompt=4", *suite.evaluation]
    return flags + [f"--checkpoint={model}" for model in models]


def train_all(folder: Path, suite: Suite) -> dict[tuple[Variant, int], Path]:
    """Train and sample all models; on a CPU one process per core, since a second core speeds up one process little."""
    runs = {(variant, seed): folder / f"{variant.name}-{seed}" for seed in suite.seeds for variant in suite.variants}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = 1 if torch.cuda.is_available() else min(cores, len(runs))
    folder.mkdir(parents=True, exist_ok=True)

    def make(variant: Variant, seed: int, run: Path) -> None:
        train(run, variant, seed, cores // processes)
        output = folder / "evaluation" / run.name
        if not (output / "results.json").exists():  # an error here comes up again in `main`, which reports it
            print(f"evaluating {run}", flush=True)
            call("evaluate.py", evaluation(folder, output, [run], suite), run, cores // processes)

    pool = ThreadPoolExecutor(processes)
    try:
        for future in [pool.submit(make, *which, run) for which, run in runs.items()]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return runs


def report(folder: Path, suite: Suite) -> None:
    """Evaluate all models together, and write claims.md."""
    runs = {(v, seed): folder / f"{v.name}-{seed}" for seed in suite.seeds for v in suite.variants}
    (refl, *others), points = suite.variants, []
    for variant in others:
        models = [runs[one, seed] for one in (refl, variant) for seed in suite.seeds]
        results = evaluate.main(evaluate.parse_args(evaluation(folder, folder / variant.name, models, suite)))
        points += results["points"]
    results |= {"points": points}
    text = claims(results, [SeedCurves(results, folder, seed) for seed in suite.seeds], suite.variants)
    disk.write_text(folder / "claims.md", text)
    print("\n" + text)


def tiny_stages(folder: Path, suite: Suite) -> list[stages.Stage]:
    """The stages of the tiny base, which comes with the code: nothing is fetched."""
    base = folder / "evaluation" / "base"
    names = [f"{variant.name}-{seed}" for variant in suite.variants for seed in suite.seeds]

    def evaluated(*names: str) -> bool:
        return all((folder / "evaluation" / name / "results.json").is_file() for name in names)

    return [
        stages.Stage(
            "evaluate base",
            lambda: evaluated("base"),
            lambda: evaluate.main(evaluate.parse_args(evaluation(folder, base, [], suite))),
        ),
        stages.Stage("train, evaluate", lambda: evaluated(*names), lambda: train_all(folder, suite)),
        stages.Stage("report", lambda: False, lambda: report(folder, suite)),
    ]


def main(args) -> None:
    """Run the stages that are left, or with --check say what is missing. Raises ValueError when one fails."""
    if args.base == "tiny":
        folder = Path(args.output_dir or f"runs/reproduction{'-quick' * args.quick}")
        if args.check:
            return print("{}" if args.json else "the tiny base comes with the code: nothing is missing")
        notes = stages.Notes(folder)
        notes.check_settings({"quick": args.quick})
        return stages.run(tiny_stages(folder, QUICK if args.quick else FULL), notes)
    data = Path(args.data) if args.data else None
    reward, flags = args.reward or "hpsv2.1", (args.published, args.quick, args.resolution, args.lora)
    settings = plan.Settings(args.base, reward, data, *flags)
    folder = Path(args.output_dir or official.default_folder(settings))
    if args.check:
        found = check.examine(settings, folder, args.gpu_memory)
        print(json.dumps(found, indent=1) if args.json else check.text(found))
        sys.exit(0 if found["ready"] else 2)
    with disk.lock(folder) as lock:
        reproduction = official.Reproduction(settings, folder, lock)
        stages.run(reproduction.stages(), reproduction.notes)


if __name__ == "__main__":
    cli.run(main, ARGS)
