"""LoRA files of other programs: which layer each tensor adapts, and the scale alpha / rank of each adapter.

Names: peft and diffusers (three generations), kohya, OneTrainer; see `docs/weights.md`. The scale is stored in one of
four places: a tensor `alpha` for each layer, the header field `lora_adapter_metadata` (diffusers),
`adapter_config.json` next to the file (peft), or the header field `ss_network_alpha` (kohya). Without any of these
alpha equals the rank.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrained import key_names, weight_files
from unet import UNetConfig

PEFT_PREFIX = "base_model.model."
PREFIX = re.compile(r"^(?:module\.|_orig_mod\.|base_model\.model\.|unet\.|model\.diffusion_model\.|diffusion_model\.)+")
OLD_SUFFIXES = [  # earlier names of diffusers, and peft's with the name of an adapter -> today's
    (r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$", r".\1.lora_\2.weight"),
    (r"\.lora(?:_linear_layer|_layer)?\.(down|up)\.weight$", r".lora_\1.weight"),
    (r"\.lora_([AB])\.[^.]+\.weight$", r".lora_\1.weight"),
    (r"\.to_out\.(lora_|alpha$)", r".to_out.0.\1"),
]
PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
OTHER_KINDS = [  # adapters that are not plain LoRA, by a name that only they have
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.dora_scale$|\.lora_magnitude_vector", "DoRA"),
    (r"\.oft_|\.boft_", "OFT"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.on_input$|\.ia3_", "IA3"),
    (r"\.lora_mid\.", "Tucker-decomposed LoRA (LyCORIS use_cp)"),
    (r"\.diff(_b)?$|\.[wb]_norm$", "full weight difference (LyCORIS full)"),
    (r"\.scalar$", "LyCORIS use_scalar"),
    (r"\.lora_[AB]\.bias$", "LoRA with biases (peft lora_bias)"),
    (r"^bundle_emb\.", "LoRA with text embeddings (bundle_emb)"),
]
TEXT = re.compile(r"^(?:base_model\.model\.)?(?:lora_te\d?[._]|text_encoder(?:_2)?\.|text_model\.|clip_[lg]\.)")
UNSUPPORTED_SETTINGS = (  # of peft, that change the arithmetic; each is None, False or empty for plain LoRA
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # of peft; the others also change the base's weights


@dataclass
class Adapter:
    """One layer's W + (alpha / rank) B A. A (rank, in, ...) and B (out, rank, ...) as in the file."""

    A: Tensor
    B: Tensor
    alpha: float


def locate(path: str | Path) -> Path:
    """The adapter's file: `path` itself, or in a folder. Raises FileNotFoundError."""
    path = Path(path)
    if path.is_file():
        return path
    found = next((path / name for name in weight_files.ADAPTERS if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: no adapter in it; expected {' or '.join(weight_files.ADAPTERS[:2])}")
    return found


def read(path: str | Path, layers: dict[str, torch.nn.Module], config: UNetConfig) -> dict[str, Adapter]:
    """The adapters of a file by layer name. layers: all linear and convolutional layers of the UNet.

    Raises ValueError if a key belongs to none of these layers, if one half of an adapter is missing, if the adapter
    is of another kind than LoRA, and if its scale is unknown.
    """
    path = locate(path)
    tensors = weight_files.read_file(path)
    _refuse_other_kinds(path, tensors)
    parts = _parts(path, tensors, layers, config)
    _fill_in_alpha(path, tensors, parts)
    for name, found in parts.items():
        if "A" not in found or "B" not in found:
            raise ValueError(f"{path}: only one half of the adapter of {name}; the file is not whole")
    return {name: Adapter(p["A"], p["B"], float(p.get("alpha", len(p["A"])))) for name, p in parts.items()}


def _refuse_other_kinds(path: Path, tensors: dict[str, Tensor]) -> None:
    for pattern, kind in OTHER_KINDS:
        keys = [key for key in tensors if re.search(pattern, key)]
        if keys:
            raise ValueError(
                f"{path}: {kind}, which is not supported, only plain LoRA ({len(keys)} of {len(tensors)} keys, such as "
                f"{keys[0]}); merge it into its base with the program that made it, and name the merged model"
            )


def _parts(
    path: Path, tensors: dict[str, Tensor], layers: dict[str, torch.nn.Module], config: UNetConfig
) -> dict[str, dict]:
    """Layer -> its A, B and alpha, if stored. Raises ValueError for keys of other layers."""
    known = {}  # with underscores, as kohya writes names -> name
    for name in layers:
        single = key_names.unet_name(name + ".weight", config).removesuffix(".weight")
        known |= dict.fromkeys((name.replace(".", "_"), single.replace(".", "_")), name)
    found: dict[str, dict] = {}
    strange = []
    for key, tensor in tensors.items():
        name = key_names.rename(PREFIX.sub("", key), OLD_SUFFIXES)
        match = re.fullmatch(r"(.+?)\.(lora_\w+\.weight|alpha)", name)
        layer = known.get(re.sub(r"^lora_unet[._]", "", match[1]).replace(".", "_")) if match else None
        if layer is None or match[2] not in PARTS:
            strange.append(key)
        elif PARTS[match[2]] in found.setdefault(layer, {}):
            raise ValueError(f"{path}: holds two adapters of {layer}, the second one as {key}")
        else:
            found[layer][PARTS[match[2]]] = tensor
    text = [key for key in strange if TEXT.search(key)]
    if text:
        raise ValueError(
            f"{path}: {len(text)} of {len(tensors)} keys adapt the text encoder, such as {text[0]}, and only UNet "
            f"adapters can be applied; export the adapter without its text encoder, or merge it into its base with the "
            f"program that made it"
        )
    if strange or not found:
        first = ", ".join(strange[:3]) or "no key at all"
        raise ValueError(
            f"{path}: {len(strange)} of {len(tensors)} keys fit no layer of this UNet: {first}; "
            f"the file is {key_names.identify(tensors)}{_other_base(tensors, config)}"
        )
    return found


def _other_base(tensors: dict[str, Tensor], config: UNetConfig) -> str:
    """The base that fits the text width of an adapter, as the end of an error message; empty if it is this UNet's."""
    text = re.compile(r"attn2[._](?:processor\.)?to_k(?:_lora)?\.(?:lora_A|lora_down|lora\.down|down)\b")
    width = next((t.shape[1] for key, t in tensors.items() if text.search(key) and t.ndim > 1), config.context)
    base = {768: "SD1.5; --base sd15", 1024: "SD2, which is not supported", 2048: "SDXL; --base sdxl"}.get(width)
    if width == config.context:
        return ""
    return f" for text of width {width}, this UNet takes {config.context}" + (f": an adapter of {base}" if base else "")


def _peft_config(path: Path) -> tuple[dict, Path]:
    """peft's settings of the UNet's adapters, and the file that contains them; empty if there are none."""
    place = path.parent / "adapter_config.json"
    header = weight_files.read_metadata(path).get("lora_adapter_metadata")
    if header is None and place.is_file():
        return weight_files.read_json(place), place
    config = weight_files.parse_json(header or "{}", f"{path}: the header's lora_adapter_metadata")
    unet = {key.removeprefix("unet."): value for key, value in config.items() if key.startswith("unet.")}
    return unet or {key: value for key, value in config.items() if not key.startswith("text_encoder")}, path


def _refuse_other_settings(config: dict, place: Path) -> None:
    kind, init = str(config.get("peft_type") or "LORA"), config.get("init_lora_weights")
    if kind.upper() != "LORA":
        raise ValueError(f"{place}: peft_type {kind} is not supported, only LORA")
    if config.get("use_dora"):
        raise ValueError(f"{place}: use_dora: DoRA is not supported, only plain LoRA")
    if init not in PLAIN_INITS:
        raise ValueError(
            f"{place}: init_lora_weights {init} changes the base's weights too; save the adapter as plain LoRA (peft: "
            f"save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in UNSUPPORTED_SETTINGS:
        if config.get(key):
            raise ValueError(f"{place}: {key} = {config[key]} is not supported, only plain LoRA")


def _fill_in_alpha(path: Path, tensors: dict[str, Tensor], parts: dict[str, dict]) -> None:
    """Add the alpha of each layer that has none among the tensors, from wherever it is stored."""
    config, place = _peft_config(path)
    _refuse_other_settings(config, place)
    missing = [name for name, found in parts.items() if "alpha" not in found and "A" in found]
    if config:
        for name in missing:
            parts[name]["alpha"] = _peft_alpha(config, name, len(parts[name]["A"]), place)
    elif missing and any(key.startswith(PEFT_PREFIX) for key in tensors):
        raise ValueError(f"{path}: peft stores its scale in adapter_config.json; put that next to the file")
    elif len(missing) == len(parts):
        header = weight_files.read_metadata(path)
        arguments = weight_files.parse_json(header.get("ss_network_args") or "{}", f"{path}: header ss_network_args")
        for name in missing:
            wide = parts[name]["A"].ndim == 4 and parts[name]["A"].shape[-1] > 1
            stored = arguments.get("conv_alpha") if wide else header.get("ss_network_alpha")
            if _is_number(stored):  # "Dynamic" after kohya's resizing, which stores tensors
                parts[name]["alpha"] = float(stored)


def _peft_alpha(config: dict, name: str, rank: int, place: Path) -> float:
    """peft's alpha of a layer, so that alpha / rank is its scale. Patterns are expressions for ends of names."""
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{place}: alpha_pattern is a {type(patterns).__name__}, not an object of names and numbers")
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise ValueError(f"{place}: alpha_pattern {pattern!r} is no regular expression ({error})") from None
        if found:
            alpha = value
            break
    if not _is_number(alpha):
        raise ValueError(f"{place}: lora_alpha {alpha!r} of {name} is not a number")
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1)


def _is_number(value: object) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
