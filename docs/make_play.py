"""Make docs/play.html, a page to play with T': images, scores and trade-off curves of two runs on the tiny base.

    python train.py --method refl --reward tiny --save-every 10 --keep 9
    python train.py --method imagerefl --reward tiny --steps 60 --save-every 20 --keep 9
    python docs/make_play.py --refl runs/refl-tiny --imagerefl runs/imagerefl-tiny

The page is one file that loads nothing; its template is docs/play_template.html. Images and scores stay in
`--cache`, so a second call computes only what is missing.
"""

import argparse
import base64
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from PIL import Image

import evaluate
import rewards
import weights
from pretrained.features import clip_features
from report.curves import METHODS, scale
from report.options import evaluate_args
from report.points import Job, fingerprint, points_of, sample_missing
from report.results import measure, table_columns
from report.scorers import feature_scorer, reward_scorers
from training import checkpoint, presets
from utils import cli, disk

T = 40  # denoising steps
TUNED_STEPS = (0, 5, 10, 15, 20, 30, 40)  # values of T'
STAGES = (0, 1 / 3, 2 / 3, 1)  # of the training, shares of its updates
FIRST_SEED, SEEDS = 1, 4  # of each prompt; its number of images
SHOWN = 6  # prompts whose images are on the page, spread evenly over all
SIDE, QUALITY = 128, 75  # images are enlarged to SIDE pixels, as WebP stores colours at half its resolution
BYTES = 3_000_000  # largest page


@dataclass
class Training:
    """A run: its method, the base and reward that it was trained with, and its weights by number of updates."""

    method: str
    base: str
    reward: str
    sources: dict[int, str]


def read_training(run: Path, method: str, cache: Path) -> Training:
    """A run with its checkpoints nearest to STAGES. Raises ValueError for a run without checkpoints or of adapters."""
    flags, found = weights.tuning_metadata(run), checkpoint.checkpoints_in(run / "states")
    if not found or flags.get("method") != method:
        raise ValueError(f"--{method} {run}: not a run of train.py --method {method} with checkpoints in states/")
    if flags.get("lora"):
        raise ValueError(f"--{method} {run}: its checkpoints hold adapters; train without --lora")
    updates = [0, *found]
    chosen = sorted({min(updates, key=lambda u, at=stage * updates[-1]: abs(u - at)) for stage in STAGES})
    sources = {u: export(found[u], flags["base"], cache) if u else flags["base"] for u in chosen}
    return Training(method, flags["base"], flags["reward"], sources)


def export(path: Path, base: str, cache: Path) -> str:
    """The UNet of a checkpoint as a folder that evaluate.py reads."""
    folder = cache / "unets" / f"{path.stem}-{fingerprint(path)}"
    if not (folder / "config.json").exists():
        unet = weights.load_unet(base)
        tensors, _ = checkpoint.read(path)
        unet.load_state_dict({k.removeprefix("unet."): t for k, t in tensors.items() if k.startswith("unet.")})
        weights.save_unet(unet, folder)
    return str(folder)


def sample_and_measure(trainings: list[Training], prompts: list[str], cache: Path) -> dict[tuple, dict]:
    """The points of evaluate.py by (source of the tuned weights, T'), with their values and images on disk."""
    base = trainings[0].base
    tuned = {source: f"{run.method}={source}" for run in trainings for source in run.sources.values()}
    sweep = ",".join(str(T - n) for n in TUNED_STEPS)
    flags = ["--base", base, "--output-dir", str(cache), "--steps", str(T)]
    flags += ["--images-per-prompt", str(SEEDS), "--seed", str(FIRST_SEED)]
    args = evaluate_args([*flags, "--sweep", f"switch={sweep}", *(f"--checkpoint={c}" for c in tuned.values())])
    evaluate.complete(args, presets.TINY)
    jobs: list[Job] = [(p, FIRST_SEED + k) for p in range(len(prompts)) for k in range(SEEDS)]
    points = [
        point
        for point in points_of(args, presets.TINY.switch, prompts)
        if point.kind == "switch" and point.guidance == args.guidance and T - point.value in TUNED_STEPS
    ]
    features = feature_scorer("diversity", clip_features(presets.FEATURES, args.device))
    scorers = reward_scorers(args, prompts) | {f"diversity.{fingerprint(presets.FEATURES)}": features}
    cache.mkdir(parents=True, exist_ok=True)
    sample_missing(args, points, prompts, jobs)
    measured, _ = measure(args, points, prompts, jobs, scorers, {}, [])
    found = {(point["checkpoint"], T - point["value"]): point for point in measured}
    return found | {(source, 0): found[None, 0] for source in tuned}


def data_uri(path: Path) -> str:
    """An image as a data URI."""
    image, out = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), io.BytesIO()
    image.save(out, "webp", quality=QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def axis(points: list[dict], key: str) -> dict:
    """The range of a column over all points, with their errors, and ticks as (position in 0..1, text)."""
    values = [mean + sign * (error or 0) for mean, error in (p["values"][key] for p in points) for sign in (-1, 1)]
    place, ticks = scale(values, 0, 1)
    return {"start": place(0), "unit": place(1) - place(0), "ticks": [[place(v), text] for v, text in ticks]}


def content(trainings: list[Training], points: dict[tuple, dict], prompts: list[str], cache: Path) -> dict:
    """What the page's script reads."""
    distinct = list({point["folder"]: point for point in points.values()}.values())
    number = {point["folder"]: i for i, point in enumerate(distinct)}
    count = min(SHOWN, len(prompts))
    shown = [i * len(prompts) // count for i in range(count)]

    def images(point: dict) -> list[list[str]]:
        folder = cache / point["folder"]
        return [[data_uri(folder / f"{p:05d}-{FIRST_SEED + k}.png") for k in range(SEEDS)] for p in shown]

    def numbers(run: Training) -> list[list[int]]:
        return [[number[points[source, n]["folder"]] for n in TUNED_STEPS] for source in run.sources.values()]

    columns = table_columns(distinct[0]["values"], tiny=True)
    return {
        "steps": T,
        "tunedSteps": TUNED_STEPS,
        "prompts": [prompts[p] for p in shown],
        "columns": [c | {"axis": axis(distinct, c["key"])} for c in columns],
        "methods": [
            {
                "name": METHODS[run.method],
                "trained": [name for name, _ in rewards.parse(run.reward)],
                "updates": list(run.sources),
                "points": numbers(run),
            }
            for run in trainings
        ],
        "points": [{"values": p["values"], "images": images(p)} for p in distinct],
    }


def main(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError for runs that cannot be used, and for a page that gets too large."""
    cache = Path(args.cache)
    trainings = [read_training(Path(getattr(args, method)), method, cache) for method in presets.METHODS]
    if trainings[0].base != trainings[1].base:
        raise ValueError(f"the runs were tuned from two bases, {trainings[0].base} and {trainings[1].base}")
    prompts = list(presets.TINY.prompts[: args.limit])
    points = sample_and_measure(trainings, prompts, cache)
    data = content(trainings, points, prompts, cache)
    template = Path(__file__).with_name("play_template.html").read_text(encoding="utf-8")
    page = template.replace("{{count}}", f"{len(prompts)} prompts × {SEEDS} seeds")
    page = page.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))
    if (size := len(page.encode())) > BYTES:
        raise ValueError(f"the page would have {size:,} bytes, more than {BYTES:,}; lower SHOWN or QUALITY")
    disk.write_text(Path(args.output), page)
    print(f"written: {args.output}, {size:,} bytes")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--refl", default="runs/refl-tiny", metavar="RUN", help="default: runs/refl-tiny")
    add("--imagerefl", default="runs/imagerefl-tiny", metavar="RUN", help="default: runs/imagerefl-tiny")
    add("--limit", type=cli.positive, metavar="N", help="use only the first N of the tiny base's 16 prompts")
    add("--cache", default="runs/play", help="folder of sampled images and scores (default: runs/play)")
    add("--output", default=str(ROOT / "docs" / "play.html"), help="default: docs/play.html")
    return parser.parse(argv)


if __name__ == "__main__":
    cli.run(main, parse_args())
