"""Precision, recall, density, coverage, KID, MIND, Vendi: against other people's code, closed forms and simulation."""

import math

import numpy as np
import pytest
import torch
from test_metrics import normal

import metrics
from report import distribution_metrics as more
from report import metric_errors, results

i, j = np.meshgrid(np.arange(40), np.arange(6), indexing="ij")
X = np.sin(i + 0.5 * j) + 0.02 * i * (j + 1) / 6
Y = np.cos(0.7 * i * (j + 1)) + 0.3


def test_values_of_other_implementations():
    """prdc 0.2 with k = 5; torch-fidelity's KID of all images, and its MIND with 1000 directions of seed 2020 (float32,
    commit a51aa64); Vendi-Score 0.0.3 of the first five rows."""
    assert more.prdc(X, Y).tolist() == pytest.approx([0.5, 0.35, 0.48, 0.15], abs=1e-12)
    assert more.kid_and_error(X, Y)[0] == pytest.approx(0.1887546993819127, rel=1e-12)
    assert more.mind_and_error(X, Y, seed=2020)[0] == pytest.approx(2.797322988510132, rel=1e-6)
    assert more.group_vendi(X[:5], [0] * 5).item() == pytest.approx(1.9438271466873105, rel=1e-9)


def test_prdc_on_a_line():
    """k = 1: the balls of y = 0, 1, 3, 7 have radii 1, 1, 2, 4; those of x = 0.5, 2, 20 have 1.5, 1.5, 18."""
    y, x = (torch.tensor(values)[:, None] for values in ([0.0, 1, 3, 7], [0.5, 2.0, 20]))
    precision, recall, density, coverage = more.prdc(x, y, k=1).tolist()
    assert precision == 2 / 3  # 20 is in no ball of y
    assert recall == 1  # 0, 1 are near 0.5; 3 near 2; 7 is in the ball of 20
    assert density == pytest.approx((2 + 1 + 0) / 3)  # 0.5 in two balls, 2 in that of 3 alone: balls are open
    assert coverage == 3 / 4  # no x is within 4 of 7
    with pytest.raises(ValueError, match="need 6 images"):
        more.prdc(x, y)


def test_collapse_lowers_recall_and_coverage_and_damage_lowers_precision_and_density():
    y = normal(200, 3, 0)
    same, collapsed, damaged = normal(200, 3, 1), normal(200, 3, 1) * 0.2, normal(200, 3, 1) * 3
    p, r, d, c = zip(*(more.prdc(x, y).tolist() for x in (same, collapsed, damaged)), strict=True)
    assert p[1] > 0.95 and r[1] < 0.3 and c[1] < 0.4  # a few typical images: good, not diverse
    assert p[2] < 0.4 * p[0] and d[2] < 0.3 * d[0]
    assert p[0] > 0.85 and r[0] > 0.85 and c[0] > 0.9 and d[0] == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_errors_are_the_spread_of_repeated_draws():
    """Those of the first four are cautious, as their docstring says."""
    found = []
    for k in range(25):
        x, y = normal(120, 2, 2 * k), normal(120, 2, 2 * k + 1) + 0.8
        found.append([*more.prdc_and_errors(x, y), more.kid_and_error(x, y), more.mind_and_error(x, y)])
    found = np.array(found)
    spread, error = found[:, :, 0].std(0, ddof=1), found[:, :, 1].mean(0)
    assert error[4:] == pytest.approx(spread[4:], rel=0.4)
    assert (error[:4] > 0.8 * spread[:4]).all() and (error[:4] < 2.2 * spread[:4]).all()


def test_minds_influence_is_the_derivative_by_the_weight_of_an_image():
    """A weight is changed by numbers of copies: 12 more of one image, one less of each."""
    x, y = normal(12, 2, 0), normal(12, 2, 1) + 0.5
    value, *influences = more.mind_and_influence(x, y, projections=20)
    for own, other, psi in zip((x, y), (y, x), influences, strict=True):
        for i in range(0, 12, 3):
            slope = 0
            for sign in (1, -1):
                copies = torch.full((12,), 200 - sign)
                copies[i] += 12 * sign
                heavier = own.repeat_interleave(copies, 0)
                slope += sign * more.mind_and_influence(heavier, other.repeat_interleave(200, 0), 20)[0] * 100
            assert slope == pytest.approx(psi[i].item(), abs=0.06)
    assert max(abs(psi).max() for psi in influences) > 3


def test_prompts_count_not_copies():
    x, y = normal(40, 3, 0), normal(160, 3, 1)
    group = list(range(40)) * 4
    copied = more.kid_and_error(x.repeat(4, 1), y, group)[1]
    assert copied == pytest.approx(more.kid_and_error(x, y)[1], rel=0.3)
    shuffled = torch.randperm(160, generator=torch.Generator().manual_seed(0)).tolist()
    a = more.prdc_and_errors(y, normal(160, 3, 2), group)
    b = more.prdc_and_errors(y[shuffled], normal(160, 3, 2), [group[i] for i in shuffled])
    assert [v for v, _ in a] == pytest.approx([v for v, _ in b])


def test_mind_of_a_shift_is_three_times_its_square():
    """E over directions of (u.s)^2 is |s|^2 / D."""
    x, s = normal(30, 4, 0), torch.tensor([1.0, -2.0, 0.5, 0.0])
    value, _ = more.mind_and_error(x, x + s, projections=20_000)
    assert value == pytest.approx(3 * s.square().sum().item(), rel=0.03)
    with pytest.raises(ValueError, match="equal numbers"):
        more.mind_and_error(x, x[1:])


def test_kid_of_one_distribution_is_zero_on_average_and_can_be_negative():
    found = [more.kid_and_error(normal(30, 4, 2 * k), normal(30, 4, 2 * k + 1))[0] for k in range(200)]
    assert min(found) < 0 and abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(200)


def test_vendi_counts_different_images():
    alike, apart = torch.ones(5, 8), torch.eye(5, 8)
    assert more.group_vendi(torch.cat([alike, apart]), [0] * 5 + [1] * 5).tolist() == pytest.approx([1, 5])
    pairs = torch.eye(8)[[0, 0, 1, 1]] * 3
    assert more.group_vendi(pairs, "aaaa").item() == pytest.approx(2)


@pytest.mark.filterwarnings("ignore")
def test_the_columns_of_an_evaluation():
    group = [p for p in range(10) for _ in range(3)]
    columns = {"tiny": normal(30, 1, 3)[:, 0], "diversity": normal(30, 4, 0), "fid": normal(30, 4, 0)}
    columns["fdd"] = normal(30, 5, 1)
    real = {"fid": normal(30, 4, 2), "fdd": normal(30, 5, 4)}
    values = results.more_values(columns, real, group, 3)
    assert list(values) == ["vendi", "precision", "recall", "density", "coverage", "kid", "mind", "fdd"]
    assert values["fdd"] == list(metric_errors.fid_and_error(columns["fdd"], real["fdd"], group))
    assert values["vendi"] == list(metrics.mean_and_error(more.group_vendi(columns["diversity"], group)))
    assert all(math.isfinite(v) for pair in values.values() for v in pair)
    titles = [c["title"] for c in results.table_columns(values, tiny=True)]
    assert titles == ["Vendi", "Precision", "Recall", "Density", "Coverage", "KID", "MIND", "FD-DINOv2"]
    few = results.more_values({k: v[:3] for k, v in columns.items()}, {k: v[:3] for k, v in real.items()}, [0] * 3, 3)
    assert "recall" not in few and few["kid"][1] is None  # one prompt: no error
