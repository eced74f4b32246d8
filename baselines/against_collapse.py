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


@torch.no_grad()
def update_ema(average: nn.Module, parameters: list[Tensor], decay: float, update: int) -> None:
    """Move an exponential moving average of the weights towards them, after an update."""
    decay = min(decay, (update + 1) / (update + 10))  # shorter at first, to forget the initial weights
    torch._foreach_lerp_(list(average.parameters()), parameters, 1 - decay)
