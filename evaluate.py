"""Evaluate a base model and models tuned from it: Table 1 and the trade-off curves (Figures 5, 9, 10, 12-15).

    python evaluate.py --base tiny --checkpoint runs/refl-tiny --checkpoint runs/imagerefl-tiny

Prints the table and writes `results.json`, `table.md`, `table.csv`, `tradeoff-*.svg`, and `report.html` with images and
a slider. Images, rewards and features are cached under `points/` by what they were made from: a second call computes
only what is missing.
"""

from report.options import evaluate_args as parse_args

if __name__ == "__main__":
    ARGS = parse_args(description=__doc__)  # before the slow imports, so that --help answers at once

from pathlib import Path

from torch import Tensor

from pretrained import loading
from report import results as report
from report.covariance_definitions import DEFINITIONS
from report.metric_errors import fid_floor
from report.options import name_list
from report.points import Job, distinct, fingerprint, method_and_path, points_of, sample_missing
from report.scorers import Scorer, cached_columns, dataset_batches, scorers_for
from training import presets
from training.data import EmojiSet, ImageDataset, open_data, read_prompts
from utils import cli
from utils.device import choose_device, default_dtype

REFERENCE_SEED = 20_000  # of the emoji that samples of the tiny base are compared with; the training data has seed 0


def complete(args, row: presets.Preset) -> None:
    """Fill in the flags that were not given. Raises ValueError or OSError for values that cannot be used."""
    tiny = row is presets.TINY
    known = presets.TINY_REWARDS[args.prompts is not None :]  # the rater knows no other prompts
    args.rewards = args.rewards or (",".join(known) if tiny else row.reward)
    args.guidance = row.guidance if args.guidance is None else args.guidance
    args.resolution = args.resolution or row.resolution
    args.batch_size = args.batch_size or (64 if tiny else 8)
    args.device = choose_device(args.device)
    cli.check_writable(Path(args.output_dir))
    args.dtype = args.dtype or default_dtype(args.device)
    loading.check_resolution(args.base, args.resolution)
    for flag in ("dino", "inception"):
        if tiny and getattr(args, flag):
            raise ValueError(f"--{flag}: the tiny base is measured by its own features; leave it out")
    if args.reading not in DEFINITIONS:
        raise ValueError(f"--reading {args.reading}: choose from {', '.join(DEFINITIONS)}")


def prompts_of(args, row: presets.Preset) -> tuple[list[str], list[str]]:
    """The distinct prompts, and a note on repeated ones. Raises ValueError or OSError for a bad prompt file."""
    if args.prompts is None:
        prompts = EmojiSet().concepts if row is presets.TINY else list(row.prompts)
    else:
        prompts = read_prompts(args.prompts)
    once = distinct(prompts)
    repeats = f"{len(prompts) - len(once)} of the {len(prompts)} prompts repeat another one; each is counted once."
    return once[: args.limit], [repeats] * (len(once) < len(prompts))


def real_images(args, count: int) -> tuple[EmojiSet | ImageDataset, list[int]]:
    """The reference images of FID, CovDist and LogCovDist: a dataset and `count` indices of distinct images.

    Raises ValueError when there are fewer images.
    """
    if not args.reference:
        return EmojiSet(seed=REFERENCE_SEED), list(range(count))
    data = open_data(args.reference, args.resolution)
    if not isinstance(data, ImageDataset):
        raise ValueError(f"--reference {args.reference}: these are prompts without images; it takes images")
    indices = sorted({path: i for i, (path, _) in reversed(list(enumerate(data.rows)))}.values())  # one caption each
    if len(indices) < count:
        shortage = f"has {len(indices)} images for {count} samples; give at least {count}"
        raise ValueError(f"--reference {args.reference}: {shortage}, or sample fewer with --limit")
    return data, indices[:count]


def real_features(args, jobs: list[Job], scorers: dict[str, Scorer]) -> tuple[dict[str, Tensor], list[str]]:
    """Features (N, D) of as many real images as samples, by column, and a note on FID's floor."""
    names = [name for name in scorers if name.split(".")[0] in ("features", "inception", "dinov2")]
    if not names:
        return {}, []
    data, indices = real_images(args, len(jobs))
    source = fingerprint(Path(args.reference) if args.reference else REFERENCE_SEED, args.resolution, len(jobs))
    folder, real = Path(args.points or Path(args.output_dir, "points"), "reference"), {}
    for name in names:
        path = folder / f"{name}.{source}.safetensors"
        real |= cached_columns(path, "", scorers[name], dataset_batches(args, data, indices))
    floor = fid_floor(real["fid"], len(jobs), len(jobs))
    return real, [f"FID between two sets of {len(jobs)} real images would be about {floor:.2g}."]


def main(args) -> dict:
    """Sample, measure, write; returns what results.json holds. Raises ValueError or OSError for bad input."""
    row = presets.preset_for(args.base, loading.read_config(args.base, "unet"))
    complete(args, row)
    prompts, notes = prompts_of(args, row)
    jobs = [(p, args.seed + k) for p in range(len(prompts)) for k in range(args.images_per_prompt)]
    points = points_of(args, row.switch, prompts)
    held_out_clip, concepts = (presets.FEATURES, EmojiSet().concepts) if row is presets.TINY else (None, [])
    scorers, how = scorers_for(args, held_out_clip, concepts, prompts)
    real, floor = real_features(args, jobs, scorers)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # the points' folders are relative to it, with `..` to shared ones
    sample_missing(args, points, prompts, jobs)
    measured, warned = report.measure(args, points, prompts, jobs, scorers, real, concepts)
    notes += how + report.left_out_notes(args, scorers, prompts, concepts) + floor
    notes += report.checkpoint_notes(points, [method_and_path(c)[1] for c in args.checkpoint]) + warned
    keys = list(measured[0]["values"])
    results = {
        "base": args.base, "steps": args.steps, "guidance": args.guidance, "resolution": args.resolution,
        "images_per_prompt": args.images_per_prompt, "seed": args.seed, "prompts": prompts,
        "columns": report.table_columns(keys, row is presets.TINY), "notes": notes,
        "axes": {"diversity": "diversity" if "diversity" in keys else None, "quality": name_list(args.rewards)},
        "points": measured,
    }  # fmt: skip
    print(report.write(results, folder))
    return results


if __name__ == "__main__":
    cli.run(main, ARGS)
