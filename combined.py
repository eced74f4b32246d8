"""Combined generation (Section 4.1 of the paper): the base model takes the early steps, the tuned one the late ones.

Both this and the AIG baseline are one thing: at step i the noise is (1 - w_i) eps_base + w_i eps_tuned. They differ in
the weights. A predictor is `(x_t, t) -> eps`; `plain` and `guided` make one from a UNet and its conditioning.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scheduler import Generators, Predictor, Scheduler, denoise, expand_timesteps, sample_noise


def combined_weights(steps: int, switch: int) -> list[float]:
    """Eq. (3): the base model alone in the first `switch` steps, the tuned one alone in the rest (T' = steps - switch).

    The weights pick the model of each step in `mix`; `Scheduler.step` is the rest of the equation. Raises ValueError
    unless 0 <= switch <= steps.
    """
    if not 0 <= switch <= steps:
        raise ValueError(f"switch must be in 0..{steps} (the number of steps), got {switch}")
    return [0.0 if i < switch else 1.0 for i in range(steps)]  # Eq. (3)


def aig_weights(steps: int, power: float = 1.0) -> list[float]:
    """Annealed importance guidance (Jena et al. 2024): w_i = (i / T)^p, from the base model towards the tuned one.

    Raises ValueError for a negative power.
    """
    if power < 0:
        raise ValueError(f"the power of AIG must not be negative, got {power:g}")
    return [(i / steps) ** power for i in range(steps)]


def conditional(unet, conditioning: dict[str, Tensor]) -> Predictor:
    """A predictor without guidance. Latents keep their precision, whatever that of the network."""
    return lambda x_t, t: unet(x_t, expand_timesteps(t, x_t), **conditioning).to(x_t.dtype)


def cfg(unet, conditioning: dict[str, Tensor], empty: dict[str, Tensor], guidance: float) -> Predictor:
    """A predictor with classifier-free guidance; both halves go through the network as one batch."""
    if guidance == 1:
        return conditional(unet, conditioning)
    both = {key: torch.cat([empty[key], conditioning[key]]) for key in conditioning}

    def predict(x_t: Tensor, t: int) -> Tensor:
        twice = torch.cat([x_t, x_t])
        eps_empty, eps_text = unet(twice, expand_timesteps(t, twice), **both).to(x_t.dtype).chunk(2)
        return eps_empty + guidance * (eps_text - eps_empty)

    return predict


def in_passes(make: Callable[[slice], Predictor], parts: list[slice]) -> Predictor:
    """A predictor of many images out of one for each part of them. All take a step before any takes the next."""
    predictors = [make(part) for part in parts]
    return lambda x_t, t: torch.cat([f(x_t[part], t) for f, part in zip(predictors, parts, strict=True)])


def interpolate(base: Predictor, tuned: Predictor, w: float) -> Predictor:
    """(1 - w) eps_base + w eps_tuned; with w = 0 or 1 only one of the two networks runs."""
    if w in (0, 1):
        return tuned if w else base
    return lambda x_t, t: (1 - w) * base(x_t, t) + w * tuned(x_t, t)


def combine(
    scheduler: Scheduler,
    base: Predictor,
    tuned: Predictor,
    mixture: Sequence[float],
    x_t: Tensor,
    generator: Generators = None,
    first: int = 0,
) -> Tensor:
    """Noise (B, C, H, W) -> latents: every step, from index `first` on, with its own mix of the two predictors.

    `mixture`: the weight of the tuned model at each step.
    """
    for i in scheduler.steps[first:]:
        x_t = denoise(scheduler, interpolate(base, tuned, mixture[i]), x_t, [i], generator)
    return x_t


def combine_each(
    scheduler: Scheduler,
    base: Predictor,
    tuned: Predictor,
    mixtures: list[Sequence[float]],
    x_t: Tensor,
    generators: list[torch.Generator],
    i: int = 0,
) -> list[Tensor]:
    """What `combine` makes of each of several mixtures, from step i on; the steps that they share are taken once."""
    if all(mixture == mixtures[0] for mixture in mixtures):
        return [combine(scheduler, base, tuned, mixtures[0], x_t, generators, i)] * len(mixtures)
    made = [x_t] * len(mixtures)
    for w in dict.fromkeys(mixture[i] for mixture in mixtures):
        own = [g.clone_state() for g in generators]  # every branch meets the same noise
        x = denoise(scheduler, interpolate(base, tuned, w), x_t, [i], own)
        branch = [k for k, mixture in enumerate(mixtures) if mixture[i] == w]
        rest = combine_each(scheduler, base, tuned, [mixtures[k] for k in branch], x, own, i + 1)
        for k, latents in zip(branch, rest, strict=True):
            made[k] = latents
    return made


@torch.no_grad()
def generate_each(
    base,
    tuned,
    vae,
    text,
    scheduler: Scheduler,
    mixtures: list[Sequence[float]],
    prompts: list[str],
    seeds: list[int],
    size: tuple[int, int],
    guidance: float,
    batch: int | None = None,
) -> list[Tensor]:
    """Prompts and as many seeds -> images (B, 3, H, W) in about [-1, 1] for each mixture; `size` is H, W in pixels.

    `base` runs with guidance, `tuned` without. The noise of an image follows from its seed alone. `batch`: images that
    go through a network at once, if not all; the base still ends before the tuned model begins. Raises ValueError when
    the autoencoder or the UNet cannot halve the sides often enough.
    """
    H, W = size
    if H % vae.factor or W % vae.factor:
        raise ValueError(f"image sides must be multiples of {vae.factor}, got {H}x{W}")
    conditioning, empty = text(prompts, size), text([""] * len(prompts), size)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (len(prompts), vae.config.latent_channels, H // vae.factor, W // vae.factor)
    x_T = sample_noise(shape, generators, conditioning["context"].device)

    def of(part: slice, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: t[part] for key, t in features.items()}

    batch = batch or len(prompts)
    parts = [slice(at, at + batch) for at in range(0, len(prompts), batch)]
    eps_base = in_passes(lambda part: cfg(base, of(part, conditioning), of(part, empty), guidance), parts)
    eps_tuned = in_passes(lambda part: conditional(tuned, of(part, conditioning)), parts)
    made = combine_each(scheduler, eps_base, eps_tuned, mixtures, x_T, generators)
    return [torch.cat([vae.decode(x0[part]) for part in parts]) for x0 in made]


def generate(
    base,
    tuned,
    vae,
    text,
    scheduler: Scheduler,
    mixture: Sequence[float],
    prompts: list[str],
    seeds: list[int],
    size: tuple[int, int],
    guidance: float,
    batch: int | None = None,
) -> Tensor:
    """`generate_each` for a single mixture: images (B, 3, H, W)."""
    made = generate_each(base, tuned, vae, text, scheduler, [mixture], prompts, seeds, size, guidance, batch)
    return made[0]
