"""Compare tuned models with the tiny base on the same noise, by the nearest perfect pictures, which this world knows.

    python tiny/compare.py --checkpoint runs/imagerefl-tiny --switch 30

Prints for the base, for each checkpoint with the switch and for it alone: the rewards divided by 10, as the loss sees
them; the distance to the nearest perfect picture that fits the caption; the diversity, and that of those nearest
perfect pictures: of styles, places and backgrounds, without that of blur, noise and pale colours. Each with its
standard error, and the change from the base with its paired error over prompts. Ten minutes per checkpoint on two
cores.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics
import rewards
import weights
from combined import combined_weights
from pretrained.features import clip_features
from report.sweep import generate_each
from scheduler import Scheduler
from training import presets
from training.emoji import EmojiSet
from utils import cli

BATCH = 16
SIZE = (64, 64)


class Measure:
    """Images (N, 3, 64, 64) of prompts, 4 each -> values per prompt (P,), and what the pictures show."""

    def __init__(self, images_per_prompt: int):
        self.rewards = {name: rewards.load(name) for name in presets.TINY_REWARDS}
        self.features, self.count = clip_features(presets.FEATURES), images_per_prompt

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Counter]]:
        images = images.clamp(-1, 1)
        found = self.rewards["rater"].look_up(images, prompts)
        values = {name: reward(images, prompts) * reward.factor for name, reward in self.rewards.items()}
        values["distance"] = torch.tensor([f.distance for f in found])
        values = {name: v.view(-1, self.count).mean(1) for name, v in values.items()}
        perfect = torch.stack([f.target for f in found])
        for name, pictures in (("diversity", images), ("diversity of what is drawn", perfect)):
            features = torch.cat([self.features(part) for part in pictures.split(BATCH)])
            values[name] = metrics.group_diversity(features, prompts)
        return values, {"styles": Counter(f.style for f in found), "backgrounds": Counter(f.background for f in found)}


def generate(checkpoint: str, base_steps: list[int], prompts: list[str], seeds: list[int]) -> list[Tensor]:
    """Images (N, 3, 64, 64) for each number of base steps."""
    base, tuned = weights.load_tuned(checkpoint, "tiny")
    vae, text = weights.load_vae("tiny"), weights.load_text("tiny")
    schedules, parts = [combined_weights(40, n) for n in base_steps], []
    for at in range(0, len(prompts), BATCH):
        some = prompts[at : at + BATCH], seeds[at : at + BATCH], SIZE, presets.TINY.guidance
        parts.append(generate_each(base, tuned, vae, text, Scheduler(40), schedules, *some))
    return [torch.cat(images) for images in zip(*parts, strict=True)]


def row(name: str, values: dict[str, Tensor], base: dict[str, Tensor]) -> str:
    """A line of the table. Of a change also how many of its errors it is."""
    cells = []
    for key, v in values.items():
        mean, error = metrics.mean_and_error(v)
        cells.append(f"{mean:.3f} ± {error:.3f}")
        if values is not base:
            change, error = metrics.paired_difference(v, base[key])
            cells[-1] += f" ({change:+.3f}, {change / error:+.1f} errors)"
            cells[-1] += f", {mean / base[key].mean():.0%} kept" if key.startswith("diversity") else ""
    return f"| {name} | " + " | ".join(cells) + " |"


def main(args) -> None:
    concepts = EmojiSet().concepts[: args.limit]
    prompts = [concept for concept in concepts for _ in range(args.images_per_prompt)]
    seeds = list(range(1, args.images_per_prompt + 1)) * len(concepts)
    measure, base = Measure(args.images_per_prompt), None
    for checkpoint in args.checkpoint:
        base_steps = [40, args.switch, 0] if base is None else [args.switch, 0]
        names = {40: "base", args.switch: f"{checkpoint}, --switch {args.switch}", 0: f"{checkpoint} alone"}
        for n, images in zip(base_steps, generate(checkpoint, base_steps, prompts, seeds), strict=True):
            values, kinds = measure(images, prompts)
            if base is None:
                base = values
                print("| | " + " | ".join(base) + " |\n" + "|---" * (len(base) + 1) + "|")
            print(row(names[n], values, base))
            print(
                f"{names[n]}:",
                *(f"{key} {dict(counts.most_common())}" for key, counts in kinds.items()),
                file=sys.stderr,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", required=True, help="run or weights; may be repeated")
    parser.add_argument("--switch", type=int, default=30, help="steps of the base model (default: 30)")
    parser.add_argument("--images-per-prompt", type=int, default=4, help="default: 4")
    parser.add_argument("--limit", type=int, default=64, help="number of prompts (default: all 64 concepts)")
    cli.run(main, parser.parse_args())
