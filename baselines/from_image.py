"""ImageReFL's idea inside another method: start from a real image noised to t'.

Section 6 of the paper says that it "may enhance other techniques such as DRTune and DraftK". As in `imagerefl.py`, the
diffusion loss on the same noised image regularises, and every fourth update starts from noise.
"""

import torch
from torch import Tensor

from scheduler import Scheduler, diffusion_loss, sample_noise


def noised_image(
    unet, scheduler: Scheduler, x0: Tensor, t_prime: int, c: dict, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(x_t', unscaled diffusion loss at t') of latents x0 (B, C, H, W) of real images. t_prime: a step index."""
    t = scheduler.timesteps[t_prime]
    eps = sample_noise(x0.shape, generator, x0.device)
    x_t_prime = scheduler.add_noise(x0, eps, t)
    return x_t_prime, diffusion_loss(unet(x_t_prime, t, **c), eps).mean()
