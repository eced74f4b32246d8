"""Train: ReFL (Eq. 2), ImageReFL (Eqs. 4 and 5, every fourth update one of ReFL), or plain diffusion (Eq. 1).

    python train.py --method imagerefl --base tiny

fine-tunes the embedded tiny Stable Diffusion on two CPU cores in minutes; `--base sd15 --data FOLDER` is the paper's
run, `torchrun --nproc-per-node N train.py ...` spreads it over N GPUs. A run's folder holds the tuned `unet/`,
`log.jsonl`, grids of fixed prompts, and what `--resume` needs.
"""

from training import presets
from utils import cli
from utils.cli import Parser, number, positive, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--method", choices=presets.METHODS, default="imagerefl", help="default: imagerefl")
    add("--base", default="tiny", help="tiny, sd15, sdxl, or a folder, file or hub id of weights (default: tiny)")
    add("--reward", help='what to climb, e.g. hpsv2.1 or "hpsv2.1=1,pickscore=0.5" (default: tiny, or hpsv2.1)')
    add("--reward-weights", help="files or folders of the rewards, in their order, joined by commas")
    add("--judge", help="a reward that is only measured, before and after (default for tiny: tiny2)")
    add("--judge-weights", help="files or folders of the judge, as for --reward-weights")
    add("--data", help="folder with images and metadata.jsonl, or COCO captions_*.json; for refl also a prompt file")
    add("--steps", type=positive, help="updates (default: the paper's; for the tiny base 150 of ImageReFL, 75 of ReFL)")
    add("--batch-size", type=positive, help="images in one pass (default: 8 SD1.5, 4 SDXL, 16 tiny)")
    add("--accumulate", type=positive, help="passes an update, shared by the processes (default: 4, tiny 1)")
    add("--lr", type=number(float, 0), help="of AdamW (default: 3e-4, 4.5e-5 for the tiny base)")
    add(
        "--lr-schedule", choices=("constant", "cosine"), default="constant", help="cosine: down to 0 at the last update"
    )
    add("--warmup", type=number(int, 0), default=0, help="updates over which the rate rises from 0")
    add("--weight-decay", type=number(float, 0), default=0.01)
    add("--reward-scale", type=number(float, 0), default=1e-3, help="factor of the reward, which is about 0 to 1")
    add("--diffusion-scale", type=number(float, 0), default=1e-5, help="factor of ImageReFL's diffusion loss")
    add(
        "--shift", type=number(int, 0), help="the reward sees images moved by up to so many pixels (default: 0, tiny 8)"
    )
    add(
        "--max-grad-norm",
        type=number(float, 0),
        help="clip the gradient to this norm (default: no clipping, as in the official runs)",
    )
    add("--start", type=int, help="of 40 steps, the index of t' (default: 30, SDXL 35)")
    add("--resolution", type=positive, help="pixels (default: 512, tiny 64)")
    add("--lora", type=positive, metavar="RANK", help="train low-rank adapters instead of the whole UNet")
    add("--init", choices=("base", "random"), default="base", help="random: start a UNet of the base's sizes afresh")
    add("--snr-gamma", type=number(float, 0), help="with diffusion: min-SNR weighting")
    add("--caption-dropout", type=number(float, 0, 1), default=0.1, help="with diffusion: share of captions left out")
    add(
        "--ema", type=number(float, 0, 1), help="with diffusion: save an exponential average of the weights, e.g. 0.999"
    )
    add("--cache-latents", action="store_true", help="encode every image once, before the first update")
    add(
        "--checkpointing", nargs="?", const="unet,decoder", choices=("unet", "decoder", "unet,decoder"),
        help="recompute activations in the backward pass to save memory; alone: both",
    )  # fmt: skip
    add("--text-on-cpu", action="store_true", help="encode prompts there, which frees the text encoders' GPU memory")
    add("--shard", action="store_true", help="under torchrun: each process keeps a part of the weights and moments")
    add("--compile", action="store_true", help="torch.compile the networks; refused where that changes gradients")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="of autocast (default: bfloat16 where the processor has it)")
    add("--seed", type=number(int, 0), default=1)
    add("--sample-every", type=number(int, 0), default=50, help="updates between grids of fixed prompts; 0: none")
    add("--monitor", type=positive, metavar="N", help="every N updates: has the reward risen and all else fallen?")
    add("--stop-on-collapse", action="store_true", help="with --monitor: end the run when that is so")
    add("--dino", help="with --monitor: folder of DINO ViT-S/16, for the diversity; the tiny base has its own features")
    add("--save-every", type=positive, default=200, help="updates between states that --resume can take up")
    add("--save-minutes", type=number(float, 0), help="minutes after which a state is saved in any case")
    add("--keep", type=positive, default=2, help="states that are kept (default: 2)")
    add("--prompts", help="file of prompts for the grids and the final table (default: the base's own)")
    add("--output-dir", help="default: runs/METHOD-BASE, with a number where that is taken")
    add("--plan", action="store_true", help="print arithmetic, memory and the settings that fit, and stop")
    add(
        "--gpu-memory", type=number(float, 1), metavar="GB", help="with --plan: of the GPU (default: 16, 24, 40 and 80)"
    )
    add("--resume", metavar="RUN", help="go on with the run in this folder, with the flags that it was started with")
    add("--override", action="store_true", help="with --resume: take this call's flags though they change the result")
    args = parser.parse(argv)
    args.given = parser.given(argv)
    return args


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports, so that --help answers at once

import copy  # noqa: E402
import math  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from contextlib import closing, nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import metrics  # noqa: E402
import rewards  # noqa: E402
import weights  # noqa: E402
from diffusion import pretraining_loss  # noqa: E402
from imagerefl import imagerefl_loss, is_refl_update  # noqa: E402
from pretrained import lora  # noqa: E402
from refl import refl_loss  # noqa: E402
from scheduler import Scheduler, expand_timesteps  # noqa: E402
from speed import prepacked  # noqa: E402
from speed.fused_upsample import fuse  # noqa: E402
from speed.inference_copy import InferenceCopy  # noqa: E402
from training import checkpoint, cost, monitor, run_folder  # noqa: E402
from training.data import DataStream, ImageDataset, PromptDataset, open_data, read_prompts  # noqa: E402
from unet import UNet, UNetConfig, init_weights  # noqa: E402
from utils import disk, distributed  # noqa: E402
from utils.device import to_device  # noqa: E402

SCHEDULER = Scheduler(40, eta=1.0)
ADAM_EPS = 1e-15  # the loss is scaled by 1e-3 and less, so that Adam's usual 1e-8 would throttle the update
SKIPS = 10  # updates in a row without a finite loss and gradient, after which a run stops
FIRST = distributed.rank == 0  # this process alone writes


def resolve(args, row: presets.Preset) -> None:
    """Fill in what was not given. Raises ValueError for flags that do not go together."""
    args.reward = args.reward or row.reward
    args.steps = args.steps or row.updates[args.method]
    args.batch_size = args.batch_size or row.batch_size
    args.accumulate = args.accumulate or row.accumulate
    args.lr = row.lr if args.lr is None else args.lr
    args.start = row.start if args.start is None else args.start
    args.resolution = args.resolution or row.resolution
    args.shift = row.shift if args.shift is None else args.shift
    args.device = cli.device(args.device)
    if args.judge is None and args.reward == "tiny":
        args.judge = "tiny2"
    args.dtype = args.dtype or cli.dtype(args.device)
    if not 0 <= args.start < len(SCHEDULER.steps):
        raise ValueError(f"--start {args.start}: must be in 0..{len(SCHEDULER.steps) - 1}")
    if args.data is None and row is not presets.TINY:
        raise ValueError(f"--base {args.base} needs --data: a folder with metadata.jsonl, or a COCO captions file")
    for flag in ("ema", "snr_gamma"):
        if args.method != "diffusion" and getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} goes with --method diffusion only")
    if args.lora and args.ema:
        raise ValueError("--lora: an average of adapters is not kept; leave out --ema")
    if args.init == "random" and (args.lora or args.method != "diffusion"):
        raise ValueError("--init random starts a UNet afresh: it goes with --method diffusion, and not with --lora")
    if args.monitor and args.method == "diffusion":
        raise ValueError("--monitor watches a reward: it goes with --method refl or imagerefl")
    if args.monitor and not (args.judge or args.dino or row is presets.TINY):
        raise ValueError("--monitor compares the reward with what is not trained on: give --judge, --dino, or both")
    if (args.stop_on_collapse or args.dino) and not args.monitor:
        raise ValueError(f"--{'dino' if args.dino else 'stop-on-collapse'} goes with --monitor N")
    if args.cache_latents and args.method == "refl":
        raise ValueError("--cache-latents: ReFL uses no images, so there are no latents to keep")
    for flag in ("lora", "ema", "compile", "plan"):
        if args.shard and getattr(args, flag):
            raise ValueError(f"--{flag} does not go with --shard; leave out one of them")
    if args.shard and distributed.world_size == 1:
        raise ValueError("--shard spreads the weights over processes: torchrun --nproc-per-node N train.py ... --shard")
    distributed.check_divisible(args.batch_size, args.accumulate)


def generator_of(*numbers: int) -> torch.Generator:
    """A generator for one purpose, from a few numbers: what it draws never depends on what was drawn before."""
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + n + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def kind_of(args, update: int) -> str:
    """The method of an update: ImageReFL's every fourth one is of ReFL."""
    return "refl" if args.method == "imagerefl" and is_refl_update(update) else args.method


def rate(args, update: int) -> float:
    """The learning rate of an update."""
    warm = min(1.0, (update + 1) / args.warmup) if args.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * update / args.steps)) if args.lr_schedule == "cosine" else 1.0
    return args.lr * warm * decay


def load_models(args, row: presets.Preset, config: dict) -> SimpleNamespace:
    """Everything with weights: `unet` trains, the rest is frozen; None for what the method does not need."""
    device, tunes = args.device, args.method != "diffusion"
    frozen = cli.stored(args)
    m = SimpleNamespace(base=None, reward=None, judge=None, features=None, ema=None, shown={})
    if tunes:
        m.reward = rewards.build(args.reward, args.reward_weights, device, frozen if frozen != torch.float32 else None)
        m.judge = rewards.build(args.judge, args.judge_weights, device) if args.judge else None
        if args.dino:
            m.features = metrics.dino_features(args.dino, device=device)
        elif row is presets.TINY:
            m.features = metrics.clip_features(presets.FEATURES, device)
    m.text = weights.load_text(args.base, device, frozen)
    m.vae = fuse(weights.load_vae(args.base, device, frozen).requires_grad_(False))
    if args.text_on_cpu:
        for part in (m.text, *(reward for total in (m.reward, m.judge) if total for reward in total.rewards)):
            part.on_cpu()
    if args.init == "random":
        m.unet = init_weights(UNet(UNetConfig.from_dict(config)), generator_of(args.seed)).to(device)
    else:
        m.unet = weights.load_unet(args.base, device, frozen if args.lora else torch.float32)
    if args.lora:
        m.parameters = lora.add(m.unet, args.lora, generator=generator_of(args.seed))
        m.base, m.tuned = lora.base_and_tuned(fuse(m.unet))  # one set of weights
    else:
        m.parameters, m.tuned = list(m.unet.parameters()), m.unet
        m.base = copy.deepcopy(m.unet).to("cpu", frozen).requires_grad_(False) if tunes else None  # until it samples
        if tunes and device == "cpu" and not args.compile:
            prepacked.prepack(m.base)
        elif tunes:
            fuse(m.base)
    if args.ema:
        m.ema = copy.deepcopy(m.unet).requires_grad_(False)
    m.unet.checkpointing = "unet" in (args.checkpointing or "")
    m.vae.decoder.checkpointing = "decoder" in (args.checkpointing or "")
    m.net = m.unet  # what the losses call
    if args.compile:
        compile_networks(args, m)
    if tunes and frozen != torch.float32 or args.shard:
        m.net = InferenceCopy(m.net, m.unet, frozen, args.compile, copied=not args.lora)
    elif tunes and not args.compile:
        m.net = InferenceCopy(m.net, m.unet, None)
    if args.shard:
        distributed.shard(m.unet)
        m.parameters, m.tuned = list(m.unet.parameters()), m.net.copy
    return m


def compile_networks(args, m) -> None:
    """Compile the UNet and the decoder, if that leaves their gradients as they are; raises ValueError otherwise.

    In bf16 on a CPU it does not (torch 2.13): the loss is right, and the decoder's gradient is zero.
    """
    side = args.resolution // m.vae.factor
    x = torch.randn(args.batch_size, m.vae.config.latent_channels, side, side, generator=generator_of(args.seed))
    x = x.to(args.device).requires_grad_()
    conditioning = m.text(["a"] * args.batch_size, (args.resolution, args.resolution))
    prepacked.prepare_for_compile(m.vae.decoder)
    if args.lora:
        prepacked.prepare_for_compile(m.unet)
    net, decode = (torch.compile(f, dynamic=False) for f in (m.unet, m.vae.decode))  # a grid has other sizes

    def gradient(f, of: list) -> torch.Tensor:
        with cli.autocast(args.device, args.dtype):
            loss = f(x).float().square().mean()
        return torch.cat([g.float().flatten() for g in torch.autograd.grad(loss, of)])

    pairs = {"autoencoder": (m.vae.decode, decode, [x])}
    t = torch.full((args.batch_size,), 226, device=args.device)  # as in training, where the graph serves again
    pairs["UNet"] = (*(lambda x, f=f: f(x.detach(), t, **conditioning) for f in (m.unet, net)), m.parameters)
    for name, (eager, compiled, of) in pairs.items():
        right, ours = gradient(eager, of), gradient(compiled, of)
        if not (ours - right).norm() <= 0.1 * right.norm():  # nor where it is NaN
            raise ValueError(
                f"--compile: the {name}'s compiled gradient is wrong here; try --dtype float32, or without"
            )
    m.net, m.vae.decode = (lambda x_t, t, **given: net(x_t, expand_timesteps(t, x_t), **given)), decode


@torch.no_grad()
def encode_all(args, vae, data) -> tuple[torch.Tensor, list[str]]:
    """Posteriors (N, 2, C, H, W) of a whole data set, mean and log-variance in half precision, and its captions."""
    moments, captions = [], []
    for start in tqdm(range(0, len(data), args.batch_size), desc="encoding", unit="batch"):
        try:
            images, texts = zip(*(data[i] for i in range(len(data))[start : start + args.batch_size]), strict=True)
        except OSError as error:
            raise ValueError(f"--cache-latents: {error}; take it out of --data, or leave out the flag") from None
        with cli.autocast(args.device, args.dtype):
            moments.append(torch.stack(vae.encode(torch.stack(images).to(args.device)), 1).half().cpu())
        captions += texts
    return torch.cat(moments), captions


def next_batch(args, m, stream: DataStream, cache, generator) -> tuple:
    """Scaled latents of the next real images (None for ReFL, which needs none), and their captions."""
    if cache:
        moments, captions = cache
        rows = stream.indices(args.batch_size)
        return m.vae.draw(*to_device(moments[rows], args.device).float().unbind(1), generator), [
            captions[i] for i in rows
        ]
    images, captions = stream.batch(args.batch_size)
    if args.method == "refl":
        return None, captions
    with torch.no_grad():
        return m.vae.sample(to_device(images, args.device), generator), captions


def loss_of(args, m, x0, prompts: list[str], update: int, generator) -> tuple[torch.Tensor, dict]:
    """The loss of one pass by the method, and what to log."""
    size = (args.resolution, args.resolution)
    if args.method == "diffusion":
        dropped = torch.rand(len(prompts), generator=generator) < args.caption_dropout  # for guidance
        prompts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
        return pretraining_loss(m.net, SCHEDULER, x0, m.text(prompts, size), generator, args.snr_gamma)
    conditioning = m.text(prompts, size)
    if kind_of(args, update) == "refl":
        shape = (len(prompts), m.vae.config.latent_channels, *(side // m.vae.factor for side in size))
        loss, log = refl_loss(m.net, m.vae, m.reward, SCHEDULER, shape, conditioning, prompts, generator, args.shift)
        return args.reward_scale * loss, log
    return imagerefl_loss(
        m.net, m.vae, m.reward, SCHEDULER, x0, args.start, conditioning, prompts, generator,
        args.reward_scale, args.diffusion_scale, args.shift,
    )  # fmt: skip


def add_gradients(args, m, stream: DataStream, cache, update: int, position: int) -> list[dict]:
    """Add up the gradients of this process's passes; returns what each logs. `position`: where the images begin."""
    logs = []
    for part in distributed.micro_batches_of_this_rank(args.accumulate):
        generator = generator_of(args.seed, update, part)
        stream.position = position + part * args.batch_size
        with cli.autocast(args.device, args.dtype):
            x0, captions = next_batch(args, m, stream, cache, generator)
            loss, log = loss_of(args, m, x0, captions, update, generator)
        (loss / args.accumulate).backward()
        logs.append(log)
    return logs


@torch.no_grad()
def update_weights(args, m, optimizer, update: int, values: dict[str, float]) -> bool:
    """One optimizer step, unless the gradient or a logged value is not finite: returns whether it was taken.

    The gradient's norm is added to `values`.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate(args, update)
    norm = torch.nn.utils.clip_grad_norm_(m.parameters, args.max_grad_norm or math.inf)
    values["grad_norm"] = distributed.gather(norm).item()
    taken = all(map(math.isfinite, values.values()))
    if taken:
        optimizer.step()
        if isinstance(m.net, InferenceCopy):
            m.net.refresh()
        if m.ema:
            decay = min(args.ema, (update + 1) / (update + 10))  # shorter at first, to forget the start
            torch._foreach_lerp_(list(m.ema.parameters()), m.parameters, 1 - decay)
    optimizer.zero_grad(set_to_none=True)
    return taken


def main(args) -> None:
    if args.plan:
        return show_plan(args)
    folder = run_folder.read(args) if args.resume else None
    config = weights.read_config(args.base, "unet")
    row = presets.preset_for(args.base, config)
    distributed.set_device()
    resolve(args, row)
    weights.check_resolution(args.base, args.resolution)
    if FIRST and not args.resume:
        folder = run_folder.new_folder(args)
        cli.check_writable(folder)
    prompts = read_prompts(args.prompts) if args.prompts else list(row.prompts)
    if args.monitor and len(prompts) < 2:
        raise ValueError("--monitor compares prompts with their scatter: --prompts must name two or more")
    data = open_data(args.data, args.resolution)
    if isinstance(data, PromptDataset) and args.method != "refl":
        raise ValueError(f"--data {args.data}: {args.method} needs images, and these are prompts alone")
    if isinstance(data, ImageDataset) and args.method == "refl":
        data = PromptDataset([caption for _, caption in data.rows])  # no picture needs to be read
    try:
        with distributed.process_group(args.device):
            m = load_models(args, row, config)
            with disk.lock(folder) if FIRST else nullcontext():
                if FIRST and not args.resume and run_folder.new_folder(args) != folder:
                    raise ValueError(f"{folder}: another process has trained there meanwhile; start again")
                train(args, m, row, prompts, data, folder)
    except (RuntimeError, MemoryError) as error:
        if not cli.is_out_of_memory(error):
            raise
        raise ValueError(memory_advice(args, error)) from None


def train(args, m, row: presets.Preset, prompts: list[str], data, folder: Path | None) -> None:
    """All updates that are left, then the result; `folder` is the run's, None where another process writes it."""
    optimizer = torch.optim.AdamW(m.parameters, args.lr, eps=ADAM_EPS, weight_decay=args.weight_decay, fused=True)
    mfu = cost.MFUMeter(args, m.unet.config, m.vae.config) if args.device != "cpu" else None
    modules = {"unet": torch.nn.ParameterList(m.parameters) if args.lora else m.unet}
    modules |= {"ema": m.ema} if m.ema else {}
    progress = {"update": 0, "position": 0, "skipped": 0, "in_a_row": 0}
    if args.resume:
        progress |= checkpoint.load_newest(Path(args.resume) / "states", modules, optimizer)
        if isinstance(m.net, InferenceCopy):
            m.net.refresh()
    ahead = distributed.world_size if args.device != "cpu" else 0  # a CPU has its hands full
    stream = DataStream(data, args.seed, ahead=ahead)
    cache = encode_all(args, m.vae, data) if args.cache_latents else None
    about = {}
    if FIRST:
        about = run_folder.begin(args, folder, progress["update"])
        look_at_start(args, m, row, prompts, about, progress["update"], folder)
    first, saved = progress["update"], time.time()
    left = range(first, args.steps)
    bar = tqdm(left, args.method, args.steps, initial=first, unit="update", disable=not FIRST)
    with cli.stopping() as signals, closing(stream):
        for update in bar:
            began = time.time()
            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            logs = add_gradients(args, m, stream, cache, update, progress["position"])
            if not args.shard:
                distributed.all_reduce(p.grad for p in m.parameters)
            sums = [sum(log[key].item() for log in logs) for key in logs[0]]
            late = FIRST and time.time() - saved >= 60 * (args.save_minutes or math.inf)
            *sums, stop, late = distributed.all_reduce_sum([*sums, len(signals), late], args.device)
            values = {key: value / args.accumulate for key, value in zip(logs[0], sums, strict=True)}
            taken = update_weights(args, m, optimizer, update, values)
            values["seconds"] = round(time.time() - began, 4)
            if args.device != "cpu":
                values["peak_gb"] = round(torch.cuda.max_memory_allocated() / cost.GB, 2)
            if mfu:
                values["mfu"] = round(mfu(kind_of(args, update), values["seconds"]) / distributed.world_size, 4)
            asked = range(progress["position"], progress["position"] + args.batch_size * args.accumulate)
            progress["update"], progress["position"] = update + 1, asked.stop
            progress["in_a_row"] = 0 if taken else progress["in_a_row"] + 1
            collapsed = False
            if args.monitor and (update + 1) % args.monitor == 0:
                warned = FIRST and monitor.look(args, m, row, prompts, about, update, values)
                collapsed = distributed.all_reduce_sum([warned and args.stop_on_collapse], args.device) == [1]
            last = bool(stop) or collapsed or update + 1 == args.steps
            stuck = not taken and progress["in_a_row"] % SKIPS == 0
            saves = last or late or stuck or (update + 1) % args.save_every == 0
            tensors = checkpoint.tensors_of(modules, optimizer) if saves and (FIRST or args.shard) else {}
            if FIRST:
                line = {"update": update + 1, "kind": kind_of(args, update), "lr": rate(args, update)} | values
                run_folder.note(folder, line, progress, [] if taken else [stream.index(n) for n in asked])
                bar.set_postfix({key: f"{value:.3g}" for key, value in values.items()})
                if saves:
                    run_folder.save(folder, tensors, progress, args.keep, last)
                    saved = time.time()
                if args.sample_every and ((last and not stop) or (update + 1) % args.sample_every == 0):
                    monitor.show(args, m, row, prompts, folder / "samples" / f"step-{update + 1:06d}.png")
            if stuck:
                raise ValueError(
                    f"{SKIPS} updates in a row had no finite loss and gradient; saved; try a lower --lr, "
                    "--max-grad-norm 1 or --dtype float32, with --resume and --override"
                )
            if stop:
                if FIRST:
                    print(f"\nstopped after update {update + 1}; go on with: python train.py --resume {folder}")
                return
            if collapsed:
                if FIRST:
                    print(f"\nended after update {update + 1} by --stop-on-collapse")
                break
    if stream.left_out:
        print(f"{len(stream.left_out)} images did not decode and were left out")
    if args.shard:  # the result, put together, and no longer rounded
        m.unet = m.net.copy.float()
        m.net.refresh()
    if FIRST:
        run_folder.save_result(args, m, folder, progress["update"])
        if args.method != "diffusion":
            compare(args, m, row, prompts, about, folder)
        run_folder.describe(folder, about | {"finished": True})
        print(f"written to {folder}")


def look_at_start(args, m, row: presets.Preset, prompts: list[str], about: dict, update: int, folder: Path) -> None:
    """Show what training begins with, and note how it does where that is to be watched and is not known."""
    if args.monitor and "monitor" not in about:
        monitor.look(args, m, row, prompts, about, update, {})
    run_folder.describe(folder, about)
    if args.sample_every and not update:
        monitor.show(args, m, row, prompts, folder / "samples" / "step-000000.png")


def compare(args, m, row: presets.Preset, prompts: list[str], about: dict, folder: Path) -> None:
    """Say how the samples have changed, and how to use the result."""
    switch = row.switch[args.method]
    switches = {"base": len(SCHEDULER.steps), "tuned": 0, f"--switch {switch}": switch}
    about["table"] = monitor.measure(args, m, row, prompts, switches)
    print(f"\n{len(prompts)} prompts x 4 seeds, mean ± standard deviation\n{monitor.layout(about['table'])}\n")
    print(f"sample from it:  python sample.py --checkpoint {folder} --switch {switch}")


def memory_advice(args, error: Exception) -> str:
    """What to try after an allocation failed: as many images an update in smaller passes."""
    if args.device == "cpu":
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        peak = torch.cuda.max_memory_allocated()
    smaller = max((n for n in range(1, args.batch_size) if args.batch_size % n == 0), default=0)
    ways = [f"--batch-size {smaller} --accumulate {args.accumulate * args.batch_size // smaller}"] if smaller else []
    ways += [] if args.checkpointing else ["--checkpointing"]
    ways += [] if args.lora else ["--lora 16"]
    return (
        f"out of memory at {args.batch_size} images of {args.resolution} pixels a pass, peak {peak / 1e9:.2f} GB "
        f"({(str(error) or 'of the CPU').splitlines()[0]}); try {', '.join(ways) or 'a smaller --resolution'}"
    )


def show_plan(args) -> None:
    """What a run with these flags would cost. Needs neither weights nor data."""
    unet, vae = cost.configs(args.base)
    args.data = args.data or "."
    resolve(args, presets.preset_for(args.base, unet.to_dict()))
    for line in cost.cost_report(args, unet, vae):
        print(line, flush=True)


if __name__ == "__main__":
    run(main, ARGS)
