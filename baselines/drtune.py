"""DRTune (Wu et al. 2024, arXiv 2405.00760): train K steps all along the way, each on an input without gradients.

    x_{t-1} = a_t x_t + b_t eps_theta(sg(x_t), t, c) + c_t eps_hat,    J(theta) = E R(x_0 predicted at an early stop, c)

sg stops gradients; they reach the K steps through the sampler's linear terms a_t x_t alone, never through the UNet's
input. Early steps weigh most: |dx_0 / d eps_theta| is 3.2 at step 0 and 0.1 at step 30 of 40.
"""

import torch
from torch import Tensor

from combined import conditional
from refl import T_MAX, sample_t_f, score_latents
from scheduler import Scheduler


def trained_steps(first: int, stop: int, K: int, generator: torch.Generator) -> range:
    """K equally spaced step indices of first..stop, at a random offset; fewer where there are fewer."""
    count = stop + 1 - first
    K = min(K, count)
    stride = count // K
    offset = first + int(torch.randint(count - stride * (K - 1), (), generator=generator))
    return range(offset, offset + stride * K, stride)


def drtune_loss(
    unet,
    vae,
    reward,
    scheduler: Scheduler,
    x_t: Tensor,
    first: int,
    c: dict,
    prompts: list[str],
    generator: torch.Generator,
    max_shift: int = 0,
    K: int = 5,
) -> Tensor:
    """Negative mean reward of the x0 predicted at an early stop, from x_t (B, C, H, W) at step index `first`.

    The stop is one of the last ten steps, like t_f of ReFL.
    """
    predict = conditional(unet, c)
    stop = sample_t_f(max(first, len(scheduler.steps) - T_MAX), scheduler, generator)
    trained = trained_steps(first, stop, K, generator)
    for i in scheduler.steps[first : stop + 1]:
        with torch.set_grad_enabled(i in trained):
            eps = predict(x_t.detach(), scheduler.timesteps[i])
        if i < stop:
            x_t = scheduler.step(i, x_t, eps, generator)
    x0 = scheduler.predict_x0(x_t, eps, scheduler.timesteps[stop])
    return -score_latents(vae, reward, x0, prompts, generator, max_shift).mean()
