"""Nothing is lost: resuming to the bit, kills, full disks, bad numbers, several processes. On a miniature base."""

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
from training import checkpoint, models, monitor
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
    """12 steps instead of 40, frozen networks loaded once, and no sample images before and after."""
    monkeypatch.setattr(rewards, "build", build)
    monkeypatch.setattr(models, "load_text", load_text)
    monkeypatch.setattr(train, "STEPS", 12)
    monkeypatch.setattr(monitor, "save_grid", lambda *_: None)
    monkeypatch.setattr(monitor, "evaluate", lambda *_: None)
    monkeypatch.setattr(monitor, "summarise", lambda *_: {"base": {"reward": [0.0, 0.0]}})


def begin(mini, folder, *flags: str) -> None:
    """Start a run; `diffusion` stands for tiny/pretrain.py, the fastest one."""
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
    """Call `before` before every loss of an update, and `after` with every loss, which it may change."""
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
    """The same weights, moments and progress to the bit, and the same log."""
    (left, info), (right, other) = checkpoint.read(newest(a)), checkpoint.read(newest(b))
    assert info == other and left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    for path in [*a.rglob("unet/*.safetensors"), *a.glob("pytorch_lora*")]:
        mine, yours = load_file(path), load_file(b / path.relative_to(a))
        assert all(torch.equal(mine[key], yours[key]) for key in mine)
    assert timeless(a) == timeless(b)


# ------------------------------------------------------------------------------------------------ resume, to the bit


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--method", "refl"], marks=pytest.mark.slow),
        ["--method", "imagerefl", "--batch-size", "1", "--max-grad-norm", "0.1"],
        ["--method", "imagerefl", "--batch-size", "1", "--lora", "2", "--warmup", "4"],
        ["--method", "diffusion", "--ema", "0.9", "--accumulate", "2", "--snr-gamma", "5"],
    ],
    ids=lambda flags: " ".join(flags[1:]),
)
def test_a_run_goes_on_to_the_bit(flags, mini, tmp_path, fast):
    """Stopped after the third update, before the fourth, which in ImageReFL is one of ReFL."""
    begin(mini, tmp_path / "whole", *flags, "--steps", "5")
    begin(mini, tmp_path / "half", *flags, "--steps", "3")
    resume(tmp_path / "half", "--steps", "5")
    assert_same_run(tmp_path / "whole", tmp_path / "half")
    kinds = [row["kind"] for row in log_of(tmp_path / "whole")]
    assert kinds == (["imagerefl"] * 3 + ["refl", "imagerefl"] if "imagerefl" in flags else [flags[1]] * 5)


def test_no_image_is_taken_twice_in_an_epoch_also_after_a_resumption(mini, tmp_path, fast, monkeypatch):
    seen, batch = [], Run.batch

    def recorded(run, generator):
        seen.extend(range(run.stream.position, run.stream.position + run.args.batch_size))
        return batch(run, generator)

    monkeypatch.setattr(Run, "batch", recorded)
    begin(mini, tmp_path / "run", "--method", "diffusion", "--accumulate", "2", "--steps", "2")
    resume(tmp_path / "run", "--steps", "3")
    assert seen == list(range(3 * 2 * 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update_saves_and_says_how_to_go_on(number, mini, tmp_path, fast, monkeypatch, capsys):
    flags, before = ["--method", "diffusion", "--steps", "3", "--lr-schedule", "cosine"], signal.getsignal(number)
    begin(mini, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        around_loss(patch, lambda update: update == 1 and os.kill(os.getpid(), number))
        patch.setattr(sys, "argv", ["somewhere/train.py"])
        begin(mini, tmp_path / "stopped", *flags)
    out = capsys.readouterr().out
    assert f"stopped after update 2 and saved; continue with: python train.py --resume {tmp_path / 'stopped'}" in out
    resume(tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once(mini, tmp_path, fast, monkeypatch):
    around_loss(monkeypatch, lambda update: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2 * (update == 1))])
    with pytest.raises(SystemExit) as exit:
        begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "3", "--save-every", "1")
    assert exit.value.code == 128 + signal.SIGTERM and newest(tmp_path / "run").stem == "step-000001"


def forked(work, *arguments) -> int:
    """Call `work` in a child process; returns its pid. The child ends as a command would, its words go nowhere."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own: all processes wait for the usual one where its holder was killed
        work(*arguments)
        code = 0
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, limit: float) -> int | None:
    """The exit code of a child, negative for a signal; None where it still runs after `limit` seconds."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def kill_and_go_on(mini, folder, flags: list[str], moments: list[float]) -> int:
    """Start a run, kill it at each of the moments (seconds after its start or resumption); returns the kills."""
    kills = 0
    for moment in [*moments, 600.0]:
        started = (folder / "run.json").exists()
        pid = forked(resume, folder) if started else forked(begin, mini, folder, *flags)
        code = wait(pid, moment)
        if code is not None:
            assert code == 0
            return kills
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    raise AssertionError("a resumed run does not end")


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_in_the_same_weights(kills, mini, tmp_path, fast):
    flags = ["--method", "imagerefl", "--batch-size", "1", "--steps", "6", "--save-every", "1", "--lora", "2"]
    began = time.monotonic()
    assert wait(forked(begin, mini, tmp_path / "whole", *flags), 600) == 0
    whole = time.monotonic() - began
    rng, done, runs = random.Random(kills), 0, 0
    while done < kills:
        folder = tmp_path / f"killed-{runs}"
        moments = [rng.uniform(0.1, 0.9) * whole for _ in range(min(10, kills - done))]
        done += kill_and_go_on(mini, folder, flags, moments)
        assert_same_run(tmp_path / "whole", folder)
        assert not list((folder / "states").glob("*tmp*"))  # what a kill left is gone
        runs += 1


def test_the_average_of_the_weights_does_not_remember_how_it_came_about(mini, tmp_path, fast, monkeypatch):
    seen, save_result = [], training_run.run_folder.save_result

    def recorded(args, unet, *rest):
        seen.append(unet)
        save_result(args, unet, *rest)

    monkeypatch.setattr(training_run.run_folder, "save_result", recorded)
    begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "2", "--ema", "0.9")
    assert not any(p.requires_grad or p.grad_fn for p in seen[0].parameters())


# ------------------------------------------------------------------------------------------------ states


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


def test_the_last_few_states_are_kept(tmp_path):
    saved(tmp_path, [1, 2, 3, 4], keep=2)
    assert list(checkpoint.checkpoints_in(tmp_path)) == [3, 4]
    saved(tmp_path, [2], keep=2)  # gone back behind states that were damaged
    assert list(checkpoint.checkpoints_in(tmp_path)) == [2]


@pytest.mark.parametrize("damage", ["a bit", "half", "nothing left", "the header"])
def test_a_damaged_state_is_recognised_and_the_one_before_is_taken(damage, tmp_path, capsys):
    modules, optimizer = saved(tmp_path, [1, 2])
    path = checkpoint.checkpoints_in(tmp_path)[2]
    content = bytearray(path.read_bytes())
    content[-1 if damage == "a bit" else content.index(b"update") + 10] ^= 1
    length = {"half": len(content) // 2, "nothing left": 0}.get(damage, len(content))
    path.write_bytes(content[:length])
    assert checkpoint.load_newest(tmp_path, modules, optimizer) == {"update": 1}
    assert modules["m"].bias.tolist() == [1, 1]
    error = capsys.readouterr().err
    assert "step-000002" in error and "damaged" in error and "taking the one before" in error
    checkpoint.checkpoints_in(tmp_path)[1].write_bytes(b"")
    with pytest.raises(ValueError, match="all 2 states are damaged"):
        checkpoint.load_newest(tmp_path, modules, optimizer)


def test_a_state_of_other_networks_loads_nothing(tmp_path):
    saved(tmp_path, [1])
    other = {"m": torch.nn.Linear(3, 4)}
    before = other["m"].weight.clone()
    with pytest.raises(ValueError, match="other networks: no m.weight"):
        checkpoint.load_newest(tmp_path, other, torch.optim.AdamW(other["m"].parameters()))
    assert torch.equal(other["m"].weight, before)


def full(monkeypatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))


def test_a_full_disk_leaves_the_state_before_and_training_goes_on(mini, tmp_path, fast, monkeypatch, capsys):
    around_loss(monkeypatch, lambda update: update == 1 and full(monkeypatch))
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


def test_a_run_in_use_is_refused_until_its_process_is_gone(mini, tmp_path, fast):
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


def test_a_state_is_saved_after_minutes(mini, tmp_path, fast):
    begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "3", "--save-minutes", "0.000001", "--keep", "5")
    assert list(checkpoint.checkpoints_in(tmp_path / "run" / "states")) == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ health


def broken(monkeypatch, updates, value: float = float("nan")) -> None:
    """Make the loss of some updates not finite."""
    around_loss(monkeypatch, after=lambda update, loss: loss * value if update in updates else loss)


def test_an_update_that_is_not_finite_is_skipped_counted_and_logged(mini, tmp_path, fast, monkeypatch, capsys):
    begin(mini, tmp_path / "one", "--method", "diffusion", "--steps", "1", "--ema", "0.5")
    broken(monkeypatch, {1})
    begin(mini, tmp_path / "two", "--method", "diffusion", "--steps", "2", "--ema", "0.5")
    row = log_of(tmp_path / "two")[1]
    assert row["skipped"] == 1 and row["grad_norm"] == "nan" and len(row["prompts"]) == 2
    (before, _), (after, info) = checkpoint.read(newest(tmp_path / "one")), checkpoint.read(newest(tmp_path / "two"))
    assert all(torch.equal(before[key], after[key]) for key in before) and info["skipped"] == 1
    error = capsys.readouterr().err
    assert "update 2 skipped" in error and f"prompts {row['prompts']}" in error


def test_after_many_skips_in_a_row_the_run_stops_with_advice(mini, tmp_path, fast, monkeypatch):
    monkeypatch.setattr(training_run, "SKIPS", 2)
    broken(monkeypatch, {1, 3, 4}, float("inf"))
    with pytest.raises(ValueError, match="2 updates in a row .* lower --lr.*--resume"):
        begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "9")
    assert [row.get("skipped") for row in log_of(tmp_path / "run")] == [None, 1, None, 2, 3]
    assert checkpoint.read(newest(tmp_path / "run"))[1] | {"position": 0} == {
        "update": 5, "position": 0, "skipped": 3, "in_a_row": 2,
    }  # fmt: skip


def test_out_of_memory_is_one_line_with_what_to_try(mini, tmp_path, fast, monkeypatch):
    monkeypatch.setattr(pretrain, "pretraining_loss", lambda *_: torch.empty(2**50))
    message = "out of memory with micro-batches of 2 images of 64 pixels, peak .* GB"
    with pytest.raises(ValueError, match=message) as caught:
        begin(mini, tmp_path / "run", "--method", "diffusion", "--steps", "1")
    assert "--batch-size 1 --accumulate 2, --checkpointing, --lora 16" in str(caught.value)
    monkeypatch.setattr(pretrain, "pretraining_loss", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # another error is not mistaken for it
        begin(mini, tmp_path / "other", "--method", "diffusion", "--steps", "1")


def test_a_changed_flag_is_refused_by_name_unless_overridden(mini, tmp_path, fast):
    folder = tmp_path / "run"
    begin(mini, folder, "--method", "diffusion", "--steps", "1", "--lr", "1e-4")
    with pytest.raises(ValueError, match="--lr 0.001 .was 0.0001..*--override"):
        resume(folder, "--lr", "1e-3", "--steps", "2")
    resume(folder, "--lr", "1e-4", "--steps", "2", "--save-every", "7")  # the same, and what changes nothing
    resume(folder, "--lr", "1e-3", "--override", "--steps", "3")
    assert [row["lr"] for row in log_of(folder)] == [1e-4, 1e-4, 1e-3]
    assert json.loads((folder / "run.json").read_text())["args"]["lr"] == 1e-3
    with pytest.raises(ValueError, match="saved from other networks: no ema"):
        resume(folder, "--ema", "0.9", "--override", "--steps", "4")


# ------------------------------------------------------------------------------------------------ several processes


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def member(rank: int, port: str, errors: Path, mini, folder, flags: list[str], dies: bool) -> None:
    """One of two processes, as torchrun would start it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
    distributed.rank, distributed.world_size = rank, 2
    if dies and rank == 1:
        around_loss(pytest.MonkeyPatch(), lambda update: update == 1 and os._exit(7))
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = open(2, "w", closefd=False)
    cli.run(lambda _: begin(mini, folder, *flags), None)


def two_processes(tmp_path, mini, flags: list[str], dies: bool = False) -> list[int]:
    port = free_port()
    pids = [forked(member, r, port, tmp_path / f"{r}.txt", mini, tmp_path / "two", flags, dies) for r in range(2)]
    return [wait(pid, 300) for pid in pids]


def assert_same_updates(one: dict, two: dict, start: dict) -> None:
    """Weights by what has changed since `start`, moments as they are, up to rounding.

    AdamW's first step is the gradient's sign, which rounding may turn where the gradient is zero: one value in a
    thousand may have gone the other way.
    """
    assert one.keys() == two.keys()
    for key, value in one.items():
        change = value - start[key[5:]] if key.startswith("unet.") else value
        apart = (value - two[key]).abs()
        turned = apart > 0.1 * change.abs().max()
        assert turned.float().mean() <= 1e-3, key
        assert (apart * ~turned).norm() <= 2e-3 * change.norm(), key


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "imagerefl", "--batch-size", "1", "--accumulate", "2"],
        pytest.param(["--method", "diffusion", "--ema", "0.9", "--accumulate", "6"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_the_updates_of_one(flags, mini, tmp_path, fast):
    flags = [*flags, "--steps", "4"]
    assert two_processes(tmp_path, mini, flags) == [0, 0]
    begin(mini, tmp_path / "one", *flags)
    (one, info), (two, other) = (checkpoint.read(newest(tmp_path / name)) for name in ("one", "two"))
    assert info == other
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
def test_sharded_weights_make_the_updates_of_whole_ones(flags, mini, tmp_path, fast, monkeypatch):
    """Two updates by two processes with --shard, one by a single process, and one with --shard again."""
    update, draw_step, drawn = Run.after, refl.sample_t_f, []

    def draw(*rest):
        drawn.append(draw_step(*rest))
        return drawn[-1]

    def watched_gradients(run):
        gradients = [p.grad for p in run.models.parameters]
        run.gradient_bytes = sum(t.to_local().nbytes if run.args.shard else t.nbytes for t in gradients)
        return finite(run)

    def watched(run, number, optimizer):
        moments = [t for moments in optimizer.state.values() for key, t in moments.items() if key != "step"]
        kept = {"weights": run.models.parameters, "moments": moments}
        kept = {key: [t.to_local() if run.args.shard else t for t in tensors] for key, tensors in kept.items()}
        seen = {key: sum(t.nbytes for t in tensors) for key, tensors in kept.items()} | {"drawn": drawn}
        seen["gradients"] = run.gradient_bytes
        (tmp_path / f"seen-{distributed.world_size}-{distributed.rank}.json").write_text(json.dumps(seen))
        return update(run, number, optimizer)

    finite = Run.gradients_are_finite
    monkeypatch.setattr(Run, "gradients_are_finite", watched_gradients)
    monkeypatch.setattr(Run, "after", watched)
    monkeypatch.setattr(imagerefl, "sample_t_f", draw)
    monkeypatch.setattr(refl, "sample_t_f", draw)
    two = tmp_path / "two"
    flags = ["--batch-size", "1", "--accumulate", "2", *flags, "--save-every", "1", "--keep", "4", "--steps"]
    assert two_processes(tmp_path, mini, [*flags, "2", "--shard"]) == [0, 0]
    resume(two, "--steps", "3")
    assert two_processes(tmp_path, mini, [*flags, "4", "--shard", "--resume", str(two)]) == [0, 0]
    begin(mini, tmp_path / "one", *flags, "4")

    whole, *parts = (json.loads((tmp_path / f"seen-{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    assert parts[0].pop("drawn") != parts[1].pop("drawn")  # as many steps as each one draws
    for part in parts:
        for key in ("weights", "gradients", "moments"):
            assert 0.45 * whole[key] < part[key] < 0.55 * whole[key], key
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


def test_what_does_not_go_with_shard_is_refused(mini, tmp_path, monkeypatch):
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
def test_torchrun_trains_and_ends_with_a_killed_process(mini, tmp_path):
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


def test_passes_that_cannot_be_shared_are_refused(monkeypatch):
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
