"""The autoencoder of Stable Diffusion: images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H/8, W/8).

Follows AutoencoderKL of the published checkpoints, in their key names (diffusers layout). The scaling factor is applied
only in this file: `sample` returns scaled latents and `decode` takes them. B batch, C channels, H, W sides.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scheduler import sample_noise
from unet import Upsample


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder, one entry per resolution. `scale` brings the latents to about unit variance."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2  # residual blocks per down block; an up block of the decoder has one more
    latent_channels: int = 4
    groups: int = 32
    scale: float = 0.18215


SD15 = VAEConfig()
SDXL = VAEConfig(scale=0.13025)
TINY = VAEConfig(
    channels=(16, 48, 96, 160), layers=1, latent_channels=16, groups=1, scale=1.0
)  # more groups lose the colour


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Self-attention over all positions, one head: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        q, k, v = (f(h).unsqueeze(1) for f in (self.to_q, self.to_k, self.to_v))  # (B, 1, HW, C)
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).reshape(B, C, H, W)


class MidBlock(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # pad right and bottom only, as the checkpoints expect


class DownBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        self.downsamplers = nn.ModuleList([Downsample(c_out)] * downsample)

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] * upsample)

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        c, last = config.channels, len(config.channels) - 1
        self.conv_in = nn.Conv2d(3, c[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [DownBlock(c[max(i - 1, 0)], c[i], config.layers, config.groups, i < last) for i in range(len(c))]
        )
        self.mid_block = MidBlock(c[-1], config.groups)
        self.conv_norm_out = nn.GroupNorm(config.groups, c[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        c, last = config.channels[::-1], len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, c[0], 3, padding=1)
        self.mid_block = MidBlock(c[0], config.groups)
        self.up_blocks = nn.ModuleList(
            [UpBlock(c[max(i - 1, 0)], c[i], config.layers + 1, config.groups, i < last) for i in range(len(c))]
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, c[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c[-1], 3, 3, padding=1)
        self.checkpointing = False  # True: recompute each layer in the backward pass to save memory

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for layer in (layer for block in self.up_blocks for layer in [*block.resnets, *block.upsamplers]):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """The autoencoder: images (B, 3, H, W) in [-1, 1] <-> latents."""

    def __init__(self, config: VAEConfig = SD15):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def factor(self) -> int:
        """Downsampling factor: pixels per latent along each side."""
        return 2 ** (len(self.config.channels) - 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the unscaled posterior, each (B, C, H/8, W/8).

        Raises ValueError if H or W is not divisible by the downsampling factor.
        """
        H, W = images.shape[-2:]
        if H % self.factor or W % self.factor:
            raise ValueError(f"image sides must be multiples of {self.factor}, got {H}x{W}")
        mean, logvar = self._in_own_dtype(lambda x: self.quant_conv(self.encoder(x)), images).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def draw(self, mean: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample scaled latents, float32, from the posterior that `encode` returns."""
        noise = sample_noise(mean.shape, generator, mean.device)
        return (mean.float() + (0.5 * logvar.float()).exp() * noise) * self.config.scale

    def sample(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, H/8, W/8), sampled from the posterior."""
        return self.draw(*self.encode(images), generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, H/8, W/8) -> images (B, 3, H, W), about [-1, 1], not clamped."""
        return self._in_own_dtype(lambda z: self.decoder(self.post_quant_conv(z)), latents / self.config.scale)

    def _in_own_dtype(self, half: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Encode or decode x in the dtype of the weights.

        Autocast would run GroupNorm of bf16 weights in float32, doubling memory and time.
        """
        dtype = self.quant_conv.weight.dtype
        if dtype == torch.float32:
            return half(x.float())
        with torch.autocast(x.device.type, enabled=False):
            return half(x.to(dtype))
