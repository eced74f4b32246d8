"""The paper's diversity metrics (Table 1: DinoDiversity, FID, CovDist, LogCovDist), each with its error.

Metrics are functions of feature arrays, numpy or torch, computed in float64; feature extractors are functions
`images in [-1, 1] (B, 3, H, W) -> (B, D)`. CLIPScore is `rewards.load("clipscore")` with `mean_and_error`.
Letters: N images, D features, P prompts; x generated, y reference; mu mean, S covariance, lam eigenvalues.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, CLIPModel, Dinov2Model, ViTModel

from pretrained.inception import load_inception
from pretrained.preprocess import CLIP_MEAN, CLIP_STD, preprocess
from pretrained.weight_files import read_file

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Definition:
    """How two spectra become CovDist and LogCovDist, and on which features and reference set."""

    covdist: str
    logcovdist: str
    log: str = "ln"
    correction: int = 1  # the covariance divides by N - correction
    features: str = "inception"
    reference: str = "real images"


# The definition behind the paper's CovDist and LogCovDist columns is not public; "ours" is this project's.
# Its noise floor and error at N = 10,000 fit the published magnitudes, where most readings' do not. That is
# elimination, not identification: compare values within one reading, never with the paper's table.
DEFINITIONS = {
    "ours": Definition("mean_abs", "mean_abs"),
    # The public evaluation code of AIG (Jena et al. 2024), except that its eigenvalues are not sorted.
    "jena2024": Definition("l2", "l2", log="log10", reference="base model"),
    # What a stub in the history of the official code points to: normalised CLIP ViT-B/32 embeddings.
    "clip": Definition("l2", "mean_abs", features="clip"),
    # A third party's, on torchvision's Inception, which is not built here. It has no linear distance.
    "squares": Definition("none", "sum_squares", correction=0, features="torchvision", reference="base model"),
    # The other averages that the published magnitudes of LogCovDist allow.
    "rms": Definition("rms", "rms"),
    "mse": Definition("mse", "mse"),
}


# Means over prompts


def mean_and_error(values, group=None) -> tuple[float, float]:
    """Mean and standard error of one value per image (N,), where images of one prompt are not independent.

    The mean is that of the P per-prompt means m_p, the error sd(m_p) / sqrt(P), nan when P = 1. `group` (N,)
    holds each image's prompt or its number; without it every value is its own prompt.
    """
    m = _double(values) if group is None else _group_means(_double(values), group)
    if len(m) < 2:
        warnings.warn("one prompt has no standard error", stacklevel=2)
        return m.mean().item(), float("nan")
    return m.mean().item(), (m.std() / len(m) ** 0.5).item()


def paired_difference(a, b, group=None) -> tuple[float, float]:
    """Mean and standard error of a - b (N,), two models' values on the same prompts and seeds."""
    a, b = _double(a), _double(b)
    if a.shape != b.shape:
        raise ValueError(f"a paired difference needs the same images on both sides, got {len(a)} and {len(b)}")
    return mean_and_error(a - b, group)


def diversity(features, group) -> float:
    """DinoDiversity: 1 - the mean cosine of two images of one prompt, averaged over prompts. 0: all alike.

    `features` (N, D); `group` (N,), the prompt, or its number, of each image.
    """
    return group_diversity(features, group).mean().item()


def group_diversity(features, group) -> Tensor:
    """The terms of `diversity`, (P,), prompts in order of first appearance; `mean_and_error` takes them.

    Raises ValueError when a prompt has only one image or a feature vector is zero.
    """
    x = _matrix(features)
    code = _codes(group, x)
    n = torch.bincount(code).to(x)
    if n.min() < 2:
        raise ValueError(f"diversity needs two images a prompt; {int((n < 2).sum())} of {len(n)} have one")
    norm = x.norm(dim=1, keepdim=True)
    if norm.min() == 0:
        raise ValueError("diversity: a feature vector is zero and has no direction")
    total = x.new_zeros(len(n), x.shape[1]).index_add_(0, code, x / norm)
    return 1 - (total.square().sum(1) - n) / (n * (n - 1))  # |sum u|^2 = n + the cosines of n (n - 1) pairs


# FID


def fid(x, y) -> float:
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of features x (N1, D), y (N2, D); S unbiased.

    Biased upwards by about `fid_floor`: compare only at equal N1 and N2. Warns when a covariance is singular.
    """
    x, y = _pair(x, y)
    _warn_singular("FID", x, y)
    return _frechet(*_moments(x), *_moments(y))


def frechet_distance(mu_x, S_x, mu_y, S_y) -> float:
    """`fid` from means (D,) and covariances (D, D): `mu` and `sigma` of pytorch-fid's statistics files."""
    mu_x, S_x, mu_y, S_y = _double(mu_x), _double(S_x), _double(mu_y), _double(S_y)
    return _frechet(mu_x, _root(S_x), mu_y, _root(S_y))


def fid_influence(x, y) -> tuple[Tensor, Tensor]:
    """N times the first-order effect of each image on FID, (N1,) and (N2,), each of mean 0.

    psi_i = 2 z'(mu_x - mu_y) + z'(I - T) z - const. at z = x_i - mu_x, where T maps N(0, S_x) to N(0, S_y).
    """
    x, y = _pair(x, y)
    (mu_x, F_x), (mu_y, F_y) = _moments(x), _moments(y)
    U, s, Vh = torch.linalg.svd(F_x.T @ F_y, full_matrices=False)
    scale = torch.where(s > s[0] * len(s) * torch.finfo(s.dtype).eps, s.rsqrt(), 0)

    def psi(z: Tensor, shift: Tensor, G: Tensor) -> Tensor:  # T = G G'
        effect = 2 * z @ shift + z.square().sum(1) - (z @ G).square().sum(1)
        return effect - effect.mean()

    psi_x = psi(x - mu_x, mu_x - mu_y, F_y @ Vh.T * scale)
    psi_y = psi(y - mu_y, mu_y - mu_x, F_x @ U * scale)
    return psi_x, psi_y


def fid_and_error(x, y, group_x=None, group_y=None, fixed_reference: bool = False) -> tuple[float, float]:
    """FID and its standard error; with `fixed_reference` y is the whole population and adds no error.

    The error is of first order: it leaves out the bias and means little when N <= D or FID is near its floor.
    """
    value, (psi_x, psi_y) = fid(x, y), fid_influence(x, y)
    error_x, error_y = mean_and_error(psi_x, group_x)[1], mean_and_error(psi_y, group_y)[1]
    return value, error_x if fixed_reference else (error_x**2 + error_y**2) ** 0.5


def fid_floor(x, n_x: int, n_y: int) -> float:
    """FID expected of n_x against n_y images of one Gaussian that has the covariance of x, to second order.

    (1/n_x + 1/n_y) [tr S + (sum over i != j of lam_i lam_j / (lam_i + lam_j) + tr S) / 2]
    """
    lam = spectrum(x)
    pairs = lam[:, None] * lam / (lam[:, None] + lam).clamp(min=1e-300)
    return ((1 / n_x + 1 / n_y) * (lam.sum() + (pairs.fill_diagonal_(0).sum() + lam.sum()) / 2)).item()


def _frechet(mu_x: Tensor, F_x: Tensor, mu_y: Tensor, F_y: Tensor) -> float:
    # With S = F F', tr (S_x S_y)^(1/2) is the sum of the singular values of F_x' F_y: never complex and exact
    # to rounding at any rank, where the root of a nearly singular product loses half the digits.
    cross = torch.linalg.svdvals(F_x.T @ F_y).sum()
    return ((mu_x - mu_y).square().sum() + F_x.square().sum() + F_y.square().sum() - 2 * cross).item()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a factor F (D, min(N, D)) of the unbiased covariance, S = F F', which is never formed."""
    mu = x.mean(0)
    centred = (x - mu) / (len(x) - 1) ** 0.5
    return mu, (centred if len(x) <= x.shape[1] else torch.linalg.qr(centred, mode="r").R).T


def _root(S: Tensor) -> Tensor:
    lam, V = torch.linalg.eigh((S + S.T) / 2)
    noise = lam[-1] * len(lam) * torch.finfo(lam.dtype).eps  # below it an eigenvalue is rounding, its root is not
    return V * torch.where(lam > noise, lam, 0).sqrt()


# CovDist and LogCovDist


def covariance_distance(x, y, reading: str = "ours") -> float:
    """CovDist: mean |lam_i - lam*_i| over the D sorted eigenvalues of the covariances of x (N1, D) and y.

    `reading` names another form of the undisclosed definition. Warns when N1, N2 are unequal or too small.
    """
    return _spectral_distances(x, y, reading)[0].item()


def log_covariance_distance(x, y, reading: str = "ours") -> float:
    """LogCovDist: mean |ln(lam_i + 1e-10) - ln(lam*_i + 1e-10)|, otherwise as `covariance_distance`."""
    return _spectral_distances(x, y, reading)[1].item()


def spectral_distances_and_errors(
    x, y, reading: str = "ours", group_x=None, group_y=None, fixed_reference: bool = False, blocks: int = 20
) -> tuple[tuple[float, float], tuple[float, float]]:
    """((CovDist, error), (LogCovDist, error)), the errors by the jackknife over blocks of whole prompts.

    One block at a time is left out of x and, unless `fixed_reference`, of y. The errors leave out the bias,
    which is the distance of two samples of one distribution, and are too large where it dominates.
    """
    value, form = _spectral_distances(x, y, reading), DEFINITIONS[reading]
    x, y = _pair(x, y)
    lam_x, lam_y = spectrum(x, form.correction), spectrum(y, form.correction)
    without_x = [_compare(lam, lam_y, form) for lam in _spectra_left_out(x, group_x, blocks, form.correction)]
    variance = _jackknife_variance(torch.stack(without_x))
    if not fixed_reference:
        without_y = [_compare(lam_x, lam, form) for lam in _spectra_left_out(y, group_y, blocks, form.correction)]
        variance = variance + _jackknife_variance(torch.stack(without_y))
    return tuple(zip(value.tolist(), variance.sqrt().tolist(), strict=True))


def spectrum(x, correction: int = 1) -> Tensor:
    """Eigenvalues (D,) of the covariance of x (N, D), largest first, none below 0."""
    x = _matrix(x)
    x = x - x.mean(0)
    return _eigenvalues(x.T @ x / (len(x) - correction))


def _eigenvalues(S: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(S).flip(0).clamp(min=0)


def _spectral_distances(x, y, reading: str) -> Tensor:
    if reading not in DEFINITIONS:
        raise ValueError(f"no reading {reading!r} of CovDist and LogCovDist; there are {', '.join(DEFINITIONS)}")
    (x, y), form = _pair(x, y), DEFINITIONS[reading]
    _warn_singular("CovDist, LogCovDist", x, y)
    if len(x) != len(y):
        warnings.warn(f"CovDist, LogCovDist: {len(x)} against {len(y)} images, biased unequally", stacklevel=3)
    return _compare(spectrum(x, form.correction), spectrum(y, form.correction), form)


def _compare(lam_x: Tensor, lam_y: Tensor, form: Definition) -> Tensor:
    """(CovDist, LogCovDist), (2,)."""
    log = {"ln": torch.log, "log10": torch.log10}[form.log]
    d, d_log = lam_x - lam_y, log(lam_x + 1e-10) - log(lam_y + 1e-10)
    return torch.stack([_reduce(d, form.covdist), _reduce(d_log, form.logcovdist)])


def _reduce(d: Tensor, how: str) -> Tensor:
    return {
        "mean_abs": d.abs().mean(),
        "l2": d.norm(),
        "rms": d.square().mean().sqrt(),
        "mse": d.square().mean(),
        "sum_squares": d.square().sum(),
        "none": d.new_tensor(float("nan")),
    }[how]


def _spectra_left_out(x: Tensor, group, blocks: int, correction: int) -> Iterator[Tensor]:
    """The spectrum of x (N, D) without each block in turn; a block is every `blocks`-th prompt.

    NaN where too few stay.
    """
    x = x - x.mean(0)
    block = _codes(range(len(x)) if group is None else group, x) % blocks
    gram = x.T @ x
    for b in block.unique():
        out = x[block == b]
        n, total = len(x) - len(out), out.sum(0)  # the n that stay sum to -total
        if n <= correction:
            yield x.new_full(x.shape[1:], float("nan"))
            continue
        yield _eigenvalues((gram - out.T @ out - torch.outer(total, total) / n) / (n - correction))


def _jackknife_variance(left_out: Tensor) -> Tensor:
    """(B, ...) values, each without one of B blocks -> the variance of the value with all of them."""
    return (len(left_out) - 1) * left_out.var(0, correction=0)


# Features


def inception_features(path: str | Path, device="cpu") -> Callable[[Tensor], Tensor]:
    """FID's features (B, 2048) from pytorch-fid's weight file."""
    model = load_inception(path).to(device, torch.float32)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return model(images.to(device, torch.float32))

    return features


def dino_features(folder: str | Path, norm: str = "clip", device="cpu") -> Callable[[Tensor], Tensor]:
    """DinoDiversity's features: the normalised class token of DINO ViT-S/16 (B, 384), or of a DINOv2 folder.

    The official code hands DINO the rewards' input, scaled by CLIP's constants; `norm="clip"` follows it for
    the paper's numbers, `norm="imagenet"` is what DINO was trained with.
    """
    mean, std = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}[norm]
    file = _weight_file(folder, "facebook/dino-vits16 (or facebook/dinov2-small)")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("vit", "dinov2"):
        raise ValueError(f"{folder}: a {config.model_type} model, neither DINO (vit) nor DINOv2 (dinov2)")
    kind, options = {"vit": (ViTModel, {"add_pooling_layer": False}), "dinov2": (Dinov2Model, {})}[config.model_type]
    model = _load(kind, config, file, **options).to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = preprocess(images.to(device, torch.float32), 224, mean, std)
        return F.normalize(model(pixel_values=x).last_hidden_state[:, 0], dim=-1)

    return features


def clip_features(folder: str | Path, device="cpu") -> Callable[[Tensor], Tensor]:
    """Normalised image embeddings (B, D) of a CLIP folder: OpenAI's ViT-B/32, or the tiny base's own."""
    file = _weight_file(folder, "openai/clip-vit-base-patch32")
    config = AutoConfig.from_pretrained(folder)
    model = _load(CLIPModel, config, file).to(device)
    size = config.vision_config.image_size

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = preprocess(images.to(device, torch.float32), size, CLIP_MEAN, CLIP_STD)
        return F.normalize(model.visual_projection(model.vision_model(pixel_values=x).pooler_output), dim=-1)

    return features


def _weight_file(folder: str | Path, repository: str) -> Path:
    present = [f for f in (Path(folder, n) for n in ("model.safetensors", "pytorch_model.bin")) if f.is_file()]
    if not present or not Path(folder, "config.json").is_file():
        get = f"get config.json and model.safetensors of the hub repository {repository}"
        raise FileNotFoundError(f"{folder}: no model here; {get} and put them there")
    return present[0]


def _load(kind: type, config, file: Path, **options) -> torch.nn.Module:
    """A frozen transformers model; ValueError where the file misses a weight or has another shape for it."""
    options |= {"state_dict": read_file(file), "dtype": torch.float32}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = kind.from_pretrained(None, config=config, **options)
    if wrong := sorted(str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]]):
        raise ValueError(f"{file}: not a whole {kind.__name__}: {len(wrong)} weights do not fit, first {wrong[0]}")
    return model.eval().requires_grad_(False)


# Checks


def _double(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).detach()


def _matrix(x) -> Tensor:
    """(N, D) in float64; ValueError when it is not a matrix of two rows or more, all finite."""
    x = _double(x)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features must be (N, D) with N of 2 or more, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("features hold nan or infinity")
    return x


def _pair(x, y) -> tuple[Tensor, Tensor]:
    x, y = _matrix(x), _matrix(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of two kinds: D is {x.shape[1]} and {y.shape[1]}")
    return x, y


def _codes(group, x: Tensor) -> Tensor:
    """The prompts of the N rows of x as numbers (N,), in order of first appearance."""
    group = group.tolist() if hasattr(group, "tolist") else list(group)
    if len(group) != len(x):
        raise ValueError(f"{len(group)} group ids for {len(x)} images")
    number = {g: i for i, g in enumerate(dict.fromkeys(group))}
    return torch.tensor([number[g] for g in group], device=x.device)


def _group_means(values: Tensor, group) -> Tensor:
    code = _codes(group, values)
    return torch.bincount(code, values) / torch.bincount(code)


def _warn_singular(metric: str, x: Tensor, y: Tensor) -> None:
    n, D = min(len(x), len(y)), x.shape[1]
    if n <= D:
        advice = f"take more than {D}, and as many in all that is compared"
        warnings.warn(f"{metric}: {n} images cannot fill {D} dimensions; {advice}", stacklevel=3)
