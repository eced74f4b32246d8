"""The noise predictor of Stable Diffusion: SD1.5, SDXL and the tiny base from one class.

Follows UNet2DConditionModel of the published checkpoints, in their key names (diffusers layout), so that loading is
`load_state_dict(strict=True)`. B batch, C channels, H, W sides, L = HW tokens, S text tokens, D their width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet, one entry per resolution. Depth 0 = no attention at that resolution."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks after each residual block
    mid_depth: int = 1
    layers: int = 2  # residual blocks per down block; an up block has one more
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context: int = 768  # width of the text embeddings
    latent_channels: int = 4
    groups: int = 32
    linear_projection: bool = False  # in and out of transformers: linear layers (SDXL) or 1x1 convolutions (SD1.5)
    pooled: int = 0  # width of pooled text plus size embeddings (SDXL); 0 = none
    size_embedding: int = 256  # width of the embedding of each number in `time_ids`
    sample_size: int = 64  # side of the latents in training


SD15 = UNetConfig()
SDXL = UNetConfig(
    channels=(320, 640, 1280),
    depths=(0, 2, 10),
    mid_depth=10,
    heads=(5, 10, 20),
    context=2048,
    linear_projection=True,
    pooled=2816,
    sample_size=128,
)
TINY = UNetConfig(
    channels=(96, 160, 192),
    depths=(1, 1, 0),
    layers=1,
    heads=(4, 4, 4),
    context=128,
    latent_channels=16,
    groups=8,
    sample_size=8,
)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) of numbers (B,): cosines, then sines, with wavelengths 2 pi to 20,000 pi."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """MLP on the sinusoidal timestep embedding."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_out)
        self.linear_2 = nn.Linear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, c_emb: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C_in, H, W), emb (B, C_emb), the time embedding after SiLU -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Multi-head attention of tokens x (B, L, C) to context (B, S, D); self-attention where context is x."""

    def __init__(self, c: int, c_context: int, heads: int):
        super().__init__()
        self.heads, self.attention = heads, F.scaled_dot_product_attention  # softmax(q k^T / sqrt(c)) v
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(c_context, c, bias=False)
        self.to_v = nn.Linear(c_context, c, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, L, C = x.shape
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (t.view(B, -1, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))  # (B, heads, L, c)
        return self.to_out[0](self.attention(q, k, v).transpose(1, 2).reshape(B, L, C))


class GEGLU(nn.Module):
    def __init__(self, c: int, c_out: int):
        super().__init__()
        self.proj = nn.Linear(c, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)]
        )  # index 1: dropout in the checkpoints' names

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, c: int, c_context: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(c)
        self.attn1 = Attention(c, c, heads)
        self.norm2 = nn.LayerNorm(c)
        self.attn2 = Attention(c, c_context, heads)
        self.norm3 = nn.LayerNorm(c)
        self.ff = FeedForward(c)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Pointwise(nn.Conv2d):
    """A 1x1 convolution applied to tokens (B, L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class Transformer(nn.Module):
    def __init__(self, c: int, depth: int, heads: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c) if config.linear_projection else Pointwise(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, config.context, heads) for _ in range(depth)])
        self.proj_out = nn.Linear(c, c) if config.linear_projection else Pointwise(c, c, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, L, C)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """2x nearest-neighbour upsampling, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """Residual blocks at one resolution, each followed by a transformer if depth > 0."""

    def __init__(self, c_ins: list[int], c: int, depth: int, heads: int, c_emb: int, config: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c_in, c, c_emb, config.groups) for c_in in c_ins])
        self.attentions = nn.ModuleList([Transformer(c, depth, heads, config) for _ in c_ins if depth])

    def layer(self, i: int, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """Residual block i and its transformer."""
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, context) if self.attentions else x


class DownBlock(Block):
    def __init__(self, c_in: int, c: int, depth: int, heads: int, c_emb: int, config: UNetConfig, downsample: bool):
        super().__init__([c_in] + [c] * (config.layers - 1), c, depth, heads, c_emb, config)
        self.downsamplers = nn.ModuleList([Downsample(c)] * downsample)


class MidBlock(Block):
    def __init__(self, c: int, depth: int, heads: int, c_emb: int, config: UNetConfig):
        super().__init__([c], c, depth, heads, c_emb, config)
        self.resnets.append(ResnetBlock(c, c, c_emb, config.groups))


class UpBlock(Block):
    def __init__(
        self, c_ins: list[int], c: int, depth: int, heads: int, c_emb: int, config: UNetConfig, upsample: bool
    ):
        super().__init__(c_ins, c, depth, heads, c_emb, config)
        self.upsamplers = nn.ModuleList([Upsample(c)] * upsample)


class UNet(nn.Module):
    """eps_theta(x_t, t, c). `checkpointing = True` recomputes each layer in the backward pass to save memory."""

    def __init__(self, config: UNetConfig = SD15):
        super().__init__()
        self.config = config
        self.checkpointing = False
        c, depths, heads, last = config.channels, config.depths, config.heads, len(config.channels) - 1
        c_emb = 4 * c[0]
        self.conv_in = nn.Conv2d(config.latent_channels, c[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(c[0], c_emb)
        if config.pooled:
            self.add_embedding = TimestepEmbedding(config.pooled, c_emb)

        skips = [c[0]]  # channels of the skip connections
        self.down_blocks = nn.ModuleList()
        for i in range(len(c)):
            self.down_blocks.append(DownBlock(c[max(i - 1, 0)], c[i], depths[i], heads[i], c_emb, config, i < last))
            skips += [c[i]] * (config.layers + (i < last))
        self.mid_block = MidBlock(c[-1], config.mid_depth, heads[-1], c_emb, config)
        self.up_blocks = nn.ModuleList()
        width = c[-1]
        for i in reversed(range(len(c))):
            c_ins = [(width if j == 0 else c[i]) + skips.pop() for j in range(config.layers + 1)]
            self.up_blocks.append(UpBlock(c_ins, c[i], depths[i], heads[i], c_emb, config, i > 0))
            width = c[i]
        self.conv_norm_out = nn.GroupNorm(config.groups, c[0], eps=1e-5)
        self.conv_out = nn.Conv2d(c[0], config.latent_channels, 3, padding=1)

    def embed(self, t: Tensor, pooled: Tensor | None, time_ids: Tensor | None) -> Tensor:
        """Time embedding (B, 4 C) of timesteps (B,), for SDXL also of pooled text (B, P) and time_ids (B, 6)."""
        emb = self.time_embedding(timestep_embedding(t, self.config.channels[0]))
        if self.config.pooled:
            if pooled is None or time_ids is None:
                raise ValueError("this is an SDXL UNet: it needs `pooled` text embeddings and `time_ids`")
            sizes = timestep_embedding(time_ids.flatten(), self.config.size_embedding).view(len(t), -1)  # (B, 6 * 256)
            emb = emb + self.add_embedding(torch.cat([pooled, sizes.to(pooled.dtype)], dim=-1))
        return emb

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | int,
        context: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Predicts the noise in noised latents.

        latents (B, C, H, W); timesteps a scalar or (B,), in 0..999; context (B, S, D); SDXL also takes pooled (B, 1280)
        and time_ids (B, 6). Returns (B, C, H, W). Raises ValueError if H or W is not divisible by the downsampling.
        """
        B, _, H, W = latents.shape
        multiple = 2 ** (len(self.config.channels) - 1)
        if H % multiple or W % multiple:
            raise ValueError(f"latent sides must be multiples of {multiple}, got {H}x{W}")
        if not isinstance(timesteps, Tensor):
            timesteps = torch.full((B,), timesteps, device=latents.device)  # created there: no host-to-device copy
        emb = F.silu(self.embed(timesteps.to(latents.device).expand(B), pooled, time_ids))
        layer = self._checkpointed if self.checkpointing and torch.is_grad_enabled() else Block.layer

        x = self.conv_in(latents.to(self.conv_in.weight.dtype))
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = layer(block, i, x, emb, context)
                skips.append(x)
            for down in block.downsamplers:
                x = down(x)
                skips.append(x)

        x = layer(self.mid_block, 0, x, emb, context)
        x = self.mid_block.resnets[1](x, emb)

        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = layer(block, i, torch.cat([x, skips.pop()], dim=1), emb, context)
            for up in block.upsamplers:
                x = up(x)

        return self.conv_out(F.silu(self.conv_norm_out(x)))

    @staticmethod
    def _checkpointed(*args) -> Tensor:
        return checkpoint(Block.layer, *args, use_reentrant=False, preserve_rng_state=False)
