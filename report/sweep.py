"""Sampling with several weight schedules at once, as in the trade-off curves: steps that they share run once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from combined import cfg, conditional, initial_noise, interpolate
from scheduler import Scheduler


@torch.no_grad()
def generate_each(
    base,
    tuned,
    vae,
    text,
    scheduler: Scheduler,
    schedules: list[Sequence[float]],
    prompts: list[str],
    seeds: Sequence[int],
    size: tuple[int, int],
    guidance: float,
) -> list[Tensor]:
    """`combined.generate` for each weight schedule: images (B, 3, H, W) per schedule, equal to separate calls.

    Schedules that begin with the same weights share the steps up to the first difference.
    """
    c, c_empty = text(prompts, size), text([""] * len(prompts), size)
    x_T, generators = initial_noise(vae, seeds, size, c["context"].device)
    base, tuned = cfg(base, c, c_empty, guidance), conditional(tuned, c)
    branches = {(): (x_T, generators)}  # weights so far -> latents and the images' generators
    for i in scheduler.steps:
        grown = {}
        for weights in dict.fromkeys(tuple(schedule[: i + 1]) for schedule in schedules):
            x_t, generators = branches[weights[:-1]]
            generators = [generator.clone_state() for generator in generators]  # every branch draws the same noise
            eps = interpolate(base, tuned, weights[-1])(x_t, scheduler.timesteps[i])
            grown[weights] = scheduler.step(i, x_t, eps, generators), generators
        branches = grown
    decoded = {weights: vae.decode(x0) for weights, (x0, _) in branches.items()}
    return [decoded[tuple(schedule)] for schedule in schedules]
