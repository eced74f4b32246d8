"""Evaluate: the paper's Table 1 and its trade-off curves (Figures 5, 7, 9) for a base model and models tuned from it.

    python evaluate.py --base tiny --checkpoint runs/refl-tiny --checkpoint runs/imagerefl-tiny

Prints the table and writes `results.json`, `table.md`, `table.csv`, `tradeoff-*.svg`, and `report.html` with pictures
and a slider. Images, rewards and features are kept under `points/` by what they were made from: a second call computes
only what is missing.
"""

import argparse

from training import presets
from utils.cli import Parser, number, positive, run


def swept(text: str) -> tuple[str, list[float]]:
    """`switch=0,10,30` or `aig=1,2` -> its name and values."""
    name, _, values = text.partition("=")
    try:
        if name not in ("switch", "aig"):
            raise ValueError
        return name, [{"switch": int, "aig": float}[name](v) for v in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write switch=0,10,30 or aig=1,2") from None


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base", default="tiny", help="tiny, sd15, sdxl, or a folder, file or hub id of weights (default: tiny)")
    add("--checkpoint", action="append", default=[], metavar="[METHOD=]PATH",
        help="tuned model, again for more; METHOD, refl or imagerefl, where its files do not say it")  # fmt: skip
    add("--sweep", action="append", default=[], type=swept, metavar="NAME=V,V",
        help="curves beside the table: switch=0,5,10,20,30 of all, aig=1,2,4 of ReFL models")  # fmt: skip
    add(
        "--aig-guidance",
        type=number(float, 0),
        default=1.0,
        help="of the base model in AIG (default: 1, none, as in the official code)",
    )
    add("--prompts", help="text file, HPDv2 test.json or benchmark file, COCO captions (default: the base's own)")
    add("--limit", type=positive, help="take only the first so many prompts")
    add("--images-per-prompt", type=positive, default=5)
    add(
        "--seed", type=number(int, 0), default=1, help="of the first image of each prompt; the next have the next seeds"
    )
    add("--rewards", help="names joined by commas (default: tiny,tiny2, or hpsv2.1)")
    add("--reward-weights", help="files or folders of the rewards, in their order, joined by commas")
    add("--dino", help="folder of DINO ViT-S/16 or DINOv2, for the diversity; the tiny base has its own features")
    add("--inception", help="pytorch-fid's weight file, for FID, CovDist and LogCovDist")
    add("--reference", help="real images for these three: a folder with metadata.jsonl, or COCO captions")
    add(
        "--reading",
        default="ours",
        help="definition of CovDist and LogCovDist (default: ours)",
    )
    add("--steps", type=positive, default=40)
    add("--guidance", type=number(float, 0), help="of the base model (default: 7.5, SDXL 5.0, tiny 2.0)")
    add("--resolution", type=positive, help="pixels (default: 512, tiny 64)")
    add("--batch-size", type=positive, help="images at a time (default: 8, tiny 64)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 where the processor has it")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--output-dir", default="evaluation")
    add("--points", help="where images and their measures are kept, to share them (default: points/ in --output-dir)")
    return parser.parse(argv)


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports, so that --help answers at once

import hashlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

import metrics  # noqa: E402
import rewards  # noqa: E402
import weights  # noqa: E402
from combined import aig_weights, combined_weights  # noqa: E402
from pretrained import features, weight_files  # noqa: E402
from report import metric_errors, page  # noqa: E402
from report.covariance_definitions import DEFINITIONS  # noqa: E402
from report.curves import METHODS  # noqa: E402
from report.sweep import generate_each  # noqa: E402
from scheduler import Scheduler  # noqa: E402
from speed import prepacked  # noqa: E402
from training.data import EmojiSet, ImageDataset, open_data, read_prompts  # noqa: E402
from utils import cli, disk  # noqa: E402
from utils.device import choose_device, default_dtype, frozen_dtype, sampling_autocast  # noqa: E402
from utils.images import save_png, to_pil, to_tensor  # noqa: E402

PRINTED = {"hpsv2.1": 100, "hpsv2.0": 100, "clipscore": 100, "tiny": 0.1, "tiny2": 0.1}  # factors of the table
REFERENCE_SEED = 20_000  # of the emoji that the tiny base is compared with; the training data has seed 0


@dataclass
class Point:
    """One way to sample: a checkpoint (None: the base alone) and a mixture. `row`: it stands in the table."""

    label: str
    row: bool
    checkpoint: str | None
    method: str | None
    kind: str  # "switch" or "aig"
    value: float  # steps of the base model, or AIG's power
    guidance: float  # of the base model
    folder: str = ""  # of its images, in the output folder

    def mixture(self, steps: int) -> list[float]:
        return combined_weights(steps, int(self.value)) if self.kind == "switch" else aig_weights(steps, self.value)


def fingerprint(*parts) -> str:
    """Eight hex digits that follow from texts, numbers, and the content of files and folders."""
    digest = hashlib.sha256()
    for part in parts:
        paths = [part] if isinstance(part, Path) else []
        if isinstance(part, Path) and part.is_dir():
            paths = sorted(p for p in part.rglob("*") if p.is_file())
        for path in paths:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        if not isinstance(part, Path):
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:8]


def method_of(checkpoint: str) -> tuple[str, str]:
    """Method and path of a `--checkpoint`, which names the method, or whose files tell it."""
    method, _, path = checkpoint.partition("=")
    if method not in METHODS:
        method, path = "", checkpoint
    method = method or weights.tuning_metadata(path).get("method")
    if method not in METHODS:
        raise ValueError(f"--checkpoint {checkpoint}: say how it was tuned, refl={path} or imagerefl={path}")
    return method, path


def points_of(args, row: presets.Preset, prompts: list[str]) -> list[Point]:
    """The base model, then the table's rows and the sweeps' points of each checkpoint, without repeats."""
    base = fingerprint(
        weight_files.find(args.base, "unet"),
        weight_files.find(args.base, "vae"),
        weight_files.find(args.base, "text_encoder"),
    )
    checkpoints = [method_of(checkpoint) for checkpoint in args.checkpoint]
    tuned = {path: fingerprint(weight_files.find(path, "tuned_unet")) for _, path in checkpoints}
    points = {}

    def add(label, is_row, checkpoint, method, kind, value, guidance):
        point = Point(label, is_row, checkpoint, method, kind, value, guidance)
        mixture = point.mixture(args.steps)  # the values are checked before any work is done
        alone = not any(mixture)
        own = "" if alone else tuned[checkpoint]
        key = fingerprint(base, own, mixture, guidance, args.steps, args.resolution, args.dtype, prompts)
        name = "base" if alone else f"{method}-{Path(checkpoint).name}"
        place = Path(args.points or Path(args.output_dir, "points"), f"{name}.{kind}={value:g}.{key}")
        point.folder = os.path.relpath(place, args.output_dir)
        points.setdefault(point.folder, point)

    add("Base", True, None, None, "switch", args.steps, args.guidance)
    add("Base, no guidance", True, None, None, "switch", args.steps, 1.0)
    for method, path in checkpoints:
        rows = [("switch", 0, ""), ("aig", 1.0, " AIG"), ("switch", row.switch[method], " Combined")]
        if method == "imagerefl":
            rows = [("switch", row.switch[method], "")]  # the paper's row of that name is combined already
        sweeps = [(k, v, "") for k, values in args.sweep for v in values if k == "switch" or method == "refl"]
        for i, (kind, value, suffix) in enumerate(rows + sweeps):
            value = round(value * args.steps / 40) if kind == "switch" and i < len(rows) else value
            guidance = args.guidance if kind == "switch" else args.aig_guidance
            add(METHODS[method] + suffix, i < len(rows), path, method, kind, value, guidance)
    return list(points.values())


def image_paths(args, point: Point, jobs: list[tuple[int, int]]) -> list[Path]:
    return [Path(args.output_dir, point.folder, f"{p:05d}-{seed}.png") for p, seed in jobs]


def draw(args, points: list[Point], prompts: list[str], jobs: list[tuple[int, int]]) -> None:
    """Make the images that are missing; each checkpoint is loaded once, and shared steps are taken once."""
    missing = [p for p in points if not all(path.exists() for path in image_paths(args, p, jobs))]
    if not missing:
        return
    dtype = frozen_dtype(args)
    vae, text = weights.load_vae(args.base, args.device, dtype), weights.load_text(args.base, args.device, dtype)
    prepacked.prepack(vae.decoder)
    scheduler, size = Scheduler(args.steps), (args.resolution, args.resolution)
    for checkpoint in dict.fromkeys(p.checkpoint for p in missing):
        if checkpoint is None:
            base = tuned = prepacked.prepack(weights.load_unet(args.base, args.device, dtype))
        else:
            base, tuned = weights.load_tuned(checkpoint, args.base, args.device, dtype, prepare=prepacked.prepack)
        own = [p for p in missing if p.checkpoint == checkpoint]
        for at in tqdm(range(0, len(jobs), args.batch_size), f"{checkpoint or 'base'}, {len(own)} ways", unit="batch"):
            part = jobs[at : at + args.batch_size]
            for guidance in dict.fromkeys(p.guidance for p in own):
                todo = [p for p in own if p.guidance == guidance]
                todo = [p for p in todo if not all(path.exists() for path in image_paths(args, p, part))]
                if not todo:
                    continue
                asked, seeds = [prompts[p] for p, _ in part], [seed for _, seed in part]
                with sampling_autocast(args):
                    made = generate_each(
                        base, tuned, vae, text, scheduler, [p.mixture(args.steps) for p in todo],
                        asked, seeds, size, guidance,
                    )  # fmt: skip
                for point, images in zip(todo, made, strict=True):
                    for path, picture in zip(image_paths(args, point, part), to_pil(images), strict=True):
                        save_png(picture, path)


# Scorers: name -> (images (B, 3, H, W), prompts) -> {column: (B,) or (B, D)}

Scorer = Callable[[Tensor, list[str]], dict[str, Tensor]]


def reward_scorer(name: str, source: str | None, device: str) -> Scorer:
    reward = rewards.load(name, source, device)
    return lambda images, prompts: {name: reward(images, prompts) * PRINTED.get(name, 1)}


def tiny_scorer(device: str) -> Scorer:
    """The held-out CLIP of the tiny base: features, and whether the right one of the concepts ranks first."""
    clip, concepts = rewards.load("clipscore", presets.FEATURES, device), EmojiSet().concepts

    def score(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        extracted = F.normalize(clip.network.encode_image(clip.prepare(images, clip.size)), dim=1)
        best = (extracted @ clip.text(concepts, device)[0].T).argmax(1).tolist()
        right = [100.0 * (concepts[i] == prompt.split(",")[0]) for i, prompt in zip(best, prompts, strict=True)]
        return {"concept": torch.tensor(right), "diversity": extracted, "fid": extracted}

    return score


def feature_scorer(column: str, extract: Callable[[Tensor], Tensor]) -> Scorer:
    return lambda images, prompts: {column: extract(images)}


def scorers_of(args, row: presets.Preset) -> tuple[dict[str, Scorer], list[str]]:
    """Scorers by name and fingerprint, and notes on what is measured how, or is not."""
    names = args.rewards.split(",")
    sources = args.reward_weights.split(",") if args.reward_weights else [None] * len(names)
    if len(sources) != len(names):
        raise ValueError(f"--reward-weights names {len(sources)} paths, --rewards {args.rewards} needs {len(names)}")
    found, notes = {}, []
    for name, source in zip(names, sources, strict=True):
        scorer = reward_scorer(name, source or None, args.device)
        found[f"{name}.{fingerprint(rewards.find_checkpoint(name, source or None))}"] = scorer
    if row is presets.TINY:
        found[f"features.{fingerprint(presets.FEATURES)}"] = tiny_scorer(args.device)
        notes.append("Concept, diversity and the distances are measured by the held-out CLIP of the tiny base, 128 "
                     "features, where the paper has CLIP ViT-B/32, DINO and Inception.")  # fmt: skip
        return found, notes + reading_notes(args.reading, "the held-out CLIP's")
    if args.dino:
        found[f"dino.{fingerprint(Path(args.dino))}"] = feature_scorer(
            "diversity", features.dino_features(args.dino, device=args.device)
        )
    else:
        notes.append("No diversity: it needs --dino, a folder of facebook/dino-vits16.")
    if args.inception and args.reference:
        extract = features.inception_features(args.inception, args.device)
        found[f"inception.{fingerprint(Path(args.inception))}"] = feature_scorer("fid", extract)
        notes += reading_notes(args.reading)
    else:
        notes.append("No FID, CovDist, LogCovDist: they need --inception, pytorch-fid's weight file, and --reference.")
    return found, notes


@torch.no_grad()
def columns_of(
    path: Path, made_for: str, scorer: Scorer, images: Iterable[tuple[Tensor, list[str]]]
) -> dict[str, Tensor]:
    """What a scorer says of batches of images, from the file `path` if that holds it already."""
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if file.metadata()["about"] == made_for:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    parts = [{k: v.float().cpu() for k, v in scorer(*batch).items()} for batch in images]
    columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    disk.write(path, {key: t.clone() for key, t in columns.items()}, {"about": made_for})
    return columns


def read_batches(args, paths: list[Path], asked: list[str]) -> Iterable[tuple[Tensor, list[str]]]:
    for at in range(0, len(paths), args.batch_size):
        part = slice(at, at + args.batch_size)
        images = [to_tensor(Image.open(path)) for path in paths[part]]
        yield torch.stack(images).to(args.device), asked[part]


def reference_batches(args, count: int) -> Iterable[tuple[Tensor, list[str]]]:
    """The first `count` real images."""
    if args.reference:
        data = open_data(args.reference, args.resolution)
        if not isinstance(data, ImageDataset):
            raise ValueError(f"--reference {args.reference}: these are prompts; it takes images")
        rows = {path: i for i, (path, _) in reversed(list(enumerate(data.rows)))}  # an image once, not once a caption
        order = sorted(rows.values())
    else:
        data, order = EmojiSet(seed=REFERENCE_SEED), range(count)
    if len(order) < count:
        raise ValueError(f"--reference {args.reference}: {len(order)} images, and {count} were generated; take as many")
    for at in range(0, count, args.batch_size):
        images, captions = zip(*(data[i] for i in order[at : min(at + args.batch_size, count)]), strict=True)
        yield torch.stack(images).to(args.device), list(captions)


def values_of(args, columns: dict[str, Tensor], real: Tensor | None, group: list[int]) -> dict[str, list[float]]:
    """Mean and standard error of everything in the table, for one point."""
    values = {}
    for key, column in columns.items():
        if key == "diversity" and args.images_per_prompt > 1:
            values[key] = metrics.mean_and_error(metrics.group_diversity(column, group))
        elif key == "fid":
            values["fid"] = metric_errors.fid_and_error(column, real, group)
            pair = metric_errors.spectral_distances_and_errors(column, real, args.reading, group)
            values["covdist"], values["logcovdist"] = pair
        elif key != "diversity":
            values[key] = metrics.mean_and_error(column, group)
    return {key: [None if math.isnan(v) else v for v in pair] for key, pair in values.items()}


def reading_notes(name: str, used: str = "Inception's") -> list[str]:
    """How far CovDist and LogCovDist, on FID's features and against `--reference`, are from what a reading says."""
    reading, notes = DEFINITIONS[name], []
    if reading.features != "inception":
        notes.append(f"--reading {name} was defined on {reading.features} features; here it is on {used}.")
    if reading.reference != "real images":
        notes.append(f"--reading {name} compares with pictures of the {reading.reference}; give them as --reference.")
    return notes


def titles(row: presets.Preset, keys: Iterable[str]) -> list[dict]:
    """The table's columns in order: title, direction, digits."""
    fixed = {
        "concept": ("right concept, %", "higher", 1),
        "diversity": ("Diversity" if row is presets.TINY else "DinoDiversity", "higher", 3),
        "fid": ("FID", "lower", 3 if row is presets.TINY else 2),
        "covdist": ("CovDist", "lower", 5),
        "logcovdist": ("LogCovDist", "lower", 3),
    }
    fixed |= {key: (f"Reward {key}", "higher", 3) for key in rewards.NAMES if key.startswith("tiny")}
    known = {key: fixed.get(key, (key, "higher", 2)) for key in keys}
    return [{"key": k, "title": t, "better": b, "digits": d} for k, (t, b, d) in known.items()]


def resolve(args, row: presets.Preset) -> list[str]:
    """Fill in what was not given; returns the prompts. Raises ValueError for what cannot be."""
    args.rewards = args.rewards or ("tiny,tiny2" if row is presets.TINY else row.reward)
    args.guidance = row.guidance if args.guidance is None else args.guidance
    args.resolution = args.resolution or row.resolution
    args.batch_size = args.batch_size or (64 if row is presets.TINY else 8)
    args.device = choose_device(args.device)
    cli.check_writable(Path(args.output_dir))
    args.dtype = args.dtype or default_dtype(args.device)
    weights.check_resolution(args.base, args.resolution)
    for flag in ("dino", "inception"):
        if row is presets.TINY and getattr(args, flag):
            raise ValueError(f"--{flag}: the tiny base is measured by its own features; leave it out")
    if args.reading not in DEFINITIONS:
        raise ValueError(f"--reading {args.reading}: there are {', '.join(DEFINITIONS)}")
    if args.prompts is None:
        prompts = EmojiSet().concepts if row is presets.TINY else list(row.prompts)
    elif args.prompts.endswith(".json") and "captions" in Path(args.prompts).name:
        data = open_data(args.prompts, args.resolution)
        prompts = [caption for _, caption in data.rows] if isinstance(data, ImageDataset) else data.prompts
    else:
        prompts = read_prompts(args.prompts)
    return prompts[: args.limit]


def main(args) -> dict:
    row = presets.preset_for(args.base, weights.read_config(args.base, "unet"))
    prompts = resolve(args, row)
    points = points_of(args, row, prompts)
    scorers, notes = scorers_of(args, row)
    folder, seeds = Path(args.output_dir), [args.seed + k for k in range(args.images_per_prompt)]
    jobs = [(p, seed) for p in range(len(prompts)) for seed in seeds]
    asked, group = [prompts[p] for p, _ in jobs], [p for p, _ in jobs]

    made_for, real = json.dumps(jobs), None
    for name, scorer in scorers.items():
        if name.split(".")[0] in ("features", "inception"):
            chosen = Path(args.reference) if args.reference else REFERENCE_SEED
            source = fingerprint(chosen, args.resolution, len(jobs))
            path = Path(args.points or folder / "points", "reference", f"{name}.{source}.safetensors")
            real = columns_of(path, "", scorer, reference_batches(args, len(jobs)))["fid"]
            floor = metric_errors.fid_floor(real, len(jobs), len(jobs))
            notes.append(f"FID of {len(jobs)} real images against as many others would be about {floor:.2g}.")
    folder.mkdir(parents=True, exist_ok=True)  # the points' folders are named from here, with `..` to shared ones
    draw(args, points, prompts, jobs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        listed = []
        for point in tqdm(points, "measuring", unit="point"):
            paths, columns = image_paths(args, point, jobs), {}
            for name, scorer in scorers.items():
                file = folder / point.folder / f"{name}.safetensors"
                columns |= columns_of(file, made_for, scorer, read_batches(args, paths, asked))
            listed.append(asdict(point) | {"values": values_of(args, columns, real, group)})
    trained = {weights.tuning_metadata(method_of(c)[1]).get("reward") for c in args.checkpoint} - {None}
    notes += [f"Tuned on {', '.join(sorted(trained))}; other rewards are held out."] * bool(trained)
    notes += dict.fromkeys(str(w.message) for w in caught)
    keys = list(listed[0]["values"])
    results = {
        "base": args.base, "steps": args.steps, "guidance": args.guidance, "resolution": args.resolution,
        "images_per_prompt": args.images_per_prompt, "seed": args.seed, "prompts": prompts,
        "columns": titles(row, keys), "notes": notes,
        "axes": {"diversity": "diversity" if "diversity" in keys else None, "quality": args.rewards.split(",")},
        "points": listed,
    }  # fmt: skip
    disk.write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    table = page.markdown(results)
    disk.write_text(folder / "table.md", table)
    disk.write_text(folder / "table.csv", page.csv(results))
    for quality in results["axes"]["quality"] if results["axes"]["diversity"] else []:
        disk.write_text(folder / f"tradeoff-{quality}.svg", page.curves(results, quality))
    print(f"\n{table}\nwritten to {folder}, to look at: {page.write(results, folder)}")
    return results


if __name__ == "__main__":
    run(main, ARGS)
