"""Metrics that the paper does not have, for its question: quality and diversity apart (evaluate.py --more-metrics).

Precision and density say how good images are, recall and coverage how much of the real variety they reach; FID mixes
both. KID has no bias from the number of images, and MIND sees more than means and covariances. Vendi counts different
images. All are functions of feature arrays, computed in float64, as in `metrics.py`.
Letters: N images, D features; x generated, y real.
"""

import torch
from torch import Tensor

from metrics import as_feature_pair, as_features, mean_and_error, prompt_numbers

NEIGHBOURS = 5  # k of the four k-nearest-neighbour metrics, as in the paper that introduced density and coverage
PRDC = ("precision", "recall", "density", "coverage")
PROJECTIONS = 1000  # random directions of MIND
BLOCKS = 20  # of prompts, in the jackknife

# Precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020)


def prdc(x, y, k: int = NEIGHBOURS) -> Tensor:
    """Precision, recall, density and coverage, (4,); a point's ball reaches to its k-th nearest neighbour of its set.

    Precision: share of x in some ball of y. Recall: share of y in some ball of x. Density: balls of y that hold an x,
    on average, divided by k. Coverage: share of the balls of y that hold some x. Raises ValueError unless N > k.
    """
    x, y = as_feature_pair(x, y)
    if min(len(x), len(y)) <= k:
        raise ValueError(f"the {k} nearest neighbours need {k + 1} images, got {min(len(x), len(y))}")
    return _prdc(distances(x, x), distances(y, y), distances(y, x), k)


def _prdc(xx: Tensor, yy: Tensor, yx: Tensor, k: int) -> Tensor:
    r_x, r_y = (d.kthvalue(k + 1, dim=1).values for d in (xx, yy))  # a point itself is at distance 0
    in_y, in_x = yx < r_y[:, None], yx < r_x
    shares = in_y.any(0), in_x.any(1), in_y.double().sum(0) / k, yx.amin(1) < r_y
    return torch.stack([share.double().mean() for share in shares])


def distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def prdc_and_errors(x, y, group_x=None, group_y=None, k: int = NEIGHBOURS) -> list[tuple[float, float]]:
    """(value, standard error) of `prdc`, by the jackknife over blocks of whole prompts of x, and of y.

    `group_x`, `group_y` (N,): the prompt of each image. The errors are cautious, in simulations 1.0 to 1.8 times the
    true ones, since without a block the balls also grow. Nan where too few images or prompts are left.
    """
    value = prdc(x, y, k)
    x, y = as_feature_pair(x, y)
    xx, yy, yx = distances(x, x), distances(y, y), distances(y, x)
    variance = torch.zeros(4, dtype=torch.float64)
    for side, group, z in (("x", group_x, x), ("y", group_y, y)):
        block = prompt_numbers(range(len(z)) if group is None else group, z) % BLOCKS
        without = []
        for b in block.unique():
            keep = block != b
            if keep.sum() <= k:
                without.append(torch.full((4,), float("nan"), dtype=torch.float64))
            elif side == "x":
                without.append(_prdc(xx[keep][:, keep], yy, yx[:, keep], k))
            else:
                without.append(_prdc(xx, yy[keep][:, keep], yx[keep], k))
        variance = variance + (len(without) - 1) * torch.stack(without).var(0, correction=0)
        if len(without) == 1:
            variance = variance * float("nan")
    return list(zip(value.tolist(), variance.sqrt().tolist(), strict=True))


# KID (Binkowski et al. 2018): the squared maximum mean discrepancy with the kernel k(a, b) = (a.b / D + 1)^3


def kid_and_error(x, y, group_x=None, group_y=None) -> tuple[float, float]:
    """KID without bias, which may be negative, and its standard error; pairs of one image are left out.

    mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j), i != j. The error is of first order.
    """
    x, y = as_feature_pair(x, y)
    xx, yy, xy = (((a @ b.T) / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    inner_x, inner_y = ((K.sum(1) - K.diagonal()) / (len(K) - 1) for K in (xx, yy))
    value = inner_x.mean() + inner_y.mean() - 2 * xy.mean()
    error_x = mean_and_error(2 * (inner_x - xy.mean(1)), group_x)[1]
    error_y = mean_and_error(2 * (inner_y - xy.mean(0)), group_y)[1]
    return value.item(), (error_x**2 + error_y**2) ** 0.5


# MIND (Berthet et al. 2026): 3 D times the mean squared Wasserstein distance of projections on random directions


def mind_and_influence(x, y, projections: int = PROJECTIONS, seed: int = 0) -> tuple[float, Tensor, Tensor]:
    """MIND, and N times the first-order effect of each image of x and of y, (N,) each, of mean 0.

    In one dimension, the k-th smallest x is moved to the k-th smallest y. The derivative by the weight of an image is
    the Kantorovich potential, whose slope is 2 (x - y). Raises ValueError unless N1 = N2.
    """
    x, y = as_feature_pair(x, y)
    if len(x) != len(y):
        raise ValueError(f"MIND compares equal numbers of images, got {len(x)} and {len(y)}")
    u = torch.randn(projections, x.shape[1], generator=torch.Generator().manual_seed(seed)).to(x)  # drawn in float32
    u = u / u.norm(dim=1, keepdim=True)
    (a, order_a), (b, order_b) = (x @ u.T).sort(0), (y @ u.T).sort(0)
    scale = 3 * x.shape[1]

    def potential(own: Tensor, other: Tensor, order: Tensor) -> Tensor:
        moved = own - other
        rises = own.diff(dim=0) * (moved[1:] + moved[:-1])
        phi = torch.cat([torch.zeros_like(own[:1]), rises.cumsum(0)])
        return scale * torch.zeros_like(phi).scatter(0, order, phi - phi.mean(0)).mean(1)

    return scale * (a - b).square().mean().item(), potential(a, b, order_a), potential(b, a, order_b)


def mind_and_error(x, y, group_x=None, group_y=None, projections: int = PROJECTIONS, seed: int = 0) -> tuple:
    """MIND and its standard error of first order; few images bias it upwards. Raises as `mind_and_influence`."""
    value, psi_x, psi_y = mind_and_influence(x, y, projections, seed)
    error_x, error_y = mean_and_error(psi_x, group_x)[1], mean_and_error(psi_y, group_y)[1]
    return value, (error_x**2 + error_y**2) ** 0.5


# Vendi score (Friedman and Dieng 2023)


def group_vendi(features, group) -> Tensor:
    """The Vendi score of each prompt's images, (P,): 1 if all are alike, their number if all are orthogonal.

    exp(entropy of the eigenvalues of K / n), K the cosines of the prompt's n images.
    """
    x = as_features(features)
    x = x / x.norm(dim=1, keepdim=True)
    prompt = prompt_numbers(group, x)
    scores = []
    for p in prompt.unique():
        own = x[prompt == p]
        lam = torch.linalg.eigvalsh(own @ own.T / len(own)).clamp(min=0)
        scores.append(torch.special.entr(lam).sum().exp())
    return torch.stack(scores)
