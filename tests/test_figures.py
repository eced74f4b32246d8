"""The figures: what is drawn is what was measured, and stands where it should."""

import json
import re
from argparse import Namespace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from test_report import SVG, colour, make

from report import figures, page
from report.curves import COLOURS
from report.panels import BOTTOM, LEFT, PANEL_W, RIGHT, TOP, Panel, draw
from utils.images import cells, grid, save_png


def run_folder(folder: Path, slope: float = 1.0, prompts: int = 3) -> Path:
    """A run whose monitored values are known, with grids in which every image has a colour of its own."""
    (folder / "samples").mkdir(parents=True)
    for update in (0, 2, 4, 6, 8, 10):
        rows = [[Image.new("RGB", (128, 128), (20 * update, 60 * p, 60 * k)) for k in range(4)] for p in range(prompts)]
        heads = ["base, seed 0", "base, seed 1", "tuned, seed 0", "tuned, seed 1"]
        sheet = grid(rows, ["a prompt"] * prompts, heads)
        save_png(sheet, folder / "samples" / f"step-{update:06d}.png", "\n".join(["a prompt"] * prompts))
    first = {"reward": [0.4, 0.6], "diversity": [0.3, 0.3], "fid": [2.0], "logcovdist": [0.1]}
    (folder / "run.json").write_text(json.dumps({"monitor": first}))
    log = [{"update": u, "reward": 0.1} for u in range(1, 11)]
    for row in log[1::2]:
        row |= {f"monitor_{key}": first[key][0] + slope * 0.01 * row["update"] for key in first}
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return folder


def test_cells_are_the_pictures_of_a_grid():
    rows = [[Image.new("RGB", (128, 128), (40 * r, 40 * c, 9)) for c in range(4)] for r in range(3)]
    found = cells(grid(rows, ["one", "two", "three"], ["a", "b", "c", "a long name of two lines"]))
    assert [[image.tobytes() for image in row] for row in found] == [[i.tobytes() for i in row] for row in rows]


def test_figure_1_shows_the_base_model_and_stages_of_training(tmp_path):
    sheet = figures.along_training(run_folder(tmp_path / "run"))
    step, left = 128 + 4, sheet.width - 6 * 132
    top = sheet.height - 4 * step
    shown = [[sheet.getpixel((left + c * step + 64, top + r * step + 64)) for c in range(6)] for r in range(4)]
    heads = [sheet.crop((left + c * step, 0, left + c * step + 128, top)).tobytes() for c in range(6)]
    assert heads == heads[:2] * 3 and heads[0] != heads[1]  # "a prompt" and "other seed" over each pair
    stages = [(0, (0, 1)), (4, (2, 3)), (6, (2, 3)), (10, (2, 3))]  # the base model's columns, then the tuned one's
    assert shown == [[(20 * u, 60 * p, 60 * k) for p in range(3) for k in seeds] for u, seeds in stages]
    with pytest.raises(figures.NothingToDraw, match="--sample-every"):
        figures.along_training(tmp_path)


def panels_of(svg: str) -> list[ElementTree.Element]:
    return [g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if g.get("transform")]


def lines_of(panel: ElementTree.Element) -> list[list[tuple[float, float]]]:
    found = [line.get("points").split() for line in panel.iter(f"{SVG}polyline")]
    return [[tuple(map(float, point.split(","))) for point in line] for line in found]


def test_figure_2_has_a_panel_per_quantity_and_a_line_per_run(tmp_path):
    runs = [run_folder(tmp_path / "refl"), run_folder(tmp_path / "imagerefl", slope=-1.0)]
    svg = figures.over_training(runs)
    titles = re.findall(r'font-weight="600">([^<]*)<', svg)
    assert titles == ["Reward, trained on ↑", "Diversity ↑", "FID ↓", "LogCovDist ↓"]
    for panel in panels_of(svg):
        up, down = lines_of(panel)
        assert len(up) == len(down) == 6 and up[0] == pytest.approx(down[0], abs=12)
        assert up[-1][1] < up[1][1] and down[-1][1] > down[1][1]  # larger values are further up
        assert up[-1][0] - up[1][0] == pytest.approx(4 * (up[2][0] - up[1][0]), abs=0.5)
    assert "refl</text>" in svg and "imagerefl</text>" in svg
    for run in runs:
        about = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(about | {"args": {"method": run.name}}))
    assert ">ReFL</text>" in (svg := figures.over_training(runs)) and ">ImageReFL</text>" in svg
    (runs[0] / "run.json").write_text(json.dumps(about | {"args": {"method": "imagerefl"}}))
    assert ">refl</text>" in (svg := figures.over_training(runs)) and ">imagerefl</text>" in svg  # two of one method
    (tmp_path / "refl" / "log.jsonl").write_text('{"update": 1, "reward": 0.5}\n')
    (tmp_path / "refl" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="--monitor N"):
        figures.over_training([tmp_path / "refl"])


def test_figure_4_has_an_image_per_T_prime(tmp_path):
    results = make(tmp_path, sweep=(5, 20, 38))
    sheet = figures.over_T_prime(results, tmp_path)
    at = {(p["checkpoint"], p["value"]): i for i, p in enumerate(results["points"]) if p["kind"] == "switch"}
    step, columns = 132, (5, 20, 38, 40)
    left, top = sheet.width - len(columns) * step, sheet.height - 4 * step
    for row, (prompt, run) in enumerate([(1, "refl"), (1, "imagerefl"), (3, "refl"), (3, "imagerefl")]):
        for c, value in enumerate(columns):
            point = at[f"runs/{run}-0", value] if value < 40 else 0
            shown = sheet.getpixel((left + c * step + 64, top + row * step + 64))
            assert shown == tuple(min(255, v) for v in colour(point, prompt, 1))


def test_figure_7_goes_from_the_tuned_model_to_the_base(tmp_path):
    results = make(tmp_path, runs=2, sweep=(0, 20, 38))
    (panel,) = panels_of(figures.over_switch(results))
    for line in lines_of(panel):
        xs = [x for x, _ in line]
        assert xs == sorted(xs) and xs[-1] <= RIGHT and xs[0] >= LEFT and len(set(xs)) == len(xs)
        assert all(TOP <= y <= BOTTOM for _, y in line)
    refl, imagerefl = lines_of(panel)
    assert refl[-1] == imagerefl[-1] and len(refl) == 5 and len(imagerefl) == 5  # both end at the base model
    results["points"] = [p for p in results["points"] if p["row"]]
    for p in results["points"][1:]:
        p["values"]["tiny"] = [None, None]
    with pytest.raises(ValueError, match="--sweep switch"):
        figures.over_switch(results)


def test_figure_5_is_drawn_against_each_measure_of_diversity(tmp_path):
    results = make(tmp_path)
    svg = ElementTree.fromstring(page.curves(results, "tiny", "fid"))
    assert svg.get("aria-label") == "tiny (trained) against FID"
    assert "← better, FID" in "".join(t.text or "" for t in svg.iter(f"{SVG}text"))


def test_lines_differ_by_colour_and_by_marker():
    lines = {f"run {k}": [(0, k, None), (1, k + 1, 0.2)] for k in range(5)}
    svg = draw([Panel("Reward", "higher", lines)], "update", "a plot")
    assert all(c in svg for c in COLOURS[:5])
    assert svg.count("<circle") == 3 and len(set(re.findall(r"<polygon points=\"[^\"]+\"", svg))) == 12
    assert float(ElementTree.fromstring(svg).get("width")) >= 2 * PANEL_W


def test_the_command_writes_all_figures_of_a_run_and_an_evaluation(tmp_path):
    run_folder(tmp_path / "run")
    make(tmp_path / "evaluation")
    folders = [str(tmp_path / name) for name in ("run", "evaluation")]
    figures.main(Namespace(folders=folders, output_dir=str(tmp_path / "figures")))
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "figure-1-run.png", "figure-2.svg", "figure-4-evaluation.png", "figure-5-evaluation-tiny-diversity.svg",
        "figure-5-evaluation-tiny-fid.svg", "figure-7-evaluation.svg",
    ]  # fmt: skip


def test_a_figure_for_which_a_folder_has_nothing_is_left_out_with_a_reason(tmp_path, capsys):
    run = run_folder(tmp_path / "run")
    (run / "log.jsonl").write_text('{"update": 1, "reward": 0.5}\n')
    (run / "run.json").write_text("{}")
    output = tmp_path / "figures"
    figures.main(Namespace(folders=[str(run)], output_dir=str(output)))
    assert [path.name for path in output.iterdir()] == ["figure-1-run.png"]
    assert "left out: figure-2.svg" in (said := capsys.readouterr().out) and "--monitor N" in said
    for grid_file in (run / "samples").iterdir():
        grid_file.unlink()
    with pytest.raises(figures.NothingToDraw):
        figures.main(Namespace(folders=[str(run)], output_dir=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()
    results = make(tmp_path / "evaluation", sweep=())
    results["points"] = results["points"][:2]  # the base model and one tuned model
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
    figures.main(Namespace(folders=[str(tmp_path / "evaluation")], output_dir=str(output)))
    assert "left out: figure-7-evaluation.svg" in (said := capsys.readouterr().out) and "--sweep" in said
    assert (output / "figure-4-evaluation.png").is_file()
