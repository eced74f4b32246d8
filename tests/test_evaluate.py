"""The evaluation command on the tiny base."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import metrics
import rewards
from pretrained.features import clip_features
from report import distribution_metrics, points, scorers
from report.covariance_definitions import definition_notes
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
    found = evaluated[2]["points"]
    assert [(p["label"], p["kind"], p["value"], p["guidance"]) for p in found if p["row"]] == [
        ("Base", "switch", 4, 2.0),
        ("Base, no guidance", "switch", 4, 1.0),
        ("ReFL", "switch", 0, 2.0),
        ("ReFL AIG", "aig", 1.0, 1.0),
        ("ReFL Combined", "switch", 1, 2.0),  # 10 of 40 steps are 1 of 4
    ]
    assert [(p["kind"], p["value"]) for p in found if not p["row"]] == [("switch", 2), ("aig", 2.0)]


def test_values_are_those_of_the_images_on_disk(evaluated):
    folder, _, results = evaluated
    point = results["points"][2]
    paths = [folder / point["folder"] / f"{p:05d}-{seed}.png" for p in range(3) for seed in (1, 2)]
    images, asked = torch.stack([to_tensor(Image.open(path)) for path in paths]), [p for p in results["prompts"][:3]]
    asked = [p for p in asked for _ in range(2)]
    score = 0.1 * rewards.load("tiny2")(images, asked)
    assert point["values"]["tiny2"] == pytest.approx(metrics.mean_and_error(score, asked), abs=1e-5)
    features = clip_features(evaluate.presets.FEATURES)(images)
    expected = metrics.mean_and_error(metrics.group_diversity(features, asked))
    assert point["values"]["diversity"] == pytest.approx(expected, abs=1e-5)


def test_writes_table_results_curves_and_report(evaluated):
    folder, _, results = evaluated
    names = {path.name for path in folder.iterdir()}
    assert {"results.json", "table.md", "table.csv", "report.html", "tradeoff-tiny.svg", "tradeoff-tiny2.svg"} <= names
    assert json.loads((folder / "results.json").read_text()) == results
    assert any("128 dimensions" in note for note in results["notes"])  # six images are too few for FID
    assert any(note.startswith("FID between two sets of 6 real images") for note in results["notes"])


def test_a_second_call_computes_only_what_is_missing(evaluated, monkeypatch):
    folder, flags, results = evaluated
    lost = folder / results["points"][4]["folder"] / "00001-2.png"
    before = lost.read_bytes()
    lost.unlink()
    made, generate = [], points.generate_each
    monkeypatch.setattr(points, "generate_each", lambda *a: made.append(a[5]) or generate(*a))
    assert run(folder, *flags) == results
    assert made == [[[0.0, 1.0, 1.0, 1.0]]]  # the schedule of that one point
    assert lost.read_bytes() == before

    monkeypatch.setattr(scorers, "held_out_clip_scorer", lambda *_: None)  # nothing is measured again either
    assert run(folder, *flags) == results
    other = folder.parent / "not" / "there" / "yet"  # and from another folder they are found
    shared = run(other, *flags, f"--points={folder / 'points'}")
    assert [p["values"] for p in shared["points"]] == [p["values"] for p in results["points"]]
    assert len(made) == 1


def test_metrics_of_the_published_bases(tmp_path, monkeypatch):
    """SD1.5's row, on the tiny networks: without DINO and Inception they are named as missing, with them measured."""
    row = replace(evaluate.presets.SD15, resolution=64, reward="tiny2", guidance=2.0)
    monkeypatch.setattr(evaluate.presets, "preset_for", lambda *_: row)
    results = run(tmp_path / "few")
    assert [c["key"] for c in results["columns"]] == ["tiny2"]
    assert [note[:12] for note in results["notes"]] == ["No diversity", "No FID, CovD"]
    assert "<svg" not in (tmp_path / "few" / "report.html").read_text().split("</style>")[1]

    def pooled(*_, **__):
        return lambda images: torch.nn.functional.adaptive_avg_pool2d(images, 1).flatten(1) + 2

    monkeypatch.setattr(scorers, "dino_features", pooled)
    monkeypatch.setattr(scorers, "inception_features", pooled)
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

    monkeypatch.setattr(scorers, "is_dinov2", lambda folder: str(folder) == str(file))
    flags = [f"--dino={file}", f"--inception={file}", f"--reference={photos}", "--more-metrics"]
    extended = run(tmp_path / "all", *flags)
    old, new = (r["points"][0]["values"] for r in (results, extended))
    assert list(new)[len(old) :] == ["vendi", "precision", "recall", "density", "coverage", "kid", "mind", "fdd"]
    assert {key: new[key] for key in old} == old
    assert new["fdd"] == new["fid"]  # the same features here
    assert new["kid"][0] == pytest.approx(distribution_metrics.kid_and_error(made, real)[0], rel=1e-4)


def test_a_single_prompt_has_values_without_errors(tmp_path):
    (tmp_path / "one.txt").write_text("octopus\n")
    results = run(tmp_path, "--prompts", str(tmp_path / "one.txt"))
    values = results["points"][0]["values"]
    assert values["covdist"][0] > 0 and values["covdist"][1] is None and values["tiny"][1] is None


def test_the_path_of_a_checkpoint_may_contain_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=3e-4"
    assert points.method_and_path(f"refl={folder}") == ("refl", str(folder))
    folder.mkdir()
    (folder / "run.json").write_text('{"args": {"method": "refl"}}')
    assert points.method_and_path(str(folder)) == ("refl", str(folder))
    assert points.method_and_path(str(TUNED)) == ("imagerefl", str(TUNED))  # the weights' own header


def test_a_list_of_prompts_may_be_called_captions(tmp_path):
    (tmp_path / "captions.json").write_text('["octopus", "fox"]')
    args = evaluate.parse_args(["--prompts", str(tmp_path / "captions.json"), "--output-dir", str(tmp_path / "e")])
    assert evaluate.prompts_of(args, evaluate.presets.TINY) == (["octopus", "fox"], [])


def test_repeated_prompts_are_counted_once_and_reported(tmp_path):
    (tmp_path / "once.txt").write_text("octopus\nfox\nred apple\n")
    (tmp_path / "twice.txt").write_text("octopus\nfox\nOctopus\nfox\nred apple\nred  apple\n")
    once, twice = (run(tmp_path / name, "--steps=1", f"--prompts={tmp_path / name}.txt") for name in ("once", "twice"))
    assert twice["prompts"] == ["octopus", "fox", "red apple"]
    for a, b in zip(once["points"], twice["points"], strict=True):
        for key, pair in a["values"].items():
            assert b["values"][key] == pytest.approx(pair, rel=1e-5), key
    assert "3 of the 6 prompts repeat another one; each is counted once." in twice["notes"]
    assert not any("repeat" in note for note in once["notes"])


@pytest.mark.slow
def test_right_concept_is_measured_on_prompts_that_name_one(tmp_path):
    names, free = "octopus, flat style\nfox\n", "a purple dream of the sea\n"
    found = {}
    for name, text in (("all", names), ("some", names + free), ("none", free + "two of them\n")):
        (tmp_path / f"{name}.txt").write_text(text)
        found[name] = run(tmp_path / name, f"--prompts={tmp_path / name}.txt")
    keys = {name: [c["key"] for c in results["columns"]] for name, results in found.items()}
    assert keys["all"] == keys["some"] and "concept" in keys["all"]
    assert keys["none"] == [key for key in keys["all"] if key != "concept"]
    for every, some in zip(found["all"]["points"], found["some"]["points"], strict=True):
        assert (
            some["values"]["concept"] == pytest.approx(every["values"]["concept"]) and some["values"]["concept"][0] > 0
        )
    notes = [note for name in found for note in found[name]["notes"] if "ight concept" in note]
    assert [note[:17] for note in notes] == ["Right concept: ov", "No right concept:"]
    assert "2 of 3 prompts" in notes[0]


@pytest.mark.slow
def test_one_image_per_prompt_says_why_there_is_no_diversity(tmp_path):
    results = run(tmp_path, "--steps=1", "--images-per-prompt=1")
    assert "diversity" not in [c["key"] for c in results["columns"]]
    (note,) = (note for note in results["notes"] if note.startswith("No diversity"))
    assert "--images-per-prompt 2" in note and note in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "Quality against diversity</h2>" not in re.sub("<h2 hidden>.*", "", (tmp_path / "report.html").read_text())


def test_names_of_rewards_may_be_separated_by_blanks(tmp_path):
    results = run(tmp_path, "--steps=1", "--rewards", " tiny2, tiny ")
    assert [c["key"] for c in results["columns"]][:2] == results["axes"]["quality"] == ["tiny2", "tiny"]


@pytest.mark.slow
def test_checkpoints_of_one_folder_name_have_rows_of_their_own(tmp_path):
    folders = [tmp_path / seed / "model" for seed in ("seed 1", "seed 2")]
    for folder in folders:
        shutil.copytree(TUNED, folder)
    (file,) = folders[1].glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    save_file({key: 1.5 * t for key, t in tensors.items()}, file, metadata)
    results = run(tmp_path / "two", *(f"--checkpoint={folder}" for folder in folders))
    values = {p["checkpoint"]: p["values"]["rater"] for p in results["points"] if p["row"] and p["checkpoint"]}
    assert list(values) == [str(folder) for folder in folders]
    table = (tmp_path / "two" / "table.md").read_text(encoding="utf-8")
    for folder, name in zip(folders, ("seed 1/model", "seed 2/model"), strict=True):
        assert f"| ImageReFL ({name}) | 3 + 1 | {values[str(folder)][0]:.3f} " in table

    shutil.copy(next(TUNED.glob("*.safetensors")), file)  # now a copy
    results = run(tmp_path / "copy", *(f"--checkpoint={folder}" for folder in folders))
    assert f"{folders[1]}: the same weights as another checkpoint; measured once." in results["notes"]


def test_other_prompts_are_other_images(evaluated):
    folder, flags, results = evaluated
    args = evaluate.parse_args([*SMALL, *flags])
    row = evaluate.presets.TINY
    evaluate.complete(args, row)
    folders = [{p.folder for p in points.points_of(args, row.switch, texts)} for texts in (["octopus"], ["tiger"])]
    assert not folders[0] & folders[1]


def test_notes_say_where_an_evaluation_deviates_from_a_definition():
    assert definition_notes("ours") == []
    assert [note.split()[1] for note in definition_notes("squares")] == ["squares"] * 2
    assert "clip features" in definition_notes("clip")[0]
    assert "base model" in definition_notes("jena2024")[0]
