"""Other methods that tune on a reward, on the functions of this project: `train.py --method draft`, `drtune`, `dpo`.

| method | what the reward sees | steps with gradients | what the UNet sees |
|---|---|---|---|
| ReFL (`refl.py`) | x0 predicted at t_f | t_f, one of the last ten | x_t without gradients |
| ImageReFL (`imagerefl.py`) | x0 predicted at t_f | t_f | the same, from a noised real image on |
| DRaFT-K (`draft.py`) | the sampled x0 | the last K | x_t with gradients |
| DRaFT-LV (`draft.py`) | the sampled x0, and n times its re-noised last step | the last | x_t without gradients |
| AlignProp (`draft.py`) | the sampled x0 | the last K, K drawn at random | x_t with gradients |
| DRTune (`drtune.py`) | x0 predicted at an early stop | K, spread over all steps before it | x_t without gradients |
| Diffusion-DPO (`dpo.py`) | two samples, of which it prefers one | none; the loss draws K timesteps | a noised sample |

With `--from-image` they do as ImageReFL does (`from_image.py`): start from noised real images, three updates of four.
With `--kl-scale` predictions that differ from the base model's cost (`kl.py`), in ReFL and ImageReFL, too.
"""

import torch
from torch import Tensor

from baselines.dpo import dpo_loss, ranked_pairs
from baselines.draft import draft_loss
from baselines.drtune import drtune_loss
from baselines.from_image import noised_image
from imagerefl import REFL_EVERY
from scheduler import Scheduler, sample_noise
from utils.cli import number_range


def baseline_loss(
    run,
    unet,
    scheduler: Scheduler,
    update: int,
    x0: Tensor | None,
    c: dict[str, Tensor],
    prompts: list[str],
    generator: torch.Generator,
) -> Tensor:
    """The scaled loss of a micro-batch of `run.args.method`; logs its terms.

    x0: latents of real images with --from-image, of given pairs with DPO, else None.
    """
    args, m = run.args, run.models
    from_image = args.from_image and update % REFL_EVERY != REFL_EVERY - 1  # 3 : 1
    if args.method == "dpo":  # two samples of each prompt
        prompts, c = prompts * 2, {key: torch.cat([value, value]) for key, value in c.items()}
        x0 = x0.repeat(2, 1, 1, 1) if from_image else x0

    first, l_diffusion, logged = 0, 0.0, {}
    if from_image:
        first, (x_t, l_diffusion) = args.start, noised_image(unet, scheduler, x0, args.start, c, generator)
        logged["diffusion"] = l_diffusion
    else:
        x_t = sample_noise(run.latent_shape(prompts), generator, args.device)

    numbers = number_range(args.gradient_steps)
    K = numbers[int(torch.randint(len(numbers), (), generator=generator))]
    if args.method == "dpo":
        if not run.has_pairs:
            x0, scores = ranked_pairs(unet, m.vae, m.reward, scheduler, x_t, first, c, prompts, generator)
            logged["reward"] = scores.mean()
        loss = logged["dpo"] = dpo_loss(unet, m.reference, scheduler, x0, c, generator, args.beta, K)
    else:
        inputs = (unet, m.vae, m.reward, scheduler, x_t, first, c, prompts, generator, args.shift, K)
        loss = draft_loss(*inputs, args.lv_samples or 0) if args.method == "draft" else drtune_loss(*inputs)
        logged["reward"] = -loss
    run.log(**logged)
    return args.reward_scale * loss + args.diffusion_scale * l_diffusion
