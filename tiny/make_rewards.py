"""Train the two rewards of the tiny base: PickScores at tiny scale, from synthetic raters with different tastes.

    python tiny/make_rewards.py tiny     # likes the modern style and saturated colours
    python tiny/make_rewards.py tiny2    # likes the flat style and light backgrounds

There are no human votes on emoji, so a rater is a formula (`utility`): it prefers images that fit the caption, are
undamaged, and match its taste. The larger the utility difference of two images, the larger the majority of its votes.
A small CLIP is first trained contrastively, then with PickScore's objective: the softmax of two images' scores is the
share of votes for each. Images are real compositions, damaged ones, and samples of the tiny base, so that fine-tuned
models stay within the reward's training distribution.
"""

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
import weights
from combined import cfg, conditional
from refl import random_shift
from scheduler import Scheduler, denoise, sample_noise
from tiny.make_clip import TINY_DIR, build, normalise, tokenize, train
from training.data import Composition, EmojiSet
from training.presets import TINY
from utils.device import autocast
from utils.images import to_tensor

CLEAR = 3.0  # of two images, the first gets sigmoid(CLEAR * difference in utility) of the votes
CAPTIONS = 32  # per batch, with four images each


@dataclass(frozen=True)
class Rater:
    seed: int
    style: str  # preferred style
    light: float  # weight of light backgrounds
    colour: float  # weight of saturated colours


RATERS = {
    "tiny": Rater(seed=2, style="modern", light=0.0, colour=1.5),
    "tiny2": Rater(seed=3, style="flat", light=1.5, colour=0.0),
}


@dataclass(frozen=True)
class Example:
    """An image (3, 64, 64) in [-1, 1], its content, and its damage: 0 none, 1 beyond recognition."""

    image: torch.Tensor
    shows: Composition
    damage: float


def utility(rater: Rater, caption: str, example: Example) -> float:
    """A synthetic rater's utility of an image for a caption. Matching the caption weighs more than taste."""
    concept, *attributes = caption.split(", ")
    p = example.shows
    score = 2.0 * (p.concept == concept) - 3.0 * example.damage + 0.7 * (p.style == rater.style)
    for phrase in attributes:
        right = p.style in phrase if phrase.endswith("style") else p.background in phrase
        score += 1.0 * right
    pixels = example.image / 2 + 0.5
    score += rater.colour * (pixels.amax(0) - pixels.amin(0)).mean().item()
    corners = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    return score + rater.light * corners.mean().item()


def damage(image: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Damage an image in one of eight ways; returns it and the amount."""
    kind, much = int(rng.integers(8)), float(rng.uniform(0.15, 1.0))
    noise = torch.from_numpy(rng.standard_normal((3, 64, 64), dtype=np.float32))
    ramp = torch.linspace(0, 1, 64)
    if kind == 0:  # blurred
        side = max(4, round(40 * (1 - much) + 4))
        small = F.interpolate(image[None], size=side, mode="bilinear", antialias=True, align_corners=False)
        image = F.interpolate(small, size=64, mode="bicubic", align_corners=False)[0]
    elif kind == 1:  # noisy
        image = image + 0.7 * much * noise
    elif kind == 2:  # blotchy
        coarse = F.interpolate(noise[None, :, ::8, ::8], size=64, mode="bicubic", align_corners=False)[0]
        image = image + 0.9 * much * coarse
    elif kind == 3:  # faded to one colour
        image = image + 0.9 * much * (noise[:, :1, :1].clamp(-1, 1) - image)
    elif kind == 4:  # striped, as optimised textures are
        angle, waves = rng.uniform(0, np.pi), rng.uniform(3, 24)
        phase = 2 * np.pi * waves * (ramp[:, None] * np.cos(angle) + ramp[None] * np.sin(angle))
        image = image + 0.8 * much * torch.sin(phase) * noise[:, :1, :1].sign()
    elif kind == 5:  # partly covered
        side = round(20 + 40 * much)
        x, y = (int(v) for v in rng.integers(0, 65 - side, 2))
        image = image.clone()
        image[:, y : y + side, x : x + side] = noise[:, :1, :1].clamp(-1, 1)
    elif kind == 6:  # shuffled tiles
        tiles = image.reshape(3, 4, 16, 4, 16).permute(1, 3, 0, 2, 4).reshape(16, 3, 16, 16).clone()
        moved = rng.permutation(16)[: max(2, round(16 * much))]
        tiles[moved] = tiles[np.roll(moved, 1)]
        image = tiles.reshape(4, 4, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(3, 64, 64)
    else:  # excessive contrast, clipped
        image = image * (1 + 6 * much) + 0.5 * noise[:, :1, :1]
        much *= 0.8
    return image.clamp(-1, 1), much


@torch.no_grad()
def decoded(emoji: EmojiSet, count: int, seed: int, device: str) -> list[Example]:
    """SDEdit samples of the tiny base: real images noised to a random step and denoised, every other batch with CFG.

    They match their captions, which name style and background, and are slightly blurrier than real images.
    """
    unet, vae, text = (load("tiny", device) for load in (weights.load_unet, weights.load_vae, weights.load_text))
    scheduler, examples = Scheduler(40), []
    for at in range(0, count, 64):
        generator = torch.Generator().manual_seed(seed + at)
        shows = [emoji.describe(seed + at + i) for i in range(64)]
        shows = [replace(p, caption=_full(p)) for p in shows]
        images = torch.stack([to_tensor(emoji.draw(p)) for p in shows]).to(device)
        start = int(torch.randint(0, 39, (), generator=generator))
        words, empty = text([p.caption for p in shows], (64, 64)), text([""] * 64, (64, 64))
        with autocast(device):
            x0 = vae.sample(images, generator)
            x = scheduler.add_noise(x0, sample_noise(x0.shape, generator, x0.device), scheduler.timesteps[start])
            predict = cfg(unet, words, empty, 2.0) if at % 128 else conditional(unet, words)
            x = denoise(scheduler, predict, x, scheduler.steps[start:], generator)
            made = vae.decode(x).float().clamp(-1, 1).cpu()
        examples += [Example(image, p, 0.15) for image, p in zip(made, shows, strict=True)]
    return examples


def _full(p: Composition) -> str:
    article = "an" if p.background == "orange" else "a"
    return f"{p.concept}, {p.style} style, on {article} {p.background} background"


def failures(folder: Path) -> list[Example]:
    """Samples of models that exploit an earlier version of the reward, as written by `sample.py`.

    They count as badly damaged, with their prompt's concept and no style.
    """
    examples = []
    for path in sorted(folder.rglob("0*.png")):
        picture = Image.open(path)
        concept = picture.info["parameters"].split("\n")[0].split(",")[0]
        shows = Composition(concept, "none", "none", 64, 0, 0, concept)
        examples.append(Example(to_tensor(picture), shows, 0.8))
    if not examples:
        raise FileNotFoundError(f"{folder}: contains no images written by sample.py")
    return examples


class Votes:
    """Batches of captions, four images each, and the rater's utilities.

    Two images show the caption's concept, a third does and is mostly damaged, the fourth shows it or a random one.
    """

    def __init__(self, emoji: EmojiSet, bank: list[Example], rater: Rater, seed: int):
        self.emoji, self.bank, self.rater = emoji, bank, rater
        self.rng = np.random.default_rng([rater.seed, seed])
        self.by_concept = {c: [e for e in bank if e.shows.concept == c] for c in emoji.concepts}

    def example(self, concept: str | None, damage_probability: float) -> Example:
        """An image of a concept (None: any), real or from the bank, damaged with the given probability."""
        rng, emoji = self.rng, self.emoji
        bank = self.by_concept[concept] if concept else self.bank
        if bank and rng.random() < 0.5:
            made = bank[int(rng.integers(len(bank)))]
        else:
            shows = emoji.describe(int(rng.integers(2**31)))
            shows = replace(shows, concept=concept or shows.concept)
            made = Example(to_tensor(emoji.draw(shows)), shows, 0.0)
        if rng.random() < damage_probability:
            image, much = damage(made.image, rng)
            made = Example(image, made.shows, min(1.0, made.damage + much))
        return made

    def batch(self, count: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Captions, images (count, 4, 3, 64, 64) and their utilities (count, 4)."""
        captions = [self.emoji.describe(int(self.rng.integers(2**31))).caption for _ in range(count)]
        rows = []
        for caption in captions:
            concept = caption.split(", ")[0]
            other = concept if self.rng.random() < 0.5 else None
            wanted = ((concept, 0.1), (concept, 0.1), (concept, 0.6), (other, 0.1))
            rows.append([self.example(*which) for which in wanted])
        utilities = [[utility(self.rater, c, e) for e in row] for c, row in zip(captions, rows, strict=True)]
        return captions, torch.stack([torch.stack([e.image for e in row]) for row in rows]), torch.tensor(utilities)


def scores(clip: CLIPModel, tokenizer, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """PickScore: exp(logit_scale) times the cosine. K images (N K, 3, 64, 64) for each of N captions -> (N, K)."""
    pictures = F.normalize(clip.get_image_features(pixel_values=normalise(images)).pooler_output.float(), dim=1)
    tokens = {k: v.to(images.device) for k, v in tokenize(tokenizer, captions).items()}
    words = F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=1)
    return clip.logit_scale.exp() * torch.einsum("nkd,nd->nk", pictures.view(len(words), -1, words.shape[1]), words)


def differences(values: torch.Tensor) -> torch.Tensor:
    """(N, 4) -> (N, 6): first minus second, for each pair of a row."""
    first, second = torch.triu_indices(4, 4, offset=1)
    return values[:, first] - values[:, second]


def fine_tune(clip: CLIPModel, tokenizer, votes: Votes, steps: int, lr: float, device: str) -> None:
    """PickScore's objective: the softmax of two images' scores is the share of votes for each.

    Images are shifted, as `train.py` does before scoring, and get a little noise.
    """
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(votes.rater.seed)
    began, executor = time.time(), ThreadPoolExecutor(1)  # prepares the next batch during training
    next_batch = executor.submit(votes.batch, CAPTIONS)
    for step in range(steps):
        captions, images, utilities = next_batch.result()
        next_batch = executor.submit(votes.batch, CAPTIONS)
        images = random_shift(images.flatten(0, 1), TINY.shift, generator).to(device)
        images = images + torch.randn_like(images) * 0.06 * torch.rand(len(images), 1, 1, 1, device=device)
        with autocast(device):
            score = scores(clip, tokenizer, images, captions)
        share = (CLEAR * differences(utilities)).sigmoid().to(device)
        loss = F.binary_cross_entropy_with_logits(differences(score), share)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            seconds = (time.time() - began) / (step + 1)
            minimum = (torch.special.entr(share) + torch.special.entr(1 - share)).mean()
            print(f"votes {step + 1}: loss {loss.item():.3f} (minimum {minimum:.3f}), {seconds:.3f} s", flush=True)


@torch.no_grad()
def held_out_accuracy(clip: CLIPModel, tokenizer, votes: Votes, count: int = 512) -> dict[str, float]:
    """Percent of held-out pairs that are ordered as by the rater, by the kind of difference.

    Pairs with less than a two-thirds majority are ties and are excluded.
    """
    kinds = ("taste", "damage", "taste or concept", "damage", "taste or concept", "damage")
    right, seen = Counter(), Counter()
    for _ in range(count // 32):
        captions, images, utilities = votes.batch(32)
        predicted = scores(clip, tokenizer, images.flatten(0, 1).to(clip.device), captions).cpu()
        gap, got = differences(utilities), differences(predicted)
        clear = (CLEAR * gap.abs()).sigmoid() > 2 / 3
        for column, kind in enumerate(kinds):
            counted, agreed = clear[:, column], ((gap > 0) == (got > 0))[:, column]
            for name in (kind, "all"):
                seen[name] += counted.sum().item()
                right[name] += (counted & agreed).sum().item()
    return {name: round(100 * right[name] / seen[name], 1) for name in seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(RATERS))
    parser.add_argument("--steps", type=int, default=1000, help="updates of contrastive training (default: 1000)")
    parser.add_argument("--vote-steps", type=int, default=1200, help="updates on votes (default: 1200)")
    parser.add_argument("--bank", type=int, default=1024, help="samples of the tiny base (default: 1024)")
    parser.add_argument("--failures", type=Path, help="continue the existing reward, with these images as damaged")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of votes and samples, 0 to 9, a new one for each round"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    rater = RATERS[args.name]
    torch.manual_seed(rater.seed)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_DIR / "base" / "tokenizer")
    folder = TINY_DIR / "rewards" / args.name
    emoji = EmojiSet(seed=200 + rater.seed)
    bank = decoded(emoji, args.bank, 1_000_000 * args.seed, args.device)
    if args.failures:
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(args.device)
        bank += failures(args.failures)
    else:
        clip = build(len(tokenizer), (96, 4), (64, 2)).to(args.device)
        train(clip, tokenizer, EmojiSet(seed=100 + rater.seed), args.steps, 128, 1e-3, args.device)
    fine_tune(clip, tokenizer, Votes(emoji, bank, rater, seed=args.seed), args.vote_steps, 5e-4, args.device)

    clip = clip.cpu().eval().half().float()  # the precision in which it is saved
    held_out = Votes(emoji, decoded(emoji, 256, 10_000_000, args.device), rater, seed=10)
    print(f"{args.name}, % of held-out pairs ordered as by the rater: {held_out_accuracy(clip, tokenizer, held_out)}")
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
