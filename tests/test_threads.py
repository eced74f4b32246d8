"""Threads: quotas of control groups, and other programs' load."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from speed import threads

ROOT = Path(__file__).parent.parent
V2 = ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0", "0::/a/b")
V1 = ("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu,cpuacct 0 0", "4:cpu,cpuacct:/a/b")


def fake(root: Path, kind: tuple[str, str], files: dict[str, str]) -> Path:
    """A root of the file system with a process's mounts, its control group, and the files of its groups."""
    for name, text in {"proc/self/mounts": kind[0], "proc/self/cgroup": kind[1], **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    "kind, files, expected",
    [
        (V2, {"sys/fs/cgroup/a/b/cpu.max": "150000 100000"}, 1.5),
        (V2, {"sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2),
        (V2, {"sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),  # a container sees its own group as the root
        (V2, {"sys/fs/cgroup/other/cpu.max": "50000 100000"}, math.inf),
        (V2, {"sys/fs/cgroup/cpu.max": "nonsense"}, math.inf),
        (V1, {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, math.inf),
        (V1, {}, math.inf),
    ],
)
def test_quotas_of_control_groups(tmp_path, kind, files, expected):
    assert threads.quota(fake(tmp_path, kind, files)) == expected


def test_no_quota_without_control_groups(tmp_path):
    assert threads.quota(tmp_path) == math.inf


@pytest.fixture
def machine(monkeypatch):
    """A machine of four cores whose time and load the test sets; torch's number of threads is put back."""
    before, now, busy = torch.get_num_threads(), [0.0], [0.0]
    for name in threads.USER_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "quota", lambda: math.inf)
    monkeypatch.setattr(threads, "busy_seconds", lambda cores: busy[0] + sum(os.times()[:2]))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    torch.set_num_threads(4)

    def after(seconds: float, others: float) -> None:
        now[0] += seconds
        busy[0] += seconds * others

    yield after
    torch.set_num_threads(before)


def test_threads_follow_the_load_down_and_up_again(machine):
    follow = threads.Threads()
    follow.follow_load()
    for others, expected in ((0.1, 4), (1.0, 3), (0.7, 3), (2.2, 2), (9, 1), (0, 4)):
        machine(2, others)
        follow.follow_load()
        assert torch.get_num_threads() == expected, others
    machine(0.5, 4)
    follow.follow_load()  # too early to tell
    assert torch.get_num_threads() == 4


def test_a_quota_limits_the_threads_whatever_is_free(machine, monkeypatch):
    monkeypatch.setattr(threads, "quota", lambda: 2.5)
    follow = threads.Threads()
    assert torch.get_num_threads() == 2
    follow.follow_load(), machine(2, 0), follow.follow_load()
    assert torch.get_num_threads() == 2


def test_what_the_user_set_is_left_alone(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    follow = threads.Threads()
    follow.follow_load(), machine(2, 4), follow.follow_load()
    assert torch.get_num_threads() == 3


def test_a_later_call_of_set_num_threads_is_left_alone(machine):
    follow = threads.Threads()
    follow.follow_load(), machine(2, 1), follow.follow_load()
    assert torch.get_num_threads() == 3
    torch.set_num_threads(2)
    for _ in range(2):
        machine(2, 0)
        follow.follow_load()
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_a_busy_process_is_seen():
    cores, before, own = os.sched_getaffinity(0), time.monotonic(), sum(os.times()[:2])
    busy = threads.busy_seconds(cores)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as loop:
        time.sleep(1.0)
        loop.kill()
    others = threads.busy_seconds(cores) - busy - (sum(os.times()[:2]) - own)
    assert others >= 0.3 * (time.monotonic() - before)
