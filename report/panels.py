"""Small plots side by side as one SVG: several quantities over one axis, such as training updates or the switch step.

Colours and markers are those of `report/curves.py`; lines also differ by their markers, so that no reader needs colour.
"""

from dataclasses import dataclass

from report.curves import COLOURS, SHAPES, marker, scale, text

WIDTH, COLUMNS = 640, 2
PANEL_W, PANEL_H = 320, 232  # with its title and its labels
LEFT, RIGHT, TOP, BOTTOM = 52, 308, 34, 186  # the plot area inside a panel


@dataclass
class Panel:
    """One quantity: lines of (x, mean, standard error or None) by name."""

    title: str
    better: str  # "higher" or "lower"
    lines: dict[str, list[tuple[float, float, float | None]]]


def draw(panels: list[Panel], x_title: str, label: str) -> str:
    """The SVG. Every panel has the same lines, which the legend above names."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    style = {name: (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, name in enumerate(names)}
    entries, top = legend(style)
    rows = -(-len(panels) // COLUMNS)
    height = top + rows * PANEL_H
    drawn = [
        f'<g transform="translate({PANEL_W * (i % COLUMNS)} {top + PANEL_H * (i // COLUMNS)})">'
        f"{panel_svg(panel, style, x_title)}</g>"
        for i, panel in enumerate(panels)
    ]
    font = "font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\" font-size=\"13\""
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"
 role="img" aria-label="{text(label)}" {font} fill="#222">
<rect width="{WIDTH}" height="{height}" fill="#fff"/>
{"".join(entries + drawn)}
</svg>
"""


def legend(style: dict[str, tuple[str, int]]) -> tuple[list[str], int]:
    """A line with its marker for each name, in rows; and the y below them."""
    out, x, y = [], 12, 22
    for name, (colour, corners) in style.items():
        width = 46 + 7.4 * len(name)
        if x > 12 and x + width > WIDTH:
            x, y = 12, y + 20
        line = f'<line x1="{x}" x2="{x + 24}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="2"/>'
        out.append(f'{line}<g fill="{colour}">{marker(x + 12, y - 4, 4.5, corners)}</g>')
        out.append(f'<text x="{x + 31:.0f}" y="{y}">{text(name)}</text>')
        x += width
    return out, y + 10


def panel_svg(panel: Panel, style: dict[str, tuple[str, int]], x_title: str) -> str:
    """A panel, its title above, the ticks of both axes, and a line with error bars for each name."""
    rows = [row for line in panel.lines.values() for row in line]
    X, x_ticks = scale([x for x, _, _ in rows], LEFT, RIGHT)
    Y, y_ticks = scale([y + sign * (e or 0) for _, y, e in rows for sign in (-1, 1)], BOTTOM, TOP)
    if (digits := max(len(t) for _, t in y_ticks)) > 5:  # five characters fit beside the axis
        y_ticks = y_ticks[:: 1 + (digits > 8)]
    grid = [f'<line x1="{X(v):.1f}" x2="{X(v):.1f}" y1="{TOP}" y2="{BOTTOM}"/>' for v, _ in x_ticks]
    grid += [f'<line x1="{LEFT}" x2="{RIGHT}" y1="{Y(v):.1f}" y2="{Y(v):.1f}"/>' for v, _ in y_ticks]
    words = [f'<text x="{X(v):.1f}" y="{BOTTOM + 17}" text-anchor="middle">{t}</text>' for v, t in x_ticks]
    words += [f'<text x="{LEFT - 6}" y="{Y(v) + 4:.1f}" text-anchor="end">{t}</text>' for v, t in y_ticks]
    title = f"{panel.title} {'↑' if panel.better == 'higher' else '↓'}"
    words.append(f'<text x="{LEFT}" y="20" font-weight="600">{text(title)}</text>')
    words.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 36}" text-anchor="middle">{text(x_title)}</text>')
    marks = []
    for name, line in panel.lines.items():
        colour, corners = style[name]
        places = [(X(x), Y(y)) for x, y, _ in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, e in line:
            if e:
                bar = f'x1="{X(x):.1f}" x2="{X(x):.1f}" y1="{Y(y - e):.1f}" y2="{Y(y + e):.1f}"'
                marks.append(f'<line {bar} stroke="{colour}" opacity=".5"/>')
        marks += [f'<g fill="{colour}">{marker(x, y, 4, corners)}</g>' for x, y in places]
    return f'<g stroke="#e3e3e3">{"".join(grid)}</g>{"".join(words + marks)}'
