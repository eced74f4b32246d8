"""Models of SD1.5 and SDXL from files, in every published layout.

Loading is strict: a missing, unexpected or misshaped key is an error. A module is built on the meta device, which
takes no memory, and the memory-mapped tensors of the file become its parameters.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import unet as unets
import vae as vaes
from pretrained import component_configs, key_names, lora, prediction, weight_files
from pretrained.configs import unet_config, unet_dict, vae_config, vae_dict
from pretrained.text_encoder import TextEncoder
from pretrained.weight_files import check_finite, find, read_file
from unet import UNet
from vae import VAE

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_L |= {"hidden_act": "quick_gelu", "projection_dim": 768, "eos_token_id": 2}  # 2: pool at the largest token id
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
CLIP_G |= {"hidden_act": "gelu", "projection_dim": 1280, "eos_token_id": 2}


# ----------------------------------------------------------------------------------------------------- configs


def read_config(source: str | Path, component: str = "unet") -> dict:
    """The `config.json` of a component, checked and with diffusers' defaults.

    For a single file: the one in its header or next to it, else that of SD1.5 or SDXL. Raises ValueError for settings
    that are not supported, and for a UNet that is marked as predicting something other than the noise.
    """
    place = find(source, component)
    if component == "unet":
        prediction.check(place, weight_files.names(place))
    if place.is_dir():
        return component_configs.check(weight_files.read_json(place / "config.json"), component, place / "config.json")
    stored = weight_files.parse_json(weight_files.read_metadata(place).get("config", "{}"), f"{place}: header config")
    if component in stored:
        return component_configs.check(stored[component], component, f"{place}: header config")
    path = place.parent / "config.json"
    if path.is_file():
        config = weight_files.read_json(path)
        kind = weight_files.class_of(config)
        if kind == weight_files.CLASSES[component] or not kind and place.name.startswith(weight_files.STEMS):
            return component_configs.check(config, component, path)
    return published_config(place, component)


def published_config(place: Path, component: str) -> dict:
    """The config of SD1.5's or SDXL's component, for a single file without one.

    Raises ValueError if the file does not contain the component, or is an autoencoder alone: SD1.5's and SDXL's have
    the same tensors but different scaling factors.
    """
    names = weight_files.names(place)
    kind = key_names.identify(names)
    if component == "vae" and kind == "an autoencoder" and not any(n.startswith(key_names.VAE) for n in names):
        scales = f"{vaes.SD15.scale} (SD1.5), {vaes.SDXL.scale} (SDXL)"
        raise ValueError(
            f"{place}: an autoencoder alone does not say its scaling factor, {scales}; put its config.json next to it"
        )
    xl = "SDXL" in kind
    published = {
        "unet": unet_dict(unets.SDXL if xl else unets.SD15),
        "vae": vae_dict(vaes.SDXL if xl else vaes.SD15),
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
    }
    return published[component]


def check_resolution(base: str | Path, pixels: int) -> None:
    """Raise ValueError if `pixels` is not divisible by the total downsampling factor of the networks of `base`."""
    levels = [len(read_config(base, part)["block_out_channels"]) for part in ("unet", "vae")]
    multiple = 2 ** (sum(levels) - 2)
    if pixels % multiple:
        raise ValueError(f"--resolution {pixels}: must be a multiple of {multiple}")


# ----------------------------------------------------------------------------------------------------- tensors


def check_keys(expected: dict[str, Tensor], tensors: dict[str, Tensor], path: Path, component: str) -> None:
    """Raise ValueError that names the first missing, unexpected or misshaped keys and says what the file is."""
    wrong = [f"missing {key}" for key in expected if key not in tensors]
    wrong += [f"unexpected {key}" for key in tensors if key not in expected]
    wrong += [
        f"{key} has shape {tuple(tensors[key].shape)} instead of {tuple(t.shape)}"
        for key, t in expected.items()
        if key in tensors and tensors[key].shape != t.shape
    ]
    if wrong:
        found = any(key in tensors for key in expected)
        kind = key_names.identify(weight_files.read(path) if path.exists() else tensors)
        if "LoRA" in kind:
            kind += "; name it with --checkpoint, and with --base the model that it adapts"
        if not found:
            raise ValueError(f"{path}: contains no {component}; the file looks like {kind}")
        raise ValueError(f"{path}: {len(wrong)} keys do not fit: {'; '.join(wrong[:3])}; the file looks like {kind}")


def read_renamed(expected: dict[str, Tensor], place: Path, layouts: list[key_names.Layout]) -> dict[str, Tensor]:
    """The tensors of a place under the module's names, by the best-matching layout. All are views of the file."""
    tensors = key_names.unfuse(weight_files.read(place))
    prefix, names = key_names.best_layout(tensors, layouts)
    module_names = {name: key for key, name in names.items()}
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    own = {module_names.get(name, name): t for name, t in own.items()}
    own = {key: t for key, t in own.items() if key in expected or not key_names.UNUSED.match(key)}
    conv = [key for key, t in own.items() if key in expected and t.ndim == 4 and expected[key].ndim == 2]
    return own | {key: own[key].flatten(1) for key in conv}  # old VAEs store attention as 1x1 convolutions


def convert_tensors(read: Callable[[], dict[str, Tensor]], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `read()` on a device and in a dtype. Tensors that need no conversion stay views of the file.

    Pages of a memory map stay resident until it is closed, so the file is remapped 32 times.
    """
    tensors = read()
    group = sum(t.nbytes for t in tensors.values()) / 32
    done: dict[str, Tensor] = {}
    copied = 0
    for key in list(tensors):
        done[key] = tensors[key].to(device, dtype)
        check_finite(key, done[key])
        copied += 0 if done[key] is tensors[key] else tensors[key].nbytes
        if copied > group:
            copied, tensors = 0, None
            tensors = read()
    return done


def load_component(
    module: nn.Module, place: Path, layouts: list[key_names.Layout], device: str, dtype: torch.dtype
) -> nn.Module:
    """Load a module on the meta device from a place, strictly. Raises ValueError as `check_keys` does."""
    expected = module.state_dict()
    component = {UNet: "UNet", VAE: "autoencoder"}.get(type(module), "text encoder")
    check_keys(expected, read_renamed(expected, place, layouts), place, component)
    try:
        tensors = convert_tensors(lambda: read_renamed(expected, place, layouts), device, dtype)
    except ValueError as error:
        raise ValueError(f"{place}: {error} in {dtype}; the file is damaged, get another copy") from None
    module.load_state_dict(tensors, assign=True)
    return module.eval()


# ------------------------------------------------------------------------------------------------------ models


def load_unet(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, ema: bool = False) -> UNet:
    """The UNet of a source: "tiny", "sd15", "sdxl", a pipeline's or UNet's folder, a single file or a hub id.

    ema: of a single file with a plain and an EMA copy, read the EMA copy. Merges and fine-tunes often leave it stale,
    so by default the plain one is read, as diffusers does, with a note on stderr.
    """
    with torch.device("meta"):
        unet = UNet(unet_config(read_config(source, "unet")))
    place = find(source, "unet")
    layouts = select_ema(key_names.unet_layouts(unet.state_dict(), unet.config), place, ema)
    return load_component(unet, place, layouts, device, dtype)


def select_ema(layouts: list[key_names.Layout], place: Path, ema: bool) -> list[key_names.Layout]:
    """The layouts to choose from: only that of the EMA copy, or all others if the file has a plain copy."""
    names = weight_files.names(place) if place.is_file() else []
    has_ema, has_plain = (any(n.startswith(prefix) for n in names) for prefix in (key_names.UNET_EMA, key_names.UNET))
    if ema and not has_ema:
        raise ValueError(f"{place}: --ema: contains no EMA copy of the UNet (model_ema.*)")
    if has_ema and has_plain and not ema:
        note_plain(place)
    return [layout for layout in layouts if not has_plain or (layout[0] == key_names.UNET_EMA) == ema]


@functools.cache
def note_plain(place: Path) -> None:
    """Say once per file that its plain weights are used."""
    message = "contains plain and EMA weights of the UNet; using the plain ones (for the EMA: weights.py convert --ema)"
    print(f"{place}: {message}", file=sys.stderr)


def load_vae(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """The autoencoder of a source. Raises ValueError for SDXL's in float16, where it overflows to black images."""
    with torch.device("meta"):
        vae = VAE(vae_config(read_config(source, "vae")))
    if vae.config.scale == vaes.SDXL.scale and dtype == torch.float16:
        raise ValueError(f"{source}: SDXL's autoencoder overflows in float16; load it in bfloat16 or float32")
    layouts = key_names.vae_layouts(vae.state_dict(), vae.config)
    return load_component(vae, find(source, "vae"), layouts, device, dtype)


def load_text(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> TextEncoder:
    """The text encoders of a source with their tokenizers: one for SD1.5, two for SDXL."""
    from transformers import CLIPTokenizer

    models = [load_clip(source, "text_encoder", device, dtype)]
    place = find(source, "text_encoder")
    tokenizers = [CLIPTokenizer.from_pretrained(weight_files.find_tokenizer(place, "tokenizer"), local_files_only=True)]
    if has_second_text(source):
        models.append(load_clip(source, "text_encoder_2", device, dtype))
        folder = weight_files.find_tokenizer(place, "tokenizer_2")
        tokenizers.append(CLIPTokenizer.from_pretrained(folder, local_files_only=True, pad_token="!"))  # id 0
    return TextEncoder(models, tokenizers)


def has_second_text(source: str | Path) -> bool:
    """True if a source has two text encoders, as SDXL has."""
    place = find(source, "text_encoder")
    if place.is_file():
        return any(key.startswith(key_names.CLIP_G) for key in weight_files.read(place))
    return (place.parent / "text_encoder_2").is_dir()


def load_clip(source: str | Path, component: str, device: str, dtype: torch.dtype) -> nn.Module:
    """One text encoder of a source: "text_encoder", or SDXL's "text_encoder_2", which has a projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}[component]
    with torch.device("meta"):
        model = kind(CLIPTextConfig(**read_config(source, component)))
    layouts = key_names.text_layouts(model.state_dict())
    load_component(model, find(source, component), layouts, device, dtype)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # not stored in the file, and still on the meta device
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    return model


# ------------------------------------------------------------------------------------------------ tuned models


def own_base(checkpoint: str | Path) -> str | None:
    """The source of the base model if the checkpoint contains it, as the authors' folders do, else None."""
    place = find(checkpoint, "tuned_unet")
    if place.name != "fine_tuned_unet" or not (place.parent / "original_unet").is_dir():
        return None
    # for a hub id return the id: its other components may not be downloaded yet
    return str(place.parent if Path(checkpoint).exists() else checkpoint)


def tuning_metadata(checkpoint: str | Path) -> dict:
    """How a model was tuned, such as `method` and `base`: the flags of a run, or the header of its weight file."""
    run = Path(checkpoint) / "run.json"
    if run.is_file():
        flags = weight_files.read_json(run).get("args", {})
        return flags | ({"method": f"image-{flags['method']}"} if flags.get("from_image") else {})
    if own_base(checkpoint):
        return {"method": "imagerefl"}
    return weight_files.read_metadata(weight_files.weight_files(find(checkpoint, "tuned_unet"))[0])


def load_tuned(
    checkpoint: str | Path,
    base: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    swap: bool = False,
    prepare: Callable[[UNet], object] = lambda unet: None,
) -> tuple[Callable, Callable]:
    """Base and tuned model as two callables with the UNet's arguments, for combined generation.

    checkpoint: a run's folder, with `unet/` or an adapter (then both callables share one set of weights); the authors'
    published folder or its hub id, whose `original_unet/` is then the base; any other source of a UNet; an adapter's
    file or folder.
    swap: keep only one of two full UNets in memory, the one called last. prepare: called with each loaded UNet.
    Raises ValueError if the tuned UNet and `base` have different text widths.
    """
    place = find(checkpoint, "tuned_unet")
    if place.is_file() and key_names.is_adapter(read_file(place)):
        prediction.check(place, [])
        unet = load_unet(base, device, dtype)
        lora.load(unet, place)
        prepare(unet)
        return lora.base_and_tuned(unet)
    width = {source: unet_config(read_config(source)).context for source in (base, place)}
    if width[base] != width[place]:
        named = {unets.SDXL.context: "sdxl", unets.SD15.context: "sd15", unets.TINY.context: "tiny"}
        flag = named.get(width[place], "the folder that it was trained from")
        raise ValueError(f"{checkpoint}: takes text of width {width[place]}, the base {width[base]}; --base {flag}")
    base = own_base(checkpoint) or base
    if swap:
        return one_at_a_time(base, place, device, dtype, prepare)
    pair = load_unet(base, device, dtype), load_unet(place, device, dtype)
    for unet in pair:
        prepare(unet)
    return pair


def one_at_a_time(
    base: str | Path,
    tuned: str | Path,
    device: str,
    dtype: torch.dtype,
    prepare: Callable[[UNet], object] = lambda unet: None,
) -> tuple[Callable, Callable]:
    """Two UNets in the memory of one: calling one frees the other's weights and loads its own from disk."""
    loaded: dict[str | Path, UNet] = {}

    def swapped(source: str | Path) -> Callable:
        load_unet(source, "meta", dtype)  # fail early rather than after the base model's steps

        def call(*args, **kwargs) -> Tensor:
            if source not in loaded:
                loaded.clear()
                loaded[source] = load_unet(source, device, dtype)
                prepare(loaded[source])
            return loaded[source](*args, **kwargs)

        return call

    return swapped(base), swapped(tuned)
