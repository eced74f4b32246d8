"""The report: what evaluate.py measured, as a Markdown table, CSV, SVG curves, and one page to look at.

    python report.py FOLDER

rewrites FOLDER/report.html from FOLDER/results.json and the images beside it: the paper's Table 1, Figures 5, 7, 9, and
grids with a slider over the switch. The page is one file that loads nothing; its frame is `report_template.html`.
"""

import base64
import io
import json
import math
import os
import re
from csv import writer
from html import escape
from pathlib import Path

from PIL import Image

from cli import Parser, run

METHODS = {"refl": "ReFL", "imagerefl": "ImageReFL"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9")  # Okabe, Ito: for all kinds of sight
ARROWS = {"higher": "↑", "lower": "↓"}
SIDE, SEEDS, PROMPTS, PAGE, BYTES = (
    192,
    2,
    24,
    6,
    8_000_000,
)  # of the grid: pixels, seeds a cell, prompts, bytes at most


def read(folder: Path) -> dict:
    """FOLDER/results.json. Raises ValueError or OSError when it is not there or not what evaluate.py writes."""
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; give the output folder of evaluate.py")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for key in ("base", "steps", "guidance", "images_per_prompt", "seed", "prompts", "columns", "notes", "axes"):
            results[key]
        for key in ("label", "row", "checkpoint", "method", "kind", "value", "folder", "values"):
            [point[key] for point in results["points"]]
        titles = {column["key"] for column in results["columns"]}
        unknown = {results["axes"]["diversity"], *results["axes"]["quality"]} - titles
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not as evaluate.py writes it ({error}); run evaluate.py again") from None
    if unknown or not results["points"] or results["points"][0]["checkpoint"] is not None:
        what = f"axes without a column: {', '.join(sorted(unknown))}" if unknown else "the base model is not first"
        raise ValueError(f"{path}: {what}; run evaluate.py again")
    return results


def text(value: object) -> str:
    """Escaped for HTML and XML; what XML cannot hold becomes U+FFFD."""
    return escape(re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value)))


def stat(point: dict, key: str) -> tuple[float | None, float | None]:
    """Mean and standard error of one point; None for what is missing or not finite."""
    pair = point["values"].get(key) or (None, None)
    mean, error = (None if v is None or not math.isfinite(v) else v for v in pair)
    return mean, error


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def column(results: dict, key: str) -> dict:
    return next(c for c in results["columns"] if c["key"] == key)


def mixture(results: dict, point: dict) -> str:
    """Steps of the base model + steps of the tuned one, or the power of AIG."""
    if point["kind"] == "aig":
        return f"power {point['value']:g}"
    return f"{point['value']:g} + {results['steps'] - point['value']:g}"


def family(point: dict) -> str:
    """Training runs of one method are a family: one colour, one column. A model of unknown method is its own."""
    return point["method"] or point["checkpoint"]


def runs(results: dict) -> dict[str, list[str]]:
    """The checkpoints of each family, in order."""
    found: dict[str, dict[str, None]] = {}
    for point in results["points"][1:]:
        found.setdefault(family(point), {})[point["checkpoint"]] = None
    return {name: list(checkpoints) for name, checkpoints in found.items()}


def table(results: dict) -> list[tuple[str, str, list[tuple[str, str, bool]]]]:
    """Rows of the table: model, mixture, and for each column mean, error ('' if unknown), best of the tuned."""
    rows = [point for point in results["points"] if point["row"]]
    labels, best = [point["label"] for point in rows], {}
    for c in results["columns"]:
        means = [stat(p, c["key"])[0] for p in rows if p["checkpoint"] is not None]
        means = [mean for mean in means if mean is not None]
        best[c["key"]] = (max if c["better"] == "higher" else min)(means, default=None)
    lines = []
    for point in rows:
        name, tuned, cells = point["label"], point["checkpoint"] is not None, []
        if tuned and labels.count(name) > 1:
            name += f" ({Path(point['checkpoint']).name})"
        for c in results["columns"]:
            mean, error = stat(point, c["key"])
            wins = tuned and mean is not None and mean == best[c["key"]]
            cells.append((number(mean, c["digits"]), "" if error is None else number(error, c["digits"]), wins))
        lines.append((name, mixture(results, point), cells))
    return lines


def markdown(results: dict) -> str:
    """The table's rows, mean ± standard error; bold is the best of the tuned models."""
    lines = [["Model", "Mixture", *(f"{c['title']} {ARROWS[c['better']]}" for c in results["columns"])]]
    for name, mixed, cells in table(results):
        shown = [f"{mean} ± {error}" if error else mean for mean, error, _ in cells]
        lines.append([name, mixed, *(f"**{s}**" if cell[2] else s for s, cell in zip(shown, cells, strict=True))])
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    lines.insert(1, ["---", "---", *["---:"] * len(results["columns"])])
    notes = "".join(f"\n{note}  " for note in results["notes"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" + (notes.rstrip() + "\n" if notes else "")


def csv(results: dict) -> str:
    """All points, one a line: what it is, then a mean and a standard error for each column, empty if unknown."""
    about, keys, out = ("label", "row", "checkpoint", "method", "kind", "value"), results["columns"], io.StringIO()
    lines = writer(out, lineterminator="\n")
    lines.writerow([*about, *(name for c in keys for name in (c["key"], c["key"] + "_error"))])
    for point in results["points"]:
        lines.writerow([*(point[k] for k in about), *(v for c in keys for v in stat(point, c["key"]))])
    return out.getvalue()


def scale(values: list[float], start: float, end: float):
    """A linear map of the values' range, with a margin, to start..end; and round ticks in it, as (value, text)."""
    low, high = min(values), max(values)
    margin = 0.07 * (high - low) or abs(high) / 10 or 1.0
    low, high = low - margin, high + margin
    unit = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit * 4.5 >= high - low)
    digits = max(0, -math.floor(math.log10(step * 1.001)))
    ticks = [(k * step, number(k * step, digits)) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda v: start + (v - low) / (high - low) * (end - start), ticks


def marker(x: float, y: float, r: float, corners: int, more: str = "") -> str:
    """A circle (0 corners), a triangle (3), a square (4), a diamond (-4), or a star (10)."""
    if corners == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"{more}/>'
    n, turn = abs(corners), math.pi / 4 * (corners == 4)
    radii = [r * (0.45 if corners == 10 and k % 2 else 1.25 if n < 10 else 1) for k in range(n)]
    angles = [2 * math.pi * k / n + turn - math.pi / 2 for k in range(n)]
    at = [f"{x + q * math.cos(a):.1f},{y + q * math.sin(a):.1f}" for q, a in zip(radii, angles, strict=True)]
    return f'<polygon points="{" ".join(at)}"{more}/>'


def clash(box: tuple, boxes: list[tuple], inside: tuple, spots: list[tuple[float, float]]) -> float:
    """How badly a label (left, top, right, bottom) sits: outside, on labels or markers, or on lines (as spots)."""
    left, top, right, bottom = box
    out = left < inside[0] or top < inside[1] or right > inside[2] or bottom > inside[3]
    on = sum(left < b[2] and b[0] < right and top < b[3] and b[1] < bottom for b in boxes)
    return 1000 * out + 100 * on + sum(left < x < right and top < y < bottom for x, y in spots)


def curves(results: dict, quality: str) -> str:
    """An SVG of `quality` against diversity: a line for each checkpoint and kind, errors, the base as a star."""
    W, H, left, right, bottom = 640, 470, 62, 14, 52
    x_key, points = results["axes"]["diversity"], results["points"]
    shown = [(i, p) for i, p in enumerate(points) if None not in (stat(p, x_key)[0], stat(p, quality)[0])]
    if not shown:
        raise ValueError(f"no point has both {quality} and {x_key}: nothing to draw")
    groups: dict[tuple, list] = {}  # (family, kind) -> its points, a colour each; (.., checkpoint) -> a line each
    for i, p in shown:
        if p["checkpoint"] is not None:
            groups.setdefault((family(p), p["kind"]), []).append((i, p))
    style = {group: (n % len(COLOURS), (0, 4, 3, -4)[n % 4]) for n, group in enumerate(groups)}

    legend, at, top = [], left, 20
    for group in [None, *groups]:
        kind, colour, corners = group and group[1], *style.get(group, (None, 10))
        name = f"{METHODS.get(group[0], Path(group[0]).name)}{' AIG' * (kind == 'aig')}" if group else "Base"
        name += {"switch": ", switch", "aig": ", power"}.get(kind, "")
        if at > left and at + 20 + 6.9 * len(name) > W - right:
            at, top = left, top + 19
        paint = f' class="k{colour}" color="{COLOURS[colour]}"' if group else ' color="#111"'
        sign = marker(at + 6, top - 4, 4.5 if group else 7, corners)
        legend.append(f'<g{paint} fill="currentColor">{sign}</g>')
        legend.append(f'<text x="{at + 17}" y="{top}">{text(name)}</text>')
        at += 36 + 6.9 * len(name)
    top += 14

    def ends(key):
        return [m + s * (e or 0) for _, p in shown for m, e in [stat(p, key)] for s in (-1, 1)]

    X, x_ticks = scale(ends(x_key), left, W - right)
    Y, y_ticks = scale(ends(quality), H - bottom, top)
    place = {i: (X(stat(p, x_key)[0]), Y(stat(p, quality)[0])) for i, p in shown}
    frame = [f'<line x1="{X(v):.1f}" x2="{X(v):.1f}" y1="{top}" y2="{H - bottom}"/>' for v, _ in x_ticks]
    frame += [f'<line x1="{left}" x2="{W - right}" y1="{Y(v):.1f}" y2="{Y(v):.1f}"/>' for v, _ in y_ticks]
    names = [f'<text x="{X(v):.1f}" y="{H - bottom + 17}" text-anchor="middle">{t}</text>' for v, t in x_ticks]
    names += [f'<text x="{left - 7}" y="{Y(v) + 4:.1f}" text-anchor="end">{t}</text>' for v, t in y_ticks]
    x_name, y_name = (
        text(c["title"] + (" (better →)" if c["better"] == "higher" else " (← better)"))
        for c in (column(results, x_key), column(results, quality))
    )
    names.append(f'<text x="{(left + W - right) / 2}" y="{H - 12}" text-anchor="middle" class="t">{x_name}</text>')
    turn = f'transform="translate(16,{(top + H - bottom) / 2}) rotate(-90)"'
    names.append(f'<text {turn} text-anchor="middle" class="t">{y_name}</text>')

    lines, marks, spots, many = [], {}, [], any(len(c) > 1 for c in runs(results).values())
    for group, members in groups.items():
        colour, corners = style[group]
        paint = f'class="k{colour}" color="{COLOURS[colour]}"'
        for checkpoint in dict.fromkeys(p["checkpoint"] for _, p in members):
            line = sorted((p["value"], *place[i]) for i, p in members if p["checkpoint"] == checkpoint)
            if group[1] == "switch" and line[-1][0] < results["steps"] and 0 in place:
                line.append((results["steps"], *place[0]))  # all steps to the base: the base model
            path = " ".join(f"{x:.1f},{y:.1f}" for _, x, y in line)
            lines.append(f'<polyline {paint} points="{path}" stroke-width="{1 if many else 2}"/>')
            for (_, x, y), (_, x2, y2) in zip(line, line[1:], strict=False):
                n = max(2, round(math.hypot(x2 - x, y2 - y) / 3))
                spots += [(x + (x2 - x) * k / n, y + (y2 - y) * k / n) for k in range(n)]
        for i, p in members:
            marks[i] = (paint, corners, 6 if p["row"] else 3 if many else 4)
    marks = {0: ('color="#111" class="base"', 10, 11)} | marks if 0 in place else marks

    dots = []
    for i, p in sorted(shown, key=lambda ip: ip[1]["row"]):
        (x, y), (paint, corners, r) = place[i], marks[i]
        said = f"{p['label']}, {mixture(results, p)}"
        bars = []
        for key, to, bar in ((x_key, X, 'y1="{1:.1f}" y2="{1:.1f}" x1'), (quality, Y, 'x1="{0:.1f}" x2="{0:.1f}" y1')):
            mean, error = stat(p, key)
            c = column(results, key)
            said += f"\n{c['title']} {number(mean, c['digits'])}" + (
                f" ± {number(error, c['digits'])}" if error else ""
            )
            if error:
                one, two = to(mean - error), to(mean + error)
                bars.append(f'<line {bar.format(x, y)}="{one:.1f}" {bar[-2]}2="{two:.1f}"/>')
        more = ' fill="currentColor"' + (' stroke="#fff" class="row"' if p["row"] else "")
        dots.append(
            f'<g data-point="{i}" {paint}><title>{text(said)}</title><circle class="halo" cx="{x:.1f}" cy="{y:.1f}" r="11"'
            f' opacity="0" fill="none" stroke="currentColor" stroke-width="2" pointer-events="all"/>'
            f'<g stroke="currentColor" opacity=".45">{"".join(bars)}</g>{marker(x, y, r, corners, more)}</g>'
        )

    boxes = [(x - marks[i][2], y - marks[i][2], x + marks[i][2], y + marks[i][2]) for i, (x, y) in place.items()]
    first = {checkpoints[0] for checkpoints in runs(results).values()} | {None}
    wanted = [(i, p["label"], 13) for i, p in shown if p["row"] and p["checkpoint"] in first]
    wanted += [
        (i, f"{'p ' * (p['kind'] == 'aig')}{p['value']:g}", 11) for i, p in shown[1:] if p["checkpoint"] in first
    ]
    labels = []
    for i, said, size in wanted:  # rows are named wherever it is least bad, values only where there is room
        (x, y), (paint, _, r), w, places = place[i], marks[i], 0.6 * size * len(said) + 2, []
        for d in (r + 3, r + 10, r + 20, r + 32) if size == 13 else (r + 3,):
            for sx, sy in ((1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1), (1, 0), (-1, 0)):
                k = d * (0.75 if sx and sy else 1)
                cx, cy = x + sx * (k + w / 2), y + sy * (k + size / 2)
                box = (cx - w / 2, cy - size / 2, cx + w / 2, cy + size / 2)
                places.append((clash(box, boxes, (left, top, W - right, H - bottom), spots) + 0.2 * d, box))
        bad, box = min(places)
        if size == 13 or bad < 4:
            boxes.append(box)
            labels.append(
                f'<text {paint} x="{(box[0] + box[2]) / 2:.1f}" y="{box[3] - 0.2 * size:.1f}" font-size="{size}" '
                f'fill="currentColor" font-weight="{600 if size == 13 else 400}">{text(said)}</text>'
            )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" width="{W}" height="{H}" role="img" '
            f"aria-label=\"{y_name} against {x_name}\" font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\" "
            f'font-size="12" fill="#333">',
            f'<rect class="ground" width="{W}" height="{H}" fill="#fff"/>',
            f'<g class="frame" stroke="#e3e3e3">{"".join(frame)}</g>',
            *legend,
            *names,
            f'<g fill="none" stroke="currentColor" stroke-linejoin="round">{"".join(lines)}</g>',
            *dots,
            f'<g class="labels" text-anchor="middle" stroke="#fff" stroke-width="3" paint-order="stroke">{"".join(labels)}</g>',
            "</svg>\n",
        ]
    )


def picture(path: Path) -> str:
    """An image as a data URI, at most SIDE pixels wide. Raises OSError that names what is missing or not an image."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image; run evaluate.py again to sample it")
    image, out = Image.open(path).convert("RGB"), io.BytesIO()
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(out, "webp", quality=85)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


def states(results: dict) -> tuple[list[float], list[tuple[str, bool, dict[int, list[str]]]]]:
    """The slider's stops, and for each column of the grid: title, whether it moves, and which point is shown when.

    A state is "RUN.STOP"; the stop "table" shows the mixtures of the table. Columns that mix by a switch move.
    """
    points, checkpoints = results["points"], runs(results)
    rows = [(i, p) for i, p in enumerate(points) if p["row"]]
    heads = {(p["label"], p["checkpoint"] and family(p)): i for i, p in reversed(rows)}
    heads = dict(reversed(heads.items()))
    moving = {
        h for h, i in heads.items() if points[i]["kind"] == "switch" and 0 < points[i]["value"] < results["steps"]
    }
    at = {(p["checkpoint"], p["value"]): i for i, p in enumerate(points) if p["kind"] == "switch"}
    swept = {p["value"] for p in points if p["kind"] == "switch" and not p["row"]}
    sets = [{v for c, v in at if c == checkpoint} for _, name in moving for checkpoint in checkpoints[name]]
    stops = sorted(set.intersection(*sets)) if sets else []
    stops = stops if swept & set(stops) else []
    columns = []
    for head, index in heads.items():
        when: dict[int, list[str]] = {}
        for run in range(max(map(len, checkpoints.values()), default=1)):
            mine = checkpoints.get(head[1], [None])
            mine = mine[min(run, len(mine) - 1)]
            row = next((i for i, p in rows if p["label"] == head[0] and p["checkpoint"] == mine), index)
            for stop in ["table", *stops]:
                i = at[mine, stop] if head in moving and stop != "table" else row
                when.setdefault(i, []).append(f"{run}.{stop}" if stop == "table" else f"{run}.{stop:g}")
        columns.append((head[0], head in moving, when))
    return stops, columns


def choice(when: dict[int, list[str]], show) -> str:
    """`show(point index, attribute)` for each point of a column; the attribute says in which states it is seen."""
    return "".join(show(i, f' data-at="{" ".join(at)}"' if len(when) > 1 else "") for i, at in when.items())


def write(results: dict, folder: Path) -> Path:
    """Write report.html into the folder that the points' folders are in. Raises OSError for a missing image."""
    points, prompts = results["points"], results["prompts"]
    stops, columns = states(results)
    seeds = [results["seed"] + k for k in range(min(SEEDS, results["images_per_prompt"]))]

    def row(n: int, p: int) -> str:
        cells = []
        for title, _, when in columns:

            def show(i, at, title=title):
                alt = text(f"{prompts[p]}: {title}, {mixture(results, points[i])}, seed ")
                return "".join(
                    f'<img{at} alt="{alt}{s}" src="{picture(folder / points[i]["folder"] / f"{p:05d}-{s}.png")}">'
                    for s in seeds
                )

            cells.append(f"<td>{choice(when, show)}</td>")
        said = text(prompts[p])
        return f'<tr data-page="{n // PAGE}"><th scope="row"><span title="{said}">{said}</span></th>{"".join(cells)}</tr>\n'

    most = min(PROMPTS, len(prompts), max(1, BYTES // len(row(0, 0))))
    grid = "".join(row(n, n * len(prompts) // most) for n in range(most))
    q, d = (column(results, key) for key in (results["axes"]["quality"][0], results["axes"]["diversity"]))

    def reading(i: int) -> str:
        said = [f"{c['title']} <b>{number(stat(points[i], c['key'])[0], c['digits'])}</b>" for c in (q, d)]
        return f"{mixture(results, points[i])}: {', '.join(said)}"

    def seen(i: int) -> str:
        (quality, _), (diversity, _), (most, _) = (
            stat(points[i], q["key"]),
            stat(points[i], d["key"]),
            stat(points[0], d["key"]),
        )
        kept = f" and {100 * diversity / most:.0f} % of its diversity" if diversity is not None and most else ""
        return f"{points[i]['label']} ({mixture(results, points[i])}) {number(quality, q['digits'])}{kept}"

    shown = [next(iter(when)) for _, _, when in columns]
    intro = (
        f"The base model “{results['base']}” and its fine-tuned versions draw the same {len(prompts)} prompts from the same "
        f"{results['images_per_prompt']} seeds, in {results['steps']} steps with guidance {results['guidance']:g}. "
        f"A mixture “10 + {results['steps'] - 10}” gives the first 10 steps to the base and the rest to the tuned model. "
        f"{q['title']}: base {number(stat(points[0], q['key'])[0], q['digits'])}; of the tuned, "
        f"{'; '.join(seen(i) for i in shown if i)}."
    )
    head = "".join(f'<th colspan="2">{text(c["title"])}&nbsp;{ARROWS[c["better"]]}</th>' for c in results["columns"])
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th><td class="mix">{text(mixed)}</td>'
        + "".join(
            f'<td class="mean{" best" * best}">{mean}</td><td class="error">{error and f"±&nbsp;{error}"}</td>'
            for mean, error, best in cells
        )
        + "</tr>\n"
        for name, mixed, cells in table(results)
    )
    heads = "".join(
        f'<th scope="col">{text(title)}<small>{choice(when, lambda i, at: f"<span{at}>{mixture(results, points[i])}</span>")}</small></th>'
        for title, _, when in columns
    )
    readings = "".join(
        f"<div><b>{text(title)}</b> {choice(when, lambda i, at: f'<span{at}>{reading(i)}</span>')}</div>"
        for title, moves, when in columns
        if moves
    )
    ticks = "".join(f"<span>{s if s == 'table' else f'{s:g}'}</span>" for s in ["table", *stops])
    slider = f'<label for="switch">Switch: steps of the base model</label><input id="switch" type="range" min="0" max="{len(stops)}" value="0"><div class="ticks" aria-hidden="true">{ticks}</div>'
    checkpoints = runs(results)
    several = max(map(len, checkpoints.values()), default=1)
    options = "".join(
        f'<option value="{k}">{k + 1}: {text(", ".join(Path(c[min(k, len(c) - 1)]).name for c in checkpoints.values()))}</option>'
        for k in range(several)
    )
    lit = {}
    for _, moves, when in columns:
        for i, at in when.items() if moves and stops else ():
            for state in at:
                lit.setdefault(state, []).append(i)
    parts = {
        "title": text(f"Quality and diversity: {results['base']}"),
        "intro": text(intro),
        "head": head,
        "body": body,
        "notes": "".join(f"<p>{text(note)}</p>" for note in results["notes"]),
        "bar": (f'<label>Training run <select id="run">{options}</select></label>' if several > 1 else "")
        + (slider if stops else "")
        + f'<output for="switch run">{readings}</output>',
        "curves": "".join(
            f'<figure tabindex="0">{curves(results, key)}</figure>' for key in results["axes"]["quality"]
        ),
        "heads": heads,
        "columns": str(len(columns)),
        "grid": grid,
        "count": f"{most} of {len(prompts)} prompts, seeds {' and '.join(map(str, seeds))} in each cell",
        "lit": json.dumps(lit),
        "stops": json.dumps(["table", *(f"{s:g}" for s in stops)]),
        "pages": str(-(-most // PAGE)),
    }
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], template)
    path = folder / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def main(args) -> None:
    folder = Path(args.folder)
    print(f"written: {write(read(folder), folder)}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("folder", help="output folder of evaluate.py, with results.json")
    run(main, parser.parse())
