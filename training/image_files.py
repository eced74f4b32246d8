"""From the file names in a table or annotation file to the image files on disk."""

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from training.tables import check_unicode

IMAGES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".jxl",
    ".jp2", ".ppm", ".pgm",
)  # fmt: skip
FEW = 0.01  # share of a data set's images that may be missing without --allow-missing; a table may lack none


@dataclass(frozen=True)
class Options:
    """How to read captions. With `need_images` False, no image file is looked for: the captions alone are wanted."""

    images: Path | None = None  # folder of the images, where it is not the usual one
    caption_column: str | None = None
    allow_missing: bool = False
    need_images: bool = True
    splits: tuple[str, ...] = ("train", "restval")  # of Karpathy's split


@dataclass
class Captions:
    """Rows of (image file, caption), where they come from, and what to know about them."""

    rows: list[tuple[Path, str]]
    where: Path
    notes: list[str] = field(default_factory=list)


class ImageFinder:
    """Finds image files by the names in a table, which another system may have written.

    Upper and lower case, the two Unicode forms of an accent and backslashes do not matter, unless two files differ in
    them only.
    """

    def __init__(self, folders: Iterable[Path]):
        self.folders, self.listings = list(folders), {}

    def find(self, name: str) -> Path | None:
        for folder in self.folders:
            for path in dict.fromkeys((folder / name, folder / name.replace("\\", "/"))):
                exact, folded = self.listing(path.parent)
                if path.name in exact:
                    return path
                same = folded.get(self.fold(path.name), [])
                if len(same) == 1:
                    return path.parent / same[0]
        return None

    def listing(self, folder: Path) -> tuple[set[str], dict[str, list[str]]]:
        if folder not in self.listings:
            try:
                names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
            except (OSError, ValueError):  # absent, or not a possible name
                names = []
            folded = {}
            for name in names:
                folded.setdefault(self.fold(name), []).append(name)
            self.listings[folder] = set(names), folded
        return self.listings[folder]

    @staticmethod
    def fold(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()


def find_images(
    named: list[tuple[str, str, str]], finder: ImageFinder, where: Path, options: Options, few: float = FEW
) -> Captions:
    """Rows (image name, caption, place in the file) -> `Captions`.

    Raises FileNotFoundError if more than the share `few` of the images is missing, unless `allow_missing` is set.
    """
    folder = finder.folders[0]
    check_unicode((text for name in named for text in name[:2]), where)
    if not options.need_images:
        return Captions([(folder / name, text) for name, text, _ in named], where)
    found = {name: finder.find(name) for name, _, _ in named}
    missing = [name for name, path in found.items() if path is None]
    names = {}
    for name, path in found.items():
        other = names.setdefault(path, name)
        if path and Path(other.replace("\\", "/")) != Path(name.replace("\\", "/")):
            raise ValueError(f"{where}: {other} and {name} are the same file on this disk, {path}")
    rows = [(found[name], text) for name, text, _ in named if found[name]]
    if not missing:
        return Captions(rows, where)
    count = f"{len(missing)} of {len(found)} images are missing"
    if not rows or len(missing) > few * len(found) and not options.allow_missing:
        place = next(place for name, _, place in named if name == missing[0])
        advice = "--images names their folder" + ", --allow-missing trains on the others" * bool(rows)
        raise FileNotFoundError(f"{where}, {place}: no image {folder / missing[0]}; {count}; {advice}")
    return Captions(rows, where, [f"{count} and left out, the first: {missing[0]}"])
