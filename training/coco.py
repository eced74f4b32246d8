"""Captions of COCO: its own annotation files, and Karpathy's split of them (also of Flickr8k and Flickr30k)."""

import re
from pathlib import Path

from training.image_files import Captions, ImageFinder, Options, find_images


def coco_captions(content: dict, path: Path, options: Options) -> Captions:
    """A COCO `captions_*.json`, one row per annotation. The images are in `../train2017/` or another usual place."""
    try:
        files = [(image_id(im["id"]), im.get("file_name") or im["coco_url"].split("/")[-1]) for im in content["images"]]
        named = [(image_id(a["image_id"]), a["caption"]) for a in content["annotations"]]
        names, different = dict(files), len(set(files))
    except (KeyError, TypeError, AttributeError):
        advice = (
            "; captions are in captions_*.json" if path.name.startswith(("instances_", "person_", "image_")) else ""
        )
        message = f"{path}: not a COCO captions file (images, annotations with image_id and caption){advice}"
        raise ValueError(message) from None
    if len(names) < different:
        raise ValueError(f"{path}: two images have the same id, so captions cannot be matched to images")
    if not named:
        raise ValueError(f"{path}: no annotations, so there is nothing to train on")
    if not all(isinstance(text, str) for text in (*names.values(), *(text for _, text in named))):
        raise ValueError(f"{path}: a caption is not a string")
    rows = [(names[key], text, f"annotation {n}") for n, (key, text) in enumerate(named, 1) if key in names]
    orphans = len(named) - len(rows)
    if orphans > len(rows):
        raise ValueError(f"{path}: {orphans} of {len(named)} captions belong to no image of the file")
    captions = find_images(rows, ImageFinder(coco_folders(path, set(names.values()), options)), path, options)
    captions.notes += [f"{orphans} of {len(named)} captions belong to no image and are left out"] if orphans else []
    return captions


def image_id(value: object) -> str:
    """An id as it is compared: 9, "9", 9.0 and "000000000009" are one."""
    text = str(value)
    digits = text.removesuffix(".0").lstrip("0")
    return digits if not digits or digits.isdigit() else text


def places(path: Path) -> list[Path]:
    """The folder that holds an annotation file's folder, that folder itself, and `images` in both."""
    above = path.parent.parent if path.parent.name else Path("..")
    return [above, above / "images", path.parent, path.parent / "images"]


def coco_folders(path: Path, names: set[str], options: Options) -> list[Path]:
    """Where to look for the images of a COCO file. Raises FileNotFoundError when no such folder exists."""
    split = path.stem.removeprefix("captions_")
    merged = re.fullmatch(r"trainval(\d*)", split)
    splits = [f"train{merged[1]}", f"val{merged[1]}"] if merged else [split]
    if options.images:
        return [options.images, *(options.images / name for name in splits)]
    roots = places(path)
    usual = [root / name for name in splits for root in roots] + [roots[0] / name / "images" for name in splits]
    found = [folder for folder in usual if folder.is_dir()]
    if not found or any("/" in name for name in names):
        finders = (ImageFinder([root]) for root in roots)
        found += [finder.folders[0] for finder in finders if any(finder.find(name) for name in names)]
    if not found and options.need_images:
        expected = f"the images of {path.name} are expected there; --images names another folder"
        raise FileNotFoundError(f"{usual[0]}: no such folder; {expected}")
    return found or usual[:1]


def karpathy_captions(content: dict, path: Path, options: Options) -> Captions:
    """Karpathy's split (`dataset_coco.json`): the captions of the parts that `options.splits` names."""
    try:
        images = [im for im in content["images"] if im.get("split", "train") in options.splits]
        named = [
            ("/".join(filter(None, (im.get("filepath"), im["filename"]))), sentence["raw"], f"image {n}")
            for n, im in enumerate(images, 1)
            for sentence in im["sentences"]
        ]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a split of Karpathy's (images with filename and sentences)") from None
    if not named:
        raise ValueError(f"{path}: no image of the split {options.splits[0]}")
    if not all(isinstance(text, str) for _, text, _ in named):
        raise ValueError(f"{path}: a caption is not a string")
    folders = [options.images] if options.images else places(path)
    if options.images and all(name.startswith(f"{options.images.name}/") for name, _, _ in named):
        folders.append(options.images.parent)
    captions = find_images(named, ImageFinder(folders), path, options)
    left_out = len(content["images"]) - len(images)
    parts = " and ".join(options.splits)
    captions.notes += [f"of the split {parts}; {left_out} images of other parts are not used"] * bool(left_out)
    return captions
