"""Points of the trade-off curves: which models and schedules to sample, and their images, cached on disk.

Each point has a folder `points/NAME.KIND=VALUE.KEY` of images `PROMPT-SEED.png`. KEY follows from everything that
decides the pixels (weights, schedule, guidance, prompts, ...), so an image on disk never needs to be sampled again.
A job is a pair (number of the prompt, seed): one image. `args` are the flags of `report/options.py`, completed.
"""

import hashlib
import json
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from combined import aig_weights, combined_weights, rescale_switch
from pretrained import loading, weight_files
from report.curves import METHODS
from report.sweep import generate_each
from scheduler import Scheduler
from utils.acceleration import for_sampling
from utils.device import frozen_dtype, sampling_autocast
from utils.images import save_png, to_pil

Job = tuple[int, int]  # number of the prompt, seed


@dataclass
class Point:
    """A model and how it is sampled: a checkpoint (None: the base model alone) and a weight schedule."""

    label: str
    row: bool  # whether the table has a row for it
    checkpoint: str | None
    method: str | None
    kind: str  # "switch" or "aig"
    value: float  # steps of the base model, or AIG's lambda
    guidance: float  # of the base model
    folder: str = ""  # of its images, relative to the output folder

    def schedule(self, steps: int) -> list[float]:
        """The weight of the tuned model at each step. Raises ValueError for a value out of range."""
        return combined_weights(steps, int(self.value)) if self.kind == "switch" else aig_weights(steps, self.value)

    def image_paths(self, output_dir: str, jobs: list[Job]) -> list[Path]:
        return [Path(output_dir, self.folder, f"{p:05d}-{seed}.png") for p, seed in jobs]


def fingerprint(*parts) -> str:
    """Eight hex digits from texts, numbers, and the content of files and folders (given as Path)."""
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


def normal_form(prompt: str) -> str:
    """A prompt without what CLIP's tokenizer ignores: case and spacing. Prompts of one form give the same images."""
    return " ".join(unicodedata.normalize("NFC", prompt).lower().split())


def distinct(prompts: list[str]) -> list[str]:
    """The prompts without repeats, in order; repeats would count as independent though they are not."""
    first: dict[str, str] = {}
    for prompt in prompts:
        first.setdefault(normal_form(prompt), prompt)
    return list(first.values())


def method_and_path(checkpoint: str) -> tuple[str, str]:
    """Method and path of a `--checkpoint`: METHOD=PATH, or a path whose files name the method.

    Raises ValueError when neither names a method.
    """
    method, _, path = checkpoint.partition("=")
    if method not in METHODS:
        method, path = "", checkpoint
    method = method or loading.tuning_metadata(path).get("method")
    if method not in METHODS:
        raise ValueError(f"--checkpoint {checkpoint}: say how it was tuned, refl={path} or imagerefl={path}")
    return method, path


def points_of(args, base_steps: dict[str, int], prompts: list[str]) -> list[Point]:
    """The base model, then the table's rows and the sweeps of each checkpoint, without repeats.

    `base_steps`: by method, the steps of 40 that the base model takes in combined generation (Section 5.4).
    """
    base = fingerprint(
        weight_files.find(args.base, "unet"),
        weight_files.find(args.base, "vae"),
        weight_files.find(args.base, "text_encoder"),
    )
    checkpoints = [method_and_path(checkpoint) for checkpoint in args.checkpoint]
    tuned = {path: fingerprint(weight_files.find(path, "tuned_unet")) for _, path in checkpoints}
    points = {}

    def add(label, is_row, checkpoint, method, kind, value, guidance):
        point = Point(label, is_row, checkpoint, method, kind, value, guidance)
        schedule = point.schedule(args.steps)  # checks the value before any work is done
        base_alone = not any(schedule)
        own = "" if base_alone else tuned[checkpoint]
        key = fingerprint(base, own, schedule, guidance, args.steps, args.resolution, args.dtype, prompts)
        name = "base" if base_alone else f"{method}-{Path(checkpoint).name}"
        place = Path(args.points or Path(args.output_dir, "points"), f"{name}.{kind}={value:g}.{key}")
        point.folder = os.path.relpath(place, args.output_dir)
        points.setdefault(point.folder, point)

    add("Base", True, None, None, "switch", args.steps, args.guidance)
    add("Base, no guidance", True, None, None, "switch", args.steps, 1.0)
    for method, path in checkpoints:
        rows = [("switch", 0, ""), ("aig", 1.0, " AIG"), ("switch", base_steps[method], " Combined")]
        if method == "imagerefl":
            rows = [("switch", base_steps[method], "")]  # Table 1's row "ImageReFL" is combined generation already
        sweeps = [(k, v, "") for k, values in args.sweep for v in values if k == "switch" or method == "refl"]
        for i, (kind, value, suffix) in enumerate(rows + sweeps):
            value = rescale_switch(value, args.steps) if kind == "switch" and i < len(rows) else value
            guidance = args.guidance if kind == "switch" else args.aig_guidance
            add(METHODS[method] + suffix, i < len(rows), path, method, kind, value, guidance)
    return list(points.values())


def sample_missing(args, points: list[Point], prompts: list[str], jobs: list[Job]) -> None:
    """Sample the images that are not on disk. Each checkpoint is loaded once; shared steps are computed once."""

    def missing(candidates: list[Point], part: list[Job]) -> list[Point]:
        return [p for p in candidates if not all(path.exists() for path in p.image_paths(args.output_dir, part))]

    incomplete = missing(points, jobs)
    if not incomplete:
        return
    dtype, size = frozen_dtype(args), (args.resolution, args.resolution)
    vae, text = loading.load_vae(args.base, args.device, dtype), loading.load_text(args.base, args.device, dtype)
    text.report_cut([prompts[p] for p, _ in jobs])
    for_sampling(vae.decoder)
    scheduler = Scheduler(args.steps)
    batches = [jobs[at : at + args.batch_size] for at in range(0, len(jobs), args.batch_size)]
    for checkpoint in dict.fromkeys(p.checkpoint for p in incomplete):
        if checkpoint is None:
            base = tuned = for_sampling(loading.load_unet(args.base, args.device, dtype))
        else:
            base, tuned = loading.load_tuned(checkpoint, args.base, args.device, dtype, prepare=for_sampling)
        own = [p for p in incomplete if p.checkpoint == checkpoint]
        for part in tqdm(batches, f"{checkpoint or 'base'}, {len(own)} schedules", unit="batch"):
            texts, seeds = [prompts[p] for p, _ in part], [seed for _, seed in part]
            for guidance in dict.fromkeys(p.guidance for p in own):
                todo = missing([p for p in own if p.guidance == guidance], part)
                if not todo:
                    continue
                schedules = [p.schedule(args.steps) for p in todo]
                with sampling_autocast(args):
                    made = generate_each(base, tuned, vae, text, scheduler, schedules, texts, seeds, size, guidance)
                for point, images in zip(todo, made, strict=True):
                    for path, image in zip(point.image_paths(args.output_dir, part), to_pil(images), strict=True):
                        save_png(image, path)
