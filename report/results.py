"""From images to `results.json`: mean and standard error of every column at every point, and the files of a report.

`args` are the flags of `report/options.py`, completed; a job is (number of the prompt, seed), see `report/points.py`.
"""

import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import metrics
import rewards
from pretrained import loading
from report import distribution_metrics as more
from report import metric_errors, page
from report.points import Job, Point
from report.scorers import Scorer, cached_columns, concept_of, sampled_batches
from utils import disk


def measure(
    args,
    points: list[Point],
    prompts: list[str],
    jobs: list[Job],
    scorers: dict[str, Scorer],
    real: dict[str, Tensor],
    concepts: list[str],
) -> tuple[list[dict], list[str]]:
    """The points as dicts, with `values`: {column: [mean, standard error]}; and notes, the metrics' warnings.

    `real`: the features (N, D) of real images, by column, of the distances that are measured.
    """
    about, measured = json.dumps(jobs), []
    texts, group = [prompts[p] for p, _ in jobs], [p for p, _ in jobs]
    names_concept = torch.tensor([concept_of(text) in concepts for text in texts])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for point in tqdm(points, "measuring", unit="point"):
            paths, columns = point.image_paths(args.output_dir, jobs), {}
            for name, scorer in scorers.items():
                file = Path(args.output_dir, point.folder, f"{name}.safetensors")
                columns |= cached_columns(file, about, scorer, sampled_batches(args, paths, texts))
            values = point_values(columns, real, group, names_concept, args.images_per_prompt, args.reading)
            if args.more_metrics:
                values |= more_values(columns, real, group, args.images_per_prompt)
            measured.append(asdict(point) | {"values": values})
    return measured, list(dict.fromkeys(str(w.message) for w in caught))


def point_values(
    columns: dict[str, Tensor],
    real: dict[str, Tensor],
    group: list[int],
    names_concept: Tensor,
    per_prompt: int,
    reading: str,
) -> dict[str, list[float | None]]:
    """[mean, standard error] of each column of the table, None for nan.

    `group`: the prompt's number of each image; `names_concept` (N,): whether its prompt names a concept. Diversity
    needs two images per prompt, and the right concept a prompt that names one: without, these columns are left out.
    """
    values = {}
    for key, column in columns.items():
        if key == "diversity":
            if per_prompt > 1:
                values[key] = metrics.mean_and_error(metrics.group_diversity(column, group))
        elif key == "concept":
            if names_concept.any():
                own = [p for p, named in zip(group, names_concept, strict=True) if named]
                values[key] = metrics.mean_and_error(column[names_concept], own)
        elif key == "fid":
            values["fid"] = metric_errors.fid_and_error(column, real["fid"], group)
            pair = metric_errors.spectral_distances_and_errors(column, real["fid"], reading, group)
            values["covdist"], values["logcovdist"] = pair
        elif key != "fdd":
            values[key] = metrics.mean_and_error(column, group)
    return without_nan(values)


def more_values(
    columns: dict[str, Tensor], real: dict[str, Tensor], group: list[int], per_prompt: int
) -> dict[str, list[float | None]]:
    """[mean, standard error] of the columns of --more-metrics, those that the features allow."""
    values = {}
    if "diversity" in columns and per_prompt > 1:
        values["vendi"] = metrics.mean_and_error(more.group_vendi(columns["diversity"], group), None)
    if "fid" in columns:
        x, y = columns["fid"], real["fid"]
        if len(x) > more.NEIGHBOURS:
            values |= zip(more.PRDC, more.prdc_and_errors(x, y, group), strict=True)
        values["kid"] = more.kid_and_error(x, y, group)
        values["mind"] = more.mind_and_error(x, y, group)
    if "fdd" in columns:
        values["fdd"] = metric_errors.fid_and_error(columns["fdd"], real["fdd"], group)
    return without_nan(values)


def without_nan(values: dict[str, tuple[float, float]]) -> dict[str, list[float | None]]:
    return {key: [None if math.isnan(v) else v for v in pair] for key, pair in values.items()}


def left_out_notes(args, scorers: dict[str, Scorer], prompts: list[str], concepts: list[str]) -> list[str]:
    """Why the columns for diversity and right concept are left out, or on which prompts the latter is measured."""
    notes, kinds = [], {name.split(".")[0] for name in scorers}
    if args.images_per_prompt == 1 and kinds & {"features", "dino"}:
        notes.append("No diversity, and no curves: with one image per prompt there is no pair to compare; "
                     "--images-per-prompt 2 or more gives both.")  # fmt: skip
    named = sum(concept_of(prompt) in concepts for prompt in prompts)
    if "features" in kinds and not named:
        notes.append(f"No right concept: no prompt begins with the name of one of the {len(concepts)} concepts.")
    elif "features" in kinds and named < len(prompts):
        notes.append(f"Right concept: over the {named} of {len(prompts)} prompts that begin with a concept's name.")
    return notes


def checkpoint_notes(points: list[Point], checkpoints: list[str]) -> list[str]:
    """What the models were tuned on, and checkpoints that add no point because they are copies of another one."""
    trained = {loading.tuning_metadata(path).get("reward") for path in checkpoints} - {None}
    notes = [f"Tuned on {', '.join(sorted(trained))}; other rewards are held out."] * bool(trained)
    measured = {p.checkpoint for p in points}
    copies = [path for path in dict.fromkeys(checkpoints) if path not in measured]
    return notes + [f"{path}: the same weights as another checkpoint; measured once." for path in copies]


def table_columns(keys: Iterable[str], tiny: bool) -> list[dict]:
    """The table's columns in order: key, title, better direction, digits."""
    fixed = {
        "concept": ("right concept, %", "higher", 1),
        "diversity": ("Diversity" if tiny else "DinoDiversity", "higher", 3),
        "fid": ("FID", "lower", 3 if tiny else 2),
        "covdist": ("CovDist", "lower", 5),
        "logcovdist": ("LogCovDist", "lower", 3),
        "vendi": ("Vendi", "higher", 3),
        "precision": ("Precision", "higher", 3),
        "recall": ("Recall", "higher", 3),
        "density": ("Density", "higher", 3),
        "coverage": ("Coverage", "higher", 3),
        "kid": ("KID", "lower", 4),
        "mind": ("MIND", "lower", 3),
        "fdd": ("FD-DINOv2", "lower", 1),
    }
    fixed |= {key: (f"Reward {key}", "higher", 3) for key in rewards.NAMES if key.startswith("tiny")}
    fixed["rater"] = ("Rater", "higher", 3)
    known = {key: fixed.get(key, (key, "higher", 2)) for key in keys}
    return [{"key": k, "title": t, "better": b, "digits": d} for k, (t, b, d) in known.items()]


def write(results: dict, folder: Path) -> str:
    """Write results.json, table.md, table.csv, tradeoff-*.svg and report.html; returns the table and where to look."""
    disk.write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    table = page.markdown(results)
    disk.write_text(folder / "table.md", table)
    disk.write_text(folder / "table.csv", page.csv(results))
    for quality in results["axes"]["quality"] if results["axes"]["diversity"] else []:
        disk.write_text(folder / f"tradeoff-{quality}.svg", page.curves(results, quality))
    return f"\n{table}\nwritten to {folder}, to look at: {page.write(results, folder)}"
