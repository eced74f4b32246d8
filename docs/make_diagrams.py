"""Draw the diagrams of the documents from the code: docs/steps.svg, docs/schedule.svg and docs/training.svg.

    python docs/make_diagrams.py

Sizes are pixels of a page 720 wide. Colours are Okabe and Ito's, which colour-blind people tell apart; text and lines
follow the reader's light or dark theme.
"""

import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from combined import aig_weights, combined_weights
from imagerefl import REFL_EVERY
from refl import T_MAX
from scheduler import Scheduler
from utils import disk

WIDTH, LEFT, CELL = 720, 140, 14
BASE, TUNED, REWARD, DIFFUSION, PLAIN = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#9a9a9a"
STYLE = """<style>
  text { font: 13px system-ui, sans-serif; fill: #222 }
  .small { font-size: 12px; fill: #555 } .bold { font-weight: 600 } .on { fill: #111 }
  .line { stroke: #555; fill: none } .frame { stroke: #999; fill: none } .faint { stroke: #999; stroke-dasharray: 2 3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #eee } .small { fill: #bbb } .on { fill: #111 } .line { stroke: #bbb } .frame, .faint { stroke: #888 }
  }
</style>"""
SCHEDULER = Scheduler(40)
STEPS = len(SCHEDULER.steps)
T_PRIME, T_F = 30, 34  # t' of SD1.5, and a t_f as it might be drawn


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1) -> str:
    size = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {size} fill="{colour}" fill-opacity="{opacity:.3f}"/>'


def cells(y: float, first: int, last: int, colour: str, opacity: float = 1) -> str:
    """Step indices first..last of a row."""
    return "".join(box(LEFT + CELL * i + 1, y, CELL - 2, 20, colour, opacity) for i in range(first, last + 1))


def document(height: float, parts: list[str], label: str) -> str:
    view = f"-6 0 {WIDTH + 12} {height}"  # a margin for the strokes of boxes at the edges
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" role="img" aria-label="{label}">'
    return "\n".join([head, STYLE, *parts, "</svg>"]) + "\n"


def steps_diagram() -> str:
    """What each method does at each of the 40 steps."""
    parts, marks = [], [0, 10, 20, 30, STEPS - 1]
    counts = {
        "step index": lambda i: i,
        "countdown": lambda i: STEPS - i,
        "timestep": SCHEDULER.timesteps.__getitem__,
    }
    for row, (name, count) in enumerate(counts.items()):
        y = 18 + 17 * row
        parts.append(text(0, y, name, "small"))
        parts += [text(LEFT + CELL * (i + 0.5), y, str(count(i)), "small", "middle") for i in marks]
    parts += [
        f'<line class="faint" x1="{LEFT + CELL * i}" x2="{LEFT + CELL * i}" y1="{top}" y2="{end}"/>'
        for i in (10, 20, 30)
        for top, end in ((92, 152 if i == 30 else 120), (208, 306))
    ]

    y = 84
    parts += [text(0, y, "Training", "bold"), text(LEFT, y, "from noise (left) to an image (right)", "small")]
    parts += [text(0, y + 27, "ReFL"), cells(y + 12, 0, T_F - 1, PLAIN), cells(y + 12, T_F, T_F, REWARD)]
    parts += [text(0, y + 57, "ImageReFL"), cells(y + 42, T_PRIME, T_PRIME, DIFFUSION)]
    parts += [cells(y + 42, T_PRIME + 1, T_F - 1, PLAIN), cells(y + 42, T_F, T_F, REWARD)]
    parts.append(text(LEFT + CELL * T_PRIME - 8, y + 57, "a real image, noised to t' = step 30", "small", "end"))
    for row, first in ((12, STEPS - T_MAX), (42, T_PRIME)):
        x = LEFT + CELL * first
        parts.append(text(LEFT + CELL * (T_F + 1) + 4, y + row + 15, "→ x₀ → R", "small"))
        parts.append(
            f'<rect class="frame" x="{x}" y="{y + row - 3}" width="{CELL * (STEPS - first)}" height="26" rx="3"/>'
        )
    parts.append(
        text(
            LEFT + CELL * STEPS,
            y + 86,
            "frame: t_f is a random one of these steps, here 34; the later ones are not taken",
            "small",
            "end",
        )
    )

    y = 200
    parts += [text(0, y, "Sampling", "bold")]
    for row, (name, weights) in enumerate(
        {
            "Combined 30 + 10": combined_weights(STEPS, 30),
            "Combined 10 + 30": combined_weights(STEPS, 10),
            "AIG": aig_weights(STEPS),
        }.items()
    ):
        top = y + 12 + 30 * row
        parts.append(text(0, top + 15, name))
        for i, w in enumerate(weights):
            parts += [cells(top, i, i, BASE, 1 - w), cells(top, i, i, TUNED, w)]
    for name, first, last in (("T' = 10", 30, STEPS), ("T' = 30", 10, STEPS)):
        row = 0 if first == 30 else 1
        parts.append(box(LEFT + CELL * (first + last) / 2 - 26, y + 13 + 30 * row, 52, 18, TUNED))
        parts.append(text(LEFT + CELL * (first + last) / 2, y + 27 + 30 * row, name, "on", "middle"))

    y = 330
    legend = {
        PLAIN: "tuned model, no gradient",
        REWARD: "reward loss",
        DIFFUSION: "diffusion loss",
        BASE: "base model",
        TUNED: "tuned model",
    }
    x = 0
    for colour, words in legend.items():
        parts += [box(x, y - 11, 12, 12, colour), text(x + 17, y, words, "small")]
        x += 34 + 6.5 * len(words)
    y = 362
    parts.append(text(0, y, "Order of updates", "bold"))
    for k in range(12):
        is_refl = k % REFL_EVERY == REFL_EVERY - 1
        parts.append(box(LEFT + 34 * k, y - 15, 31, 20, PLAIN, 0.9 if is_refl else 0.35))
        parts.append(text(LEFT + 34 * k + 15.5, y, "R" if is_refl else "I", "on", "middle"))
    parts.append(text(LEFT + 34 * 12 + 6, y, "I: ImageReFL, R: ReFL", "small"))
    return document(374, parts, "What ReFL, ImageReFL, combined generation and AIG do at each of 40 steps")


def panel(
    x: float, title: str, curves: dict[str, tuple[list[float], list[float], str]], top: float, xs: list[int]
) -> list:
    """A plot 196 wide from 0 to `top`: curves are name -> (step indices, values, dashes)."""
    width, height, y0 = 196, 130, 190
    first, last = xs[0], xs[-1]

    def place(i: float, value: float) -> tuple[float, float]:
        return x + width * (i - first) / (last - first), y0 - height * value / top

    parts = [text(x, 24, title, "bold"), f'<path class="line" d="M{x} {y0 - height} V{y0} H{x + width}"/>']
    parts += [text(place(i, 0)[0], y0 + 16, str(i), "small", "middle") for i in xs]
    parts += [text(x - 5, place(first, v)[1] + 4, f"{v:g}", "small", "end") for v in (0, top / 2, top)]
    parts += [text(x + width / 2, y0 + 33, "step index", "small", "middle")]
    for k, (name, (indices, values, dashes)) in enumerate(curves.items()):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(place, indices, values))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{TUNED}" stroke-width="2.5" stroke-dasharray="{dashes}"/>'
        )
        if len(curves) > 1:
            line = f'<path d="M{x} {y0 + 49 + 17 * k} h30" stroke="{TUNED}" stroke-width="2.5"'
            parts += [f'{line} stroke-dasharray="{dashes}"/>', text(x + 36, y0 + 53 + 17 * k, name, "small")]
    return parts


def stairs(weights: list[float]) -> tuple[list[float], list[float]]:
    """A curve that keeps each step's value until the next step."""
    return [i + edge for i in range(STEPS) for edge in (0, 0.98)], [w for w in weights for _ in range(2)]


def schedule_diagram() -> str:
    """The noise schedule with t' marked, how strongly each t_f acts, and the weights of the tuned model."""
    abar, steps = SCHEDULER.abar[SCHEDULER.timesteps].tolist(), list(SCHEDULER.steps)
    late = steps[STEPS - T_MAX :]
    strength = [((1 - abar[i]) / abar[i]) ** 0.5 for i in late]
    parts = panel(28, "Share of signal, ᾱ_t", {"": (steps, abar, "")}, 1, [0, 10, 20, 30, 39])
    x = 28 + 196 * T_PRIME / (STEPS - 1)
    parts += [f'<line class="faint" x1="{x:.1f}" x2="{x:.1f}" y1="60" y2="190"/>', text(x - 5, 76, "t'", "", "end")]
    parts += panel(270, "Weight of ε_θ at t_f = 30 .. 39", {"": (late, strength, "")}, 0.8, [30, 33, 36, 39])
    weights = {
        "Combined 30 + 10": (*stairs(combined_weights(STEPS, 30)), ""),
        "Combined 10 + 30": (*stairs(combined_weights(STEPS, 10)), "7 4"),
        "AIG, λ = 1": (steps, aig_weights(STEPS), "2 3"),
    }
    parts += panel(512, "Weight of the tuned model", weights, 1, [0, 10, 20, 30, 39])
    return document(300, parts, "The noise schedule, the weight of each t_f, and the weights of the tuned model")


def arrow(x: float, y: float, x2: float, kind: str = "line", colour: str = "") -> str:
    """A horizontal arrow; with a colour, that of a gradient, dashed."""
    way, style = (1 if x2 > x else -1), f' style="stroke: {colour}; stroke-width: 2"' if colour else ""
    head = f"M{x2 - 7 * way} {y - 4} L{x2} {y} L{x2 - 7 * way} {y + 4}"
    dash = ' stroke-dasharray="5 3"' if colour else ""
    line = f'<path class="{kind}"{style}{dash} d="M{x} {y} H{x2 - way}"/>'
    return line + f'<path class="{kind}"{style} d="{head}"/>'


def node(x: float, y: float, width: float, words: str, colour: str | None = None) -> str:
    """A named box of a diagram: filled where something is trained, a frame where not."""
    size = f'x="{x}" y="{y}" width="{width}" height="34" rx="5"'
    kind, fill = ("on", f'fill="{colour}" fill-opacity=".85"') if colour else ("", 'class="frame"')
    return f"<rect {size} {fill}/>" + text(x + width / 2, y + 22, words, kind, "middle")


def training_diagram() -> str:
    """Figure 6: an update of ReFL starts from noise, one of ImageReFL from a noised real image."""
    parts = []
    for y, name in ((40, "ReFL"), (196, "ImageReFL")):
        parts += [
            text(0, y - 20, name, "bold"),
            arrow(462, y + 17, 482),
            arrow(554, y + 17, 574),
            arrow(640, y + 17, 658),
        ]
        parts += [node(398, y, 64, "step t_f", REWARD), node(482, y, 72, "predict x₀"), node(574, y, 66, "decode")]
        parts += [node(658, y, 62, "R(x₀, c)", REWARD)]
        parts += [f'<path d="M689 {y + 37} v19" stroke="{REWARD}" stroke-width="2" stroke-dasharray="5 3"/>']
        parts += [f'<path d="M430 {y + 56} v-12" stroke="{REWARD}" stroke-width="2"/>']
        parts += [f'<path d="M426 {y + 47} l4 -8 l4 8" fill="none" stroke="{REWARD}" stroke-width="2"/>']
        parts += [f'<path d="M689 {y + 56} H430" stroke="{REWARD}" stroke-width="2" stroke-dasharray="5 3"/>']
        parts += [text(560, y + 73, "gradient of the reward loss", "", "middle")]
    y = 40
    parts += [node(0, y, 78, "noise x_T"), arrow(78, y + 17, 96), arrow(378, y + 17, 398)]
    parts += [box(98 + CELL * i, y + 7, CELL - 2, 20, PLAIN) for i in range(20)]
    parts += [text(98 + 10 * CELL, y + 48, "many steps without gradient", "", "middle")]
    y = 196
    parts += [node(0, y, 78, "real image"), arrow(78, y + 17, 122), text(100, y + 50, "+ noise", "", "middle")]
    parts += [node(122, y, 44, "x_t'"), arrow(166, y + 17, 186), node(186, y, 66, "step t'", DIFFUSION)]
    parts += [arrow(252, y + 17, 272), arrow(378, y + 17, 398)]
    parts += [box(274 + CELL * i, y + 7, CELL - 2, 20, PLAIN) for i in range(7)]
    parts += [
        text(323, y - 6, "few such steps", "", "middle"),
        node(122, y + 68, 130, "(ε − ε_θ)²", DIFFUSION),
    ]
    parts += [f'<path d="M219 {y + 66} V{y + 44}" stroke="{DIFFUSION}" stroke-width="2" stroke-dasharray="5 3"/>']
    parts += [f'<path d="M215 {y + 47} l4 -8 l4 8" fill="none" stroke="{DIFFUSION}" stroke-width="2"/>']
    parts += [text(228, y + 60, "gradient of the diffusion loss")]
    y, x = 330, 0
    legend = {PLAIN: "no gradient", REWARD: "reward loss, Eqs. 2 and 4", DIFFUSION: "diffusion loss, Eq. 5"}
    for colour, words in legend.items():
        parts += [box(x, y - 11, 12, 12, colour), text(x + 17, y, words)]
        x += 44 + 7 * len(words)
    return document(342, parts, "An update of ReFL and one of ImageReFL")


DIAGRAMS = {"steps": steps_diagram, "schedule": schedule_diagram, "training": training_diagram}


def main() -> None:
    for name, draw in DIAGRAMS.items():
        disk.write_text(ROOT / "docs" / f"{name}.svg", draw())


if __name__ == "__main__":
    main()
