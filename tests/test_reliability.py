"""Bit-identical resuming, kills, full disks, non-finite losses and several processes, on a miniature base."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from recipe import mini_base
from safetensors.torch import load_file
from tqdm import tqdm

import imagerefl
import refl
import rewards
import train
import weights
from tiny import pretrain
from training import checkpoint, models, monitor, run_folder
from training import run as training_run
from training.run import Run
from utils import cli, disk, distributed

ROOT = Path(__file__).parent.parent
build, load_text = cache(rewards.build), cache(weights.load_text)
ONE = ["--batch-size", "2", "--dtype", "float32", "--sample-every", "0"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return mini_base(tmp_path_factory.mktemp("mini base"))


@pytest.fixture
def fast(monkeypatch):
    """12 sampling steps instead of 40, frozen networks loaded once, no sample images or scores."""
    monkeypatch.setattr(rewards, "build", build)
    monkeypatch.setattr(models, "load_text", load_text)
    monkeypatch.setattr(train, "STEPS", 12)
    monkeypatch.setattr(monitor, "save_grid", lambda *_: None)
    monkeypatch.setattr(monitor, "evaluate", lambda *_: None)
    monkeypatch.setattr(monitor, "summarise", lambda *_: {"base": {"reward": [0.0, 0.0]}})


def begin(mini, folder, *flags: str) -> None:
    """Start a run; `--method diffusion` runs tiny/pretrain.py, which is fastest."""
    flags = [*ONE, "--base", mini, "--output-dir", str(folder), *flags]
    if "diffusion" in flags:
        flags = [flag for flag in flags if flag not in ("--method", "diffusion")]
        return pretrain.main(pretrain.parse_args(flags))
    train.main(train.parse_args(["--start", "9", "--reward", "tiny", *flags]))


def resume(folder, *flags: str) -> None:
    method = json.loads((folder / "run.json").read_text())["args"]["method"]
    command = pretrain if method == "diffusion" else train
    command.main(command.parse_args(["--resume", str(folder), *flags]))


def around_loss(monkeypatch, before=lambda update: None, after=lambda update, loss: loss) -> None:
    """Call `before` before each loss of an update, and replace each loss by what `after` returns."""
    current, micro_batches = [], Run.micro_batches

    def recorded(run, update):
        current[:] = [update]
        yield from micro_batches(run, update)

    def wrapped(loss_function):
        def loss(*args):
            before(current[0])
            result = loss_function(*args)
            if isinstance(result, tuple):
                return after(current[0], result[0]), *result[1:]
            return after(current[0], result)

        return loss

    monkeypatch.setattr(Run, "micro_batches", recorded)
    for module, name in ((train, "refl_loss"), (train, "imagerefl_losses"), (pretrain, "pretraining_loss")):
        monkeypatch.setattr(module, name, wrapped(getattr(module, name)))


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def numbers(row: dict) -> dict[str, float]:
    return {key: value for key, value in row.items() if not isinstance(value, str)}


def timeless(folder) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in log_of(folder)]


def newest(folder) -> Path:
    return list(checkpoint.checkpoints_in(folder / "states").values())[-1]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit-identical weights, optimizer state and progress, and the same log."""
    (left, info), (right, other_info) = checkpoint.read(newest(a)), checkpoint.read(newest(b))
    assert info == other_info and left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    for path in [*a.rglob("unet/*.safetensors"), *a.glob("pytorch_lora*")]:
        left, right = load_file(path), load_file(b / path.relative_to(a))
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert timeless(a) == timeless(b)


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--method", "refl"], marks=pytest.mark.slow),
        ["--method", "imagerefl", "--batch-size", "1", "--max-grad-norm", "0.1"],
        [
            "--method",
            "imagerefl",
            "--batch-size",
            "1",
            "--kl-scale",
            "0.3",
            "--reward-scale",
            "2",
            "--diffusion-scale",
            "1",
        ],
        ["--method", "imagerefl", "--batch-size", "1", "--lora", "2", "--warmup", "4"],
        ["--method", "diffusion", "--ema", "0.9", "--accumulate", "2", "--snr-gamma", "5"],
        pytest.param(["--method", "draft", "--batch-size", "1", "--gradient-steps", "1-3"], marks=pytest.mark.slow),
        pytest.param(["--method", "drtune", "--batch-size", "1", "--from-image"], marks=pytest.mark.slow),
        pytest.param(["--method", "dpo", "--batch-size", "1"], marks=pytest.mark.slow),
    ],
    ids=lambda flags: " ".join(flags[1:]),
)
def test_a_resumed_run_is_bit_identical(flags, mini, tmp_path, fast):
    """Stopped after the third update; in ImageReFL the fourth is a ReFL update."""
    begin(mini, tmp_path / "uninterrupted", *flags, "--steps", "5")
    begin(mini, tmp_path / "resumed", *flags, "--steps", "3")
    resume(tmp_path / "resumed", "--steps", "5")
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "resumed")
    kinds = [row["kind"] for row in log_of(tmp_path / "uninterrupted")]
    assert kinds == (["imagerefl"] * 3 + ["refl", "imagerefl"] if "imagerefl" in flags else [flags[1]] * 5)


def test_no_image_is_used_twice_in_an_epoch_even_after_resuming(mini, tmp_path, fast, monkeypatch):
    seen, batch = [], Run.batch

    def recorded(run, generator):
        seen.extend(range(run.stream.position, run.stream.position + run.args.batch_size))
        return batch(run, generator)

    monkeypatch.setattr(Run, "batch", recorded)
    begin(mini, tmp_path / "run", "--method", "diffusion", "--accumulate", "2", "--steps", "2")
    resume(tmp_path / "run", "--steps", "3")
    assert seen == list(range(3 * 2 * 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update_saves_and_prints_how_to_resume(number, mini, tmp_path, fast, monkeypatch, capsys):
    flags, before = ["--method", "diffusion", "--steps", "3", "--lr-schedule", "cosine"], signal.getsignal(number)
    begin(mini, tmp_path / "uninterrupted", *flags)
    with monkeypatch.context() as patch:
        around_loss(patch, lambda update: update == 1 and os.kill(os.getpid(), number))
        patch.setattr(sys, "argv", ["somewhere/train.py"])
        begin(mini, tmp_path / "stopped", *flags)
    out = capsys.readouterr().out
    assert f"stopped after update 2 and saved; continue with: python train.py --resume {tmp_path / 'stopped'}" in out
    resume(tmp_path / "stopped")
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "stopped")
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once(mini, tmp_path, fast, monkeypatch):
    around_loss(monkeypatch, lambda update: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2 * (update == 1))])
    with pytest.raises(SystemExit) as exit:
        begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "3", "--save-every", "1")
    assert exit.value.code == 128 + signal.SIGTERM and newest(tmp_path / "run").stem == "step-000001"


def forked(work, *arguments) -> int:
    """Call `work` in a child process without stdout, which exits as a command would; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # not shared: a shared one stays locked if its holder is killed
        work(*arguments)
        code = 0
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, limit: float) -> int | None:
    """The exit code of a child, negative for a signal; None if it still runs after `limit` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def kill_and_resume(mini, folder, flags: list[str], kill_times: list[float]) -> int:
    """Start a run, kill it at each time (seconds after it started or resumed) and resume it; returns the kills."""
    kills = 0
    for seconds in [*kill_times, 600.0]:
        started = (folder / "run.json").exists()
        pid = forked(resume, folder) if started else forked(begin, mini, folder, *flags)
        code = wait(pid, seconds)
        if code is not None:
            assert code == 0
            return kills
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    raise AssertionError("a resumed run does not finish")


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_times_ends_with_the_same_weights(kills, mini, tmp_path, fast):
    flags = ["--method", "imagerefl", "--batch-size", "1", "--steps", "6", "--save-every", "1", "--lora", "2"]
    began = time.monotonic()
    assert wait(forked(begin, mini, tmp_path / "uninterrupted", *flags), 600) == 0
    duration = time.monotonic() - began
    rng, done, runs = random.Random(kills), 0, 0
    while done < kills:
        folder = tmp_path / f"killed-{runs}"
        kill_times = [rng.uniform(0.1, 0.9) * duration for _ in range(min(10, kills - done))]
        done += kill_and_resume(mini, folder, flags, kill_times)
        assert_same_run(tmp_path / "uninterrupted", folder)
        assert not list((folder / "states").glob("*tmp*"))  # temporary files of a kill are gone
        runs += 1


def test_the_ema_has_no_autograd_history(mini, tmp_path, fast, monkeypatch):
    seen, save_result = [], training_run.run_folder.save_result

    def recorded(args, unet, *rest):
        seen.append(unet)
        save_result(args, unet, *rest)

    monkeypatch.setattr(training_run.run_folder, "save_result", recorded)
    begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "2", "--ema", "0.9")
    assert not any(p.requires_grad or p.grad_fn for p in seen[0].parameters())


# ------------------------------------------------------------------------------------------------ checkpoints


def trained(seed: int = 0):
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"m": module}, optimizer


def saved(folder: Path, updates, keep: int = 9):
    modules, optimizer = trained()
    for update in updates:
        modules["m"].bias.data.fill_(update)
        checkpoint.save_newest(folder, checkpoint.tensors_of(modules, optimizer), {"update": update}, keep)
    return modules, optimizer


def test_the_last_few_checkpoints_are_kept(tmp_path):
    saved(tmp_path, [1, 2, 3, 4], keep=2)
    assert list(checkpoint.checkpoints_in(tmp_path)) == [3, 4]
    saved(tmp_path, [2], keep=2)  # resumed from an earlier one, as the later ones were damaged
    assert list(checkpoint.checkpoints_in(tmp_path)) == [2]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "header"])
def test_a_damaged_checkpoint_is_detected_and_the_previous_one_used(damage, tmp_path, capsys):
    modules, optimizer = saved(tmp_path, [1, 2])
    path = checkpoint.checkpoints_in(tmp_path)[2]
    content = bytearray(path.read_bytes())
    content[-1 if damage == "flipped bit" else content.index(b"update") + 10] ^= 1
    length = {"truncated": len(content) // 2, "empty": 0}.get(damage, len(content))
    path.write_bytes(content[:length])
    assert checkpoint.load_newest(tmp_path, modules, optimizer) == {"update": 1}
    assert modules["m"].bias.tolist() == [1, 1]
    error = capsys.readouterr().err
    assert "step-000002" in error and "damaged" in error and "using the previous one" in error
    checkpoint.checkpoints_in(tmp_path)[1].write_bytes(b"")
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged"):
        checkpoint.load_newest(tmp_path, modules, optimizer)


def test_a_checkpoint_of_other_networks_loads_nothing(tmp_path):
    saved(tmp_path, [1])
    other = {"m": torch.nn.Linear(3, 4)}
    before = other["m"].weight.clone()
    with pytest.raises(ValueError, match="other networks: no m.weight"):
        checkpoint.load_newest(tmp_path, other, torch.optim.AdamW(other["m"].parameters()))
    assert torch.equal(other["m"].weight, before)


def fill_disk(monkeypatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))


def test_a_full_disk_keeps_the_last_checkpoint_and_training_continues(mini, tmp_path, fast, monkeypatch, capsys):
    around_loss(monkeypatch, lambda update: update == 1 and fill_disk(monkeypatch))
    with pytest.raises(OSError) as caught:
        begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "3", "--save-every", "1")
    assert "step-000003" in caught.value.filename and "GB needed" in caught.value.strerror
    error = capsys.readouterr().err
    assert "not saved, training continues" in error and "step-000002" in error
    assert checkpoint.read(newest(tmp_path / "run"))[1]["update"] == 1 and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    resume(tmp_path / "run", "--sample-every", "0")
    assert [row["update"] for row in log_of(tmp_path / "run")] == [1, 2, 3]


def hold(folder: Path) -> None:
    with disk.lock(folder):
        time.sleep(60)


def test_a_run_in_use_is_refused_until_its_process_ends(mini, tmp_path, fast):
    begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "1")
    pid = forked(hold, tmp_path / "run")
    for _ in range(200):
        time.sleep(0.01)
        try:
            with disk.lock(tmp_path / "run"):
                pass
        except ValueError:
            break
    with pytest.raises(ValueError, match="another process trains there"):
        resume(tmp_path / "run")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    resume(tmp_path / "run", "--steps", "2")
    assert len(log_of(tmp_path / "run")) == 2


def test_save_minutes_saves_by_time(mini, tmp_path, fast):
    begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "3", "--save-minutes", "0.000001", "--keep", "5")
    assert list(checkpoint.checkpoints_in(tmp_path / "run" / "states")) == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ health


def make_not_finite(monkeypatch, updates, value: float = float("nan")) -> None:
    """Multiply the loss of these updates by `value`."""
    around_loss(monkeypatch, after=lambda update, loss: loss * value if update in updates else loss)


def test_an_update_that_is_not_finite_is_skipped_counted_and_logged(mini, tmp_path, fast, monkeypatch, capsys):
    begin(mini, tmp_path / "one", "--method", "diffusion", "--steps", "1", "--ema", "0.5")
    make_not_finite(monkeypatch, {1})
    begin(mini, tmp_path / "two", "--method", "diffusion", "--steps", "2", "--ema", "0.5")
    row = log_of(tmp_path / "two")[1]
    assert row["skipped"] == 1 and row["grad_norm"] == "nan" and len(row["prompts"]) == 2
    (before, _), (after, info) = checkpoint.read(newest(tmp_path / "one")), checkpoint.read(newest(tmp_path / "two"))
    assert all(torch.equal(before[key], after[key]) for key in before) and info["skipped"] == 1
    error = capsys.readouterr().err
    assert "update 2 skipped" in error and f"prompts {row['prompts']}" in error


def test_after_many_skips_in_a_row_the_run_stops_with_advice(mini, tmp_path, fast, monkeypatch):
    monkeypatch.setattr(training_run, "SKIPS", 2)
    make_not_finite(monkeypatch, {1, 3, 4}, float("inf"))
    with pytest.raises(ValueError, match="2 updates in a row .* lower --lr.*--resume"):
        begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "9")
    assert [row.get("skipped") for row in log_of(tmp_path / "run")] == [None, 1, None, 2, 3]
    assert checkpoint.read(newest(tmp_path / "run"))[1] | {"position": 0} == {
        "update": 5, "position": 0, "skipped": 3, "in_a_row": 2,
    }  # fmt: skip


def test_out_of_memory_is_one_line_with_flags_to_try(mini, tmp_path, fast, monkeypatch):
    monkeypatch.setattr(pretrain, "pretraining_loss", lambda *_: torch.empty(2**50))
    message = "out of memory with micro-batches of 2 images of 64 pixels, peak .* GB"
    with pytest.raises(ValueError, match=message) as caught:
        begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "1")
    assert "--batch-size 1 --accumulate 2, --checkpointing, --lora 16" in str(caught.value)
    monkeypatch.setattr(pretrain, "pretraining_loss", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # other errors pass through
        begin(mini, tmp_path / "other", "--method", "diffusion", "--steps", "1")


def test_a_changed_flag_is_refused_by_name_unless_overridden(mini, tmp_path, fast):
    folder = tmp_path / "run"
    begin(mini, folder, "--method", "diffusion", "--steps", "1", "--lr", "1e-4")
    with pytest.raises(ValueError, match="--lr 0.001 .was 0.0001..*--override"):
        resume(folder, "--lr", "1e-3", "--steps", "2")
    resume(folder, "--lr", "1e-4", "--steps", "2", "--save-every", "7")  # neither changes the result
    resume(folder, "--lr", "1e-3", "--override", "--steps", "3")
    assert [row["lr"] for row in log_of(folder)] == [1e-4, 1e-4, 1e-3]
    assert json.loads((folder / "run.json").read_text())["args"]["lr"] == 1e-3
    with pytest.raises(ValueError, match="--steps 2: the run has made 3 updates already"):
        resume(folder, "--steps", "2")
    with pytest.raises(ValueError, match="saved from other networks: no ema"):
        resume(folder, "--ema", "0.9", "--override", "--steps", "4")


def test_a_base_that_is_known_by_name_is_not_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    args = train.parse_args(["--base", "tiny", "--data", "tiny"])
    assert run_folder.begin(args, tmp_path, 0)["places"] == {"data": str(tmp_path / "tiny")}


def test_a_run_is_continued_elsewhere_and_after_its_files_moved(mini, tmp_path, fast, monkeypatch, capsys):
    """Relative paths mean those where the run was started; a flag may name the new place of what is gone."""
    folder = tmp_path / "run"
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "prompts.txt").write_text("owl\n")
    monkeypatch.chdir(tmp_path / "here")
    begin(mini, folder, "--method", "diffusion", "--steps", "1", "--prompts", "prompts.txt")
    monkeypatch.chdir(tmp_path / "there")
    resume(folder, "--steps", "2")
    assert json.loads((folder / "run.json").read_text())["args"]["prompts"] == str(tmp_path / "here" / "prompts.txt")
    (tmp_path / "there" / "moved.txt").write_text("owl\n")
    with pytest.raises(ValueError, match="--prompts moved.txt .was .*changes the result"):
        resume(folder, "--steps", "3", "--prompts", "moved.txt")
    (tmp_path / "here" / "prompts.txt").unlink()
    resume(folder, "--steps", "3", "--prompts", "moved.txt")
    assert "prompts.txt is gone, taken from moved.txt" in capsys.readouterr().err
    assert len(log_of(folder)) == 3


# ------------------------------------------------------------------------------------------------ several processes


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run_rank(rank: int, port: str, errors: Path, mini, folder, flags: list[str], dies: bool) -> None:
    """One of two processes, as torchrun starts it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
    distributed.rank, distributed.world_size = rank, 2
    if dies and rank == 1:
        around_loss(pytest.MonkeyPatch(), lambda update: update == 1 and os._exit(7))
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = open(2, "w", closefd=False)
    cli.run(lambda _: begin(mini, folder, *flags), None)


def two_processes(tmp_path, mini, flags: list[str], dies: bool = False) -> list[int]:
    port = free_port()
    pids = [forked(run_rank, r, port, tmp_path / f"{r}.txt", mini, tmp_path / "two", flags, dies) for r in range(2)]
    return [wait(pid, 300) for pid in pids]


def assert_same_updates(one: dict, two: dict, start: dict) -> None:
    """Equal up to rounding: the change of the weights since `start`, and the optimizer state.

    AdamW's first step is the sign of the gradient, which rounding may flip near zero: one value in a thousand may
    have moved the other way.
    """
    assert one.keys() == two.keys()
    for key, value in one.items():
        change = value - start[key[5:]] if key.startswith("unet.") else value
        error = (value - two[key]).abs()
        flipped = error > 0.1 * change.abs().max()
        assert flipped.float().mean() <= 1e-3, key
        assert (error * ~flipped).norm() <= 2e-3 * change.norm(), key


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "imagerefl", "--batch-size", "1", "--accumulate", "2"],
        pytest.param(["--method", "diffusion", "--ema", "0.9", "--accumulate", "6"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_the_same_updates_as_one(flags, mini, tmp_path, fast):
    flags = [*flags, "--steps", "4"]
    assert two_processes(tmp_path, mini, flags) == [0, 0]
    begin(mini, tmp_path / "one", *flags)
    (one, info), (two, other_info) = (checkpoint.read(newest(tmp_path / name)) for name in ("one", "two"))
    assert info == other_info
    for row, same in zip(timeless(tmp_path / "one"), timeless(tmp_path / "two"), strict=True):
        assert numbers(row) == pytest.approx(numbers(same), rel=1e-4)
    assert_same_updates(one, two, weights.load_unet(mini).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "imagerefl", "--max-grad-norm", "0.001"],
        ["--method", "imagerefl", "--checkpointing"],
        ["--method", "refl", "--accumulate", "4"],
    ],
    ids=lambda flags: " ".join(flags[1:]),
)
def test_sharded_runs_make_the_same_updates(flags, mini, tmp_path, fast, monkeypatch):
    """Two updates by two processes with --shard, one by a single process, and one with --shard again."""
    after_update, sample_t_f, sampled = Run.after, refl.sample_t_f, []

    def recorded_t_f(*rest):
        sampled.append(sample_t_f(*rest))
        return sampled[-1]

    def recorded_gradients(run):
        gradients = [p.grad for p in run.models.parameters]
        run.gradient_bytes = sum(t.to_local().nbytes if run.args.shard else t.nbytes for t in gradients)
        return gradients_are_finite(run)

    def recorded(run, update, optimizer):
        moments = [t for moments in optimizer.state.values() for key, t in moments.items() if key != "step"]
        tensors = {"weights": run.models.parameters, "moments": moments}
        local = {key: [t.to_local() if run.args.shard else t for t in part] for key, part in tensors.items()}
        seen = {key: sum(t.nbytes for t in part) for key, part in local.items()} | {"t_f": sampled}
        seen["gradients"] = run.gradient_bytes
        (tmp_path / f"seen-{distributed.world_size}-{distributed.rank}.json").write_text(json.dumps(seen))
        return after_update(run, update, optimizer)

    gradients_are_finite = Run.gradients_are_finite
    monkeypatch.setattr(Run, "gradients_are_finite", recorded_gradients)
    monkeypatch.setattr(Run, "after", recorded)
    monkeypatch.setattr(imagerefl, "sample_t_f", recorded_t_f)
    monkeypatch.setattr(refl, "sample_t_f", recorded_t_f)
    two = tmp_path / "two"
    flags = ["--batch-size", "1", "--accumulate", "2", *flags, "--save-every", "1", "--keep", "4", "--steps"]
    assert two_processes(tmp_path, mini, [*flags, "2", "--shard"]) == [0, 0]
    resume(two, "--steps", "3")
    assert two_processes(tmp_path, mini, [*flags, "4", "--shard", "--resume", str(two)]) == [0, 0]
    begin(mini, tmp_path / "one", *flags, "4")

    full, *parts = (json.loads((tmp_path / f"seen-{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    assert parts[0].pop("t_f") != parts[1].pop("t_f")  # each rank samples its own
    for part in parts:
        for key in ("weights", "gradients", "moments"):
            assert 0.45 * full[key] < part[key] < 0.55 * full[key], key
    for row, same in zip(timeless(tmp_path / "one"), timeless(two), strict=True):
        assert numbers(row) == pytest.approx(numbers(same), rel=1e-4)
    start = weights.load_unet(mini).state_dict()
    for update in range(1, 5):
        paths = [checkpoint.checkpoints_in(folder / "states")[update] for folder in (tmp_path / "one", two)]
        (a, info), (b, same) = map(checkpoint.read, paths)
        assert info == same
        assert_same_updates(a, b, start)
    result = load_file(next(two.glob("unet/*.safetensors")))
    assert all(torch.equal(result[key], b[f"unet.{key}"]) for key in start)


def test_flags_that_cannot_be_combined_with_shard_are_refused(mini, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--shard spreads .*: torchrun"):
        begin(mini, tmp_path, "--shard")
    monkeypatch.setattr(distributed, "world_size", 2)
    for flag in (["--lora", "2"], ["--compile"], ["--plan"]):
        with pytest.raises(ValueError, match=f"{flag[0]} cannot be combined with --shard"):
            begin(mini, tmp_path, "--shard", *flag)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [[], pytest.param(["--shard"], marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_others(flags, mini, tmp_path, fast):
    method = "imagerefl" if flags else "diffusion"
    flags = ["--method", method, "--steps", "3", "--accumulate", "2", "--save-every", "1", *flags]
    assert two_processes(tmp_path, mini, flags, dies=True) == [2, 7]
    assert "process 0 of 2: another one is gone" in (tmp_path / "0.txt").read_text()
    assert newest(tmp_path / "two").stem == "step-000001"


@pytest.mark.slow
def test_torchrun_trains_and_ends_when_a_process_is_killed(mini, tmp_path):
    flags = ["--base", mini, "--steps", "3", "--accumulate", "2", *ONE]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command += [str(ROOT / "tiny" / "pretrain.py"), *flags]
    subprocess.run([*command, "--output-dir", str(tmp_path / "two")], check=True, timeout=600, cwd=tmp_path)
    begin(mini, tmp_path / "one", "--method", "diffusion", *flags[2:])
    one, two = (numbers(timeless(tmp_path / name)[-1]) for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)
    long = subprocess.Popen(
        [*command, "--steps", "100000", "--output-dir", str(tmp_path / "long")], cwd=tmp_path, stderr=subprocess.PIPE
    )
    while not (tmp_path / "long" / "log.jsonl").exists():
        time.sleep(0.1)
        assert long.poll() is None
    children = Path(f"/proc/{long.pid}/task/{long.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert long.wait(120) != 0


def test_micro_batches_that_cannot_be_shared_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", 8)
    with pytest.raises(ValueError, match="--accumulate 4: .* 8 .*; --batch-size 4 --accumulate 8 has the same"):
        distributed.check_divisible(8, 4)
    distributed.check_divisible(4, 8)
    monkeypatch.setattr(distributed, "rank", 3)
    assert list(distributed.micro_batches_of_this_rank(16)) == [3, 11]


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match="only 2 GPUs here; use --nproc-per-node 2"):
        distributed.set_device()
