"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908): make the preferred image of a pair likelier than the other.

    L(theta) = -E log sigmoid(-beta / 2 [l_theta(x^w) - l_theta0(x^w) - (l_theta(x^l) - l_theta0(x^l))])
    l_theta(x) = mean (eps - eps_theta(x_t, t, c))^2,  t uniform over 0..999

x^w is preferred to x^l; both share t and eps, of which K are drawn per pair; theta_0 is the base model. beta belongs
to a mean over elements. At the base model the loss is log 2. No gradient passes the reward: it ranks two samples of the
model, or pairs are given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from combined import conditional
from refl import score_latents
from scheduler import TRAIN_STEPS, Scheduler, denoise, diffusion_loss, sample_noise
from utils.device import to_device


@torch.no_grad()
def ranked_pairs(
    unet,
    vae,
    reward,
    scheduler: Scheduler,
    x_t: Tensor,
    first: int,
    c: dict,
    prompts: list[str],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Two samples of each prompt, from x_t (2B, C, H, W) at step index `first`: (x0, the better ones first; scores).

    x_t, c and prompts hold the first sample of each prompt, then the second.
    """
    x0 = denoise(scheduler, conditional(unet, c), x_t, scheduler.steps[first:], generator)
    scores = score_latents(vae, reward, x0, prompts)
    a, b = scores.chunk(2)
    first_wins = (a >= b).view(-1, 1, 1, 1)
    x_a, x_b = x0.chunk(2)
    return torch.cat([torch.where(first_wins, x_a, x_b), torch.where(first_wins, x_b, x_a)]), scores


def dpo_loss(
    unet, base, scheduler: Scheduler, x0: Tensor, c: dict, generator: torch.Generator, beta: float = 5000.0, K: int = 1
) -> Tensor:
    """The loss above for x0 (2B, C, H, W): the preferred images, then the others of the same prompts in c.

    K: draws of t and eps per pair. Sampling a pair takes 80 UNet calls and a draw four, so more than one is worth it.
    """
    pairs = K * len(x0) // 2
    x0 = torch.cat([half.repeat(K, 1, 1, 1) for half in x0.chunk(2)])
    c = {key: torch.cat([half.repeat(K, *[1] * (half.ndim - 1)) for half in e.chunk(2)]) for key, e in c.items()}
    eps = sample_noise((pairs, *x0.shape[1:]), generator, x0.device).repeat(2, 1, 1, 1)
    t = torch.randint(TRAIN_STEPS, (pairs,), generator=generator).repeat(2)
    x_t, t = scheduler.add_noise(x0, eps, t), to_device(t, x0.device)
    l_theta = diffusion_loss(unet(x_t, t, **c), eps)
    with torch.no_grad():
        l_base = diffusion_loss(base(x_t, t, **c), eps)
    better, worse = (l_theta - l_base).chunk(2)
    return -F.logsigmoid(-beta / 2 * (better - worse)).mean()
