"""The pages of a user study (Figure 11): from an evaluation's images to one self-contained HTML file per person.

A page is blind: its images are copied pixel by pixel into files without metadata, its items have random names, and it
holds neither a method's name nor the key. It loads nothing and sends nothing; answers are saved as a file.
"""

import base64
import io
import json
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image

from report import page
from report.curves import full_label
from report.study_plan import QUESTIONS, Contest, Item, plan, write_key
from utils import disk

IMAGES, SIDE = 5, 256  # images per row (Section 5.4), and their longer side in pixels at most
ANSWER_TEXT = {"upper": "Upper", "lower": "Lower", "none": "No preference"}


class Evaluation:
    """An output folder of evaluate.py: `rows`, the points of its table by their labels."""

    def __init__(self, folder: Path):
        self.folder, self.results = folder, page.read(folder)
        self.prompts, self.count = self.results["prompts"], min(IMAGES, self.results["images_per_prompt"])
        self.rows = {full_label(self.results, p): p for p in self.results["points"] if p["row"]}
        if self.count < 2:
            raise ValueError(f"{folder}: one image per prompt shows no diversity; evaluate with --images-per-prompt 5")

    def contest(self, pair: str) -> Contest:
        """FIRST:SECOND, two labels of rows in any case. Raises ValueError for others."""
        by_name = {label.lower(): label for label in self.rows}
        names = [name.strip().lower() for name in pair.split(":")]
        if len(names) != 2 or names[0] == names[1] or not set(names) <= set(by_name):
            raise ValueError(f"--pair {pair}: write FIRST:SECOND, two of {', '.join(self.rows)}, rows of {self.folder}")
        return Contest(self.folder.name, *(by_name[name] for name in names))

    def paths(self, label: str, prompt: int) -> list[Path]:
        seeds = range(self.results["seed"], self.results["seed"] + self.count)
        return [self.folder / self.rows[label]["folder"] / f"{prompt:05d}-{seed}.png" for seed in seeds]


def data_uri(picture: Image.Image) -> str:
    """A picture, at most SIDE pixels wide and high, as a data URI of its pixels alone."""
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    bare, out = Image.fromarray(np.asarray(picture)), io.BytesIO()  # no metadata comes along
    bare.save(out, "webp", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def row(evaluation: Evaluation, label: str, prompt: int) -> list[str]:
    """Data URIs of a method's images. Raises OSError for a missing image."""
    paths = evaluation.paths(label, prompt)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such image; run evaluate.py again to sample it")
    return [data_uri(Image.open(path)) for path in paths]


def noise(count: int, side: int, seed: str) -> list[str]:
    """One picture of noise, `count` times: less diverse, less true to any caption and uglier than any row of images."""
    pixels = random.Random(seed).randbytes(3 * side * side)
    return [data_uri(Image.frombytes("RGB", (side, side), pixels))] * count


def html(study: str, rater: int, items: list[Item], contests: list[Contest], evaluations: dict[str, Evaluation]) -> str:
    """One person's page."""
    shown = []
    for item in items:
        contest, evaluation = contests[item.contest], evaluations[contests[item.contest].setup]
        first = row(evaluation, contest.first, item.prompt)
        if item.kind == "attention":
            second = noise(len(first), min(SIDE, evaluation.results["resolution"]), item.id)
        else:
            second = row(evaluation, contest.second, item.prompt)
        upper, lower = (first, second) if item.upper == "first" else (second, first)
        shown.append({"id": item.id, "caption": evaluation.prompts[item.prompt], "upper": upper, "lower": lower})
    about = {
        "name": study, "rater": rater, "items": shown,
        "questions": [{"key": key, "ask": ask, "hint": hint} for key, (ask, hint) in QUESTIONS.items()],
        "answers": [{"key": key, "text": text} for key, text in ANSWER_TEXT.items()],
    }  # fmt: skip
    parts = {
        "study": json.dumps(about).replace("<", "\\u003c"),
        "columns": str(max(evaluation.count for evaluation in evaluations.values())),
    }
    template = Path(__file__).with_name("study.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], template)


def make(
    folders: list[Path], pairs: list[str], output: Path, prompts: int | None, raters: int, people: int, seed: int
) -> str:
    """Write a page per person and `key.json` into `output`; returns what was made.

    Raises ValueError or OSError for folders that are no evaluations, or pairs that they do not have.
    """
    evaluations = {folder.name: Evaluation(folder) for folder in folders}
    if len(evaluations) < len(folders):
        raise ValueError("two evaluations have the same folder name; rename one, as the study tells them apart by it")
    if (output / "key.json").exists():
        raise ValueError(f"{output}: holds a study, whose pages may be with people; name another folder")
    contests = [evaluation.contest(pair) for evaluation in evaluations.values() for pair in pairs]
    tasks = []
    for number, contest in enumerate(contests):
        known = len(evaluations[contest.setup].prompts)
        count = min(prompts or known, known)
        tasks += [(number, i * known // count) for i in range(count)]  # spread evenly over the prompts
    if people < raters or len(tasks) < people:
        raise ValueError(
            f"--people {people}: needs at least --raters {raters}, and a task each; there are {len(tasks)}"
        )
    items = plan(tasks, raters, people, seed)
    study = f"{random.Random(str(items)).getrandbits(32):08x}"
    for rater in range(1, people + 1):
        own = [item for item in items if item.rater == rater]
        disk.write_text(output / f"rater-{rater:02d}.html", html(study, rater, own, contests, evaluations))
    write_key(output / "key.json", study, contests, items)
    names = "; ".join(f"{c.first} against {c.second}, {c.setup}" for c in contests)
    shared = f"{len(tasks)} tasks, raters per task: {raters}, items with repeats and attention tasks: {len(items)}"
    return f"{names}: {shared}\n{output}/rater-01.html to rater-{people:02d}.html; keep key.json to yourself"
