"""The noise schedule, the sampler and the diffusion loss (Section 3.1 of the paper).

One denoising step is x_{t-1} = a_t x_t + b_t eps_theta(x_t, t, c) + c_t eps_hat, with fresh noise eps_hat ~ N(0, I).
The coefficients are those of DDIM with eta in [0, 1]; eta = 1 is strided DDPM, which the official code uses. Timesteps
have "leading" spacing with offset 1, as for SD1.5 and SDXL. B batch, C channels, H, W sides of the latents.

Three ways to count 40 steps, from noise to image:
    step index i (t_f, t_prime and all slices)      0    1  ...   30  ...  39, whose step returns the predicted x0
    countdown 40 - i (T' in Eq. 3)                 40   39  ...   10  ...   1
    timestep t of the network, 976 - 25 i         976  951  ...  226  ...   1
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.device import to_device

TRAIN_STEPS = 1000

Generators = torch.Generator | list[torch.Generator] | None
Predictor = Callable[[Tensor, int], Tensor]  # (x_t, t) -> eps_theta(x_t, t, c)


class Scheduler:
    """Coefficients of a sampler with `steps` steps: `a`, `b`, `c` (steps,) and `abar` (1000,), in float64.

    Raises ValueError for steps outside 1..999 or eta outside [0, 1].
    """

    def __init__(self, steps: int = 40, eta: float = 1.0):
        if not 1 <= steps < TRAIN_STEPS:
            raise ValueError(f"steps must be in 1..{TRAIN_STEPS - 1}, got {steps}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
        self.abar = (1 - beta).cumprod(0)  # alpha_bar_t, for t in 0..999
        self.timesteps = [TRAIN_STEPS // steps * i + 1 for i in reversed(range(steps))]
        self.steps = range(steps)

        # DDIM: x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - c^2) eps + c eps_hat, where x0 is predict_x0(x_t, eps, t).
        # The factor of x_t in it is a, that of eps is b.
        abar_t = self.abar[self.timesteps]
        abar_s = torch.cat([abar_t[1:], torch.ones(1, dtype=torch.float64)])  # s: the next, less noisy timestep
        self.c = eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)).sqrt()  # 0 at the last step
        self.a = (abar_s / abar_t).sqrt()
        self.b = (1 - abar_s - self.c**2).clamp(min=0).sqrt() - (abar_s * (1 - abar_t) / abar_t).sqrt()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, for t in 0..999, a scalar or (B,)."""
        abar = self._abar(t, x0)
        return abar.sqrt().to(x0.dtype) * x0 + (1 - abar).sqrt().to(x0.dtype) * eps

    def predict_x0(self, x_t: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """Predicted clean latents: `add_noise` solved for x0."""
        abar = self._abar(t, x_t)
        return (x_t - (1 - abar).sqrt().to(x_t.dtype) * eps) / abar.sqrt().to(x_t.dtype)

    def step(self, i: int, x_t: Tensor, eps: Tensor, generator: Generators = None) -> Tensor:
        """One denoising step at step index i. No noise is drawn where c_t = 0."""
        a, b, c = self.a[i].item(), self.b[i].item(), self.c[i].item()
        x = a * x_t + b * eps
        return x + c * sample_noise(x_t.shape, generator, x_t.device) if c else x

    def _abar(self, t: Tensor | int, x: Tensor) -> Tensor:
        """alpha_bar_t, shaped to multiply x; for an int a scalar on the CPU, which needs no copy to the device."""
        abar = self.abar[t.cpu() if isinstance(t, Tensor) else t]
        return to_device(abar, x.device).view(-1, 1, 1, 1) if abar.ndim else abar


def diffusion_loss(eps_theta: Tensor, eps: Tensor) -> Tensor:
    """Squared error between predicted and true noise, both (B, C, H, W), per image: (B,).

    A mean over C, H, W, as in the official code, where the paper writes a squared norm.
    """
    return F.mse_loss(eps_theta.float(), eps.float(), reduction="none").mean((1, 2, 3))  # Eq. (1)


def denoise(
    scheduler: Scheduler, predict: Predictor, x_t: Tensor, steps: Iterable[int], generator: Generators = None
) -> Tensor:
    """Take exactly the given steps, a slice of `scheduler.steps`; an empty slice returns x_t."""
    for i in steps:
        x_t = scheduler.step(i, x_t, predict(x_t, scheduler.timesteps[i]), generator)
    return x_t


def sample_noise(shape: Iterable[int], generator: Generators, device: str | torch.device = "cpu") -> Tensor:
    """Standard normal noise in float32, drawn on the CPU, so that every device gets the same numbers.

    `generator`: one for the batch, or a list with one per image, so that the noise of an image does not depend on the
    rest of the batch.
    """
    if isinstance(generator, list):
        noise = torch.cat([torch.randn(1, *shape[1:], generator=g) for g in generator])
    else:
        noise = torch.randn(shape, generator=generator)
    return to_device(noise, device)


def expand_timesteps(t: Tensor | int, x: Tensor) -> Tensor:
    """One timestep per image of x, (B,), on its device; as a tensor, t does not trigger recompilation per timestep."""
    return (t if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)).expand(len(x))
