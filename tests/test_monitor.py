"""The monitor: scores, their changes, and the warning of over-optimisation."""

from types import SimpleNamespace

import pytest
import torch

import metrics
from training import monitor
from training.data import PromptDataset


def scores_at(reward, judge, diversity, noise=0.01):
    g = torch.Generator().manual_seed(0)
    values = {"reward": reward, "judge": judge, "diversity": diversity}
    return {k: v + noise * torch.randn(16, generator=g) for k, v in values.items()}


FIRST = scores_at(0.7, 0.64, 0.25, noise=0.0)


def test_change_is_the_paired_mean_and_its_error():
    first, now = {"reward": torch.tensor([1.0, 2.0, 4.0])}, {"reward": torch.tensor([2.0, 4.0, 7.0])}
    difference, error = monitor.changes(first, now)["reward"]
    assert difference == 2.0
    assert abs(error - 1 / 3**0.5) < 1e-12  # differences 1, 2, 3: sd 1


def test_warns_when_the_reward_rises_and_the_rest_falls():
    assert monitor.overfits(monitor.changes(FIRST, scores_at(0.8, 0.5, 0.1)))


def test_does_not_warn_if_only_some_of_them_change():
    assert not monitor.overfits(monitor.changes(FIRST, scores_at(0.8, 0.66, 0.1)))
    assert not monitor.overfits(monitor.changes(FIRST, scores_at(0.8, 0.5, 0.26)))
    assert not monitor.overfits(monitor.changes(FIRST, scores_at(0.6, 0.5, 0.1)))


def test_does_not_warn_within_the_error():
    assert not monitor.overfits(monitor.changes(FIRST, scores_at(0.8, 0.5, 0.1, noise=3.0)))
    assert not monitor.overfits(monitor.changes(FIRST, FIRST))


def test_works_without_a_held_out_reward():
    first, now = ({k: v for k, v in s.items() if k != "judge"} for s in (FIRST, scores_at(0.8, 0.5, 0.1)))
    assert monitor.overfits(monitor.changes(first, now))
    assert "judge" not in monitor.describe(monitor.changes(first, now))


def run_of(models, prompts) -> SimpleNamespace:
    args = SimpleNamespace(batch_size=2, device="cpu", dtype="float32", compile=True)
    return SimpleNamespace(args=args, models=models, prompts=prompts, size=(4, 4), guidance=2.0, cached_images={})


def test_scores_follow_the_images_and_a_repeated_prompt_counts_twice(monkeypatch):
    prompts, images = ["fox", "fox", "owl"], torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    batches, scored_prompts = iter(images.split(4)), []

    def generate_each(base, tuned, vae, text, scheduler, schedules, prompts, seeds, size, guidance):
        assert seeds == [0, 1, 2, 3] and [w[0] for w in schedules] == [0.0, 1.0]
        part = next(batches)
        return [part, -part]

    def reward(part, prompts):
        scored_prompts.append(prompts)
        return part.mean((1, 2, 3))

    monkeypatch.setattr(monitor, "generate_each", generate_each)
    m = SimpleNamespace(reward=reward, judge=None, features=lambda part: part.flatten(1))
    m.base = m.tuned = m.vae = m.text = None
    scores, negative = monitor.evaluate(run_of(m, prompts), [40, 0])
    assert scored_prompts[::2] == scored_prompts[1::2] == [["fox"] * 4, ["fox"] * 4, ["owl"] * 4]
    assert torch.equal(scores["reward"], images.mean((1, 2, 3)))
    assert torch.equal(negative["reward"], -scores["reward"])
    each = [metrics.group_diversity(part.flatten(1), [0] * 4).item() for part in images.split(4)]
    assert scores["diversity"].tolist() == pytest.approx(each)
    table = monitor.summarise([scores], ["base"])["base"]["reward"]
    assert table == pytest.approx([images.mean((1, 2, 3)).mean().item(), images.mean((1, 2, 3)).std().item()])


def test_distances_are_to_as_many_real_images_and_need_images():
    data = [(torch.full((3, 2, 2), i / 40), "") for i in range(30)]
    run = run_of(SimpleNamespace(features=lambda part: part.flatten(1)[:, :2] * torch.tensor([1.0, 2.0])), ["fox"])
    run.args.seed, run.stream = 1, SimpleNamespace(data=data)
    made = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    found = monitor.distances(run, made)
    real = run.cached_images["real features"]
    assert len(real) == 20 and len({tuple(row) for row in real.tolist()}) == 20
    assert found == {"fid": metrics.fid(made, real), "logcovdist": metrics.log_covariance_distance(made, real)}
    assert monitor.distances(run, made) == found
    run.stream.data = PromptDataset(["fox"])
    assert monitor.distances(run, made) == {}


def test_the_base_model_is_sampled_once_for_all_grids(monkeypatch, tmp_path):
    sampled = []

    def generate_each(base, tuned, vae, text, scheduler, schedules, prompts, *rest):
        sampled.append(schedules[0].count(0.0))
        return [torch.zeros(len(prompts), 3, 8, 8)]

    monkeypatch.setattr(monitor, "generate_each", generate_each)
    run = run_of(SimpleNamespace(base=None, tuned=None, vae=None, text=None), ["fox", "owl"])
    run.grid_columns = {"base": (2, 40), "tuned": (2, 0)}
    for name in ("a.png", "b.png"):
        monitor.save_grid(run, tmp_path / name)
    assert sampled == [40, 0, 0]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
