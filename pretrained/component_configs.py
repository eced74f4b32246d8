"""Check a component's config.json before a network is built from it: fill in diffusers' defaults, refuse the rest.

A setting that changes the network and is not built here is an error that names the file, never ignored.
"""

UNET_DEFAULTS = {  # of diffusers' UNet2DConditionModel
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "norm_num_groups": 32,
    "transformer_layers_per_block": 1,
}
UNET_BUILT = {  # setting -> values that the UNet here computes; the first one is diffusers' default
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
VAE_DEFAULTS = {"block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32}
VAE_DEFAULTS |= {"scaling_factor": 0.18215}
VAE_BUILT = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0, 0.0),
    "mid_block_add_attention": (True,),
}
TEXT_NUMBERS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
TEXT_NUMBERS += ("max_position_embeddings", "projection_dim")


def check(config: dict, component: str, origin: str) -> dict:
    """Fill in a component's defaults. Raises ValueError that names its file, `origin`, and the setting."""
    kind = config.get("_class_name") or next(iter(_list(config.get("architectures"))), None)
    expected = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}.get(component, "CLIPTextModel")
    if kind is not None and not str(kind).startswith(expected):
        raise ValueError(f"{origin}: a config of {kind}, not of {expected}; is it in the right folder?")
    return {"unet": _unet, "vae": _vae}.get(component, _text)(config, origin)


def _unet(config: dict, origin: str) -> dict:
    config = UNET_DEFAULTS | {key: _one(value) if key in SINGLE else value for key, value in config.items()}
    _refuse(config, UNET_BUILT, origin)
    channels, down, up = (config[key] for key in ("block_out_channels", "down_block_types", "up_block_types"))
    _numbers(config, ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels"), origin)
    _numbers(config, ("norm_num_groups", "out_channels"), origin)
    if config["in_channels"] != config["out_channels"]:
        hint = {9: ": an inpainting UNet", 8: ": an image-editing UNet (InstructPix2Pix)"}.get(
            config["in_channels"], ""
        )
        raise ValueError(
            f"{origin}: in_channels {config['in_channels']}{hint}, which is not supported, only text-to-image"
        )
    mirror = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    if not isinstance(down, list) or [mirror.get(block) for block in reversed(down)] != up:
        raise ValueError(f"{origin}: down_block_types {down} with up_block_types {up} are not supported")
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    depths = config["transformer_layers_per_block"]
    for key, value in (("attention_head_dim", heads), ("transformer_layers_per_block", depths)):
        values = value if isinstance(value, list) else [value] * len(down)
        if len(values) != len(down) or not all(_is_count(n) for n in values):
            raise ValueError(f"{origin}: {key} {value} is not supported, only a number or one number per block")
    if len(channels) != len(down):
        raise ValueError(f"{origin}: {len(channels)} block_out_channels for {len(down)} down_block_types")
    return config | {"act_fn": "silu", "only_cross_attention": False}


def _vae(config: dict, origin: str) -> dict:
    config = VAE_DEFAULTS | config
    _refuse(config, VAE_BUILT, origin)
    _numbers(config, ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups"), origin)
    scale = config["scaling_factor"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
        raise ValueError(f"{origin}: scaling_factor {scale!r} is not a positive number")
    return config


def _text(config: dict, origin: str) -> dict:
    _numbers(config, [key for key in TEXT_NUMBERS if key in config], origin)
    if config.get("hidden_size", 512) % config.get("num_attention_heads", 8):
        raise ValueError(f"{origin}: hidden_size is not divisible by num_attention_heads")
    return config


SINGLE = ("layers_per_block", "cross_attention_dim", "only_cross_attention")  # may be written once per block


def _one(value: object) -> object:
    """The value of a list that repeats it, e.g. [2, 2, 2] -> 2; anything else unchanged."""
    same = isinstance(value, list) and value and all(item == value[0] for item in value)
    return value[0] if same else value


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _numbers(config: dict, keys: tuple | list, origin: str) -> None:
    for key in keys:
        values = config[key] if key == "block_out_channels" else [config[key]]
        if not isinstance(values, list) or not values or not all(_is_count(value) for value in values):
            raise ValueError(f"{origin}: {key} is {config[key]!r}; not supported")


def _refuse(config: dict, built: dict[str, tuple], origin: str) -> None:
    for key, allowed in built.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{origin}: {key} = {config[key]} is not supported; SD1.5 and SDXL are")
