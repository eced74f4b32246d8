"""Seconds of the main job's update on a busy or limited machine, with threads that follow the load and without.

    python benchmarks/load.py                    about 15 minutes on two cores, which must be quiet otherwise

Trains the tiny base alone, beside one and beside two busy loops, and with a quota of half the cores (control groups
v1; it needs root, and is left out without), in turns: as it is, and with OMP_NUM_THREADS set to all cores, which the
threads then do not leave. Reported is the mean of three updates of ImageReFL and one of ReFL, after four others; the
median over turns; and its ratio to the quiet time of all cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import disk

ROOT = Path(__file__).parent.parent
LOOP = [sys.executable, "-c", "while True: pass"]
GROUP = Path("/sys/fs/cgroup/cpu/imagerefl-benchmark")
UPDATES = 8
CORES = len(os.sched_getaffinity(0))


@contextmanager
def loops(count: int) -> Iterator[None]:
    """`count` processes that each keep a core busy."""
    started = [subprocess.Popen(LOOP) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def seconds_per_update(folder: Path, threads: int | None, group: Path | None) -> float:
    """Mean of the last four of eight updates; `threads`: fixed, or None for those that follow the load."""
    (folder / "prompts.txt").write_text("octopus\n")
    command = [sys.executable, "train.py", "--base", "tiny", "--sample-every", "0", "--output-dir", str(folder / "run")]
    command += ["--prompts", str(folder / "prompts.txt"), "--device", "cpu"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if group:
        (group / "cgroup.procs").write_text(str(process.pid))
    log, rows = folder / "run" / "log.jsonl", []
    while len(rows) < UPDATES and process.poll() is None:
        time.sleep(0.5)
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    if process.poll() is None:
        process.kill()
    errors = process.communicate()[1]
    if len(rows) < UPDATES:
        raise RuntimeError(errors.decode()[-500:])
    return statistics.mean(row["seconds"] for row in rows[4:UPDATES])


def quota() -> Path | None:
    """A control group that grants half the cores, or None where it cannot be made."""
    try:
        GROUP.mkdir(exist_ok=True)
        (GROUP / "cpu.cfs_period_us").write_text("100000")
        (GROUP / "cpu.cfs_quota_us").write_text(str(50_000 * CORES))
    except OSError:
        return None
    return GROUP


def main(turns: int) -> None:
    group = quota()
    situations = {"quiet": (0, None), "beside one loop": (1, None), "beside two loops": (2, None)}
    situations |= {f"quota of {CORES / 2:g} cores": (0, group)} if group else {}
    sides = {"follows the load": None, f"{CORES} threads": CORES}
    found = {situation: {side: [] for side in sides} for situation in situations}
    for turn in range(turns):
        for situation, (busy, limit) in situations.items():
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                with loops(busy), tempfile.TemporaryDirectory() as folder:
                    found[situation][side].append(seconds_per_update(Path(folder), sides[side], limit))
                print(f"{situation}, {side}: {found[situation][side][-1]:.2f} s", flush=True)
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    quiet = statistics.median(found["quiet"][f"{CORES} threads"])
    lines = ["# An update of the main job on a busy machine", "", f"{cpu.split(':')[-1].strip()}, {CORES} cores.", ""]
    lines += [f"Seconds by `python benchmarks/load.py --turns {turns}`, and the ratio to {quiet:.2f} s.", ""]
    lines += [f"| | {' | '.join(sides)} |", "|---|---|---|"]
    for situation, times in found.items():
        medians = [statistics.median(values) for values in times.values()]
        lines.append(f"| {situation} | {' | '.join(f'{s:.2f} ({s / quiet:.2f})' for s in medians)} |")
    disk.write_text(ROOT / "benchmarks" / "results" / "load.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    if group:
        group.rmdir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="default: 3")
    main(parser.parse_args().turns)
