"""docs/exercises.md: its diffs apply, its commands parse; done as printed, they give the values that it prints."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_docs import unknown_flags, unknown_names

from report.options import evaluate_args
from training.options import parse_args as train_args
from utils.sample_options import parse_args as sample_args

ROOT = Path(__file__).parent.parent
PARSERS = {"train.py": train_args, "sample.py": sample_args, "evaluate.py": evaluate_args}
RANGE = re.compile(r"^\| `(.+)` \| (\S+) to (\S+) \|", re.MULTILINE)  # | `expression` | low to high | ...


@dataclass
class Exercise:
    """A section of the page. Diffs outside and inside of <details>; commands before and after the latter is applied."""

    title: str
    given: list[str]
    solution: list[str]
    before: list[str]
    after: list[str]
    expected: list[tuple[str, float, float]]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def read(section: str) -> Exercise:
    shown, _, folded = section.partition("<details>")
    commands = [line for block in blocks(section, "sh") for line in block.replace("\\\n", " ").splitlines()]
    after = [line for line in commands if line.endswith("# after")]
    ranges = [(expression, float(low), float(high)) for expression, low, high in RANGE.findall(section)]
    title = section.partition("\n")[0]
    return Exercise(
        title, blocks(shown, "diff"), blocks(folded, "diff"), [c for c in commands if c not in after], after, ranges
    )


PAGE = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
PREFACE, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
FIRST, EXERCISES = read(PREFACE), [read(section) for section in SECTIONS]
FUNCTIONS = blocks(PREFACE, "python")[0]
each = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.title.split(".")[0])


def copy_of_the_project(folder: Path, runs: Path | None = None) -> Path:
    """The code, in a folder without git, with the weights as a link and the runs so far."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "evaluation", "samples", "tests", "docs", "tiny")
    shutil.copytree(ROOT, folder, ignore=left_out)
    (folder / "tiny").symlink_to(ROOT / "tiny")
    if runs:
        (folder / "runs").mkdir()
        for run in runs.iterdir():
            (folder / "runs" / run.name).symlink_to(run)
    return folder


def apply(folder: Path, diffs: list[str]) -> None:
    for diff in diffs:
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        words = ["git", "apply", "--whitespace=error", "-"]
        done = subprocess.run(words, cwd=folder, input=diff, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{diff}"


def run(folder: Path, commands: list[str]) -> None:
    """As in a shell in which the environment of these tests is active."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path}
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


def wrong(folder: Path, exercise: Exercise, monkeypatch) -> list[str]:
    """The values outside of the page's ranges, by the page's functions, evaluated in `folder`."""
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(FUNCTIONS, names)
    found = [(expression, eval(expression, names), low, high) for expression, low, high in exercise.expected]
    print("\n".join(f"{value:.6g}: {expression}" for expression, value, *_ in found))
    return [f"{e} is {value:.6g}, not {low:g} to {high:g}" for e, value, low, high in found if not low <= value <= high]


def test_there_are_ten_exercises_each_with_a_solution_and_values():
    assert [e.title.split(".")[0] for e in EXERCISES] == [str(n) for n in range(1, 11)]
    assert all(e.expected and e.before + e.after for e in EXERCISES)
    assert SECTIONS[-1].count("<details>") == 1 and PAGE.count("<details>") == PAGE.count("</details>") == 10


@each
def test_the_diffs_apply_to_the_code_and_leave_it_valid(exercise, tmp_path):
    folder = copy_of_the_project(tmp_path / "project")
    apply(folder, exercise.given)
    apply(folder, exercise.solution)
    for name in re.findall(r"^\+\+\+ b/(\S+)", "\n".join(exercise.given + exercise.solution), re.MULTILINE):
        compile((folder / name).read_text(encoding="utf-8"), name, "exec")


@pytest.mark.parametrize("exercise", [FIRST, *EXERCISES], ids=lambda e: e.title.split(".")[0])
def test_the_flags_of_the_commands_parse(exercise):
    for command in exercise.before + exercise.after:
        program, *words = shlex.split(command, comments=True)
        if program == "python" and f"+++ b/{words[0]}\n" not in "".join(exercise.solution):
            PARSERS[words[0]](words[1:])


def test_the_files_names_and_flags_on_the_page_exist():
    text = re.sub(r"^```(diff|python)\n.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert set(unknown_names(text)) == {"grid.py"}  # which a solution adds
    assert unknown_flags(text) == []


def test_the_checks_can_fail(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1\n")
    diff = "--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-x = 2\n+x = 3\n"
    with pytest.raises(AssertionError, match="patch does not apply"):
        apply(tmp_path, [diff])
    apply(tmp_path, [diff.replace("= 2", "= 1")])
    assert (tmp_path / "a.py").read_text() == "x = 3\n"
    with pytest.raises(AssertionError):
        run(tmp_path, ["python no_such_file.py"])
    exercise = read("11. x\n| `1 + 1` | 2.5 to 3 |\n| `1 + 2` | 2.5 to 3 |\n```sh\na\nb  # after\n```\n")
    assert (exercise.before, exercise.after) == (["a"], ["b  # after"])
    assert wrong(tmp_path, exercise, monkeypatch) == ["1 + 1 is 2, not 2.5 to 3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder `runs` after the commands at the top of the page."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("first") / "project")
    run(folder, FIRST.before)
    return folder / "runs"


@pytest.mark.slow
@each
def test_an_exercise_gives_what_the_page_says(exercise, runs, tmp_path, monkeypatch):
    folder = copy_of_the_project(tmp_path / "project", runs)
    run(folder, [command for command in FIRST.before if command.startswith("echo")])
    apply(folder, exercise.given)
    run(folder, exercise.before)
    apply(folder, exercise.solution)
    run(folder, exercise.after)
    assert wrong(folder, exercise, monkeypatch) == []
