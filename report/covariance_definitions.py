"""Candidate definitions of CovDist and LogCovDist: `evaluate.py --reading NAME`.

The paper (Section 5.1) cites Jena et al. 2024 and does not define the two distances. "ours" is the definition of
`metrics.py`: its noise floor and error at N = 10,000 fit the magnitudes of Table 1, where those of most others do not.
This is elimination, not identification: compare values within one definition, never with the paper's table.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import metrics


@dataclass(frozen=True)
class Definition:
    """How two spectra become CovDist and LogCovDist, and on which features and reference set."""

    covdist: str
    logcovdist: str
    log: str = "ln"
    correction: int = 1  # the covariance divides by N - correction
    features: str = "inception"
    reference: str = "real images"


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


def check_definition(name: str, where: str = "definition") -> None:
    """Raises ValueError when there is no definition of that name."""
    if name not in DEFINITIONS:
        raise ValueError(f"{where} {name!r} of CovDist and LogCovDist is unknown; choose from {', '.join(DEFINITIONS)}")


def covariance_distances(x, y, definition: str = "ours") -> Tensor:
    """(CovDist, LogCovDist), (2,), of features x (N1, D) and y (N2, D); nan where a definition has none.

    Warns and raises as `metrics.covariance_distance`; raises ValueError for an unknown definition.
    """
    check_definition(definition)
    form = DEFINITIONS[definition]
    return compare(*metrics.spectra("CovDist, LogCovDist", x, y, form.correction), form)


def compare(lam_x: Tensor, lam_y: Tensor, form: Definition) -> Tensor:
    """(CovDist, LogCovDist), (2,), of two spectra (D,)."""
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


def definition_notes(name: str, features: str = "Inception's") -> list[str]:
    """Where an evaluation deviates from a definition: other features than its own, another reference set."""
    form, notes = DEFINITIONS[name], []
    if form.features != "inception":
        notes.append(f"--reading {name} is defined on {form.features} features; these values use {features}.")
    if form.reference != "real images":
        notes.append(f"--reading {name} compares with images of the {form.reference}; give them as --reference.")
    return notes
