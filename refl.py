"""ReFL, reward feedback learning (Section 3.2 of the paper): backpropagate a reward through one late denoising step.

From pure noise, denoise without gradients to a step t_f drawn from the last ten, take that step with gradients, decode
the predicted x0, and climb the reward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from combined import conditional
from scheduler import Scheduler, denoise, sample_noise

LAST = 10  # t_f is drawn from the last ten steps


def sample_t_f(first: int, scheduler: Scheduler, generator: torch.Generator) -> int:
    """A step index t_f, uniform over first, ..., T - 1."""
    return int(torch.randint(first, len(scheduler.steps), (), generator=generator))


def random_shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W), each moved by 0..most pixels down and right, edges repeated.

    A vision transformer sees the picture in patches; what is moved at random cannot be fitted to their grid.
    """
    moves = torch.randint(most + 1, (len(images), 2), generator=generator).tolist()
    H, W = images.shape[-2:]
    rows = zip(images, moves, strict=True)
    return torch.stack([F.pad(x, (dx, 0, dy, 0), mode="replicate")[:, :H, :W] for x, (dy, dx) in rows])


def reward_loss(
    unet,
    vae,
    reward,
    scheduler: Scheduler,
    x_t: Tensor,
    i: int,
    conditioning: dict,
    prompts: list[str],
    generator: torch.Generator,
    shift: int = 0,
) -> tuple[Tensor, dict]:
    """The reward of the image that step i of 0..39 predicts from x_t (B, C, H, W), as a loss.

    The one UNet call here carries gradients.

    `shift`: the reward sees each image moved by up to so many pixels, drawn with `generator`.
    """
    t = scheduler.timesteps[i]
    eps = unet(x_t, t, **conditioning)
    x0 = scheduler.predict_x0(x_t, eps, t)
    images = vae.decode(x0)
    if shift:
        images = random_shift(images, shift, generator)
    r = reward(images, prompts)  # (B,)
    return -r.mean(), {"reward": r.detach().mean()}  # Eq. (2)


def refl_loss(
    unet,
    vae,
    reward,
    scheduler: Scheduler,
    shape: tuple[int, ...],
    conditioning: dict,
    prompts: list[str],
    generator: torch.Generator,
    shift: int = 0,
) -> tuple[Tensor, dict]:
    """Eq. (2) for latents of `shape` (B, C, H, W): returns the loss, without its factor k_R, and what to log."""
    x_t = sample_noise(shape, generator, conditioning["context"].device)
    t_f = sample_t_f(len(scheduler.steps) - LAST, scheduler, generator)
    with torch.no_grad():
        x_t = denoise(scheduler, conditional(unet, conditioning), x_t, scheduler.steps[:t_f], generator)
    return reward_loss(unet, vae, reward, scheduler, x_t, t_f, conditioning, prompts, generator, shift)
