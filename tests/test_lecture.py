"""docs/lecture.ipynb: its cells run without jupyter, and what it says about reward and diversity holds."""

import json
import re
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "docs" / "lecture.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_small_and_stored_with_its_outputs():
    assert PATH.stat().st_size < 1.5e6
    outputs = [output for cell in CODE[1:] for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs)
    assert not re.search(r"/(tmp|home|root|work|usr)/", PATH.read_text(encoding="utf-8"))


def test_each_code_cell_follows_a_text_and_is_short():
    kinds = [cell["cell_type"] for cell in CELLS]
    assert kinds == ["markdown", "code"] * len(CODE)
    assert max(len(cell["source"]) for cell in CODE) <= 30  # lines
    for number, cell in enumerate(CODE):
        compile("".join(cell["source"]), f"cell {number}", "exec")


@pytest.mark.slow
def test_the_reward_rises_and_the_diversity_falls(monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(PATH.parent)
    names: dict = {}
    for number, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    for method in ("refl", "imagerefl"):
        before, *_, after = names[f"{method}_watched"]
        assert after["reward"] > before["reward"] + 0.02
        assert after["diversity"] < before["diversity"] - 0.02
        base, *_, alone = names[f"{method}_curve"]
        assert alone["reward"] == pytest.approx(after["reward"], abs=1e-3)  # T' = 40 is the tuned model alone
        assert base == pytest.approx(names["refl_curve"][0], abs=1e-3)  # T' = 0 is the base model
