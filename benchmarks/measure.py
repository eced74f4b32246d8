"""Seconds and peak memory of a call, measured in turns with other ways to do the same work."""

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from training import cost, presets

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Side:
    """One way to do the work. `run` does it once; `kept` returns the tensors that stay in memory between calls.

    `engine_gb`: what another engine keeps, whose weights are no tensors. `startup`: seconds from its files to the first
    result, less those of a later call, if measured.
    """

    run: Callable[[], object]
    kept: Callable[[], list[Tensor]]
    engine_gb: float = 0.0
    startup: float | None = None


def tensors_of(*owners: nn.Module | torch.optim.Optimizer) -> list[Tensor]:
    """Weights of modules and state of optimizers."""
    found = []
    for owner in owners:
        if isinstance(owner, nn.Module):
            found += owner.state_dict().values()
        else:
            found += [t for state in owner.state.values() for t in state.values() if isinstance(t, Tensor)]
    return found


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process in bytes: now, and its peak since the last `reset_peak` (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (1024 * int(status[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    return now, peak


def reset_peak() -> None:
    """Reset the peak of `resident_bytes`, after returning freed memory to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def timed(side: Side, device: str) -> tuple[float, float]:
    """Seconds of one call and its peak memory in GB (1e9 bytes): what the side keeps plus what the call allocates."""
    if device == "cpu":
        reset_peak()
        before = resident_bytes()[0]
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    side.run()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = resident_bytes()[1] if device == "cpu" else torch.cuda.max_memory_allocated()
    kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in side.kept()}.values())
    return seconds, (kept + peak - before) / 1e9


def measure(sides: dict[str, Side], device: str, repeats: int, seconds: float) -> dict[str, dict]:
    """Median seconds and peak of each side over `repeats` turns, after one warm-up call of each.

    The sides take turns, in reversed order every other time. Stops after `seconds`, but not before three turns.
    """
    for side in sides.values():
        timed(side, device)
    runs: dict[str, list] = {name: [] for name in sides}
    began = time.perf_counter()
    for turn in range(repeats):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            runs[name].append(timed(sides[name], device))
        if turn >= 2 and time.perf_counter() - began > seconds:
            break
    return {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in values),
            "runs": [round(seconds, 5) for seconds, _ in values],
            "peak_gb": round(max(peak for _, peak in values) + sides[name].engine_gb, 3),
        }
        | ({} if sides[name].startup is None else {"startup": round(sides[name].startup, 2)})
        for name, values in runs.items()
    }


def count_tflop(run: Callable[[], object]) -> float:
    """TFLOP of one call."""
    with cost.counter() as counted:
        run()
    return counted.get_total_flops() / 1e12


def machine(device: str) -> dict:
    """What the numbers depend on: date, hardware, its measured matrix rates (on a GPU in bf16 only), versions."""
    found = {"date": date.today().isoformat(), "device": device, "threads": torch.get_num_threads()}
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    found |= {"cpu": cpu[0].split(":")[1].strip() if cpu else platform.machine(), "cores": os.cpu_count()}
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    for name, dtype in DTYPES.items():
        if device == "cpu" or name == "bf16":
            found[f"{name}_tflops"] = float(f"{cost.matrix_rate(device, dtype) / 1e12:.3g}")
    for package in ("torch", "transformers", "diffusers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"python": platform.python_version(), "imagerefl": presets.VERSION}
