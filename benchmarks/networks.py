"""Networks with random weights, beside those of diffusers with the same weights in the same memory.

`diffusers` is imported where it is used, so that our side runs without it: then the other network of a pair is None.
"""

import importlib.util
import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import rewards
from pretrained import preprocess, reward_networks
from pretrained.configs import unet_dict, vae_dict
from scheduler import sample_noise
from training import cost
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

Pair = tuple[nn.Module, nn.Module | None]  # ours and diffusers'

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULE |= {"clip_sample": False, "timestep_spacing": "leading"}
FAST = {  # inductor's settings in diffusers' documentation of fast inference
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "epilogue_fusion": False,
    "coordinate_descent_check_all_directions": True,
}


def has_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def random_weights(shapes: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Weights that preserve a signal's variance, cut from one block of noise: billions of them in seconds."""
    block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).to(device)
    weights = {}
    for key, t in shapes.items():
        values = block.repeat(-(-t.numel() // len(block)))[: t.numel()].view(t.shape)
        if t.ndim > 1:
            values.mul_(t[0].numel() ** -0.5)
        else:
            values.mul_(0.1).add_(1) if key.endswith("weight") else values.mul_(0.05)
        weights[key] = values.clone()  # without the rest of the repeated block
    return weights


def pair(make: Callable[[], nn.Module], their_class: str, config: dict, device: str, theirs: bool = True) -> Pair:
    """Our network and diffusers', frozen, with the same random weights. `theirs=False`: only ours."""
    with torch.device("meta"):
        networks = [make()]
        if theirs and has_diffusers():
            import diffusers

            networks.append(getattr(diffusers, their_class).from_config(config))
    weights = random_weights(networks[0].state_dict(), device)
    for network in networks:
        network.load_state_dict(weights, assign=True)
        network.eval().requires_grad_(False)
    return networks[0], networks[1] if len(networks) > 1 else None


def unet_pair(config: UNetConfig, device: str, theirs: bool = True) -> Pair:
    return pair(lambda: UNet(config), "UNet2DConditionModel", unet_dict(config), device, theirs)


def vae_pair(config: VAEConfig, device: str, theirs: bool = True) -> Pair:
    return pair(lambda: VAE(config), "AutoencoderKL", vae_dict(config), device, theirs)


def to_dtype(networks: Pair, dtype: torch.dtype) -> Pair:
    """Convert both networks, which still share their memory."""
    networks[0].to(dtype)
    if networks[1] is not None:
        networks[1].load_state_dict(networks[0].state_dict(), assign=True)
    return networks


def trainable(network: nn.Module) -> nn.Module:
    """Give a network its own copy of its weights, and let them train."""
    network.load_state_dict({key: t.clone() for key, t in network.state_dict().items()}, assign=True)
    return network.requires_grad_(True)


def conditioning(config: UNetConfig, batch: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random text conditioning: the UNet's arguments other than latents and timestep."""
    generator, shapes = torch.Generator().manual_seed(1), cost.fake_conditioning(config, batch, dtype)
    c = {key: sample_noise(t.shape, generator, device).to(t.dtype) for key, t in shapes.items()}
    if "time_ids" in c:
        c["time_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device=device).expand(batch, -1)
    return c


def diffusers_arguments(c: dict[str, Tensor]) -> dict:
    """The same conditioning as the arguments of diffusers' UNet."""
    arguments = {"encoder_hidden_states": c["context"], "return_dict": False}
    if "pooled" in c:
        arguments["added_cond_kwargs"] = {"text_embeds": c["pooled"], "time_ids": c["time_ids"]}
    return arguments


def compile_diffusers(network: nn.Module, method: str = "forward", mode: str | None = "max-autotune") -> nn.Module:
    """Compile a network of diffusers, in place, as its documentation of fast inference does."""
    network.to(memory_format=torch.channels_last)
    if method == "forward":
        network.fuse_qkv_projections()
    compiled = torch.compile(getattr(network, method), mode=mode, fullgraph=True)

    def first_call(*args, **kwargs):  # compiles with their settings; our networks keep inductor's defaults
        with torch._inductor.config.patch(FAST if mode == "max-autotune" else {}):
            output = compiled(*args, **kwargs)
        setattr(network, method, compiled)
        return output

    setattr(network, method, first_call)
    return network


def random_reward(name: str, device: str, folder=None) -> rewards.Reward:
    """The reward `name` with random weights, which scores for one fixed prompt. `folder`: see `build_meta`."""
    network = reward_networks.build_meta(name, folder)
    reward_networks.load_strict(network, random_weights(network.state_dict(), "cpu"), "random weights")
    text = [t.to(device) for t in cost.text_features(network, 1)]

    def features(prompts: list[str], device: torch.device) -> list[Tensor]:
        return [t.expand(len(prompts), *t.shape[1:]) for t in text]

    return rewards.Reward(name, network.to(device), features, preprocess.preprocess)


def relative_difference(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected|, norms over all elements."""
    return ((x.float() - expected.float()).norm() / expected.float().norm()).item()


def check_equal(ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    """Their relative difference. Raises ValueError if it exceeds the tolerance."""
    difference = relative_difference(ours, theirs)
    if not difference <= tolerance:
        raise ValueError(f"ours and diffusers' differ by {difference:.1e} of the result; {tolerance:.0e} is allowed")
    return difference
