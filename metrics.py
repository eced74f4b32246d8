"""The paper's diversity metrics (Table 1: DinoDiversity, FID, CovDist, LogCovDist), each with its standard error.

Metrics are functions of feature arrays, numpy or torch, computed in float64; feature extractors are functions
`images in [-1, 1] (B, 3, H, W) -> (B, D)`. CLIPScore is `rewards.load("clipscore")` with `mean_and_error`.
Letters: N images, D features, P prompts; x generated, y reference; mu mean, S covariance, lam its eigenvalues.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, CLIPModel, Dinov2Model, ViTModel

from inception import load_inception
from weights import read_file


# ----------------------------------------------------------------------------------------------------------
# Means over prompts
def mean_and_error(values, group=None) -> tuple[float, float]:
    """Mean and standard error of one value per image, (N,), when the images of one prompt are not independent.

    The mean is that of the P per-prompt means m_p, the error sd(m_p) / sqrt(P). `group` holds the prompt, or its
    number, of each image; without it every value counts as its own prompt. The error of a single prompt is nan.
    """
    values = torch.as_tensor(values).double()
    m = values if group is None else _group_means(values, _codes(group, len(values)))
    if len(m) < 2:
        warnings.warn("a standard error needs at least two prompts; it is nan", stacklevel=2)
    return m.mean().item(), (m.std() / len(m) ** 0.5).item() if len(m) > 1 else float("nan")


def paired_difference(a, b, group=None) -> tuple[float, float]:
    """Mean and standard error of a - b, (N,) each, for two models on the same prompts and seeds in the same order."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    if a.shape != b.shape:
        raise ValueError(
            f"a paired difference needs the same images on both sides, got {len(a)} and {len(b)}"
        )
    return mean_and_error(a - b, group)


def diversity(features, group) -> float:
    """DinoDiversity: 1 - the mean cosine of two images of one prompt, averaged over prompts; 0 says all are alike.

    `features` (N, D), `group` (N,) the prompt, or its number, of each image.
    """
    return group_diversity(features, group).mean().item()


def group_diversity(features, group) -> Tensor:
    """The P terms of `diversity`, prompts in order of first appearance; for `mean_and_error`, `paired_difference`.

    Raises ValueError when a prompt has one image only, or a feature vector is zero.
    """
    x = _matrix(features)
    code = _codes(group, len(x))
    n = torch.bincount(code).to(x)
    if n.min() < 2:
        raise ValueError(
            f"diversity needs two images a prompt; {int((n < 2).sum())} of {len(n)} prompts have one"
        )
    norm = x.norm(dim=1, keepdim=True)
    if norm.min() == 0:
        raise ValueError("diversity: a feature vector is zero and has no direction")
    total = x.new_zeros(len(n), x.shape[1]).index_add_(0, code, x / norm)
    return 1 - (total.square().sum(1) - n) / (n * (n - 1))  # |sum u|^2 = n + the n (n - 1) ordered pairs


# ----------------------------------------------------------------------------------------------------------
# FID
def fid(x, y) -> float:
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of feature sets x (N1, D), y (N2, D); S unbiased.

    Biased upwards by `fid_floor`, so compare only at equal N1 and N2. Warns when a covariance is singular.
    """
    x, y = _matrix(x), _matrix(y)
    _warn_singular("FID", x, y)
    return _frechet(*_moments(x), *_moments(y))


def frechet_distance(mu_x, S_x, mu_y, S_y) -> float:
    """The same from means (D,) and covariances (D, D), as pytorch-fid's statistics files (`mu`, `sigma`) hold them."""
    mu_x, S_x, mu_y, S_y = (torch.as_tensor(m).double() for m in (mu_x, S_x, mu_y, S_y))
    return _frechet(mu_x, _root(S_x), mu_y, _root(S_y))


def fid_influence(x, y) -> tuple[Tensor, Tensor]:
    """The first-order effect of each image on N FID: (N1,) and (N2,), each of mean 0.

    psi_i = 2 z'(mu_x - mu_y) + z'(I - T) z - tr (I - T) S_x at z = x_i - mu_x, where T maps N(0, S_x) to N(0, S_y).
    """
    x, y = _matrix(x), _matrix(y)
    (mu_x, F_x), (mu_y, F_y) = _moments(x), _moments(y)
    U, s, Vh = torch.linalg.svd(F_x.T @ F_y, full_matrices=False)
    inverse_root = torch.where(s > s[0] * len(s) * torch.finfo(s.dtype).eps, s.rsqrt(), 0)

    def psi(z, shift, map_root):  # T = map_root map_root'
        effect = 2 * z @ shift + z.square().sum(1) - (z @ map_root).square().sum(1)
        return effect - effect.mean()

    psi_x = psi(x - mu_x, mu_x - mu_y, F_y @ Vh.T * inverse_root)
    psi_y = psi(y - mu_y, mu_y - mu_x, F_x @ U * inverse_root)
    return psi_x, psi_y


def fid_and_error(x, y, group_x=None, group_y=None, fixed_reference: bool = False) -> tuple[float, float]:
    """FID and its standard error; with `fixed_reference` y is the population itself and adds no error.

    The error is that of the first order: it does not cover the bias, and means little when N <= D or FID is near 0.
    """
    value = fid(x, y)
    psi_x, psi_y = fid_influence(x, y)
    error_x, error_y = mean_and_error(psi_x, group_x)[1], mean_and_error(psi_y, group_y)[1]
    return value, error_x if fixed_reference else (error_x**2 + error_y**2) ** 0.5


def fid_floor(x, n_x: int, n_y: int) -> float:
    """The FID expected of two samples, of n_x and n_y images, of one Gaussian with the covariance of x; second order.

    (1/n_x + 1/n_y) (tr S + (sum over i != j of lam_i lam_j / (lam_i + lam_j) + tr S) / 2)
    """
    lam = spectrum(x)
    pairs = (lam[:, None] * lam / (lam[:, None] + lam).clamp(min=torch.finfo(lam.dtype).tiny)).fill_diagonal_(
        0
    )
    return ((1 / n_x + 1 / n_y) * (lam.sum() + (pairs.sum() + lam.sum()) / 2)).item()


def _frechet(mu_x: Tensor, F_x: Tensor, mu_y: Tensor, F_y: Tensor) -> float:
    # With S = F F', tr (S_x S_y)^(1/2) is the sum of the singular values of F_x' F_y. Unlike the root of a product
    # that is nearly singular, it is never complex and exact to rounding at any rank.
    cross = torch.linalg.svdvals(F_x.T @ F_y).sum()
    return ((mu_x - mu_y).square().sum() + F_x.square().sum() + F_y.square().sum() - 2 * cross).item()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and a factor F (D, min(N, D)) of the unbiased covariance, F F' = S, without forming S."""
    mu = x.mean(0)
    centred = (x - mu) / (len(x) - 1) ** 0.5
    return mu, (centred if len(x) <= x.shape[1] else torch.linalg.qr(centred, mode="r").R).T


def _root(S: Tensor) -> Tensor:
    lam, V = torch.linalg.eigh((S + S.T) / 2)
    noise = lam[-1] * len(lam) * torch.finfo(lam.dtype).eps  # its root would be 1e-8, not 1e-16
    return V * torch.where(lam > noise, lam, 0).sqrt()


# ----------------------------------------------------------------------------------------------------------
# CovDist and LogCovDist
@dataclass(frozen=True)
class Reading:
    """How two spectra become CovDist and LogCovDist, and the features and the reference set that it is meant for."""

    covdist: str
    logcovdist: str
    log: str = "ln"
    correction: int = 1  # the covariance divides by N - correction
    features: str = "inception"
    reference: str = "real images"


# The definition behind the paper's CovDist and LogCovDist columns is not public. "ours" is this project's: of the
# readings tried, the one whose noise floor and error at N = 10,000 suit the published magnitudes. That is elimination,
# not identification: values compare within one reading, never with the paper's table.
READINGS = {
    "ours": Reading("mean_abs", "mean_abs"),
    # The public evaluation code of AIG (Jena et al. 2024), except that its eigenvalues are not sorted.
    "jena2024": Reading("l2", "l2", "log10", reference="base model"),
    # What a stub in the history of the official ImageReFL code pointed to: normalised CLIP ViT-B/32 embeddings.
    "clip": Reading("l2", "mean_abs", features="clip"),
    # A third party's, on torchvision's ImageNet features, which are not built here; it has no linear distance.
    "squares": Reading(
        "none", "sum_squares", correction=0, features="torchvision inception", reference="base model"
    ),
    # The other averages that the published magnitudes of LogCovDist allow.
    "rms": Reading("rms", "rms"),
    "mse": Reading("mse", "mse"),
}


def covariance_distance(x, y, reading: str = "ours") -> float:
    """CovDist: mean |lam_i - lam*_i| over the D eigenvalues, sorted, of the covariances of x (N1, D) and y (N2, D).

    `reading` names another form of the undisclosed definition. Warns when N1, N2 are unequal or too small.
    """
    return _spectral(x, y, reading)[0].item()


def log_covariance_distance(x, y, reading: str = "ours") -> float:
    """LogCovDist: mean |ln(lam_i + 1e-10) - ln(lam*_i + 1e-10)|, otherwise as `covariance_distance`."""
    return _spectral(x, y, reading)[1].item()


def spectral_distances_and_errors(
    x, y, reading: str = "ours", group_x=None, group_y=None, fixed_reference: bool = False, blocks: int = 20
) -> tuple[tuple[float, float], tuple[float, float]]:
    """((CovDist, standard error), (LogCovDist, standard error)) by the jackknife over blocks of whole prompts.

    One block is left out at a time, of x and, unless `fixed_reference`, of y. Neither error covers the distance that
    two samples of one distribution have; near that floor the jackknife is too large.
    """
    value, form = _spectral(x, y, reading), READINGS[reading]
    x, y = _matrix(x), _matrix(y)
    lam_x, lam_y = spectrum(x, form.correction), spectrum(y, form.correction)
    left_out = [
        [_distances(lam, lam_y, form) for lam in _spectra_left_out(x, group_x, blocks, form.correction)]
    ]
    if not fixed_reference:
        left_out += [
            [_distances(lam_x, lam, form) for lam in _spectra_left_out(y, group_y, blocks, form.correction)]
        ]
    error = sum(_jackknife_variance(torch.stack(values)) for values in left_out).sqrt()
    return tuple(zip(value.tolist(), error.tolist(), strict=True))


def spectrum(x, correction: int = 1) -> Tensor:
    """Eigenvalues (D,) of the covariance of x (N, D), largest first, none below 0."""
    return _eigenvalues(torch.cov(_matrix(x).T, correction=correction))


def _eigenvalues(S: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(S).flip(0).clamp(min=0)


def _spectral(x, y, reading: str) -> Tensor:
    if reading not in READINGS:
        raise ValueError(f"no reading {reading!r} of the spectral distances; there are {', '.join(READINGS)}")
    x, y, form = _matrix(x), _matrix(y), READINGS[reading]
    _warn_singular("CovDist and LogCovDist", x, y)
    if len(x) != len(y):
        warnings.warn(f"CovDist and LogCovDist: {len(x)} images against {len(y)}, unequal bias", stacklevel=3)
    return _distances(spectrum(x, form.correction), spectrum(y, form.correction), form)


def _distances(lam_x: Tensor, lam_y: Tensor, form: Reading) -> Tensor:
    """(CovDist, LogCovDist), (2,); nan where the reading has none."""
    log = {"ln": torch.log, "log10": torch.log10}[form.log]
    d, d_log = lam_x - lam_y, log(lam_x + 1e-10) - log(lam_y + 1e-10)
    return torch.stack([_reduce(d, form.covdist), _reduce(d_log, form.logcovdist)])


def _reduce(d: Tensor, how: str) -> Tensor:
    square = d.square()
    forms = {"mean_abs": d.abs().mean(), "l2": d.norm(), "rms": square.mean().sqrt(), "mse": square.mean()}
    return (forms | {"sum_squares": square.sum(), "none": d.new_tensor(float("nan"))})[how]


def _spectra_left_out(x: Tensor, group, blocks: int, correction: int):
    """The spectrum of x (N, D) without each of the blocks in turn; a block is every `blocks`-th prompt."""
    x = x - x.mean(0)
    block = _codes(range(len(x)) if group is None else group, len(x)) % blocks
    gram = x.T @ x
    for b in block.unique():
        out = x[block == b]
        n, total = len(x) - len(out), out.sum(0)  # the kept ones sum to -total
        yield _eigenvalues((gram - out.T @ out - torch.outer(total, total) / n) / (n - correction))


def _jackknife_variance(values: Tensor) -> Tensor:
    """(B, ...) values, each with one of B blocks left out -> variance of the value of all."""
    return (len(values) - 1) * values.var(0, correction=0)


# ----------------------------------------------------------------------------------------------------------
# Features
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inception_features(path: str | Path, device="cpu") -> Callable[[Tensor], Tensor]:
    """FID's features, (B, 2048), from pytorch-fid's weight file."""
    model = load_inception(path).to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return model(images.to(device, torch.float32))

    return features


def dino_features(folder: str | Path, norm: str = "clip", device="cpu") -> Callable[[Tensor], Tensor]:
    """DinoDiversity's features: the normalised class token of DINO ViT-S/16 (B, 384), or of a DINOv2 folder.

    The official code feeds DINO the rewards' input, normalised with CLIP's constants: `norm="clip"`, the paper's
    numbers. `norm="imagenet"` is what DINO was trained with.
    """
    mean, std = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}[norm]
    file = _weight_file(folder, "facebook/dino-vits16, or facebook/dinov2-small,")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("vit", "dinov2"):
        raise ValueError(f"{folder}: a {config.model_type} model, neither DINO (vit) nor DINOv2 (dinov2)")
    if config.model_type == "vit":
        model = _load(ViTModel, config, file, add_pooling_layer=False)
    else:
        model = _load(Dinov2Model, config, file)
    model.to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = preprocess(images.to(device, torch.float32), 224, mean, std)
        return F.normalize(model(pixel_values=x).last_hidden_state[:, 0], dim=-1)

    return features


def clip_features(folder: str | Path, device="cpu") -> Callable[[Tensor], Tensor]:
    """Normalised image embeddings (B, D) of a CLIP folder: OpenAI's ViT-B/32, or `tiny/features`, never a reward."""
    file = _weight_file(folder, "openai/clip-vit-base-patch32")
    config = AutoConfig.from_pretrained(folder)
    model = _load(CLIPModel, config, file).to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = preprocess(images.to(device, torch.float32), config.vision_config.image_size, CLIP_MEAN, CLIP_STD)
        return F.normalize(model.visual_projection(model.vision_model(pixel_values=x).pooler_output), dim=-1)

    return features


def preprocess(images: Tensor, size: int, mean: tuple, std: tuple) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, 3, size, size): bicubic on the shorter side, centre crop, normalise."""
    x = (images / 2 + 0.5).clamp(0, 1)
    H, W = x.shape[-2:]
    H, W = size * H // min(H, W), size * W // min(H, W)
    x = F.interpolate(x, (H, W), mode="bicubic", align_corners=False, antialias=True)
    top, left = round((H - size) / 2), round((W - size) / 2)
    x = x[..., top : top + size, left : left + size]
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def _weight_file(folder: str | Path, repository: str) -> Path:
    files = [Path(folder, name) for name in ("model.safetensors", "pytorch_model.bin")]
    present = [file for file in files if file.is_file()]
    if not present or not Path(folder, "config.json").is_file():
        get = f"get config.json and model.safetensors of the hub repository {repository}"
        raise FileNotFoundError(f"{folder}: no such model folder; {get} and put them there")
    return present[0]


def _load(kind, config, file: Path, **options) -> torch.nn.Module:
    """A frozen transformers model from one weight file; ValueError where a weight is missing or has another shape."""
    loaded = kind.from_pretrained(
        None, config=config, state_dict=read_file(file), output_loading_info=True, **options
    )
    model, report = loaded
    if wrong := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(
            f"{file}: not a whole {kind.__name__}; {len(wrong)} weights missing, first {wrong[0]}"
        )
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------
# Checks
def _matrix(x) -> Tensor:
    """(N, D) float64; ValueError when it is not a matrix of at least two rows of finite numbers."""
    x = torch.as_tensor(x).detach().double()
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features must be (N, D) with N of at least 2, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("features hold nan or infinity")
    return x


def _codes(group, n: int) -> Tensor:
    """The prompts of n images, numbered in order of first appearance, (n,)."""
    group = group.tolist() if hasattr(group, "tolist") else list(group)
    if len(group) != n:
        raise ValueError(f"{len(group)} group ids for {n} images")
    number = {g: i for i, g in enumerate(dict.fromkeys(group))}
    return torch.tensor([number[g] for g in group])


def _group_means(values: Tensor, code: Tensor) -> Tensor:
    return torch.bincount(code, values) / torch.bincount(code)


def _warn_singular(metric: str, x: Tensor, y: Tensor) -> None:
    n, D = min(len(x), len(y)), x.shape[1]
    if n <= D:
        advice = f"take more than {D} images, and as many for whatever it is compared with"
        warnings.warn(f"{metric}: {n} images span fewer than {D} dimensions; {advice}", stacklevel=3)
