"""The report of evaluate.py: a Markdown table, CSV, and an HTML page with the table, curves and images.

    python -m report.page FOLDER

rewrites FOLDER/report.html from FOLDER/results.json and the images beside it: the paper's Table 1, its trade-off curves
(Figures 5, 9, 10, 12-15), and images with a slider over the switch step (Figure 4). The page is a single file that
loads nothing; its template is `report/template.html`.
"""

import base64
import io
import json
import math
import os
import re
from collections.abc import Callable
from csv import writer
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from report.curves import (
    checkpoint_names,
    column,
    curves,
    families,
    family,
    full_label,
    number,
    schedule,
    stat,
    text,
)
from utils import cli

ARROWS = {"higher": "↑", "lower": "↓"}
SIDE, SEEDS, PAGE = 192, 2, 6  # image grid: largest side in pixels, seeds per cell, prompts shown at a time
PROMPTS, BYTES = 24, 8_000_000  # limits of the image grid: number of prompts, and bytes of the page
BOLD = "Bold: better than every other row by more than the standard error of the difference."


def read(folder: Path) -> dict:
    """FOLDER/results.json. Raises ValueError or OSError when it is missing or not as evaluate.py writes it."""
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; give the output folder of evaluate.py")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for key in ("base", "steps", "guidance", "images_per_prompt", "seed", "prompts", "columns", "notes", "axes"):
            results[key]
        for key in ("label", "row", "checkpoint", "method", "kind", "value", "folder", "values"):
            [point[key] for point in results["points"]]
        keys = [c["key"] for c in results["columns"] if c["title"] and c["digits"] >= 0 and ARROWS[c["better"]]]
        unknown = {results["axes"]["diversity"], *results["axes"]["quality"]} - {*keys, None}
        first, _ = results["points"][0], results["prompts"][0]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: not as evaluate.py writes it ({error!r}); run evaluate.py again") from None
    if unknown or first["checkpoint"] is not None:
        what = f"no column for the axes {', '.join(sorted(unknown))}" if unknown else "the base is not the first point"
        raise ValueError(f"{path}: {what}; run evaluate.py again")
    return results


def best_row(rows: list[dict], c: dict) -> dict | None:
    """The tuned row that is better in a column than every other row, the base's included, beyond the error.

    That is, by more than the standard error of the difference of two independent means. (All rows share prompts and
    seeds, which makes the true error smaller.) None without such a row, without two tuned rows to compare, or where an
    error is unknown.
    """
    sign = 1 if c["better"] == "higher" else -1
    known = [(p, *stat(p, c["key"])) for p in rows if stat(p, c["key"])[0] is not None]
    if sum(p["checkpoint"] is not None for p, _, _ in known) < 2:
        return None
    best, mean, error = max(known, key=lambda row: sign * row[1])
    for other, mean_other, error_other in known:
        if other is best:
            continue
        if error is None or error_other is None or sign * (mean - mean_other) <= math.hypot(error, error_other):
            return None
    return best if best["checkpoint"] else None


def table(results: dict) -> list[tuple[str, str, list[tuple[str, str, bool]]]]:
    """Rows of the table: model, schedule, and for each column: mean, error ('' if unknown), whether it is bold."""
    rows, lines = [p for p in results["points"] if p["row"]], []
    labels = [p["label"] for p in rows]
    rows.sort(key=lambda p: labels.index(p["label"]))  # training runs of one method together
    best = {c["key"]: best_row(rows, c) for c in results["columns"]}
    for p in rows:
        cells = []
        for c in results["columns"]:
            mean, error = stat(p, c["key"])
            error = "" if error is None else number(error, c["digits"])
            cells.append((number(mean, c["digits"]), error, p is best[c["key"]]))
        lines.append((full_label(results, p), schedule(results, p), cells))
    return lines


def notes(results: dict) -> list[str]:
    """The notes under the table: what bold type means, if there is any, and those of the evaluation."""
    bold = any(best for _, _, cells in table(results) for _, _, best in cells)
    return [BOLD] * bold + results["notes"]


def markdown(results: dict) -> str:
    """The table in Markdown: mean ± standard error, the best values bold (see `best_row`); the notes under it."""
    lines = [["Model", "Base + tuned steps", *(f"{c['title']} {ARROWS[c['better']]}" for c in results["columns"])]]
    lines.append(["---", "---", *["---:"] * len(results["columns"])])
    for name, steps, cells in table(results):
        values = [(f"{mean} ± {error}" if error else mean, best) for mean, error, best in cells]
        lines.append([name, steps, *(f"**{value}**" if best else value for value, best in values)])
    rows = [" | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) for line in lines]
    return "".join(f"| {row} |\n" for row in rows) + "".join(f"\n{note}\n" for note in notes(results))


def csv(results: dict) -> str:
    """All points, one per line: what the point is, then mean and standard error of each column, empty if unknown."""
    fields, keys, out = ("label", "row", "checkpoint", "method", "kind", "value"), results["columns"], io.StringIO()
    lines = writer(out, lineterminator="\n")
    lines.writerow([*fields, *(name for c in keys for name in (c["key"], f"{c['key']}_error"))])
    for point in results["points"]:
        lines.writerow([*(point[key] for key in fields), *(value for c in keys for value in stat(point, c["key"]))])
    return out.getvalue()


@dataclass
class Column:
    """A column of the image grid.

    A state of the page is "RUN.STOP": the chosen training run, and the slider's stop, "table" for the table's rows.
    """

    title: str
    moves: bool  # whether the slider changes its point: combined generation
    when: dict[int, list[str]]  # point -> the states in which it is shown

    def each(self, show: Callable[[int, str], str]) -> str:
        """`show(point, attribute)` for every point; if there are several, the attribute lists the point's states."""
        return "".join(show(i, f' data-at="{" ".join(at)}"' * (len(self.when) > 1)) for i, at in self.when.items())


def grid_columns(results: dict) -> tuple[list[str], list[Column]]:
    """The slider's stops (the values of a sweep that all moving columns share), and a column per label of the table."""
    points, checkpoints = results["points"], families(results)
    rows: dict[tuple, dict] = {}  # (label, family) -> checkpoint -> point
    for i, p in enumerate(points):
        if p["row"]:
            rows.setdefault((p["label"], family(p)), {}).setdefault(p["checkpoint"], i)

    def moves(row: dict) -> bool:
        p = points[next(iter(row.values()))]
        return p["kind"] == "switch" and 0 < p["value"] < results["steps"]

    at = {(p["checkpoint"], p["value"]): i for i, p in enumerate(points) if p["kind"] == "switch"}
    sets = [
        {v for c, v in at if c == mine} for (_, name), row in rows.items() if moves(row) for mine in checkpoints[name]
    ]
    stops = sorted(set.intersection(*sets)) if sets else []
    if not any(p["kind"] == "switch" and not p["row"] and p["value"] in stops for p in points):
        stops = []
    columns = []
    for (label, name), row in rows.items():
        c = Column(label, moves(row), {})
        for k in range(max(map(len, checkpoints.values()), default=1)):
            mine = checkpoints.get(name, [None])
            mine = mine[min(k, len(mine) - 1)]
            c.when.setdefault(row.get(mine, next(iter(row.values()))), []).append(f"{k}.table")
            for stop in stops:
                i = at[mine, stop] if c.moves else row.get(mine, next(iter(row.values())))
                c.when.setdefault(i, []).append(f"{k}.{stop:g}")
        columns.append(c)
    return [f"{stop:g}" for stop in stops], columns


def data_uri(path: Path) -> str:
    """An image file as a data URI, its longer side at most SIDE pixels. Raises OSError for a missing file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image; run evaluate.py again to sample it")
    image, out = Image.open(path).convert("RGB"), io.BytesIO()
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(out, "webp", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def grid(results: dict, columns: list[Column], folder: Path) -> tuple[str, str]:
    """Rows of images for prompts spread evenly over the list, within PROMPTS and BYTES; and a line that says which."""
    points, prompts = results["points"], results["prompts"]
    seeds = [results["seed"] + k for k in range(min(SEEDS, results["images_per_prompt"]))]

    def cell(p: int, title: str, i: int, at: str) -> str:
        alt = text(f"{prompts[p]}: {title}, {schedule(results, points[i])}")
        files = [(seed, folder / points[i]["folder"] / f"{p:05d}-{seed}.png") for seed in seeds]
        return "".join(f'<img{at} alt="{alt}, seed {seed}" src="{data_uri(path)}">' for seed, path in files)

    def row(n: int, p: int) -> str:
        cells = "".join(f"<td>{c.each(lambda i, at, c=c: cell(p, c.title, i, at))}</td>" for c in columns)
        prompt = text(prompts[p])
        head = f'<th scope="row"><span title="{prompt}">{prompt}</span></th>'
        return f'<tr data-page="{n // PAGE}">{head}{cells}</tr>\n'

    count = min(PROMPTS, len(prompts), max(1, BYTES // len(row(0, 0))))
    rows = "".join(row(n, n * len(prompts) // count) for n in range(count))
    which = f"all {count}" if count == len(prompts) else f"{count} of {len(prompts)}"
    return rows, f"{which} prompts, seed{'s' * (len(seeds) > 1)} {' and '.join(map(str, seeds))}"


def summary(results: dict) -> str:
    """In sentences: what was sampled, and the quality and diversity of each row, averaged over training runs."""
    steps, tuned = results["steps"], [p for p in results["points"] if p["row"] and p["checkpoint"]]
    labels = list(dict.fromkeys(p["label"] for p in tuned))
    quality, diversity = column(results, results["axes"]["quality"][0]), results["axes"]["diversity"]

    def mean(label: str, key: str) -> float | None:
        means = [mean for mean, _ in (stat(p, key) for p in tuned if p["label"] == label) if mean is not None]
        return sum(means) / len(means) if means else None

    first, prompts, seeds = steps // 4, len(results["prompts"]), results["images_per_prompt"]
    sentences = (
        f"Each model samples the same {prompts} prompts from the same {seeds} seeds in {steps} steps; the base model, "
        f"“{results['base']}”, has guidance {results['guidance']:g}. “{first} + {steps - first}” stands for combined "
        f"generation: the base model takes the first {first} steps, the tuned one the other {steps - first}."
    )
    base, most = (stat(results["points"][0], key)[0] for key in (quality["key"], diversity))
    values = [f"{number(mean(label, quality['key']), quality['digits'])} for {label}" for label in labels]
    shares = [(label, mean(label, diversity)) for label in labels if most]  # none where it is not measured
    kept = [f"{label} {100 * share / most:.0f}\u00a0%" for label, share in shares if share is not None]
    if values:
        sentences += f" {quality['title']} is {number(base, quality['digits'])} for the base, {', '.join(values)}."
    if kept:
        sentences += f" Share of the base’s diversity: {', '.join(kept)}."
    return sentences


def write(results: dict, folder: Path) -> Path:
    """Write report.html into `folder`, which holds the points' folders. Raises OSError for a missing image."""
    points, checkpoints = results["points"], families(results)
    stops, columns = grid_columns(results)
    rows, count = grid(results, columns, folder)
    axes = [column(results, key) for key in (results["axes"]["quality"][0], results["axes"]["diversity"]) if key]
    drawn = results["axes"]["quality"] if results["axes"]["diversity"] else []  # no curves without a diversity

    def slider_values(i: int, at: str, c: Column) -> str:
        values = "".join(f"<td>{number(stat(points[i], axis['key'])[0], axis['digits'])}</td>" for axis in axes)
        return f'<tr{at}><th scope="row">{text(c.title)}</th><td>{schedule(results, points[i])}</td>{values}</tr>'

    def value(mean: str, error: str, best: bool) -> str:
        return f'<td class="mean{" best" * best}">{mean}</td><td class="error">{error and f"±&nbsp;{error}"}</td>'

    runs = ["1"]
    if checkpoints:
        most = max(map(len, checkpoints.values()))
        names = checkpoint_names(results)
        runs = [", ".join(names[c[min(k, len(c) - 1)]] for c in checkpoints.values()) for k in range(most)]
    highlighted: dict[str, list[int]] = {}
    for c in columns:
        for i, at in c.when.items() if c.moves else ():
            for state in at:
                highlighted.setdefault(state, []).append(i)
    parts = {
        "title": text(f"Quality and diversity: {results['base']}"),
        "intro": text(summary(results)),
        "head": "".join(
            f'<th scope="col" colspan="2">{text(c["title"])}&nbsp;{ARROWS[c["better"]]}</th>'
            for c in results["columns"]
        ),
        "body": "".join(
            f'<tr><th scope="row">{text(name)}</th><td class="mix">{steps}</td>'
            f"{''.join(value(*cell) for cell in cells)}</tr>\n"
            for name, steps, cells in table(results)
        ),
        "notes": "".join(f"<p>{text(note)}</p>" for note in notes(results)),
        "no_curves": "hidden" * (not drawn),
        "no_runs": "hidden" * (len(runs) < 2),
        "no_slider": "hidden" * (not stops),
        "no_bar": "hidden" * (len(runs) < 2 and not stops),
        "runs": "".join(f'<option value="{k}">{text(name)}</option>' for k, name in enumerate(runs)),
        "last": str(len(stops)),
        "ticks": "".join(f"<span>{stop}</span>" for stop in ["table", *stops]),
        "axes": "".join(f'<th scope="col">{text(axis["title"])}</th>' for axis in axes),
        "slider_values": "".join(c.each(lambda i, at, c=c: slider_values(i, at, c)) for c in columns if c.moves),
        "curves": "".join(f"<figure>{curves(results, key)}</figure>" for key in drawn),
        "heads": "".join(
            f'<th scope="col">{text(c.title)} '
            f"{c.each(lambda i, at: f'<small{at}>{schedule(results, points[i])}</small>')}</th>"
            for c in columns
        ),
        "columns": str(len(columns)),
        "grid": rows,
        "count": count,
        "highlighted": json.dumps(highlighted),
        "stops": json.dumps(["table", *stops]),
    }
    template = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    path = folder / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], template), encoding="utf-8")
    os.replace(temporary, path)
    return path


def main(args) -> None:
    print(f"written: {write(read(Path(args.folder)), Path(args.folder))}")


if __name__ == "__main__":
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", help="the output folder of evaluate.py: results.json and the images")
    cli.run(main, parser.parse())
