"""Quality against diversity as an SVG: the paper's trade-off curves (Figures 5, 9, 10, 12-15). Reads results.json.

The SVG is self-contained (white background, no fonts or scripts). A page can restyle it by its classes: `ground`,
`frame`, `base`, `labels`, `row`, and `k0`, `k1`, ... for the colours; `[data-point]` is a point, `.halo` its ring.
"""

import math
import re
from html import escape
from itertools import pairwise
from pathlib import Path

METHODS = {"refl": "ReFL", "imagerefl": "ImageReFL"}
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
        entry = {"": name, "aig": f"{model} AIG, λ", "switch": f"{model}, switch"}[kind]
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


def dot(results: dict, i: int, keys: tuple[str, str], X, Y, errors: bool, paint: str, corners: int, r: float) -> str:
    """A point with error bars if `errors`, a hidden ring, and its label and values as a tooltip."""
    point = results["points"][i]
    (x, dx), (y, dy) = (stat(point, key) for key in keys)
    tooltip, bars = f"{full_label(results, point)}, {schedule(results, point)}", ""
    for key in reversed(keys):
        (mean, error), c = stat(point, key), column(results, key)
        tooltip += f"; {c['title']} {number(mean, c['digits'])}" + (f" ± {number(error, c['digits'])}" if error else "")
    if dx and errors:
        bars += f'<line x1="{X(x - dx):.1f}" x2="{X(x + dx):.1f}" y1="{Y(y):.1f}" y2="{Y(y):.1f}"/>'
    if dy and errors:
        bars += f'<line x1="{X(x):.1f}" x2="{X(x):.1f}" y1="{Y(y - dy):.1f}" y2="{Y(y + dy):.1f}"/>'
    edge = ' stroke="#fff" class="row"' if point["row"] else ""
    ring = ' class="halo" opacity="0" fill="none" stroke="currentColor" stroke-width="2" pointer-events="none"'
    return (
        f'<g data-point="{i}" {paint} fill="currentColor"><title>{text(tooltip)}</title>'
        f"{marker(X(x), Y(y), 11, 0, ring)}"
        f'<g stroke="currentColor" opacity=".4">{bars}</g>{marker(X(x), Y(y), r, corners, edge)}</g>'
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


def curves(results: dict, quality: str, against: str | None = None) -> str:
    """An SVG of the column `quality` against diversity: a line per checkpoint and kind, with standard errors.

    `against`: another column instead of the diversity, such as `fid` (Figure 5).
    The base is a star; the table's rows are large and named; other points have their base steps or λ where there is
    room.

    With several training runs of a method, their spread shows the error, and only the rows have error bars. Points
    without both values are left out. Raises ValueError when none is left.
    """
    points, keys = results["points"], (against or results["axes"]["diversity"], quality)
    shown = [i for i, p in enumerate(points) if all(stat(p, key)[0] is not None for key in keys)]
    if not shown:
        raise ValueError(f"no point has both {keys[0]} and {quality}, so there is nothing to draw")
    group = {i: (family(points[i]), points[i]["kind"]) if points[i]["checkpoint"] else ("Base", "") for i in shown}
    style = {("Base", ""): ('class="base" color="#111"', STAR)}
    for name in dict.fromkeys(group.values()):
        n = len(style) - 1
        colour = n % len(COLOURS)
        style.setdefault(name, (f'class="k{colour}" color="{COLOURS[colour]}"', SHAPES[n % len(SHAPES)]))
    entries, top = legend(style, checkpoint_names(results))

    def ends(key: str) -> list[float]:
        return [mean + sign * (error or 0) for mean, error in (stat(points[i], key) for i in shown) for sign in (-1, 1)]

    X, x_ticks = scale(ends(keys[0]), LEFT, RIGHT)
    Y, y_ticks = scale(ends(keys[1]), BOTTOM, top)
    at = {i: (X(stat(points[i], keys[0])[0]), Y(stat(points[i], keys[1])[0])) for i in shown}

    many = any(len(checkpoints) > 1 for checkpoints in families(results).values())
    lines, spots = [], []
    for name, checkpoint in dict.fromkeys((group[i], points[i]["checkpoint"]) for i in shown if group[i][1]):
        members = [i for i in shown if (group[i], points[i]["checkpoint"]) == (name, checkpoint)]
        line = [at[i] for i in sorted(members, key=lambda i: points[i]["value"])]
        if name[1] == "switch" and 0 in at:
            line.append(at[0])  # the base model takes all steps
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        lines.append(f'<polyline {style[name][0]} points="{path}" stroke-width="{1 if many else 2}"/>')
        for (x, y), (x2, y2) in pairwise(line):
            n = max(2, round(math.dist((x, y), (x2, y2)) / 3))
            spots += [(x + (x2 - x) * k / n, y + (y2 - y) * k / n) for k in range(n)]

    barred = [i for i in shown if points[i]["row"] or not many]
    for i in barred:  # labels avoid the error bars too
        x, y = at[i]
        (mean, error), (mean2, error2) = (stat(points[i], key) for key in keys)
        spots += [(X(mean + (error or 0) * k / 6), y) for k in range(-6, 7)]
        spots += [(x, Y(mean2 + (error2 or 0) * k / 6)) for k in range(-6, 7)]
    radius = {i: 11 if not group[i][1] else 6 if points[i]["row"] else 3 if many else 4 for i in shown}
    order = sorted(shown, key=lambda i: points[i]["row"])  # the table's rows on top
    dots = [dot(results, i, keys, X, Y, i in barred, *style[group[i]], radius[i]) for i in order]
    room = {i: 11 if points[i]["row"] else radius[i] for i in shown}  # a row's ring is larger
    boxes = [(x - room[i], y - room[i], x + room[i], y + room[i]) for i, (x, y) in at.items()]
    first = {checkpoints[0] for checkpoints in families(results).values()} | {None}
    named = [i for i in shown if points[i]["checkpoint"] in first]
    labels = [(i, points[i]["label"], 13) for i in named if points[i]["row"]]
    labels += [(i, f"{'λ ' * (points[i]['kind'] == 'aig')}{points[i]['value']:g}", 11) for i in named if group[i][1]]
    words = []
    for i, label, size in labels:
        near = [room[i] + d for d in ((3,) if size == 11 else (3, 10, 20, 32))]
        penalty, box = place_label(*at[i], 0.6 * size * len(label) + 2, size, near, boxes, spots, top)
        if size == 13 or penalty < 9:
            boxes.append(box)
            lines.append(leader(*at[i], room[i], box, style[group[i]][0]))
            words.append(
                f'<text {style[group[i]][0]} x="{(box[0] + box[2]) / 2:.1f}" y="{box[3] - 0.2 * size:.1f}" '
                f'font-size="{size}" font-weight="{600 if size == 13 else 400}" '
                f'fill="currentColor">{text(label)}</text>'
            )
    title = f"{column(results, quality)['title']} against {column(results, keys[0])['title']}"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" width="{W}" height="{H}" role="img"
 aria-label="{text(title)}" font-family="system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif" font-size="12" fill="#333">
<rect class="ground" width="{W}" height="{H}" fill="#fff"/>
{"".join(entries + frame(results, keys, X, Y, x_ticks, y_ticks, top))}
<g fill="none" stroke="currentColor" stroke-linejoin="round">{"".join(lines)}</g>
{"".join(dots)}
<g class="labels" text-anchor="middle" stroke="#fff" stroke-width="3" paint-order="stroke">{"".join(words)}</g>
</svg>
"""
