"""The stages from nothing to a table of the paper: COCO's layouts, the plan, the check, resuming, the comparison."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hub as stand_in
import minis
import pytest
import torch
from hub import Fault, use
from recipe import GOLDEN
from safetensors.torch import save_file

import reproduce
from pretrained import features, hub, reward_networks
from report.options import reproduce_args
from reproduction import assets, check, coco, official, paper, plan, stages
from reproduction.plan import Settings
from training import cost
from training.data import open_data
from training.prompts import read_prompts
from utils import disk

ROOT = Path(__file__).parent.parent
PARTS = {"UNet forward": 1e15, "UNet with gradients": 3e15, "decode": 2e15, "decode with gradients": 4e15}
PARTS |= {"encode": 1e15, "reward with gradients": 1e15}


# ---- the paper's tables


def test_every_setting_that_can_be_asked_for_is_in_the_paper():
    tables = [paper.printed(base, reward) for base in paper.BASES for reward in ("hpsv2.1", "pickscore")]
    assert all(tuple(table) == paper.ROWS for table in tables) and len({str(table) for table in tables}) == 4


def test_explanations_are_rows_of_the_page_on_the_official_code():
    numbers = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "paper_vs_official_code.md").read_text(), re.MULTILINE)
    named = [paper.TRAINING, paper.SAMPLING, *paper.BY_COLUMN.values(), *paper.BY_ROW.values()]
    assert {str(number) for part in named for number in part} <= set(numbers)


def results_of(rows: dict[str, float], keys: list[str], error: float) -> dict:
    """A results.json whose values are the paper's for SD1.5 and HPSv2.1 plus `rows[label]` of its errors."""
    points = []
    for label, sigma in rows.items():
        numbers = paper.printed("sd15", "hpsv2.1")[label if label in paper.ROWS else "ReFL"]
        known = dict(zip(paper.COLUMNS, zip(numbers, paper.ERRORS, strict=True), strict=True))
        values = {key: [known[key][0] + sigma * known[key][1], error * known[key][1]] for key in keys}
        points.append({"row": True, "label": label, "values": values})
    return {"points": points}


def test_differences_are_counted_in_both_errors_and_explained():
    rows = {"Base": 0.0, "ReFL": 3.0, "ReFL AIG": 0.0, "ReFL Combined": -1.9, "ImageReFL": 0.0}
    keys = list(paper.COLUMNS)
    results = {"hpdv2": [results_of(rows, [key], 0.0) for key in keys[:6]], "coco": [results_of(rows, keys[6:], 4 / 3)]}
    text = paper.compare("sd15", "hpsv2.1", results, True, ["a note"])
    assert "| ReFL | HPSv2.1 | 38.01 ± 0.00 | 37.80 ± 0.07 | +3.0 |" in text  # 3 errors of the paper's alone
    assert "| ReFL | FID | 49.90 ± 0.67 | 48.40 ± 0.5 | +1.8 |" in text  # 3 / sqrt(1 + 16/9)
    assert "| ReFL | MPS | +3.0 | 28 (words kept by the batch's maximum), 29 (bf16 scores), 30 (" in text
    explained = text[text.index("## Differences") :]
    assert "| ReFL | FID |" not in explained and "| ReFL Combined |" not in explained
    assert "2 (doubled optimizer step)" in explained and "- a note" in text
    assert "| Base | 37.80 | 15.50 |" in text
    assert "doubled optimizer" not in paper.compare("sd15", "hpsv2.1", results, False, [])
    published = {name: [{"points": r["points"][::4]} for r in found] for name, found in results.items()}
    text = paper.compare("sd15", "hpsv2.1", published, False, [])  # a base and ImageReFL alone
    assert text.count("| ImageReFL |") == 9 and "| ReFL |" not in text and "\nNone.\n" in text


# ---- COCO


@pytest.fixture(scope="module")
def coco_2014(tmp_path_factory):
    return minis.write_coco(tmp_path_factory.mktemp("coco") / "coco")


def rearranged(source: Path, root: Path, layout: str) -> Path:
    """A COCO of another layout; returns the folder that a user would name."""
    if layout == "images/":
        shutil.copytree(source / "annotations", root / "annotations")
        for name in ("train2014", "val2014"):
            shutil.copytree(source / name, root / "images" / name)
        return root
    shutil.copytree(source, root)
    if layout == "annotations unpacked in a folder":
        (root / "annotations_trainval2014").mkdir()
        (root / "annotations").rename(root / "annotations_trainval2014" / "annotations")
        for name in ("train2014", "val2014"):
            (root / name).rename(root / "annotations_trainval2014" / name)
    if layout == "2017":
        images, captions = root / "train2017", {"images": [], "annotations": []}
        for split in ("train2014", "val2014"):
            content = json.loads((root / "annotations" / f"captions_{split}.json").read_text())
            for image in content["images"]:
                name = image["file_name"].rsplit("_", 1)[1]
                images.mkdir(exist_ok=True)
                (root / split / image["file_name"]).rename(images / name)
                captions["images"].append({"id": image["id"], "file_name": name})
            captions["annotations"] += content["annotations"]
            (root / "annotations" / f"captions_{split}.json").unlink()
        (root / "annotations" / "captions_train2017.json").write_text(json.dumps(captions))
    return root / "train2014" if layout == "annotations beside" else root


@pytest.mark.parametrize(
    "layout", ["2014", "images/", "annotations beside", "annotations unpacked in a folder", "2017", "Karpathy"]
)
def test_a_coco_folder_is_split_in_every_layout(layout, coco_2014, tmp_path):
    root = rearranged(coco_2014, tmp_path / "coco", layout)
    if layout in ("2017", "Karpathy"):  # of the 24 of val2014, 16
        images = [{"cocoid": n, "split": "test" if n % 2 else "val"} for n in range(13, 29)]
        images += [{"cocoid": n, "split": "restval"} for n in range(29, 37)]
        (root / "dataset_coco.json").write_text(json.dumps({"images": images}))
    count = 16 if layout in ("2017", "Karpathy") else 24
    found = coco.split(root, count)
    assert len(found.measured) == count and [coco.image_id(path) for path, _ in found.measured] == [
        *range(13, 13 + count)
    ]
    captions = [text for _, text in found.measured]
    assert len(set(captions)) == count
    trained = {coco.image_id(path) for path, _ in found.train}
    assert trained == {*range(1, 13)} | ({*range(29, 37)} if layout == "2017" else set())
    assert ("Karpathy's validation and test" in found.note) == (count == 16)
    assert coco.missing(root, count, train=True) is None
    (tmp_path / "out").mkdir()
    coco.write_tables(root, count, tmp_path / "out")
    assert read_prompts(tmp_path / "out" / "coco-measure.jsonl") == captions
    data = open_data(str(tmp_path / "out" / "coco-train.jsonl"), 64)
    assert len(data) == 2 * len(trained) and data[0][0].shape == (3, 64, 64)


def test_training_images_fill_up_what_is_measured_and_are_then_not_trained_on(coco_2014):
    found = coco.split(coco_2014, 30)
    assert len(found.measured) == 30 and "6 of the training split, which are not trained on" in found.note
    assert {coco.image_id(path) for path, _ in found.train} == {*range(7, 13)}


def test_what_a_coco_folder_lacks_is_said(coco_2014, tmp_path):
    assert coco.missing(None, 5, True) == "name its folder: --data COCO"
    assert "no such folder" in coco.missing(tmp_path / "a", 5, True)
    assert "36 captioned images to measure on, not 37: no captions_train2017.json" in coco.missing(coco_2014, 37, True)
    shutil.copytree(coco_2014, tmp_path / "coco")
    shutil.rmtree(tmp_path / "coco" / "train2014")
    assert "no captioned images to train on: " in coco.missing(tmp_path / "coco", 24, True)
    assert coco.missing(tmp_path / "coco", 24, train=False) is None


# ---- the plan


def test_forward_passes_of_each_row():
    passes = [plan.forward_passes(*row) for row in plan.schedules(Settings("sd15", "hpsv2.1", None))]
    assert passes == [80, 40, 40, 79, 50, 70]  # AIG's first weight is 0: there the tuned model is not asked
    assert [plan.forward_passes(*row) for row in plan.schedules(Settings("sdxl", "hpsv2.1", None, True))] == [
        80,
        40,
        75,
    ]


def test_the_arithmetic_of_the_stages(monkeypatch):
    monkeypatch.setattr(cost, "flops", lambda *_: PARTS)
    found = plan.petaflops(Settings("sd15", "hpsv2.1", None, published=True), cost.PUBLISHED["sd15"])
    assert found == {"evaluate hpdv2": 2000 * (80 + 40 + 70 + 3 * 2), "evaluate coco": 10_000 * (80 + 40 + 70 + 3 * 2)}
    found = plan.petaflops(Settings("sd15", "hpsv2.1", None), cost.PUBLISHED["sd15"])
    refl = 34.5 + 3 + 4 + 1  # t_f is 34.5 on average; one step with gradients, decoded and scored
    imagerefl = 1 + 3.6 + 8 + 3  # encoded; 0 to 8 further steps, 3.6 on average; the last as above; the diffusion loss
    assert found["train refl"] == pytest.approx(2000 * 32 * refl)
    assert found["train imagerefl"] == pytest.approx(4000 * 32 * (3 * imagerefl + refl) / 4)
    hours = plan.hours_on_an_h100({"train refl": 0.140 * 3600, "evaluate coco": 0.199 * 7200})
    assert hours == pytest.approx(3.0)


def test_the_disk_of_a_run_holds_checkpoints_and_images():
    full = plan.disk_gb(Settings("sd15", "hpsv2.1", None), cost.PUBLISHED["sd15"])
    assert full == pytest.approx(2 * 10 * 4 * 0.859520964 + 6 * 12_000 * 512**2 * 1.75 / 1e9)
    assert plan.disk_gb(Settings("sd15", "hpsv2.1", None, quick=True), cost.PUBLISHED["sd15"]) < full / 2


@pytest.mark.slow
def test_published_sd15_takes_112_petaflop_a_row():
    parts = cost.flops(plan.train_args(Settings("sd15", "hpsv2.1", None), "refl"), *cost.PUBLISHED["sd15"])
    row = 400 * 5 * (70 * parts["UNet forward"] + parts["decode"]) / 1e15
    assert row == pytest.approx(112, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("base, fitting", [("sd15", (24, 40, 80)), ("sdxl", (80,))])
def test_a_training_fits_a_gpu_or_says_what_to_change(base, fitting, monkeypatch):
    settings, sizes = Settings(base, "hpsv2.1", None), cost.PUBLISHED[base]
    memory = cost.MemoryModel(plan.train_args(settings, "imagerefl"), *sizes)
    memory.peak = functools.cache(memory.peak)  # one peak takes seconds
    monkeypatch.setattr(cost, "MemoryModel", lambda *_: memory)
    for gigabytes in fitting:
        flags, sentence = plan.training_flags(settings, sizes, gigabytes)
        numbers = dict(zip(flags[:4:2], map(int, flags[1:4:2]), strict=True))
        assert numbers["--batch-size"] * numbers["--accumulate"] == (32 if base == "sd15" else 16)
        assert f"of {gigabytes} GB" in sentence
        plan.parse_args(flags)
    if base == "sdxl":
        with pytest.raises(ValueError, match=r"training sdxl takes at least \d+ GB, the GPU has 40; .*--lora 16"):
            plan.training_flags(settings, sizes, 40)


def test_memory_that_does_not_suffice_is_one_sentence(monkeypatch):
    def best_settings(args, memory, gigabytes, known):
        known[""] = (30 * cost.GB, 31 * cost.GB)

    monkeypatch.setattr(cost, "best_settings", best_settings)
    monkeypatch.setattr(cost, "MemoryModel", lambda *_: None)
    with pytest.raises(
        ValueError, match=r"takes at least 31 GB, the GPU has 24; .*--lora 16, which is not the paper's"
    ):
        plan.training_flags(Settings("sd15", "hpsv2.1", None), cost.PUBLISHED["sd15"], 24)
    with pytest.raises(ValueError, match="the GPU has 24; use a GPU with more memory"):
        plan.training_flags(Settings("sd15", "hpsv2.1", None, lora=16), cost.PUBLISHED["sd15"], 24)


# ---- the check


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return minis.write_all(tmp_path_factory.mktemp("served"))


@pytest.fixture
def official_hub(served, tmp_path, monkeypatch):
    """The stand-in with all official names, empty caches, and no counting of FLOPs."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(cost, "flops", lambda *_: PARTS)
    monkeypatch.chdir(tmp_path)
    with stand_in.serving(served) as server:
        use(server.url, tmp_path / "cache", monkeypatch)
        minis.adopt(monkeypatch, server.url, served)
        yield server


def states(report: dict) -> dict[str, str]:
    return {row["name"]: row["state"] for row in report["assets"]}


def test_the_check_finds_what_is_missing_and_fetches_nothing(official_hub, coco_2014, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        reproduce.main(reproduce_args(["--base", "sd15", "--quick", "--check"]))
    text = capsys.readouterr().out
    assert exit.value.code == 2 and len(text.splitlines()) <= 40
    assert "not ready: reward mps, COCO: missing" in text and official_hub.fetched() == []
    for line in (
        "gdown 17qrK_aJkVNM75ZEvMEePpLj6L867MLkN -O",
        "curl -LO http://images.cocodataset.org/zips/val2014.zip",
    ):
        assert line in text
    minis.write_mps(tmp_path / "torch" / "hub" / "checkpoints")
    with pytest.raises(SystemExit) as exit:
        reproduce.main(reproduce_args(["--base", "sd15", "--quick", "--check", "--json", "--data", str(coco_2014)]))
    report = json.loads(capsys.readouterr().out)
    assert exit.value.code == 0 and report["ready"] and not report["problems"]
    assert set(states(report).values()) == {"to fetch", "here"} and states(report)["COCO"] == "here"
    assert report["assets"][0]["gb"] < 0.1  # as the hub says, not as the official files are


def test_the_check_knows_published_models_and_what_is_cached(official_hub, coco_2014, tmp_path):
    settings = Settings("sd15", "hpsv2.1", coco_2014, published=True, quick=True)
    for asset in assets.assets_of("sd15", "hpsv2.1", True):
        if asset.name != "reward mps":
            asset.paths = asset.find()
    assert hub.cached(assets.PROMPTS, "test.json", repo_type="dataset")
    report = check.examine(settings, tmp_path)
    assert states(report).pop("reward mps") == "missing" and states(report)["published model"] == "here"
    assert [state for name, state in states(report).items() if name != "reward mps"] == ["here"] * 10
    assert report["training_flags"] == [] and list(report["petaflops"]) == ["evaluate hpdv2", "evaluate coco"]


def test_faults_are_in_the_check(official_hub, tmp_path):
    official_hub.faults.append(Fault("gated", "xswu"))
    rows = {row["name"]: row for row in check.asset_rows(Settings("sd15", "hpsv2.1", None))}
    assert rows["reward hpsv2.1"]["state"] == "missing" and "accept its terms" in rows["reward hpsv2.1"]["place"]
    assert rows["base sd15"]["state"] == "to fetch"


def test_a_hub_that_cannot_be_reached_is_asked_once(official_hub, monkeypatch, tmp_path):
    asked, ask = [], hub.listing
    monkeypatch.setattr(
        hub, "listing", lambda *repo: ask(*repo) if check.offline() else asked.append(repo) or ask(*repo)
    )
    use("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    rows = check.asset_rows(Settings("sd15", "hpsv2.1", None))
    assert len(asked) == 1 and "no connection" in rows[0]["place"] and "as above" in rows[1]["place"]
    with hub.offline():
        rows = check.asset_rows(Settings("sd15", "hpsv2.1", None))
    assert len(asked) == 1 and {row["state"] for row in rows} == {"missing"} and "--offline" in rows[0]["place"]


def test_a_full_disk_is_a_problem(official_hub, coco_2014, monkeypatch, tmp_path):
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    report = check.examine(Settings("sd15", "hpsv2.1", coco_2014), tmp_path / "not" / "there")
    assert any(re.match(r"disk: \d+ GB are needed, .* has 1 GB free", problem) for problem in report["problems"])


def test_a_damaged_file_in_the_cache_is_noticed_and_fetched_again(official_hub):
    asset = next(a for a in assets.assets_of("sd15", "hpsv2.1", False) if a.name == "reward pickscore")
    asset.paths, known = asset.find(), {}
    assets.verify(asset, known)
    assert len(known) >= 3
    path = hub.cached("yuvalkirstain/PickScore_v1", "model.safetensors").resolve()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="model.safetensors: damaged, its checksum is not .*; removed"):
        assets.verify(asset, known)
    asset.paths = asset.find()
    assets.verify(asset, known)


# ---- stages


def stage(name: str, done: list, **more) -> stages.Stage:
    return stages.Stage(name, lambda: name in done, lambda: done.append(name), **more)


def test_the_table_says_what_is_left_at_the_measured_rate(tmp_path, capsys):
    log, done = tmp_path / "log.jsonl", ["check"]
    log.write_text('{"update": 1, "seconds": 3.0}\n{"update": 2, "seconds": 5.0}\n{"upda')
    notes = stages.Notes(tmp_path)
    notes.write(petaflops={"train": 100.0, "evaluate": 50.0}, seconds={"check": 90.0})
    own = [
        stage("check", done),
        stage("train", done, updates=10, log=log),
        stage("evaluate", done),
        stage("report", done),
    ]
    assert stages.rate(own, notes) == (pytest.approx(100 * 2 / 10 / 8), "train")
    assert stages.table(own, notes).splitlines() == [
        "check              done in 1.5 min",
        "train              2 of 10 updates; 80 PFLOP, about 0.5 min at the rate of train",
        "evaluate           50 PFLOP, about 0.3 min at the rate of train",
        "report             open",
    ]
    stages.run(own, notes)
    assert done == ["check", "train", "evaluate", "report"]
    assert "== evaluate: 50 PFLOP, about 0.3 min at the rate of train" in capsys.readouterr().out
    assert stages.Notes(tmp_path).seconds.keys() == {"check", "train", "evaluate", "report"}
    log.unlink()
    notes.write(seconds={})
    done.clear()
    assert "train              100 PFLOP, time known after the first updates" in stages.table(own, notes)


def test_a_folder_with_another_reproduction_is_refused(tmp_path):
    stages.Notes(tmp_path).check_settings({"base": "sd15", "quick": True})
    stages.Notes(tmp_path).check_settings({"base": "sd15", "quick": True})
    with pytest.raises(ValueError, match=r"other flags \(quick True -> False\); repeat its command, or name another"):
        stages.Notes(tmp_path).check_settings({"base": "sd15", "quick": False})
    (tmp_path / "reproduction.json").write_text("{")
    with pytest.raises(ValueError, match="reproduction.json: damaged; remove it, results are kept"):
        stages.Notes(tmp_path)


CALLER = """
import sys; from pathlib import Path; from reproduction import stages; from utils import disk
stages.ROOT = Path(sys.argv[1])
with disk.lock(Path(sys.argv[1])) as lock:
    stages.call("job.py", [], lock)
"""


@pytest.mark.parametrize("number, stopped", [(signal.SIGKILL, False), (signal.SIGTERM, True)])
def test_a_command_outlives_a_killed_reproduction_and_holds_its_folder(tmp_path, number, stopped):
    (tmp_path / "job.py").write_text(
        f"import time; open({str(tmp_path / 'began')!r}, 'w').close(); time.sleep(2.5); "
        f"open({str(tmp_path / 'ended')!r}, 'w').close()"
    )
    command = [sys.executable, "-c", CALLER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    process.send_signal(number)
    process.wait()
    if stopped:
        assert not (tmp_path / "ended").exists()
        with disk.lock(tmp_path):
            return
    with pytest.raises(ValueError, match="another process"), disk.lock(tmp_path):
        pass
    while not (tmp_path / "ended").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    with disk.lock(tmp_path):
        pass


def finish(kind: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = "run.json" if kind == "train.py" else "results.json"
    (folder / name).write_text(json.dumps({"finished": True}))


def test_each_stage_continues_where_it_stopped(official_hub, coco_2014, tmp_path, monkeypatch):
    """The commands that are called, with a failure at each of them in turn."""
    minis.write_mps(tmp_path / "torch" / "hub" / "checkpoints")
    calls, failures = [], []

    def call(script, flags, lock):
        output = next(f for f in flags if "output-dir" in f or f == "--resume")
        folder = Path(output.partition("=")[2] or flags[flags.index(output) + 1])
        calls.append((script, flags))
        if len(calls) in failures:
            if script == "train.py":
                folder.mkdir(exist_ok=True)
                (folder / "run.json").write_text("{}")
                return  # as after Ctrl-C: saved, exit code 0
            raise ValueError(f"{script} ended with exit code -9")
        finish(script, folder)

    monkeypatch.setattr(official, "call", call)
    monkeypatch.setattr(official.paper, "compare", lambda *_: "the table")
    settings = Settings("sd15", "hpsv2.1", coco_2014, quick=True, resolution=64)
    failures += [1, 3, 5, 8, 11]
    for attempt in range(6):
        reproduction = official.Reproduction(settings, tmp_path / "out", None)
        try:
            stages.run(reproduction.stages(), reproduction.notes)
            break
        except ValueError as error:
            assert attempt < 5 and ("has stopped" in str(error) or "exit code -9" in str(error))
    assert (tmp_path / "out" / "table.md").read_text() == "the table"
    resumed = [flags[0] == "--resume" for script, flags in calls if script == "train.py"]
    assert resumed == [False, True, False, True]
    first = calls[0][1]
    assert first[:2] == ["--method", "refl"] and first[first.index("--steps") + 1] == "2"
    evaluated = [
        next(f for f in flags if f.startswith("--output-dir")) for script, flags in calls if script != "train.py"
    ]
    assert len(evaluated) == 9 and len(set(evaluated)) == 6  # five rewards and COCO, three of them twice
    last = calls[-1][1]
    assert (
        last[last.index("--images-per-prompt") + 1] == "1" and "coco-measure.jsonl" in last[last.index("--prompts") + 1]
    )
    names = official_hub.fetched()
    assert len(names) == 9 == len(set(names)) + 3  # each once: two networks of the base, CLIP and DINO, text and reward


def test_a_check_that_fails_stops_the_run(official_hub, coco_2014, tmp_path):
    reproduction = official.Reproduction(Settings("sd15", "hpsv2.1", coco_2014, quick=True), tmp_path / "out", None)
    with pytest.raises(ValueError, match="not ready: 1 problem, see above"):
        stages.run(reproduction.stages(), reproduction.notes)
    assert official_hub.fetched() == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--published"], "--published goes with --base sd15 or sdxl"),
        (["--base", "sd15", "--published", "--lora", "4"], "--lora is for training"),
        (["--json"], "--json goes with --check"),
        (["--base", "sd15", "--gpu-memory", "24"], "--gpu-memory goes with --check"),
        (["--base", "sd2"], "invalid choice: 'sd2'"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        reproduce_args(flags)
    assert exit.value.code == 2 and message in capsys.readouterr().err


# ---- official files at full size


@pytest.mark.parametrize("name", ["hpsv2.1", "pickscore", "imagereward", "mps"])
def test_every_key_of_an_official_reward_is_placed(name):
    published = {
        "hpsv2.1": "hps_v2_1",
        "pickscore": "pickscore_v1",
        "imagereward": "imagereward_v1",
        "mps": "mps_overall",
    }
    keys = json.loads((GOLDEN / "keys_rewards_full.json").read_text())[published[name]]
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    network = reward_networks.load_strict(
        reward_networks.build_meta(name), reward_networks.rename(name, state), "the official file"
    )
    assert all(t.is_meta for key, t in network.state_dict().items() if not key.endswith("position_ids"))


def test_every_key_of_dino_is_placed(tmp_path):
    from transformers import ViTConfig

    keys = json.loads((GOLDEN / "keys_rewards_full.json").read_text())["dino_vits16"]
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, tmp_path / "model.safetensors")
    ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536).save_pretrained(tmp_path)
    extract = features.dino_features(tmp_path)
    assert extract(torch.zeros(1, 3, 32, 32)).shape == (1, 384)


# ---- the whole chain on mini models


MINI = """
import runpy, sys
from pathlib import Path
root, url, served = sys.argv[1:4]
sys.path[:0] = [root, root + "/tests"]
import minis, pytest
minis.adopt(pytest.MonkeyPatch(), url, Path(served))
sys.argv = ["reproduce.py", *sys.argv[4:]]
runpy.run_path(root + "/reproduce.py", run_name="__main__")
"""
STAGES = ("check", "fetch", "train refl", "train imagerefl", "evaluate hpdv2", "evaluate coco", "report")
MARKS = {
    "train imagerefl": "runs/*/imagerefl/log.jsonl",
    "evaluate hpdv2": "runs/*/points/*/*.png",
}  # of work under way
needs_half_an_hour = pytest.mark.skipif("CHAIN" not in os.environ, reason="takes up to half an hour; set CHAIN=1")


class Chain:
    """`reproduce.py` in a folder of its own, with empty caches, a mini COCO and MPS, against the stand-in."""

    def __init__(self, work: Path, server, *flags: str):
        minis.write_coco(work / "coco")
        minis.write_mps(work / "torch" / "hub" / "checkpoints")
        self.work, self.flags = work, ("--base", "sd15", "--data", "coco", "--quick", "--resolution", "64", *flags)
        self.command = [sys.executable, "-c", MINI, str(ROOT), server.url, str(server.root), *self.flags]
        places = {"HF_HOME": str(work / "hf"), "TORCH_HOME": str(work / "torch"), "HF_ENDPOINT": server.url}
        self.environment = os.environ | places | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}

    def start(self) -> subprocess.Popen:
        """Start or continue, in a process group of its own."""
        with open(self.work / "output.txt", "w") as out:
            return subprocess.Popen(
                self.command, cwd=self.work, stdout=out, stderr=out, start_new_session=True, env=self.environment
            )

    def output(self) -> str:
        return (self.work / "output.txt").read_text()

    def kill(self, process: subprocess.Popen) -> None:
        """Kill reproduce.py and the command that it has called, as a power failure would."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it had ended
        process.wait()

    def is_in(self, stage: str) -> bool:
        """Whether a stage is at work, or a later one has begun."""
        output, later = self.output(), STAGES[STAGES.index(stage) + 1 :]
        at_work = f"== {stage}" in output and (stage not in MARKS or any(self.work.glob(MARKS[stage])))
        return at_work or any(f"== {name}" in output for name in later)

    def kill_when(self, ready: Callable[[], bool], seconds: float = 0) -> None:
        """Start, and kill some seconds after something is so."""
        process = self.start()
        while process.poll() is None and not ready():
            time.sleep(0.05)
        time.sleep(seconds)
        self.kill(process)

    def finish(self, process: subprocess.Popen | None = None) -> str:
        """Wait for a process that was started, else continue to the end; returns the table."""
        assert (process or self.start()).wait() == 0, self.output()[-2000:]
        (table,) = self.work.glob("runs/*/table.md")
        return table.read_text()


@pytest.fixture
def chain_server(served):
    with stand_in.serving(served) as server:
        yield server


@pytest.fixture(scope="module")
def whole(served, tmp_path_factory):
    """A chain that runs in one go, started for all tests that need it and beside them, since each uses one core."""
    with stand_in.serving(served) as server:
        chain = Chain(tmp_path_factory.mktemp("whole"), server)
        process = chain.start()
        yield SimpleNamespace(chain=chain, process=process, server=server)
        chain.kill(process)


@pytest.mark.slow
def test_published_models_need_no_training(chain_server, tmp_path):
    chain = Chain(tmp_path, chain_server, "--published")
    table = chain.finish()
    assert table.count("\n| ImageReFL | ") >= 9 and "| ReFL |" not in table and "== train" not in chain.output()
    assert f"The authors' weights, {minis.MODEL}." in table


@pytest.mark.slow
@needs_half_an_hour
def test_a_chain_that_is_killed_in_its_stages_and_at_random_makes_the_same_table(whole, chain_server, tmp_path):
    """One kill in each of seven stages, three at random times after each."""
    chain, draw = Chain(tmp_path, chain_server), random.Random(1)
    for stage in STAGES:
        chain.kill_when(functools.partial(chain.is_in, stage), draw.uniform(0, 3))
        for _ in range(3):
            process = chain.start()
            time.sleep(draw.uniform(2, 25))
            chain.kill(process)
    assert chain.finish() == whole.chain.finish(whole.process)


@pytest.mark.slow
def test_one_command_fills_all_nine_columns(whole):
    table = whole.chain.finish(whole.process)
    row = r"^\| (ReFL|ReFL AIG|ReFL Combined|ImageReFL) \| (\w[\w.]*) \| -?[\d.]+ ± [\d.]+ \|"
    rows = re.findall(row, table, re.M)
    assert len(rows) == 36 == len(set(rows)) and "nan" not in table
    assert all(f"\n== {stage}" in whole.chain.output() for stage in STAGES)
    assert len(whole.server.fetched()) == 9
    assert whole.chain.finish() == table and len(whole.server.fetched()) == 9  # a second call repeats the report alone
