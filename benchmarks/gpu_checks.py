"""Group (a) of `gpu.py`: whether the code is right on the device, against float32, autocast and diffusers.

Each row returns a dict of results; its key `failed` lists the checks that did not hold.
"""

import copy
import gc
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import speed
import unet as unets
import vae as vaes
from benchmarks import networks, updates
from benchmarks.networks import relative_difference
from pretrained import reward_networks
from scheduler import sample_noise
from training.models import accelerate
from utils.device import autocast, default_dtype, frozen_dtype

METHODS = ("imagerefl", "refl")
MINI = unets.UNetConfig((16, 32), (1, 0), 1, 1, (2, 2), context=128, latent_channels=4, groups=4, sample_size=8)
MINI_VAE = vaes.VAEConfig((4, 4, 4, 8), 1, 4, 1)  # of a rehearsal, like MINI
REWARDS = ("hpsv2.1", "pickscore", "imagereward", "mps", "clipscore")


class Session:
    """Sizes, device and what one row leaves for a later one."""

    def __init__(self, args: Namespace, about: dict):
        self.device, self.tiny, self.about = args.device, args.sizes == "tiny", about
        self.dtype = torch.bfloat16 if default_dtype(args.device) == "bfloat16" else torch.float32
        sizes = (MINI, MINI_VAE, 8, 2) if self.tiny else (unets.SD15, vaes.SD15, 64, 8)
        self.task = updates.Task(*sizes, 1, args.device, "tiny" if self.tiny else "hpsv2.1")
        sdxl = (MINI, MINI_VAE, 8) if self.tiny else (unets.SDXL, vaes.SDXL, 64)
        self.sdxl = updates.Task(*sdxl, 1, 1, args.device, self.task.reward, checkpointing=True)
        self.repeats, self.updates = (1, 4) if self.tiny else (3, 50)
        self.tflop: dict[str, float] = {}  # of a side's call, counted once

    def reward(self):
        reward = self.task.load_reward()
        updates.to_training_dtype(self.task, reward)
        return reward

    def free(self) -> None:
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()


def check(values: dict, name: str, difference: float, limit: float) -> None:
    """Add a relative difference to the values of a row; a failure if it is above the limit, or not a number."""
    values[name] = f"{difference:.2g} (limit {limit:.2g})"
    if not difference <= limit:
        values.setdefault("failed", []).append(name)


def limit_of(autocast_result: Tensor, exact: Tensor) -> float:
    """Twice the error of plain autocast against float32: what bf16 itself costs, and some room."""
    return 2 * relative_difference(autocast_result, exact) + 1e-3


@torch.no_grad()
def check_network(s: Session, pair: networks.Pair, call: Callable, theirs: Callable) -> dict:
    """A frozen network in bf16, eager and compiled, against float32. `call(network, dtype)` runs it."""
    values, exact = {}, call(pair[0], torch.float32)
    if pair[1] is not None:
        check(values, "diffusers, float32", relative_difference(theirs(pair[1]), exact), 1e-4)
    with autocast(s.device):
        limit = limit_of(call(pair[0], torch.float32), exact)
    for name, compiled in (("bf16", False), ("bf16 compiled", True)):
        network = copy.deepcopy(pair[0]).to(s.dtype)
        speed.for_sampling(network if isinstance(network, unets.UNet) else network.decoder, compiled)
        check(values, name, relative_difference(call(network, s.dtype), exact), limit)
    return values


def unet_inputs(s: Session, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = sample_noise(s.task.latent_shape(s.task.batch), torch.Generator().manual_seed(2), s.device)
    t = torch.full((len(x),), 500, device=s.device)
    return x, t, networks.conditioning(s.task.unet, len(x), s.device, dtype)


def a_unet(s: Session) -> dict:
    x, t, c = unet_inputs(s, torch.float32)
    return check_network(
        s, networks.unet_pair(s.task.unet, s.device),
        lambda unet, dtype: unet(x, t, c["context"].to(dtype)),
        lambda unet: unet(x, t, **networks.diffusers_arguments(c))[0],
    )  # fmt: skip


def a_decoder(s: Session) -> dict:
    z, scale = unet_inputs(s, torch.float32)[0][:2], s.task.vae.scale
    pair = networks.vae_pair(s.task.vae, s.device)
    return check_network(s, pair, lambda vae, _: vae.decode(z), lambda vae: vae.decode(z / scale, return_dict=False)[0])


def a_rewards(s: Session) -> dict:
    values = {}
    images = s.task.batch_of(1)["images"].requires_grad_()
    for name in ("tiny", "tiny2") if s.tiny else REWARDS:
        reward = replace(s.task, reward=name).load_reward()

        def gradient(reward=reward) -> Tensor:
            return torch.autograd.grad(reward(images, ["octopus"]).sum(), images)[0]

        exact = gradient()
        reward.network.dtype = s.dtype  # the vision tower under autocast, its weights still float32
        limit = limit_of(gradient(), exact)
        if s.dtype == torch.bfloat16:
            reward_networks.to_bf16(reward.network, s.dtype)
        check(values, name, relative_difference(gradient(), exact), limit)
        del reward, gradient
        s.free()
    return values


def training_loss(s: Session, task: updates.Task, reward) -> Callable[[str, dict, int], tuple[Tensor, list]]:
    """(method, batch, seed) -> loss and parameters, with the networks, copy and precision of `train.py`."""
    m = updates.our_models(task, task.args(), reward)
    unet = accelerate(task.args(), m, torch.optim.AdamW(m.parameters))

    def loss(method: str, batch: dict, seed: int) -> tuple[Tensor, list]:
        with autocast(s.device):
            return updates.our_loss(method, task, unet, m.vae, reward, **batch, seed=seed), m.parameters

    return loss


def a_updates(s: Session) -> dict:
    values, task, plain = {}, replace(s.task, batch=1), {}
    reward, batch = task.load_reward(), task.batch_of(1)
    m = updates.our_models(task, task.args(dtype="float32"), reward)
    for method in METHODS:
        for dtype in ("float32", task.args().dtype):
            with autocast(s.device, dtype):
                loss = updates.our_loss(method, task, m.unet, m.vae, reward, **batch, seed=0)
            plain.setdefault(method, []).append(updates.gradient(loss, m.parameters))
    del m, loss
    updates.to_training_dtype(task, reward)
    loss_of = training_loss(s, task, reward)
    for method, (exact, under_autocast) in plain.items():
        gradient = updates.gradient(*loss_of(method, task.batch_of(1, frozen_dtype(task.args())), 0))
        check(values, method, relative_difference(gradient, exact), limit_of(under_autocast, exact))
    return values


def a_diffusers(s: Session) -> dict:
    reward = s.task.load_reward()
    return {method: f"{updates.check_gradient(method, s.task, reward):.2g} (limit 0.01)" for method in METHODS}


def a_no_wait(s: Session) -> dict:
    loss_of, values = training_loss(s, s.task, s.reward()), {}
    batch = s.task.batch_of(s.task.batch, frozen_dtype(s.task.args()))
    for method in METHODS:
        for mode in ("default", "error"):  # libraries set themselves up in the first call
            if s.device != "cpu":
                torch.cuda.set_sync_debug_mode(mode)
            try:
                loss_of(method, batch, 1)[0].backward()
            finally:
                if s.device != "cpu":
                    torch.cuda.set_sync_debug_mode("default")
        values[method] = "ran, but a CPU has nothing to wait for" if s.device == "cpu" else "never waits"
    return values
