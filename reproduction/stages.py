"""Stages that are resumed: a table of them, what is left of each, and the commands that they call."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils import disk

ROOT = Path(__file__).parent.parent


@dataclass
class Stage:
    """`done` looks at the results on disk, not at what an earlier process has noted; `run` does what is left."""

    name: str
    done: Callable[[], bool]
    run: Callable[[], None]
    updates: int = 0  # of a training
    log: Path | None = None  # its log.jsonl, from which the rate is known after the first updates

    def logged(self) -> tuple[int, float]:
        """Number of updates so far, and their seconds."""
        rows = self.log.read_text().splitlines() if self.log and self.log.is_file() else []
        seconds = [json.loads(row).get("seconds", 0) for row in rows if row.endswith("}")]
        return len(seconds), sum(seconds)


class Notes:
    """A small JSON file in the folder of a reproduction: settings, what was checked, seconds of stages."""

    def __init__(self, folder: Path):
        self.path = folder / "reproduction.json"
        try:
            self.values = json.loads(self.path.read_text()) if self.path.is_file() else {}
        except ValueError:
            raise ValueError(f"{self.path}: damaged; remove it, results are kept") from None

    def write(self, **values) -> None:
        self.values |= values
        disk.write_text(self.path, json.dumps(self.values, indent=1) + "\n")

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took that ran in one go."""
        return self.values.get("seconds", {})

    def petaflop(self, stage: Stage) -> float:
        return self.values.get("petaflops", {}).get(stage.name, 0.0)

    def check_settings(self, settings: dict) -> None:
        """Note the settings of a new reproduction. Raises ValueError if the folder holds one with others."""
        before = self.values.get("settings", settings)
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]
        if changed:
            place, remedy = self.path.parent, "repeat its command, or name another --output-dir"
            raise ValueError(f"{place}: holds a reproduction with other flags ({', '.join(changed)}); {remedy}")
        self.write(settings=settings)


def rate(stages: list[Stage], notes: Notes) -> tuple[float, str]:
    """PFLOP per second, and the stage where it was measured last; 0 before the first updates."""
    measured = (0.0, "")
    for stage in stages:
        count, seconds = stage.logged()
        if count and seconds:
            measured = notes.petaflop(stage) * count / stage.updates / seconds, stage.name
        elif notes.seconds.get(stage.name) and notes.petaflop(stage):
            measured = notes.petaflop(stage) / notes.seconds[stage.name], stage.name
    return measured


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def what_is_left(stage: Stage, stages: list[Stage], notes: Notes) -> str:
    """Arithmetic of a stage that is not done, and its time at the measured rate."""
    petaflop, (speed, where), count = notes.petaflop(stage), rate(stages, notes), stage.logged()[0]
    if not petaflop:
        return ""
    left = petaflop * (1 - count / stage.updates) if count else petaflop
    time = f"about {duration(left / speed)} at the rate of {where}" if speed else "time known after the first updates"
    return f"{left:,.4g} PFLOP, {time}"


def table(stages: list[Stage], notes: Notes) -> str:
    """All stages with their state, and what is left of each."""
    lines = []
    for stage in stages:
        count = stage.logged()[0]
        if stage.done():
            text = f"done in {duration(notes.seconds[stage.name])}" if stage.name in notes.seconds else "done"
        else:
            progress = f"{count} of {stage.updates} updates; " if count else ""
            text = progress + (what_is_left(stage, stages, notes) or "open")
        lines.append(f"{stage.name:18} {text}")
    return "\n".join(lines)


def run(stages: list[Stage], notes: Notes) -> None:
    """Run what is left, stage by stage, after a table of all."""
    print(table(stages, notes), flush=True)
    for stage in stages:
        if stage.done():
            continue
        left = what_is_left(stage, stages, notes)
        print(f"\n== {stage.name}{': ' + left if left else ''}", flush=True)
        begun, start = notes.values.get("begun", []), time.time()
        notes.write(begun=[*begun, stage.name])
        stage.run()
        if stage.name not in begun:
            notes.write(seconds=notes.seconds | {stage.name: round(time.time() - start, 1)})


def call(script: str, flags: list[str], lock) -> None:
    """Run a command of this repository; its output goes to the terminal. Ctrl-C reaches it, so that it can save.

    lock: the open file of the folder's lock, which the command inherits: while it lives, no second reproduction starts.
    Raises ValueError when it fails.
    """
    descriptors = (lock.fileno(),) if os.name == "posix" else ()
    process = subprocess.Popen([sys.executable, str(ROOT / script), *flags], pass_fds=descriptors)
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),  # the terminal sends it to both
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        raise ValueError(f"{script} ended with exit code {code}, see above; the same command continues")
