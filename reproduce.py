"""Reproduce the paper's claims on the tiny base: train ReFL and ImageReFL with three seeds, evaluate, compare.

    python reproduce.py            # under two hours on two cores
    python reproduce.py --quick    # one seed, shorter: the same directions in a quarter of an hour

Goes on where it was stopped. Writes `claims.md` into `runs/reproduction`, beside what `evaluate.py` writes for the base
model with guidance, as in the paper, and without.
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
        "--sweep=switch=0,5,10,15,20,25,30,35",
        "--sweep=aig=1,2,4",
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


KEYS = {"trained reward": "tiny", "held-out reward": "tiny2", "right concept, %": "concept", "diversity": "diversity"}


def table(title: str, rows: dict[str, list[float | None]]) -> list[str]:
    lines = ["", f"**{title}**", "", "| | mean ± error | seeds |", "|---|---|---|"]
    return lines + [f"| {name} | {said(values)} |" for name, values in rows.items()]


def against_base(seeds: list[Curves], method: str) -> dict[str, list[float]]:
    """Change of each value from the base model to the tuned one alone."""
    keys = KEYS | {"FID": "fid"}
    return {n: [s.at(method, "switch", 0, key) - s.base[key][0] for s in seeds] for n, key in keys.items()}


def recovered(seeds: list[Curves], method: str, switch: int) -> dict[str, list[float]]:
    """How much of what tuning changed is undone by a switch: 0 nothing, 1 all."""
    rows = {}
    for name in ("diversity", "trained reward", "held-out reward"):
        key = KEYS[name]
        alone = [s.at(method, "switch", 0, key) for s in seeds]
        mixed = [s.at(method, "switch", switch, key) for s in seeds]
        shares = [(a - m) / (a - s.base[key][0]) for a, m, s in zip(alone, mixed, seeds, strict=True)]
        rows[f"{evaluate.NAMES[method]}, switch {switch}: {name}, share undone"] = shares
        rows[f"{evaluate.NAMES[method]}, switch {switch}: {name}"] = mixed
    return rows


def at_equal_diversity(seeds: list[Curves]) -> dict[str, list[float | None]]:
    """ImageReFL at 30 + 10 minus ReFL Combined, and minus ReFL AIG, where their curves have its diversity."""
    rows = {"diversity of ImageReFL": [s.at("imagerefl", "switch", 30, "diversity") for s in seeds]}
    for name, kind in (("ReFL Combined", "switch"), ("ReFL AIG", "aig")):
        for what in ("held-out reward", "right concept, %", "trained reward"):
            ahead = []
            for s, diversity in zip(seeds, rows["diversity of ImageReFL"], strict=True):
                other = s.at_diversity("refl", kind, diversity, KEYS[what])
                ours = s.at("imagerefl", "switch", 30, KEYS[what])
                ahead.append(None if other is None else ours - other)
            rows[f"{what}, ahead of {name}"] = ahead
    return rows


def means(results: dict) -> list[str]:
    """The table of results, a row for each way to sample: mean over the seeds ± its standard error."""
    labels = dict.fromkeys(p["label"] for p in results["points"] if p["row"])
    columns = results["columns"]
    lines = ["| | " + " | ".join(c["title"] for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label in labels:
        own = [p["values"] for p in results["points"] if p["row"] and p["label"] == label]
        cells = [said([v[c["key"]][0] for v in own], c["digits"]).split(" | ")[0] for c in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def claims(guided: list[Curves], plain: list[Curves]) -> str:
    """The claims as Markdown tables: a line each, mean ± standard error over the seeds, and every seed.

    A tuned model runs without guidance. So `plain`, where the base model does too, compares like with like; `guided`
    is the paper's setting.
    """
    lines, sides = [], {"with guidance": guided, "without guidance": plain}
    for name, seeds in sides.items():
        values = ", ".join(f"{title} {seeds[0].base[key][0]:.3f}" for title, key in (KEYS | {"FID": "fid"}).items())
        lines.append(f"The base model {name}: {values}.\n")
    for name, seeds in sides.items():
        for method in ("refl", "imagerefl"):
            title = f"1, 4. {evaluate.NAMES[method]} alone, change against the base {name}"
            lines += table(title, against_base(seeds, method))
    for name, seeds in sides.items():
        rows = recovered(seeds, "refl", 10) | recovered(seeds, "imagerefl", 30)
        lines += table(f"2. Combined generation, the base {name}", rows)
    for name, seeds in sides.items():
        lines += table(f"3. ImageReFL at 30 + 10 at equal diversity, the base {name}", at_equal_diversity(seeds))
    return "\n".join(lines) + "\n"


def main(args) -> None:
    plan = QUICK if args.quick else Plan()
    folder = Path(args.output_dir or f"runs/reproduction{'-quick' * args.quick}")
    runs = [
        train(folder, method, seed, updates)
        for seed in plan.seeds
        for method, updates in (("refl", plan.refl), ("imagerefl", plan.imagerefl))
    ]
    sides, tables = [], []
    for name, guidance in (("evaluation", TINY.guidance), ("evaluation-no-guidance", 1.0)):
        asked = [f"--checkpoint={path}" for path in runs] + [f"--points={folder / 'points'}", *plan.evaluation]
        results = evaluate.main(
            evaluate.parse_args([*asked, f"--guidance={guidance}", f"--output-dir={folder / name}"])
        )
        sides.append([Curves(results, folder, seed) for seed in plan.seeds])
        tables += [
            f"Guidance of the base model {guidance:g}; mean over seeds ± standard error:",
            "",
            *means(results),
            "",
        ]
    text = "\n".join(tables) + "\n" + claims(*sides)
    state.write_text(folder / "claims.md", text)
    print("\n" + text)


if __name__ == "__main__":
    run(main, ARGS)
