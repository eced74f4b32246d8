"""Tables of `ablations.py`: every run at equal arithmetic, at twice that, and at equal trained reward; two claims.

The claims are those of the paper's Section 6: combined generation, and a start from images, help other methods.

A run has stages: checkpoints at equally spaced updates, stage 0 being the base model. At each stage it has a switch
curve, {base steps: {column: mean}}, from the tuned model alone (0) to the base model (40). Between two stages all
values are interpolated, so a run can be read where its trained reward, of the tuned model alone, has a given value.
"""

from collections.abc import Callable
from itertools import pairwise

from report.claims import summarise

COLUMNS = {
    "tiny": "trained reward",
    "tiny2": "held-out reward",
    "rater": "rater",
    "concept": "right concept, %",
    "diversity": "diversity",
    "fid": "FID",
}
PREDICTION = """\
Predicted from the schedule before any run: eps_theta enters x_0 with weight 3.2 at step 0, 0.7 at 10, 0.2 at 20, 0.1 at
30 and 0.04 at 39 along the sampler, and 0.64 at ReFL's t_f = 30. So a late switch should leave least of what DRTune has
learned, and nearly all of DRaFT-3, which trains the last three steps alone. Where DRaFT-3 alone loses no diversity,
combined generation has nothing to give back to it."""
HELD_OUT = ("tiny2", "rater", "concept")
LATE = 30  # the switch at which a method that starts from images is compared

Curve = dict[int, dict[str, float]]  # base steps -> column -> mean


def curves_of(results: dict) -> dict[str, Curve]:
    """The switch curve of each checkpoint in a results.json, which ends in the base model."""
    curves: dict[str, Curve] = {}
    points = [point for point in results["points"] if point["kind"] == "switch"]
    base = next(point for point in points if point["checkpoint"] is None and point["label"] == "Base")
    for point in points:
        if point["checkpoint"] is not None:
            means = {key: value[0] for key, value in point["values"].items() if key in COLUMNS}
            curves.setdefault(point["checkpoint"], {})[int(point["value"])] = means
    end = {key: value[0] for key, value in base["values"].items() if key in COLUMNS}
    return {name: dict(sorted(curve.items())) | {results["steps"]: end} for name, curve in curves.items()}


def mix(a: dict, b: dict, share: float) -> dict:
    """(1 - share) a + share b, of numbers or dicts; keys of both only, such as switches that both were evaluated at."""
    return {k: mix(v, b[k], share) if isinstance(v, dict) else v + share * (b[k] - v) for k, v in a.items() if k in b}


def at_stage(stages: list[Curve], position: float) -> Curve:
    """The curve at a position between stages, from 0."""
    before = min(int(position), len(stages) - 2)
    return mix(stages[before], stages[before + 1], position - before)


def reaching(stages: list[Curve], gain: float) -> float | None:
    """The first position where the trained reward of the tuned model alone has risen by `gain`; None if it has not."""
    key = next(iter(COLUMNS))
    rises = [curve[0][key] - stages[0][0][key] for curve in stages]
    for i, (low, high) in enumerate(pairwise(rises)):
        if low < gain <= high:
            return i + (gain - low) / (high - low)
    return None


def where(curve: Curve, axis: str, value: float, key: str) -> float | None:
    """`key` on a switch curve where `axis` has a value, the first place counted from the tuned model; None outside."""
    for a, b in pairwise(curve.values()):
        if min(a[axis], b[axis]) <= value <= max(a[axis], b[axis]) and a[axis] != b[axis]:
            return a[key] + (b[key] - a[key]) * (value - a[axis]) / (b[axis] - a[axis])
    return None


def above_the_line(curve: Curve, key: str) -> float | None:
    """Claim (a): combined generation against a mixture of images of the two models, half-way in diversity.

    `key` on the switch curve minus the straight line from the tuned model alone to the base model.
    """
    alone, base = (list(curve.values())[i] for i in (0, -1))
    found = where(curve, "diversity", (alone["diversity"] + base["diversity"]) / 2, key)
    return None if found is None else found - (alone[key] + base[key]) / 2


def above_the_other(image: Curve, noise: Curve, key: str) -> float | None:
    """Claim (b): the start from images, at a late switch, minus the start from noise at the same diversity."""
    late = image[LATE if LATE in image else max(set(image) - {max(image)})]
    found = where(noise, "diversity", late["diversity"], key)
    return None if found is None else late[key] - found


def cell(values: list[float | None], digits: int = 3) -> str:
    """Mean ± standard error over the seeds."""
    return summarise(values, digits).split(" | ")[0] if values else "–"


def layout(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]]


def cells(points: list[dict[str, float]]) -> list[str]:
    """A cell per column, over the seeds."""
    return [cell([point[key] for point in points], 1 if key == "concept" else 3) for key in COLUMNS if key in points[0]]


def rows_of(title: str, curves: list[Curve], combined: int, updates: list[float]) -> list[list[str]]:
    """A row for the tuned model alone, and one for its combined generation."""
    rows = []
    for steps in (0, combined):
        own = [curve[steps] for curve in curves if steps in curve]
        if own:
            rows.append([f"{title}, switch {steps}" if steps else title, cell(updates, 0), str(len(own)), *cells(own)])
    return rows


def text(runs: dict, variants: list, budget: int, gain: float, base: Curve) -> str:
    """All tables as Markdown.

    runs: (variant's name, seed) -> (stages, updates per stage). budget: the stage of equal arithmetic. base: the base
    model's curve.
    """
    places: dict[str, Callable] = {
        "At equal arithmetic": lambda stages: float(budget),
        "At twice that arithmetic": lambda stages: float(len(stages) - 1),
        f"At equal trained reward, +{gain:g}": lambda stages: reaching(stages, gain),
    }
    lines = [PREDICTION]
    for title, place in places.items():
        rows, found = (
            [["Base, no guidance", "0", "", *cells([base[0]])], ["Base", "0", "", *cells([base[max(base)]])]],
            {},
        )
        for variant in variants:
            own = {seed: run for (name, seed), run in runs.items() if name == variant.name}
            at = {seed: place(stages) for seed, (stages, _) in own.items()}
            curves = {seed: at_stage(own[seed][0], x) for seed, x in at.items() if x is not None}
            updates = [at[seed] * own[seed][1] for seed in curves]
            rows += rows_of(variant.title, list(curves.values()), variant.base_steps, updates)
            missing = len(own) - len(curves)
            if missing:
                rows.append([f"{variant.title}: not reached by {missing} of {len(own)}", *[""] * (len(rows[0]) - 1)])
            found[variant.name] = curves
        lines += [f"\n## {title}\n", "Mean ± standard error over the seeds.\n"]
        lines += layout(["", "updates", "seeds", *(COLUMNS[key] for key in COLUMNS if key in base[0])], rows) + claims(
            variants, found
        )
    return "\n".join(lines).strip() + "\n"


def claims(variants: list, found: dict[str, dict[int, Curve]]) -> list[str]:
    """The two claims for every method of `found`, variant -> seed -> curve."""
    keys = [*COLUMNS][:1] + list(HELD_OUT)
    first, second = [], []
    for variant in variants:
        curves = found[variant.name]
        if curves:
            values = {key: [above_the_line(curve, key) for curve in curves.values()] for key in keys}
            first.append([variant.title, *(cell(values[key]) for key in keys)])
        noise = found.get(variant.compared_with, {})
        seeds = sorted(curves.keys() & noise.keys())
        if seeds:
            values = {key: [above_the_other(curves[seed], noise[seed], key) for seed in seeds] for key in keys}
            second.append([variant.title, *(cell(values[key]) for key in keys)])
    heads = ["", *(COLUMNS[key] for key in keys)]
    lines = ["\n(a) Combined generation above the straight line from tuned to base model, half-way in diversity\n"]
    lines += layout(heads, first)
    if second:
        lines += ["\n(b) From images at a late switch, above the same method from noise at equal diversity\n"]
        lines += layout(heads, second)
    return lines
