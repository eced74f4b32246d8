"""The ground truth of the tiny world: look a picture up among all real compositions.

The captions of the tiny base describe a small world: 64 concepts, 4 styles, 8 backgrounds, 355 sizes and places. So how
good a picture is need not be learned: its distance to the nearest composition that fits the caption says it, and that
composition is what a perfect picture would be. This stands for what people like, of which a reward model is a reading.

    reward = rewards.load("rater")           10 * (1 - distance / 0.4), of the caption's compositions; has a gradient

A composition is C + U b: C the emoji times its alpha, U = 1 - alpha, b the background's colour. Its squared distance to
a picture x is |C|^2 + 2 b CU + b^2 U^2 - 2 C x - 2 U b x + |x|^2, two matrix products for all of them, on pictures
averaged to 8x8; the nearest are then compared at full size. B pictures, N = 90,880 emoji at their places.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import rewards
from training.emoji import BACKGROUNDS, EmojiSet

COARSE = 8  # side of the averaged pictures
CANDIDATES = 32  # compared at full size
BATCH = 32  # pictures whose distances to all compositions are in memory at once
BEYOND_RECOGNITION = 0.4  # root mean square distance, for values in [-1, 1]
PERFECT = 10.0  # the score of a real composition; on PickScore's scale, as the other rewards of the tiny base


@dataclass(frozen=True)
class Found:
    """The nearest composition of a picture; `target` (3, 64, 64), `distance` the root mean square to it."""

    concept: str
    style: str
    background: str
    distance: float
    target: Tensor


class Rater(rewards.Reward):
    """The ground truth as a reward: `(images (B, 3, 64, 64) in [-1, 1], prompts) -> (B,)`."""

    def __init__(self, device: str = "cpu"):
        emoji, self.device, self.name = EmojiSet(), device, "rater"
        self.offset, self.factor = rewards.SCALE[self.name]
        self.concepts, self.styles, self.side = emoji.concepts, emoji.styles, emoji.cell
        self.places = [
            (z, x, y) for z in emoji.sizes for x in range(self.side - z + 1) for y in range(self.side - z + 1)
        ]
        self.colours = torch.tensor(list(BACKGROUNDS.values()), device=device) / 127.5 - 1  # (8, 3)
        self.layers, C, U = {}, [], []
        for concept in self.concepts:
            for style in self.styles:
                for size in emoji.sizes:
                    self.layers[concept, style, size] = layers_of(emoji, concept, style, size)
                layers = [self.placed(concept, style, *place) for place in self.places]
                C.append(F.adaptive_avg_pool2d(torch.stack([c for c, _ in layers]), COARSE))
                U.append(F.adaptive_avg_pool2d(torch.stack([u for _, u in layers]), COARSE))
        self.C, self.U = torch.cat(C).flatten(2).to(device), torch.cat(U).flatten(1).to(device)  # (N, 3, 64), (N, 64)
        self.CC, self.UU = self.C.square().sum((1, 2)), self.U.square().sum(1)  # (N,)
        self.CU = (self.C * self.U[:, None]).sum(2)  # (N, 3)

    def placed(self, concept: str, style: str, size: int, x: int, y: int) -> tuple[Tensor, Tensor]:
        """C (3, 64, 64) and U (1, 64, 64) of an emoji at its place."""
        c, u = self.layers[concept, style, size]
        rest = self.side - size
        padding = (x, rest - x, y, rest - y)
        return F.pad(c, padding), F.pad(u, padding, value=1.0)

    def rows(self, prompt: str | None) -> tuple[Tensor, list[int]]:
        """Indices (M,) of the emoji that fit a caption, and of the backgrounds; all of both without a caption.

        Raises ValueError for a caption whose concept is not in this world.
        """
        concept, *attributes = (prompt or "").split(", ")
        if prompt is not None and concept not in self.concepts:
            raise ValueError(f"rater: {concept!r} is none of the {len(self.concepts)} concepts of the tiny base")
        concepts = range(len(self.concepts)) if prompt is None else [self.concepts.index(concept)]
        named = [style for style in self.styles if f"{style} style" in attributes]
        styles = [self.styles.index(style) for style in named or self.styles]
        words = {word for phrase in attributes if phrase.endswith("background") for word in phrase.split()}
        backgrounds = [i for i, name in enumerate(BACKGROUNDS) if name in words] or list(range(len(BACKGROUNDS)))
        starts = torch.tensor([(c * len(self.styles) + s) * len(self.places) for c in concepts for s in styles])
        return (starts[:, None] + torch.arange(len(self.places))).flatten().to(self.device), backgrounds

    @torch.no_grad()
    def look_up(self, images: Tensor, prompts: list[str] | None = None) -> list[Found]:
        """The nearest composition to each image, of all, or of those that fit its caption.

        Raises ValueError for images of another size, and for captions that are not of this world.
        """
        if images.shape[1:] != (3, self.side, self.side):
            raise ValueError(f"rater: images must be (B, 3, {self.side}, {self.side}), not {tuple(images.shape)}")
        groups: dict[str | None, list[int]] = {}
        for i, prompt in enumerate(prompts or [None] * len(images)):
            groups.setdefault(prompt, []).append(i)
        found = {}
        for prompt, group in groups.items():
            for part in (group[at : at + BATCH] for at in range(0, len(group), BATCH)):
                found |= zip(part, self.nearest(images[part].float(), prompt), strict=True)
        return [found[i] for i in range(len(images))]

    def nearest(self, images: Tensor, prompt: str | None) -> list[Found]:
        """The nearest compositions to images that fit one caption."""
        rows, backgrounds = self.rows(prompt)
        C, U, CC, CU, UU = (t if prompt is None else t[rows] for t in (self.C, self.U, self.CC, self.CU, self.UU))
        corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(-1).values  # (B, 3)
        chosen = (self.colours[backgrounds] - corners[:, None]).square().sum(2).argmin(1)
        b = self.colours[backgrounds][chosen]  # (B, 3)
        small = F.adaptive_avg_pool2d(images, COARSE).flatten(2)  # (B, 3, 64)
        squares = CC[:, None] + 2 * CU @ b.T + UU[:, None] * b.square().sum(1)  # (M, B), without |x|^2
        squares -= 2 * (C.flatten(1) @ small.flatten(1).T + U @ (b[:, :, None] * small).sum(1).T)
        candidates = rows[squares.topk(min(CANDIDATES, len(rows)), dim=0, largest=False).indices]
        return [
            self.nearest_of(candidates[:, i].tolist(), image, b[i], list(BACKGROUNDS)[backgrounds[int(chosen[i])]])
            for i, image in enumerate(images)
        ]

    def nearest_of(self, candidates: list[int], image: Tensor, colour: Tensor, background: str) -> Found:
        """The nearest of a few emoji at their places, at full size."""
        layers = []
        for index in candidates:
            kind, place = divmod(index, len(self.places))
            concept, style = self.concepts[kind // len(self.styles)], self.styles[kind % len(self.styles)]
            layers.append((concept, style, *self.placed(concept, style, *self.places[place])))
        C, U = (torch.stack([layer[i] for layer in layers]).to(image.device) for i in (2, 3))
        targets = C + U * colour[:, None, None]
        distances = (targets - image).square().mean((1, 2, 3)).sqrt()
        best = int(distances.argmin())
        return Found(*layers[best][:2], background, distances[best].item(), targets[best])

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        targets = torch.stack([found.target for found in self.look_up(images, prompts)])
        mean_square = (images.float() - targets).square().mean((1, 2, 3))
        return PERFECT * (1 - (mean_square + 1e-12).sqrt() / BEYOND_RECOGNITION)

    def on_cpu(self) -> None:
        """There is no text encoder to move."""


def layers_of(emoji: EmojiSet, concept: str, style: str, size: int) -> tuple[Tensor, Tensor]:
    """C (3, size, size) and U (1, size, size) of an emoji."""
    pixels = torch.from_numpy(np.array(emoji.emoji(concept, style, size))).permute(2, 0, 1).float()
    alpha = pixels[3:] / 255
    return (pixels[:3] / 127.5 - 1) * alpha, 1 - alpha
