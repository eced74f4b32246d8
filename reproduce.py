"""Reproduce the paper's claims on the tiny base: train ReFL and ImageReFL with three seeds, evaluate, compare.

    python reproduce.py            # an hour on two cores with bf16
    python reproduce.py --quick    # one seed, fewer updates, prompts and points

Goes on where it was stopped. Writes `claims.md` into `runs/reproduction`, and for each of two ways to train ImageReFL
beside ReFL what `evaluate.py` does.
"""

from utils.cli import Parser, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer updates, prompts and points")
    parser.add_argument("--output-dir", help="default: runs/reproduction, or runs/reproduction-quick")
    return parser.parse(argv)


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports, so that --help answers at once

import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import mean, stdev  # noqa: E402

import torch  # noqa: E402

import evaluate  # noqa: E402
from training.presets import TINY  # noqa: E402
from utils import disk  # noqa: E402

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Way:
    """One way to tune: the name of its runs, the method, updates, more flags of train.py, and what sets it apart."""

    name: str
    method: str
    updates: int
    flags: tuple[str, ...] = ()
    about: str = ""

    @property
    def title(self) -> str:
        return f"{evaluate.METHODS[self.method]}, {self.updates} updates{self.about}"


def ways_of(refl: int, imagerefl: int) -> tuple[Way, ...]:
    """ImageReFL twice: with the paper's weight of its diffusion loss, and with a stronger one.

    The paper's 1e-5 for the diffusion loss against 1e-3 for the reward is a balance of two numbers whose gradients
    have other sizes on the tiny base; there 1e-3 is what keeps the model a denoiser.
    """
    return (
        Way("refl", "refl", refl),
        Way("imagerefl", "imagerefl", imagerefl),
        Way("imagerefl-prior", "imagerefl", imagerefl, ("--diffusion-scale", "1e-3"), ", k_D = 1e-3"),
    )


@dataclass(frozen=True)
class Plan:
    """The size of a reproduction."""

    ways: tuple[Way, ...] = ways_of(TINY.updates["refl"], TINY.updates["imagerefl"])
    seeds: tuple[int, ...] = (1, 2, 3)
    evaluation: tuple[str, ...] = ("--sweep=switch=0,5,10,15,20,25,30,35", "--sweep=aig=1,2,4")


QUICK = Plan(
    ways=ways_of(30, 60),
    seeds=(1,),
    evaluation=("--limit=32", "--sweep=switch=0,10,30,35", "--sweep=aig=1,4"),
)


def call(script: str, flags: list[str], place: Path, threads: int) -> None:
    """Run a command of this folder with so many threads; what it prints goes to the end of the model's log."""
    command, limits = [sys.executable, str(HERE / script), *flags], {"OMP_NUM_THREADS": str(threads)}
    with open(f"{place}.log", "a") as log:
        subprocess.run(command, env=os.environ | limits, stdout=log, stderr=subprocess.STDOUT)


def train(place: Path, way: Way, seed: int, threads: int) -> None:
    """Train one model unless it is there; a run that was stopped goes on. Raises ValueError when it stops again."""
    result = place / "unet" / "config.json"  # written last
    if result.exists():
        return
    if (place / "run.json").exists():
        flags = ["--resume", str(place)]
    else:
        flags = ["--method", way.method, "--steps", str(way.updates), "--seed", str(seed), *way.flags]
        flags += ["--output-dir", str(place), "--sample-every", "25", "--monitor", "25"]
    print(f"training {place}, see {place}.log", flush=True)
    call("train.py", flags, place, threads)
    if not result.exists():
        raise ValueError(f"training stopped, see {place}.log; call reproduce.py again to go on")


def train_all(folder: Path, plan: Plan) -> dict[tuple[Way, int], Path]:
    """Train and sample the models of a plan, side by side on a CPU, where a second core speeds up none by much."""
    places = {(way, seed): folder / f"{way.name}-{seed}" for seed in plan.seeds for way in plan.ways}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    together = 1 if torch.cuda.is_available() else min(cores, len(places))
    folder.mkdir(parents=True, exist_ok=True)

    def make(way: Way, seed: int, place: Path) -> None:
        train(place, way, seed, cores // together)
        own = folder / "evaluation" / place.name
        if not (own / "results.json").exists():  # what fails here fails in `main` too, and is told there
            print(f"evaluating {place}", flush=True)
            call("evaluate.py", evaluation(folder, own, [place], plan), place, cores // together)

    pool = ThreadPoolExecutor(together)
    try:
        runs = [pool.submit(make, *which, place) for which, place in places.items()]
        for run_of_one in runs:
            run_of_one.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return places


def evaluation(folder: Path, output: Path, models: list[Path], plan: Plan) -> list[str]:
    """Flags of evaluate.py. Everything that it makes is kept in one place, for the next call to find."""
    flags = [f"--points={folder / 'points'}", f"--output-dir={output}", "--images-per-prompt=4", *plan.evaluation]
    return flags + [f"--checkpoint={model}" for model in models]


class Curves:
    """The evaluated points of one seed, by method and kind."""

    def __init__(self, results: dict, folder: Path, seed: int):
        self.points, self.place = results["points"], lambda name: str(folder / f"{name}-{seed}")
        bases = {p["label"]: p["values"] for p in self.points if p["checkpoint"] is None}
        self.base, self.plain = bases["Base"], bases["Base, no guidance"]

    def curve(self, name: str, kind: str) -> list[tuple[float, dict]]:
        """(switch or power, values) in order, from the tuned model alone; a switch curve ends in the base model."""
        own = [p for p in self.points if p["checkpoint"] == self.place(name)]
        own = [p for p in own if p["kind"] == kind or (p["kind"], p["value"]) == ("switch", 0)]
        curve = sorted({p["value"]: p["values"] for p in own}.items())
        return curve + [(40, self.base)] * (kind == "switch")

    def at(self, name: str, switch: int, key: str) -> float:
        return dict(self.curve(name, "switch"))[switch][key][0]

    def where(self, name: str, kind: str, axis: str, value: float, key: str) -> float | None:
        """`key` on a curve where `axis` has this value, by linear interpolation; None beyond its ends.

        The first such place from the tuned model alone, where a curve has more than one.
        """
        known = [(v[axis][0], v[key][0]) for _, v in self.curve(name, kind)]
        for (x0, y0), (x1, y1) in pairwise(known):
            if min(x0, x1) <= value <= max(x0, x1) and x0 != x1:
                return y0 + (y1 - y0) * (value - x0) / (x1 - x0)
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


def against_base(seeds: list[Curves], name: str) -> dict[str, list[float]]:
    """Change of each value from the base model to the tuned one alone, neither of them with guidance."""
    keys = KEYS | {"FID": "fid"}
    return {n: [s.at(name, 0, key) - s.plain[key][0] for s in seeds] for n, key in keys.items()}


def undone(seeds: list[Curves], name: str, switch: int) -> dict[str, list[float]]:
    """How much of what tuning changed a switch undoes, on the way to the base with guidance: 0 nothing, 1 all."""
    rows = {}
    for what in ("diversity", "trained reward"):
        key = KEYS[what]
        alone, mixed = ([s.at(name, n, key) for s in seeds] for n in (0, switch))
        rows[what] = mixed
        shares = [(a - m) / (a - s.base[key][0]) for a, m, s in zip(alone, mixed, seeds, strict=True)]
        rows[f"{what}: share of the change undone"] = shares
    return rows


def at_equal(seeds: list[Curves], name: str, axis: str) -> dict[str, list[float | None]]:
    """A run of ImageReFL at 30 + 10 minus ReFL Combined, and minus ReFL AIG, where their curves equal it in `axis`."""
    rows = {axis: [s.at(name, 30, KEYS[axis]) for s in seeds]}
    for other, kind in (("ReFL Combined", "switch"), ("ReFL AIG", "aig")):
        for what, key in KEYS.items():
            if what != axis:
                theirs = [s.where("refl", kind, KEYS[axis], v, key) for s, v in zip(seeds, rows[axis], strict=True)]
                ours = [s.at(name, 30, key) for s in seeds]
                pairs = zip(ours, theirs, strict=True)
                rows[f"{what}, more than {other}"] = [None if b is None else a - b for a, b in pairs]
    return rows


def claims(results: dict, seeds: list[Curves], plan: Plan) -> str:
    """Means over the seeds, then the claims as Markdown tables: mean ± standard error over the seeds, and each seed."""
    lines = means(results, seeds, plan)
    for way in plan.ways:
        lines += table(f"1, 4. {way.title}, alone: change against the base", against_base(seeds, way.name))
    for way in plan.ways:
        switch = TINY.switch[way.method]
        lines += table(f"2. {way.title}, switch {switch}", undone(seeds, way.name, switch))
    for way in plan.ways:
        for axis in ("diversity", "trained reward") if way.method == "imagerefl" else ():
            lines += table(f"3. {way.title}, switch 30, at equal {axis}", at_equal(seeds, way.name, axis))
    return "\n".join(lines) + "\n"


def means(results: dict, seeds: list[Curves], plan: Plan) -> list[str]:
    """The paper's table, a row for each way to sample: mean over the seeds ± its standard error."""
    columns = results["columns"]
    lines = ["| | " + " | ".join(c["title"] for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]

    def row(label: str, values: list[dict]) -> None:
        cells = [said([v[c["key"]][0] for v in values], c["digits"]).split(" | ")[0] for c in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")

    row("Base", [seeds[0].base])
    row("Base, no guidance", [seeds[0].plain])
    for way in plan.ways:
        switch = TINY.switch[way.method]
        row(f"{way.title}, alone", [dict(s.curve(way.name, "switch"))[0] for s in seeds])
        if way.method == "refl":
            row(f"{way.title}, AIG", [dict(s.curve(way.name, "aig"))[1.0] for s in seeds])
        row(
            f"{way.title}, combined {switch} + {40 - switch}",
            [dict(s.curve(way.name, "switch"))[switch] for s in seeds],
        )
    return lines


def main(args) -> None:
    plan = QUICK if args.quick else Plan()
    folder = Path(args.output_dir or f"runs/reproduction{'-quick' * args.quick}")
    evaluate.main(evaluate.parse_args(evaluation(folder, folder / "evaluation" / "base", [], plan)))
    places = train_all(folder, plan)
    (refl, *others), points = plan.ways, []
    for way in others:
        models = [places[one, seed] for one in (refl, way) for seed in plan.seeds]
        results = evaluate.main(evaluate.parse_args(evaluation(folder, folder / way.name, models, plan)))
        points += results["points"]
    results |= {"points": points}
    text = claims(results, [Curves(results, folder, seed) for seed in plan.seeds], plan)
    disk.write_text(folder / "claims.md", text)
    print("\n" + text)


if __name__ == "__main__":
    run(main, ARGS)
