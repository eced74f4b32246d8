"""Data sets, and the shuffled endless stream of them that training reads.

A data set is a sequence of (image (3, H, W) in [-1, 1], caption) pairs; item i never depends on what was read before.
"""

import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from training.captions import read_captions, read_coco, read_metadata
from training.emoji import BACKGROUNDS, Composition, EmojiSet
from training.image_files import Options
from training.prompts import read_prompts
from training.tables import check_unicode
from utils import images

__all__ = [
    "BACKGROUNDS", "Composition", "DataStream", "EmojiSet", "ImageDataset", "PromptDataset", "check_unicode",
    "describe", "open_data", "read_coco", "read_metadata", "read_prompts",
]  # fmt: skip
READER_THREADS = 4  # threads that read images ahead


class ImageDataset:
    """Captioned image files. Item i is scaled so that its shorter side fits, then cropped about its centre.

    where, notes: for `describe`.
    """

    def __init__(self, rows: list[tuple[Path, str]], resolution: int, where: object = "", notes: Iterable[str] = ()):
        self.rows, self.resolution, self.where, self.notes = rows, resolution, where, list(notes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        """Raises OSError, with its name and the reason, if the file cannot be read."""
        path, caption = self.rows[i]
        picture = images.read_image(path, self.resolution)
        scale = self.resolution / min(picture.size)
        width, height = (max(self.resolution, round(side * scale)) for side in picture.size)
        left, top = (width - self.resolution) // 2, (height - self.resolution) // 2
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        return images.to_tensor(picture.crop((left, top, left + self.resolution, top + self.resolution))), caption


class PromptDataset:
    """Prompts without images: all that ReFL needs."""

    def __init__(self, prompts: list[str], where: object = "", notes: Iterable[str] = ()):
        self.prompts, self.where, self.notes = prompts, where, list(notes)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        return torch.empty(0), self.prompts[i]


def open_data(
    source: str | None,
    resolution: int,
    images: str | None = None,
    caption_column: str | None = None,
    allow_missing: bool = False,
    captions_only: bool = False,
) -> EmojiSet | ImageDataset | PromptDataset:
    """What `--data` names: nothing (the embedded emoji), a folder or file of captioned images, or a file of prompts.

    images: folder of the images, where it is not the usual one. captions_only: no image is looked for, and a
    `PromptDataset` of the captions is returned. Raises ValueError or OSError, in one line, for what cannot be read.
    """
    if source is None:
        given = {"--images": images, "--caption-column": caption_column, "--allow-missing": allow_missing}
        if any(given.values()):
            raise ValueError(f"{next(flag for flag, value in given.items() if value)} goes with --data")
        emoji = EmojiSet()
        if resolution != emoji.cell:
            raise ValueError(f"--resolution {resolution}: the embedded images have {emoji.cell} pixels; give --data")
        return emoji
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data; give a folder with metadata.jsonl or a COCO captions file")
    options = Options(Path(images) if images else None, caption_column, allow_missing, need_images=not captions_only)
    captions = read_captions(path, options)
    if captions is None:
        return PromptDataset(read_prompts(path, caption_column), path)
    empty = sum(not text.strip() for _, text in captions.rows)
    notes = captions.notes + [f"{empty} captions are empty"] * bool(empty)
    if captions_only:
        return PromptDataset([text for _, text in captions.rows], captions.where, notes)
    return ImageDataset(captions.rows, resolution, captions.where, notes)


def describe(data: EmojiSet | ImageDataset | PromptDataset) -> str:
    """One line for the start of a run: how many images and captions there are, where from, and what was left out."""
    if isinstance(data, EmojiSet):
        return f"{len(data):,} images, {len(data):,} captions, composed from the embedded emoji"
    if isinstance(data, PromptDataset):
        return "; ".join([f"{len(data):,} prompts, from {data.where}", *data.notes])
    if not isinstance(data, ImageDataset):
        return f"{len(data):,} pairs of images, from {data.where}"
    count = len({path for path, _ in data.rows})
    return "; ".join([f"{count:,} images, {len(data):,} captions, from {data.where}", *data.notes])


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
                tqdm.write(f"left out: {reason}", file=sys.stderr)
        return torch.stack(images), list(captions)

    def close(self) -> None:
        """Leave off reading ahead."""
        self.readers.shutdown(wait=False, cancel_futures=True)
