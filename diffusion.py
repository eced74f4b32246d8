"""The diffusion loss (Eq. 1 of the paper): it trains Stable Diffusion, and keeps ImageReFL a denoiser."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scheduler import TRAIN_STEPS, Scheduler, sample_noise
from utils.device import to_device


def diffusion_loss(predicted: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the noise (B, C, H, W) that a UNet predicts in x_t, a value an image: (B,)."""
    return F.mse_loss(predicted.float(), eps.float(), reduction="none").mean((1, 2, 3))  # Eq. (1)


def pretraining_loss(
    unet,
    scheduler: Scheduler,
    x0: Tensor,
    conditioning: dict,
    generator: torch.Generator,
    snr_gamma: float | None = None,
) -> tuple[Tensor, dict]:
    """Eq. (1) at timesteps uniform over 0..999. Returns the loss and what to log.

    `snr_gamma`: weigh by min(SNR, gamma) / SNR, which spends less on the nearly clean steps (Hang et al. 2023).
    """
    eps = sample_noise(x0.shape, generator, x0.device)
    t = torch.randint(TRAIN_STEPS, (len(x0),), generator=generator)
    loss = diffusion_loss(unet(scheduler.add_noise(x0, eps, t), to_device(t, x0.device), **conditioning), eps)
    log = {"diffusion": loss.detach().mean()}
    if snr_gamma:
        snr = to_device((scheduler.abar / (1 - scheduler.abar))[t].float(), loss.device)
        loss = loss * (snr_gamma / snr).clamp(max=1)
    return loss.mean(), log
