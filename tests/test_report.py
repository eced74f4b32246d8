"""The report: table, curves and page agree with results.json, whatever the prompts hold, and load nothing."""

import base64
import csv
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import stdev
from xml.etree import ElementTree

import pytest
from PIL import Image

from report import curves as drawing
from report import page as report

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
NASTY = ["<b>&\"'</b> {{grid}} \\1 $x", "naïve 鱼 🐙 \u202e \ud800 \x0b", "a | b", "octopus"]


def colour(point: int, prompt: int, seed: int) -> tuple[int, int, int]:
    return 40 + 12 * point, 60 * prompt, 80 * seed


def make(
    folder: Path, runs: int = 1, methods=("refl", "imagerefl"), sweep=(20, 38), prompts=NASTY, side: int = 8
) -> dict:
    """A results.json in which every image is of one colour, that of its point, prompt and seed."""
    columns = [
        ("tiny", "tiny (trained)", "higher", 2),
        ("diversity", "Diversity", "higher", 3),
        ("fid", "FID", "lower", 1),
    ]
    points = []

    def add(label, row, checkpoint, method, kind, value):
        n = len(points)
        values = {"tiny": [0.9 - 0.05 * n, 0.01], "diversity": [0.01 * (n + 1), 0.002], "fid": [n - 0.5, None]}
        about = {"label": label, "row": row, "checkpoint": checkpoint, "method": method, "kind": kind, "value": value}
        points.append(about | {"folder": f"points/{n}", "values": values})
        for p in range(len(prompts)):
            for seed in (1, 2):
                path = folder / f"points/{n}/{p:05d}-{seed}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (side, side), colour(n, p, seed)).save(path)

    add("Base", True, None, None, "switch", 40)
    for run in range(runs):
        for method in methods:
            name, own = {"refl": ("ReFL", 10), "imagerefl": ("ImageReFL", 30)}[method]
            checkpoint = f"runs/{method}-{run}"
            if method == "refl":
                add("ReFL", True, checkpoint, method, "switch", 0)
                add("ReFL AIG", True, checkpoint, method, "aig", 1.0)
            add(name + " Combined" * (method == "refl"), True, checkpoint, method, "switch", own)
            for value in sweep:
                add(name, False, checkpoint, method, "switch", value)
    results = {
        "base": "tiny", "steps": 40, "guidance": 2.0, "resolution": side, "images_per_prompt": 2, "seed": 1,
        "prompts": list(prompts), "notes": ["features: <tiny>"], "points": points,
        "columns": [dict(zip(("key", "title", "better", "digits"), c, strict=True)) for c in columns],
        "axes": {"diversity": "diversity", "quality": ["tiny"]},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return results


class Page(HTMLParser):
    """What a page holds: (tag, attributes) in order, and the text of each cell of each table row."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.rows, self.source = [], [], path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_every_point_is_once_in_the_curve_and_where_its_values_say(tmp_path):
    results = make(tmp_path)
    svg = ElementTree.fromstring(report.curves(results, "tiny"))
    points = [g for g in svg.iter(f"{SVG}g") if g.get("data-point")]
    groups = {int(g.get("data-point")): g for g in points}
    assert sorted(groups) == list(range(len(results["points"]))) and len(points) == len(groups)
    dots = {n: g.find(f"{SVG}circle") for n, g in groups.items()}
    x, y = ([float(dots[n].get(axis)) for n in sorted(dots)] for axis in ("cx", "cy"))
    for there in (x, y):  # values are 0, 1, 2, .. apart: so are places
        steps = [b - a for a, b in pairwise(there)]
        assert steps == pytest.approx([steps[0]] * len(steps), abs=0.21) and steps[0] > 10
    bar, bar2 = ({k: float(v) for k, v in line.attrib.items()} for line in groups[3].iter(f"{SVG}line"))
    assert bar["y1"] == bar["y2"] == y[3] and bar2["x1"] == bar2["x2"] == x[3]
    assert (bar["x1"], bar["x2"]) == pytest.approx((x[3] - 0.2 * (x[4] - x[3]), x[3] + 0.2 * (x[4] - x[3])), abs=0.2)
    assert (bar2["y1"], bar2["y2"]) == pytest.approx((y[3] + 0.2 * (y[4] - y[3]), y[3] - 0.2 * (y[4] - y[3])), abs=0.2)
    ticks = {
        t.text: float(t.get("x")) for t in svg.iter(f"{SVG}text") if t.get("text-anchor") == "middle" and t.get("y")
    }
    assert ticks["0.04"] == pytest.approx(x[3], abs=0.1)


def test_a_curve_is_in_order_of_the_switch_and_ends_at_the_base(tmp_path):
    results = make(tmp_path)
    results["points"][1:] = results["points"][:0:-1]
    svg = ElementTree.fromstring(report.curves(results, "tiny"))
    at = {int(g.get("data-point")): g.find(f"{SVG}circle") for g in svg.iter(f"{SVG}g") if g.get("data-point")}
    at = {n: f"{c.get('cx')},{c.get('cy')}" for n, c in at.items()}
    n = {(p["method"], p["kind"], p["value"]): i for i, p in enumerate(results["points"])}
    lines = [line.get("points").split() for line in svg.iter(f"{SVG}polyline")]
    assert [at[n["refl", "switch", v]] for v in (0, 10, 20, 38)] + [at[0]] in lines
    assert [at[n["imagerefl", "switch", v]] for v in (20, 30, 38)] + [at[0]] in lines
    assert [at[n["refl", "aig", 1.0]]] in lines and len(lines) == 3


def test_labels_do_not_overlap(tmp_path):
    results = make(tmp_path, sweep=range(1, 10))
    for i, p in enumerate(results["points"][1:]):  # a crowd
        p["values"] |= {"tiny": [0.7 + 0.01 * math.sin(i), 0.01], "diversity": [0.05 + 0.01 * math.cos(2 * i), 0.001]}
    svg = ElementTree.fromstring(report.curves(results, "tiny"))
    (group,) = (g for g in svg.iter(f"{SVG}g") if g.get("class") == "labels")
    boxes = []
    for label in group:
        size, x, y = (float(label.get(name)) for name in ("font-size", "x", "y"))
        boxes.append(
            (x - 0.3 * size * len(label.text), y - 0.8 * size, x + 0.3 * size * len(label.text), y + 0.2 * size)
        )
    assert {label.text for label in group} >= {"Base", "ReFL", "ReFL AIG", "ReFL Combined", "ImageReFL"}
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_runs_of_one_method_share_a_colour(tmp_path):
    """The line goes through the means of the runs, whose own points are there too; the error is that over runs."""
    results = make(tmp_path, runs=3)
    results["points"].append(results["points"][0] | {"label": "Base, no guidance"})  # a second star, not a mean
    svg = ElementTree.fromstring(report.curves(results, "tiny"))
    lines = {line.get("color"): line.get("points").split() for line in svg.iter(f"{SVG}polyline")}
    assert len(lines) == 3
    at = {int(g.get("data-point")): g.find(f"{SVG}circle") for g in svg.iter(f"{SVG}g") if g.get("data-point")}
    assert sorted(at) == list(range(len(results["points"])))
    own = [i for i, p in enumerate(results["points"]) if (p["method"], p["kind"], p["value"]) == ("refl", "switch", 10)]
    mean = [sum(float(at[i].get(axis)) for i in own) / 3 for axis in ("cx", "cy")]
    blue = [tuple(map(float, point.split(","))) for point in lines[drawing.COLOURS[0]]]
    assert len(own) == 3 and any(point == pytest.approx(mean, abs=0.11) for point in blue)
    values = [results["points"][i]["values"]["tiny"][0] for i in own]
    keys = results["axes"]["diversity"], "tiny"
    stars = drawing.marks_of(results["points"], keys, dict.fromkeys((0, len(results["points"]) - 1), ("Base", "")))
    assert [star.points for star in stars] == [[0], [len(results["points"]) - 1]]
    (mark,) = drawing.marks_of(results["points"], keys, dict.fromkeys(own, ("refl", "switch")))
    assert mark.at[1] == pytest.approx(sum(values) / 3) and mark.errors[1] == pytest.approx(stdev(values) / 3**0.5)


def test_markdown_shows_errors_and_the_best_value(tmp_path):
    results = make(tmp_path)
    results["points"][2]["label"] = "A | B"
    lines = report.markdown(results).splitlines()
    assert lines[:5] == [
        "| Model | Base + tuned steps | tiny (trained) ↑ | Diversity ↑ | FID ↓ |",
        "| --- | --- | ---: | ---: | ---: |",
        "| Base | 40 + 0 | 0.90 ± 0.01 | 0.010 ± 0.002 | −0.5 |",
        "| ReFL | 0 + 40 | 0.85 ± 0.01 | 0.020 ± 0.002 | 0.5 |",  # the base is better
        "| A \\| B | λ = 1 | 0.80 ± 0.01 | 0.030 ± 0.002 | 1.5 |",
    ]
    assert lines[6] == "| ImageReFL | 30 + 10 | 0.60 ± 0.01 | **0.070 ± 0.002** | 5.5 |"
    assert lines[7:] == ["", report.BOLD, "", "features: <tiny>"]


def bold(results: dict, column: str = "Diversity ↑") -> list[str]:
    """The bold values of a column of the Markdown table."""
    table = [
        [cell.strip() for cell in line.split("|")] for line in report.markdown(results).splitlines() if "|" in line
    ]
    at = table[0].index(column)
    return [row[at].strip("*") for row in table if row[at].startswith("**")]


def set_diversity(results: dict, *values: tuple[float, float | None]) -> dict:
    """The diversity of the table's rows: base, ReFL, AIG, Combined, ImageReFL."""
    for point, pair in zip([p for p in results["points"] if p["row"]], values, strict=True):
        point["values"]["diversity"] = list(pair)
    return results


def test_a_single_tuned_row_is_not_bold(tmp_path):
    results = set_diversity(make(tmp_path, methods=("imagerefl",)), (0.1, 0.01), (0.5, 0.01))
    assert bold(results) == [] and "Bold" not in report.markdown(results)


def test_a_value_worse_than_the_base_is_not_bold(tmp_path):
    values = [(0.9, 0.01), (0.3, 0.01), (0.4, 0.01), (0.5, 0.01), (0.8, 0.01)]
    assert bold(set_diversity(make(tmp_path), *values)) == []


def test_a_value_is_bold_only_beyond_the_error_of_the_difference(tmp_path):
    results, others = make(tmp_path), [(0.1, 0.01), (0.3, 0.03), (0.2, 0.01), (0.1, 0.01)]
    assert bold(set_diversity(results, *others, (0.36, 0.04))) == ["0.360 ± 0.040"]  # 0.06 above 0.3 ± 0.05
    assert bold(set_diversity(results, *others, (0.34, 0.04))) == []
    assert bold(set_diversity(results, *others, (0.36, None))) == []
    assert 'class="mean best"' not in report.write(results, tmp_path).read_text(encoding="utf-8")


def test_lower_is_bold_where_lower_is_better(tmp_path):
    results = make(tmp_path)
    for n, point in enumerate(p for p in results["points"] if p["row"]):
        point["values"]["fid"] = [9 - n, 0.1]
    assert bold(results, "FID ↓") == ["5.0 ± 0.1"]


def test_checkpoints_with_one_folder_name_are_told_apart_in_table_and_page(tmp_path):
    results = make(tmp_path, runs=2)
    for point in results["points"]:
        if point["checkpoint"]:
            method, run = point["checkpoint"].removeprefix("runs/").split("-")
            point["checkpoint"] = f"runs/seed {run}/{method}/unet"
    table = report.markdown(results)
    assert "| ReFL (seed 0/refl/unet) |" in table and "| ReFL (seed 1/refl/unet) |" in table
    page = Page(report.write(results, tmp_path))
    assert "seed 0/refl/unet, seed 0/imagerefl/unet" in page.source  # the choice of the training run
    tooltips = re.findall(r"<title>(ReFL AIG[^,]*)", page.source)
    assert tooltips == ["ReFL AIG (seed 0/refl/unet)", "ReFL AIG (seed 1/refl/unet)"]


def test_csv_holds_every_point(tmp_path):
    results = make(tmp_path)
    results["points"][3]["values"]["tiny"] = [math.nan, math.inf]
    rows = list(csv.DictReader(io.StringIO(report.csv(results))))
    assert len(rows) == len(results["points"])
    for row, point in zip(rows, results["points"], strict=True):
        assert (row["label"], row["kind"], float(row["value"])) == (point["label"], point["kind"], point["value"])
        assert float(row["diversity"]) == point["values"]["diversity"][0] and row["fid_error"] == ""
    assert (rows[3]["tiny"], rows[3]["tiny_error"]) == ("", "") and float(rows[1]["tiny_error"]) == 0.01


def test_the_table_of_the_page_is_that_of_the_results(tmp_path):
    page = Page(report.write(make(tmp_path), tmp_path))
    assert ["ReFL Combined", "10 + 30", "0.75", "±\xa00.01", "0.040", "±\xa00.002", "2.5", ""] in page.rows
    best = re.findall(r'<td class="mean best">([^<]*)<', page.source)
    assert best == ["0.070"]


def test_the_page_loads_nothing(tmp_path):
    page = Page(report.write(make(tmp_path), tmp_path))
    links = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data", "action") if a.get(key)]
    assert links and all(link.startswith("data:") for link in links)
    assert set(re.findall(r"\w+://[^\s\"'<]*", page.source)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in page.source and "@import" not in page.source


def test_any_characters_in_prompts_are_shown(tmp_path):
    page = Page(report.write(make(tmp_path), tmp_path))
    titles = [a["title"] for a in page.all("span") if "title" in a]
    assert titles == [p.replace("\ud800", "\ufffd").replace("\x0b", "\ufffd") for p in NASTY]
    assert not page.all("b")
    assert all(any(image["alt"].startswith(title + ": ") for title in titles) for image in page.all("img"))


@pytest.mark.parametrize("runs", (1, 2))
def test_each_state_shows_the_images_of_its_points(tmp_path, runs):
    results = make(tmp_path, runs=runs)
    page = Page(report.write(results, tmp_path))
    stops = json.loads(re.search(r"stops = (\[.*?\])", page.source)[1])
    assert stops == ["table", "20", "38"]
    n = {(p["checkpoint"], p["kind"], p["value"]): i for i, p in enumerate(results["points"])}
    for run in range(runs):
        for stop in stops:
            state, refl, ours = f"{run}.{stop}", f"runs/refl-{run}", f"runs/imagerefl-{run}"
            shown = [a["src"] for a in page.all("img") if state in a.get("data-at", state).split()]
            own, late = (10, 30) if stop == "table" else (int(stop), int(stop))
            points = [0, n[refl, "switch", 0], n[refl, "aig", 1], n[refl, "switch", own], n[ours, "switch", late]]
            wanted = [colour(i, p, seed) for p in range(4) for i in points for seed in (1, 2)]
            got = [
                Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))).convert("RGB").getpixel((4, 4))
                for src in shown
            ]
            assert len(got) == len(wanted)
            assert max(abs(a - b) for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True)) < 6


def hidden(page: Page, element: str) -> bool:
    return any("hidden" in a for a in page.all("div") + page.all("label") if a.get("class") == element)


def test_the_slider_is_there_only_with_a_sweep(tmp_path):
    assert not hidden(Page(report.write(make(tmp_path), tmp_path)), "switch")
    page = Page(report.write(make(tmp_path, sweep=()), tmp_path))
    assert hidden(page, "switch") and hidden(page, "bar") and len(page.all("img")) == 4 * 5 * 2


def test_one_checkpoint_is_enough(tmp_path):
    page = Page(report.write(make(tmp_path, methods=("imagerefl",)), tmp_path))
    assert not hidden(page, "switch") and hidden(page, "run")
    assert not hidden(Page(report.write(make(tmp_path, runs=2), tmp_path)), "run")


def test_the_base_alone_is_a_report_too(tmp_path):
    results = make(tmp_path, methods=())
    assert len(Page(report.write(results, tmp_path)).all("img")) == 4 * 2
    assert report.markdown(results).count("\n| Base") == 1


def test_missing_values_leave_gaps(tmp_path):
    results = make(tmp_path)
    results["points"][1]["values"] = {"tiny": [None, None]}
    results["points"][2]["values"]["tiny"] = [0.5, math.nan]
    svg = report.curves(results, "tiny")
    assert 'data-point="1"' not in svg and 'data-point="2"' in svg and "nan" not in svg.lower()
    assert "| ReFL | 0 + 40 | – | – | – |" in report.markdown(results)
    report.write(results, tmp_path)
    for point in results["points"]:
        point["values"] = {}
    with pytest.raises(ValueError, match="no point has both"):
        report.curves(results, "tiny")


def test_large_images_shrink_and_prompts_are_spread_over_the_list(tmp_path, monkeypatch):
    results = make(tmp_path, methods=("imagerefl",), prompts=[f"prompt {i}" for i in range(9)], side=256)
    monkeypatch.setattr(report, "PROMPTS", 3)
    page = Page(report.write(results, tmp_path))
    assert [a["title"] for a in page.all("span") if "title" in a] == ["prompt 0", "prompt 3", "prompt 6"]
    image = page.all("img")[0]["src"].split(",")[1]
    assert Image.open(io.BytesIO(base64.b64decode(image))).size == (192, 192)
    monkeypatch.setattr(report, "BYTES", 1)
    page = Page(report.write(results, tmp_path))
    assert [a["title"] for a in page.all("span") if "title" in a] == ["prompt 0"]


def test_a_missing_image_is_named_and_nothing_is_written(tmp_path):
    results = make(tmp_path)
    (tmp_path / "points/2/00001-2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"points/2/00001-2\.png: no such image; run evaluate.py again"):
        report.write(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["points", "results.json"]


@pytest.mark.parametrize(
    "content, message",
    (
        (None, "not there"),
        ("{", "not valid JSON"),
        ("[]", "not as evaluate.py writes it"),
        ('{"base": "tiny"}', "KeyError('steps')"),
        (lambda r: r["points"].clear(), "not as evaluate.py writes it"),
        (lambda r: r["points"].pop(0), "the base is not the first point"),
        (lambda r: r["axes"].update(quality=["hps"]), "no column for the axes hps"),
        (lambda r: r["points"][1].pop("folder"), "KeyError('folder')"),
    ),
)
def test_bad_results_are_reported_in_one_line(tmp_path, content, message):
    path = tmp_path / "results.json"
    if callable(content):
        results = make(tmp_path)
        content(results)
        content = json.dumps(results)
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, OSError)) as error:
        report.read(tmp_path)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_the_command_writes_the_page_or_says_why_not(tmp_path):
    command = [sys.executable, "-m", "report.page", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "results.json: not there" in done.stderr
    make(tmp_path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "report.html").stat().st_size > 10_000, done.stderr
