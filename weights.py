"""Find, read and check the files that hold a model, and write them.

Layouts: a diffusers pipeline folder (`unet/ vae/ text_encoder/ tokenizer/ scheduler/`) or one component's own folder.
Reading is strict: a missing, unexpected or misshaped key is an error; a pickle is never executed.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import state
from text import TextEncoder
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

BASES = {
    "tiny": str(Path(__file__).parent / "tiny" / "base"),
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


def read_file(path: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of one weight file, memory-mapped where the format allows.

    `.safetensors` is read as such; `.ckpt`, `.pt`, `.pth` and `.bin` by torch's restricted unpickler, which builds
    tensors and plain containers only; an outer `state_dict` is unwrapped. Raises FileNotFoundError, or ValueError
    when the file is damaged, is a Git LFS pointer, or would need code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com"):
            raise ValueError(
                f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` or download the file itself"
            )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - whatever the unpickler refuses, the file is not loaded
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: refused, holds more than plain tensors or is damaged ({reason})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a dictionary of tensors")
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def find(source: str | Path, component: str) -> Path:
    """The folder of one component of a pipeline. Raises FileNotFoundError that says what to get and where to put it."""
    folder = Path(BASES.get(str(source), source))
    for candidate in (folder / component, folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(f"{source}: no {component}/config.json in {folder}")


def load_strictly(module: nn.Module, tensors: dict, path: Path) -> None:
    """Assign every tensor to its key. Raises ValueError naming keys that are missing, unexpected or misshaped."""
    expected = module.state_dict()
    wrong = [f"missing {key}" for key in expected if key not in tensors]
    wrong += [f"unexpected {key}" for key in tensors if key not in expected]
    wrong += [
        f"{key} has shape {tuple(tensors[key].shape)} instead of {tuple(t.shape)}"
        for key, t in expected.items()
        if key in tensors and tensors[key].shape != t.shape
    ]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} keys do not fit: {'; '.join(wrong[:3])}")
    module.load_state_dict(tensors, assign=True)


def _load(kind: type, config: type, folder: Path, device: str, dtype: torch.dtype) -> nn.Module:
    settings = json.loads((folder / "config.json").read_text())
    path = folder / "diffusion_pytorch_model.safetensors"
    with torch.device("meta"):
        module = kind(config.from_dict(settings))
    load_strictly(module, {k: t.to(device, dtype) for k, t in read_file(path).items()}, path)
    return module.eval()


def load_unet(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> UNet:
    """The UNet of "tiny", "sd15", "sdxl", or of a folder (a pipeline's, or the component's own)."""
    return _load(UNet, UNetConfig, find(source, "unet"), device, dtype)


def load_vae(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """The autoencoder of "tiny", "sd15", "sdxl", or of a folder (a pipeline's, or the component's own)."""
    return _load(VAE, VAEConfig, find(source, "vae"), device, dtype)


def load_text(source: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> TextEncoder:
    """The text encoders and tokenizers of a pipeline folder, or of "tiny", "sd15", "sdxl"."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = find(source, "text_encoder")
    model = CLIPTextModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(folder.parent / "tokenizer", local_files_only=True)
    return TextEncoder([model], [tokenizer]).to(device)


def save_unet(unet: UNet, path: str | Path, dtype: torch.dtype = torch.float32, metadata: dict | None = None) -> None:
    """Write a UNet's folder (`config.json`, `diffusion_pytorch_model.safetensors`) in the diffusers layout."""
    tensors = {key: t.to("cpu", dtype) for key, t in unet.state_dict().items()}
    state.write(Path(path) / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"} | (metadata or {}))
    state.write_text(Path(path) / "config.json", json.dumps(unet.config.to_dict(), indent=1) + "\n")
