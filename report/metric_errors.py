"""Standard errors and noise floors of the distances between image sets: FID, CovDist, LogCovDist (`metrics.py`).

FID's error follows from its influence function, that of the spectral distances from a jackknife over prompts.
Letters: N images, D features; x generated, y reference; mu mean, S covariance, lam eigenvalues.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from metrics import (
    as_feature_pair,
    centred_spectrum,
    eigenvalues,
    fid,
    mean_and_error,
    mean_and_root,
    prompt_numbers,
    spectrum,
)
from report.covariance_definitions import DEFINITIONS, compare, covariance_distances


def fid_influence(x, y) -> tuple[Tensor, Tensor]:
    """N times the first-order effect of each image on FID, (N1,) and (N2,), each of mean 0.

    psi_i = 2 z'(mu_x - mu_y) + z'(I - T) z - const. at z = x_i - mu_x, where T maps N(0, S_x) to N(0, S_y).
    """
    x, y = as_feature_pair(x, y)
    (mu_x, F_x), (mu_y, F_y) = mean_and_root(x), mean_and_root(y)
    U, s, Vh = torch.linalg.svd(F_x.T @ F_y, full_matrices=False)
    scale = torch.where(s > s[0] * len(s) * torch.finfo(s.dtype).eps, s.rsqrt(), 0)

    def psi(z: Tensor, shift: Tensor, G: Tensor) -> Tensor:  # T = G G'
        effect = 2 * z @ shift + z.square().sum(1) - (z @ G).square().sum(1)
        return effect - effect.mean()

    psi_x = psi(x - mu_x, mu_x - mu_y, F_y @ Vh.T * scale)
    psi_y = psi(y - mu_y, mu_y - mu_x, F_x @ U * scale)
    return psi_x, psi_y


def fid_and_error(x, y, group_x=None, group_y=None, fixed_reference: bool = False) -> tuple[float, float]:
    """FID and its standard error; with `fixed_reference`, y is the whole population and adds no error.

    `group_x`, `group_y` (N,): the prompt of each image. The error is of first order: it excludes the bias and is
    unreliable when N <= D or FID is near its floor.
    """
    value, (psi_x, psi_y) = fid(x, y), fid_influence(x, y)
    error_x, error_y = mean_and_error(psi_x, group_x)[1], mean_and_error(psi_y, group_y)[1]
    return value, error_x if fixed_reference else (error_x**2 + error_y**2) ** 0.5


def fid_floor(x, n_x: int, n_y: int) -> float:
    """Expected FID between n_x and n_y samples of one Gaussian that has the covariance of x (N, D), to second order.

    (1/n_x + 1/n_y) [tr S + (sum over i != j of lam_i lam_j / (lam_i + lam_j) + tr S) / 2]
    """
    lam = spectrum(x)
    pairs = lam[:, None] * lam / (lam[:, None] + lam).clamp(min=1e-300)
    return ((1 / n_x + 1 / n_y) * (lam.sum() + (pairs.fill_diagonal_(0).sum() + lam.sum()) / 2)).item()


def spectral_distances_and_errors(
    x, y, definition: str = "ours", group_x=None, group_y=None, fixed_reference: bool = False, blocks: int = 20
) -> tuple[tuple[float, float], tuple[float, float]]:
    """((CovDist, error), (LogCovDist, error)), the errors by the jackknife over blocks of whole prompts.

    One block at a time is left out of x and, unless `fixed_reference`, of y. The errors exclude the bias, which is the
    distance between two samples of one distribution, and are too large where the bias dominates.
    """
    value, form = covariance_distances(x, y, definition), DEFINITIONS[definition]
    x, y = as_feature_pair(x, y)
    lam_x, lam_y = spectrum(x, form.correction), spectrum(y, form.correction)
    without_x = [compare(lam, lam_y, form) for lam in _leave_one_out_spectra(x, group_x, blocks, form.correction)]
    variance = _jackknife_variance(torch.stack(without_x))
    if not fixed_reference:
        without_y = [compare(lam_x, lam, form) for lam in _leave_one_out_spectra(y, group_y, blocks, form.correction)]
        variance = variance + _jackknife_variance(torch.stack(without_y))
    return tuple(zip(value.tolist(), variance.sqrt().tolist(), strict=True))


def _leave_one_out_spectra(x: Tensor, group, blocks: int, correction: int) -> Iterator[Tensor]:
    """The spectrum of x (N, D) without each block in turn; block b holds every `blocks`-th prompt, starting at b.

    NaN where too few images remain.
    """
    x = x - x.mean(0)
    block = prompt_numbers(range(len(x)) if group is None else group, x) % blocks
    few = len(x) < x.shape[1]
    gram = None if few else x.T @ x
    for b in block.unique():
        removed = x[block == b]
        n, total = len(x) - len(removed), removed.sum(0)  # the n remaining rows sum to -total
        if n <= correction:
            yield x.new_full(x.shape[1:], float("nan"))
            continue
        if few:
            kept = x[block != b]
            yield centred_spectrum(kept - kept.mean(0), n - correction)
            continue
        yield eigenvalues((gram - removed.T @ removed - torch.outer(total, total) / n) / (n - correction))


def _jackknife_variance(left_out: Tensor) -> Tensor:
    """(B, ...) values, each without one of B blocks -> the variance of the value computed with all of them."""
    return (len(left_out) - 1) * left_out.var(0, correction=0)
