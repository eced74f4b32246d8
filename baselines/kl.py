"""A divergence from the base model as a regulariser, as in DPOK and DRaFT+: a prediction that differs from it costs.

    L_KL = mean (eps_theta(x_t, t, c) - eps_theta_0(x_t, t, c))^2

theta_0 is the base model. The KL divergence between the two models' denoising steps is this mean times a factor that
depends on t alone, which DRaFT+ leaves out. DPOK: Fan et al. 2023 (arXiv 2305.16381); DRaFT+: NVIDIA's NeMo-Aligner.
"""

import torch
from torch import Tensor

from scheduler import diffusion_loss


class KLToBase:
    """A UNet as the losses call it, which also has the base model predict in each call with gradients."""

    def __init__(self, unet, base):
        self.unet, self.base, self.terms = unet, base, []

    def __call__(self, x_t: Tensor, t: Tensor | int, **c: Tensor) -> Tensor:
        eps = self.unet(x_t, t, **c)
        if torch.is_grad_enabled():
            with torch.no_grad():
                eps_base = self.base(x_t, t, **c)
            self.terms.append(diffusion_loss(eps, eps_base).mean())  # the same squared error, with another target
        return eps

    def loss(self) -> Tensor:
        """L_KL, the mean over the calls with gradients since it was last asked for."""
        terms, self.terms = self.terms, []
        return torch.stack(terms).mean()
