"""ReFL, reward feedback learning (Section 3.2 of the paper): backpropagate a reward through one late denoising step.

From noise x_T, denoise without gradients to a step t_f drawn from the last ten, predict x0 from there in one call with
gradients, decode it, and maximise its reward. B batch, C channels, H, W sides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from combined import conditional
from scheduler import Scheduler, denoise

T_MAX = 10  # t_f is one of the last ten steps, 10..1 in the countdown; the paper writes [T_min, T_max] = [0, 10]


def sample_t_f(first: int, scheduler: Scheduler, generator: torch.Generator) -> int:
    """Step index of t_f, uniform from step index `first` to the last one."""
    return int(torch.randint(first, len(scheduler.steps), (), generator=generator))


def random_shift(images: Tensor, max_shift: int, generator: torch.Generator) -> Tensor:
    """Shift each of the images (B, 3, H, W in pixels) right and down by 0..max_shift pixels, repeating the edges.

    Random shifts keep the UNet from exploiting the reward's fixed patch grid. Not in the paper; off for SD1.5 and SDXL.
    """
    shifts = torch.randint(max_shift + 1, (len(images), 2), generator=generator).tolist()
    H, W = images.shape[-2:]
    pairs = zip(images, shifts, strict=True)
    return torch.stack([F.pad(x, (dx, 0, dy, 0), mode="replicate")[:, :H, :W] for x, (dy, dx) in pairs])


def score_latents(vae, reward, x0: Tensor, prompts: list[str], generator=None, max_shift: int = 0) -> Tensor:
    """R(decode(x0), c) of latents x0 (B, C, H, W), per image: (B,). `max_shift` > 0: see `random_shift`."""
    images = vae.decode(x0)
    if max_shift:
        images = random_shift(images, max_shift, generator)
    return reward(images, prompts)


def reward_loss(
    unet,
    vae,
    reward,
    scheduler: Scheduler,
    x_t: Tensor,
    i: int,
    c: dict,
    prompts: list[str],
    generator: torch.Generator,
    max_shift: int = 0,
) -> Tensor:
    """Negative mean reward of the image decoded from the x0 predicted at step index i. This UNet call has gradients."""
    t = scheduler.timesteps[i]
    eps = unet(x_t, t, **c)
    x0 = scheduler.predict_x0(x_t, eps, t)
    return -score_latents(vae, reward, x0, prompts, generator, max_shift).mean()  # Eq. (2)


def refl_loss(
    unet,
    vae,
    reward,
    scheduler: Scheduler,
    x_T: Tensor,
    c: dict,
    prompts: list[str],
    generator: torch.Generator,
    max_shift: int = 0,
) -> Tensor:
    """Eq. (2), unscaled, from noise x_T (B, C, H, W). c: the UNet's text conditioning of `prompts`."""
    t_f = sample_t_f(len(scheduler.steps) - T_MAX, scheduler, generator)
    with torch.no_grad():
        x_t = denoise(scheduler, conditional(unet, c), x_T, scheduler.steps[:t_f], generator)
    return reward_loss(unet, vae, reward, scheduler, x_t, t_f, c, prompts, generator, max_shift)
