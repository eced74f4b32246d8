"""The noise schedule and the sampler, with explicit coefficients: x_{t-1} = a_t x_t + b_t eps + c_t z.

DDIM with any eta in [0, 1]; eta = 1 is exactly strided DDPM, which the official code uses. Timesteps are "leading" with
offset 1 (40 steps: 976, 951, ..., 26, 1), step index i counts from the noise end, and the last step returns the
predicted x0. The schedule is the one of SD1.5 and SDXL. Coefficients are float64 arrays, one entry a step.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from utils.device import to_device

TRAIN_STEPS = 1000

Generators = torch.Generator | list[torch.Generator] | None
Predictor = Callable[[Tensor, int], Tensor]  # (x_t, t) -> eps


class Scheduler:
    """Coefficients of a sampler of `steps` steps. Raises ValueError for steps outside 1..999 or eta outside [0, 1]."""

    def __init__(self, steps: int = 40, eta: float = 1.0):
        if not 1 <= steps < TRAIN_STEPS:
            raise ValueError(f"steps must be in 1..{TRAIN_STEPS - 1}, got {steps}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
        self.abar = (1 - beta).cumprod(0)  # (1000,)
        self.timesteps = [TRAIN_STEPS // steps * i + 1 for i in reversed(range(steps))]
        self.steps = range(steps)

        abar_t = self.abar[self.timesteps]
        abar_s = torch.cat([abar_t[1:], torch.ones(1, dtype=torch.float64)])  # of the next, less noisy timestep
        self.c = eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)).sqrt()  # 0 at the last step
        self.a = (abar_s / abar_t).sqrt()
        self.b = (1 - abar_s - self.c**2).clamp(min=0).sqrt() - (abar_s * (1 - abar_t) / abar_t).sqrt()

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps; t a scalar or (B,), in 0..999."""
        abar = self._abar(t, x0)
        return abar.sqrt().to(x0.dtype) * x0 + (1 - abar).sqrt().to(x0.dtype) * eps

    def predict_x0(self, x_t: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """The clean latents that x_t and the noise eps in it imply: `add_noise` solved for x0."""
        abar = self._abar(t, x_t)
        return (x_t - (1 - abar).sqrt().to(x_t.dtype) * eps) / abar.sqrt().to(x_t.dtype)

    def step(self, i: int, x_t: Tensor, eps: Tensor, generator: Generators = None) -> Tensor:
        """From step i to the next: x_{t-1} = a_t x_t + b_t eps + c_t z. No z is drawn where c_t = 0."""
        a, b, c = self.a[i].item(), self.b[i].item(), self.c[i].item()
        x = a * x_t + b * eps
        return x + c * sample_noise(x_t.shape, generator, x_t.device) if c else x

    def _abar(self, t: Tensor | int, x: Tensor) -> Tensor:
        abar = self.abar[t.cpu() if isinstance(t, Tensor) else t]
        return (
            to_device(abar, x.device).view(-1, 1, 1, 1) if abar.ndim else abar
        )  # one number stays here: no device waits


def expand_timesteps(t: Tensor | int, x: Tensor) -> Tensor:
    """A timestep for each image of x: (B,), filled on its device. A compiled network has one graph for all of them."""
    return (t if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)).expand(len(x))


def sample_noise(shape: Iterable[int], generator: Generators, device: str | torch.device = "cpu") -> Tensor:
    """Standard normal noise in float32, drawn on the CPU whatever the device.

    `generator`: one for the batch, or a list of one an image, which makes the noise of an image independent of the
    batch that it is in.
    """
    if isinstance(generator, list):
        noise = torch.cat([torch.randn(1, *shape[1:], generator=g) for g in generator])
    else:
        noise = torch.randn(shape, generator=generator)
    return to_device(noise, device)


def denoise(
    scheduler: Scheduler, predict: Predictor, x_t: Tensor, steps: Iterable[int], generator: Generators = None
) -> Tensor:
    """Visit exactly the given step indices, a slice of `scheduler.steps`; an empty one returns x_t itself."""
    for i in steps:
        x_t = scheduler.step(i, x_t, predict(x_t, scheduler.timesteps[i]), generator)
    return x_t
