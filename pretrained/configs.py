"""The `config.json` of diffusers <-> the configs of `unet.py` and `vae.py`."""

from pretrained.component_configs import UNET_BUILT, VAE_BUILT
from unet import UNetConfig
from vae import VAEConfig


def unet_config(config: dict) -> UNetConfig:
    """From a UNet's `config.json`. Raises ValueError for settings that `unet.py` does not implement."""
    for key, built in UNET_BUILT.items():
        if config.get(key, built[0]) not in built:
            raise ValueError(f"unet config: {key} = {config[key]} is not supported; SD1.5 and SDXL are")
    channels = tuple(config["block_out_channels"])
    depths = config.get("transformer_layers_per_block", 1)
    depths = depths if isinstance(depths, list) else [depths] * len(channels)
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    has_attention = [kind.startswith("CrossAttn") for kind in config["down_block_types"]]
    return UNetConfig(
        channels=channels,
        depths=tuple(depth if attends else 0 for depth, attends in zip(depths, has_attention, strict=True)),
        mid_depth=depths[-1],
        layers=config.get("layers_per_block", 2),
        heads=tuple(heads) if isinstance(heads, list) else (heads,) * len(channels),
        context=config.get("cross_attention_dim", 1280),
        latent_channels=config.get("in_channels", 4),
        groups=config.get("norm_num_groups", 32),
        linear_projection=config.get("use_linear_projection", False),
        pooled=config.get("projection_class_embeddings_input_dim") or 0,
        size_embedding=config.get("addition_time_embed_dim") or 256,
        sample_size=config.get("sample_size") or 64,
    )


def unet_dict(config: UNetConfig) -> dict:
    """As a `config.json` that diffusers' UNet2DConditionModel reads."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)]
    written = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.heads),  # diffusers' name for the number of heads
        "block_out_channels": list(config.channels),
        "cross_attention_dim": config.context,
        "down_block_types": down,
        "up_block_types": up,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "layers_per_block": config.layers,
        "norm_num_groups": config.groups,
        "sample_size": config.sample_size,
        "transformer_layers_per_block": [*(depth or 1 for depth in config.depths[:-1]), config.mid_depth],
        "use_linear_projection": config.linear_projection,
    }
    if config.pooled:
        written |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.size_embedding,
            "projection_class_embeddings_input_dim": config.pooled,
        }
    return written


def vae_config(config: dict) -> VAEConfig:
    """From an autoencoder's `config.json`. Raises ValueError for settings that `vae.py` does not implement."""
    for key, built in VAE_BUILT.items():
        if config.get(key, built[0]) not in built:
            raise ValueError(f"vae config: {key} = {config[key]} is not supported, only a scaling_factor")
    return VAEConfig(
        channels=tuple(config["block_out_channels"]),
        layers=config.get("layers_per_block", 1),
        latent_channels=config.get("latent_channels", 4),
        groups=config.get("norm_num_groups", 32),
        scale=config.get("scaling_factor", 0.18215),
    )


def vae_dict(config: VAEConfig) -> dict:
    """As a `config.json` that diffusers' AutoencoderKL reads."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale,
    }
