"""ImageReFL (Section 4.2 of the paper): reward tuning that starts from real images, so that diversity survives.

A real image noised to step t' is denoised without gradients to a step t_f, then one step with gradients, as in ReFL; a
diffusion loss on the same noised image keeps the model a denoiser. Every fourth update is one of ReFL.
"""

import torch
from torch import Tensor

from combined import conditional
from diffusion import diffusion_loss
from refl import reward_loss, sample_t_f
from scheduler import Scheduler, denoise, sample_noise

REFL_EVERY = 4  # three updates of ImageReFL, then one of ReFL


def is_refl_update(update: int) -> bool:
    """Whether update 0, 1, 2, ... is one of ReFL: the fourth, the eighth, ..."""
    return update % REFL_EVERY == REFL_EVERY - 1


def imagerefl_loss(
    unet,
    vae,
    reward,
    scheduler: Scheduler,
    x0: Tensor,
    start: int,
    conditioning: dict,
    prompts: list[str],
    generator: torch.Generator,
    reward_scale: float = 1e-3,
    diffusion_scale: float = 1e-5,
    shift: int = 0,
) -> tuple[Tensor, dict]:
    """Eqs. (4) and (5) for latents x0 (B, C, H, W) of real images: returns the loss and what to log.

    `start`: the step index of t', which the noised images stand at (30 of 40 for SD1.5, 35 for SDXL).
    """
    t = scheduler.timesteps[start]
    eps = sample_noise(x0.shape, generator, x0.device)
    x_start = scheduler.add_noise(x0, eps, t)
    predicted = unet(x_start, t, **conditioning)
    diffusion = diffusion_loss(predicted, eps).mean()

    t_f, x_t = sample_t_f(start, scheduler, generator), x_start
    if t_f > start:  # the first step on the way there needs the same prediction
        with torch.no_grad():
            x_t = scheduler.step(start, x_start, predicted.to(x_start.dtype), generator)
            x_t = denoise(scheduler, conditional(unet, conditioning), x_t, scheduler.steps[start + 1 : t_f], generator)
    loss, log = reward_loss(unet, vae, reward, scheduler, x_t, t_f, conditioning, prompts, generator, shift)  # Eq. (4)
    loss = reward_scale * loss + diffusion_scale * diffusion  # Eq. (5)
    return loss, log | {"diffusion": diffusion.detach()}
