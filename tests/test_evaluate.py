"""The evaluation command on the tiny base, and the numbers behind the reproduction."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import metrics
import reproduce
import rewards
from training.presets import TUNED
from utils.images import to_tensor

SMALL = ["--steps", "4", "--limit", "3", "--images-per-prompt", "2", "--dtype", "float32"]


def run(folder, *flags: str) -> dict:
    return evaluate.main(evaluate.parse_args([*SMALL, "--output-dir", str(folder), *flags]))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    flags = [f"--checkpoint=refl={TUNED}", "--sweep=switch=0,2", "--sweep=aig=2"]
    return folder, flags, run(folder, *flags)


def test_rows_and_points(evaluated):
    points = evaluated[2]["points"]
    assert [(p["label"], p["kind"], p["value"], p["guidance"]) for p in points if p["row"]] == [
        ("Base", "switch", 4, 2.0),
        ("Base, no guidance", "switch", 4, 1.0),
        ("ReFL", "switch", 0, 2.0),
        ("ReFL AIG", "aig", 1.0, 1.0),
        ("ReFL Combined", "switch", 1, 2.0),  # 10 of 40 steps are 1 of 4
    ]
    assert [(p["kind"], p["value"]) for p in points if not p["row"]] == [("switch", 2), ("aig", 2.0)]


def test_values_are_those_of_the_images_on_disk(evaluated):
    folder, _, results = evaluated
    point = results["points"][2]
    paths = [folder / point["folder"] / f"{p:05d}-{seed}.png" for p in range(3) for seed in (1, 2)]
    images, asked = torch.stack([to_tensor(Image.open(path)) for path in paths]), [p for p in results["prompts"][:3]]
    asked = [p for p in asked for _ in range(2)]
    score = 0.1 * rewards.load("tiny2")(images, asked)
    assert point["values"]["tiny2"] == pytest.approx(metrics.mean_and_error(score, asked), abs=1e-5)
    features = evaluate.features.clip_features(evaluate.presets.FEATURES)(images)
    expected = metrics.mean_and_error(metrics.group_diversity(features, asked))
    assert point["values"]["diversity"] == pytest.approx(expected, abs=1e-5)


def test_writes_table_results_curves_and_report(evaluated):
    folder, _, results = evaluated
    names = {path.name for path in folder.iterdir()}
    assert {"results.json", "table.md", "table.csv", "report.html", "tradeoff-tiny.svg", "tradeoff-tiny2.svg"} <= names
    assert json.loads((folder / "results.json").read_text()) == results
    assert any("128 dimensions" in note for note in results["notes"])  # six images are too few for FID
    assert any(note.startswith("FID of 6 real images against as many others") for note in results["notes"])


def test_a_second_call_computes_only_what_is_missing(evaluated, monkeypatch):
    folder, flags, results = evaluated
    lost = folder / results["points"][4]["folder"] / "00001-2.png"
    before = lost.read_bytes()
    lost.unlink()
    made, generate = [], evaluate.generate_each
    monkeypatch.setattr(evaluate, "generate_each", lambda *a: made.append(a[5]) or generate(*a))
    assert run(folder, *flags) == results
    assert made == [[[0.0, 1.0, 1.0, 1.0]]]  # the mixture of that one point
    assert lost.read_bytes() == before

    monkeypatch.setattr(evaluate, "tiny_scorer", lambda device: None)  # nothing is measured again either
    assert run(folder, *flags) == results
    other = folder.parent / "not" / "there" / "yet"  # and from another folder they are found
    shared = run(other, *flags, f"--points={folder / 'points'}")
    assert [p["values"] for p in shared["points"]] == [p["values"] for p in results["points"]]
    assert len(made) == 1


def test_measures_of_the_published_bases(tmp_path, monkeypatch):
    """SD1.5's row, on the tiny networks: without DINO and Inception they are named as missing, with them measured."""
    row = replace(evaluate.presets.SD15, resolution=64, reward="tiny2", guidance=2.0)
    monkeypatch.setattr(evaluate.presets, "preset_for", lambda *_: row)
    results = run(tmp_path / "few")
    assert [c["key"] for c in results["columns"]] == ["tiny2"]
    assert [note[:12] for note in results["notes"]] == ["No diversity", "No FID, CovD"]
    assert "<svg" not in (tmp_path / "few" / "report.html").read_text().split("</style>")[1]

    def pooled(*_, **__):
        return lambda images: torch.nn.functional.adaptive_avg_pool2d(images, 1).flatten(1) + 2

    monkeypatch.setattr(evaluate.features, "dino_features", pooled)
    monkeypatch.setattr(evaluate.features, "inception_features", pooled)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(7):
        Image.new("RGB", (80, 64), (30 * i, 255 - 20 * i, i * i)).save(photos / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a photo"}) for i in (0, 0, 1, 2, 3, 4, 5, 6)]  # 0 twice
    (photos / "metadata.jsonl").write_text("\n".join(rows))
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    results = run(tmp_path / "all", f"--dino={file}", f"--inception={file}", f"--reference={photos}")
    assert [c["key"] for c in results["columns"]] == ["tiny2", "diversity", "fid", "covdist", "logcovdist"]
    paths = sorted((tmp_path / "all" / results["points"][0]["folder"]).glob("*.png"))
    made = pooled()(torch.stack([to_tensor(Image.open(path)) for path in paths]))
    real = pooled()(torch.stack([to_tensor(Image.open(photos / f"{i}.png").crop((8, 0, 72, 64))) for i in range(6)]))
    assert results["points"][0]["values"]["fid"][0] == pytest.approx(metrics.fid(made, real), rel=1e-4)


def test_a_single_prompt_has_values_without_errors(tmp_path):
    (tmp_path / "one.txt").write_text("octopus\n")
    results = run(tmp_path, "--prompts", str(tmp_path / "one.txt"))
    values = results["points"][0]["values"]
    assert values["covdist"][0] > 0 and values["covdist"][1] is None and values["tiny"][1] is None


def test_the_path_of_a_checkpoint_may_hold_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=3e-4"
    assert evaluate.method_of(f"refl={folder}") == ("refl", str(folder))
    folder.mkdir()
    (folder / "run.json").write_text('{"args": {"method": "refl"}}')
    assert evaluate.method_of(str(folder)) == ("refl", str(folder))
    assert evaluate.method_of(str(TUNED)) == ("imagerefl", str(TUNED))  # the weights' own header


def test_a_list_of_prompts_may_be_called_captions(tmp_path):
    (tmp_path / "captions.json").write_text('["octopus", "fox"]')
    args = evaluate.parse_args(["--prompts", str(tmp_path / "captions.json"), "--output-dir", str(tmp_path / "e")])
    assert evaluate.resolve(args, evaluate.presets.TINY) == ["octopus", "fox"]


def test_other_prompts_are_other_images(evaluated):
    folder, flags, results = evaluated
    args = evaluate.parse_args([*SMALL, *flags])
    row = evaluate.presets.TINY
    evaluate.resolve(args, row)
    folders = [{p.folder for p in evaluate.points_of(args, row, prompts)} for prompts in (["octopus"], ["tiger"])]
    assert not folders[0] & folders[1]


# The comparison at equal diversity


def curves(*values: tuple[str, str, float, float, float]) -> reproduce.Curves:
    def point(checkpoint, kind, value, diversity, reward, label=""):
        return {
            "label": label,
            "checkpoint": checkpoint and f"{checkpoint}-1",
            "kind": kind,
            "value": value,
            "values": {"diversity": [diversity, 0.0], "tiny": [reward, 0.0]},
        }

    points = [point(None, "switch", 40, 0.3, 0.5, label) for label in ("Base", "Base, no guidance")]
    points += [point(*v) for v in values]
    return reproduce.Curves({"points": points}, Path(), 1)


def test_interpolates_the_curve_at_a_diversity():
    known = curves(("refl", "switch", 30, 0.2, 0.7), ("refl", "switch", 0, 0.1, 0.9))
    assert known.where("refl", "switch", "diversity", 0.15, "tiny") == pytest.approx(0.8)
    assert known.where("refl", "switch", "diversity", 0.25, "tiny") == pytest.approx(0.6)  # towards the base model
    assert known.where("refl", "switch", "diversity", 0.05, "tiny") is None


def test_the_claims_of_two_seeds():
    ways = (reproduce.Way("refl", "refl", 5), reproduce.Way("imagerefl", "imagerefl", 9))
    plan = reproduce.Plan(ways=ways, seeds=(1, 2))

    def values(diversity, trained, judge=0.0):
        return {"diversity": [diversity, 0.0], "tiny": [trained, 0.0], "tiny2": [judge, 0.0]} | {
            key: [0.0, 0.0] for key in ("concept", "fid")
        }

    points = [
        ("Base", None, "switch", 40, values(0.3, 0.5)),
        ("Base, no guidance", None, "switch", 40, values(0.4, 0.4)),
    ]
    for seed in (1, 2):
        points += [
            ("", f"refl-{seed}", "switch", 0, values(0.1, 0.9)),
            ("", f"refl-{seed}", "aig", 1, values(0.2, 0.6)),
        ]
        points += [("", f"refl-{seed}", "switch", 10, values(0.15, 0.7 + 0.1 * seed))]
        points += [("", f"imagerefl-{seed}", "switch", n, values(0.15, 0.86, 0.2)) for n in (0, 30)]
    keys = ("label", "checkpoint", "kind", "value", "values")
    columns = [{"key": "tiny", "title": "reward", "digits": 3}]
    results = {"columns": columns, "points": [dict(zip(keys, point, strict=True)) for point in points]}
    text = reproduce.claims(results, [reproduce.Curves(results, Path(), seed) for seed in (1, 2)], plan)
    assert "| ReFL, 5 updates, combined 10 + 30 | 0.850 ± 0.050 |" in text
    assert "| trained reward | 0.500 ± 0.000 | 0.500, 0.500 |" in text  # ReFL alone, against the base without guidance
    assert "| diversity: share of the change undone | 0.250 ± 0.000 |" in text  # 0.1 -> 0.15 on the way to 0.3
    assert "| trained reward, more than ReFL Combined | 0.010 ± 0.050 | 0.060, -0.040 |" in text
    assert "| held-out reward, more than ReFL AIG | 0.200 ± 0.000 |" in text  # between alone and power 1
    assert "**3. ImageReFL, 9 updates, switch 30, at equal trained reward**" in text
    assert "| diversity, more than ReFL AIG | 0.037 ± 0.000 |" in text  # 0.86 lies 13 % on the way from 0.9 to 0.6


def test_claims_give_mean_error_and_every_seed():
    assert reproduce.said([0.1, 0.2, 0.3]) == f"0.200 ± {0.1 / math.sqrt(3):.3f} | 0.100, 0.200, 0.300"
    assert reproduce.said([0.1, None]) == "0.100 | 0.100, outside"
    assert reproduce.said([None]) == "outside the curve | outside"


def test_the_models_of_a_reproduction_are_trained_once_and_one_that_stopped_is_taken_up(tmp_path, monkeypatch):
    calls, evaluated, stops = [], [], {"imagerefl-2"}

    def run(command, env, stdout, stderr):
        if "evaluate" in command[1]:
            args = evaluate.parse_args(command[2:])
            evaluated.append(*args.checkpoint)
            assert args.points == str(tmp_path / "points") and env["OMP_NUM_THREADS"] == "1"
            Path(args.output_dir).mkdir(parents=True)
            Path(args.output_dir, "results.json").write_text("{}")
            return
        place = Path(command[-1] if "--resume" in command else command[command.index("--output-dir") + 1])
        calls.append((place.name, "--resume" in command, env["OMP_NUM_THREADS"]))
        (place / "unet").mkdir(parents=True, exist_ok=True)  # made before the weights are written
        if place.name not in stops:
            (place / "unet" / "config.json").write_text("{}")
        (place / "run.json").write_text("{}")

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    monkeypatch.setattr(reproduce.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(reproduce.os, "sched_getaffinity", lambda _: range(2), raising=False)
    ways = (reproduce.Way("refl", "refl", 5), reproduce.Way("imagerefl", "imagerefl", 9))
    plan = reproduce.Plan(ways=ways, seeds=(1, 2))
    with pytest.raises(ValueError, match="training stopped, see .*imagerefl-2.log"):
        reproduce.train_all(tmp_path, plan)
    names = ["imagerefl-1", "imagerefl-2", "refl-1", "refl-2"]
    assert sorted(calls) == [(name, False, "1") for name in names]
    assert sorted(evaluated) == [str(tmp_path / name) for name in names if name not in stops]
    calls.clear(), evaluated.clear(), stops.clear()
    places = reproduce.train_all(tmp_path, plan)
    assert calls == [("imagerefl-2", True, "1")] and evaluated == [str(tmp_path / "imagerefl-2")]
    assert sorted(path.name for path in places.values()) == names


def test_a_reading_says_where_it_is_not_followed():
    assert evaluate.reading_notes("ours") == []
    assert [note.split()[1] for note in evaluate.reading_notes("squares")] == ["squares"] * 2
    assert "clip features" in evaluate.reading_notes("clip")[0]
    assert "base model" in evaluate.reading_notes("jena2024")[0]
