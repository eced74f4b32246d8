"""Measure the tiny base for README.md: its autoencoder, its samples with the held-out features, its rewards' scores.

    python tiny/measure.py

Each value is also measured on real emoji, as an upper bound. Takes a quarter of an hour on two cores.
"""

import argparse
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics
import rewards
import weights
from combined import combined_weights, generate
from scheduler import Scheduler
from tiny.make_rewards import damage
from tiny.make_vae import evaluate as evaluate_vae
from training import presets
from training.data import Composition, EmojiSet
from utils.device import autocast
from utils.images import to_tensor

OPEN = ("octopus", "tiger", "red apple", "penguin", "rocket", "frog", "strawberry", "hamburger", "ghost", "owl")


class Classifier:
    """Zero-shot classification of concept, style and background with the held-out CLIP."""

    def __init__(self, emoji: EmojiSet, device: str):
        self.emoji, self.device = emoji, device
        self.clip = rewards.load("clipscore", presets.FEATURES, device)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) -> normalised features (N, 128)."""
        parts = (self.clip.prepare(part.to(self.device), self.clip.size) for part in images.split(256))
        return torch.cat([F.normalize(self.clip.network.encode_image(part), dim=1).cpu() for part in parts])

    def best(self, features: torch.Tensor, captions: list[str]) -> list[int]:
        """Index of the best matching caption of each image."""
        return (features @ self.clip.text(captions, self.device)[0].cpu().T).argmax(1).tolist()

    def concept(self, features: torch.Tensor) -> list[str]:
        return [self.emoji.concepts[i] for i in self.best(features, self.emoji.concepts)]

    def style(self, features: torch.Tensor, concept: str) -> list[str]:
        return [self.emoji.styles[i] for i in self.best(features, [f"{concept}, {s} style" for s in self.emoji.styles])]

    def background(self, features: torch.Tensor, concept: str) -> list[str]:
        grounds = self.emoji.backgrounds
        captions = [f"{concept}, on a{'n' * (b == 'orange')} {b} background" for b in grounds]
        return [grounds[i] for i in self.best(features, captions)]


class Sampler:
    """Samples the tiny base with guidance, with consecutive seeds."""

    def __init__(self, device: str):
        self.unet, self.vae, self.text = (
            load("tiny", device) for load in (weights.load_unet, weights.load_vae, weights.load_text)
        )
        self.device, self.seed = device, 0

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        samples, schedule = [], combined_weights(40, 40)
        for at in tqdm(range(0, len(prompts), 64), "sampling", unit="batch"):
            part = prompts[at : at + 64]
            seeds = [self.seed + k for k in range(len(part))]
            self.seed += len(part)
            with autocast(self.device):
                images = generate(
                    self.unet, self.unet, self.vae, self.text, Scheduler(40), schedule,
                    part, seeds, (64, 64), presets.TINY.guidance,
                )  # fmt: skip
            samples.append(images.float().clamp(-1, 1).cpu())
        return torch.cat(samples)


def real(emoji: EmojiSet, compositions: list[Composition]) -> torch.Tensor:
    return torch.stack([to_tensor(emoji.draw(p)) for p in compositions])


def entropy(values: list[str]) -> float:
    """Entropy of the values' frequencies in bits."""
    shares = [n / len(values) for n in Counter(values).values()]
    return -sum(p * math.log2(p) for p in shares)


def agree(a: list[str], b: list[str]) -> float:
    """Percent of equal entries."""
    return 100 * sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


@torch.no_grad()
def print_scores(emoji: EmojiSet, sample: Sampler, count: int, device: str) -> None:
    """Print the rewards' mean raw scores on `count` images of each kind."""
    shown = [emoji.describe(200_000 + i) for i in range(count)]
    images, captions, rng = real(emoji, shown), [p.caption for p in shown], np.random.default_rng(0)
    concepts = [p.concept for p in shown]
    kinds = {"real": (images, captions)}
    kinds |= {s: (real(emoji, [replace(p, style=s) for p in shown]), concepts) for s in emoji.styles}
    kinds["base's samples"] = (sample(concepts), concepts)
    kinds["damaged"] = (torch.stack([damage(image, rng) for image in images]), captions)
    kinds["wrong caption"] = (images, captions[1:] + captions[:1])
    kinds["noise"] = (torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1), captions)
    print("\n| reward | " + " | ".join(kinds) + " |")
    for name in presets.TINY_REWARDS:
        reward = rewards.load(name, device=device)
        means = [reward(images.to(device), captions).mean().item() for images, captions in kinds.values()]
        print(f"| `{name}` | " + " | ".join(f"{value:.2f}" for value in means) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--share", type=float, default=1.0, help="share of the samples, for a quick trial")
    args = parser.parse_args()
    emoji = EmojiSet(seed=30_000)
    classifier, sample = Classifier(emoji, args.device), Sampler(args.device)
    count = 32 * max(1, round(32 * args.share))
    psnr, _ = evaluate_vae(sample.vae, 30_000, count, args.device)
    print(f"autoencoder on {count} new compositions, PSNR in dB: {psnr:.2f}")
    print_scores(emoji, sample, round(200 * args.share), args.device)

    def report(what: str, base: float, true: float) -> None:
        print(f"{what:58} {base:8.4f} {true:8.4f}", flush=True)

    print(f"{'':58} {'base':>8} {'real':>8}")
    # 8 images for each of 50 prompts
    prompts = [c for c in emoji.concepts[:50] for _ in range(max(1, round(8 * args.share)))]
    shown = [replace(emoji.describe(i), concept=concept) for i, concept in enumerate(prompts)]
    sides = [classifier.concept(classifier.features(images)) for images in (sample(prompts), real(emoji, shown))]
    report("right concept first, 50 prompts, %", *(agree(side, prompts) for side in sides))

    # 64 images for each of 10 open prompts
    count = max(8, round(64 * args.share))
    kinds = {"base": [], "real": []}
    for n, concept in enumerate(OPEN):
        shown = [replace(emoji.describe(1000 * n + i), concept=concept) for i in range(count)]
        for side, images in (("base", sample([concept] * count)), ("real", real(emoji, shown))):
            features = classifier.features(images)
            kinds[side].append((classifier.style(features, concept), classifier.background(features, concept)))

    def over_prompts(f) -> list[list[float]]:
        return [[f(*pair) for pair in kinds[side]] for side in ("base", "real")]

    report("open prompts: fewest styles of 4 seen", *map(min, over_prompts(lambda s, b: len(set(s)))))
    report("open prompts: fewest backgrounds of 8 seen", *map(min, over_prompts(lambda s, b: len(set(b)))))
    bits = over_prompts(lambda s, b: entropy(s))
    report("open prompts: mean style entropy of 2 bits", *(sum(side) / len(side) for side in bits))

    # prompts that name style and background
    shown = [emoji.describe(50_000 + i) for i in range(round(400 * args.share))]
    grounds = [f"on a{'n' * (p.background == 'orange')} {p.background} background" for p in shown]
    sampled = sample([f"{p.concept}, {p.style} style, {ground}" for p, ground in zip(shown, grounds, strict=True)])
    sides = [classifier.features(images) for images in (sampled, real(emoji, shown))]
    for name, classify in (("style", classifier.style), ("background", classifier.background)):
        found = [[classify(f[None], p.concept)[0] for f, p in zip(side, shown, strict=True)] for side in sides]
        report(f"named {name} obeyed, %", *(agree(side, [getattr(p, name) for p in shown]) for side in found))

    # FID of 2,000 samples for training captions
    count = round(2000 * args.share)
    shown = [emoji.describe(100_000 + i) for i in range(2 * count)]
    one, other = classifier.features(real(emoji, shown)).split(count)
    base = classifier.features(sample([p.caption for p in shown[:count]]))
    report(f"FID against {count} real compositions", metrics.fid(base, other), metrics.fid(one, other))


if __name__ == "__main__":
    main()
