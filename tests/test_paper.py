"""The paper's numbers as data: the same as in the document that shows them, and beside ours."""

import json
import re
from pathlib import Path

import pytest

from report import paper, study_count
from report.study_plan import QUESTIONS

ROOT = Path(__file__).parent.parent
TABLE = paper.read()["Table 3"]


def documented() -> dict[str, list[list[str]]]:
    """The tables of docs/paper_to_code.md by their first header cells."""
    found, text = {}, (ROOT / "docs" / "paper_to_code.md").read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.setdefault(rows[0][1], []).append(rows)
    return found


@pytest.mark.parametrize("reward", ["HPSv2.1", "PickScore"])
def test_the_data_are_the_tables_of_the_document(reward):
    """Two transcriptions of Tables 1 and 3: the data were taken from the paper's text, the document by hand."""
    head, _, *rows = documented()["HPSv2.1"][reward == "PickScore"]
    assert head[1:] == TABLE["columns"]
    setting = ""
    for label, *cells in rows:
        if label == "±":
            assert [float(cell) for cell in cells] == TABLE["error"]
            continue
        base, colon, method = label.partition(": ")
        setting, method = (f"{base} {reward}", method) if colon else (setting, label)
        assert [float(cell) for cell in cells] == TABLE["settings"][setting][method]
    assert sum(len(methods) for methods in TABLE["settings"].values()) == 16


def test_table_2_is_that_of_the_document():
    (head, _, *rows) = documented()["SD1.5, HPSv2.1"][0]
    table = paper.read()["Table 2"]
    assert [cell.replace(",", "") for cell in head[1:]] == table["columns"]
    assert {label: [float(cell) for cell in cells] for label, *cells in rows} == table["rows"]
    assert [q.capitalize() for q in QUESTIONS] == list(table["rows"])


def test_the_papers_table_2_has_intervals_of_400_votes():
    text = "\n".join(study_count.paper_table())
    assert "| Accordance | 51.8 (46.9 to 56.7) not clear | 56.45 (51.6 to 61.3) |" in text
    assert "| Attractiveness | 45.9 (41.0 to 50.8) not clear |" in text
    assert text.count("not clear") == 2


def results(columns: dict, rows: dict[str, list]) -> dict:
    points = [
        {"label": label, "row": True, "values": {key: [v, 0.1] for key, v in zip(columns, values, strict=True)}}
        for label, values in rows.items()
    ]
    return {"base": "sd15", "points": points, "columns": [{"key": k, "digits": d} for k, d in columns.items()]}


def test_ours_stand_below_the_papers_with_the_change_against_refl():
    ours = results(
        {"hpsv2.1": 2, "tiny": 1, "fid": 1}, {"Base": [30, 1, 9], "ReFL": [40, 1, 50], "ImageReFL": [38, 2, 40]}
    )
    lines = paper.beside(ours, "SD1.5 HPSv2.1").splitlines()
    assert lines[0] == "| | HPSv2.1 | FID |"
    assert lines[2:4] == [
        "| ReFL, paper | 37.80 (+0 %) | 48.40 (+0 %) |",
        "| ReFL, ours | 40.00 (+0 %) | 50.0 (+0 %) |",
    ]
    assert lines[6:8] == [
        "| ImageReFL, paper | 37.00 (−2 %) | 39.91 (−18 %) |",
        "| ImageReFL, ours | 38.00 (−5 %) | 40.0 (−20 %) |",
    ]


def test_what_cannot_be_compared_is_said():
    with pytest.raises(ValueError, match="--setting SD3: choose from SD1.5 HPSv2.1, SD1.5 PickScore"):
        paper.beside(results({}, {"ReFL": []}), "SD3")
    with pytest.raises(ValueError, match="no row of ReFL"):
        paper.beside(results({}, {"Base": []}), "SDXL HPSv2.1")


def test_the_data_can_be_read_by_people():
    text = paper.TABLES.read_text()
    assert json.loads(text) and max(map(len, text.splitlines())) <= 120
