"""Weight files: find them on disk or in the hub's cache and read them, without executing a pickle.

A source is "tiny", "sd15", "sdxl", a folder (a pipeline's or a component's), a single file, or a hub id. A place is
the folder of one component, or the single file that contains it.
"""

import fnmatch
import functools
import json
import re
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrained import hub

BASES = {
    "tiny": str(Path(__file__).parent.parent / "tiny" / "base"),
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
MOVED = {BASES["sd15"]: "runwayml/stable-diffusion-v1-5"}  # removed from the hub, still in many caches
SINGLE = {
    BASES["sd15"]: "v1-5-pruned-emaonly.safetensors (4.3 GB)",
    BASES["sdxl"]: "sd_xl_base_1.0.safetensors (6.9 GB)",
}
CLASSES = {"unet": "UNet2DConditionModel", "tuned_unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
CLASSES |= {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
ADAPTER = "pytorch_lora_weights.safetensors"
ADAPTERS = (ADAPTER, "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")
NAMES = {  # subfolders of a component; the authors publish `original_unet/` and `fine_tuned_unet/`
    "unet": ("unet", "original_unet"),
    "tuned_unet": ("fine_tuned_unet", "unet/adapter_model.safetensors", "unet", *ADAPTERS),
}
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".fp16.safetensors",
    ".safetensors.index.fp16.json",
    ".fp16.safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".fp16.bin",
)


SAFETENSORS = (".safetensors", ".sft")
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")  # of training scripts, around the tensors


class Inert:
    """Placeholder for a class that an official `.ckpt` names but no tensor needs: it does nothing."""


INERT = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError if it contains anything else."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8 or download it again") from None
    return parse_json(text, str(path))


def parse_json(text: str, origin: str) -> dict:
    """The JSON object in a text. Raises ValueError that names `origin` if it is anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{origin}: contains a {type(content).__name__}, not a JSON object")
    return content


def pickle_error(error: Exception) -> str:
    """The reason of torch's unpickler in one sentence, without its advice on how to load the file anyway."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return re.split(r"\.\s|\n", text)[0] or type(error).__name__


def read_file(path: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of one weight file, memory-mapped where the format allows.

    Pickles (`.ckpt`, `.pt`, `.pth`, `.bin`) are read by torch's restricted unpickler, which builds only tensors and
    plain containers; an outer `state_dict` or `model` is unwrapped. The content decides, not the suffix. Raises
    FileNotFoundError, or ValueError if the file is damaged, is no weight file, or needs code to be executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder; name a file in it' if path.is_dir() else 'no such file'}")
    if is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                return unwrap({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from None
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in INERT]):
            if path.suffix.lower() in SAFETENSORS:  # torch goes by the suffix of a path, not of an open file
                with path.open("rb") as file:
                    state = torch.load(file, map_location="cpu", weights_only=True)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # noqa: BLE001 - whatever the unpickler raises, the file is refused
        reason = f"contains more than plain tensors or is damaged ({pickle_error(error)})"
        raise ValueError(f"{path}: refused, {reason}") from None
    while isinstance(state, dict) and (
        inner := next((state[k] for k in WRAPPERS if isinstance(state.get(k), dict)), None)
    ):
        state = inner
    if not isinstance(state, dict):
        raise ValueError(f"{path}: contains a {type(state).__name__}, not a dictionary of tensors")
    return unwrap({key: value for key, value in state.items() if isinstance(value, torch.Tensor)})


def unwrap(tensors: dict) -> dict:
    """Remove the prefixes of torch.compile (`_orig_mod.`) and DistributedDataParallel (`module.`) from the names."""
    if any("_orig_mod." in key for key in tensors):
        tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
    if tensors and all(key.startswith("module.") for key in tensors):
        return unwrap({key.removeprefix("module."): value for key, value in tensors.items()})
    return tensors


def is_safetensors(path: Path) -> bool:
    """True for a safetensors file, whatever its name. Raises ValueError for a Git LFS pointer, a web page or text."""
    with path.open("rb") as file:
        head = file.read(200)
    if head.startswith(b"version https://git-lfs.github.com"):
        raise ValueError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` or download the file itself")
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{path}: a web page, not weights; download the file itself (logged in, if the site asks for it)"
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 10**9:
        return True
    if head[:1] not in (b"", b"\x80") and head[:2] != b"PK" and all(32 <= c < 127 or c in b"\t\r\n" for c in head):
        text = " ".join(head.decode().split())[:80]
        raise ValueError(
            f"{path}: text, not weights ({text!r}); download it again (logged in, if the site asks for it)"
        )
    pickled = head[:2] == b"PK" or head[:1] == b"\x80"
    return path.suffix.lower() in SAFETENSORS and not pickled  # damaged, or a format that torch may know


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; empty for other files."""
    if not is_safetensors(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return read_file(path) and {}  # raises the error


def weight_files(place: Path) -> list[Path]:
    """The weight files of a component: full precision before half, safetensors before pickles, shards in order.

    Raises FileNotFoundError if there are none, or if an index names a missing shard.
    """
    if place.is_file():
        return [place]
    for name in (stem + ending for ending in ENDINGS for stem in STEMS):
        path = place / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return [path]
        shards = sorted(set(read_json(path).get("weight_map", {}).values()))
        absent = [shard for shard in shards if not (place / shard).is_file()]
        if absent or not shards:
            first = absent[0] if absent else "no shard"
            raise FileNotFoundError(f"{path}: names {first}, missing ({len(absent)} of {len(shards)} shards); get it")
        return [place / shard for shard in shards]
    raise FileNotFoundError(f"{place}: no weights; put {STEMS[0]}.safetensors or {STEMS[1]}.safetensors there")


def names(place: Path) -> list[str]:
    """The names of a component's or single file's tensors; for safetensors only the header is read."""
    found = []
    for path in weight_files(place):
        try:
            with safe_open(path, framework="pt") as file:
                found += unwrap(dict.fromkeys(file.keys()))
        except (SafetensorError, OSError):
            found += read_file(path)  # another format, or an error that this raises
    return found


def read(place: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a component's folder or of a single file, memory-mapped, under the file's own names."""
    return {key: tensor for path in weight_files(place) for key, tensor in read_file(path).items()}


def class_of(config: dict) -> str | None:
    """The class that a config.json of diffusers or transformers names."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return config.get("_class_name") or first


def find_in_folder(folder: Path, component: str) -> Path | None:
    """The place of a component in a folder, or None. Raises FileNotFoundError if its `config.json` is missing."""
    for place in (folder / name for name in NAMES.get(component, (component,))):
        if place.is_file() or (place / "config.json").is_file():
            return place
        if place.is_dir():
            raise FileNotFoundError(f"{place}: no config.json; copy it from where the weights came from")
    if (folder / "config.json").is_file():
        kind = class_of(read_json(folder / "config.json"))
        return folder if kind == CLASSES[component] else None
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in (*SAFETENSORS, ".ckpt"))
    if any(path.name.startswith(STEMS) for path in files):
        raise FileNotFoundError(f"{folder}: no config.json; copy it from where the weights came from")
    if len(files) > 1:
        raise ValueError(f"{folder}: contains {', '.join(path.name for path in files[:3])}; name one of the files")
    return files[0] if files else None


def snapshots(repo: str) -> list[Path]:
    """The snapshot folders of a repository in the hub's local cache, without a request to the hub."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    main = cache / "refs" / "main"
    if main.is_file():
        return [cache / "snapshots" / main.read_text().strip()]
    return sorted((cache / "snapshots").glob("*"))


def download(repo: str, component: str) -> Path:
    """Download one component of a hub repository, and the tokenizers with a text encoder. Raises OSError on failure."""
    text = ("text_encoder", "text_encoder_2") if component.startswith("text") else (component,)
    folders = ("original_unet", "fine_tuned_unet", "unet") if component in NAMES else text
    weights = [  # full precision before half, safetensors before pickles
        (*(f"{stem}.safetensors" for stem in STEMS), "*-of-*.safetensors"),
        ("*.fp16.safetensors", "*.fp16-*.safetensors"),
        (*(f"{stem}.bin" for stem in STEMS), "*-of-*.bin"),
        ("*.fp16.bin",),
    ]
    patterns = [f"{name}/*.json" for name in folders] + [*ADAPTERS, "adapter_config.json"]
    patterns += ["scheduler/*.json", "model_index.json"]  # say what the UNet predicts
    patterns += ["tokenizer*/*"] * component.startswith("text")

    def choose(files: list[str]) -> list[str]:
        def matching(wanted: list[str]) -> list[str]:
            return [file for file in files if any(fnmatch.fnmatchcase(file, pattern) for pattern in wanted)]

        found = (matching([f"{name}/{file}" for name in folders for file in names]) for names in weights)
        return matching(patterns) + next(filter(None, found), [])

    return hub.fetch(repo, choose)


@functools.cache
def fetch_scheduler(repo: str, folder: Path) -> None:
    """Download what says what a cached UNet predicts, if another program left it out; if that fails, say so, once."""
    if (folder / "scheduler").is_dir():
        return
    try:
        if files := fnmatch.filter(hub.listing(repo, revision=folder.name), "scheduler/*.json"):
            hub.fetch(repo, lambda _: files, revision=folder.name)
    except OSError as error:
        reason = " ".join(str(error).split())[:80]
        message = "its scheduler/ is not in the hub's cache, and no download; it is taken to predict the noise"
        print(f"{repo}: {message} ({reason})", file=sys.stderr)


def find_in_hub(source: str, component: str) -> Path:
    """The place of a component of a hub repository: in the local cache, else downloaded."""
    repo = BASES.get(source, source)
    for folder in snapshots(repo) + snapshots(MOVED.get(repo, repo)):
        try:
            place = find_in_folder(folder, component)
            if place and weight_files(place):
                if "unet" in component and repo not in BASES.values():
                    fetch_scheduler(repo, folder)
                return place
        except FileNotFoundError:
            continue  # partly downloaded
    try:
        place = find_in_folder(download(repo, component), component)
        if place:
            return place
        reason = "the repository has none"
    except OSError as error:
        reason = error
    unets = "original_unet/, fine_tuned_unet/" if component == "tuned_unet" else "unet/"
    either = f", or {SINGLE[repo]} of it," if repo in SINGLE else ""
    raise FileNotFoundError(
        f"{source}: no {component} in the hub's local cache, and no download ({reason}); get the repository "
        f"huggingface.co/{repo} (`hf download {repo}`: {unets}, vae/, text_encoder*/, tokenizer*/){either} and leave "
        f"it in the cache or name its folder or file instead of {source}"
    )


def find(source: str | Path, component: str) -> Path:
    """The place of "unet", "vae", "text_encoder", "text_encoder_2" or "tuned_unet" in a source.

    Raises FileNotFoundError that names the files to get and where to put them.
    """
    place = Path(BASES.get(str(source), source))
    if place.is_file():
        return place
    if place.is_dir():
        found = find_in_folder(place, component)
        if found is None:
            raise FileNotFoundError(f"{place}: no {component}/config.json in it, nor a single file of weights")
        return found
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(place)) or str(source) == "tiny":
        raise FileNotFoundError(f"{place}: no such file or folder, nor the id of a hub repository")
    return find_in_hub(str(source), component)


def find_tokenizer(place: Path, name: str) -> Path:
    """The tokenizer's folder, given the place of its text encoder: next to it, else in the hub's local cache.

    All text encoders of SD1.5 and SDXL share one vocabulary. Raises FileNotFoundError.
    """
    siblings = [place.parent / name, place.parent / "tokenizer", place.parent]
    cached = [f / "tokenizer" for repo in (*SINGLE, *MOVED.values()) for f in snapshots(repo)]
    for folder in siblings + cached + snapshots("openai/clip-vit-large-patch14"):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
        if folder != place.parent and (folder / "tokenizer.json").is_file():  # all that transformers 5 writes
            return folder
    raise FileNotFoundError(
        f"{place}: no {name}/vocab.json next to it; put vocab.json and merges.txt of "
        f"huggingface.co/{BASES['sd15']}/tree/main/tokenizer into {siblings[1]}"
    )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError that names a tensor with NaN or infinite values, which would give black images."""
    if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
        low, high = tensor.aminmax()  # one pass without a temporary; a NaN is propagated
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"{name} contains NaN or infinite values")


def all_finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file; raises ValueError that names one with NaN or infinite values."""
    for key, tensor in tensors.items():
        check_finite(f"{path}: {key}", tensor)
    return tensors
