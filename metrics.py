"""How the paper measures diversity (Section 5.1): DinoDiversity, FID, CovDist and LogCovDist, as columns of Table 1.

Each metric is a function of feature arrays, numpy or torch, computed in float64. Quality and CLIPScore are the mean
reward per image (`rewards.load`). `pretrained/features.py` has the feature extractors; `report/metric_errors.py` has
the standard error and noise floor of FID, CovDist and LogCovDist.
Letters: N images, D features, P prompts; x generated, y reference; mu mean, S covariance, lam eigenvalues.
"""

import warnings

import torch
from torch import Tensor

# Means over prompts (Section 5.4: several images per prompt, scores averaged; the ± of Table 1)


def mean_and_error(values, group=None) -> tuple[float, float]:
    """Mean and standard error of one value per image (N,); images of one prompt are not independent.

    With m_p the mean over the images of prompt p: the mean is mean(m_p), the error is sd(m_p) / sqrt(P), nan if P = 1.
    `group` (N,) holds the prompt, or its number, of each image; without it every image has a prompt of its own.
    """
    m = as_double(values) if group is None else _prompt_means(as_double(values), group)
    if len(m) < 2:
        warnings.warn("one prompt has no standard error", stacklevel=2)
        return m.mean().item(), float("nan")
    return m.mean().item(), (m.std() / len(m) ** 0.5).item()


def paired_difference(a, b, group=None) -> tuple[float, float]:
    """Mean and standard error of a - b (N,): two models on the same prompts and seeds.

    Raises ValueError when a and b differ in length.
    """
    a, b = as_double(a), as_double(b)
    if a.shape != b.shape:
        raise ValueError(f"a paired difference needs the same images on both sides, got {len(a)} and {len(b)}")
    return mean_and_error(a - b, group)


# DinoDiversity (Section 5.1): average pairwise cosine distance of DINO embeddings of images of one prompt


def diversity(features, group) -> float:
    """DinoDiversity: mean over prompts of 1 - mean cos(u_i, u_j) over pairs i != j of the prompt's images; 0 if equal.

    `features` (N, D); `group` (N,) holds the prompt, or its number, of each image. Raises as `group_diversity`.
    """
    return group_diversity(features, group).mean().item()


def group_diversity(features, group) -> Tensor:
    """DinoDiversity of each prompt, (P,), in order of first appearance; `mean_and_error` gives its mean and error.

    Raises ValueError when a prompt has only one image or a feature vector is zero.
    """
    x = as_features(features)
    prompt = prompt_numbers(group, x)
    n = torch.bincount(prompt).to(x)
    if n.min() < 2:
        raise ValueError(f"diversity needs two images per prompt; {int((n < 2).sum())} of {len(n)} prompts have one")
    norm = x.norm(dim=1, keepdim=True)
    if norm.min() == 0:
        raise ValueError("diversity: a feature vector is zero, so it has no direction")
    total = x.new_zeros(len(n), x.shape[1]).index_add_(0, prompt, x / norm)
    return 1 - (total.square().sum(1) - n) / (n * (n - 1))  # |sum u_i|^2 = n + sum of cos over n (n - 1) pairs


# FID (Section 5.1; Heusel et al. 2017): the Fréchet distance of two Gaussians


def fid(x, y) -> float:
    """FID = |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of features x (N1, D) and y (N2, D).

    S divides by N - 1. FID is biased upwards (by `report.metric_errors.fid_floor`), so compare only values with equal
    N1 and with equal N2. Warns when a covariance is singular. Raises ValueError for arrays that are not (N, D) or not
    finite.
    """
    x, y = as_feature_pair(x, y)
    warn_if_singular("FID", x, y)
    return _frechet(*mean_and_root(x), *mean_and_root(y))


def frechet_distance(mu_x, S_x, mu_y, S_y) -> float:
    """`fid` from means (D,) and covariances (D, D): `mu` and `sigma` of pytorch-fid's statistics files."""
    mu_x, S_x, mu_y, S_y = as_double(mu_x), as_double(S_x), as_double(mu_y), as_double(S_y)
    return _frechet(mu_x, _root(S_x), mu_y, _root(S_y))


def _frechet(mu_x: Tensor, F_x: Tensor, mu_y: Tensor, F_y: Tensor) -> float:
    # With S = F F', tr (S_x S_y)^(1/2) is the sum of the singular values of F_x' F_y. This is real and accurate at
    # any rank; the matrix square root of a nearly singular product loses half the digits.
    cross = torch.linalg.svdvals(F_x.T @ F_y).sum()
    return ((mu_x - mu_y).square().sum() + F_x.square().sum() + F_y.square().sum() - 2 * cross).item()


def mean_and_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) of x (N, D) and F (D, min(N, D)) with covariance S = F F', dividing by N - 1; S is not formed."""
    mu = x.mean(0)
    centred = (x - mu) / (len(x) - 1) ** 0.5
    return mu, (centred if len(x) <= x.shape[1] else torch.linalg.qr(centred, mode="r").R).T


def _root(S: Tensor) -> Tensor:
    lam, V = torch.linalg.eigh((S + S.T) / 2)
    noise = lam[-1] * len(lam) * torch.finfo(lam.dtype).eps  # smaller eigenvalues are rounding errors
    return V * torch.where(lam > noise, lam, 0).sqrt()


# CovDist, LogCovDist (Section 5.1; Jena et al. 2024): distances of the spectra of the covariances. The paper does not
# say which distance. These two fit the magnitudes of its Table 1 (see report/covariance_definitions.py for others).


def covariance_distance(x, y) -> float:
    """CovDist = mean |lam_i(S_x) - lam_i(S_y)| over the D sorted eigenvalues; x (N1, D), y (N2, D).

    Warns when N1 and N2 differ or do not exceed D, which biases the spectra. Raises as `fid`.
    """
    lam_x, lam_y = spectra("CovDist", x, y)
    return (lam_x - lam_y).abs().mean().item()


def log_covariance_distance(x, y) -> float:
    """LogCovDist = mean |ln(lam_i(S_x) + 1e-10) - ln(lam_i(S_y) + 1e-10)|, otherwise as `covariance_distance`."""
    lam_x, lam_y = spectra("LogCovDist", x, y)
    return (torch.log(lam_x + 1e-10) - torch.log(lam_y + 1e-10)).abs().mean().item()


def spectrum(x, correction: int = 1) -> Tensor:
    """Eigenvalues (D,) of the covariance of x (N, D), largest first, clamped at 0; divides by N - correction."""
    x = as_features(x)
    return centred_spectrum(x - x.mean(0), len(x) - correction)


def centred_spectrum(x: Tensor, divisor: int) -> Tensor:
    """Eigenvalues (D,) of x' x / divisor, x (N, D); with N < D those of the smaller matrix x x', and zeros."""
    N, D = x.shape
    if N < D:
        return torch.nn.functional.pad(eigenvalues(x @ x.T / divisor), (0, D - N))
    return eigenvalues(x.T @ x / divisor)


def spectra(metric: str, x, y, correction: int = 1) -> tuple[Tensor, Tensor]:
    """The spectra of x and y, (D,) each. Warns, naming the metric, when the sizes of x and y bias them."""
    x, y = as_feature_pair(x, y)
    warn_if_singular(metric, x, y)
    if len(x) != len(y):
        warnings.warn(f"{metric}: {len(x)} against {len(y)} images, biased unequally", stacklevel=3)
    return spectrum(x, correction), spectrum(y, correction)


def eigenvalues(S: Tensor) -> Tensor:
    """Eigenvalues (D,) of a covariance matrix (D, D), largest first; rounding below 0 is clamped."""
    return torch.linalg.eigvalsh(S).flip(0).clamp(min=0)


# Checks of the input


def as_double(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).detach()


def as_features(x) -> Tensor:
    """x as (N, D) in float64. Raises ValueError unless N >= 2 and all values are finite."""
    x = as_double(x)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features must be (N, D) with N of 2 or more, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("features contain nan or infinity")
    return x


def as_feature_pair(x, y) -> tuple[Tensor, Tensor]:
    x, y = as_features(x), as_features(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of different kinds: D is {x.shape[1]} and {y.shape[1]}")
    return x, y


def prompt_numbers(group, x: Tensor) -> Tensor:
    """Number the prompts of the N rows of x in order of first appearance, (N,)."""
    group = group.tolist() if hasattr(group, "tolist") else list(group)
    if len(group) != len(x):
        raise ValueError(f"{len(group)} group ids for {len(x)} images")
    number = {g: i for i, g in enumerate(dict.fromkeys(group))}
    return torch.tensor([number[g] for g in group], device=x.device)


def _prompt_means(values: Tensor, group) -> Tensor:
    prompt = prompt_numbers(group, values)
    return torch.bincount(prompt, values) / torch.bincount(prompt)


def warn_if_singular(metric: str, x: Tensor, y: Tensor) -> None:
    n, D = min(len(x), len(y)), x.shape[1]
    if n <= D:
        advice = f"use more than {D} images, and the same number for everything that is compared"
        warnings.warn(f"{metric}: {n} images cannot fill {D} dimensions; {advice}", stacklevel=3)
