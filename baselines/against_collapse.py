"""Additions to any method against collapse, where the reward rises while diversity and all other measures fall."""

import torch
from torch import Tensor

from scheduler import TRAIN_STEPS, Scheduler, diffusion_loss, sample_noise
from utils.device import to_device


def prior_loss(unet, scheduler: Scheduler, x0: Tensor, c: dict, generator: torch.Generator) -> Tensor:
    """The diffusion loss on real images at all t, not at t' alone (as in DDRL, arXiv 2512.04332). x0 (B, C, H, W)."""
    eps = sample_noise(x0.shape, generator, x0.device)
    t = torch.randint(TRAIN_STEPS, (len(x0),), generator=generator)
    return diffusion_loss(unet(scheduler.add_noise(x0, eps, t), to_device(t, x0.device), **c), eps).mean()
