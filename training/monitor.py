"""How a run does: fixed prompts with fixed seeds, sampled, shown and scored; and the paper's Figure 2 while it happens.

`train.py` measures base and tuned model so, before and after. With `--monitor N` it looks every N updates whether the
trained reward rises while the held-out reward and the diversity fall.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import metrics
from combined import combined_weights, generate_each
from scheduler import Scheduler
from speed import prepacked
from training import presets
from unet import UNet
from utils import cli
from utils.images import grid, save_png, to_pil

SCHEDULER = Scheduler(40)
SEEDS = 4  # images of each prompt that are scored
ERRORS = 2.0  # a change counts from so many of its standard errors on

Scores = dict[str, Tensor]  # "reward", "judge" and "diversity", those that are measured


@torch.no_grad()
def images_of(
    args, m, row: presets.Preset, prompts: list[str], count: int, switches: list[int]
) -> Iterator[list[Tensor]]:
    """`count` images a prompt, seeds 0, 1, ..., for each switch: the base model takes so many of 40 steps.

    In plain diffusion there is no base: the model in training takes all steps, with guidance. Some at a time,
    (n, 3, H, W) for each switch; steps that switches share are taken once.
    """
    if isinstance(m.base, UNet):
        m.base.to(args.device)
    tuned, vae = m.ema or m.tuned, m.vae
    if args.device == "cpu" and not args.compile:
        tuned, vae = prepacked.packed_copy(tuned), prepacked.packed_copy(vae)
    base = tuned if args.method == "diffusion" else m.base
    asked, seeds = [p for p in prompts for _ in range(count)], list(range(count)) * len(prompts)
    chunk = 2 * args.batch_size
    for part in (slice(at, at + chunk) for at in range(0, len(asked), chunk)):
        with cli.autocast(args.device, args.dtype):
            made = generate_each(
                base, tuned, vae, m.text, SCHEDULER, [combined_weights(40, switch) for switch in switches],
                asked[part], seeds[part], (args.resolution, args.resolution), row.guidance,
            )  # fmt: skip
        yield [images.float() for images in made]
    if isinstance(m.base, UNet):
        m.base.to("cpu")  # its place is needed for a pass


def show(args, m, row: presets.Preset, prompts: list[str], path: Path) -> None:
    """A grid of six fixed prompts and fixed seeds: the base model beside the tuned one."""
    shown = prompts[:6]
    sides = {"model": (4, 40)} if args.method == "diffusion" else {"base": (2, 40), "tuned": (2, 0)}
    rows, heads = [[] for _ in shown], []
    for name, (count, switch) in sides.items():
        if name in m.shown:
            pictures = m.shown[name]
        else:
            pictures = to_pil(torch.cat([images for (images,) in images_of(args, m, row, shown, count, [switch])]))
        if name == "base":
            m.shown[name] = pictures  # which stay what they are
        rows = [cells + pictures[count * r : count * (r + 1)] for r, cells in enumerate(rows)]
        heads += [f"{name}, seed {k}" for k in range(count)]
    save_png(grid(rows, shown, heads), path)


@torch.no_grad()
def scores_of(args, m, row: presets.Preset, prompts: list[str], switches: list[int]) -> list[Scores]:
    """For each switch reward and judge of each image (N,), and the diversity among the images of each prompt (P,)."""
    group = [i for i in range(len(prompts)) for _ in range(SEEDS)]
    scorers = {"reward": m.reward, "judge": m.judge, "diversity": m.features and (lambda images, _: m.features(images))}
    scorers = {key: score for key, score in scorers.items() if score is not None}
    found, at = [{key: [] for key in scorers} for _ in switches], 0
    for made in images_of(args, m, row, prompts, SEEDS, switches):
        said = [prompts[i] for i in group[at : at + len(made[0])]]
        at += len(said)
        for scores, images in zip(found, made, strict=True):
            for key, score in scorers.items():
                scores[key].append(score(images, said).float().cpu())
    found = [{key: torch.cat(parts) for key, parts in scores.items()} for scores in found]
    for scores in found if "diversity" in scorers else []:
        scores["diversity"] = metrics.group_diversity(scores["diversity"], group)
    return found


def measure(args, m, row: presets.Preset, prompts: list[str], switches: dict[str, int]) -> dict[str, dict]:
    """Mean and standard deviation of each of `scores_of`, a row for each named switch."""
    found = scores_of(args, m, row, prompts, list(switches.values()))
    return {
        name: {key: [v.mean().item(), v.std(correction=min(1, len(v) - 1)).item()] for key, v in scores.items()}
        for name, scores in zip(switches, found, strict=True)
    }


def layout(table: dict[str, dict[str, list[float]]]) -> str:
    """The table as text: mean and standard deviation."""
    columns = list(next(iter(table.values())))
    lines = [f"{'':12}" + "".join(f"{column:>20}" for column in columns)]
    for name, values in table.items():
        lines.append(f"{name:12}" + "".join(f"{m:>12.4f} ± {s:.3f}" for m, s in (values[c] for c in columns)))
    return "\n".join(lines)


def changes(first: Scores, now: Scores) -> dict[str, tuple[float, float]]:
    """Mean change of each score since the first look, and its standard error over the prompts."""
    return {key: metrics.paired_difference(now[key], first[key]) for key in now}


def overfits(change: dict[str, tuple[float, float]]) -> bool:
    """Whether the reward has risen while all that is not trained on has fallen, each beyond its error."""
    risen = {key: difference > ERRORS * error for key, (difference, error) in change.items()}
    fallen = {key: -difference > ERRORS * error for key, (difference, error) in change.items()}
    return risen["reward"] and all(fell for key, fell in fallen.items() if key != "reward")


def line(change: dict[str, tuple[float, float]]) -> str:
    """The changes in words: "reward +0.120 ± 0.010, judge -0.051 ± 0.012"."""
    return ", ".join(f"{key} {difference:+.3f} ± {error:.3f}" for key, (difference, error) in change.items())


def look(args, m, row: presets.Preset, prompts: list[str], about: dict, update: int, values: dict) -> bool:
    """Add to `values` what `--monitor` sees of the tuned model alone; warn, and return True, where it overfits."""
    (scores,) = scores_of(args, m, row, prompts, [0])
    per_prompt = {key: v.view(len(prompts), -1).mean(1) for key, v in scores.items()}
    values |= {f"monitor_{key}": round(v.mean().item(), 5) for key, v in per_prompt.items()}
    first = about.setdefault("monitor", {key: v.tolist() for key, v in per_prompt.items()})
    change = changes({key: torch.tensor(v) for key, v in first.items()}, per_prompt)
    warned = overfits(change)
    if warned:
        told = f"update {update + 1}: the reward rises and all else falls: {line(change)}"
        tqdm.write(told, file=sys.stderr)
    return warned
