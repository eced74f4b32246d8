"""Additions to any method against collapse, where the reward rises while diversity and all other measures fall."""

import torch
from torch import Tensor, nn

from scheduler import TRAIN_STEPS, Scheduler, diffusion_loss, expand_timesteps, sample_noise
from utils.device import to_device


def prior_loss(unet, scheduler: Scheduler, x0: Tensor, c: dict, generator: torch.Generator) -> Tensor:
    """The diffusion loss on real images at all t, not at t' alone (as in DDRL, arXiv 2512.04332). x0 (B, C, H, W)."""
    eps = sample_noise(x0.shape, generator, x0.device)
    t = torch.randint(TRAIN_STEPS, (len(x0),), generator=generator)
    return diffusion_loss(unet(scheduler.add_noise(x0, eps, t), to_device(t, x0.device), **c), eps).mean()


class KLToBase:
    """The UNet, which also compares its predictions with gradients to those of the base model (as in DRaFT+).

    KL between two Gaussian steps from the same x_t is their squared difference, here a mean over elements.
    """

    def __init__(self, unet, base):
        self.unet, self.base, self.terms = unet, base, []

    def __call__(self, x_t: Tensor, t: Tensor | int, **c: Tensor) -> Tensor:
        eps = self.unet(x_t, t, **c)
        if torch.is_grad_enabled():
            with torch.no_grad():
                eps_base = self.base(x_t, expand_timesteps(t, x_t), **c)
            self.terms.append((eps.float() - eps_base.float()).square().mean())
        return eps

    def loss(self) -> Tensor:
        """The mean over all calls since the last one of `loss`."""
        terms, self.terms = self.terms, []
        return torch.stack(terms).mean()


def capped(reward, cap: float):
    """The reward up to `cap`: the gradient of relu(cap - R), the loss of FlowBP and SRPO, without its constant."""
    return lambda images, prompts: reward(images, prompts).clamp(max=cap)


def flat(reward, rho: float):
    """The reward at the worst image nearby (RSA-FT, arXiv 2603.21175): R(x - rho g / |g|, c), g the gradient at x.

    Where a reward is steep, it is easily fooled. |g| is of each image, which the paper leaves open.
    """

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        with torch.enable_grad():
            x = images.detach().requires_grad_()
            (g,) = torch.autograd.grad(reward(x, prompts).sum(), x)
        norm = g.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        return reward(images - rho * g / norm, prompts)

    return score


@torch.no_grad()
def update_ema(average: nn.Module, parameters: list[Tensor], decay: float, update: int) -> None:
    """Move an exponential moving average of the weights towards them, after an update."""
    decay = min(decay, (update + 1) / (update + 10))  # shorter at first, to forget the initial weights
    torch._foreach_lerp_(list(average.parameters()), parameters, 1 - decay)
