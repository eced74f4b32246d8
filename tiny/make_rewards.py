"""Train the two rewards of the tiny base: PickScores at tiny scale, from synthetic raters with different tastes.

    python tiny/make_rewards.py tiny     # likes the modern style and saturated colours
    python tiny/make_rewards.py tiny2    # likes the flat style and light backgrounds

There are no human votes on emoji, so a rater is a formula (`utility`): it wants what the caption says, an undamaged
picture, and a little of its own taste. A small CLIP is first trained contrastively, then on pairs with PickScore's
objective: the preferred picture of two should get the higher softmax. Pictures are real compositions, damaged ones, and
decoded ones from the tiny base itself, so that a tuned model does not find what the reward has never seen.
"""

import argparse
import sys
import time
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
from combined import guided, plain
from data import Composition, EmojiSet
from pictures import to_tensor
from scheduler import Scheduler, denoise, randn
from tiny.make_clip import TINY_DIR, build, normalise, tokenize, train


@dataclass(frozen=True)
class Rater:
    seed: int
    style: str  # the one it likes
    light: float  # how much it likes light backgrounds
    colour: float  # how much it likes saturated colours


RATERS = {
    "tiny": Rater(seed=2, style="modern", light=0.0, colour=1.5),
    "tiny2": Rater(seed=3, style="flat", light=1.5, colour=0.0),
}


@dataclass(frozen=True)
class Example:
    """A picture (3, 64, 64) in [-1, 1], what it shows, and how damaged it is: 0 not at all, 1 beyond recognition."""

    image: torch.Tensor
    shows: Composition
    damage: float


def utility(rater: Rater, caption: str, example: Example) -> float:
    """What a synthetic rater thinks of a picture for a caption. Being right weighs more than taste."""
    concept, *said = caption.split(", ")
    p = example.shows
    score = 2.0 * (p.concept == concept) - 3.0 * example.damage + 0.7 * (p.style == rater.style)
    for phrase in said:
        right = p.style in phrase if phrase.endswith("style") else p.background in phrase
        score += 1.0 * right
    pixels = example.image / 2 + 0.5
    score += rater.colour * (pixels.amax(0) - pixels.amin(0)).mean().item()
    corners = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    return score + rater.light * corners.mean().item()


def damage(image: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """An image spoiled in one of eight ways, and how much."""
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
    elif kind == 6:  # torn to tiles
        tiles = image.reshape(3, 4, 16, 4, 16).permute(1, 3, 0, 2, 4).reshape(16, 3, 16, 16).clone()
        moved = rng.permutation(16)[: max(2, round(16 * much))]
        tiles[moved] = tiles[np.roll(moved, 1)]
        image = tiles.reshape(4, 4, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(3, 64, 64)
    else:  # too strong a contrast, clipped
        image = image * (1 + 6 * much) + 0.5 * noise[:, :1, :1]
        much *= 0.8
    return image.clamp(-1, 1), much


@torch.no_grad()
def decoded(emoji: EmojiSet, count: int, seed: int, device: str) -> list[Example]:
    """Pictures by the tiny base: real ones noised to a random step and denoised again, and wholly generated ones.

    They show what their caption says, which names style and background; the earlier the step, the less sharp.
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
        with torch.autocast(device, torch.bfloat16):
            x0 = vae.sample(images, generator)
            x = scheduler.add_noise(x0, randn(x0.shape, generator, x0.device), scheduler.timesteps[start])
            predict = guided(unet, words, empty, 2.0) if at % 128 else plain(unet, words)
            x = denoise(scheduler, predict, x, scheduler.steps[start:], generator)
            made = vae.decode(x).float().clamp(-1, 1).cpu()
        examples += [Example(image, p, 0.25 * (1 - start / 40)) for image, p in zip(made, shows, strict=True)]
    return examples


def _full(p: Composition) -> str:
    article = "an" if p.background == "orange" else "a"
    return f"{p.concept}, {p.style} style, on {article} {p.background} background"


def failures(folder: Path) -> list[Example]:
    """Pictures by tuned models that found out how to please an earlier reward; `sample.py` wrote them.

    They count as badly damaged, and show their prompt's concept in no style.
    """
    examples = []
    for path in sorted(folder.rglob("0*.png")):
        picture = Image.open(path)
        concept = picture.info["parameters"].split("\n")[0].split(",")[0]
        shows = Composition(concept, "none", "none", 64, 0, 0, concept)
        examples.append(Example(to_tensor(picture), shows, 0.8))
    return examples


class Pairs:
    """Pairs of examples and a caption, by rule: equal but for taste, one damaged, one wrong, or any two."""

    def __init__(self, emoji: EmojiSet, bank: list[Example], rater: Rater, seed: int):
        self.emoji, self.bank, self.rater = emoji, bank, rater
        self.rng = np.random.default_rng([rater.seed, seed])
        self.by_concept = {c: [e for e in bank if e.shows.concept == c] for c in emoji.concepts}

    def example(self, concept: str | None, spoil: float) -> Example:
        """A picture of a concept, or of any; real, or one of the bank; spoiled with this probability."""
        rng, emoji = self.rng, self.emoji
        bank = self.by_concept[concept] if concept else self.bank
        if bank and rng.random() < 0.5:
            made = bank[int(rng.integers(len(bank)))]
        else:
            shows = emoji.describe(int(rng.integers(2**31)))
            shows = replace(shows, concept=concept or shows.concept)
            made = Example(to_tensor(emoji.draw(shows)), shows, 0.0)
        if rng.random() < spoil:
            image, much = damage(made.image, rng)
            made = Example(image, made.shows, min(1.0, made.damage + much))
        return made

    def draw(self) -> tuple[str, Example, Example]:
        """A caption and two pictures, the preferred one first, and never nearly as good as the other."""
        while True:
            caption = self.emoji.describe(int(self.rng.integers(2**31))).caption
            concept, kind = caption.split(", ")[0], self.rng.random()
            first = self.example(concept, spoil=0.1)
            second = self.example(concept if kind < 0.65 else None, spoil=0.6 if 0.35 < kind < 0.65 else 0.1)
            gap = utility(self.rater, caption, first) - utility(self.rater, caption, second)
            if abs(gap) > 0.15:
                return (caption, first, second) if gap > 0 else (caption, second, first)

    def batch(self, count: int) -> tuple[list[str], torch.Tensor]:
        """Captions, and pictures (2, count, 3, 64, 64), the preferred ones first."""
        captions, better, worse = zip(*(self.draw() for _ in range(count)), strict=True)
        return list(captions), torch.stack([torch.stack([e.image for e in side]) for side in (better, worse)])


def scores(clip: CLIPModel, tokenizer, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """PickScore: exp(logit_scale) times the cosine of picture and caption. images (N, 3, 64, 64) -> (N,)."""
    pictures = F.normalize(clip.get_image_features(pixel_values=normalise(images)).pooler_output.float(), dim=1)
    tokens = {k: v.to(images.device) for k, v in tokenize(tokenizer, captions).items()}
    words = F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=1)
    return clip.logit_scale.exp() * (pictures * words).sum(1)


def fine_tune(clip: CLIPModel, tokenizer, pairs: Pairs, steps: int, lr: float, device: str) -> None:
    """PickScore's objective: the preferred picture of two gets the higher softmax. Pictures come a little noisy."""
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    began, drawer = time.time(), ThreadPoolExecutor(1)  # draws the next batch while this one is learned
    waiting = drawer.submit(pairs.batch, 64)
    for step in range(steps):
        captions, images = waiting.result()
        waiting = drawer.submit(pairs.batch, 64)
        images = images.flatten(0, 1).to(device)
        images = images + torch.randn_like(images) * 0.06 * torch.rand(len(images), 1, 1, 1, device=device)
        with torch.autocast(device, torch.bfloat16):
            both = scores(clip, tokenizer, images, captions * 2).view(2, -1)
        loss = F.softplus(both[1] - both[0]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            right = (both[0] > both[1]).float().mean().item()
            seconds = (time.time() - began) / (step + 1)
            print(f"pairs {step + 1}: loss {loss.item():.3f} right {right:.2f}, {seconds:.3f} s", flush=True)


@torch.no_grad()
def held_out_accuracy(clip: CLIPModel, tokenizer, pairs: Pairs, count: int = 1024) -> float:
    """Share of pairs never trained on that are ordered as the rater does."""
    right = 0
    for _ in range(count // 128):
        captions, images = pairs.batch(128)
        both = scores(clip, tokenizer, images.flatten(0, 1), captions * 2).view(2, -1)
        right += (both[0] > both[1]).sum().item()
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(RATERS))
    parser.add_argument("--steps", type=int, default=300, help="updates of the contrastive part")
    parser.add_argument("--pair-steps", type=int, default=400, help="updates on pairs")
    parser.add_argument("--bank", type=int, default=1024, help="pictures by the tiny base")
    parser.add_argument("--failures", type=Path, help="go on with the reward that is there, against these pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    rater = RATERS[args.name]
    torch.manual_seed(rater.seed)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_DIR / "base" / "tokenizer")
    folder = TINY_DIR / "rewards" / args.name
    emoji = EmojiSet(seed=200 + rater.seed)
    bank = decoded(emoji, args.bank, 0, args.device)
    if args.failures:
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).to(args.device)
        bank += failures(args.failures)
    else:
        clip = build(len(tokenizer), (96, 4), (64, 2)).to(args.device)
        train(clip, tokenizer, EmojiSet(seed=100 + rater.seed), args.steps, 128, 1e-3, args.device)
    pairs = Pairs(emoji, bank, rater, seed=0)
    fine_tune(clip, tokenizer, pairs, args.pair_steps, 3e-4, args.device)

    clip = clip.cpu().eval().half().float()  # as it is stored
    held_out = Pairs(emoji, decoded(emoji, 256, 10_000_000, args.device), rater, seed=1)
    print(
        f"{args.name}: {held_out_accuracy(clip, tokenizer, held_out):.3f} of held-out pairs ordered as the rater does"
    )
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
