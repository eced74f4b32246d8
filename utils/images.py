"""Pictures and tensors: images (B, 3, H, W) in [-1, 1] <-> PIL, labelled grids, PNGs that say how they were made."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from utils import disk
from utils.decode import read_image as read_image


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture -> (3, H, W) in [-1, 1]."""
    pixels = np.array(image.convert("RGB"), dtype=np.float32) / 127.5 - 1  # torch would take threads of its own
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], clamped -> pictures."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def save_png(picture: Image.Image, path: str | Path, parameters: str | None = None) -> None:
    """Write a PNG under a temporary name and rename it. `parameters`: how it was made, in A1111's form."""
    info = PngInfo()
    if parameters:
        info.add_itxt("parameters", parameters)
    with disk.replacing(Path(path)) as temporary:
        picture.save(temporary, "png", pnginfo=info)


def label(text: str, width: int, size: int = 13) -> Image.Image:
    """Text on white, wrapped to a width in pixels."""
    font = ImageFont.load_default(size)
    lines = textwrap.wrap(text, max(4, int(width / (0.55 * size)))) or [""]
    strip = Image.new("RGB", (width, (size + 4) * len(lines) + 6), "white")
    ImageDraw.Draw(strip).multiline_text((4, 2), "\n".join(lines), "black", font, spacing=4)
    return strip


GAP, MARGIN = 4, 132  # of a grid, in pixels: between its pictures, and for the labels of its rows at font size 13


def grid(
    rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str], cell: int = 128, size: int = 13
) -> Image.Image:
    """A table of pictures, `cell` pixels each, labels before its rows and above its columns; `size`: of the font."""
    gap, margin = GAP, MARGIN * size // 13
    columns = max(len(row) for row in rows)
    heads = [label(text, cell, size) for text in column_labels]
    top = max((head.height for head in heads), default=0)
    sheet = Image.new("RGB", (margin + columns * (cell + gap), top + len(rows) * (cell + gap)), "white")
    for x, head in enumerate(heads):
        sheet.paste(head, (margin + x * (cell + gap), top - head.height))
    for y, (row, text) in enumerate(zip(rows, row_labels, strict=True)):
        words = label(text, margin, size)
        sheet.paste(words, (0, top + y * (cell + gap) + max(4, (cell - words.height) // 2)))
        for x, picture in enumerate(row):
            up = picture.size[0] < cell
            picture = picture.resize((cell, cell), Image.Resampling.BICUBIC if up else Image.Resampling.LANCZOS)
            sheet.paste(picture, (margin + x * (cell + gap), top + y * (cell + gap)))
    return sheet


def cells(sheet: Image.Image, cell: int = 128) -> list[list[Image.Image]]:
    """The pictures of a `grid` with labels of the default size, row by row."""
    step = cell + GAP
    top = sheet.height % step  # of the heads, which are lower than a picture
    return [
        [sheet.crop((x, y, x + cell, y + cell)) for x in range(MARGIN, sheet.width, step)]
        for y in range(top, sheet.height, step)
    ]
