"""The tables of the experiment on curves with a known outcome, its arithmetic, and which runs a call makes."""

import json
import subprocess
import sys
import time

import pytest
from recipe import mini_base

from benchmarks import ablation_tables, ablations
from benchmarks.options import ablation_args
from training import cost, presets

KEYS = list(ablation_tables.COLUMNS)


def point(**values: float) -> dict[str, float]:
    return dict.fromkeys(KEYS, 0.0) | values


def curve(reward: float, diversity: float = 0.2, bend: float = 0.0) -> dict:
    """From the tuned model to a base model with reward 0 and diversity 0.4; `bend` above the line at its middle."""
    ends = point(tiny=reward, diversity=diversity), point(diversity=0.4)
    middle = point(tiny=reward / 2 + bend, diversity=(diversity + 0.4) / 2)
    return {0: ends[0], 10: middle, 40: ends[1]}


def test_a_run_is_read_where_its_trained_reward_has_risen_enough():
    stages = [curve(0.0, 0.4), curve(0.1, 0.3), curve(0.2, 0.1)]
    assert ablation_tables.reaching(stages, 0.15) == pytest.approx(1.5)
    assert ablation_tables.reaching(stages, 0.1) == pytest.approx(1)
    assert ablation_tables.reaching(stages, 0.21) is None
    found = ablation_tables.at_stage(stages, 1.5)
    assert found[0] == pytest.approx(point(tiny=0.15, diversity=0.2)) and list(found) == [0, 10, 40]
    assert ablation_tables.at_stage(stages, 2)[0]["tiny"] == 0.2
    fewer = [{n: point for n, point in curve.items() if n} if k else curve for k, curve in enumerate(stages)]
    assert set(ablation_tables.at_stage(fewer, 0.5)) == set(stages[0]) - {0}  # evaluated at other switches


def test_claim_a_is_the_height_above_the_straight_line_half_way_in_diversity():
    for bend in (0.0, 0.05, -0.02):
        assert ablation_tables.above_the_line(curve(0.3, bend=bend), "tiny") == pytest.approx(bend)
    flat = curve(0.3, diversity=0.4)
    assert ablation_tables.above_the_line(flat, "tiny") is None  # no diversity was lost: nothing to compare


def test_claim_b_compares_a_late_switch_with_the_other_curve_at_equal_diversity():
    noise = {0: point(rater=0.4, diversity=0.2), 40: point(rater=0.2, diversity=0.4)}
    image = {0: point(), 20: point(), 30: point(rater=0.35, diversity=0.3), 40: point()}
    assert ablation_tables.above_the_other(image, noise, "rater") == pytest.approx(0.05)
    image[30]["diversity"] = 0.5
    assert ablation_tables.above_the_other(image, noise, "rater") is None


def test_the_tables_have_errors_over_the_seeds_and_name_what_was_not_reached():
    variants = [ablations.REFL, ablations.IMAGEREFL]
    base = curve(0.0, 0.4)
    runs = {("refl", seed): ([base, curve(0.1), curve(0.2 + 0.02 * seed)], 5) for seed in (1, 2)}
    runs["imagerefl", 1] = [base, curve(0.04), curve(0.1)], 9
    text = ablation_tables.text(runs, variants, 1, 0.15, base)
    equal, reached = text.split("## At equal trained reward, +0.15")
    assert "| ReFL | 5 ± 0 | 2 | 0.100 ± 0.000 |" in equal and "| ImageReFL | 9 | 1 | 0.040 |" in equal
    assert "| ReFL, switch 10 | 5 ± 0 | 2 | 0.050 ± 0.000 |" in equal
    assert "| ReFL | 7 ± 0 | 2 | 0.150 ± 0.000 |" in reached
    assert "| ImageReFL: not reached by 1 of 1 |" in reached and "| ImageReFL | 9" not in reached


def test_curves_are_read_from_results():
    def measured(checkpoint, value, label="x", kind="switch", mean=0.0):
        values = {"tiny": [mean, 0.1], "covdist": [1.0, 1.0]}
        return {"checkpoint": checkpoint, "kind": kind, "value": value, "label": label, "values": values}

    points = [measured(None, 40, "Base", mean=3.0), measured(None, 40, "Base, no guidance")]
    points += [measured("a", 30, mean=2.0), measured("a", 0, mean=1.0), measured("a", 1.0, kind="aig", mean=9.0)]
    curves = ablation_tables.curves_of({"points": points, "steps": 40})
    assert curves == {"a": {0: {"tiny": 1.0}, 30: {"tiny": 2.0}, 40: {"tiny": 3.0}}} and list(curves["a"]) == [
        0,
        30,
        40,
    ]


# ------------------------------------------------------------------------------------------------ which runs


@pytest.mark.slow
def test_all_variants_have_done_the_same_arithmetic_at_each_stage():
    args = ablation_args("", ["--updates", "75"])
    budget = 75 * ablations.cost_of(ablations.REFL, "tiny")
    for variant in ablations.chosen(",".join(ablations.GROUPS)):
        per_stage, own = ablations.updates_per_stage(variant, args), ablations.cost_of(variant, "tiny")
        assert per_stage * own * args.stages / ablations.BUDGETS == pytest.approx(budget, rel=0.04), variant.name
    assert cost.T_MAX == 10 and cost.REFL_EVERY == 4  # left as they were
    parts = ablations.parts_of("tiny")
    assert ablations.cost_of(ablations.GROUPS["mix"][1], "tiny") == pytest.approx(
        cost.per_image(parts)["imagerefl"], rel=1e-5
    )
    costs = cost.per_image(parts)
    expected = (costs["imagerefl"] + costs["refl"]) / 2
    assert ablations.cost_of(ablations.GROUPS["mix"][2], "tiny") == pytest.approx(expected)


def test_names_are_unique_and_switches_those_of_the_presets():
    variants = ablations.chosen(",".join(ablations.GROUPS))
    assert len({variant.name for variant in variants}) == len(variants)
    assert {variant.method: variant.base_steps for variant in variants} == presets.TINY.switch
    with pytest.raises(ValueError, match="--groups methods,none: none is none of"):
        ablations.chosen("methods,none")


def test_constants_are_set_before_the_command_runs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, imagerefl, refl\nprint(imagerefl.REFL_EVERY, refl.T_MAX, __name__, sys.argv[1:])")
    command = [sys.executable, "-c", ablations.SET_CONSTANTS, str(ablations.ROOT), str(script)]
    command += ["imagerefl.REFL_EVERY=2", "refl.T_MAX=7", "--", "--lr", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "2 7 __main__ ['--lr', '1']", done.stderr


@pytest.fixture
def fake(monkeypatch):
    """Runs that train nothing; returns the names of those that were trained."""
    trained = []

    def train(variant, seed, run, args):
        if time.monotonic() > args.deadline:
            raise ablations.OutOfTime
        if variant.name == "drtune":
            raise ValueError("drtune: failed")
        trained.append(run.name)

    monkeypatch.setattr(ablations, "train", train)
    monkeypatch.setattr(ablations, "stages_of", lambda run: [run / "stage-1", run / "stage-2"])

    def evaluate(method, unets, output, args):
        output.mkdir(parents=True)
        values = {key: [0.1, 0.0] for key in KEYS}
        points = [{"checkpoint": None, "label": "Base", "kind": "switch", "value": 40, "values": values}]
        points += [
            {"checkpoint": str(u), "kind": "switch", "value": v, "values": values} for u in unets for v in (0, 30)
        ]
        return {"points": points, "steps": 40}

    monkeypatch.setattr(ablations, "evaluate", evaluate)
    monkeypatch.setattr(ablations, "updates_per_stage", lambda *_: 38)
    return trained


def test_what_is_done_is_skipped_and_a_failed_run_stops_no_other(tmp_path, fake, capsys):
    flags = ["--groups", "methods", "--seeds", "1,2", "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    ablations.main(ablation_args("", flags))
    names = [f"{variant.name}-{seed}" for seed in (1, 2) for variant in ablations.GROUPS["methods"]]
    assert fake == [name for name in names if "drtune" not in name or "image" in name]
    output = capsys.readouterr()
    assert "drtune: failed" in output.err and "| Image-DRTune-5 |" in output.out and "| DRTune-5 |" not in output.out
    assert not list((tmp_path / "out").glob("*-evaluation"))
    stages, per_stage = ablations.read(tmp_path / "out" / "refl-1.json")
    assert per_stage == 38 and stages[0][30]["rater"] == 0.1
    fake.clear()
    ablations.main(ablation_args("", flags))
    assert fake == [] and (tmp_path / "out" / "tables.md").read_text() in capsys.readouterr().out


def test_nothing_starts_after_the_time_limit(tmp_path, fake, capsys):
    flags = ["--groups", "methods", "--seeds", "1", "--minutes", "0", "--device", "cpu", "--output-dir", str(tmp_path)]
    with pytest.raises(ValueError, match="call again to continue"):
        ablations.main(ablation_args("", flags))
    assert fake == [] and "refl, seed 1: not finished" in capsys.readouterr().out


def test_a_command_is_stopped_at_the_time_limit_and_a_failure_is_named(tmp_path):
    args = ablation_args("", [])
    args.deadline = time.monotonic() + 0.5
    script = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\ntime.sleep(60)"
    )
    with pytest.raises(ablations.OutOfTime):
        ablations.call([sys.executable, "-c", script], tmp_path / "log", args)
    args.deadline = time.monotonic() + 60
    with pytest.raises(ValueError, match="log: failed: no such thing"):
        ablations.call([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log", args)


@pytest.mark.slow
def test_the_experiment_rehearsed(tmp_path, capsys, monkeypatch):
    """Two variants on a mini base: trained with a changed constant, evaluated at two stages, in the tables."""
    base, (_, variant, _) = mini_base(tmp_path / "base"), ablations.GROUPS["t_f"]
    monkeypatch.setitem(ablations.GROUPS, "t_f", (variant,))
    flags = ["--rehearse", "--groups", "t_f", "--base", base, "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    ablations.main(ablation_args("", flags))
    assert "| ReFL, t_f in the last 5 | 1 | 1 |" in capsys.readouterr().out
    stages, _ = ablations.read(tmp_path / "out" / "t_f-5-1.json")
    (base_curve,), _ = ablations.read(tmp_path / "out" / "base.json")
    assert len(stages) == 2 and set(stages[0]) == set(base_curve) == {0, 10, 30, 40}
    assert stages[0][40] == base_curve[40] and 0 < abs(stages[1][0]["tiny"] - base_curve[0]["tiny"]) < 0.1
    log = (tmp_path / "out" / "t_f-5-1" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in log] == ["refl"] * 2
    assert not list((tmp_path / "out").rglob("*.safetensors")) or not (tmp_path / "out" / "t_f-5-1" / "states").exists()
