"""Refuse models that do not predict the noise, or not on Stable Diffusion's noise schedule.

Programs mark such models in different places: scheduler_config.json, header fields, marker tensors, and a YAML file
next to the checkpoint. A model without a mark counts as SD1.5's or SDXL's kind: epsilon prediction, betas from 0.00085
to 0.012 on a scaled linear schedule of 1,000 steps.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from pretrained import weight_files

SCHEDULE = {  # setting of diffusers -> its default there, and the only value that is supported
    "prediction_type": ("epsilon", "epsilon"),
    "beta_schedule": ("linear", "scaled_linear"),
    "beta_start": (0.0001, 0.00085),
    "beta_end": (0.02, 0.012),
    "num_train_timesteps": (1000, 1000),
    "trained_betas": (None, None),
    "rescale_betas_zero_snr": (False, False),
    "use_flow_sigmas": (False, False),
}
MARKS = [  # tensors that say what a model predicts
    (r"^v_pred$|^edm_vpred\.", "v_prediction"),
    (r"^edm_(mean|std)$", "EDM"),
    (r"^ztsnr$", "a zero-SNR schedule"),
]
HEADER = {  # header field -> values that mean epsilon on SD's schedule
    "modelspec.prediction_type": ("epsilon", "eps"),
    "modelspec.predict_key": ("epsilon", "eps"),
    "ss_zero_terminal_snr": ("false", "none"),
    "ss_v_parameterization": ("false", "none"),
}
EPSILON = "only noise prediction (epsilon) on Stable Diffusion's schedule is supported"


def check(place: Path, names: Iterable[str]) -> None:
    """Raise ValueError if the model of a folder or file is marked otherwise. names: its tensors' names."""
    names = list(names)
    for folder in (place.parent, place.parent.parent) if place.is_file() else (place.parent,):
        scheduler = folder / "scheduler" / "scheduler_config.json"
        if scheduler.is_file() and (folder == place.parent or place.name.startswith(weight_files.STEMS)):
            check_scheduler(scheduler)
    for pattern, kind in MARKS:
        mark = next((name for name in names if re.search(pattern, name)), None)
        if mark:
            raise ValueError(f"{place}: prediction_type {kind} (by its tensor {mark}); {EPSILON}")
    for file in weight_files.weight_files(place)[:1]:
        check_header(file)
        for yaml in (file.with_suffix(".yaml"), file.with_suffix(".yml")):
            if yaml.is_file():
                check_yaml(yaml)


def check_scheduler(path: Path) -> None:
    """Raise ValueError for a scheduler_config.json of another prediction or noise schedule."""
    config = weight_files.read_json(path)
    kind = str(config.get("_class_name") or "")
    if kind.startswith(("EDM", "FlowMatch")):
        raise ValueError(f"{path}: {kind} is not supported; {EPSILON}")
    for key, (default, supported) in SCHEDULE.items():
        value = config.get(key, default if kind else supported)  # without a class name: a fragment, not a scheduler
        same = value == supported or bool(value) == supported is False
        if isinstance(value, float) and isinstance(supported, float):
            same = math.isclose(value, supported, rel_tol=1e-6)
        if not same:
            raise ValueError(f"{path}: {key} {value} is not supported; {EPSILON}")


def check_header(file: Path) -> None:
    """Raise ValueError for a safetensors header that names another prediction."""
    header = weight_files.read_metadata(file)
    for key, allowed in HEADER.items():
        value = header.get(key)
        if value is not None and value.strip().lower() not in (*allowed, ""):
            raise ValueError(f"{file}: prediction_type {value} (by its header's {key}); {EPSILON}")


def check_yaml(path: Path) -> None:
    """Raise ValueError for an LDM or SGM configuration of another prediction, as A1111 reads next to a checkpoint."""
    text = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"#.*", "", text)
    found = re.search(r"parameterization\s*:\s*[\"']?([\w-]+)", text)
    if found and found[1] not in ("eps", "epsilon"):
        raise ValueError(f"{path}: prediction_type {found[1]} (parameterization); {EPSILON}")
    found = re.search(r"\w*(VScaling|EDMScaling|VWeighting|RectifiedFlow)\w*", text)
    if found:
        raise ValueError(f"{path}: prediction_type of {found[0]}; {EPSILON}")
    for key, supported in (("linear_start", 0.00085), ("linear_end", 0.012), ("timesteps", 1000)):
        found = re.search(rf"\b{key}\s*:\s*([\d.eE+-]+)", text)
        if found and not math.isclose(float(found[1]), supported, rel_tol=1e-6):
            raise ValueError(f"{path}: {key} {found[1]} is not supported; {EPSILON}")
    found = re.search(r"zero_terminal_snr\s*:\s*(?i:true)", text)
    if found:
        raise ValueError(f"{path}: zero_terminal_snr is not supported; {EPSILON}")
