"""The paper's Tables 1 and 3 (Section 5.5, A.2), and ours beside them."""

import math

from report.paper import COLUMNS as KEYS
from report.paper import read

TABLE = read()["Table 3"]  # Table 1 is a part of it
BASES = {"sd15": "SD1.5", "sdxl": "SDXL"}
COLUMNS = {KEYS[title]: title for title in TABLE["columns"]}  # key in results.json -> the paper's title
ERRORS = TABLE["error"]  # one per column, for all rows
ROWS = ("ReFL", "ReFL AIG", "ReFL Combined", "ImageReFL")
DIGITS = (2, 2, 2, 3, 2, 4, 2, 4, 3)
DISTANCES = ("fid", "covdist", "logcovdist")  # measured on COCO, the others on HPDv2
# Rows of docs/paper_vs_official_code.md that could explain a difference, with a word on each.
TRAINING = {
    2: "doubled optimizer step",
    16: "the released configuration never runs ReFL updates",
    23: "squashed images",
}
SAMPLING = {31: "sampler", 35: "seeds"}
BY_COLUMN = {
    "hpsv2.1": {29: "bf16 scores"},
    "mps": {28: "words kept by the batch's maximum", 29: "bf16 scores"},
    "pickscore": {29: "bf16 scores"},
    "imagereward": {27: "raw or standardised score"},
    "diversity": {41: "which DINO", 42: "DINO's input and rounding", 43: "groups across prompts"},
    "fid": {36: "JPEG", 46: "reference images"},
    "covdist": {47: "definition not public"},
    "logcovdist": {47: "definition not public"},
}
BY_ROW = {"ReFL": {30: "a step of the base at switch 0"}, "ReFL AIG": {39: "guidance of AIG"}}
NOTABLE = 2.0  # standard errors


def printed(base: str, reward: str) -> dict[str, list[float]]:
    """Nine numbers for each of ROWS."""
    return TABLE["settings"][f"{BASES[base]} {COLUMNS[reward]}"]


def merge(results: list[dict]) -> dict[str, dict[str, list]]:
    """Label of a row -> column -> [mean, error], of several `results.json` of the same models."""
    rows = {}
    for point in (point for result in results for point in result["points"] if point["row"]):
        values = rows.setdefault(point["label"], {})
        values |= {key: pair for key, pair in point["values"].items() if key not in values}
    return rows


def listed(explanations: dict[int, str]) -> str:
    return ", ".join(f"{number} ({word})" for number, word in sorted(explanations.items()))


def compare(base: str, reward: str, results: dict[str, list[dict]], trained: bool, notes: list[str]) -> str:
    """Markdown: each row and column of ours beside the paper's, and what could explain notable differences.

    results: "hpdv2" -> results.json of the quality columns and the diversity; "coco" -> of FID and the distances.
    trained: by us, or published weights.
    """
    quality, distances = merge(results["hpdv2"]), merge(results["coco"])
    rows = {label: quality[label] | {key: distances[label][key] for key in DISTANCES} for label in quality}
    lines = ["| | | ours | paper | difference in errors |", "|---|---|---|---|---|"]
    notable = []
    for label, numbers in printed(base, reward).items():
        for key, paper, paper_error, digits in zip(COLUMNS, numbers, ERRORS, DIGITS, strict=True):
            if label not in rows:
                continue
            mean, error = rows[label][key][0], rows[label][key][1] or 0.0
            sigma = (mean - paper) / math.hypot(error, paper_error)
            ours = f"{mean:.{digits}f} ± {error:.{digits}f} | {paper:.{digits}f} ± {paper_error:g}"
            lines.append(f"| {label} | {COLUMNS[key]} | {ours} | {sigma:+.1f} |")
            if abs(sigma) > NOTABLE:
                own = listed(BY_COLUMN.get(key, {}) | BY_ROW.get(label, {}))
                notable.append(f"| {label} | {COLUMNS[key]} | {sigma:+.1f} | {own} |")
    table = "Table 1" if reward == "hpsv2.1" else "Table 3"
    title = f"# {table}, {BASES[base]} tuned on {reward}: ours beside the paper's"
    head = [title, "", *(f"- {note}" for note in notes), ""]
    return "\n".join([*head, *lines, *explain(notable, trained), *base_rows(rows)]) + "\n"


def explain(notable: list[str], trained: bool) -> list[str]:
    """The section on differences beyond the errors."""
    lines = ["", f"## Differences beyond {NOTABLE:g} errors", ""]
    if not notable:
        return [*lines, "None."]
    everywhere = listed(SAMPLING | (TRAINING if trained else {}))
    lines += ["Rows of docs/paper_vs_official_code.md that could explain them; none is a proof. "
              f"Everywhere: {everywhere}.", "", "| | | errors | besides |", "|---|---|---|---|"]  # fmt: skip
    return lines + notable


def base_rows(rows: dict[str, dict[str, list]]) -> list[str]:
    """The rows of the base model alone, which the paper does not print."""
    lines = ["", "## The base model, which the paper's table does not have", ""]
    lines += ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label in (label for label in rows if label not in ROWS):
        cells = (f"{rows[label][key][0]:.{digits}f}" for key, digits in zip(COLUMNS, DIGITS, strict=True))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines
