"""Train the two rewards of the tiny base: PickScores at tiny scale, two readings of what people like.

    python tiny/make_rewards.py tiny                                              # a first round
    python tiny/make_rewards.py tiny2 --tuned runs/refl-tiny/unet --seed 1        # another, with a tuned model's
    python tiny/make_rewards.py tiny --updates 0 --tuned runs/refl-tiny/unet      # measure what is there

There are no human votes on emoji. `rater.py` knows what people like, and each reward learns it from votes about its own
pictures, with its own architecture and seed: of two pictures for a caption, one gets sigmoid(difference of the rater's
scores) of the votes, and the softmax of the reward's two scores is trained to be that share, as in PickScore. Pictures
are real ones, damaged ones, and generated ones, as damaged as the rater finds them. Pictures of models that were tuned
on an earlier reward teach the reward what it did not see.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
import weights
from combined import cfg, combine, combined_weights, conditional
from refl import random_shift
from scheduler import Scheduler, sample_noise
from tiny.make_clip import TINY_DIR, build, normalise, tokenize
from tiny.rater import BEYOND_RECOGNITION, PERFECT, Rater
from training.emoji import EmojiSet, caption_of
from training.presets import TINY
from utils.device import autocast

HELD_OUT = 9_000_000  # seed of the pictures that measure a reward
CONTRAST = 0.2  # weight of the contrastive loss
OTHER_CONCEPT = 0.48  # distance of a picture to the nearest composition of another concept, the mean of 64
STEPS, LAST = 40, 10  # sampling steps, and how many of the last a reward sees in training


@dataclass(frozen=True)
class Reading:
    """Architecture and seed of a reward."""

    seed: int
    patch: int
    vision: tuple[int, int]  # width, layers


READINGS = {"tiny": Reading(2, 4, (96, 4)), "tiny2": Reading(3, 8, (128, 4))}


@dataclass
class Pictures:
    """N pictures and how far each is from its concept's nearest composition of each style and background."""

    images: Tensor  # uint8 (N, 3, 64, 64)
    concepts: Tensor  # int64 (N,): what the picture should show
    distances: Tensor  # (N, 4, 8)
    generated: Tensor  # bool (N,)

    def __add__(self, other: "Pictures") -> "Pictures":
        return Pictures(*(torch.cat([getattr(p, f.name) for p in (self, other)]) for f in fields(self)))


def to_bytes(image: Tensor) -> Tensor:
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(image: Tensor) -> Tensor:
    return image.float() / 127.5 - 1


def damage(image: Tensor, rng: np.random.Generator) -> Tensor:
    """An image (3, 64, 64) in [-1, 1], damaged in one of eight ways."""
    kind, much = int(rng.integers(8)), float(rng.uniform(0.1, 1.0))
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
    return image.clamp(-1, 1)


class RealPictures:
    """Training pictures of the base, every other one damaged: (uint8 (3, 64, 64), index of its concept)."""

    def __init__(self, count: int, seed: int):
        self.emoji, self.count, self.seed = EmojiSet(seed=seed), count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, concept = self.emoji[i][0], self.emoji.describe(i).concept
        if i % 2:
            image = damage(image, np.random.default_rng([self.seed, i, 2]))
        return to_bytes(image), self.emoji.concepts.index(concept)


def real_pictures(count: int, seed: int, rater: Rater) -> Pictures:
    workers = 0 if rater.device == "cpu" else os.cpu_count()
    images, concepts = zip(*DataLoader(RealPictures(count, seed), 256, num_workers=workers), strict=True)
    return measured(torch.cat(images), torch.cat(concepts), rater, generated=False)


@torch.no_grad()
def generated_pictures(tuned: list[Path], count: int, seed: int, rater: Rater, batch: int) -> Pictures:
    """Samples of the base and of tuned models, and images predicted at one of the last steps, as training sees them.

    Batches take turns: the base with guidance, then each tuned model. Two of three rounds start from real images noised
    to t', as ImageReFL does, the third from noise, with 0, 10, 20 or 30 steps by the base. Every other round ends with
    an image predicted at one of the last ten steps.
    """
    device, scheduler, generator = rater.device, Scheduler(STEPS), torch.Generator().manual_seed(seed)
    base, vae, text = (load("tiny", device) for load in (weights.load_unet, weights.load_vae, weights.load_text))
    models = [base, *(weights.load_unet(path, device) for path in tuned)]
    emoji, images, concepts = EmojiSet(seed=seed), [], []
    for n in range(-(-count // batch)):
        shows = [emoji.describe(n * batch + i) for i in range(batch)]
        model, turn = models[n % len(models)], n // len(models)
        base_steps = STEPS if model is base else (0, 10, 20, 30)[turn % 4]
        last = STEPS - turn % 2 * int(torch.randint(1, LAST + 1, (), generator=generator))
        with autocast(device):
            c, c_empty = text([p.caption for p in shows], (64, 64)), text([""] * batch, (64, 64))
            predictors = cfg(base, c, c_empty, TINY.guidance), conditional(model, c)
            first = 0 if turn % 3 == 2 else TINY.start
            x = sample_noise((batch, vae.config.latent_channels, 8, 8), generator, device)
            if first:
                x0 = vae.sample(torch.stack([emoji[n * batch + i][0] for i in range(batch)]).to(device), generator)
                x, base_steps = scheduler.add_noise(x0, x, scheduler.timesteps[first]), base_steps // STEPS * STEPS
            schedule = combined_weights(STEPS, base_steps)
            x = combine(scheduler, *predictors, schedule, x, generator, scheduler.steps[first:last])
            if last < STEPS:
                t = scheduler.timesteps[last]
                x = scheduler.predict_x0(x, predictors[1](x, t), t)
            images.append(to_bytes(vae.decode(x).float()).cpu())
        concepts += [emoji.concepts.index(p.concept) for p in shows]
    return measured(torch.cat(images), torch.tensor(concepts), rater, generated=True)


def measured(images: Tensor, concepts: Tensor, rater: Rater, generated: bool) -> Pictures:
    """Pictures with the rater's distances."""
    distances = torch.empty(len(images), len(rater.styles), len(rater.backgrounds))
    for k, concept in enumerate(rater.concepts):
        for rows in (concepts == k).nonzero()[:, 0].split(32):
            distances[rows] = rater.distances(from_bytes(images[rows]).to(rater.device), concept)[0].cpu()
    return Pictures(images, concepts, distances, torch.full((len(images),), generated))


class Votes:
    """Batches of captions, four pictures each, and the rater's scores of them.

    The first two pictures are generated, the others any; all were made for the caption's concept, but for a quarter of
    the fourth ones. A caption names style and background as often as those of the training data.
    """

    def __init__(self, pictures: Pictures, rater: Rater, seed: int, device: str):
        self.pictures = Pictures(*(getattr(pictures, f.name).to(device) for f in fields(pictures)))
        self.rater, self.taste, self.rng = rater, rater.taste.to(device), np.random.default_rng(seed)
        self.rows, self.generated = [], []  # of each concept
        for k in range(len(rater.concepts)):
            shown = pictures.concepts == k
            self.rows.append(shown.nonzero()[:, 0].numpy())
            self.generated.append((shown & pictures.generated).nonzero()[:, 0].numpy())
        self.concepts = [k for k, rows in enumerate(self.generated) if len(rows)]

    def batch(self, count: int) -> tuple[list[str], Tensor, Tensor, Tensor]:
        """Captions, the index of each one's concept, images (count, 4, 3, 64, 64) and scores (count, 4)."""
        rng, rater = self.rng, self.rater
        concepts, others = rng.choice(self.concepts, (2, count))
        other = np.where(rng.random(count) < 0.25, others, concepts)
        pools = [(*[self.generated[k]] * 2, self.rows[k], self.rows[o]) for k, o in zip(concepts, other, strict=True)]
        rows = torch.tensor([[pool[rng.integers(len(pool))] for pool in four] for four in pools])
        style = np.where(rng.random(count) < 0.5, rng.integers(len(rater.styles), size=count), -1)
        background = np.where(rng.random(count) < 0.5, rng.integers(len(rater.backgrounds), size=count), -1)
        captions = [
            caption_of(rater.concepts[k], rater.styles[s] if s >= 0 else None, rater.backgrounds[b] if b >= 0 else None)
            for k, s, b in zip(concepts, style, background, strict=True)
        ]
        rows, concepts, style, background = (
            torch.as_tensor(v, device=self.taste.device) for v in (rows, concepts, style, background)
        )
        return captions, concepts, from_bytes(self.pictures.images[rows]), self.score(rows, concepts, style, background)

    def score(self, rows: Tensor, concepts: Tensor, style: Tensor, background: Tensor) -> Tensor:
        """The rater's scores (B, K) of pictures (B, K) for captions: concept, style and background (B,), -1 for any."""
        styles, backgrounds = (torch.arange(n, device=rows.device) for n in self.taste.shape[1:])
        fits_style = (style[:, None] < 0) | (style[:, None] == styles)  # (B, 4)
        fits_background = (background[:, None] < 0) | (background[:, None] == backgrounds)  # (B, 8)
        fits = (fits_style[:, :, None] & fits_background[:, None]).flatten(1)  # (B, 32)
        distances = self.pictures.distances[rows].flatten(2).masked_fill(~fits[:, None], float("inf"))
        distance, nearest = distances.min(2)
        taste = self.taste[concepts].flatten(1)[:, None].expand_as(distances).gather(2, nearest[:, :, None])[:, :, 0]
        right = self.pictures.concepts[rows] == concepts[:, None]
        distance, taste = torch.where(right, distance, OTHER_CONCEPT), torch.where(right, taste, 0.0)
        return PERFECT * (1 - distance / BEYOND_RECOGNITION) + taste


def similarities(clip: CLIPModel, tokenizer, images: Tensor, captions: list[str]) -> Tensor:
    """PickScores (N, M) of images (M, 3, 64, 64) for captions: exp(logit_scale) times the cosine."""
    pictures = F.normalize(clip.get_image_features(pixel_values=normalise(images)).pooler_output.float(), dim=1)
    tokens = {k: v.to(images.device) for k, v in tokenize(tokenizer, captions).items()}
    words = F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=1)
    return clip.logit_scale.exp() * words @ pictures.T


def own(scores: Tensor) -> Tensor:
    """Of scores (N, 4 N) those of each caption's own four pictures: (N, 4)."""
    return scores.view(len(scores), len(scores), 4).diagonal().T


def differences(values: Tensor) -> Tensor:
    """(N, 4) -> (N, 6): first minus second, for each pair of a row."""
    first, second = torch.triu_indices(4, 4, offset=1)
    return values[:, first] - values[:, second]


def fine_tune(clip: CLIPModel, tokenizer, votes: Votes, count: int, updates: int, lr: float) -> None:
    """PickScore's objective, and a contrastive one: of the `count` captions of a batch, a picture's own fits best."""
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates, pct_start=0.1)
    generator, began = torch.Generator().manual_seed(updates), time.time()
    for update in range(updates):
        captions, concepts, images, wanted = votes.batch(count)
        with autocast(images.device.type):
            shifted = random_shift(images.flatten(0, 1), TINY.shift, generator)  # as `train.py --shift`
            scores = similarities(clip, tokenizer, shifted, captions)
        share = differences(wanted).sigmoid()
        loss = F.binary_cross_entropy_with_logits(differences(own(scores)), share)
        first = scores.view(len(scores), len(scores), 4)[:, :, :3].flatten(1)  # the fourth may show another concept
        match = (concepts[:, None] == concepts).float().repeat_interleave(3, 1)
        contrast = -(match * F.log_softmax(first, 0)).sum(0) / match.sum(0)
        optimizer.zero_grad(set_to_none=True)
        (loss + CONTRAST * contrast.mean()).backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % 100 == 99:
            seconds = (time.time() - began) / (update + 1)
            least = (torch.special.entr(share) + torch.special.entr(1 - share)).mean()
            print(
                f"update {update + 1}: votes {loss.item():.3f} (minimum {least:.3f}), "
                f"contrast {contrast.mean().item():.3f}, {seconds:.3f} s",
                flush=True,
            )


@torch.no_grad()
def held_out_accuracy(clip: CLIPModel, tokenizer, votes: Votes, count: int = 1024) -> dict[str, float]:
    """Pairs of held-out pictures for one caption: percent ordered as by the rater, and the differences' correlation.

    Pairs with less than a two-thirds majority are ties and are excluded.
    """
    wanted, got = [], []
    for _ in range(count // 32):
        captions, _, images, scores = votes.batch(32)
        wanted.append(differences(scores).cpu())
        got.append(differences(own(similarities(clip, tokenizer, images.flatten(0, 1), captions))).cpu())
    wanted, got = torch.cat(wanted), torch.cat(got)
    result = {}
    for name, pairs in (("generated", [0]), ("generated or real", [1, 3]), ("all", [0, 1, 2, 3, 4, 5])):
        a, b = wanted[:, pairs].flatten(), got[:, pairs].flatten()
        clear = a.abs().sigmoid() > 2 / 3
        result[name] = round(100 * ((a > 0) == (b > 0))[clear].float().mean().item(), 1)
        result[f"{name}, correlation"] = round(torch.corrcoef(torch.stack([a, b]))[0, 1].item(), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(READINGS))
    parser.add_argument("--updates", type=int, default=2000, help="0: measure only (default: 2000)")
    parser.add_argument("--captions", type=int, default=64, help="per update, with four pictures each (default: 64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: 1e-3)")
    parser.add_argument("--pictures", type=int, default=12_288, help="of each kind: real, generated (default: 12288)")
    parser.add_argument(
        "--tuned",
        type=Path,
        action="append",
        default=[],
        metavar="UNET",
        help="go on from the reward that is there, with pictures of this tuned UNet too; may be given several times",
    )
    parser.add_argument("--seed", type=int, default=0, help="of votes and pictures, another one for each round")
    parser.add_argument("--batch-size", type=int, default=64, help="generated pictures at once (default: 64)")
    parser.add_argument("--output-dir", type=Path, help="default: tiny/rewards/NAME")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    reading = READINGS[args.name]
    seed = 1_000_000 * reading.seed + 10_000 * args.seed
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_DIR / "base" / "tokenizer")
    folder = args.output_dir or TINY_DIR / "rewards" / args.name
    rater = Rater(args.device)
    if args.tuned or not args.updates:
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(args.device)
    else:
        clip = build(len(tokenizer), reading.vision, (64, 2), reading.patch).to(args.device)
    size = args.batch_size
    if args.updates:
        pictures = real_pictures(args.pictures, seed, rater)
        pictures += generated_pictures(args.tuned, args.pictures, seed, rater, size)
        votes = Votes(pictures, rater, seed, args.device)
        fine_tune(clip, tokenizer, votes, args.captions, args.updates, args.lr)
    clip.eval().half().float()  # the precision in which it is saved
    held_out = real_pictures(args.pictures // 8, HELD_OUT, rater)
    held_out += generated_pictures(args.tuned, args.pictures // 8, HELD_OUT, rater, min(size, 256))
    accuracy = held_out_accuracy(clip, tokenizer, Votes(held_out, rater, 0, args.device))
    print(f"{args.name}, held-out pairs ordered as by the rater, %: {accuracy}", flush=True)
    if args.updates:
        clip.cpu().half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
