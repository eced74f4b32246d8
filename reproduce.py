"""Reproduce the paper's claims on the tiny base: train ReFL and ImageReFL with three seeds, evaluate, compare.

    python reproduce.py            # under two hours on two cores
    python reproduce.py --quick    # one seed, shorter: the same directions in a quarter of an hour

Goes on where it was stopped. Writes everything that `evaluate.py` does, and `claims.md`, into `runs/reproduction`.
"""

from cli import Parser, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, half the updates and images, fewer points")
    parser.add_argument("--output-dir", help="default: runs/reproduction, or runs/reproduction-quick")
    return parser.parse(argv)


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports, so that --help answers at once

import subprocess  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import mean, stdev  # noqa: E402

import evaluate  # noqa: E402
import state  # noqa: E402
from settings import TINY  # noqa: E402

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """The size of a reproduction. Updates are the defaults, in the paper's proportion of 1 to 2."""

    seeds: tuple[int, ...] = (1, 2, 3)
    refl: int = TINY.updates["refl"]
    imagerefl: int = TINY.updates["imagerefl"]
    evaluation: tuple[str, ...] = (
        "--images-per-prompt=4",
        "--sweep=switch=0,3,5,7,10,15,20,25,30,35,38",
        "--sweep=aig=1,1.5,2,3,4",
    )


QUICK = Plan(
    seeds=(1,),
    refl=40,
    imagerefl=80,
    evaluation=("--images-per-prompt=4", "--limit=32", "--sweep=switch=0,5,10,20,30,35", "--sweep=aig=1,2,4"),
)


def train(folder: Path, method: str, seed: int, updates: int) -> Path:
    """Train one model unless it is there; a run that was stopped goes on."""
    place = folder / f"{method}-{seed}"
    command = [sys.executable, str(HERE / "train.py")]
    if not (place / "run.json").exists():
        command += ["--method", method, "--steps", str(updates), "--seed", str(seed), "--output-dir", str(place)]
        command += ["--sample-every", "25", "--monitor", "25"]
    else:
        command += ["--resume", str(place)]
    if not (place / "unet").exists() and subprocess.run(command).returncode:
        raise ValueError(f"training stopped: {' '.join(command)}; call reproduce.py again to go on")
    return place


class Curves:
    """The evaluated points of one seed, by method and kind."""

    def __init__(self, results: dict, folder: Path, seed: int):
        self.points = results["points"]
        self.base = next(p["values"] for p in self.points if p["checkpoint"] is None)
        self.own = {m: str(folder / f"{m}-{seed}") for m in ("refl", "imagerefl")}

    def curve(self, method: str, kind: str) -> list[tuple[float, dict]]:
        """(switch or power, values) in order; a switch curve ends in the base model."""
        own = [p for p in self.points if p["checkpoint"] == self.own[method] and p["kind"] == kind]
        curve = sorted(((p["value"], p["values"]) for p in own), key=lambda pair: pair[0])
        return curve + [(40, self.base)] * (kind == "switch")

    def at(self, method: str, kind: str, value: float, key: str) -> float:
        return dict(self.curve(method, kind))[value][key][0]

    def at_diversity(self, method: str, kind: str, diversity: float, key: str) -> float | None:
        """`key` on a curve where it has this diversity, by linear interpolation; None beyond its ends."""
        known = [(v["diversity"][0], v[key][0]) for _, v in self.curve(method, kind)]
        for (x0, y0), (x1, y1) in zip(known, known[1:], strict=False):
            if min(x0, x1) <= diversity <= max(x0, x1) and x0 != x1:
                return y0 + (y1 - y0) * (diversity - x0) / (x1 - x0)
        return None


def said(values: list[float | None], digits: int = 3) -> str:
    """Mean ± standard error over the seeds, and each seed's value."""
    known = [v for v in values if v is not None]
    average = f"{mean(known):.{digits}f}" if known else "outside the curve"
    error = f" ± {stdev(known) / len(known) ** 0.5:.{digits}f}" if len(known) > 1 else ""
    each = ", ".join("outside" if v is None else f"{v:.{digits}f}" for v in values)
    return f"{average}{error} | {each}"


def claims(seeds: list[Curves]) -> str:
    """The four claims as Markdown tables: a line each, mean ± standard error over the seeds, and every seed."""
    trained, judge = "tiny", "tiny2"
    base = seeds[0].base
    lines = [
        f"The base model: trained reward {base[trained][0]:.3f}, held-out reward {base[judge][0]:.3f}, "
        f"right concept {base['concept'][0]:.1f} %, diversity {base['diversity'][0]:.3f}, FID {base['fid'][0]:.3f}.",
    ]

    def table(title: str, rows: dict[str, list[float | None]]) -> None:
        lines.extend(["", f"**{title}**", "", "| | mean ± error | seeds |", "|---|---|---|"])
        lines.extend(f"| {name} | {said(values)} |" for name, values in rows.items())

    def change(method: str, switch: int, key: str) -> list[float]:
        return [s.at(method, "switch", switch, key) - base[key][0] for s in seeds]

    keys = {
        "trained reward": trained,
        "held-out reward": judge,
        "right concept, %": "concept",
        "diversity": "diversity",
    }
    keys["FID"] = "fid"
    table("1. ReFL alone against the base", {name: change("refl", 0, key) for name, key in keys.items()})

    def recovered(s: Curves, method: str, switch: int, key: str) -> float:
        alone, mixed = s.at(method, "switch", 0, key), s.at(method, "switch", switch, key)
        return (alone - mixed) / (alone - base[key][0])

    rows = {}
    for method, switch in (("refl", 10), ("imagerefl", 30)):
        name = f"{evaluate.NAMES[method]}, switch {switch}"
        rows[f"{name}: share of the lost diversity that is back"] = [
            recovered(s, method, switch, "diversity") for s in seeds
        ]
        rows[f"{name}: share of the gained reward that is lost"] = [
            recovered(s, method, switch, trained) for s in seeds
        ]
    table("2. Combined generation", rows)

    rows = {"ImageReFL, switch 30: diversity": [s.at("imagerefl", "switch", 30, "diversity") for s in seeds]}
    for name, kind in (("ReFL Combined", "switch"), ("ReFL AIG", "aig")):
        for what in ("held-out reward", "right concept, %", "trained reward"):
            ahead = []
            for s, diversity in zip(seeds, list(rows.values())[0], strict=True):
                other = s.at_diversity("refl", kind, diversity, keys[what])
                ours = s.at("imagerefl", "switch", 30, keys[what])
                ahead.append(None if other is None else ours - other)
            rows[f"{what}, ahead of {name} at that diversity"] = ahead
    table("3. ImageReFL at 30 + 10 against ReFL at equal diversity", rows)

    rows = {}
    for method in ("refl", "imagerefl"):
        rows[f"{evaluate.NAMES[method]} alone: trained reward"] = change(method, 0, trained)
        rows[f"{evaluate.NAMES[method]} alone: held-out reward"] = change(method, 0, judge)
    table("4. Do the two rewards agree? Change against the base", rows)
    return "\n".join(lines) + "\n"


def main(args) -> None:
    plan = QUICK if args.quick else Plan()
    folder = Path(args.output_dir or f"runs/reproduction{'-quick' * args.quick}")
    runs = [
        train(folder, method, seed, updates)
        for seed in plan.seeds
        for method, updates in (("refl", plan.refl), ("imagerefl", plan.imagerefl))
    ]
    asked = [f"--checkpoint={path}" for path in runs] + [f"--output-dir={folder}", *plan.evaluation]
    results = evaluate.main(evaluate.parse_args(asked))
    text = claims([Curves(results, folder, seed) for seed in plan.seeds])
    state.write_text(folder / "claims.md", text)
    print("\n" + text)


if __name__ == "__main__":
    run(main, ARGS)
