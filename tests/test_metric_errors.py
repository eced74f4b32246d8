"""Errors and noise floors of the distances between image sets, against closed forms, derivatives and simulation."""

import math

import numpy as np
import pytest
import torch
from test_metrics import X, Y, normal, quiet, sample

import metrics
from report import metric_errors
from report.covariance_definitions import covariance_distances

# FID


def test_fid_floor_is_the_mean_fid_of_two_samples_of_one_gaussian():
    floor = metric_errors.fid_floor(sample([0] * 64, np.eye(64), 100), 500, 500)
    runs = [metrics.fid(normal(500, 64, 2 * k), normal(500, 64, 2 * k + 1)) for k in range(20)]
    assert floor == pytest.approx(4.416, abs=1e-9)
    assert np.mean(runs) == pytest.approx(floor, abs=0.08)
    assert metric_errors.fid_floor(sample([0, 0], np.diag([4, 1]), 50), 10, 40) == pytest.approx(0.125 * 8.3)


def test_fid_influence_is_the_derivative_by_the_weight_of_an_image():
    x, y = normal(30, 4, 0, 1.5) + 0.5, normal(25, 4, 1) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    for psi, own, other in zip(metric_errors.fid_influence(x, y), (x, y), (y, x), strict=True):
        mu, S = own.mean(0), torch.cov(own.T)

        def moved(z, h, mu=mu, S=S, other=other):
            S_h = S + h * (torch.outer(z, z) - S)
            return metrics.frechet_distance(mu + h * z, S_h, other.mean(0), torch.cov(other.T))

        slope = torch.tensor([(moved(z, 1e-5) - moved(z, -1e-5)) / 2e-5 for z in own - mu], dtype=torch.float64)
        torch.testing.assert_close(psi, slope - slope.mean(), rtol=1e-6, atol=1e-6)


def test_directions_without_variance_change_neither_fid_nor_its_influence():
    x, y = normal(30, 4, 0, 2), normal(25, 4, 1)
    wide = [torch.nn.functional.pad(z, (0, 3)) + 7 for z in (x, y)]
    assert metrics.fid(*wide) == pytest.approx(metrics.fid(x, y))
    for psi, expected in zip(metric_errors.fid_influence(*wide), metric_errors.fid_influence(x, y), strict=True):
        torch.testing.assert_close(psi, expected)


def draws(statistic, runs=80, n=400):
    """Repeats of a statistic of n points of a wide against n of a narrow Gaussian."""
    wide, narrow = torch.tensor([2.0, 1.5, 1.0, 0.6]), torch.tensor([1.0, 0.8, 0.6, 0.4])
    return [statistic(normal(n, 4, 2 * k) * wide + 0.3, normal(n, 4, 2 * k + 1) * narrow) for k in range(runs)]


def test_fid_error_is_the_spread_of_repeated_draws():
    values, errors = zip(*draws(metric_errors.fid_and_error), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.2)


def test_a_fixed_reference_adds_no_error_to_fid():
    x, y = normal(50, 3, 0), normal(60, 3, 1) * 2
    alone = metrics.mean_and_error(metric_errors.fid_influence(x, y)[0])[1]
    assert metric_errors.fid_and_error(x, y, fixed_reference=True)[1] == alone < metric_errors.fid_and_error(x, y)[1]


def test_fid_error_counts_prompts_not_copies():
    x, y = normal(100, 3, 0) * 2, normal(200, 3, 1)
    once = metric_errors.fid_and_error(x, y)[1]
    copied = metric_errors.fid_and_error(x.repeat(4, 1), y, group_x=list(range(100)) * 4)[1]
    assert copied == pytest.approx(once, rel=0.02)


# CovDist and LogCovDist

LN = math.log(4 / 3)  # (4, 2, 1) against (3, 2, 1): only the first eigenvalue differs


@pytest.mark.parametrize(
    "definition, covdist, logcovdist",
    [
        ("ours", 1 / 3, 0.09589402414781582),
        ("jena2024", 1, 0.12493873660468076),
        ("clip", 1, 0.09589402414781582),
        ("squares", math.nan, 0.28768207244344746**2),
        ("rms", 0.5773502691896257, LN / math.sqrt(3)),
        ("mse", 1 / 3, LN**2 / 3),
    ],
)
def test_definitions_of_the_spectral_distances_of_two_diagonals(definition, covdist, logcovdist):
    distances = covariance_distances(X, Y, definition).tolist()
    assert distances == pytest.approx([covdist, logcovdist], abs=1e-9, nan_ok=True)


def test_the_definition_ours_is_that_of_metrics():
    x, y = normal(60, 3, 0) * torch.tensor([3.0, 2.0, 1.0]), normal(60, 3, 1)
    expected = [metrics.covariance_distance(x, y), metrics.log_covariance_distance(x, y)]
    assert covariance_distances(x, y).tolist() == expected


def test_spectral_errors_are_the_jackknife_over_blocks_of_prompts():
    x, y = normal(60, 3, 0) * torch.tensor([3.0, 2.0, 1.0]), normal(60, 3, 1)
    group = torch.arange(12).repeat_interleave(5)
    result = metric_errors.spectral_distances_and_errors(x, y, group_x=group, group_y=group, blocks=6)
    for k, distance in enumerate((metrics.covariance_distance, metrics.log_covariance_distance)):
        variance = 0
        for pairs in (lambda keep: (x[keep], y), lambda keep: (x, y[keep])):
            left_out = [quiet(distance, *pairs(group % 6 != b)) for b in range(6)]
            variance += 5 / 6 * np.square(left_out - np.mean(left_out)).sum()
        assert result[k] == pytest.approx((distance(x, y), math.sqrt(variance)), rel=1e-9)


@pytest.mark.parametrize("group", [[0] * 5, [0, 0, 1, 1, 1]])
def test_spectral_errors_of_one_prompt_are_unknown_and_of_two_known(group):
    pair = metric_errors.spectral_distances_and_errors(normal(5, 3, 1), normal(5, 3, 2), group_x=group)
    assert all(math.isfinite(value) and math.isnan(error) == (max(group) == 0) for value, error in pair)


def test_spectral_errors_are_the_spread_of_repeated_draws():
    results = np.array(draws(lambda x, y: metric_errors.spectral_distances_and_errors(x, y, blocks=10), runs=50))
    spread, error = results[:, :, 0].std(0, ddof=1), results[:, :, 1].mean(0)
    assert error == pytest.approx(spread, rel=0.2)


def test_a_fixed_reference_adds_no_spectral_error():
    x, y = normal(50, 3, 0), normal(50, 3, 1) * 2
    both, fixed = (metric_errors.spectral_distances_and_errors(x, y, fixed_reference=f) for f in (False, True))
    assert all(alone[1] < error[1] for alone, error in zip(fixed, both, strict=True))


def test_an_unknown_definition_is_named():
    with pytest.raises(ValueError, match="'theirs'.*ours, jena2024"):
        covariance_distances(X, Y, "theirs")
