"""The reproduction: claims from points, and the runs behind them."""

import math
from pathlib import Path

import pytest

import evaluate
import reproduce
from report.claims import SeedCurves, Suite, Variant, claims, summarise


def curves(*values: tuple[str, str, float, float, float]) -> SeedCurves:
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
    return SeedCurves({"points": points}, Path(), 1)


def test_interpolates_the_curve_at_a_diversity():
    known = curves(("refl", "switch", 30, 0.2, 0.7), ("refl", "switch", 0, 0.1, 0.9))
    assert known.interpolate("refl", "switch", "diversity", 0.15, "tiny") == pytest.approx(0.8)
    assert known.interpolate("refl", "switch", "diversity", 0.25, "tiny") == pytest.approx(
        0.6
    )  # towards the base model
    assert known.interpolate("refl", "switch", "diversity", 0.05, "tiny") is None


def test_the_claims_of_two_seeds():
    variants = (Variant("refl", "refl", 5, 10), Variant("imagerefl", "imagerefl", 9, 30))

    def values(diversity, trained, judge=0.0):
        return {"diversity": [diversity, 0.0], "tiny": [trained, 0.0], "tiny2": [judge, 0.0], "rater": [judge, 0.0]} | {
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
    text = claims(results, [SeedCurves(results, Path(), seed) for seed in (1, 2)], variants)
    assert "| ReFL, 5 updates, combined 10 + 30 | 0.850 ± 0.050 |" in text
    assert "| trained reward | 0.500 ± 0.000 | 0.500, 0.500 |" in text  # ReFL alone, against the base without guidance
    assert "| diversity: share of the change undone | 0.250 ± 0.000 |" in text  # 0.1 -> 0.15 on the way to 0.3
    assert "| trained reward, more than ReFL Combined | 0.010 ± 0.050 | 0.060, -0.040 |" in text
    assert "| independent reward, more than ReFL AIG | 0.200 ± 0.000 |" in text  # between alone and power 1
    assert "**3. ImageReFL, 9 updates, switch 30, at equal trained reward**" in text
    assert "| diversity, more than ReFL AIG | 0.037 ± 0.000 |" in text  # 0.86 lies 13 % on the way from 0.9 to 0.6


def test_claims_give_mean_error_and_every_seed():
    assert summarise([0.1, 0.2, 0.3]) == f"0.200 ± {0.1 / math.sqrt(3):.3f} | 0.100, 0.200, 0.300"
    assert summarise([0.1, None]) == "0.100 | 0.100, outside"
    assert summarise([None]) == "outside the curve | outside"


def test_each_model_of_a_reproduction_is_trained_once_and_an_interrupted_one_is_resumed(tmp_path, monkeypatch):
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
    variants = (Variant("refl", "refl", 5, 10), Variant("imagerefl", "imagerefl", 9, 30))
    suite = Suite(variants=variants, seeds=(1, 2))
    with pytest.raises(ValueError, match="training stopped, see .*imagerefl-2.log"):
        reproduce.train_all(tmp_path, suite)
    names = ["imagerefl-1", "imagerefl-2", "refl-1", "refl-2"]
    assert sorted(calls) == [(name, False, "1") for name in names]
    assert sorted(evaluated) == [str(tmp_path / name) for name in names if name not in stops]
    calls.clear(), evaluated.clear(), stops.clear()
    places = reproduce.train_all(tmp_path, suite)
    assert calls == [("imagerefl-2", True, "1")] and evaluated == [str(tmp_path / "imagerefl-2")]
    assert sorted(path.name for path in places.values()) == names


def test_the_tiny_base_goes_through_stages_and_continues(tmp_path, monkeypatch, capsys):
    done, suite = [], Suite((Variant("refl", "refl", 5, 10),), seeds=(1,))

    def evaluated(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text("{}")
        done.append(folder.name)

    monkeypatch.setattr(reproduce, "QUICK", suite)
    monkeypatch.setattr(reproduce.evaluate, "main", lambda args: evaluated(Path(args.output_dir)))
    monkeypatch.setattr(reproduce, "train_all", lambda folder, suite: evaluated(folder / "evaluation" / "refl-1"))
    monkeypatch.setattr(reproduce, "report", lambda folder, suite: done.append("report"))
    flags = ["--quick", "--output-dir", str(tmp_path)]
    reproduce.main(reproduce.parse_args(flags))
    assert done == ["base", "refl-1", "report"] and "train, evaluate    open" in capsys.readouterr().out
    reproduce.main(reproduce.parse_args(flags))
    assert done == ["base", "refl-1", "report", "report"] and "evaluate base      done in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a reproduction with other flags"):
        reproduce.main(reproduce.parse_args(flags[1:]))
    reproduce.main(reproduce.parse_args(["--check"]))
    assert "nothing is missing" in capsys.readouterr().out
