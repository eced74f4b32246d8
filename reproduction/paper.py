"""The paper's Tables 1 and 3 (Section 5.5, A.2), and ours beside them."""

import math

COLUMNS = {  # key in results.json -> the paper's title
    "hpsv2.1": "HPSv2.1",
    "mps": "MPS",
    "pickscore": "PickScore",
    "imagereward": "IR",
    "clipscore": "CLIPScore",
    "diversity": "DinoDiversity",
    "fid": "FID",
    "covdist": "CovDist",
    "logcovdist": "LogCovDist",
}
ERRORS = (0.07, 0.10, 0.03, 0.018, 0.09, 0.003, 0.5, 0.0002, 0.001)  # one per column, for all rows
ROWS = ("ReFL", "ReFL AIG", "ReFL Combined", "ImageReFL")
TABLES = {  # (base, reward) -> a row of nine numbers for each of ROWS
    ("sd15", "hpsv2.1"): (
        (37.80, 15.50, 22.07, 1.163, 29.81, 0.172, 48.4, 0.0093, 0.164),
        (36.07, 14.94, 21.89, 1.024, 29.56, 0.231, 42.5, 0.0070, 0.102),
        (36.83, 15.45, 22.00, 1.070, 30.10, 0.220, 39.83, 0.0066, 0.123),
        (37.00, 15.55, 22.05, 1.178, 30.37, 0.220, 39.91, 0.0059, 0.129),
    ),
    ("sdxl", "hpsv2.1"): (
        (39.31, 16.36, 22.96, 1.475, 31.96, 0.1532, 45.3, 0.0073, 0.147),
        (37.48, 15.71, 23.00, 1.295, 31.86, 0.233, 42.16, 0.0075, 0.093),
        (37.02, 16.32, 23.25, 1.445, 33.69, 0.2317, 29.0, 0.0052, 0.059),
        (37.00, 16.32, 23.54, 1.519, 33.59, 0.2116, 31.7, 0.0054, 0.061),
    ),
    ("sd15", "pickscore"): (
        (29.16, 12.66, 23.55, 0.877, 28.98, 0.1794, 47.0, 0.0188, 0.083),
        (27.16, 11.80, 23.10, 0.680, 29.05, 0.229, 43.5, 0.020, 0.069),
        (29.06, 12.76, 23.45, 0.850, 29.56, 0.2185, 40.8, 0.0107, 0.071),
        (29.54, 13.19, 23.54, 0.960, 30.39, 0.2166, 37.8, 0.0100, 0.068),
    ),
    ("sdxl", "pickscore"): (
        (33.38, 15.11, 24.71, 1.382, 31.17, 0.1223, 47.0, 0.0179, 0.135),
        (31.66, 14.34, 24.30, 1.120, 31.71, 0.206, 46.5, 0.0202, 0.075),
        (33.10, 15.41, 24.45, 1.357, 33.15, 0.2166, 34.8, 0.0111, 0.054),
        (33.26, 15.53, 24.60, 1.423, 33.34, 0.2090, 35.1, 0.0092, 0.058),
    ),
}
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
    for label, numbers in zip(ROWS, TABLES[base, reward], strict=True):
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
    name, table = {"sd15": "SD1.5", "sdxl": "SDXL"}[base], "Table 1" if reward == "hpsv2.1" else "Table 3"
    title = [f"# {table}, {name} tuned on {reward}: ours beside the paper's", "", *(f"- {note}" for note in notes), ""]
    return "\n".join([*title, *lines, *explain(notable, trained), *base_rows(rows)]) + "\n"


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
