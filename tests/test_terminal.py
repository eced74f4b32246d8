"""Terminals and machines: a closed pipe, a closed terminal, an ASCII console, runs started at once."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image
from recipe import mini_base

import sample
from training import run_folder
from utils import cli, disk

ROOT = Path(__file__).parent.parent
TORCH = metadata.version("torch").split("+")[0]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return mini_base(tmp_path_factory.mktemp("mini base"))


def training(mini, folder, *flags: str) -> list[str]:
    words = [sys.executable, str(ROOT / "tiny" / "pretrain.py"), "--base", mini, "--batch-size", "1"]
    return [*words, "--sample-every", "0", "--dtype", "float32", "--output-dir", str(folder), *flags]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def wait_for_log(folder: Path, process: subprocess.Popen) -> None:
    while not (folder / "log.jsonl").exists():
        time.sleep(0.05)
        assert process.poll() is None


@pytest.mark.parametrize("closed", ["stdout", pytest.param("both", marks=pytest.mark.slow)])
def test_a_reader_that_quits_does_not_end_the_run(closed, mini, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    error = writer if closed == "both" else subprocess.DEVNULL
    words = training(mini, tmp_path / "run", "--steps", "2")
    assert subprocess.run(words, stdout=writer, stderr=error, env=environment()).returncode == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGHUP])
def test_a_signal_with_the_terminal_gone_saves(number, mini, tmp_path):
    reader, writer = os.pipe()
    words = training(mini, tmp_path / "run", "--steps", "100000")
    process = subprocess.Popen(words, stdout=writer, stderr=writer, env=environment())
    wait_for_log(tmp_path / "run", process)
    os.close(reader)
    process.send_signal(number)
    assert process.wait(120) == 0
    assert len(list((tmp_path / "run" / "states").glob("step-*.safetensors"))) == 1


def test_a_console_in_ascii_gets_what_it_can_show(tmp_path):
    words = [sys.executable, "-c", "from utils import cli; cli.run(lambda _: print('1 ' + chr(177) + ' 2'), None)"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, env=environment(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stdout) == (0, b"1 ? 2\n")


def test_files_are_utf8_whatever_the_locale(tmp_path):
    code = f"from utils import disk; from pathlib import Path; p = Path({str(tmp_path / 'a')!r})\n"
    code += "disk.write_text(p, chr(228) + chr(10)); disk.append(p, chr(177))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment(**locale))
    assert (tmp_path / "a").read_bytes() == "ä\n±\n".encode()


def test_a_file_system_that_refuses_to_sync_folders_is_no_failure(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    disk.write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"


def test_a_tilde_after_an_equals_sign_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    parser = cli.Parser()
    for flag in ("--output-dir", "--reward-weights", "--prompt"):
        parser.add_argument(flag)
    args = parser.parse(["--output_dir=~/x", "--reward-weights=~/a,~/b", "--prompt=~/x"])
    assert (args.output_dir, args.reward_weights, args.prompt) == ("/users/me/x", "/users/me/a,/users/me/b", "~/x")


def test_runs_started_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = type("Args", (), {"output_dir": None, "resume": None, "method": "refl", "base": "tiny"})
    with run_folder.claim(args) as first, run_folder.claim(args) as second:
        assert [str(first), str(second)] == ["runs/refl-tiny", "runs/refl-tiny-2"]
        args.output_dir = "runs/refl-tiny"
        with pytest.raises(ValueError, match="another process trains there"), run_folder.claim(args):
            pass


def test_samples_of_two_calls_are_never_mixed(mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--base", mini, "--checkpoint", f"{mini}/unet", "--steps", "1", "--switch", "0", "--prompt", "owl"]
    for count in ("2", "1"):
        sample.main(sample.parse_args([*flags, "--images-per-prompt", count]))
    assert (
        sorted(path.name for path in tmp_path.glob("*/*.png"))
        == ["00000-1.png"] * 2 + ["00000-2.png"] + ["grid.png"] * 2
    )
    with pytest.raises(ValueError, match="--output-dir samples: holds images of an earlier call, as 00000-2.png"):
        sample.main(sample.parse_args([*flags, "--images-per-prompt", "1", "--output-dir", "samples"]))
    sample.main(sample.parse_args([*flags, "--images-per-prompt", "3", "--output-dir", "samples"]))  # replaces all
    assert Image.open("samples/grid.png").width > 3 * 128


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_a_seed_out_of_range_is_refused_by_name(command, capsys):
    module = __import__(command)
    with pytest.raises(SystemExit) as exit:
        module.parse_args(["--seed", str(2**64)])
    assert exit.value.code == 2 and "--seed" in capsys.readouterr().err


@pytest.mark.parametrize("requirement, ends", [("torch==1.0.0", True), (f"torch=={TORCH}", False)])
def test_a_torchvision_of_another_build_is_named_in_one_line(tmp_path, requirement, ends):
    """transformers imports it, and fails with a traceback of sixty lines."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchvision-9.9.dist-info").mkdir()
    (tmp_path / "torchvision-9.9.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\nRequires-Dist: {requirement}\n"
    )
    command = [sys.executable, "weights.py", "inspect", "nowhere.safetensors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    line = "torchvision 9.9 does not fit torch", "torchvision::nms", "pip uninstall torchvision"
    assert all((part in done.stderr) == ends for part in line)
