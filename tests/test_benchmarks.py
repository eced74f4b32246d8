"""The benchmarks run, and compare with diffusers before they measure; `gpu.py` keeps its order and its time limit."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_rewards import NAMES, folders  # noqa: F401

from benchmarks import bench, engines, gpu, networks, options, updates
from benchmarks.gpu_checks import MINI, MINI_VAE

ROOT = Path(__file__).parent.parent
TASK = updates.Task(MINI, MINI_VAE, 8, 1, 1, "cpu", "tiny")


def command(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)


def results(tmp_path: Path) -> gpu.Results:
    return gpu.Results(str(tmp_path / "out"), {"device": "none"})


def written(tmp_path: Path) -> dict[str, str]:
    """Row -> status, from the file."""
    return {row["row"]: row["status"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]}


@pytest.mark.parametrize("method", ["imagerefl", pytest.param("refl", marks=pytest.mark.slow)])
def test_an_update_is_compared_with_diffusers_before_it_is_timed(method, monkeypatch):
    reward = TASK.load_reward()
    assert updates.check_gradient(method, TASK, reward) < 1e-4
    loss = updates.our_loss
    monkeypatch.setattr(updates, "our_loss", lambda *args, **batch: 1.02 * loss(*args, **batch))
    with pytest.raises(ValueError, match="ours and diffusers' differ by 2.0e-02"):
        updates.check_gradient(method, TASK, reward)


def test_our_update_trains_the_weights():
    side = updates.our_sides(["imagerefl"], TASK, TASK.load_reward())["imagerefl"]
    before = [t.clone() for t in side.kept()]
    side.run()
    after = side.kept()
    assert any(not torch.equal(old, new) for old, new in zip(before, after[: len(before)], strict=True))
    assert len(after) > len(before)  # the optimizer's state


@pytest.mark.parametrize("name", NAMES)
def test_each_reward_with_random_weights_has_a_gradient(name, folders):  # noqa: F811
    reward = networks.random_reward(name, "cpu", folders[name])
    images = TASK.batch_of(2)["images"].requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, ["octopus"] * 2).sum(), images)
    assert gradient.isfinite().all() and gradient.abs().sum((1, 2, 3)).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", options.ENGINES)
def test_another_engine_computes_the_same(name):
    if engines.missing(name):
        pytest.skip(f"needs {', '.join(engines.missing(name))}")
    if name == "inductor" and not shutil.which("g++"):
        pytest.skip("needs g++")
    unet, vae = networks.unet_pair(MINI, "cpu", False)[0], networks.vae_pair(MINI_VAE, "cpu", False)[0]
    x, t = TASK.batch_of(2)["images"][:, :1, :8, :8].repeat(1, 4, 1, 1), torch.full((2,), 500)
    c = networks.conditioning(MINI, 2, "cpu", torch.float32)
    with torch.no_grad():
        engine = engines.Engine(name, unet, (x, t, *c.values()), torch.float32)
        networks.check_equal(engine(x, 30, **c), unet(x, 30, **c), 1e-4)  # another timestep than in the conversion
        decoder = engines.Engine(name, vae, (x,), torch.float32)
        networks.check_equal(decoder.decode(x), vae.decode(x), 1e-4)


def test_a_missing_engine_is_named(monkeypatch):
    monkeypatch.setattr(engines, "missing", lambda name: ["openvino"])
    with pytest.raises(ValueError, match="--engines openvino: pip install openvino"):
        bench.main(options.bench_args("", ["--engines", "openvino"]))


def test_networks_without_diffusers(monkeypatch):
    monkeypatch.setattr(networks, "has_diffusers", lambda: False)
    ours, theirs = networks.unet_pair(MINI, "cpu")
    assert theirs is None and not ours.training


def test_a_dry_run_prints_every_row_in_order_and_writes_nothing(tmp_path):
    done = command("benchmarks/gpu.py", "--dry-run", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = [line.replace("*", "").split() for line in done.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == [row.name for row in gpu.ROWS]
    assert [line[0][0] for line in lines] == sorted(line[0][0] for line in lines)  # (a) to (f)
    seconds, ends = ([float(line[i]) for line in lines] for i in (1, 2))
    assert min(seconds) > 0 and ends == sorted(ends) and ends[-1] == pytest.approx(sum(seconds), abs=len(lines))
    assert next(end for line, end in zip(lines, ends, strict=True) if line[0] == "b-plan") <= 240  # eager (b)
    assert not list(tmp_path.iterdir())


def test_every_row_has_a_function():
    from benchmarks import gpu_rows

    assert list(gpu_rows.FUNCTIONS) == [row.name for row in gpu.ROWS]


def test_rows_that_do_not_fit_are_skipped_and_shorter_ones_run(tmp_path):
    rows = [gpu.Row("a-short", 1, 0, ""), gpu.Row("b-long", 100, 0, ""), gpu.Row("c-short", 1, 0, "")]
    called = []
    functions = {row.name: lambda row=row: called.append(row.name) or {} for row in rows}
    gpu.run_rows(rows, functions, results(tmp_path), time.monotonic() + 20)
    assert called == ["a-short", "c-short"]
    assert written(tmp_path)["b-long"].startswith("skipped: 100 s predicted")


def test_a_row_that_runs_out_of_time_is_stopped_and_the_earlier_ones_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESERVE", 0.0)
    rows = [gpu.Row(name, 0, 0, "") for name in ("a-done", "b-slow", "c-late")]
    functions = {"a-done": lambda: {"x": 1}, "b-slow": lambda: time.sleep(60) or {}, "c-late": dict}
    began = time.monotonic()
    gpu.run_rows(rows, functions, results(tmp_path), began + 0.5, lambda _: 0.2)
    assert time.monotonic() - began < 10
    assert list(written(tmp_path).values())[:2] == ["ok", "stopped: out of time"]
    assert written(tmp_path)["c-late"].startswith("skipped")
    assert "| a-done |" in (tmp_path / "out.md").read_text()


def test_errors_and_failed_checks_are_kept_and_the_next_row_runs(tmp_path):
    rows = [gpu.Row(name, 0, 0, "") for name in ("a-error", "a-failed", "a-fine", "a-theirs")]
    functions = {"a-error": lambda: 1 / 0, "a-failed": lambda: {"failed": ["x"]}, "a-fine": dict}
    gpu.run_rows(rows, functions, results(tmp_path), time.monotonic() + 60)
    status = ["ERROR", "FAILED", "ok", "skipped: diffusers is not installed"]
    assert list(written(tmp_path).values()) == status
    assert "ZeroDivisionError" in (tmp_path / "out.json").read_text()


def test_a_difference_above_its_limit_is_a_failure():
    from benchmarks import gpu_checks

    values: dict = {}
    gpu_checks.check(values, "fine", 1e-4, 1e-3)
    assert "failed" not in values
    gpu_checks.check(values, "wrong", 2e-3, 1e-3)
    gpu_checks.check(values, "nan", float("nan"), 1e-3)
    assert values["failed"] == ["wrong", "nan"]


@pytest.mark.parametrize("flags", [["--rows", "z-none"], ["--groups", "q"]])
def test_unknown_rows_are_refused(flags):
    with pytest.raises(ValueError, match=flags[1]):
        gpu.main(options.gpu_args("", [*flags, "--dry-run"]))


@pytest.mark.slow
def test_the_whole_benchmark_of_a_gpu_rehearsed_on_a_cpu(tmp_path):
    flags = ["--device", "cpu", "--sizes", "tiny", "--time-left", 3000, "--output", tmp_path / "out"]
    done = command("benchmarks/gpu.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert written(tmp_path) == {row.name: "ok" for row in gpu.ROWS}


@pytest.mark.slow
def test_the_benchmark_beside_diffusers_rehearsed(tmp_path):
    flags = ["--sizes", "tiny", "--repeats", 1, "--seconds", 0.1, "--channels-last", "--output", tmp_path / "out"]
    done = command("benchmarks/bench.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["work"] for row in rows] == list(options.WORK)
    for row in rows:
        assert row["difference"] < 1e-3 and row["tflop"] > 0 and {"ours", "diffusers"} <= row["sides"].keys()
    assert "channels_last" in rows[0]["sides"] and "ours, not packed" in rows[0]["sides"]
    assert (tmp_path / "out.md").read_text().count("\n|") == len(rows) + 2
