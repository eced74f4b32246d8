"""Table 2 as a picture: win rates with their intervals, ours and the paper's, one row each."""

import math

from report.curves import COLOURS, marker, text

WIDTH, LEFT, RIGHT, ROW, HEAD = 640, 300, 622, 21, 30
OURS, PAPER = (COLOURS[0], 0), (COLOURS[1], -4)  # colour and marker

Row = tuple[str, bool, float, tuple[float, float]]  # label, whether it is ours, win rate, its interval


def draw(groups: dict[str, list[Row]]) -> str:
    """An SVG with a group of rows for each question; the vertical line is 50 %, no preference."""
    ends = [v for rows in groups.values() for _, _, _, interval in rows for v in interval]
    low, high = 10 * math.floor(10 * min(0.4, *ends)), 10 * math.ceil(10 * max(0.6, *ends))

    def X(value: float) -> float:
        return LEFT + (100 * value - low) / (high - low) * (RIGHT - LEFT)

    parts, y = [], HEAD
    for question, rows in groups.items():
        parts.append(f'<text x="8" y="{y + 16}" font-weight="600">{text(question)}</text>')
        y += 24
        for label, ours, rate, (left, right) in rows:
            colour, corners = OURS if ours else PAPER
            at, end = y + ROW / 2, f"{100 * rate:.0f}"
            parts.append(f'<text x="{LEFT - 12}" y="{at + 4.5:.1f}" text-anchor="end">{text(label)}</text>')
            parts.append(f'<line x1="{X(left):.1f}" x2="{X(right):.1f}" y1="{at}" y2="{at}" stroke="{colour}" '
                         f'stroke-width="2"/><g fill="{colour}">{marker(X(rate), at, 5, corners)}</g>'
                         f"<title>{text(f'{label}: {end} %')}</title>")  # fmt: skip
            y += ROW
        y += 8
    grid = [
        f'<line x1="{X(v / 100):.1f}" x2="{X(v / 100):.1f}" y1="{HEAD}" y2="{y}" '
        f'stroke="{"#555" if v == 50 else "#e3e3e3"}"/>'
        f'<text x="{X(v / 100):.1f}" y="{y + 17}" text-anchor="middle">{v}</text>'
        for v in range(low, high + 1, 10)
    ]
    legend = "".join(
        f'<g fill="{colour}">{marker(x, 15, 5, corners)}</g><text x="{x + 11}" y="20">{name}</text>'
        for x, name, (colour, corners) in ((16, "this study", OURS), (126, "the paper, intervals of 400 votes", PAPER))
    )
    height = y + 44
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"
 role="img" aria-label="Win rates of the user study" font-family="system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"
 font-size="13" fill="#222">
<rect width="{WIDTH}" height="{height}" fill="#fff"/>
{legend}{"".join(grid + parts)}
<text x="{(LEFT + RIGHT) / 2}" y="{y + 36}" text-anchor="middle">win rate, %: ties as halves, 95 % intervals</text>
</svg>
"""
