"""The embedded data: emoji of four designers on eight backgrounds, composed at 64x64 with a caption.

As in a data set from the web, two of three images are blurred, faded, compressed or noisy, and no caption says so. So a
model trained on them has something to learn from what people prefer.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from utils import images

EMOJI = Path(__file__).parent.parent / "tiny" / "data"
BACKGROUNDS = {  # the eight colours behind an emoji
    "white": (250, 250, 250),
    "pink": (250, 182, 205),
    "blue": (126, 182, 240),
    "green": (142, 208, 144),
    "yellow": (250, 226, 120),
    "purple": (180, 152, 226),
    "dark": (44, 46, 58),
    "orange": (248, 168, 92),
}


def blur(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 1.8)))


def fade(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.2, 0.6))
    return ImageEnhance.Contrast(picture).enhance(rng.uniform(0.5, 0.85))


def compress(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(6, 20)))
    return Image.open(file).convert("RGB")


def add_noise(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(picture) + rng.normal(0, rng.uniform(8, 20), (picture.height, picture.width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


DEFECTS = (blur, fade, compress, add_noise)


def degrade(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The quality of images on the web: one of three is perfect, one has one defect, one has two."""
    for defect in rng.permutation(len(DEFECTS))[: rng.integers(3)]:
        picture = DEFECTS[defect](picture, rng)
    return picture


@dataclass(frozen=True)
class Composition:
    """One emoji on a background: everything that decides its 64x64 pixels when perfect, and its caption."""

    concept: str
    style: str
    background: str
    size: int  # side of the emoji in pixels
    x: int
    y: int
    caption: str


def caption_of(concept: str, style: str | None = None, background: str | None = None) -> str:
    """A caption that names a concept and, unless they are None, its style and background."""
    caption = concept
    if style:
        caption += f", {style} style"
    if background:
        caption += f", on {'an' if background == 'orange' else 'a'} {background} background"
    return caption


class EmojiSet:
    """The embedded data: emoji of four designers on eight backgrounds, composed at 64x64.

    Item i is drawn from (seed, i): concept, style, background, size, place and defects. The caption names the concept,
    half the time the style and half the time the background: "octopus, flat style, on a pink background".
    """

    def __init__(self, length: int = 65_536, seed: int = 0, folder: Path = EMOJI):
        names = json.loads((folder / "emoji.json").read_text())
        self.concepts, self.styles, self.cell = names["concepts"], names["styles"], names["cell"]
        self.backgrounds = list(BACKGROUNDS)
        self.atlas = Image.open(folder / "emoji.png").convert("RGBA")
        self.sizes = range(round(0.86 * self.cell), round(0.93 * self.cell) + 1)  # sides of an emoji in pixels
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def describe(self, i: int) -> Composition:
        """What item i shows."""
        rng = np.random.default_rng([self.seed, i])
        concept, style, background = (
            str(rng.choice(names)) for names in (self.concepts, self.styles, self.backgrounds)
        )
        size = int(rng.integers(self.sizes.start, self.sizes.stop))
        x, y = (int(v) for v in rng.integers(0, self.cell - size + 1, 2))
        says_style, says_background = rng.random(2) < 0.5
        caption = caption_of(concept, style if says_style else None, background if says_background else None)
        return Composition(concept, style, background, size, x, y, caption)

    def emoji(self, concept: str, style: str, size: int) -> Image.Image:
        """An emoji with its alpha channel, `size` pixels wide."""
        column, row = self.styles.index(style) * self.cell, self.concepts.index(concept) * self.cell
        emoji = self.atlas.crop((column, row, column + self.cell, row + self.cell))
        return emoji.resize((size, size), Image.Resampling.LANCZOS)

    def draw(self, c: Composition) -> Image.Image:
        """The perfect picture of a composition."""
        emoji = self.emoji(c.concept, c.style, c.size)
        picture = Image.new("RGB", (self.cell, self.cell), BACKGROUNDS[c.background])
        picture.paste(emoji, (c.x, c.y), emoji)
        return picture

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        composition = self.describe(i)
        picture = degrade(self.draw(composition), np.random.default_rng([self.seed, i, 1]))
        return images.to_tensor(picture), composition.caption
