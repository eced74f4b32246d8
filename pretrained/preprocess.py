"""Images (B, 3, H, W) in [-1, 1] -> the normalised square pixels that CLIP, BLIP and DINO take."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: Tensor, size: int, mean: tuple = CLIP_MEAN, std: tuple = CLIP_STD) -> Tensor:
    """Resize the shorter side to `size` (antialiased bicubic), centre crop, normalise: (B, 3, size, size), float32.

    The paper's preprocessing for every reward, differentiable and equal to torchvision's. Bicubic overshoots [0, 1] by
    a few percent, which is not clamped.
    """
    x = unit_range(images)
    H, W = (size * side // min(x.shape[-2:]) for side in x.shape[-2:])
    if (H, W) != x.shape[-2:]:
        x = F.interpolate(x, (H, W), mode="bicubic", align_corners=False, antialias=True)
    top, left = round((H - size) / 2), round((W - size) / 2)
    x = x[..., top : top + size, left : left + size]
    channels = zip(x.unbind(1), mean, std, strict=True)
    return torch.stack([(channel - m) / s for channel, m, s in channels], 1)  # scalars avoid a host-to-device copy


def preprocess_padded(images: Tensor, size: int) -> Tensor:
    """HPSv2's own preprocessing, differentiable: longest side to `size`, black borders, CLIP statistics."""
    x = unit_range(images)
    scale = size / max(x.shape[-2:])
    height, width = round(x.shape[-2] * scale), round(x.shape[-1] * scale)
    x = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return normalise(F.pad(x, (left, size - width - left, top, size - height - top)))


def preprocess_8bit(images: Tensor, size: int) -> Tensor:
    """The other repositories' own preprocessing: as `preprocess`, but by Pillow in 8 bits, so not differentiable."""
    pixels = []
    for image in (unit_range(images) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        height, width = shorter_side(*image.shape[:2], size)
        resized = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        top, left = round((height - size) / 2), round((width - size) / 2)
        pixels.append(torch.from_numpy(resized[top : top + size, left : left + size]).permute(2, 0, 1) / 255)
    return normalise(torch.stack(pixels).to(images.device))


def unit_range(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped as in the paper's code; float32, the only dtype that antialiasing has on a CPU."""
    return (images.float() / 2 + 0.5).clamp(0, 1)


def normalise(x: Tensor) -> Tensor:
    """Subtract CLIP's mean and divide by its standard deviation; BLIP has the same."""
    return (x - x.new_tensor(CLIP_MEAN)[:, None, None]) / x.new_tensor(CLIP_STD)[:, None, None]


def shorter_side(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the shorter side resized to `size`, the longer truncated as torchvision does."""
    return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
