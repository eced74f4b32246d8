"""Combined generation (Section 4.2 of the paper) and AIG, the baseline beside it.

In both, the noise predicted at a step is (1 - w) eps_theta_0 + w eps_theta: theta_0 is the base model, theta the tuned
one, and only the weights w differ. A predictor is a function `(x_t, t) -> eps`; `conditional` and `cfg` make one from a
UNet and its text conditioning c. B batch, C channels, H, W sides.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from scheduler import Generators, Predictor, Scheduler, expand_timesteps, sample_noise


def combined_weights(steps: int, base_steps: int) -> list[float]:
    """Eq. (3) as weights of the tuned model, 0 or 1: theta_0 takes the first `base_steps` steps, theta the last T'.

    t counts down from T as in the paper, so T' = steps - base_steps. Raises ValueError unless 0 <= base_steps <= steps.
    """
    if not 0 <= base_steps <= steps:
        raise ValueError(f"switch must be in 0..{steps} (the number of steps), got {base_steps}")
    T, T_prime = steps, steps - base_steps
    return [0.0 if t > T_prime else 1.0 for t in range(T, 0, -1)]  # Eq. (3)


def rescale_switch(base_steps: int, steps: int) -> int:
    """`base_steps` of 40 steps, as a number of `steps` steps. The tuned model takes at least one."""
    return min(round(base_steps * steps / 40), steps - 1)


def aig_weights(steps: int, lambda_: float = 1.0) -> list[float]:
    """AIG: w_i = (i / T)^lambda for step index i = 0 .. T - 1, from the base model towards the tuned one.

    Annealed Importance Guidance of Jena et al. 2024; the paper calls it Artificially-Inspired Guidance. Raises
    ValueError for a negative lambda.
    """
    if lambda_ < 0:
        raise ValueError(f"lambda of AIG must not be negative, got {lambda_:g}")
    return [(i / steps) ** lambda_ for i in range(steps)]


def conditional(unet, c: dict[str, Tensor]) -> Predictor:
    """eps_theta(x_t, t, c) without guidance. Latents keep their precision, whatever the network's."""
    return lambda x_t, t: unet(x_t, expand_timesteps(t, x_t), **c).to(x_t.dtype)


def cfg(unet, c: dict[str, Tensor], c_empty: dict[str, Tensor], guidance: float) -> Predictor:
    """eps_theta with classifier-free guidance; c and c_empty (of empty prompts) go through the UNet in one batch."""
    if guidance == 1:
        return conditional(unet, c)
    both = {key: torch.cat([c_empty[key], c[key]]) for key in c}

    def predict(x_t: Tensor, t: int) -> Tensor:
        twice = torch.cat([x_t, x_t])
        eps_empty, eps_text = unet(twice, expand_timesteps(t, twice), **both).to(x_t.dtype).chunk(2)
        return eps_empty + guidance * (eps_text - eps_empty)

    return predict


def interpolate(base: Predictor, tuned: Predictor, w: float) -> Predictor:
    """(1 - w) eps_theta_0 + w eps_theta; for w = 0 or 1 only one of the two networks runs."""
    if w in (0, 1):
        return tuned if w else base
    return lambda x_t, t: (1 - w) * base(x_t, t) + w * tuned(x_t, t)


def combine(
    scheduler: Scheduler,
    base: Predictor,
    tuned: Predictor,
    weights: Sequence[float],
    x_t: Tensor,
    generator: Generators = None,
    steps: Iterable[int] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Denoise x_t (B, C, H, W) with the weights of the tuned model at each step.

    `steps`: the step indices to take, by default all. `on_step` is called after each.
    """
    for i in scheduler.steps if steps is None else steps:
        eps = interpolate(base, tuned, weights[i])(x_t, scheduler.timesteps[i])
        x_t = scheduler.step(i, x_t, eps, generator)
        on_step()
    return x_t


def initial_noise(vae, seeds: Sequence[int], size: tuple[int, int], device) -> tuple[Tensor, list[torch.Generator]]:
    """x_T for images of `size` (H, W) pixels, one per seed, and each image's generator for the noise of its steps.

    Raises ValueError if H or W is not divisible by the autoencoder's downsampling factor.
    """
    H, W = size
    if H % vae.factor or W % vae.factor:
        raise ValueError(f"image sides must be multiples of {vae.factor}, got {H}x{W}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (len(seeds), vae.config.latent_channels, H // vae.factor, W // vae.factor)
    return sample_noise(shape, generators, device), generators


@torch.no_grad()
def generate(
    base,
    tuned,
    vae,
    text,
    scheduler: Scheduler,
    weights: Sequence[float],
    prompts: list[str],
    seeds: Sequence[int],
    size: tuple[int, int],
    guidance: float,
) -> Tensor:
    """One image per (prompt, seed) pair: (B, 3, H, W) in about [-1, 1]; `size` is H, W in pixels.

    `base` runs with guidance, `tuned` without. The noise of an image depends on its seed alone. Raises ValueError if H
    or W is not divisible by the total downsampling factor.
    """
    c, c_empty = text(prompts, size), text([""] * len(prompts), size)
    x_T, generators = initial_noise(vae, seeds, size, c["context"].device)
    base, tuned = cfg(base, c, c_empty, guidance), conditional(tuned, c)
    return vae.decode(combine(scheduler, base, tuned, weights, x_T, generators))
