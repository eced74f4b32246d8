from types import SimpleNamespace

import pytest
import torch

import metrics
from training import monitor


def look(reward, judge, diversity, noise=0.01):
    g = torch.Generator().manual_seed(0)
    values = {"reward": reward, "judge": judge, "diversity": diversity}
    return {k: v + noise * torch.randn(16, generator=g) for k, v in values.items()}


FIRST = look(0.7, 0.64, 0.25, noise=0.0)


def test_change_is_the_paired_mean_and_its_error():
    first, now = {"reward": torch.tensor([1.0, 2.0, 4.0])}, {"reward": torch.tensor([2.0, 4.0, 7.0])}
    difference, error = monitor.changes(first, now)["reward"]
    assert difference == 2.0
    assert abs(error - 1 / 3**0.5) < 1e-12  # differences 1, 2, 3: sd 1


def test_warns_when_the_reward_rises_and_the_rest_falls():
    assert monitor.overfits(monitor.changes(FIRST, look(0.8, 0.5, 0.1)))


def test_does_not_warn_when_one_of_them_holds():
    assert not monitor.overfits(monitor.changes(FIRST, look(0.8, 0.66, 0.1)))
    assert not monitor.overfits(monitor.changes(FIRST, look(0.8, 0.5, 0.26)))
    assert not monitor.overfits(monitor.changes(FIRST, look(0.6, 0.5, 0.1)))


def test_does_not_warn_within_the_error():
    assert not monitor.overfits(monitor.changes(FIRST, look(0.8, 0.5, 0.1, noise=3.0)))
    assert not monitor.overfits(monitor.changes(FIRST, FIRST))


def test_works_without_a_judge():
    first, now = ({k: v for k, v in s.items() if k != "judge"} for s in (FIRST, look(0.8, 0.5, 0.1)))
    assert monitor.overfits(monitor.changes(first, now))
    assert "judge" not in monitor.line(monitor.changes(first, now))


def test_images_are_scored_as_they_come_and_a_prompt_that_stands_twice_is_two(monkeypatch):
    prompts, images = ["fox", "fox", "owl"], torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(monitor, "images_of", lambda *_: ([part, -part] for part in images.split(5)))
    asked = []

    def reward(part, said):
        asked.append(said)
        return part.mean((1, 2, 3))

    m = SimpleNamespace(reward=reward, judge=None, features=lambda part: part.flatten(1))
    scores, negative = monitor.scores_of(None, m, None, prompts, [40, 0])
    assert asked[::2] == asked[1::2] == [["fox"] * 5, ["fox"] * 3 + ["owl"] * 2, ["owl"] * 2]
    assert torch.equal(scores["reward"], images.mean((1, 2, 3)))
    assert torch.equal(negative["reward"], -scores["reward"])
    each = [metrics.group_diversity(part.flatten(1), [0] * 4).item() for part in images.split(4)]
    assert scores["diversity"].tolist() == pytest.approx(each)


def test_the_base_is_drawn_once_for_all_grids(monkeypatch, tmp_path):
    drawn = []

    def images_of(args, m, row, prompts, count, switches):
        drawn.extend(switches)
        yield [torch.zeros(count * len(prompts), 3, 8, 8) for _ in switches]

    monkeypatch.setattr(monitor, "images_of", images_of)
    m = SimpleNamespace(shown={})
    for name in ("a.png", "b.png"):
        monitor.show(SimpleNamespace(method="refl"), m, None, ["fox", "owl"], tmp_path / name)
    assert drawn == [40, 0, 0]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
