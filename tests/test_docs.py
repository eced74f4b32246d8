"""Files, functions, flags, equation markers and preset values named in the documents exist and are right."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from docs import make_diagrams
from training import presets

ROOT = Path(__file__).resolve().parent.parent
PAPER_TO_CODE = ROOT / "docs" / "paper_to_code.md"
OTHERS = (
    "docs/paper_vs_official_code.md",
    "docs/reliability.md",
    "docs/glossary.md",
    "docs/reproduction.md",
    "docs/study.md",
    "docs/collapse.md",
    "docs/ablations.md",
    "docs/results.md",
    "docs/tour.md",
    "README.md",
)
DOCUMENTS = [PAPER_TO_CODE, *(ROOT / name for name in OTHERS)]
EQUATIONS = (1, 2, 3, 4, 5)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """All definitions in a syntax tree: `function`, `CONSTANT`, `Class`, `Class.method`, `Class.attribute`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield prefix + child.name, child
            yield from named(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield prefix + child.id, child
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            if getattr(child.value, "id", "") == "self":
                yield f"{prefix.split('.')[0]}.{child.attr}", child
        else:
            yield from named(child, prefix)


@cache
def names(path: Path) -> dict[str, ast.AST]:
    return dict(named(tree(path)))


def source(path: Path, name: str) -> str:
    """The source of a function, including comments."""
    node = names(path)[name]
    return "\n".join(path.read_text(encoding="utf-8").splitlines()[node.lineno - 1 : node.end_lineno])


def called(node: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """The calls in a syntax tree, each with the last part of the function's name."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            yield getattr(call.func, "id", getattr(call.func, "attr", "")), call


def flags_in(node: ast.AST) -> set[str]:
    """The arguments of `add(...)` and `add_argument(...)` that start with two dashes."""
    adds = [call for name, call in called(node) if name in ("add", "add_argument")]
    given = [str(argument.value) for call in adds for argument in call.args if isinstance(argument, ast.Constant)]
    return {argument for argument in given if argument.startswith("--")}


def with_helpers(path: Path, name: str) -> set[str]:
    """A function and those of the same file that it calls, directly or indirectly."""
    functions = {node.name: node for node in tree(path).body if isinstance(node, ast.FunctionDef)}
    found, todo = set(), [name]
    while todo:
        if (current := todo.pop()) in functions and current not in found:
            found.add(current)
            todo += [other for other, _ in called(functions[current])]
    return found


@cache
def flags(path: Path) -> frozenset[str]:
    """The flags of a command: those its file adds, and those added by functions it imports.

    Such functions come from an `options.py`, or are the `main` or `parse_args` of another file.
    """
    found = flags_in(tree(path))
    for node in ast.walk(tree(path)):
        file = ROOT / f"{(getattr(node, 'module', '') or '').replace('.', '/')}.py"
        if isinstance(node, ast.ImportFrom) and file.is_file():
            imported = [a.name for a in node.names if file.name == "options.py" or a.name in ("main", "parse_args")]
            for function in set().union(*(with_helpers(file, name) for name in imported)):
                found |= flags_in(names(file)[function])
    return frozenset(found)


def code_files() -> list[Path]:
    """All code except the tests."""
    return [path for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")] if path.parent.name != "tests"]


def all_flags() -> set[str]:
    return {"--help"}.union(*map(flags, code_files()))


def code_of(text: str) -> list[str]:
    """The code in a Markdown text: lines of fenced blocks, with continuation lines joined, and inline `code`."""
    fenced = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", fenced.sub("", text))


def unknown_names(text: str) -> list[str]:
    """Each `file.py` and `file.py:name` in the text that does not exist in the repository."""
    unknown = []
    for file, name in (match for code in code_of(text) for match in re.findall(r"([\w./-]+\.py)(?::([\w.]+))?", code)):
        path = ROOT / file
        if not path.is_file() or name and name not in names(path):
            unknown.append(f"{file}:{name}" if name else file)
    return unknown


def unknown_flags(text: str) -> list[str]:
    """Each flag that no parser accepts. In a `python file.py` command, that file must accept it."""
    unknown = []
    for code in (part for line in code_of(text) for part in line.split(" && ")):
        command = re.search(r"python3? ([\w./-]+\.py)", code)
        if not command and not code.startswith("--"):
            continue  # another program's flags
        path = ROOT / command[1] if command else None
        known = (flags(path) | {"--help"} if path.is_file() else set()) if path else all_flags()
        unknown += [flag for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code) if flag not in known]
    return unknown


def rows(text: str) -> list[list[str]]:
    """The cells of each table row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def marked_functions(text: str) -> dict[int, tuple[str, str]]:
    """Equation number -> (file, function) of the table row with its marker."""
    found = {}
    for row in rows(text):
        marker, place = re.fullmatch(r"`# Eq\. \((\d)\)`", row[-1]), re.search(r"`([\w/]+\.py):([\w.]+)`", row[-2])
        if marker and place:
            found[int(marker[1])] = (place[1], place[2])
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_and_name_in_a_document_exists(path):
    assert unknown_names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_in_a_document_exists(path):
    assert unknown_flags(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", DOCUMENTS[:2], ids=lambda path: path.name)
def test_every_table_row_has_the_same_number_of_cells(path):
    for block in re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.MULTILINE):
        assert len({len(row) for row in rows(block)}) == 1, block


def test_each_equation_is_marked_in_the_function_named_in_the_document():
    places = marked_functions(PAPER_TO_CODE.read_text(encoding="utf-8"))
    assert sorted(places) == list(EQUATIONS)
    for number, (file, name) in places.items():
        assert f"  # Eq. ({number})\n" in source(ROOT / file, name) + "\n", (
            f"Eq. ({number}) is not marked in {file}:{name}"
        )


def test_each_equation_marker_appears_once_in_the_code():
    code = "\n".join(path.read_text(encoding="utf-8") for path in code_files())
    for number in EQUATIONS:
        assert len(re.findall(rf"  # Eq\. \({number}\)$", code, re.MULTILINE)) == 1, f"Eq. ({number})"


def test_the_hyper_parameters_are_those_of_the_presets():
    table = [
        row for row in rows(PAPER_TO_CODE.read_text(encoding="utf-8")) if "`training/presets.py:Preset." in row[-2]
    ]
    assert len(table) == 11
    for _, sd15, sdxl, where, _ in table:
        field, key = re.fullmatch(r"`training/presets\.py:Preset\.(\w+)`(?:, `(\w+)`)?", where).groups()
        for base, printed in ((presets.SD15, sd15), (presets.SDXL, sdxl)):
            value = getattr(base, field)
            value = value[key] if key else value
            assert type(value)(printed) == value, f"{where}: {printed} in the document, {value} in the code"


def value_in_code(path: Path, name: str, flag: str | None) -> object:
    """The constant `name` of a file, or if `name` is `parse_args` the default of a flag; None if not found."""
    for node in ast.walk(tree(path)):
        if name == "parse_args" and isinstance(node, ast.Call) and node.args and flag:
            if getattr(node.args[0], "value", "") == flag:
                return next(keyword.value.value for keyword in node.keywords if keyword.arg == "default")
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            value = node.value.args[0] if isinstance(node.value, ast.Call) else node.value
            return getattr(value, "value", None)
    return None


def test_the_constants_in_the_document_are_those_of_the_code():
    checked = 0
    for row in rows(PAPER_TO_CODE.read_text(encoding="utf-8")):
        place, flag = re.fullmatch(r"`([\w/]+\.py):(\w+)`", row[-2]), re.match(r"`(--[\w-]+)`", row[-1])
        value = value_in_code(ROOT / place[1], place[2], flag and flag[1]) if place and len(row) == 4 else None
        if isinstance(value, int | float):
            assert float(row[1]) == value, f"{row[-2]}: {row[1]} in the document, {value} in the code"
            checked += 1
    assert checked == 8


def test_the_checks_can_fail():
    text = "`train.py:nothing` `lost.py` `refl.py:T_MAX` `unet.py:UNet.forward` `unet.py:forward` `vae.py:VAE.config`"
    assert unknown_names(text) == ["train.py:nothing", "lost.py", "unet.py:forward"]
    text = "`--lr` `--nothing 3` `python sample.py --lr 1 --seed 3`\n"
    text += "```\npython train.py \\\n  --switch 3\npip install --pre\n```"
    assert sorted(unknown_flags(text)) == ["--lr", "--nothing", "--switch"]
    text = "| 1 | x | `a.py:f` | `# Eq. (1)` |\n| 2 | x | `a.py:f` | no marker |"
    assert marked_functions(text) == {1: ("a.py", "f")}


def test_ci_runs_the_readmes_test_command_word_for_word():
    (command,) = [line for line in code_of((ROOT / "README.md").read_text()) if line.endswith("/pytest -n auto")]
    assert command in [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]


@pytest.mark.parametrize("name", make_diagrams.DIAGRAMS)
def test_the_diagrams_are_those_of_the_code(name):
    drawn = make_diagrams.DIAGRAMS[name]()
    assert (ROOT / "docs" / f"{name}.svg").read_text(encoding="utf-8") == drawn, "run python docs/make_diagrams.py"
    ElementTree.fromstring(drawn)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
