"""How a run is doing: fixed prompts and seeds, sampled, shown as a grid and scored.

`train.py` scores base and tuned model at the end. With `--monitor N` it also checks every N updates whether the trained
reward rises while the held-out reward and the diversity fall: over-optimisation, as it happens.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import metrics
import rewards
from combined import combined_weights
from report.sweep import generate_each
from scheduler import Scheduler
from training.data import DataStream, PromptDataset
from training.models import calls_base
from training.options import STEPS
from unet import UNet
from utils import acceleration
from utils.device import autocast
from utils.images import grid, save_png, to_pil

SCHEDULER = Scheduler(STEPS)
SEEDS = 4  # images per prompt that are scored
SIGNIFICANT = 2.0  # a change is significant beyond this many standard errors
GRID_PROMPTS = 6

Scores = dict[str, Tensor]  # "reward", each held-out reward by its name, and "diversity", those that are measured


@contextmanager
def samplers(run) -> Iterator[tuple]:
    """(base, tuned, vae) ready to sample; the base model is on the GPU only meanwhile."""
    args, m = run.args, run.models
    base, tuned, vae, speed = m.base, m.tuned, m.vae, acceleration.speed()
    move = isinstance(base, UNet) and base is not tuned and not calls_base(args)
    if move:
        base.to(args.device)
    if speed and args.device == "cpu" and not args.compile:
        packed = speed.packed_copy(tuned)
        base, tuned, vae = packed if base is tuned else base, packed, speed.packed_copy(vae)
    yield base, tuned, vae
    if move:
        base.to("cpu")  # free GPU memory for training


def jobs_of(run, prompts: list[str], count: int) -> Iterator[tuple[list[str], list[int]]]:
    """Batches of (prompts, seeds): `count` images per prompt, with seeds 0, 1, ..."""
    repeated, seeds = [p for p in prompts for _ in range(count)], list(range(count)) * len(prompts)
    size = 2 * run.args.batch_size
    for part in (slice(at, at + size) for at in range(0, len(repeated), size)):
        yield repeated[part], seeds[part]


def save_grid(run, path: Path) -> None:
    """A grid of fixed prompts and seeds: the base model beside the tuned one. Its metadata: the prompts."""
    shown, rows, heads = run.prompts[:GRID_PROMPTS], [], []
    for name, (count, base_steps) in run.grid_columns.items():
        if name not in run.cached_images:
            images = []
            with samplers(run) as (base, tuned, vae), autocast(run.args.device, run.args.dtype):
                for prompts, seeds in jobs_of(run, shown, count):
                    weights = [combined_weights(STEPS, base_steps)]
                    images += generate_each(
                        base, tuned, vae, run.models.text, SCHEDULER, weights, prompts, seeds, run.size, run.guidance
                    )
            images = to_pil(torch.cat([part.float() for part in images]))
        else:
            images = run.cached_images[name]
        if name == "base":
            run.cached_images[name] = images  # the base model does not change
        rows = rows or [[] for _ in shown]
        rows = [row + images[count * r : count * (r + 1)] for r, row in enumerate(rows)]
        heads += [f"{name}, seed {k}" for k in range(count)]
    save_png(grid(rows, shown, heads), path, "\n".join(shown))


@torch.no_grad()
def evaluate(run, base_steps: list[int], features: list[Tensor] | None = None) -> list[Scores]:
    """Scores for each number of base steps: rewards per image (N,), diversity per prompt (P,).

    `features`: a list to which the features (N, D) of each are added.
    """
    m, count = run.models, len(base_steps)
    held_out = m.judge.rewards if m.judge else []
    scorers = {"reward": m.reward} | {reward.name: rewards.WeightedSum([reward], [1.0]) for reward in held_out}
    if m.features:
        scorers["diversity"] = lambda images, _: m.features(images)
    found = [{key: [] for key in scorers} for _ in range(count)]
    schedules = [combined_weights(STEPS, n) for n in base_steps]
    with samplers(run) as (base, tuned, vae):
        jobs = list(jobs_of(run, run.prompts, SEEDS))
        for prompts, seeds in tqdm(jobs, "scoring", unit="batch", leave=False):
            with autocast(run.args.device, run.args.dtype):
                generated = generate_each(
                    base, tuned, vae, m.text, SCHEDULER, schedules, prompts, seeds, run.size, run.guidance
                )
            for scores, images in zip(found, generated, strict=True):
                for key, score in scorers.items():
                    scores[key].append(score(images.float(), prompts).float().cpu())
    found = [{key: torch.cat(parts) for key, parts in scores.items()} for scores in found]
    group = [i for i in range(len(run.prompts)) for _ in range(SEEDS)]
    for scores in found if "diversity" in scorers else []:
        if features is not None:
            features.append(scores["diversity"])
        scores["diversity"] = metrics.group_diversity(scores["diversity"], group)
    return found


@torch.no_grad()
def distances(run, features: Tensor) -> dict[str, float]:
    """FID and LogCovDist (Figure 2) of the features (N, D) of scored images to those of N images of the data.

    So few images bias both, equally at every check. Empty where the data has prompts alone.
    """
    if isinstance(run.stream.data, PromptDataset):
        return {}
    if "real features" not in run.cached_images:
        with closing(DataStream(run.stream.data, run.args.seed + 1)) as stream:
            images, _ = stream.batch(len(features))
        parts = images.split(2 * run.args.batch_size)
        real = torch.cat([run.models.features(part.to(run.args.device)).float().cpu() for part in parts])
        run.cached_images["real features"] = real
    real = run.cached_images["real features"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # N < D
        return {"fid": metrics.fid(features, real), "logcovdist": metrics.log_covariance_distance(features, real)}


def summarise(found: list[Scores], names: list[str]) -> dict[str, dict]:
    """Mean and standard deviation of each score, one row per name."""
    return {
        name: {key: [v.mean().item(), v.std(correction=min(1, len(v) - 1)).item()] for key, v in scores.items()}
        for name, scores in zip(names, found, strict=True)
    }


def layout(table: dict[str, dict[str, list[float]]]) -> str:
    """The table as text: mean ± standard deviation."""
    columns = list(next(iter(table.values())))
    lines = [f"{'':12}" + "".join(f"{column:>20}" for column in columns)]
    for name, values in table.items():
        lines.append(f"{name:12}" + "".join(f"{m:>12.4f} ± {s:.3f}" for m, s in (values[c] for c in columns)))
    return "\n".join(lines)


def changes(first: Scores, now: Scores) -> dict[str, tuple[float, float]]:
    """Mean change of each score since the first check, and its standard error over prompts."""
    return {key: metrics.paired_difference(now[key], first[key]) for key in now if key in first}


def overfits(change: dict[str, tuple[float, float]]) -> bool:
    """True if the reward has risen and everything that is not trained on has fallen, each significantly."""
    risen = {key: difference > SIGNIFICANT * error for key, (difference, error) in change.items()}
    fallen = {key: -difference > SIGNIFICANT * error for key, (difference, error) in change.items()}
    return risen["reward"] and all(fell for key, fell in fallen.items() if key != "reward")


def describe(change: dict[str, tuple[float, float]]) -> str:
    """The changes as text: "reward +0.120 ± 0.010, judge -0.051 ± 0.012"."""
    return ", ".join(f"{key} {difference:+.3f} ± {error:.3f}" for key, (difference, error) in change.items())


def check(run, update: int, values: dict) -> bool:
    """Add the scores of the tuned model alone to `values`; warn and return True if it overfits."""
    features: list[Tensor] = []
    (scores,) = evaluate(run, [0], features)
    per_prompt = {key: v.view(len(run.prompts), -1).mean(1) for key, v in scores.items()}
    far = distances(run, features[0]) if features else {}
    measured = {key: v.mean().item() for key, v in per_prompt.items()} | far
    values |= {f"monitor_{key}": round(v, 5) for key, v in measured.items()}
    first = {key: v.tolist() for key, v in per_prompt.items()} | {key: [v] for key, v in far.items()}
    first = run.metadata.setdefault("monitor", first)
    change = changes({key: torch.tensor(v) for key, v in first.items()}, per_prompt)
    warned = overfits(change)
    if warned:
        message = f"update {update + 1}: over-optimisation: the reward rises and all else falls: {describe(change)}"
        tqdm.write(message, file=sys.stderr)
    return warned
