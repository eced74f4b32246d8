"""The definitions of the metrics, against closed forms and brute force."""

import math
import warnings

import numpy as np
import pytest
import torch

import metrics


def normal(n, D, seed, scale=1.0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def sample(mu, S, n=40, seed=0):
    """n points whose mean and unbiased covariance are exactly mu and S."""
    mu, S = torch.as_tensor(mu, dtype=torch.float64), torch.as_tensor(S, dtype=torch.float64)
    z = normal(n, len(mu), seed)
    z = torch.linalg.qr(z - z.mean(0)).Q * math.sqrt(n - 1)
    lam, V = torch.linalg.eigh(S)
    return mu + z @ (V * lam.clamp(min=0).sqrt()).T


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


# Means over prompts


def test_error_is_that_of_the_prompt_means():
    values, group = [0.0, 2.0, 2.0, 4.0, 4.0, 6.0], list("aabbcc")
    assert metrics.mean_and_error(values, group) == pytest.approx((3, 2 / math.sqrt(3)), abs=1e-15)
    assert metrics.mean_and_error(values)[1] == pytest.approx(np.std(values, ddof=1) / math.sqrt(6))


def test_every_prompt_has_the_same_weight_whatever_its_number_of_images():
    assert metrics.mean_and_error([1.0, 1.0, 1.0, 5.0], np.array([7, 7, 7, 2]))[0] == 3


def test_paired_difference_removes_the_variance_between_prompts():
    prompt, group = normal(30, 1, 0)[:, 0].repeat_interleave(4) * 100, np.arange(30).repeat(4)
    a, b = prompt + normal(120, 1, 1)[:, 0], prompt + normal(120, 1, 2)[:, 0]
    mean, error = metrics.paired_difference(a, b, group)
    m = (a - b).view(30, 4).mean(1)
    assert mean == pytest.approx(m.mean().item()) and error == pytest.approx(m.std().item() / math.sqrt(30))
    assert error < 0.25 < 10 < metrics.mean_and_error(a, group)[1]
    with pytest.raises(ValueError, match="120 and 119"):
        metrics.paired_difference(a, b[1:])


def test_one_prompt_has_no_error():
    with pytest.warns(UserWarning, match="no standard error"):
        mean, error = metrics.mean_and_error([1.0, 2.0], ["a", "a"])
    assert mean == 1.5 and math.isnan(error)


def test_diversity_of_five_directions():
    angle = np.deg2rad([0, 30, 60, 90, 120])
    x = np.stack([np.cos(angle), np.sin(angle)], 1) * [[1], [2], [3], [4], [5]]
    assert metrics.diversity(x, np.zeros(5, int)) == pytest.approx(0.5535898384862245, abs=1e-15)


def test_diversity_is_the_mean_over_prompts_of_the_off_diagonal_cosines():
    x, group = normal(9, 6, 0), ["b", "a", "b", "a", "b", "c", "c", "c", "c"]
    terms = []
    for name in "bac":
        u = x[[g == name for g in group]].numpy()
        cos = np.corrcoef(np.hstack([u, -u]))  # rows of mean 0, so that correlations are cosines
        terms.append(1 - np.mean(cos[~np.eye(len(u), dtype=bool)]))
    assert metrics.group_diversity(x, group).tolist() == pytest.approx(terms)
    assert metrics.diversity(x, group) == pytest.approx(np.mean(terms))


def test_equal_images_have_no_diversity_and_opposite_ones_two():
    assert metrics.diversity([[3.0, 4.0], [3.0, 4.0]], [0, 0]) == pytest.approx(0, abs=1e-15)
    assert metrics.diversity([[3.0, 4.0], [-6.0, -8.0]], [0, 0]) == pytest.approx(2)


def test_diversity_refuses_single_images_and_zero_features():
    with pytest.raises(ValueError, match="1 of 2"):
        metrics.diversity(normal(3, 2, 0), [0, 0, 1])
    with pytest.raises(ValueError, match="zero"):
        metrics.diversity([[0.0, 0.0], [1.0, 0.0]], [0, 0])
    with pytest.raises(ValueError, match="2 group ids for 3"):
        metrics.diversity(normal(3, 2, 0), [0, 0])


# FID

TOEPLITZ = [[1 / (1 + abs(i - j)) for j in range(5)] for i in range(5)]
GAUSSIANS = {
    "diagonal": ([0, 1, 2], np.diag([1, 4, 9]), [1, 1, 0], np.diag([4, 1, 16]), 8),
    "not commuting": ([1, 2], [[2, 1], [1, 2]], [0, 0], [[1, 0.5], [0.5, 3]], 5.320270148882052),
    "rank one": ([0, 0], [[1, 0], [0, 0]], [0, 0], [[0.5, 0.5], [0.5, 0.5]], 2 - math.sqrt(2)),
    "scaled": ([0] * 5, TOEPLITZ, [0] * 5, 4 * np.array(TOEPLITZ), 5),
    "identical": ([3] * 5, TOEPLITZ, [3] * 5, TOEPLITZ, 0),
}


@pytest.mark.parametrize("case", GAUSSIANS)
def test_fid_of_gaussians_in_closed_form(case):
    mu_x, S_x, mu_y, S_y, expected = GAUSSIANS[case]
    x, y = sample(mu_x, S_x, 40, 1), sample(mu_y, S_y, 50, 2)
    assert metrics.frechet_distance(mu_x, S_x, mu_y, S_y) == pytest.approx(expected, abs=1e-10)
    assert metrics.fid(x, y) == pytest.approx(expected, abs=1e-7 if case == "rank one" else 1e-10)


def test_fid_of_seven_points():
    i, j = np.arange(7)[:, None], np.arange(4)[None]
    x, y = np.sin(i + 0.5 * j) + 0.1 * i * j, np.cos(0.7 * i * (j + 1))
    assert metrics.fid(x, y) == pytest.approx(2.74951432102906, abs=1e-12)
    assert metrics.fid(torch.tensor(y), torch.tensor(x)) == pytest.approx(2.74951432102906, abs=1e-12)


@pytest.mark.parametrize("n", [60, 400])
def test_fid_of_a_set_with_itself_is_zero_at_any_rank(n):
    x = normal(n, 200, 0) / torch.arange(1, 201) ** 0.5 * 9 + 100
    assert abs(quiet(metrics.fid, x, x)) < 1e-8
    assert abs(quiet(metrics.fid, x, x.flip(0).clone())) < 1e-8


@pytest.mark.parametrize("n_x, n_y", [(300, 400), (30, 400), (400, 30), (30, 40)])
def test_fid_agrees_with_the_symmetric_eigenvalue_form(n_x, n_y):
    x, y = normal(n_x, 50, 0) + 0.1, normal(n_y, 50, 1) * torch.arange(1, 51) ** -0.5
    S_x, S_y = torch.cov(x.T), torch.cov(y.T)
    lam, V = torch.linalg.eigh(S_x)
    H = V * lam.clamp(min=0).sqrt() @ V.T
    cross = torch.linalg.eigvalsh(H @ S_y @ H).clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + S_x.trace() + S_y.trace() - 2 * cross
    assert quiet(metrics.fid, x, y) == pytest.approx(expected.item(), abs=1e-6)
    assert metrics.frechet_distance(x.mean(0), S_x, y.mean(0), S_y) == pytest.approx(expected.item(), abs=1e-6)


def test_fid_of_singular_covariances_keeps_its_digits():
    x, y = normal(30, 50, 0) + 0.1, normal(20, 50, 1) * torch.arange(1, 51) ** -0.5
    moments = x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)
    assert metrics.frechet_distance(*moments) == pytest.approx(quiet(metrics.fid, x, y), abs=1e-11)


# CovDist and LogCovDist

X, Y = sample([0, 1, 2], np.diag([4, 2, 1])), sample([5, 5, 5], np.diag([1, 3, 2]))


def test_spectrum_is_sorted_and_rotation_free_and_divides_by_n_minus_the_correction():
    Q = torch.linalg.qr(normal(3, 3, 5)).Q
    assert metrics.spectrum(X @ Q).tolist() == pytest.approx([4, 2, 1])
    assert metrics.spectrum(X, correction=0).tolist() == pytest.approx([3.9, 1.95, 0.975])


def test_spectral_distances_of_two_diagonals():
    assert metrics.covariance_distance(X, Y) == pytest.approx(1 / 3, abs=1e-9)  # (4, 2, 1) against (3, 2, 1)
    assert metrics.log_covariance_distance(X, Y) == pytest.approx(math.log(4 / 3) / 3, abs=1e-9)


def test_spectral_distances_of_a_scaled_covariance():
    x = sample([0] * 5, TOEPLITZ)
    assert metrics.covariance_distance(x, 3 * x + 1) == pytest.approx(8 * 5 / 5)
    assert metrics.log_covariance_distance(x, 3 * x + 1) == pytest.approx(math.log(9))
    assert metrics.log_covariance_distance(x, x / 3) == pytest.approx(math.log(9))


# Inputs


def test_numpy_torch_and_float32_give_the_same_float64_result():
    x, y = normal(20, 4, 0).float(), normal(20, 4, 1).float()
    for metric in (metrics.fid, metrics.covariance_distance, metrics.log_covariance_distance):
        expected = metric(x.double(), y.double())
        assert metric(x, y) == metric(x.numpy(), y.numpy()) == expected


@pytest.mark.parametrize("metric", [metrics.fid, metrics.covariance_distance, metrics.log_covariance_distance])
def test_too_few_images_give_a_warning(metric):
    x = normal(12, 10, 0)
    with pytest.warns(UserWarning, match="10 images cannot fill 10"):
        metric(x[2:], x[:10])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric(x, x + 1)


def test_sets_of_unequal_size_give_a_warning():
    with pytest.warns(UserWarning, match="12 against 11"):
        metrics.covariance_distance(normal(12, 3, 0), normal(11, 3, 1))


def test_arrays_that_are_not_features_are_refused():
    for x in (normal(1, 3, 0), normal(5, 3, 0)[0], normal(5, 3, 0) / 0):
        with pytest.raises(ValueError, match="features"):
            metrics.fid(x, normal(5, 3, 0))
    with pytest.raises(ValueError, match="D is 3 and 4"):
        metrics.fid(normal(5, 3, 0), normal(5, 4, 0))
