"""The layout of the project: a small top level, imports that go one way, a short path from `main` to the network."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recipe import mini_base

ROOT = Path(__file__).parent.parent
TOP = sorted(ROOT.glob("*.py"))
CORE = ("unet", "vae", "scheduler", "refl", "imagerefl", "combined", "rewards", "metrics")
COMMANDS = ("train", "sample", "evaluate", "reproduce", "study", "weights")
LAYERS = (  # a file imports from its own layer and those before it
    ("utils",),
    CORE,
    ("baselines",),
    ("pretrained", "speed"),
    ("report",),
    ("training",),
    ("reproduction",),
    COMMANDS,
    ("tiny", "benchmarks", "docs"),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
LAZY = {  # inside a function or `if __name__`
    ("rewards", "pretrained"): "`rewards.load` loads pretrained networks",
    ("rewards", "tiny"): "and the ground truth of the tiny base",
    ("pretrained", "training"): "the command `rewards.py score` reads prompt files",
}
UPWARD = {  # known exceptions, each with its reason
    ("training", "weights"): "weights.py is also the Python API of pretrained/",
    ("reproduction", "weights"): "likewise",
}


def folder_of(path: Path) -> str:
    return path.stem if path.parent == ROOT else path.relative_to(ROOT).parts[0]


def code_files() -> list[Path]:
    return TOP + [path for name in LAYER for path in sorted((ROOT / name).glob("*.py"))]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(top-level name, whether at module level) of everything that a file imports from this project."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.If) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [(name.split(".")[0], id(node) not in inner) for name in names]
    return [(name, outer) for name, outer in found if name in LAYER]


def wrong_imports(path: Path) -> list[str]:
    own = folder_of(path)
    wrong = []
    for name, outer in imports(path):
        peers = LAYER[name] == LAYER[own] and name != own and own not in CORE
        upward = LAYER[name] > LAYER[own] or peers and own not in ("tiny", "benchmarks", "docs", *COMMANDS)
        if upward and (own, name) not in UPWARD and not (not outer and (own, name) in LAZY):
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    return wrong


def long_functions(path: Path, lines: int) -> list[str]:
    functions = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    return [f"{path.name}:{f.name} has {f.end_lineno - f.lineno + 1} lines" for f in functions
            if f.end_lineno - f.lineno >= lines]  # fmt: skip


def test_the_top_level_is_small():
    assert {path.stem for path in TOP} >= {*CORE, *COMMANDS}
    assert len(TOP) <= 14
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in TOP) <= 2000
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) <= 200


def test_no_function_at_the_top_is_long():
    assert [name for path in TOP for name in long_functions(path, 60)] == []


def test_imports_go_one_way():
    assert [wrong for path in code_files() for wrong in wrong_imports(path)] == []


def test_no_import_hides_from_the_linter():
    assert [
        path.name for path in [*code_files(), *ROOT.glob("tests/*.py")] if "noqa: " + "E402" in path.read_text()
    ] == []


def test_the_checks_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, text in {
        "refl.py": "import training.data\n",
        "rewards.py": "def load():\n    from pretrained import mps\n",
        "metrics.py": "from pretrained import mps\n",
        "speed/a.py": "import pretrained\n",
        "report/a.py": "import metrics, report.b, speed\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = [wrong for path in sorted(tmp_path.rglob("*.py")) for wrong in wrong_imports(path)]
    assert found == ["metrics.py imports pretrained", "refl.py imports training", "speed/a.py imports pretrained"]
    (tmp_path / "long.py").write_text("def f():\n" + "    x = 1\n" * 60)
    assert long_functions(tmp_path / "long.py", 60) == ["long.py:f has 61 lines"]
    assert long_functions(tmp_path / "long.py", 61) == []


# ---- frames, counted in a running command

COUNT = """
import json, runpy, sys, traceback
root, out = sys.argv[1:3]
sys.argv = sys.argv[3:]
sys.path.insert(0, root)
import torch
from unet import UNet
longest, forward = {}, UNet.forward

def counted(self, *args, **kwargs):
    frames = [f for f in traceback.extract_stack()[:-1] if "site-packages" not in f.filename]
    own = [f for f in frames if f.filename.startswith(root)]
    start = max(i for i, f in enumerate(own) if f.name == "main" and f.filename.endswith(sys.argv[0].split("/")[-1]))
    names = [f.name for f in own[start:]] + ["UNet.forward"]
    if "predicted_minutes" in names:
        return forward(self, *args, **kwargs)
    key = "closing table" if "evaluate" in names else "sampling"
    if any(name in names for name in ("refl_loss", "imagerefl_losses")):
        key = "no-grad step" if not torch.is_grad_enabled() else "reward" if "reward_loss" in names else "diffusion"
    if len(names) > len(longest.get(key, [])):
        longest[key] = names
    return forward(self, *args, **kwargs)

UNet.forward = counted
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    open(out, "w").write(json.dumps(longest))
"""


def copy_without_speed(folder: Path) -> Path:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "samples", "tests", "speed", "benchmarks", "docs")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def without_speed(tmp_path_factory):
    return copy_without_speed(tmp_path_factory.mktemp("copy") / "project")


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return mini_base(tmp_path_factory.mktemp("mini base"))


def count_frames(root: Path, folder: Path, *command: str) -> dict[str, list[str]]:
    words = [sys.executable, "-c", COUNT, str(root), str(folder / "frames.json"), str(root / command[0]), *command[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "frames.json").read_text())


def train_flags(mini, folder: Path) -> list[str]:
    (folder / "prompts.txt").write_text("owl\n")
    flags = ["train.py", "--base", str(mini), "--reward", "tiny", "--steps", "4", "--batch-size", "2", "--seed", "2"]
    flags += [
        "--sample-every",
        "0",
        "--dtype",
        "float32",
        "--prompts",
        str(folder / "prompts.txt"),
        "--output-dir",
        str(folder / "run"),
    ]
    return flags


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_without_speed_everything_runs_on_a_short_path_with_the_same_losses(mini, without_speed, tmp_path):
    """From `main` to `UNet.forward`, both counted: at most five frames, one more with speed/."""
    logs = []
    for root, limit in ((ROOT, 6), (without_speed, 5)):
        folder = tmp_path / root.name
        folder.mkdir()
        frames = count_frames(root, folder, *train_flags(mini, folder))
        assert frames.keys() == {"diffusion", "reward", "no-grad step", "closing table"}
        frames |= count_frames(
            root, folder, "sample.py", "--base", str(mini), "--checkpoint", str(folder / "run"), "--switch", "2",
            "--steps", "4", "--prompt", "owl", "--images-per-prompt", "1", "--dtype", "float32",
        )  # fmt: skip
        for names in frames.values():
            assert len(names) <= limit, names
        logs.append(log_of(folder / "run"))
    for ours, plain in zip(*logs, strict=True):
        assert ours["reward"] == pytest.approx(plain["reward"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)
    flags = train_flags(mini, tmp_path)
    done = subprocess.run(
        [sys.executable, str(without_speed / flags[0]), *flags[1:], "--compile"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "--compile: needs the folder speed/" in done.stderr
