"""Tensor names in the layouts in which Stable Diffusion is published.

Our modules use the names of the diffusers layout. The functions `*_name` convert such a name to that of the single
files: LDM for SD1.5, SGM for SDXL. Only this direction is written down; to read a file, the names of a whole module
are converted and looked up in it. A table is a dict: name in the module -> name in the file.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from unet import UNetConfig
from vae import VAEConfig

# prefix of each component in a single file
UNET, UNET_EMA, VAE = "model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model."
CLIP_L, CLIP_L_SDXL, CLIP_G = (
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
)

OUTER_LAYERS = {  # of a UNet
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {  # of a UNet
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
AUTOENCODER = [
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]
OLD_ATTENTION = [  # of an autoencoder, in the diffusers layout
    (r"\.to_q\.", ".query."),
    (r"\.to_k\.", ".key."),
    (r"\.to_v\.", ".value."),
    (r"\.to_out\.0\.", ".proj_attn."),
]
PROJECTION = "text_projection.weight"
OPEN_CLIP = [
    (r"embeddings\.token_embedding\.", "token_embedding."),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"encoder\.layers", "transformer.resblocks"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"self_attn", "attn"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"final_layer_norm", "ln_final"),
]

# tensors that some files contain and no network here uses: of training, of CLIP's other half
UNUSED = re.compile(r"(loss|model_ema|vision_model)\.|visual_projection\.|text_projection|logit_scale")
SIGNATURES = [  # a key that only this kind of file has
    (r"\.(hada|lokr|oft)_|\.lora_(A|B|down|up|mid)\.|[._]lora(_linear_layer|_layer)?\.(down|up)\.", "a LoRA adapter"),
    (r"^conditioner\.embedders\.0\.model\.", "the SDXL refiner, which is not supported"),
    (r"^cond_stage_model\.model\.", "an SD2 file, which is not supported"),
    (r"double_blocks\.|joint_blocks\.", "a Flux or SD3 file, which is not supported"),
    (r"^conditioner\.|^model\.diffusion_model\.label_emb\.", "an SDXL single file; --base sdxl"),
    (r"^model\.diffusion_model\.", "an SD1.5 single file; --base sd15"),
    (r"^(unet\.)?add_embedding\.|^(diffusion_model\.)?label_emb\.", "an SDXL UNet; --base sdxl"),
    (r"^(unet\.)?time_embedding\.|^(diffusion_model\.)?time_embed\.", "an SD1.5 UNet; --base sd15"),
    (r"^(first_stage_model\.)?decoder\.", "an autoencoder"),
    (r"^text_projection", "the second text encoder of SDXL"),
    (r"embeddings\.token_embedding\.", "a CLIP text encoder"),
]


def rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply regular expressions in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def unet_name(key: str, config: UNetConfig) -> str:
    """The LDM / SGM name of a UNet's tensor: there all levels, samplers included, are one flat list of blocks."""
    block = re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", key)
    if not block:
        module, _, parameter = key.rpartition(".")
        return f"{OUTER_LAYERS[module]}.{parameter}"
    side, level, kind, j, rest = block[1], int(block[2] or 0), block[3], int(block[4]), block[5]
    if kind == "resnets":
        module, _, parameter = rest.rpartition(".")
        rest = f"{RESNET[module]}.{parameter}"
    place = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + bool(config.depths[-1 - level])}[kind]
    if side == "mid":
        return f"middle_block.{2 * j + place}.{rest}"
    block_index = level * (config.layers + 1) + (config.layers if kind.endswith("samplers") else j)
    if side == "up":
        return f"output_blocks.{block_index}.{place}.{rest}"
    return f"input_blocks.{block_index + 1}.{place}.{rest.replace('conv', 'op') if kind == 'downsamplers' else rest}"


def vae_name(key: str, levels: int) -> str:
    """The LDM name of an autoencoder's tensor; there decoder level 0 is the one at full resolution."""
    key = re.sub(r"(up_blocks)\.(\d+)", lambda m: f"{m[1]}.{levels - 1 - int(m[2])}", key)
    return rename(key, AUTOENCODER)


# A layout of a component: the prefix of its tensors in the file, and a table: name in the module -> name after it.
Layout = tuple[str, dict[str, str]]


def unet_layouts(keys: Iterable[str], config: UNetConfig) -> list[Layout]:
    """Every published layout of a UNet; the second one is that of the EMA copy in a single file."""
    same = {key: key for key in keys}
    names = {key: unet_name(key, config) for key in same}
    ema = {key: name.replace(".", "") for key, name in names.items()}
    return [("", same), (UNET_EMA, ema), (UNET, names), ("", names), ("diffusion_model.", names), ("unet.", same)]


def vae_layouts(keys: Iterable[str], config: VAEConfig) -> list[Layout]:
    """Every published layout of an autoencoder."""
    same = {key: key for key in keys}
    old = {key: rename(key, OLD_ATTENTION) for key in same}
    names = {key: vae_name(key, len(config.channels)) for key in same}
    return [("", same), ("", old), (VAE, names), ("", names), ("vae.", same)]


def text_layouts(keys: Iterable[str]) -> list[Layout]:
    """Every published layout of a CLIP text encoder, after `unfuse`. Only SDXL's second one has a projection."""
    bare = {key: key.removeprefix("text_model.") for key in keys}
    if PROJECTION in bare:
        open_clip = {key: rename(name, OPEN_CLIP) for key, name in bare.items()}
        return [("", {key: key for key in bare}), (CLIP_G, open_clip), ("", open_clip)]
    whole = {key: f"text_model.{name}" for key, name in bare.items()}
    return [("", whole), ("", bare), (CLIP_L, whole), (CLIP_L, bare), (CLIP_L_SDXL, whole), (CLIP_L_SDXL, bare)]


def best_layout(names: Iterable[str], layouts: list[Layout]) -> Layout:
    """The layout that shares the most names with a file; ties go to the first."""
    names = set(names)
    return max(layouts, key=lambda layout: sum(layout[0] + name in names for name in layout[1].values()))


def identify(names: Iterable[str]) -> str:
    """Describes a file from its tensor names, with the flag to load it."""
    text = "\n".join(names)
    return next((kind for pattern, kind in SIGNATURES if re.search(pattern, text, re.MULTILINE)), "nothing known here")


def unfuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split open_clip's fused q, k, v tensors and transpose its projection; all results are views.

    Drops two tensors that the text encoders do not use: `position_ids` (0, 1, 2, ...) and `logit_scale` (of the
    contrastive loss).
    """
    split = {}
    for key, tensor in tensors.items():
        if key.rpartition(".")[2] in ("position_ids", "logit_scale"):
            continue
        attention, fused, kind = key.rpartition(".attn.in_proj_")
        if fused:
            for name, part in zip("qkv", tensor.chunk(3), strict=True):
                split[f"{attention}.attn.{name}_proj.{kind}"] = part
        elif key == "text_projection" or key.endswith(".text_projection"):
            split[key + ".weight"] = tensor.T  # (D, P) -> (P, D)
        else:
            split[key] = tensor
    return split


def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unfuse`, for tensors in open_clip's names."""
    fused = {}
    for key, tensor in tensors.items():
        attention, found, rest = key.rpartition(".attn.q_proj.")
        if found:
            parts = [tensors[f"{attention}.attn.{name}_proj.{rest}"] for name in "qkv"]
            fused[f"{attention}.attn.in_proj_{rest}"] = torch.cat(parts)
        elif key.endswith("text_projection.weight"):
            fused[key.removesuffix(".weight")] = tensor.T
        elif not re.search(r"\.attn\.[kv]_proj\.", key):
            fused[key] = tensor
    return fused


def is_adapter(names: Iterable[str]) -> bool:
    """True if a file contains LoRA adapters."""
    return "LoRA" in identify(names)
