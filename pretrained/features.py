"""Feature extractors of the diversity metrics (Section 5.1): Inception for FID, DINO for DinoDiversity, and CLIP.

Each loader returns a function `images (B, 3, H, W) in [-1, 1] -> features (B, D)` in float32, without gradients.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, CLIPModel, Dinov2Model, ViTModel
from transformers.utils.logging import disable_progress_bar

from pretrained import hub
from pretrained.inception import load_inception
from pretrained.preprocess import CLIP_MEAN, CLIP_STD, preprocess
from pretrained.weight_files import all_finite, read_file

DINO = "facebook/dino-vits16"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

FeatureExtractor = Callable[[Tensor], Tensor]


def inception_features(path: str | Path, device="cpu") -> FeatureExtractor:
    """FID's features (B, 2048) from pytorch-fid's weight file.

    Raises FileNotFoundError, or ValueError for another network's file.
    """
    model = load_inception(path).to(device, torch.float32)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return model(images.to(device, torch.float32))

    return features


def is_dinov2(folder: str | Path) -> bool:
    return AutoConfig.from_pretrained(find_dino(folder)).model_type == "dinov2"


def dino_features(folder: str | Path, norm: str = "clip", device="cpu", unit: bool = True) -> FeatureExtractor:
    """DinoDiversity's features: the normalised class token of DINO ViT-S/16 (B, 384), or of a DINOv2 folder.

    The official code gives DINO the input of the rewards, normalised with CLIP's mean and std: `norm="clip"`. With
    `norm="imagenet"` the input is normalised as in DINO's training; FD-DINOv2 takes that, and with `unit=False` the
    class token is not normalised. Raises FileNotFoundError, or ValueError for a folder of another network.
    """
    mean, std = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}[norm]
    folder = find_dino(folder)
    file = _weight_file(folder, f"{DINO} (or facebook/dinov2-small)")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ("vit", "dinov2"):
        raise ValueError(f"{folder}: a {config.model_type} model, neither DINO (vit) nor DINOv2 (dinov2)")
    kind, options = {"vit": (ViTModel, {"add_pooling_layer": False}), "dinov2": (Dinov2Model, {})}[config.model_type]
    model = _load(kind, config, file, **options).to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = preprocess(images.to(device, torch.float32), 224, mean, std)
        token = model(pixel_values=x).last_hidden_state[:, 0]
        return F.normalize(token, dim=-1) if unit else token

    return features


def clip_features(folder: str | Path, device="cpu") -> FeatureExtractor:
    """Normalised image embeddings (B, D) of a CLIP folder: OpenAI's ViT-B/32, or the tiny base's own.

    Raises FileNotFoundError, or ValueError for a file with missing weights.
    """
    file = _weight_file(folder, "openai/clip-vit-base-patch32")
    config = AutoConfig.from_pretrained(folder)
    model = _load(CLIPModel, config, file).to(device)
    size = config.vision_config.image_size

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = preprocess(images.to(device, torch.float32), size, CLIP_MEAN, CLIP_STD)
        return F.normalize(model.visual_projection(model.vision_model(pixel_values=x).pooler_output), dim=-1)

    return features


def find_dino(source: str | Path) -> Path:
    """A folder of DINO: `source`, or that of a hub repository such as facebook/dino-vits16, cached or fetched.

    Raises FileNotFoundError where it cannot be fetched.
    """
    repo = str(source)
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        return Path(source)

    def choose(files: list[str]) -> list[str]:
        return [name for name in WEIGHTS if name in files][:1] + ["config.json"]

    if hub.cached(repo, *WEIGHTS) and hub.cached(repo, "config.json"):
        return hub.cached(repo, "config.json").parent
    try:
        return hub.fetch(repo, choose)
    except OSError as error:
        raise FileNotFoundError(
            f"{repo}: neither a folder nor in the hub's local cache, and no download: {error}"
        ) from None


def _weight_file(folder: str | Path, repository: str) -> Path:
    present = [f for f in (Path(folder, n) for n in WEIGHTS) if f.is_file()]
    if not present or not Path(folder, "config.json").is_file():
        need = f"download config.json and model.safetensors of the hub repository {repository} into it"
        raise FileNotFoundError(f"{folder}: holds no model; {need}")
    return present[0]


def _load(kind: type, config, file: Path, **options) -> torch.nn.Module:
    """A frozen transformers model. Raises ValueError when the file lacks a weight or has another shape for it."""
    disable_progress_bar()
    options |= {"state_dict": all_finite(read_file(file), file), "dtype": torch.float32}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = kind.from_pretrained(None, config=config, **options)
    if wrong := sorted(str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]]):
        raise ValueError(f"{file}: not a complete {kind.__name__}: {len(wrong)} weights do not fit, first {wrong[0]}")
    return model.eval().requires_grad_(False)
