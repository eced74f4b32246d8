"""Train with ReFL (Eq. 2) or ImageReFL (Eqs. 4 and 5; every fourth update is a ReFL update).

    python train.py --method imagerefl --base tiny

This file is the method; what surrounds an update is in `training/`, and `speed/` makes it faster. Section 5.3 of the
paper has the numbers: k_R = 1e-3, k_D = 1e-5, AdamW at 3e-4. Other methods are in `baselines/`.
"""

from training.options import STEPS, parse_args
from utils import cli

if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports, so that --help answers at once

import torch

from baselines import baseline_loss
from baselines.kl import KLToBase
from imagerefl import REFL_EVERY, imagerefl_losses
from refl import refl_loss
from scheduler import Scheduler, sample_noise
from training import cost, monitor
from training.models import accelerate
from training.presets import BASELINES
from training.run import open_run
from training.run_folder import method_name

ADAM_EPS = 1e-15  # the loss is scaled by 1e-3 and less, so Adam's usual 1e-8 would shrink the updates


def main(args) -> None:
    if args.plan:
        return cost.print_plan(args)
    scheduler = Scheduler(STEPS, eta=1.0)
    with open_run(args) as run:  # with --resume it fills in the flags of the run
        k_R, k_D, k_KL = args.reward_scale, args.diffusion_scale, args.kl_scale
        m = run.models
        vae, text, reward = m.vae, m.text, m.reward
        optimizer = torch.optim.AdamW(m.parameters, args.lr, eps=ADAM_EPS, weight_decay=args.weight_decay, fused=True)
        run.restore(optimizer)
        fast = accelerate(args, m, optimizer)  # its no-grad steps run on an inference copy: the same numbers, faster
        unet = KLToBase(fast, m.reference) if k_KL else fast  # collects the terms of L_KL as it is called

        for update in run.updates(optimizer):
            is_refl = args.method == "refl" or update % REFL_EVERY == REFL_EVERY - 1  # 3 : 1
            for x0, prompts, rng in run.micro_batches(update):
                with run.autocast():
                    c = text(prompts, run.size)
                    if args.method in BASELINES:
                        loss = baseline_loss(run, unet, scheduler, update, x0, c, prompts, rng)
                    elif is_refl:
                        x_T = sample_noise(run.latent_shape(prompts), rng, args.device)
                        l_reward = refl_loss(unet, vae, reward, scheduler, x_T, c, prompts, rng, args.shift)
                        loss = k_R * l_reward
                        run.log(reward=-l_reward)
                    else:
                        l_reward, l_diffusion = imagerefl_losses(
                            unet, vae, reward, scheduler, x0, args.start, c, prompts, rng, args.shift
                        )
                        loss = k_R * l_reward + k_D * l_diffusion
                        run.log(reward=-l_reward, diffusion=l_diffusion)
                    if k_KL:
                        l_kl = unet.loss()
                        loss = loss + k_KL * l_kl
                        run.log(kl=l_kl)
                (loss / args.accumulate).backward()
            if run.gradients_are_finite():  # after all-reduce and clipping
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if run.save_result(fast):
            base_steps = run.preset.switch[method_name(args)]
            rows = {"base": STEPS, "tuned": 0, f"--switch {base_steps}": base_steps}  # name -> steps of the base model
            table = monitor.summarise(monitor.evaluate(run, list(rows.values())), list(rows))
            run.finish(table, f"python sample.py --checkpoint {run.folder} --switch {base_steps}")


if __name__ == "__main__":
    cli.run(main, ARGS)
