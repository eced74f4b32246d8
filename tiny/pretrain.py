"""Train a UNet with the diffusion loss alone (Eq. 1), as Stable Diffusion was: the recipe of the tiny base.

    python tiny/pretrain.py --base tiny --init random --lr 6e-4

Uses the run folder, checkpoints and grids of `train.py`; the reward methods need none of this file.
"""

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from training import options, presets
from utils.cli import Parser, number, run

UPDATES = {"tiny": 5000}  # other bases: 4000
GUIDED = {"model": (4, options.STEPS)}  # the sample grid: four images per prompt, with guidance


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument_group("method").add_argument
    add("--base", default="tiny", help="tiny, sd15, sdxl, or a folder, file or hub id of weights (default: tiny)")
    add("--data", help="folder or table of captioned images, or COCO captions_*.json (default: the embedded emoji)")
    options.add_data(add)
    add("--resolution", type=options.positive, help="image side in pixels (default: 512, tiny 64)")
    add(
        "--init",
        choices=("base", "random"),
        default="base",
        help="random: train a UNet of the base's sizes from scratch",
    )
    add("--snr-gamma", type=number(float, 0), help="min-SNR weighting of the loss")
    add("--caption-dropout", type=number(float, 0, 1), default=0.1, help="share of captions dropped (default: 0.1)")
    add("--ema", type=number(float, 0, 1), help="save an exponential moving average of the weights, e.g. 0.999")
    add("--lora", type=options.positive, metavar="RANK", help="train low-rank adapters instead of the whole UNet")
    add("--cache-latents", action="store_true", help="encode every image once, before the first update")
    options.add_optimizer(parser, "5000 for tiny, else 4000")
    add = parser.add_argument_group("memory and speed").add_argument
    add("--checkpointing", nargs="?", const="unet", choices=("unet",), help="recompute the UNet's activations")
    options.add_device(add)
    options.add_saving(parser)
    args = parser.parse(argv)
    args.given = parser.given(argv)
    unused = {"reward": None, "judge": None, "monitor": None, "dino": None, "stop_on_collapse": False, "shard": False}
    unused |= {"compile": False, "plan": False, "text_on_cpu": False, "start": None, "shift": None, "kl_scale": 0.0}
    vars(args).update(unused | {"method": "diffusion"})
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports, so that --help answers at once

import copy
import os

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pretrained import lora
from pretrained.configs import unet_config
from scheduler import TRAIN_STEPS, Scheduler, diffusion_loss, sample_noise
from training.models import Models, generator_of, load_frozen
from training.run import Run, open_run
from unet import UNet
from utils.device import autocast, frozen_dtype, to_device
from weights import load_unet, read_config


@torch.no_grad()
def init_weights(unet: UNet, generator: torch.Generator) -> UNet:
    """Fresh weights: convolutions and linear layers keep the variance, residual branches start at zero."""
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            noise = torch.randn(module.weight.shape, generator=generator)
            branch = name.endswith(("conv2", "to_out.0", "net.2", "proj_out", "conv_out"))
            module.weight.copy_(noise * (0 if branch else module.weight[0].numel() ** -0.5))
            if module.bias is not None:
                module.bias.zero_()
    return unet


def pretraining_loss(
    unet, scheduler: Scheduler, x0: Tensor, c: dict, generator: torch.Generator, snr_gamma: float | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. (1) at timesteps uniform over 0..999, for latents x0 (B, C, H, W): (loss, unweighted loss).

    `snr_gamma`: weight by min(SNR, gamma) / SNR, which down-weights low-noise timesteps (Hang et al. 2023).
    """
    eps = sample_noise(x0.shape, generator, x0.device)
    t = torch.randint(TRAIN_STEPS, (len(x0),), generator=generator)
    loss = diffusion_loss(unet(scheduler.add_noise(x0, eps, t), to_device(t, x0.device), **c), eps)
    unweighted = loss.detach().mean()
    if snr_gamma:
        snr = to_device((scheduler.abar / (1 - scheduler.abar))[t].float(), loss.device)
        loss = loss * (snr_gamma / snr).clamp(max=1)
    return loss.mean(), unweighted


def resolve(args: Namespace, preset: presets.Preset) -> None:
    """Fill in defaults, in place. Raises ValueError for flags that contradict each other."""
    args.steps = args.steps or UPDATES.get(args.base, 4000)
    options.resolve(args, preset)
    args.judge = None
    if args.lora and args.ema:
        raise ValueError("--lora: adapters have no moving average; leave out --ema")
    if args.init == "random" and args.lora:
        raise ValueError("--init random trains a whole UNet from scratch; leave out --lora")


def load_models(args: Namespace, preset: presets.Preset) -> Models:
    """The networks of a run: no reward, and the model in training samples by itself, with guidance."""
    m = load_frozen(args, None)
    if args.init == "random":
        config = unet_config(read_config(args.base, "unet"))
        m.unet = init_weights(UNet(config), generator_of(args.seed)).to(args.device)
    else:
        m.unet = load_unet(args.base, args.device, frozen_dtype(args) if args.lora else torch.float32)
    if args.lora:
        m.parameters = lora.add(m.unet, args.lora, generator=generator_of(args.seed))
        m.modules = {"unet": nn.ParameterList(m.parameters)}
    else:
        m.parameters = list(m.unet.parameters())
        m.modules = {"unet": m.unet}
    m.unet.checkpointing = bool(args.checkpointing)
    m.base = m.tuned = m.unet
    if args.ema:
        m.base = m.tuned = m.modules["ema"] = copy.deepcopy(m.unet).requires_grad_(False)
    return m


@torch.no_grad()
def update_ema(run: Run, update: int) -> None:
    decay = min(run.args.ema, (update + 1) / (update + 10))  # shorter at first, to forget the initial weights
    torch._foreach_lerp_(list(run.models.modules["ema"].parameters()), run.models.parameters, 1 - decay)


@torch.no_grad()
def encode_all(args: Namespace, vae, data) -> tuple[Tensor, list[str]]:
    """Posteriors (N, 2, C, H, W) of a data set, mean and log-variance in half precision, and its captions."""
    posteriors, captions = [], []
    workers = 0 if args.device == "cpu" else os.cpu_count()  # processes; a GPU encodes faster than one of them reads
    try:
        for images, texts in tqdm(DataLoader(data, args.batch_size, num_workers=workers), "encoding", unit="batch"):
            with autocast(args.device, args.dtype):
                posteriors.append(torch.stack(vae.encode(images.to(args.device)), 1).half().cpu())
            captions += texts
    except OSError as error:
        reason = str(error).strip().splitlines()[-1]  # a process adds its traceback before it
        raise ValueError(f"--cache-latents: {reason}; remove it from --data, or leave out the flag") from None
    return torch.cat(posteriors), captions


def cached_batch(run: Run, cache: tuple[Tensor, list[str]]):
    """`Run.batch` on cached latents."""

    def batch(generator: torch.Generator) -> tuple[Tensor, list[str]]:
        rows = run.stream.indices(run.args.batch_size)
        mean, logvar = to_device(cache[0][rows], run.args.device).float().unbind(1)
        return run.models.vae.draw(mean, logvar, generator), [cache[1][i] for i in rows]

    return batch


def main(args: Namespace) -> None:
    scheduler = Scheduler(options.STEPS)
    with open_run(args, load_models, resolve) as training_run:
        m = training_run.models
        training_run.grid_columns = GUIDED
        optimizer = torch.optim.AdamW(m.parameters, args.lr, eps=1e-15, weight_decay=args.weight_decay, fused=True)
        training_run.restore(optimizer)
        if args.cache_latents:
            cache = encode_all(args, m.vae, training_run.stream.data)
            training_run.batch = cached_batch(training_run, cache)

        for update in training_run.updates(optimizer):
            for x0, prompts, rng in training_run.micro_batches(update):
                with training_run.autocast():
                    dropped = torch.rand(len(prompts), generator=rng) < args.caption_dropout  # for guidance
                    prompts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
                    c = m.text(prompts, training_run.size)
                    loss, unweighted = pretraining_loss(m.unet, scheduler, x0, c, rng, args.snr_gamma)
                    training_run.log(diffusion=unweighted)
                (loss / args.accumulate).backward()
            if training_run.gradients_are_finite():
                optimizer.step()
                if args.ema:
                    update_ema(training_run, update)
            optimizer.zero_grad(set_to_none=True)

        if args.ema:
            m.unet = m.modules["ema"]
        if training_run.save_result(m.unet):
            training_run.finish(None)


if __name__ == "__main__":
    run(main, ARGS)
