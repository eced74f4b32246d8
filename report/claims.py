"""The paper's claims as tables over training seeds: what `reproduce.py` writes into claims.md.

1. ReFL raises the reward and lowers the diversity (Section 4.1, Figure 2).
2. Combined generation keeps the base model's diversity at little cost in quality (4.2, Figure 5).
3. At equal diversity, ImageReFL has higher quality than ReFL with combined generation and AIG (5.5, Figures 5, 9, 10).
4. Our own question: does a reward that was not trained on rise too?
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

from report.curves import METHODS

COLUMNS = {
    "trained reward": "tiny",
    "independent reward": "tiny2",
    "rater (ground truth)": "rater",
    "right concept, %": "concept",
    "diversity": "diversity",
}
SWITCH = 30  # steps of the base model at which ImageReFL is compared


@dataclass(frozen=True)
class Variant:
    """One way to tune: the name of its runs, the method, its updates and more flags of train.py.

    `base_steps`: steps of 40 that the base model takes in its combined generation.
    """

    name: str
    method: str
    updates: int
    base_steps: int
    flags: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{METHODS[self.method]}, {self.updates} updates"


def variants(base_steps: dict[str, int], refl: int, imagerefl: int) -> tuple[Variant, ...]:
    """ReFL and ImageReFL with that many updates, both on a learned reward, so that the rater says what it is worth."""
    learned = ("--reward", "tiny")
    return (
        Variant("refl", "refl", refl, base_steps["refl"], learned),
        Variant("imagerefl", "imagerefl", imagerefl, base_steps["imagerefl"], learned),
    )


@dataclass(frozen=True)
class Suite:
    """The runs of a reproduction, a model per variant and seed, and flags for their evaluation."""

    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    evaluation: tuple[str, ...] = ("--limit=32", "--sweep=switch=0,10,20,30,35", "--sweep=aig=1,2,4")


class SeedCurves:
    """The evaluated points of the models of one training seed; the runs are FOLDER/NAME-SEED."""

    def __init__(self, results: dict, folder: Path, seed: int):
        self.points, self.folder, self.seed = results["points"], folder, seed
        bases = {p["label"]: p["values"] for p in self.points if p["checkpoint"] is None}
        self.base, self.base_no_guidance = bases["Base"], bases["Base, no guidance"]

    def curve(self, name: str, kind: str) -> list[tuple[float, dict]]:
        """(switch or lambda, values), sorted, from the tuned model alone; a switch curve ends in the base model."""
        own = [p for p in self.points if p["checkpoint"] == str(self.folder / f"{name}-{self.seed}")]
        own = [p for p in own if p["kind"] == kind or (p["kind"], p["value"]) == ("switch", 0)]
        curve = sorted({p["value"]: p["values"] for p in own}.items())
        return curve + [(40, self.base)] * (kind == "switch")

    def at(self, name: str, switch: int, key: str) -> float:
        """The mean of a column where the base model takes `switch` steps."""
        return dict(self.curve(name, "switch"))[switch][key][0]

    def interpolate(self, name: str, kind: str, axis: str, value: float, key: str) -> float | None:
        """`key` on a curve where `axis` has this value, by linear interpolation; None beyond its ends.

        Of several such places, the first one counted from the tuned model alone.
        """
        known = [(v[axis][0], v[key][0]) for _, v in self.curve(name, kind)]
        for (x0, y0), (x1, y1) in pairwise(known):
            if min(x0, x1) <= value <= max(x0, x1) and x0 != x1:
                return y0 + (y1 - y0) * (value - x0) / (x1 - x0)
        return None


def summarise(values: list[float | None], digits: int = 3) -> str:
    """Mean ± standard error over the seeds, and each seed's value."""
    known = [v for v in values if v is not None]
    average = f"{mean(known):.{digits}f}" if known else "outside the curve"
    error = f" ± {stdev(known) / len(known) ** 0.5:.{digits}f}" if len(known) > 1 else ""
    each = ", ".join("outside" if v is None else f"{v:.{digits}f}" for v in values)
    return f"{average}{error} | {each}"


def table(title: str, rows: dict[str, list[float | None]]) -> list[str]:
    lines = ["", f"**{title}**", "", "| | mean ± error | seeds |", "|---|---|---|"]
    return lines + [f"| {name} | {summarise(values)} |" for name, values in rows.items()]


def change_from_base(seeds: list[SeedCurves], name: str) -> dict[str, list[float]]:
    """Claims 1 and 4: each column of the tuned model alone minus that of the base model, both without guidance."""
    columns = COLUMNS | {"FID": "fid"}
    return {title: [s.at(name, 0, key) - s.base_no_guidance[key][0] for s in seeds] for title, key in columns.items()}


def change_undone(seeds: list[SeedCurves], name: str, switch: int) -> dict[str, list[float]]:
    """Claim 2: the share of the change by tuning that combined generation undoes.

    0: as the tuned model alone; 1: as the base model with guidance.
    """
    rows = {}
    for title in ("diversity", "trained reward"):
        key = COLUMNS[title]
        alone, combined = ([s.at(name, n, key) for s in seeds] for n in (0, switch))
        rows[title] = combined
        shares = [(a - m) / (a - s.base[key][0]) for a, m, s in zip(alone, combined, seeds, strict=True)]
        rows[f"{title}: share of the change undone"] = shares
    return rows


def at_equal(seeds: list[SeedCurves], name: str, axis: str) -> dict[str, list[float | None]]:
    """Claim 3: ImageReFL at 30 + 10 minus ReFL Combined, and minus ReFL AIG, where their curves have equal `axis`."""
    rows = {axis: [s.at(name, SWITCH, COLUMNS[axis]) for s in seeds]}
    for other, kind in (("ReFL Combined", "switch"), ("ReFL AIG", "aig")):
        for title, key in COLUMNS.items():
            if title != axis:
                pairs = zip(seeds, rows[axis], strict=True)
                theirs = [s.interpolate("refl", kind, COLUMNS[axis], value, key) for s, value in pairs]
                ours = [s.at(name, SWITCH, key) for s in seeds]
                differences = zip(ours, theirs, strict=True)
                rows[f"{title}, more than {other}"] = [None if b is None else a - b for a, b in differences]
    return rows


def claims(results: dict, seeds: list[SeedCurves], variants: Sequence[Variant]) -> str:
    """Markdown: means over the seeds, then a table for each claim with mean ± standard error and each seed's value."""
    lines = means(results, seeds, variants)
    for variant in variants:
        title = f"1, 4. {variant.title}, alone: change against the base"
        lines += table(title, change_from_base(seeds, variant.name))
    for variant in variants:
        title = f"2. {variant.title}, switch {variant.base_steps}"
        lines += table(title, change_undone(seeds, variant.name, variant.base_steps))
    for variant in variants:
        for axis in ("diversity", "trained reward") if variant.method == "imagerefl" else ():
            title = f"3. {variant.title}, switch {SWITCH}, at equal {axis}"
            lines += table(title, at_equal(seeds, variant.name, axis))
    return "\n".join(lines) + "\n"


def means(results: dict, seeds: list[SeedCurves], variants: Sequence[Variant]) -> list[str]:
    """The paper's Table 1 with a row for each way to sample: mean over the seeds ± its standard error."""
    columns = results["columns"]
    lines = ["| | " + " | ".join(c["title"] for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]

    def row(label: str, values: list[dict]) -> None:
        cells = [summarise([v[c["key"]][0] for v in values], c["digits"]).split(" | ")[0] for c in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    row("Base", [seeds[0].base])
    row("Base, no guidance", [seeds[0].base_no_guidance])
    for variant in variants:
        switch = variant.base_steps
        by_switch = [dict(s.curve(variant.name, "switch")) for s in seeds]
        row(f"{variant.title}, alone", [curve[0] for curve in by_switch])
        if variant.method == "refl":
            row(f"{variant.title}, AIG", [dict(s.curve(variant.name, "aig"))[1.0] for s in seeds])
        row(f"{variant.title}, combined {switch} + {40 - switch}", [curve[switch] for curve in by_switch])
    return lines
