"""Captioned images on disk: a table of file names and captions, text files beside the images, COCO, Karpathy's split.

Each reader gives `Captions`: rows of (image file, caption) in the order of their file. docs/data.md lists the formats.
"""

import difflib
import os
import re
from pathlib import Path

from training.coco import coco_captions, karpathy_captions
from training.image_files import IMAGES, Captions, ImageFinder, Options, find_images
from training.tables import ARCHIVES, JSON, TABLES, Row, check_unicode, column, only_object, read_table, read_text

FILE_COLUMNS = (
    "file_name", "filename", "image", "image_path", "image_file", "image_name", "image_file_name", "img_path", "img",
    "file", "file_path", "filepath", "path",
)  # fmt: skip
CAPTION_COLUMNS = ("text", "caption", "prompt", "captions", "texts", "prompts", "sentence", "sentences")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json", "metadata.parquet")
BESIDE = (".txt", ".caption")  # suffixes of a caption beside its image
EXAMPLE = 'one line per image: {"file_name": "a.png", "text": "a caption"}'


def table_captions(table: list[Row], path: Path, options: Options) -> Captions:
    """A table with a column of image files and one of captions. Raises ValueError naming the row that is wrong."""
    folder = options.images or path.parent
    names = [options.caption_column.strip().lower()] if options.caption_column else CAPTION_COLUMNS
    key = text_key = None
    named = []
    for place, row in table:
        if key is None and isinstance(row, dict):
            key, text_key = column(row, FILE_COLUMNS), column(row, names)
            if options.caption_column and not text_key:
                raise ValueError(
                    f"{path}: --caption-column {options.caption_column}: it has {', '.join(map(str, row))}"
                )
        if not isinstance(row, dict) or key not in row or text_key not in row:
            wanted = f"{key or 'file_name'} and {text_key or 'text'}"
            advice = "; --caption-column names another column" if isinstance(row, dict) and key and not text_key else ""
            kind = "a JSON object" if path.suffix.lower() in JSON else "a row"
            raise ValueError(f"{path}, {place}: not {kind} with {wanted}: {str(row)[:80]}{advice}")
        name, texts = row[key], row[text_key] if isinstance(row[text_key], list) else [row[text_key]]
        if not (isinstance(name, str) and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{path}, {place}: {key} and {text_key} must be strings: {str(row)[:80]}")
        if "://" in name:
            raise ValueError(f"{path}, {place}: {name} is an address; download the images first and name the files")
        named += [(name, text, place) for text in texts or [""]]
    if not named:
        raise ValueError(f"{path}: empty, so there is nothing to train on")
    own = f"{folder.name}/"  # "train/a.png" in train/metadata.jsonl
    folders = [folder] + [folder.parent] * all(name.startswith(own) for name, _, _ in named)
    captions = find_images(named, ImageFinder(folders), path, options, few=0)
    others = [k for k in table[0][1] if k != text_key and str(k).strip().lower() in CAPTION_COLUMNS[:3]]
    if others and not options.caption_column:
        captions.notes.append(f"captions are from the column {text_key}, not {' or '.join(others)} (--caption-column)")
    return captions


def captions_beside(folder: Path) -> Captions | None:
    """Images with a text file of the same name beside them, in all sub-folders; each line of it is a caption.

    Returns None where no image has one.
    """
    rows, without, repeats = [], [], []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        texts = {name.lower(): name for name in files if name.lower().endswith(BESIDE)}
        for name in sorted(name for name in files if name.lower().endswith(IMAGES) and name[0] != "."):
            stems = dict.fromkeys((name.lower(), os.path.splitext(name)[0].lower()))
            found = [texts[stem + suffix] for stem in stems for suffix in BESIDE if stem + suffix in texts]
            path = Path(place, name)
            if len(found) > 1:
                raise ValueError(f"{path}: has two captions, {' and '.join(found)}; move one kind elsewhere")
            if not found:
                without.append(path)
                continue
            file = Path(place, found[0])
            lines = [line.strip() for line in read_text(file).split("\n") if line.strip()] or [""]
            check_unicode(lines, file)
            rows += [(path, line) for line in lines]
            if re.match(r"\d+_", path.parent.name) and path.parent != folder:
                repeats.append(path.parent.name)
    if not rows:
        return None
    notes = [f"{len(without)} images have no caption and are left out, the first: {without[0]}"] if without else []
    if repeats:
        notes.append(f"the number in folder names such as {repeats[0]} is not used: each image is read once an epoch")
    return Captions(rows, folder, notes)


def object_captions(content: dict, path: Path, options: Options) -> Captions | None:
    """Captions of the JSON object of COCO or of Karpathy's split; None for another object."""
    if "annotations" in content:
        return coco_captions(content, path, options)
    return karpathy_captions(content, path, options) if isinstance(content.get("images"), list) else None


def file_captions(path: Path, options: Options) -> Captions | None:
    """Captions of one file: COCO's, Karpathy's, a table, or an object of file names. None for a file of prompts."""
    rows = read_table(path)
    content = only_object(rows)
    captions = object_captions(content, path, options) if content else None
    if captions:
        return captions
    if content and all(str(name).lower().endswith(IMAGES) for name in content):
        values = ((name, v) for name, v in content.items())
        rows = [(name, {"file_name": name} | (v if isinstance(v, dict) else {"text": v})) for name, v in values]
    first = rows[0][1] if rows else None
    key = column(first, FILE_COLUMNS) if isinstance(first, dict) else None
    if key is None or not isinstance(first[key], str):
        return None
    return table_captions(rows, path, options)


def folder_captions(folder: Path, options: Options) -> Captions:
    """Captions of a folder: its metadata file, that of its sub-folder `train`, or text files beside the images."""
    files = [path for name in METADATA if (path := folder / name).is_file()]
    if not files:
        files = [path for path in sorted(folder.glob("*/metadata.*")) if path.name in METADATA]
        folders = sorted({path.parent for path in files})
        if len(folders) > 1 and folder / "train" not in folders:
            raise ValueError(f"{folder}: name one of its folders, {', '.join(path.name for path in folders)}")
        files = [path for path in files if path.parent.name == "train" or len(folders) == 1]
        files.sort(key=lambda path: METADATA.index(path.name))
    if files:
        captions = table_captions(read_table(files[0]), files[0], options)
        captions.notes += [f"{path.name} is not read" for path in files[1:]]
        return captions
    if options.images or options.caption_column:
        flag = "--images" if options.images else "--caption-column"
        raise ValueError(f"{flag} goes with a table of captions, and {folder} has none")
    captions = captions_beside(folder)
    if captions is None:
        raise FileNotFoundError(f"{folder / METADATA[0]}: not there; {advice_for(folder)}")
    return captions


def advice_for(folder: Path) -> str:
    """What to do with a folder in which no captions were found."""
    names = sorted(path.name for path in folder.iterdir())
    coco = sorted([*folder.glob("captions_*.json"), *folder.glob("annotations/captions_*.json")])
    if coco:
        return f"name the captions file: {coco[0]}"
    if any(name.endswith(".arrow") for name in names) or "dataset_dict.json" in names:
        return "a data set saved by datasets.save_to_disk; docs/data.md shows how to export it"
    if any(folder.glob("**/*.parquet")):
        return "Parquet files that contain the images; docs/data.md shows how to export them"
    if any(name.endswith(ARCHIVES) for name in names):
        return "unpack its archives first, into a folder of images with a .txt each"
    near = difflib.get_close_matches(METADATA[0], names, cutoff=0.7)
    if near:
        return f"{near[0]} looks like it, under another name; {EXAMPLE}"
    return f"{EXAMPLE}, or a .txt beside each image"


def read_captions(path: Path, options: Options) -> Captions | None:
    """The captions that a file or folder holds; None for a file without image names, which may be one of prompts."""
    if options.images and not options.images.is_dir():
        raise FileNotFoundError(f"--images {options.images}: no such folder")
    if path.is_dir():
        return folder_captions(path, options)
    suffix = path.suffix.lower()
    if suffix in ARCHIVES:
        target = path.with_suffix("").name
        raise ValueError(f"{path}: unpack it first, e.g. mkdir {target} && tar -xf {path.name} -C {target}")
    if suffix in IMAGES:
        raise ValueError(f"{path}: an image; name a folder of images with captions")
    return file_captions(path, options) if suffix in TABLES else None


def read_metadata(folder: Path) -> list[tuple[Path, str]]:
    """Rows of a folder with a metadata file, or with a text file beside each image."""
    return folder_captions(folder, Options()).rows


def read_coco(path: Path) -> list[tuple[Path, str]]:
    """Rows of a COCO `captions_*.json`, one an annotation."""
    return coco_captions(only_object(read_table(path)) or {}, path, Options()).rows
