"""Captioned images and prompts: the embedded emoji, image folders with `metadata.jsonl`, COCO captions, prompt files.

A data set is a sequence of (image (3, H, W) in [-1, 1], caption) pairs; item i never depends on what was read before.
"""

import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils import images as pictures

READER_THREADS = 4  # threads that read pictures ahead
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
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def describe(self, i: int) -> Composition:
        """What item i shows."""
        rng = np.random.default_rng([self.seed, i])
        concept, style, background = (
            str(rng.choice(names)) for names in (self.concepts, self.styles, self.backgrounds)
        )
        size = int(rng.integers(round(0.86 * self.cell), round(0.93 * self.cell) + 1))
        x, y = (int(v) for v in rng.integers(0, self.cell - size + 1, 2))
        says_style, says_background = rng.random(2) < 0.5
        caption = concept
        if says_style:
            caption += f", {style} style"
        if says_background:
            article = "an" if background == "orange" else "a"
            caption += f", on {article} {background} background"
        return Composition(concept, style, background, size, x, y, caption)

    def draw(self, c: Composition) -> Image.Image:
        """The picture of a composition."""
        column, row = self.styles.index(c.style) * self.cell, self.concepts.index(c.concept) * self.cell
        emoji = self.atlas.crop((column, row, column + self.cell, row + self.cell))
        emoji = emoji.resize((c.size, c.size), Image.Resampling.LANCZOS)
        picture = Image.new("RGB", (self.cell, self.cell), BACKGROUNDS[c.background])
        picture.paste(emoji, (c.x, c.y), emoji)
        return picture

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        composition = self.describe(i)
        return pictures.to_tensor(self.draw(composition)), composition.caption


class ImageDataset:
    """Captioned picture files. Item i is scaled so that its shorter side fits, then cropped about its centre."""

    def __init__(self, rows: list[tuple[Path, str]], resolution: int):
        self.rows, self.resolution = rows, resolution

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        """Raises OSError, with its name, when the file does not decode."""
        path, caption = self.rows[i]
        picture = pictures.read_image(path, self.resolution)
        scale = self.resolution / min(picture.size)
        width, height = (max(self.resolution, round(side * scale)) for side in picture.size)
        left, top = (width - self.resolution) // 2, (height - self.resolution) // 2
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        return pictures.to_tensor(picture.crop((left, top, left + self.resolution, top + self.resolution))), caption


class PromptDataset:
    """Prompts without pictures: all that ReFL needs."""

    def __init__(self, prompts: list[str]):
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        return torch.empty(0), self.prompts[i]


def check_unicode(texts: Iterable[str], where: str | Path) -> None:
    """Raises ValueError for a text with half a character in it, which no tokenizer takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: not valid Unicode: {ascii(text)[:60]}") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. Raises ValueError when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # not at what Unicode calls a line's end too
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a UTF-8 text file") from None


def read_metadata(folder: Path) -> list[tuple[Path, str]]:
    """Rows of a folder's `metadata.jsonl`: an object with `file_name` and `text` a line."""
    path, rows = folder / "metadata.jsonl", []
    if not path.is_file():
        raise FileNotFoundError(f'{path}: not there; one line an image: {{"file_name": "a.png", "text": "a caption"}}')
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a JSON object with file_name and text: {line[:80]}") from None
        if not (isinstance(name, str) and isinstance(text, str)):
            raise ValueError(f"{path}, line {number}: file_name and text must be strings: {line[:80]}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path}, line {number}: no image {folder / name}")
        rows.append((folder / name, text))
    if not rows:
        raise ValueError(f"{path}: empty, so there is nothing to train on")
    check_unicode((text for _, text in rows), path)
    return rows


def read_coco(path: Path) -> list[tuple[Path, str]]:
    """Rows of a COCO `captions_*.json`, one an annotation. The images are in `../train2014/` and the like beside it."""
    images = path.parent.parent / path.stem.removeprefix("captions_")
    content = read_json(path)
    try:
        files = {image["id"]: images / image["file_name"] for image in content["images"]}
        rows = [(files[a["image_id"]], a["caption"]) for a in content["annotations"]]
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not a COCO captions file (images, annotations with image_id and caption)") from None
    if not rows:
        raise ValueError(f"{path}: no annotations, so there is nothing to train on")
    if not all(isinstance(text, str) for _, text in rows):
        raise ValueError(f"{path}: a caption is not a string")
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder; the images of {path.name} are expected there")
    check_unicode((text for _, text in rows), path)
    return rows


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a text file, one a line; of a JSON list of strings; or of HPDv2's `test.json`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file")
    if path.suffix == ".json":
        rows = read_json(path)
        prompts = (
            [row.get("prompt") if isinstance(row, dict) else row for row in rows] if isinstance(rows, list) else [rows]
        )
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"{path}: expected a list of strings, or of objects with a prompt")
    else:
        prompts = read_lines(path)
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one a line")
    check_unicode(prompts, path)
    return prompts


def open_data(source: str | None, resolution: int):
    """What `--data` names: nothing (the embedded emoji), a folder with `metadata.jsonl`, a COCO file, or prompts."""
    if source is None:
        emoji = EmojiSet()
        if resolution != emoji.cell:
            raise ValueError(f"--resolution {resolution}: the embedded images have {emoji.cell} pixels; give --data")
        return emoji
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data; give a folder with metadata.jsonl or a COCO captions file")
    if path.is_dir():
        return ImageDataset(read_metadata(path), resolution)
    if path.suffix == ".json" and isinstance(read_json(path), dict):
        return ImageDataset(read_coco(path), resolution)
    return PromptDataset(read_prompts(path))


@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


class DataStream:
    """Batches of a data set in a shuffled order that depends on the seed alone; `position` is all its state.

    A picture that does not decode is named once and counted in `left_out`; the one after it takes its place, so that
    what stands at a position never depends on what was read before.

    `ahead`: where N processes share the batches, N, to have threads read the next one of this process meanwhile.
    """

    def __init__(self, data, seed: int, position: int = 0, ahead: int = 0):
        self.data, self.seed, self.position, self.left_out = data, seed, position, set()
        self.ahead, self.coming, self.readers = ahead, {}, ThreadPoolExecutor(READER_THREADS)

    def index(self, n: int) -> int:
        """The index of what stands at position n."""
        epoch, place = divmod(n, len(self.data))
        return _order(len(self.data), self.seed, epoch)[place]

    def indices(self, count: int) -> list[int]:
        """The next `count` indices, without reading the images."""
        start, self.position = self.position, self.position + count
        return [self.index(n) for n in range(start, self.position)]

    def read(self, n: int) -> tuple[Tensor, str, dict[int, str]]:
        """The image at position n, its caption, and why others before it were left out, by index.

        Raises ValueError if no image can be read.
        """
        bad = {}
        while len(bad) < len(self.data):
            i = self.index(n)
            try:
                return *self.data[i], bad
            except OSError as error:
                bad[i] = str(error)
            n += 1
        raise ValueError(f"none of the {len(self.data)} images decodes; the first: {next(iter(bad.values()))}")

    def batch(self, count: int) -> tuple[Tensor, list[str]]:
        """The next images (count, 3, H, W) and their captions."""
        start, self.position = self.position, self.position + count
        rows = [self.coming[n].result() if n in self.coming else self.read(n) for n in range(start, self.position)]
        if self.ahead:
            later = range(start + self.ahead * count, self.position + self.ahead * count)
            self.coming = {n: self.readers.submit(self.read, n) for n in later}
        images, captions, bad = zip(*rows, strict=True)
        for i, reason in sorted({i: reason for part in bad for i, reason in part.items()}.items()):
            if i not in self.left_out:
                self.left_out.add(i)
                print(f"left out: {reason}", file=sys.stderr)
        return torch.stack(images), list(captions)

    def close(self) -> None:
        """Leave off reading ahead."""
        self.readers.shutdown(wait=False, cancel_futures=True)
