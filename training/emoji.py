"""The embedded data: emoji of four designers on eight backgrounds, composed at 64x64 with a caption."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
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


@dataclass(frozen=True)
class Composition:
    """One emoji on a background: everything that decides its 64x64 pixels, and its caption."""

    concept: str
    style: str
    background: str
    size: int  # side of the emoji in pixels
    x: int
    y: int
    caption: str


class EmojiSet:
    """The embedded data: emoji of four designers on eight backgrounds, composed at 64x64.

    Item i is drawn from (seed, i): concept, style, background, size and place. The caption names the concept, half the
    time the style and half the time the background: "octopus, flat style, on a pink background".
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
        caption = concept
        if says_style:
            caption += f", {style} style"
        if says_background:
            article = "an" if background == "orange" else "a"
            caption += f", on {article} {background} background"
        return Composition(concept, style, background, size, x, y, caption)

    def emoji(self, concept: str, style: str, size: int) -> Image.Image:
        """An emoji with its alpha channel, `size` pixels wide."""
        column, row = self.styles.index(style) * self.cell, self.concepts.index(concept) * self.cell
        emoji = self.atlas.crop((column, row, column + self.cell, row + self.cell))
        return emoji.resize((size, size), Image.Resampling.LANCZOS)

    def draw(self, c: Composition) -> Image.Image:
        """The picture of a composition."""
        emoji = self.emoji(c.concept, c.style, c.size)
        picture = Image.new("RGB", (self.cell, self.cell), BACKGROUNDS[c.background])
        picture.paste(emoji, (c.x, c.y), emoji)
        return picture

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        composition = self.describe(i)
        return images.to_tensor(self.draw(composition)), composition.caption
