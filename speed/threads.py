"""As many threads as there are free CPU cores.

OpenMP's threads wait for each other in every operation, so one thread whose core another program uses delays all: two
threads on two cores, one of them busy, are slower than one thread. torch starts a thread per core, whatever a
container's quota and other programs' load. Here the number follows both. Results depend on it by rounding only. Where
OMP_NUM_THREADS or MKL_NUM_THREADS is set, as torchrun does, or torch.set_num_threads is called, nothing is changed.
"""

import math
import os
import time
from pathlib import Path

import torch

INTERVAL = 1.0  # seconds between two looks at the load
USER_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def quota(root: Path = Path("/")) -> float:
    """Cores that the control groups (v1 and v2) of this process grant it; infinite without a limit (Linux)."""
    granted = math.inf
    try:
        mounts = [line.split() for line in (root / "proc/self/mounts").read_text().splitlines()]
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return granted
    for _, mount, kind, options, *_ in mounts:
        if kind != "cgroup2" and not (kind == "cgroup" and "cpu" in options.split(",")):
            continue
        top = root / mount.lstrip("/")
        for _, controllers, path in groups:
            if (kind == "cgroup2") != (controllers == "") or (controllers and "cpu" not in controllers.split(",")):
                continue
            own = top / path.lstrip("/")  # the limits of its parents hold too; in a container the path may not exist
            for folder in (own, *own.parents):
                if folder.is_relative_to(top):
                    granted = min(granted, limit(folder))
    return granted


def limit(group: Path) -> float:
    """Cores that one control group grants."""
    try:
        if (group / "cpu.max").exists():
            most, period = (group / "cpu.max").read_text().split()
        else:
            most, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if most in ("max", "-1") else int(most) / int(period)
    except (OSError, ValueError):
        return math.inf


def busy_seconds(cores: set[int]) -> float:
    """Seconds, since the machine started, that these cores were not idle (Linux)."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


class Threads:
    """Sets the number of torch's threads in the calling thread."""

    def __init__(self):
        self.cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        self.most = max(1, math.floor(min(torch.get_num_threads(), quota())))
        self.fixed = any(os.environ.get(name) for name in USER_SETTINGS) or not os.path.exists("/proc/stat")
        self.chosen, self.looked = self.most, -math.inf
        if not self.fixed:
            torch.set_num_threads(self.most)

    def follow_load(self) -> None:
        """Once a second: use the cores that other programs left free since the last look, and at least one."""
        now = time.monotonic()
        if self.fixed or now - self.looked < INTERVAL:
            return
        if torch.get_num_threads() != self.chosen:  # somebody else has set it
            self.fixed = True
            return
        own = os.times()
        busy = busy_seconds(self.cores) - own.user - own.system
        if math.isfinite(self.looked):
            others = (busy - self.busy) / (now - self.looked)
            self.chosen = min(self.most, max(1, round(len(self.cores) - others)))
            torch.set_num_threads(self.chosen)
        self.looked, self.busy = now, busy


threads = Threads()


def follow_load(*_) -> None:
    """`Threads.follow_load` of this process; also a forward pre-hook."""
    threads.follow_load()
