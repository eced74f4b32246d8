"""The same numbers, faster. Without this folder everything runs as well, slower; `utils/acceleration.py` looks for it.

`for_sampling`, `for_training` and `compile_for_training` are all that the rest of the project calls.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scheduler import expand_timesteps
from speed import cpu_attention, prepacked, threads
from speed.fused_upsample import fuse
from speed.inference_copy import InferenceCopy, call_in_own_dtype
from speed.sharding import shard

__all__ = [
    "InferenceCopy",
    "compile_for_training",
    "for_sampling",
    "for_training",
    "fuse",
    "packed_copy",
    "reference",
    "shard",
]

packed_copy = prepacked.packed_copy


def for_sampling(network: nn.Module, compiled: bool = False) -> nn.Module:
    """Make a network that needs no gradients faster, in place: packed on a CPU, fused or compiled on a GPU."""
    if compiled:  # dynamic=False: one graph per batch size, since dynamic ones give up channels_last
        prepacked.prepare_for_compile(network).compile(dynamic=False)
        return network
    network.register_forward_pre_hook(threads.follow_load)
    return prepacked.prepack(network)


def for_training(net, unet: nn.Module, optimizer, frozen_dtype: torch.dtype, compiled: bool, adapters: bool):
    """The UNet that the losses call, with its no-grad steps on an `InferenceCopy` that follows the optimizer.

    `net` is `unet` or its compiled version, `frozen_dtype` that of frozen networks: bf16 on a GPU, else float32.
    """
    cpu_attention.use_cpu_attention(unet)
    sharded = hasattr(next(unet.parameters()), "full_tensor")
    if frozen_dtype != torch.float32 or sharded:
        fast = InferenceCopy(net, unet, frozen_dtype, compiled, copied=not adapters)
    elif not compiled:
        fast = InferenceCopy(net, unet, None)
    else:
        return net
    optimizer.register_step_post_hook(lambda *_: fast.refresh())
    return fast


def reference(base: Callable, unet: nn.Module) -> Callable:
    """The base model as a loss calls it: in the precision of `unet`'s gradient calls, so that equal weights agree."""
    if isinstance(base, nn.Module):
        cpu_attention.use_cpu_attention(base)

    def predict(x_t: Tensor, t: Tensor | int, context: Tensor, **conditioning: Tensor) -> Tensor:
        return call_in_own_dtype(base, unet, x_t, expand_timesteps(t, x_t), context, **conditioning)

    return predict


def compile_for_training(
    unet: nn.Module, vae, parameters: list, x: Tensor, c: dict[str, Tensor], autocast: Callable, adapters: bool
) -> tuple[Callable, Callable]:
    """(compiled UNet, compiled `vae.decode`) for latents like x (B, C, H, W) with conditioning c.

    Raises ValueError if a compiled gradient is wrong. In bf16 on a CPU it is (torch 2.13): the loss is right, and the
    decoder's gradient is zero.
    """
    cpu_attention.use_cpu_attention(unet)  # later, it would be compiled again
    prepacked.prepare_for_compile(vae.decoder)
    if adapters:
        prepacked.prepare_for_compile(unet)
    net, decode = (torch.compile(f, dynamic=False) for f in (unet, vae.decode))  # sample grids have other sizes

    def gradient(f: Callable, inputs: list) -> Tensor:
        with autocast():
            loss = f(x).float().square().mean()
        return torch.cat([g.float().flatten() for g in torch.autograd.grad(loss, inputs)])

    t = torch.full((len(x),), 226, device=x.device)  # a tensor as in training, so that the graph is reused
    pairs = {"autoencoder": (vae.decode, decode, [x])}

    def predict(x: Tensor, f: Callable) -> Tensor:
        return call_in_own_dtype(f, unet, x.detach(), t, **c)

    pairs["UNet"] = (functools.partial(predict, f=unet), functools.partial(predict, f=net), parameters)
    for name, (eager, compiled, inputs) in pairs.items():
        expected, ours = gradient(eager, inputs), gradient(compiled, inputs)
        if not (ours - expected).norm() <= 0.1 * expected.norm():  # `not`: also where it is NaN
            raise ValueError(
                f"--compile: the {name}'s compiled gradient is wrong here; try --dtype float32, or without"
            )
    return (lambda x_t, t, **c: net(x_t, expand_timesteps(t, x_t), **c)), decode
