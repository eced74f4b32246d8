"""Models from files, and files from models, in every published form of SD1.5 and SDXL.

    python weights.py inspect FILE
    python weights.py convert SRC FOLDER
    python weights.py convert SRC FILE.safetensors --layout single-file --dtype fp16
    python weights.py convert ADAPTER FILE.safetensors --layout kohya --base sd15

Reading is strict: a missing, unexpected or misshaped key is an error; a pickle is never executed. A module is built
without memory (on the meta device) and the file's tensors, memory-mapped, become its own.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

import unet as unets
import vae as vaes
from pretrained import key_names, lora, weight_files
from pretrained.configs import unet_config, unet_dict, vae_config, vae_dict
from pretrained.text_encoder import TextEncoder
from pretrained.weight_files import find, read_file  # noqa: F401 - both belong to what this file offers
from unet import UNet
from utils import cli, disk
from vae import VAE

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_L |= {"hidden_act": "quick_gelu", "projection_dim": 768, "eos_token_id": 2}  # 2: the end is the largest id
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
CLIP_G |= {"hidden_act": "gelu", "projection_dim": 1280, "eos_token_id": 2}


def check_prediction(place: Path) -> None:
    """Raises ValueError where a UNet is marked as one that does not predict the noise."""
    if place.is_dir():
        beside = place.parent / "scheduler" / "scheduler_config.json"
        kind = weight_files.read_json(beside).get("prediction_type", "epsilon") if beside.is_file() else "epsilon"
    else:
        kind = "v_prediction" if "v_pred" in weight_files.read(place) else "epsilon"
    if kind != "epsilon":
        raise ValueError(f"{place}: prediction_type {kind}; what works here predicts the noise, epsilon")


def read_config(source: str | Path, component: str = "unet") -> dict:
    """The `config.json` of a component. A single file has none: its header may say it, else it is a published one."""
    place = find(source, component)
    if component == "unet":
        check_prediction(place)
    if place.is_dir():
        return weight_files.read_json(place / "config.json")
    stored = json.loads(weight_files.read_metadata(place).get("config", "{}"))
    if component in stored:
        return stored[component]
    beside = place.parent / "config.json"
    if place.name.startswith(weight_files.STEMS) and beside.is_file():
        return weight_files.read_json(beside)
    xl = "SDXL" in key_names.identify(weight_files.read(place))
    published = {
        "unet": unet_dict(unets.SDXL if xl else unets.SD15),
        "vae": vae_dict(vaes.SDXL if xl else vaes.SD15),
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
    }
    return published[component]


def check(expected: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError naming the first keys that are missing, unexpected or misshaped, and what the file is."""
    wrong = [f"missing {key}" for key in expected if key not in tensors]
    wrong += [f"unexpected {key}" for key in tensors if key not in expected]
    wrong += [
        f"{key} has shape {tuple(tensors[key].shape)} instead of {tuple(t.shape)}"
        for key, t in expected.items()
        if key in tensors and tensors[key].shape != t.shape
    ]
    if wrong:
        looks = key_names.identify(weight_files.read(path) if path.exists() else tensors)
        raise ValueError(f"{path}: {len(wrong)} keys do not fit: {'; '.join(wrong[:3])}; the file looks like {looks}")


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Assign every tensor to its key. Raises ValueError naming keys that are missing, unexpected or misshaped."""
    check(module.state_dict(), tensors, Path(path))
    module.load_state_dict(tensors, assign=True)


def read_as(expected: dict[str, Tensor], place: Path, known: list[key_names.Layout]) -> dict[str, Tensor]:
    """The tensors of a place under the names of a module, by the layout that fits best. All are views of the file."""
    tensors = key_names.unfuse(weight_files.read(place))
    prefix, names = key_names.closest(tensors, known)
    ours = {name: key for key, name in names.items()}
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    own = {ours.get(name, name): t for name, t in own.items()}
    flat = [key for key, t in own.items() if key in expected and t.ndim == 4 and expected[key].ndim == 2]
    return own | {key: own[key].flatten(1) for key in flat}  # an old VAE's attention is made of 1x1 convolutions


def converted(read: Callable[[], dict[str, Tensor]], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `read` maps, on a device and in a type. What needs no conversion stays a view of the file.

    What was read of a mapping stays in memory until all of it is given back, so the file is mapped anew 32 times.
    """
    tensors = read()
    group = sum(t.nbytes for t in tensors.values()) / 32
    done: dict[str, Tensor] = {}
    copied = 0
    for key in list(tensors):
        done[key] = tensors[key].to(device, dtype)
        copied += 0 if done[key] is tensors[key] else tensors[key].nbytes
        if copied > group:
            copied, tensors = 0, None
            tensors = read()
    return done


def fill(module: nn.Module, place: Path, known: list[key_names.Layout], device: str, dtype: torch.dtype) -> nn.Module:
    """Give a module on the meta device the weights of a place, strictly."""
    expected = module.state_dict()
    load_strictly(module, converted(lambda: read_as(expected, place, known), device, dtype), place)
    return module.eval()


def load_unet(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> UNet:
    """The UNet of a source: "tiny", "sd15", "sdxl", a folder (a pipeline's or its own), a single file or a hub id."""
    with torch.device("meta"):
        unet = UNet(unet_config(read_config(source, "unet")))
    return fill(unet, find(source, "unet"), key_names.of_unet(unet.state_dict(), unet.config), device, dtype)


def load_vae(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """The autoencoder of a source. Raises ValueError for SDXL's in float16, where it overflows to black images."""
    with torch.device("meta"):
        vae = VAE(vae_config(read_config(source, "vae")))
    if vae.config.scale == vaes.SDXL.scale and dtype == torch.float16:
        raise ValueError(f"{source}: SDXL's autoencoder overflows in float16; load it in bfloat16 or float32")
    return fill(vae, find(source, "vae"), key_names.of_vae(vae.state_dict(), vae.config), device, dtype)


def load_text(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> TextEncoder:
    """The text encoders of a source and their tokenizers: one of each, for SDXL two."""
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
    """Whether the text of a source is encoded twice, as in SDXL."""
    place = find(source, "text_encoder")
    if place.is_file():
        return any(key.startswith(key_names.CLIP_G) for key in weight_files.read(place))
    return (place.parent / "text_encoder_2").is_dir()


def load_clip(source: str | Path, component: str, device: str, dtype: torch.dtype) -> nn.Module:
    """One text encoder of a source: "text_encoder", or "text_encoder_2", which also has a projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}[component]
    with torch.device("meta"):
        model = kind(CLIPTextConfig(**read_config(source, component)))
    fill(model, find(source, component), key_names.of_text(model.state_dict()), device, dtype)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # in no file, and still on the meta device
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    return model


def own_base(checkpoint: str | Path) -> str | None:
    """The source of the base model where a checkpoint brings it along, as the authors' folders do, else None."""
    place = find(checkpoint, "tuned_unet")
    whole = place.name == "fine_tuned_unet" and (place.parent / "original_unet").is_dir()
    if not whole:
        return None
    return str(place.parent if Path(checkpoint).exists() else checkpoint)  # of the hub, the rest is still to be fetched


def tuning_metadata(checkpoint: str | Path) -> dict:
    """What is known of how a model was tuned, such as `method` and `base`: the flags of a run, or its file's header."""
    run = Path(checkpoint) / "run.json"
    if run.is_file():
        return weight_files.read_json(run).get("args", {})
    if own_base(checkpoint):
        return {"method": "imagerefl"}
    return weight_files.read_metadata(weight_files.weight_files(find(checkpoint, "tuned_unet"))[0])


def check_resolution(base: str | Path, pixels: int) -> None:
    """Raises ValueError when the networks of `base` cannot halve a picture's side often enough."""
    levels = [len(read_config(base, part)["block_out_channels"]) for part in ("unet", "vae")]
    multiple = 2 ** (sum(levels) - 2)
    if pixels % multiple:
        raise ValueError(f"--resolution {pixels}: must be a multiple of {multiple}")


def load_tuned(
    checkpoint: str | Path,
    base: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    swap: bool = False,
    prepare: Callable[[UNet], object] = lambda unet: None,
) -> tuple[Callable, Callable]:
    """Base and tuned model as two callables with the UNet's arguments, as combined generation needs them.

    swap: keep only one of two whole UNets in memory, the one called last. `prepare` is called with each UNet that is
    read, such as `packed.pack`.

    checkpoint: a run's folder, with `unet/` or an adapter (then both callables share one set of weights); the authors'
    published folder or its hub id, whose `original_unet/` then is the base UNet; any other source of a UNet, or an
    adapter's file. Raises ValueError when the tuned UNet takes text of another width than that of `base`.
    """
    place = find(checkpoint, "tuned_unet")
    if place.is_file() and key_names.is_adapter(read_file(place)):
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
    """Two UNets in the memory of one: a call of one reads its weights, after those of the other are given back."""
    held: dict[str | Path, UNet] = {}

    def half(source: str | Path) -> Callable:
        load_unet(source, "meta", dtype)  # what is wrong with it is said now, not after the base's steps

        def call(*args, **kwargs) -> Tensor:
            if source not in held:
                held.clear()
                held[source] = load_unet(source, device, dtype)
                prepare(held[source])
            return held[source](*args, **kwargs)

        return call

    return half(base), half(tuned)


def save_unet(
    unet: UNet,
    path: str | Path,
    layout: str = "diffusers",
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
    base: str | Path | None = None,
) -> None:
    """Write a UNet: "diffusers", a folder that diffusers reads, or "single-file", for A1111 and ComfyUI.

    A single file (LDM for SD1.5, SGM for SDXL) also holds the autoencoder and the text encoders of `base`, a source.
    Raises ValueError for another layout, for adapters that are not merged, for a single file without a base, and for a
    path that is named like the other layout's.
    """
    unet = getattr(unet, "_orig_mod", unet)  # of a compiled one
    if any(".lora_" in key for key in unet.state_dict()):
        raise ValueError("this UNet has adapters; lora.save writes them, lora.merge folds them into the weights")
    if layout in ("diffusers", "single-file") and (Path(path).suffix == ".safetensors") != (layout == "single-file"):
        raise ValueError(f"{path}: the layout single-file goes into a file named .safetensors, diffusers into a folder")
    if layout == "diffusers":
        tensors = {key: t.to("cpu", dtype) for key, t in unet.state_dict().items()}
        disk.write(Path(path) / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"} | (metadata or {}))
        disk.write_text(Path(path) / "config.json", json.dumps(unet_dict(unet.config), indent=1) + "\n")
    elif layout == "single-file":
        if base is None:
            raise ValueError("a single file also holds an autoencoder and text encoders: say of which base")
        tensors = single_file(unet, base, dtype)
        header = modelspec(unet, Path(path).stem) | {"config": json.dumps(_configs(unet, base))} | (metadata or {})
        disk.write(path, {key: t.to("cpu", dtype) for key, t in tensors.items()}, {"format": "pt"} | header)
    else:
        raise ValueError(f"unknown layout {layout!r} of a UNet; known: diffusers, single-file")


def _configs(unet: UNet, base: str | Path) -> dict[str, dict]:
    components = ["vae", "text_encoder"] + ["text_encoder_2"] * bool(unet.config.pooled)
    return {"unet": unet_dict(unet.config)} | {name: read_config(base, name) for name in components}


def single_file(unet: UNet, base: str | Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of an LDM (SD1.5) or SGM (SDXL) file: a UNet, and the autoencoder and text encoders of a base."""
    vae = load_vae(base)
    own = unet.state_dict()
    tensors = {key_names.UNET + key_names.unet_name(key, unet.config): t for key, t in own.items()}
    for key, t in vae.state_dict().items():
        convolution = t.ndim == 2  # the layout's attention is made of 1x1 convolutions
        tensors[key_names.VAE + key_names.vae_name(key, len(vae.config.channels))] = (
            t[..., None, None] if convolution else t
        )
    prefix = key_names.CLIP_L_SDXL if unet.config.pooled else key_names.CLIP_L
    first = load_clip(base, "text_encoder", "cpu", dtype).state_dict()
    tensors |= {f"{prefix}text_model.{key.removeprefix('text_model.')}": t for key, t in first.items()}
    if unet.config.pooled:
        second = load_clip(base, "text_encoder_2", "cpu", dtype).state_dict()
        _, names = key_names.of_text(second)[1]
        tensors |= key_names.fuse({key_names.CLIP_G + names[key]: t for key, t in second.items()})
    return tensors


def modelspec(unet: UNet, title: str) -> dict[str, str]:
    """What A1111 and others show of a file (Stability AI's model metadata, 1.0.1)."""
    xl = bool(unet.config.pooled)
    side = 8 * unet.config.sample_size
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base" if xl else "stable-diffusion-v1",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "resolution": f"{side}x{side}",
        "prediction_type": "epsilon",
        "date": date.today().isoformat(),
    }
    return {f"modelspec.{key}": value for key, value in spec.items()}


def inspect(path: Path) -> str:
    """What a weight file is, in a few lines."""
    tensors = read_file(path)
    count = sum(t.numel() for t in tensors.values())
    types = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    lines = [
        f"{path}: {key_names.identify(tensors)}",
        f"{len(tensors)} tensors, {count:,} numbers, {', '.join(types)}",
    ]
    lines += [f"{key}: {value[:100]}" for key, value in weight_files.read_metadata(path).items()]
    return "\n".join(lines)


def convert(source: str, path: str, layout: str, dtype: torch.dtype, base: str | None) -> None:
    """Rewrite the UNet of a source in another layout. An adapter is merged into its base, unless the layout is its.

    base: by default a run's own, else the source itself where it holds more than a UNet.
    """
    place, about = find(source, "tuned_unet"), Path(source) / "run.json"
    if base is None and about.is_file():
        base = weight_files.read_json(about)["args"]["base"]
    if place.is_file() and key_names.is_adapter(read_file(place)):
        if base is None:
            raise ValueError(f"{place}: an adapter needs --base, the model that it adapts")
        unet = load_unet(base)
        lora.load(unet, place)
        if layout in lora.LAYOUTS:
            return lora.save(unet, path, layout, dtype=dtype)
        lora.merge(unet)
    else:
        unet = load_unet(place)
    save_unet(unet, path, layout, dtype, base=base or source)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("command", choices=("inspect", "convert"), help="say what a file is, or rewrite a UNet")
    parser.add_argument("source", metavar="SRC", help="a file; to convert also a run, a folder, a hub id, an adapter")
    parser.add_argument("path", metavar="DST", nargs="?", help="the UNet's folder, or the .safetensors file, to write")
    parser.add_argument("--layout", choices=("diffusers", "single-file", *lora.LAYOUTS), default="diffusers")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--base", help="what an adapter adapts, or what else a single file holds (default: SRC's own)")
    return parser.parse(argv)


def main(args: argparse.Namespace) -> None:
    if args.command == "inspect":
        print(inspect(Path(args.source)))
    elif args.path is None:
        raise ValueError("convert SRC DST: no DST, the folder or file to write")
    else:
        convert(args.source, args.path, args.layout, DTYPES[args.dtype], args.base)
        print(f"written to {args.path}")


if __name__ == "__main__":
    cli.run(main, arguments())
