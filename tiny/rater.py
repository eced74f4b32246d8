"""What people like, in the tiny world: the ground truth of which the rewards are readings.

The captions of the tiny base describe a small world: 64 concepts, 4 styles, 8 backgrounds, 355 sizes and places. So how
good a picture is need not be learned. It is looked up among the compositions that fit its caption: the nearest one is
what it shows, and the distance to that is how damaged it is. People like what the caption says, undamaged, and have a
taste: for one style, and for lively colours.

    reward = rewards.load("rater")           10 * (1 - distance / 0.4) + taste; its gradient is that of the distance

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
PERFECT = 10.0  # the score of an undamaged picture, without taste; on PickScore's scale, as the other tiny rewards
STYLE, STYLE_WEIGHT = "modern", 1.5  # the style that people like, and how much more they like it than the others
COLOUR_WEIGHT = 2.0  # of a composition's mean saturation, 0 to 1


@dataclass(frozen=True)
class Found:
    """The nearest composition of a picture; `target` (3, 64, 64), `distance` the root mean square to it."""

    concept: str
    style: str
    background: str
    distance: float
    target: Tensor
    taste: float  # how much people like such a composition, about -1.5 to 2


class Rater(rewards.Reward):
    """The ground truth as a reward: `(images (B, 3, 64, 64) in [-1, 1], prompts) -> (B,)`."""

    def __init__(self, device: str = "cpu"):
        emoji, self.device, self.name = EmojiSet(), device, "rater"
        self.offset, self.factor = rewards.SCALE[self.name]
        self.concepts, self.styles, self.side = emoji.concepts, emoji.styles, emoji.cell
        self.margin = self.side - emoji.sizes[0]
        places = [
            (k, x, y)
            for k, z in enumerate(emoji.sizes)
            for x in range(self.side - z + 1)
            for y in range(self.side - z + 1)
        ]
        self.places = torch.tensor(places, device=device)  # (355, 3): which size, x, y
        self.backgrounds = list(BACKGROUNDS)
        self.colours = torch.tensor(list(BACKGROUNDS.values()), device=device) / 127.5 - 1  # (8, 3)
        kinds = [(concept, style) for concept in self.concepts for style in self.styles]
        self.kinds = len(kinds)
        layers = [self.layers(emoji, *kind, size) for kind in kinds for size in emoji.sizes]
        self.canvas = torch.stack(layers).to(device)  # (256 kinds * sizes, 4, 73, 73): C and U
        cell = self.side // COARSE
        everywhere = F.avg_pool2d(self.canvas.float(), cell, stride=1)  # (256 * 6, 4, 66, 66)
        all_rows = torch.arange(self.kinds * len(places), device=device)
        small = self.cut_out(everywhere, all_rows, cell).flatten(2)
        self.C, self.U = small[:, :3].contiguous(), small[:, 3].contiguous()  # (N, 3, 64), (N, 64)
        self.CC, self.UU = self.C.square().sum((1, 2)), self.U.square().sum(1)  # (N,)
        self.CU = (self.C * self.U[:, None]).sum(2)  # (N, 3)
        self.taste = self.tastes()

    def layers(self, emoji: EmojiSet, concept: str, style: str, size: int) -> Tensor:
        """C and U (4, 73, 73) of an emoji, with room to cut out all its places; half precision rounds them by 5e-4."""
        pixels = torch.from_numpy(np.array(emoji.emoji(concept, style, size))).permute(2, 0, 1).float()
        alpha = pixels[3:] / 255
        room = (self.margin, self.side - size, self.margin, self.side - size)
        C, U = F.pad((pixels[:3] / 127.5 - 1) * alpha, room), F.pad(1 - alpha, room, value=1.0)
        return torch.cat([C, U]).half()

    def cut_out(self, canvas: Tensor, rows: Tensor, stride: int = 1) -> Tensor:
        """C and U (M, 4, 64 / stride, 64 / stride) of emoji at their places, indices (M,) of the N."""
        kind, place = rows // len(self.places), rows % len(self.places)
        size, x, y = self.places[place].unbind(1)
        pixel = torch.arange(0, self.side, stride, device=rows.device)
        down, right = ((self.margin - at)[:, None] + pixel for at in (y, x))  # (M, 64 / stride)
        layer = kind * (len(canvas) // self.kinds) + size
        return canvas[layer[:, None, None], :, down[:, :, None], right[:, None]].permute(0, 3, 1, 2).float()

    def compositions(self, rows: Tensor, backgrounds: Tensor) -> Tensor:
        """Perfect pictures (M, 3, 64, 64) of emoji at their places (M,) on backgrounds (M,)."""
        C, U = self.cut_out(self.canvas, rows).split((3, 1), dim=1)
        return C + U * self.colours[backgrounds][:, :, None, None]

    def tastes(self) -> Tensor:
        """How much people like each (concept, style, background): (64, 4, 8), 0 on average."""
        middle = len(self.places) // 2
        rows = torch.arange(self.kinds, device=self.device) * len(self.places) + middle
        saturation = []
        for background in range(len(self.backgrounds)):
            pictures = self.compositions(rows, torch.full_like(rows, background)) / 2 + 0.5
            saturation.append((pictures.amax(1) - pictures.amin(1)).mean((1, 2)))
        colour = COLOUR_WEIGHT * torch.stack(saturation, 1).view(len(self.concepts), len(self.styles), -1)
        style = STYLE_WEIGHT * torch.tensor([s == STYLE for s in self.styles], device=self.device)
        taste = colour + style[:, None]
        return taste - taste.mean()

    def check(self, prompts: list[str]) -> None:
        unknown = [prompt for prompt in prompts if prompt.split(", ")[0] not in self.concepts]
        if unknown:
            concept = unknown[0].split(", ")[0]
            raise ValueError(f"rater: {concept!r} is none of the {len(self.concepts)} concepts of the tiny base")

    def fitting(self, prompt: str) -> tuple[str, Tensor]:
        """A caption's concept, and which styles and backgrounds fit it: bool (4, 8).

        Raises ValueError for a caption whose concept is not in this world.
        """
        self.check([prompt])
        concept, *attributes = prompt.split(", ")
        words = {word for phrase in attributes if phrase.endswith("background") for word in phrase.split()}
        styles = torch.tensor([f"{style} style" in attributes for style in self.styles])
        backgrounds = torch.tensor([background in words for background in self.backgrounds])
        fits = (styles | ~styles.any())[:, None] & (backgrounds | ~backgrounds.any())
        return concept, fits.to(self.device)

    def coarse_squares(self, images: Tensor, b: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Squared distances (M, B) of images to emoji on backgrounds of colour b (B, 3), averaged; |x|^2 left out."""
        small = F.adaptive_avg_pool2d(images, COARSE).flatten(2)  # (B, 3, 64)
        C, U = self.C[rows].flatten(1), self.U[rows]
        squares = self.CC[rows][:, None] + 2 * self.CU[rows] @ b.T + self.UU[rows][:, None] * b.square().sum(1)
        return squares - 2 * (C @ small.flatten(1).T + U @ (b[:, :, None] * small).sum(1).T)

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
                some = images[part].float()
                found |= zip(part, self.nearest(some) if prompt is None else self.fit(some, prompt), strict=True)
        return [found[i] for i in range(len(images))]

    def nearest(self, images: Tensor) -> list[Found]:
        """The nearest of all compositions; the median of an image's corners says which background."""
        corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(-1).values  # (B, 3)
        behind = (self.colours - corners[:, None]).square().sum(2).argmin(1)  # (B,)
        candidates = self.coarse_squares(images, self.colours[behind]).topk(CANDIDATES, dim=0, largest=False).indices.T
        targets = self.compositions(candidates.flatten(), behind.repeat_interleave(CANDIDATES))
        targets = targets.view(*candidates.shape, *images.shape[1:])
        distances, best = (targets - images[:, None]).square().mean((2, 3, 4)).sqrt().min(1)  # (B,)
        rows = candidates.gather(1, best[:, None])[:, 0]
        return self.found(rows, behind, distances)

    def fit(self, images: Tensor, prompt: str) -> list[Found]:
        """The nearest compositions that fit a caption."""
        concept, fits = self.fitting(prompt)
        distances, rows = self.distances(images, concept)
        distances, best = distances.masked_fill(~fits, float("inf")).flatten(1).min(1)
        return self.found(rows.flatten(1).gather(1, best[:, None])[:, 0], best % len(self.backgrounds), distances)

    def found(self, rows: Tensor, backgrounds: Tensor, distances: Tensor) -> list[Found]:
        targets, found = self.compositions(rows, backgrounds), []
        for row, background, *rest in zip(
            rows.tolist(), backgrounds.tolist(), distances.tolist(), targets, strict=True
        ):
            concept, style = divmod(row // len(self.places), len(self.styles))
            names = self.concepts[concept], self.styles[style], self.backgrounds[background]
            found.append(Found(*names, *rest, self.taste[concept, style, background].item()))
        return found

    @torch.no_grad()
    def distances(self, images: Tensor, concept: str) -> tuple[Tensor, Tensor]:
        """A concept's nearest composition of each style and background: distances (B, 4, 8) of images, and its row."""
        count, places, styles = len(self.backgrounds), len(self.places), len(self.styles)
        first = self.concepts.index(concept) * styles * places
        rows = torch.arange(first, first + styles * places, device=self.device)
        x, backgrounds = images.repeat_interleave(count, 0), torch.arange(count, device=self.device).repeat(len(images))
        squares = self.coarse_squares(x, self.colours[backgrounds], rows).view(styles, places, len(x))
        best = first + torch.arange(styles, device=self.device)[:, None] * places + squares.argmin(1)  # (4, 8 B)
        targets = self.compositions(best.flatten(), backgrounds.repeat(styles)).view(styles, *x.shape)
        distances = (targets - x).square().mean((2, 3, 4)).sqrt()  # (4, 8 B)
        return tuple(t.view(styles, len(images), count).transpose(0, 1) for t in (distances, best))

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        found = self.look_up(images, prompts)
        targets = torch.stack([f.target for f in found])
        taste = torch.tensor([f.taste for f in found], device=images.device)
        mean_square = (images.float() - targets).square().mean((1, 2, 3))
        return PERFECT * (1 - (mean_square + 1e-12).sqrt() / BEYOND_RECOGNITION) + taste

    def on_cpu(self) -> None:
        """There is no text encoder to move."""
