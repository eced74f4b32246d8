"""All networks of a run: the UNet that trains, and the frozen ones around it."""

import copy
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import rewards
from pretrained import lora
from pretrained.features import clip_features, dino_features
from training import presets
from unet import UNet
from utils import acceleration
from utils.device import autocast, frozen_dtype
from weights import load_text, load_unet, load_vae


@dataclass
class Models:
    """`unet` trains (its `parameters`), everything else is frozen; None for what a method does not need."""

    unet: UNet
    parameters: list[nn.Parameter]
    vae: nn.Module
    text: Callable
    base: Callable | None = None  # samples with the base model
    reference: Callable | None = None  # the base model as a loss calls it (DPO, KL)
    tuned: Callable | None = None  # samples with the model in training
    net: Callable | None = None  # `unet`, or its compiled version
    reward: Callable | None = None
    judge: Callable | None = None  # the held-out reward
    features: Callable | None = None  # images -> features for the diversity
    modules: dict[str, nn.Module] = field(default_factory=dict)  # what a checkpoint holds


def generator_of(*numbers: int) -> torch.Generator:
    """A generator seeded from (seed, update, micro-batch), so that draws do not depend on history."""
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + n + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def load_models(args: Namespace, preset: presets.Preset) -> Models:
    """The networks of a reward fine-tuning run. Raises ValueError if `--compile` would change a gradient."""
    device, dtype = args.device, frozen_dtype(args)
    m = load_frozen(args, preset)
    speed = acceleration.speed("--shard" if args.shard else "--compile" if args.compile else None)
    if args.lora:
        m.unet = load_unet(args.base, device, dtype)
        m.parameters = lora.add(m.unet, args.lora, generator=generator_of(args.seed))
        m.base, m.tuned = lora.base_and_tuned(speed.fuse(m.unet) if speed else m.unet)  # share one set of weights
    else:
        m.unet = load_unet(args.base, device, torch.float32)
        m.base = copy.deepcopy(m.unet).requires_grad_(False)
        if not calls_base(args):  # else rounded as the UNet in training is
            m.base.to("cpu", dtype)  # moved to the GPU while it samples
            if speed:
                m.base = speed.fuse(m.base) if device != "cpu" or args.compile else speed.for_sampling(m.base)
        m.parameters, m.tuned = list(m.unet.parameters()), m.unet
    m.unet.checkpointing = "unet" in (args.checkpointing or "")
    m.vae.decoder.checkpointing = "decoder" in (args.checkpointing or "")
    m.net = m.unet
    if args.compile:
        compile_networks(args, m, speed)
    if args.shard:
        speed.shard(m.unet)
        m.parameters = list(m.unet.parameters())
    if calls_base(args):
        m.reference = speed.reference(m.base, m.unet) if speed else m.base
    m.modules = {"unet": nn.ParameterList(m.parameters) if args.lora else m.unet}
    return m


def calls_base(args: Namespace) -> bool:
    """Whether the loss calls the base model, so that it stays on the device."""
    return args.method == "dpo" or bool(args.kl_scale)


def load_frozen(args: Namespace, preset: presets.Preset | None) -> Models:
    """The frozen networks: text encoder and autoencoder; with a preset also reward, held-out reward and features."""
    device, dtype = args.device, frozen_dtype(args)
    speed = acceleration.speed()
    vae = load_vae(args.base, device, dtype).requires_grad_(False)
    m = Models(None, [], speed.fuse(vae) if speed else vae, load_text(args.base, device, dtype))
    if preset:
        reward_dtype = dtype if dtype != torch.float32 else None
        m.reward = rewards.build(args.reward, args.reward_weights, device, reward_dtype)
        m.judge = rewards.build(args.judge, args.judge_weights, device) if args.judge else None
        if args.dino:
            m.features = dino_features(args.dino, device=device)
        elif preset is presets.TINY:
            m.features = clip_features(presets.FEATURES, device)
    if args.text_on_cpu:
        for part in (m.text, *(reward for total in (m.reward, m.judge) if total for reward in total.rewards)):
            part.on_cpu()
    return m


def accelerate(args: Namespace, m: Models, optimizer: torch.optim.Optimizer) -> Callable:
    """The UNet as the losses call it: with `speed/`, its no-grad steps run on an inference-optimised copy."""
    speed = acceleration.speed()
    if speed is None:
        return m.net
    unet = speed.for_training(m.net, m.unet, optimizer, frozen_dtype(args), args.compile, bool(args.lora))
    if args.shard:
        m.tuned = unet.copy
    return unet


def compile_networks(args: Namespace, m: Models, speed) -> None:
    """Compile the UNet and the decoder. Raises ValueError where that changes their gradients."""
    side = args.resolution // m.vae.factor
    x = torch.randn(args.batch_size, m.vae.config.latent_channels, side, side, generator=generator_of(args.seed))
    x = x.to(args.device).requires_grad_()
    c = m.text(["a"] * args.batch_size, (args.resolution, args.resolution))
    compiled = speed.compile_for_training(
        m.unet, m.vae, m.parameters, x, c, lambda: autocast(args.device, args.dtype), bool(args.lora)
    )
    m.net, m.vae.decode = compiled
