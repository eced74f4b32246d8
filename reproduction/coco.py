"""A COCO folder, in any of its usual layouts -> the captions to train on, and the 10,000 images of FID.

The paper says "the test and validation splits of the MS COCO dataset (10,000 samples)". We take this to mean Karpathy's
splits, if `dataset_coco.json` is there, otherwise images of COCO's own validation split. No image is in both parts.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from report.points import normal_form
from training.captions import read_coco
from training.tables import only_object, read_table
from utils import disk

SPLITS = ("train2014", "val2014", "train2017", "val2017")
BY_HAND = """\
mkdir -p {0} && cd {0}
curl -LO http://images.cocodataset.org/zips/train2014.zip
curl -LO http://images.cocodataset.org/zips/val2014.zip
curl -LO http://images.cocodataset.org/annotations/annotations_trainval2014.zip
curl -LO https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip
for f in *.zip; do unzip -q $f; done"""


def annotation_file(root: Path, name: str) -> Path | None:
    """An annotation file in the folder, in its `annotations/` or another sub-folder, or beside it."""
    places = [root, root / "annotations", root.parent / "annotations", *sorted(p for p in root.glob("*") if p.is_dir())]
    places += sorted(root.glob("*/annotations"))
    return next((place / name for place in places if (place / name).is_file()), None)


def image_id(path: Path) -> int:
    """The number in the name of a COCO image: COCO_val2014_000000000042.jpg and 000000000042.jpg are 42."""
    return int(re.search(r"(\d+)$", path.stem)[1])


def images_of(root: Path, name: str) -> tuple[dict[int, tuple[Path, list[str]]], str]:
    """Number -> image and captions of a split; none, and the reason, where annotations or images are missing."""
    path = annotation_file(root, f"captions_{name}.json")
    try:
        rows = read_coco(path) if path else []
    except FileNotFoundError as error:
        return {}, str(error)
    found: dict[int, tuple[Path, list[str]]] = {}
    for image, caption in rows:
        found.setdefault(image_id(image), (image, []))[1].append(caption)
    return found, "" if path else f"no captions_{name}.json"


def karpathy_numbers(root: Path) -> list[int]:
    """The numbers of the images of Karpathy's validation and test splits; empty without their file."""
    path = annotation_file(root, "dataset_coco.json")
    images = (only_object(read_table(path)) or {}).get("images", []) if path else []
    return [image["cocoid"] for image in images if image.get("split") in ("val", "test")]


@dataclass(frozen=True)
class Split:
    """Rows (image, caption) to train on and to measure on, a note on the latter, and what was not found."""

    train: list[tuple[Path, str]]
    measured: list[tuple[Path, str]]
    note: str
    missing: str


@functools.cache
def split(root: Path, count: int) -> Split:
    """Up to `count` rows to measure on, each of another image and with another caption; all others to train on."""
    parts, reasons = zip(*(images_of(root, name) for name in SPLITS), strict=True)
    train2014, val2014, train2017, val2017 = parts
    known, train = train2017 | val2017 | train2014 | val2014, train2014 or train2017
    numbers, where = [n for n in karpathy_numbers(root) if n in known], "Karpathy's validation and test splits"
    if not numbers:
        numbers = sorted(val2014 or val2017)
        where = "COCO's validation split (Karpathy's dataset_coco.json is not there)"
    if more := [n for n in sorted(train) if n not in set(numbers)][: max(0, count - len(numbers))]:
        where += f" and {len(more):,} of the training split, which are not trained on"
    numbers, used, measured = (numbers + more)[:count], set(), []
    for image, captions in map(known.get, numbers):
        caption = next((text for text in captions if normal_form(text) not in used), captions[0])
        used.add(normal_form(caption))
        measured.append((image, caption))
    kept = set(numbers)
    rows = [(image, text) for number, (image, texts) in train.items() if number not in kept for text in texts]
    return Split(rows, measured, f"FID: {len(measured):,} images of {where}", "; ".join(filter(None, reasons)))


def write_tables(root: Path, count: int, folder: Path) -> str:
    """Write `coco-train.jsonl` and `coco-measure.jsonl` for `--data` and `--reference`; returns the note."""
    found = split(root, count)
    for name, rows in (("coco-train.jsonl", found.train), ("coco-measure.jsonl", found.measured)):
        lines = (json.dumps({"file_name": str(path.absolute()), "text": text}) for path, text in rows)
        disk.write_text(folder / name, "".join(f"{line}\n" for line in lines))
    return found.note


def missing(root: Path | None, count: int, train: bool) -> str | None:
    """What a COCO folder lacks for a run, or None. train: whether images to train on are needed, too."""
    if root is None:
        return "name its folder: --data COCO"
    if not root.is_dir():
        return f"{root}: no such folder"
    found = split(root, count)
    if len(found.measured) < count:
        return f"{root}: {len(found.measured):,} captioned images to measure on, not {count:,}: {found.missing}"
    return f"{root}: no captioned images to train on: {found.missing}" if train and not found.train else None
