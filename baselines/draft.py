"""DRaFT (Clark et al. 2023, arXiv 2309.17400): backpropagate the reward of the sampled image through the last K steps.

    DRaFT-K     J(theta) = E R(x_0, c),  x_{s-1} = a_s x_s + b_s eps_theta(x_s, s, c) + c_s eps_hat,
                where no gradient passes x_K, K steps before the end
    DRaFT-LV    K = 1, and n more gradients from x_0 noised again to the last step:
                x_1 = sqrt(abar_1) sg(x_0) + sqrt(1 - abar_1) eps,  R(x_0 predicted from x_1)

AlignProp (Prabhudesai et al. 2023) is DRaFT-K with a random K. At the last step eps_theta has a weight of 0.04 in x_0
(ReFL: 0.64 at t_f = 30), so K = 1 trains little here.
"""

import torch
from torch import Tensor

from combined import conditional
from refl import score_latents
from scheduler import Scheduler, denoise, sample_noise


def draft_loss(
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
    K: int = 3,
    lv_samples: int = 0,
) -> Tensor:
    """Negative mean reward of the image sampled from x_t (B, C, H, W) at step index `first`.

    Gradients go through the last K steps. `lv_samples`: n of DRaFT-LV.
    """
    predict, t = conditional(unet, c), scheduler.timesteps[-1]
    no_grad_steps, steps = scheduler.steps[first:-K], scheduler.steps[max(first, len(scheduler.steps) - K) :]
    with torch.no_grad():
        x_t = denoise(scheduler, predict, x_t, no_grad_steps, generator)
    x0 = denoise(scheduler, predict, x_t, steps, generator)
    samples = [x0]
    for _ in range(lv_samples):
        x_1 = scheduler.add_noise(x0.detach(), sample_noise(x0.shape, generator, x0.device), t)
        samples.append(scheduler.predict_x0(x_1, predict(x_1, t), t))
    scores = score_latents(vae, reward, torch.cat(samples), prompts * len(samples), generator, max_shift)
    return -scores.mean()
