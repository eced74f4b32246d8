"""The paper's figures, drawn from runs and evaluations.

    python -m report.figures runs/refl-tiny runs/imagerefl-tiny evaluation --output-dir figures

For each run (a folder of train.py): figure-1-RUN.png, images along training. For all runs together: figure-2.svg, what
--monitor measured over the updates. For each evaluation (an output folder of evaluate.py): figure-4-NAME.png, a strip
over T'; figure-5-NAME-QUALITY-AXIS.svg, quality against diversity, FID and LogCovDist (Figures 5, 9, 10, 12-15);
figure-7-NAME.svg, quality over the switch step. Figure 6 is docs/training.svg. A figure for which a folder has
nothing is left out, and the command says what would be needed.
"""

import json
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from PIL import Image

from report import page
from report.curves import METHODS, column, curves, families, stat
from report.panels import Panel, draw
from utils import cli, disk
from utils.images import cells, grid, save_png

FONT, CELL = 26, 128  # of the pictures, which are about 1200 pixels wide: half of it where they are seen at 600
STAGES, COLUMNS = 4, 8  # rows and columns of Figure 1
MONITORED = {  # key of log.jsonl -> title and better direction; others are held-out rewards
    "monitor_reward": ("Reward, trained on", "higher"),
    "monitor_diversity": ("Diversity", "higher"),
    "monitor_fid": ("FID", "lower"),
    "monitor_logcovdist": ("LogCovDist", "lower"),
}


class NothingToDraw(ValueError):
    """A run or an evaluation was made without what a figure shows."""


def short(prompt: str, width: int = 22) -> str:
    return textwrap.shorten(prompt, width, placeholder="…")


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly spread, with the last."""
    if len(items) <= count:
        return items
    return [items[round((k + 1) * len(items) / count) - 1] for k in range(count)]


def read_log(run: Path) -> tuple[dict, list[dict]]:
    """`run.json` and the lines of `log.jsonl`. Raises ValueError or OSError for a folder without them."""
    try:
        about = json.loads((run / "run.json").read_text(encoding="utf-8"))
        log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{run}: run.json or log.jsonl is damaged ({error})") from None
    return about, log


def along_training(run: Path) -> Image.Image:
    """Figure 1: a row of images for the base model and for stages of training, two seeds (columns) of each prompt.

    Raises NothingToDraw where the run has no grids.
    """
    paths = sorted((run / "samples").glob("step-*.png"))
    if len(paths) < 2:
        raise NothingToDraw(f"{run}: too few sample grids; train with --sample-every N")
    rows, labels = [], []
    for path in [paths[0], *spread(paths[1:], STAGES - 1)]:
        sheet = cells(Image.open(path).convert("RGB"))
        half = len(sheet[0]) // 2  # the base model's images, then as many of the tuned one
        kept = [row[:half] if path == paths[0] else row[half:] for row in sheet[: COLUMNS // half]]
        rows.append([image for row in kept for image in row])
        labels.append("Base" if path == paths[0] else f"Update {int(path.stem.split('-')[1])}")
    prompts = Image.open(paths[0]).info.get("parameters", "").splitlines()[: COLUMNS // half]
    heads = [head for prompt in prompts for head in [short(prompt), *["other seed"] * (half - 1)]]
    return grid(rows, labels, heads, CELL, FONT)


def over_training(runs: list[Path]) -> str:
    """Figure 2: what `--monitor` measured over the updates. Raises NothingToDraw without any.

    A line per run, named after its method, or after its folder where several runs have the same method.
    """
    lines: dict[str, dict[str, list]] = {}  # key -> run -> points
    found = {run: read_log(run) for run in runs}
    methods = {run: about.get("args", {}).get("method") for run, (about, _) in found.items()}
    for run, (about, log) in found.items():
        alone = list(methods.values()).count(methods[run]) == 1
        name = METHODS.get(methods[run], run.name) if alone else run.name
        for key in dict.fromkeys(key for row in log for key in row if key.startswith("monitor_")):
            first = about.get("monitor", {}).get(key.removeprefix("monitor_"))
            points = [(0, mean(first), None)] if first else []
            points += [(row["update"], row[key], None) for row in log if key in row]
            if len(points) > 1:
                lines.setdefault(key, {})[name] = points
    titles = {key: (f"Reward {key.removeprefix('monitor_')}, held out", "higher") for key in lines} | MONITORED
    panels = [Panel(*titles[key], own) for key, own in lines.items()]
    if not panels:
        raise NothingToDraw(f"{', '.join(map(str, runs))}: nothing was monitored; train with --monitor N")
    return draw(panels, "update", "Reward, diversity and distances over training")


def switch_points(results: dict, checkpoint: str) -> dict[float, dict]:
    """The points of combined generation of a checkpoint, by base steps; the base model takes all of them."""
    own = [p for p in results["points"] if p["kind"] == "switch" and p["checkpoint"] == checkpoint]
    return {p["value"]: p for p in own} | {float(results["steps"]): results["points"][0]}


def over_switch(results: dict) -> str:
    """Figure 7: each reward over the step at which the tuned model takes over, ReFL and ImageReFL.

    The error is that over training runs where there are several, else that over prompts. Raises NothingToDraw
    without a sweep.
    """
    panels = []
    for key in results["axes"]["quality"]:
        lines = {}
        for name, checkpoints in families(results).items():
            curves_of = [switch_points(results, checkpoint) for checkpoint in checkpoints]
            shared = sorted(set.intersection(*(set(curve) for curve in curves_of)))
            rows = []
            for value in shared:
                means = [stat(curve[value], key) for curve in curves_of]
                known = [m for m, _ in means if m is not None]
                error = stdev(known) / len(known) ** 0.5 if len(known) > 1 else means[0][1]
                rows += [(value, mean(known), error)] if known else []
            lines[METHODS.get(name, name)] = rows
        c = column(results, key)
        panels.append(Panel(c["title"], c["better"], lines))
    if not any(len(line) > 2 for panel in panels for line in panel.lines.values()):
        raise NothingToDraw("no sweep over the switch step; evaluate with --sweep switch=5,10,20,30,35")
    return draw(panels, f"first steps by the base model, of {results['steps']}", "Quality over the switch step")


def over_T_prime(results: dict, folder: Path) -> Image.Image:
    """Figure 4: one image per T', from the tuned model alone to the base model; a row per model and prompt.

    Raises NothingToDraw without a tuned model, and OSError for a missing image.
    """
    first = {name: checkpoints[0] for name, checkpoints in families(results).items()}
    found = {name: switch_points(results, checkpoint) for name, checkpoint in first.items()}
    if not found:
        raise NothingToDraw(f"{folder}: no tuned model was evaluated; give evaluate.py --checkpoint")
    shared = sorted(set.intersection(*(set(points) for points in found.values())))
    prompts = spread(list(range(len(results["prompts"]))), 2)
    rows, labels = [], []
    for p in prompts:
        for name, points in found.items():
            paths = [folder / points[n]["folder"] / f"{p:05d}-{results['seed']}.png" for n in shared]
            rows.append([Image.open(path).convert("RGB") for path in paths])
            labels.append(f"{METHODS.get(name, name)}: {short(results['prompts'][p])}")
    ends = {0.0: ", tuned", float(results["steps"]): ", base"}
    return grid(rows, labels, [f"T' = {results['steps'] - n:g}{ends.get(n, '')}" for n in shared], CELL, FONT)


def figures_of_run(run: Path) -> dict[str, Callable]:
    """File name -> what draws it: Figure 1."""
    return {f"figure-1-{run.name}.png": lambda: along_training(run)}


def figures_of_evaluation(folder: Path) -> dict[str, Callable]:
    """File name -> what draws it: Figures 4, 5 and 7. Raises ValueError or OSError for a folder without results."""
    results, name = page.read(folder), folder.name
    known = {c["key"] for c in results["columns"]}
    axes = [key for key in (results["axes"]["diversity"], "fid", "logcovdist") if key in known]
    found: dict[str, Callable] = {f"figure-4-{name}.png": lambda: over_T_prime(results, folder)}
    for quality in results["axes"]["quality"]:
        for axis in axes:
            found[f"figure-5-{name}-{quality}-{axis}.svg"] = partial(curves, results, quality, axis)
    return found | {f"figure-7-{name}.svg": lambda: over_switch(results)}


def main(args) -> None:
    """Raises ValueError or OSError for folders that are neither a run nor an evaluation, or have nothing to draw."""
    folders, output = [Path(folder) for folder in args.folders], Path(args.output_dir)
    cli.check_writable(output)
    runs = [folder for folder in folders if (folder / "log.jsonl").is_file()]
    found = {"figure-2.svg": lambda: over_training(runs)} if runs else {}
    for folder in folders:
        found |= figures_of_run(folder) if folder in runs else figures_of_evaluation(folder)
    written, left_out = [], {}
    for name, draw_it in sorted(found.items()):
        try:
            picture = draw_it()
        except NothingToDraw as reason:
            left_out[name] = reason
            continue
        written.append(output / name)
        if isinstance(picture, str):
            disk.write_text(written[-1], picture)
        else:
            save_png(picture, written[-1])
    if not written:
        raise next(iter(left_out.values()))
    for path in written:
        print(f"written:  {path}")
    for name, reason in left_out.items():
        print(f"left out: {name}, {reason}")


if __name__ == "__main__":
    parser = cli.Parser(__doc__)
    parser.add_argument("folders", nargs="+", help="folders of train.py or output folders of evaluate.py")
    parser.add_argument("--output-dir", default="figures", help="default: figures")
    cli.run(main, parser.parse())
