"""The numbers that the paper prints, beside ours.

    python -m report.paper FOLDER --setting "SD1.5 HPSv2.1"

prints the rows of Table 1 or 3 beside those of an output folder of evaluate.py, and the change of each against ReFL,
which other bases and features can be compared by. `docs/paper_tables.json` holds Tables 2 and 3; Table 1 is those
settings of Table 3 that were tuned on HPSv2.1.
"""

import json
from pathlib import Path

from report import page
from report.curves import column, number, stat
from utils import cli

TABLES = Path(__file__).parent.parent / "docs" / "paper_tables.json"
COLUMNS = {  # the paper's name -> ours
    "HPSv2.1": "hpsv2.1",
    "MPS": "mps",
    "PickScore": "pickscore",
    "IR": "imagereward",
    "CLIPScore": "clipscore",
    "DinoDiversity": "diversity",
    "FID": "fid",
    "CovDist": "covdist",
    "LogCovDist": "logcovdist",
}


def read() -> dict:
    """{"Table 2": {"columns", "votes", "rows"}, "Table 3": {"columns", "better", "error", "settings"}}."""
    return json.loads(TABLES.read_text(encoding="utf-8"))


def with_change(value: float | None, first: float | None, digits: int) -> str:
    """A value, and in brackets its change against ReFL's."""
    if value is None or not first:
        return number(value, digits)
    return f"{number(value, digits)} ({100 * (value / first - 1):+.0f} %)".replace("-", "−")


def digits_of(values: list[float]) -> int:
    return max(len(str(value).partition(".")[2]) for value in values)


def beside(results: dict, setting: str) -> str:
    """A Markdown table: for each method the paper's row, then ours, in the columns that both have.

    Raises ValueError for a setting that is not in the paper, or results without a row of its methods.
    """
    table = read()["Table 3"]
    if setting not in table["settings"]:
        raise ValueError(f"--setting {setting}: choose from {', '.join(table['settings'])}")
    theirs = table["settings"][setting]
    known = {c["key"] for c in results["columns"]}
    shown = [(name, COLUMNS[name], i) for i, name in enumerate(table["columns"]) if COLUMNS[name] in known]
    ours = {p["label"]: p for p in reversed(results["points"]) if p["row"] and p["label"] in theirs}
    if not ours:
        raise ValueError(f"no row of {', '.join(theirs)}; evaluate with --checkpoint of such models")
    lines = ["| | " + " | ".join(name for name, _, _ in shown) + " |", "|---" + "|---:" * len(shown) + "|"]
    for label, values in theirs.items():
        cells = [with_change(values[i], theirs["ReFL"][i], digits_of([row[i] for row in theirs.values()]))
                 for _, _, i in shown]  # fmt: skip
        lines.append(f"| {label}, paper | " + " | ".join(cells) + " |")
        if label in ours:
            first = ours.get("ReFL", {"values": {}})
            cells = [with_change(stat(ours[label], key)[0], stat(first, key)[0], column(results, key)["digits"])
                     for _, key, _ in shown]  # fmt: skip
            lines.append(f"| {label}, ours | " + " | ".join(cells) + " |")
    note = f"In brackets: change against ReFL. Paper: {setting}. Ours: {results['base']}; its features may be others."
    return "\n".join([*lines, "", note]) + "\n"


def main(args) -> None:
    print(beside(page.read(Path(args.folder)), args.setting))


if __name__ == "__main__":
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", help="output folder of evaluate.py")
    parser.add_argument("--setting", default="SD1.5 HPSv2.1", help="base and reward (default: SD1.5 HPSv2.1)")
    cli.run(main, parser.parse())
