"""Check and measure the whole system on a GPU that is available for minutes only: one command, most important first.

    python benchmarks/gpu.py --dry-run                         the rows in order, with their predicted seconds
    python benchmarks/gpu.py --time-left 480                   on the GPU
    python benchmarks/gpu.py --device cpu --sizes tiny         a rehearsal on a CPU, which measures nothing

(a) bf16 and compiled code against float32, and ours against diffusers; (b) updates of SD1.5 at 512 pixels, 8 images;
(c) sampling; (d) 50 updates of the tiny base against a CPU, and resuming; (e) updates of SDXL at 512 pixels; (f)
variants that might be faster. Every row is printed and written as soon as it is done. A row that is predicted to take
longer than the time that is left is skipped, and one that runs out of time is stopped; a second call can run those
with `--rows`. Weights are random and nothing is downloaded. Rows that need diffusers are skipped without it.
"""

import json
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.options import gpu_args
from utils.cli import check_writable, run

RESERVE = 5.0  # seconds kept to write the results and exit


@dataclass(frozen=True)
class Row:
    """`seconds`: predicted for an H100 and its 16 CPU cores, with compilation; measured where `measured` is True."""

    name: str
    seconds: float
    measured: bool
    words: str
    needs_diffusers: bool = False


ROWS = (
    Row("a-unet", 68, True, "UNet in bf16, eager and compiled, against float32 and autocast"),
    Row("a-decoder", 18, True, "decoder likewise"),
    Row("a-rewards", 12, True, "gradient of each reward in bf16 against float32 and autocast"),
    Row("a-updates", 22, True, "gradient of one update of each method in bf16 against float32 and autocast"),
    Row("a-diffusers", 17, True, "gradient of one update of each method against diffusers, float32", True),
    Row("a-no-wait", 8, True, "the host never waits for the device in a micro-batch"),
    Row("b-eager", 21, True, "updates of each method, eager: s, TFLOP/s, MFU, peak GB"),
    Row("b-diffusers", 30, True, "the same updates composed from diffusers", True),
    Row("b-plan", 5, False, "peak GB that `train.py --plan` predicts"),
    Row("b-compiled", 220, False, "the same updates compiled, after comparing compiled with eager gradients"),
    Row("c-sample", 160, False, "40 steps without guidance: ours and diffusers, eager and compiled"),
    Row("c-guided", 100, False, "40 steps with guidance likewise"),
    Row("d-tiny", 82, True, "50 updates of the tiny base on the device and on the CPU; resume after 25"),
    Row("d-commands", 250, False, "train.py --compile and sample.py as they are typed, with a folder of SD1.5's size"),
    Row("e-lora", 99, True, "updates of SDXL with --lora 16: s, peak GB"),
    Row("e-full", 80, False, "updates of SDXL, all weights: s, peak GB"),
    Row("f-eager", 6, True, "UNet without gradients, eager: memory formats, attention, milliseconds by kind of kernel"),
    Row("f-cudnn-attention", 20, False, "eager updates with cuDNN's attention"),
    Row("f-several-t_f", 20, False, "a ReFL update with two t_f from one rollout"),
    Row("f-reduce-overhead", 60, False, "UNet without gradients, CUDA graphs"),
    Row("f-regional", 90, False, "updates with each block compiled on its own"),
    Row("f-channels-last", 250, False, "compiled updates with the trained UNet in channels_last"),
    Row("f-max-autotune", 250, False, "UNet without gradients, max-autotune"),
)


class OutOfTime(BaseException):
    """Raised inside a row by the alarm; a BaseException, so that no library catches it."""


def chosen_rows(args: Namespace) -> list[Row]:
    """The rows to run. Raises ValueError for an unknown row or group."""
    names = [row.name for row in ROWS]
    for name in args.rows or []:
        if name not in names:
            raise ValueError(f"--rows {name}: unknown; known: {', '.join(names)}")
    for group in args.groups:
        if group not in {name[0] for name in names}:
            raise ValueError(f"--groups {args.groups}: there is no group {group!r}")
    return [row for row in ROWS if row.name[0] in args.groups and (not args.rows or row.name in args.rows)]


def print_order(rows: list[Row]) -> None:
    end = 0.0
    print("predicted for an H100 (* as measured on one): seconds, and when the row ends\n")
    for row in rows:
        end += row.seconds
        note = " (needs diffusers)" if row.needs_diffusers else ""
        print(f"{row.name:20}{row.seconds:5.0f}{'*' if row.measured else ' '}{end:7.0f}  {row.words}{note}")


class Results:
    """Results so far. Written to OUTPUT.json and OUTPUT.md after every row, so that nothing is lost."""

    def __init__(self, output: str, about: dict):
        self.path, self.about, self.rows = Path(output), about, []

    def add(self, row: Row, status: str, seconds: float, values: dict) -> None:
        self.rows.append(
            {"row": row.name, "what": row.words, "status": status, "seconds": round(seconds, 1), "values": values}
        )
        print(f"{row.name:20}{seconds:6.1f} s  {status}", flush=True)
        for key, value in values.items():
            print(f"    {key}: {value}", flush=True)
        self.write()

    def write(self) -> None:
        from utils import disk  # slow: it imports torch

        content = json.dumps({"machine": self.about, "rows": self.rows}, indent=1)
        disk.write_text(self.path.with_suffix(".json"), content + "\n")
        lines = ["# On a GPU", "", f"{', '.join(f'{key} {value}' for key, value in self.about.items())}.", ""]
        lines += ["| row | what | status | s | results |", "|---|---|---|---|---|"]
        for row in self.rows:
            values = "; ".join(f"{key}: {value}" for key, value in row["values"].items()).replace("|", "/")
            lines.append(f"| {row['row']} | {row['what']} | {row['status']} | {row['seconds']} | {values} |")
        disk.write_text(self.path.with_suffix(".md"), "\n".join(lines) + "\n")


def run_row(call: Callable[[], dict], seconds: float) -> tuple[str, dict]:
    """(status, values) of a row that is stopped after `seconds`. Errors are results too: the next row still runs."""

    def stop(*_) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        values = call()
        return ("FAILED" if values.get("failed") else "ok"), values
    except OutOfTime:
        return "stopped: out of time", {}
    except Exception as error:  # whatever goes wrong in a row must not lose the others
        traceback.print_exc()
        return "ERROR", {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_rows(
    rows: list[Row],
    functions: dict[str, Callable[[], dict]],
    results: Results,
    end: float,
    predict: Callable[[Row], float] = lambda row: row.seconds,
) -> None:
    """Run the rows that fit before `end`, on the clock of `time.monotonic`. A row without a function is skipped."""
    for row in rows:
        began = time.monotonic()
        left = end - RESERVE - began
        if row.name not in functions:
            results.add(row, "skipped: diffusers is not installed", 0, {})
        elif left < predict(row):
            results.add(row, f"skipped: {predict(row):.0f} s predicted, {max(left, 0):.0f} s left", 0, {})
        else:
            status, values = run_row(functions[row.name], left)
            results.add(row, status, time.monotonic() - began, values)


def main(args: Namespace) -> None:
    end = time.monotonic() + args.time_left
    rows = chosen_rows(args)
    if args.dry_run:
        return print_order(rows)
    check_writable(Path(args.output).parent)

    from benchmarks import gpu_rows, networks

    missing = set() if networks.has_diffusers() else {row.name for row in rows if row.needs_diffusers}
    with gpu_rows.session(args) as (functions, about):
        functions = {name: f for name, f in functions.items() if name not in missing}
        results = Results(args.output, about)
        # The predictions are for full sizes; a rehearsal tries every row.
        run_rows(rows, functions, results, end, (lambda _: 1.0) if args.sizes == "tiny" else (lambda row: row.seconds))
    bad = [row["row"] for row in results.rows if row["status"] in ("FAILED", "ERROR")]
    print(f"written to {args.output}.json and .md")
    if bad:
        raise ValueError(f"failed: {', '.join(bad)}")


if __name__ == "__main__":
    run(main, gpu_args(__doc__))
