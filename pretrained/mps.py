"""MPS (github.com/Kwai-Kolors/MPS): CLIP with a cross-attention model on top, and the reader of its checkpoint.

The checkpoint is a pickled nn.Module; `read_pickled` extracts its tensors without importing or running any class that
it names. Module names are the checkpoint's keys.
Shapes: B pairs, L image tokens, S text tokens, D joint width, H = D / 64 heads.
"""

import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel

from pretrained import weight_files
from utils.device import to_device

HEAD = 64  # width of a head; all heads of a layer share one key and one value of this width


class Rotary(nn.Module):
    """Rotary positions over the token index; feature i is paired with feature i + 32."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, HEAD, 2) / HEAD))

    def forward(self, x):  # (B, H, L, 64)
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * self.inv_freq  # (L, 32)
        angle = torch.cat((angle, angle), dim=-1)  # (L, 64)
        left, right = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat((-right, left), dim=-1) * angle.sin()


class SwiGLU(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


def attention(q, k, v, mask=None):
    """Attention of H query heads (B, L, D) to one shared key and value head (B, S, 64) -> (B, L, D)."""
    q = q.unflatten(-1, (-1, HEAD)).transpose(1, 2)  # (B, L, D) -> (B, H, L, 64)
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))  # (B, S, 64) -> (B, H, S, 64)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class CrossBlock(nn.Module):
    """Cross-attention from image tokens to the kept text tokens, and a feed-forward in parallel."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)  # its bias is a buffer of zeros in the checkpoint
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * HEAD, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.ff = nn.Sequential(nn.Linear(dim, 8 * dim, bias=False), SwiGLU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x, text, keep):
        h = self.norm(x)  # (B, L, D)
        k, v = self.to_kv(text).chunk(2, dim=-1)  # (B, S, 64) each; the text is not normalised
        return self.to_out(attention(self.to_q(h), k, v, keep[:, None, None])) + self.ff(h)


class SelfBlock(nn.Module):
    """Self-attention of image tokens; attention and a parallel feed-forward share one input projection."""

    def __init__(self, dim: int):
        super().__init__()
        self.split = (dim, HEAD, HEAD, 8 * dim)
        self.norm = nn.LayerNorm(dim)
        self.rotary_emb = Rotary()
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.split), bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x):
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.split, dim=-1)
        q = self.rotary_emb(q.unflatten(-1, (-1, HEAD)).transpose(1, 2)).transpose(1, 2).flatten(2)
        k = self.rotary_emb(k[:, None])[:, 0]
        return self.attn_out(attention(q, k, v)) + self.ff_out(ff)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x, *context):
        return x + self.fn(x, *context)


class CrossModel(nn.Module):
    """Four layers of both blocks: image tokens (B, L, D), text (B, S, D), keep (B, S) -> (B, L, D)."""

    def __init__(self, dim: int, layers: int = 4):
        super().__init__()
        pairs = [nn.ModuleList([Residual(CrossBlock(dim)), Residual(SelfBlock(dim))]) for _ in range(layers)]
        self.layers = nn.ModuleList(pairs)

    def forward(self, x, text, keep):
        for cross, own in self.layers:
            x = own(cross(x, text, keep))
        return x


class MPS(nn.Module):
    """exp(logit_scale) * cos(text, image), where the image attends to the prompt's tokens that match the condition.

    A token is kept if its similarity to the condition, divided by the prompt's maximum, exceeds `threshold`: 0.01 in
    the published model and the paper's code, 0.3 in MPS's own evaluation. The published code divides by the batch's
    maximum instead, so there a score depends on the rest of the batch.
    """

    dtype = torch.float32
    condition = (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, "
        "instance, texture, quantity, attributes, position, number, location, word, things."
    )

    def __init__(self, config: CLIPConfig, threshold: float = 0.01):
        super().__init__()
        self.model, self.cross_model = CLIPModel(config), CrossModel(config.projection_dim)
        self.config, self.length = config, config.text_config.max_position_embeddings
        self.threshold, self.condition_ids = threshold, None  # (1, S), set by `PromptFeatures`

    def encode_text(self, ids, mask):
        """-> projected text tokens (B, S, D), kept tokens (B, S), end-token features (B, D).

        The mask is unused: the model was trained with visible padding.
        """
        out = self.model.text_model(torch.cat((ids, to_device(self.condition_ids, ids.device))))
        tokens = self.model.text_projection(out.last_hidden_state)  # (B + 1, S, D), after the final norm
        similarity = (tokens[:-1] @ tokens[-1].T).amax(-1)  # (B, S, S') -> (B, S)
        keep = similarity / similarity.amax(-1, keepdim=True) > self.threshold
        return tokens[:-1], keep, self.model.text_projection(out.pooler_output[:-1])

    def encode_image(self, pixels):
        """-> projected image tokens (B, L, D), before the last norm."""
        with torch.autocast(pixels.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            states = self.model.vision_model(pixel_values=pixels).last_hidden_state
        return self.model.visual_projection(states.float())  # (B, L, Wv) -> (B, L, D)

    def forward(self, pixels, tokens, keep, text):
        image = self.cross_model(self.encode_image(pixels), tokens, keep)[:, 0]  # (B, L, D) -> (B, D)
        return F.cosine_similarity(text, image, dim=-1) * self.model.logit_scale.exp()


# ------------------------------------------------------------------------------------- reading the checkpoint


class Stub:
    """Placeholder for any class of the pickle: ignores arguments and stores the state."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state)


def tensors(module: Stub, prefix: str = ""):
    """Yields (key, tensor) as `state_dict()` would: parameters, persistent buffers, then the children's."""
    transient = module._non_persistent_buffers_set
    own = {**module._parameters, **{k: v for k, v in module._buffers.items() if k not in transient}}
    yield from ((prefix + key, value.detach()) for key, value in own.items() if value is not None)
    for name, child in module._modules.items():
        if child is not None:
            yield from tensors(child, f"{prefix}{name}.")


# packages of the classes in an MPS module
KNOWN = ("trainer.", "transformers.", "torch.nn.modules.", "torch._C._nn.")


def read_pickled(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a pickled `nn.Module`, read with placeholders for its classes.

    torch's restricted unpickler maps every class named in the file to `Stub`, so no code of the file, the package
    `trainer` or transformers 4.27 is executed. Raises ValueError for a file of torch's old format, or one that names
    anything outside KNOWN.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: refused, not a zip checkpoint; get MPS_overall_checkpoint.pth again")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = sorted(name for name in names if not name.startswith(KNOWN))
        if foreign:
            raise ValueError(f"it names {foreign[0]}")
        with torch.serialization.safe_globals([(type("Stub", (Stub,), {}), name) for name in names]):
            return dict(tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=True)))
    except Exception as error:  # noqa: BLE001 - whatever the unpickler raises, the file is refused
        raise ValueError(f"{path}: refused, not a pickled MPS module ({weight_files.pickle_error(error)})") from None
