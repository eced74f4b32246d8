"""ImageReFL (Section 4.3 of the paper): reward fine-tuning that starts from real images, meant to preserve diversity.

A real image noised to t' is denoised without gradients to a step t_f, drawn from t' to the last step; from there x0 is
predicted with gradients, as in ReFL. A diffusion loss on the same noised image is added. train.py makes every fourth
update a ReFL update instead. What of it holds on the tiny base: docs/results.md.
"""

import torch
from torch import Tensor

from combined import conditional
from refl import reward_loss, sample_t_f
from scheduler import Scheduler, denoise, diffusion_loss, sample_noise

REFL_EVERY = 4  # three ImageReFL updates, then one ReFL update


def imagerefl_losses(
    unet,
    vae,
    reward,
    scheduler: Scheduler,
    x0: Tensor,
    t_prime: int,
    c: dict,
    prompts: list[str],
    generator: torch.Generator,
    max_shift: int = 0,
) -> tuple[Tensor, Tensor]:
    """Eqs. (4) and (5), unscaled, for latents x0 (B, C, H, W) of real images: (reward loss, diffusion loss).

    t_prime: step index of t', the noise level to which the images are noised (30 of 40 for SD1.5, 35 for SDXL).
    """
    t = scheduler.timesteps[t_prime]
    eps = sample_noise(x0.shape, generator, x0.device)
    x_t_prime = scheduler.add_noise(x0, eps, t)  # x_t' of Eqs. (4) and (5)
    eps_theta = unet(x_t_prime, t, **c)
    l_diffusion = diffusion_loss(eps_theta, eps).mean()  # Eq. (5)

    t_f = sample_t_f(t_prime, scheduler, generator)
    x_t = x_t_prime
    if t_f > t_prime:
        with torch.no_grad():  # the step at t' reuses eps_theta, so the UNet is not called again for it
            x_t = scheduler.step(t_prime, x_t_prime, eps_theta.to(x_t_prime.dtype), generator)
            x_t = denoise(scheduler, conditional(unet, c), x_t, scheduler.steps[t_prime + 1 : t_f], generator)
    l_reward = reward_loss(unet, vae, reward, scheduler, x_t, t_f, c, prompts, generator, max_shift)  # Eq. (4)
    return l_reward, l_diffusion
