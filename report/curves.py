"""Quality against diversity as an SVG: the paper's trade-off curves (Figures 5, 9, 10, 12-15). Reads results.json.

The SVG is self-contained (white background, no fonts or scripts). A page can restyle it by its classes: `ground`,
`frame`, `base`, `labels`, `row`, and `k0`, `k1`, ... for the colours; `[data-point]` is a point, `.halo` its ring.
"""

import math
import re
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

METHODS = {"refl": "ReFL", "imagerefl": "ImageReFL", "draft": "DRaFT", "drtune": "DRTune", "dpo": "DPO"}
METHODS |= {f"image-{name}": f"Image-{METHODS[name]}" for name in ("draft", "drtune", "dpo")}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9")  # colour-blind safe (Okabe and Ito)
SHAPES = (0, 4, 3, -4, 5)  # corners: circle, square, triangle, diamond, pentagon
STAR = 10
W, H, LEFT, RIGHT, BOTTOM = 640, 440, 62, 626, 388  # pixels: the image, and the plot area inside it


def text(value: object) -> str:
    """Escaped for HTML and XML; characters that XML does not allow become U+FFFD."""
    return escape(re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value)))


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def stat(point: dict, key: str) -> tuple[float | None, float | None]:
    """Mean and standard error of a column at a point; None where missing or not finite."""
    mean, error = (v if v is not None and math.isfinite(v) else None for v in point["values"].get(key) or (None, None))
    return mean, error


def column(results: dict, key: str) -> dict:
    return next(c for c in results["columns"] if c["key"] == key)


def schedule(results: dict, point: dict) -> str:
    """How the two models share the steps: "base steps + tuned steps", or AIG's lambda."""
    value = point["value"]
    return f"λ = {value:g}" if point["kind"] == "aig" else f"{value:g} + {results['steps'] - value:g}"


def family(point: dict) -> str | None:
    """Training runs of one method are a family, with one colour and one column; a model of no known method is alone."""
    return point["method"] or point["checkpoint"]


def families(results: dict) -> dict[str, list[str]]:
    """The checkpoints of each family, in order."""
    found: dict[str, list[str]] = {}
    for point in results["points"]:
        known = found.setdefault(family(point), [])
        if point["checkpoint"] not in known:
            known.append(point["checkpoint"])
    del found[None]  # the base
    return found


def checkpoint_names(results: dict) -> dict[str, str]:
    """The name by which a reader tells each checkpoint from the others: the shortest end of its path that is unique."""
    paths = {p["checkpoint"]: Path(p["checkpoint"]).parts for p in results["points"] if p["checkpoint"]}
    names = {}
    for path, parts in paths.items():
        others = [other for other in paths.values() if other != parts]
        n = next((n for n in range(1, len(parts)) if all(o[-n:] != parts[-n:] for o in others)), len(parts))
        names[path] = str(Path(*parts[-n:])) if parts else path
    return names


def full_label(results: dict, point: dict) -> str:
    """The point's label, with the checkpoint's name where the points of several checkpoints have that label."""
    same = {p["checkpoint"] for p in results["points"] if p["label"] == point["label"]}
    return f"{point['label']} ({checkpoint_names(results)[point['checkpoint']]})" if len(same) > 1 else point["label"]


def scale(values: list[float], start: float, end: float):
    """A linear map of the values' range, with a margin, to start..end; and round ticks in it, as (value, text)."""
    low, high = min(values), max(values)
    margin = 0.07 * (high - low) or abs(high) / 10 or 1.0
    low, high = low - margin, high + margin
    unit = 10 ** math.floor(math.log10((high - low) / 6))
    step = next(m * unit for m in (1, 2, 5, 10) if 6 * m * unit >= high - low)
    digits = max(0, -math.floor(math.log10(1.001 * step)))
    ticks = [(k * step, number(k * step, digits)) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda v: start + (v - low) / (high - low) * (end - start), ticks


def marker(x: float, y: float, r: float, corners: int, more: str = "") -> str:
    """A circle (0 corners), a star, a square (4) or a diamond (-4), or another polygon."""
    if corners == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"{more}/>'
    n, turn = abs(corners), -math.pi / 4 if corners == 4 else -math.pi / 2
    radii = [r * (0.45 if k % 2 else 1.0) if n == STAR else 1.25 * r for k in range(n)]
    places = [(q * math.cos(2 * math.pi * k / n + turn), q * math.sin(2 * math.pi * k / n + turn))
              for k, q in enumerate(radii)]  # fmt: skip
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in places)}"{more}/>'


def legend(style: dict, names: dict[str, str]) -> tuple[list[str], int]:
    """An entry for the base and each (family, kind), in rows from the top; and the y below the last row.

    `names`: those of the checkpoints, for families of an unknown method.
    """
    out, x, y = [], LEFT, 22
    for (name, kind), (paint, corners) in style.items():
        model = METHODS.get(name) or names.get(name, name)
        entry = {"": name, "aig": f"{model} AIG, λ", "switch": f"{model}, N base steps"}[kind]
        width = 36 + 6.9 * len(entry)
        if x > LEFT and x + width - 16 > RIGHT:
            x, y = LEFT, y + 19
        sign = marker(x + 6, y - 4, 4.5 if kind else 7, corners)
        out.append(f'<g {paint} fill="currentColor">{sign}</g><text x="{x + 17:.0f}" y="{y}">{text(entry)}</text>')
        x += width
    return out, y + 14


def frame(results: dict, keys: tuple[str, str], X, Y, x_ticks: list, y_ticks: list, top: int) -> list[str]:
    """Grid lines, tick labels, and axis titles with an arrow towards the better end."""
    lines = [f'<line x1="{X(v):.1f}" x2="{X(v):.1f}" y1="{top}" y2="{BOTTOM}"/>' for v, _ in x_ticks]
    lines += [f'<line x1="{LEFT}" x2="{RIGHT}" y1="{Y(v):.1f}" y2="{Y(v):.1f}"/>' for v, _ in y_ticks]
    texts = [f'<text x="{X(v):.1f}" y="{BOTTOM + 17}" text-anchor="middle">{t}</text>' for v, t in x_ticks]
    texts += [f'<text x="{LEFT - 7}" y="{Y(v) + 4:.1f}" text-anchor="end">{t}</text>' for v, t in y_ticks]
    places = f"translate({(LEFT + RIGHT) / 2} {BOTTOM + 41})", f"translate(17 {(top + BOTTOM) / 2}) rotate(-90)"
    for key, place in zip(keys, places, strict=True):
        c = column(results, key)
        title = f"{c['title']}, better →" if c["better"] == "higher" else f"← better, {c['title']}"
        texts.append(f'<text transform="{place}" text-anchor="middle" font-size="13">{text(title)}</text>')
    return [f'<g class="frame" stroke="#e3e3e3">{"".join(lines)}</g>', *texts]


@dataclass
class Mark:
    """A place on a curve: a point, or with several training runs of a method the mean of theirs. Errors may be None."""

    group: tuple[str, str]  # family and kind
    points: list[int]
    at: tuple[float, float]
    errors: tuple[float | None, float | None]


def marks_of(points: list[dict], keys: tuple[str, str], group: dict[int, tuple[str, str]]) -> list[Mark]:
    """The marks of the points in `group`; the error of a mean is that over training runs."""
    runs: dict[tuple, list[int]] = {}
    for i, name in group.items():
        runs.setdefault((name, points[i]["value"] if name[1] else i), []).append(i)
    marks = []
    for (name, _), own in runs.items():
        values = [[stat(points[i], key) for i in own] for key in keys]
        means = [[mean for mean, _ in column] for column in values]
        errors = [stdev(m) / len(m) ** 0.5 if len(m) > 1 else v[0][1] for m, v in zip(means, values, strict=True)]
        marks.append(Mark(name, own, tuple(map(mean, means)), tuple(errors)))
    return marks


def error_bars(mark: Mark, X, Y) -> str:
    (x, y), (dx, dy) = mark.at, mark.errors
    bars = ""
    if dx:
        bars += f'<line x1="{X(x - dx):.1f}" x2="{X(x + dx):.1f}" y1="{Y(y):.1f}" y2="{Y(y):.1f}"/>'
    if dy:
        bars += f'<line x1="{X(x):.1f}" x2="{X(x):.1f}" y1="{Y(y - dy):.1f}" y2="{Y(y + dy):.1f}"/>'
    return f'<g stroke="currentColor" opacity=".4">{bars}</g>'


def dot(results: dict, i: int, keys: tuple[str, str], x: float, y: float, inside: str, paint: str) -> str:
    """The point i at (x, y): a hidden ring, its label and values as a tooltip, and what is drawn `inside`."""
    point = results["points"][i]
    tooltip = f"{full_label(results, point)}, {schedule(results, point)}"
    for key in reversed(keys):
        (mean, error), c = stat(point, key), column(results, key)
        tooltip += f"; {c['title']} {number(mean, c['digits'])}" + (f" ± {number(error, c['digits'])}" if error else "")
    ring = ' class="halo" opacity="0" fill="none" stroke="currentColor" stroke-width="2" pointer-events="none"'
    return (
        f'<g data-point="{i}" {paint} fill="currentColor"><title>{text(tooltip)}</title>'
        f"{marker(x, y, 11, 0, ring)}{inside}</g>"
    )


def place_label(x: float, y: float, width: float, size: int, distances: list, boxes: list, spots: list, top: int):
    """The best place for the label of a point at (x, y): (penalty, (left, top, right, bottom)).

    The penalty is largest outside the plot, then for overlaps with `boxes` (labels and markers), with `spots` (points
    on lines), and for the distance.
    """
    best = (math.inf, (0.0, 0.0, 0.0, 0.0))
    for d in distances:
        for sx, sy in ((1, -1), (1, 1), (-1, -1), (-1, 1), (0, -1), (0, 1), (1, 0), (-1, 0)):
            k = d * (0.75 if sx and sy else 1)
            cx, cy = x + sx * (k + width / 2), y + sy * (k + size / 2)
            if sy:  # above and below the point, a label may be shifted sideways into the plot
                cx = min(max(cx, LEFT + width / 2), RIGHT - width / 2)
            left, up, right, down = box = (cx - width / 2, cy - size / 2, cx + width / 2, cy + size / 2)
            penalty = 1000 * (left < LEFT or up < top or right > RIGHT or down > BOTTOM) + 0.2 * d
            penalty += 100 * sum(left < b[2] and b[0] < right and up < b[3] and b[1] < down for b in boxes)
            penalty += sum(left < px < right and up < py < down for px, py in spots)
            best = min(best, (penalty, box))
    return best


def leader(x: float, y: float, room: float, box: tuple, paint: str) -> str:
    """A line from a point to its label where the label is far away."""
    near = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    if math.dist((x, y), near) < room + 9:
        return ""
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{near[0]:.1f}" y2="{near[1]:.1f}"'
    return f'<line {paint} {ends} stroke-width="1" opacity=".6"/>'


def styles(group: dict[int, tuple[str, str]]) -> dict[tuple[str, str], tuple[str, int]]:
    """Attributes and marker of each family and kind. The switch curves come first, so their colours are Figure 7's."""
    style = {("Base", ""): ('class="base" color="#111"', STAR)}
    for n, name in enumerate(sorted(dict.fromkeys(g for g in group.values() if g[1]), key=lambda g: g[1] == "aig")):
        colour = n % len(COLOURS)
        style[name] = (f'class="k{colour}" color="{COLOURS[colour]}"', SHAPES[n % len(SHAPES)])
    return style


def curves(results: dict, quality: str, against: str | None = None) -> str:
    """An SVG of the column `quality` against diversity: a line per method and kind, with standard errors.

    `against`: another column instead of the diversity, such as `fid` (Figure 5).
    The base is a star; the table's rows are large and named; other points have their base steps or λ where there is
    room. With several training runs of a method the line goes through their means, and each run's points are faint.
    Points without both values are left out. Raises ValueError when none is left.
    """
    points, keys = results["points"], (against or results["axes"]["diversity"], quality)
    shown = [i for i, p in enumerate(points) if all(stat(p, key)[0] is not None for key in keys)]
    if not shown:
        raise ValueError(f"no point has both {keys[0]} and {quality}, so there is nothing to draw")
    group = {i: (family(points[i]), points[i]["kind"]) if points[i]["checkpoint"] else ("Base", "") for i in shown}
    style, marks = styles(group), marks_of(points, keys, group)
    entries, top = legend(style, checkpoint_names(results))

    def scale_of(axis: int, start: float, end: float):
        values = [m.at[axis] + sign * (m.errors[axis] or 0) for m in marks for sign in (-1, 1)]
        return scale(values + [stat(points[i], keys[axis])[0] for i in shown], start, end)

    (X, x_ticks), (Y, y_ticks) = scale_of(0, LEFT, RIGHT), scale_of(1, BOTTOM, top)
    lines, spots = lines_of(points, marks, style, X, Y)
    faint, dots = [], []
    for m in sorted(marks, key=lambda m: points[m.points[0]]["row"]):  # the table's rows on top
        row, (paint, corners), (x, y) = points[m.points[0]]["row"], style[m.group], (X(m.at[0]), Y(m.at[1]))
        radius = 11 if not m.group[1] else 6 if row else 4
        inside = error_bars(m, X, Y) + marker(x, y, radius, corners, ' stroke="#fff" class="row"' if row else "")
        if len(m.points) > 1:
            for i in m.points:
                (x_i, _), (y_i, _) = (stat(points[i], key) for key in keys)
                sign = marker(X(x_i), Y(y_i), 2.5, corners, ' opacity=".4"')
                faint.append(dot(results, i, keys, X(x_i), Y(y_i), sign, paint))
            dots.append(f'<g {paint} fill="currentColor" pointer-events="none">{inside}</g>')
        else:
            dots.append(dot(results, m.points[0], keys, x, y, inside, paint))
    words, leaders = labels_of(points, marks, style, X, Y, spots, top)
    title = f"{column(results, quality)['title']} against {column(results, keys[0])['title']}"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" width="{W}" height="{H}" role="img"
 aria-label="{text(title)}" font-family="system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif" font-size="12" fill="#333">
<rect class="ground" width="{W}" height="{H}" fill="#fff"/>
{"".join(entries + frame(results, keys, X, Y, x_ticks, y_ticks, top))}
<g fill="none" stroke="currentColor" stroke-linejoin="round">{"".join(lines + leaders)}</g>
{"".join(faint + dots)}
<g class="labels" text-anchor="middle" stroke="#fff" stroke-width="3" paint-order="stroke">{"".join(words)}</g>
</svg>
"""


def lines_of(points: list[dict], marks: list[Mark], style: dict, X, Y) -> tuple[list[str], list[tuple]]:
    """A line per family and kind; and points on lines and error bars, which labels avoid."""
    lines, spots = [], []
    base = [m for m in marks if m.points == [0]]
    for name in style:
        own = sorted((m for m in marks if m.group == name and name[1]), key=lambda m: points[m.points[0]]["value"])
        line = own + base * (name[1] == "switch")  # the base model takes all steps
        places = [(X(m.at[0]), Y(m.at[1])) for m in line]
        if own:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            lines.append(f'<polyline {style[name][0]} points="{path}" stroke-width="2"/>')
        for (x, y), (x2, y2) in pairwise(places):
            n = max(2, round(math.dist((x, y), (x2, y2)) / 3))
            spots += [(x + (x2 - x) * k / n, y + (y2 - y) * k / n) for k in range(n)]
    for m in marks:
        (x, y), (dx, dy) = m.at, m.errors
        spots += [(X(x + (dx or 0) * k / 6), Y(y)) for k in range(-6, 7)]
        spots += [(X(x), Y(y + (dy or 0) * k / 6)) for k in range(-6, 7)]
    return lines, spots


def labels_of(points: list[dict], marks: list[Mark], style: dict, X, Y, spots: list, top: int) -> tuple[list, list]:
    """The labels of the marks, and the lines that lead to those that are far away."""
    room = [11 if points[m.points[0]]["row"] else 4 for m in marks]  # a row's ring is larger
    places = [(X(m.at[0]), Y(m.at[1])) for m in marks]
    boxes = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(places, room, strict=True)]
    firsts = [points[m.points[0]] for m in marks]
    labels = [(n, point["label"], 13) for n, point in enumerate(firsts) if point["row"]]
    labels += [
        (n, f"{'λ ' * (point['kind'] == 'aig')}{point['value']:g}", 11)
        for n, point in enumerate(firsts)
        if marks[n].group[1]
    ]
    words, leaders = [], []
    for n, label, size in labels:
        paint, near = style[marks[n].group][0], [room[n] + d for d in ((3,) if size == 11 else (3, 10, 20, 32))]
        penalty, box = place_label(*places[n], 0.6 * size * len(label) + 2, size, near, boxes, spots, top)
        if size == 13 or penalty < 9:
            boxes.append(box)
            leaders.append(leader(*places[n], room[n], box, paint))
            words.append(
                f'<text {paint} x="{(box[0] + box[2]) / 2:.1f}" y="{box[3] - 0.2 * size:.1f}" font-size="{size}" '
                f'font-weight="{600 if size == 13 else 400}" fill="currentColor">{text(label)}</text>'
            )
    return words, leaders
