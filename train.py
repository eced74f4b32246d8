"""Train: ReFL (Eq. 2), ImageReFL (Eqs. 4 and 5, every fourth update one of ReFL), or plain diffusion (Eq. 1).

    python train.py --method imagerefl --base tiny

fine-tunes the embedded tiny Stable Diffusion on two CPU cores in minutes; `--base sd15 --data FOLDER` is the paper's
run. A run's folder holds the tuned `unet/`, `log.jsonl`, grids of fixed prompts, and what `--resume` needs.
"""

import settings
from cli import Parser, positive, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--method", choices=settings.METHODS, default="imagerefl", help="default: imagerefl")
    add("--base", default="tiny", help="tiny, sd15, sdxl, or a folder, file or hub id of weights (default: tiny)")
    add("--reward", help='what to climb, e.g. hpsv2.1 or "hpsv2.1=1,pickscore=0.5" (default: tiny, or hpsv2.1)')
    add("--reward-weights", help="files or folders of the rewards, in their order, joined by commas")
    add("--judge", help="a reward that is only measured, before and after (default for tiny: tiny2)")
    add("--data", help="folder with images and metadata.jsonl, or COCO captions_*.json; for refl also a prompt file")
    add("--steps", type=positive, help="updates; default: the paper's, 100 for the tiny base")
    add("--batch-size", type=positive, help="images in one pass (default: 8 SD1.5, 4 SDXL, 16 tiny)")
    add("--accumulate", type=positive, help="passes an update (default: 4, 1 for the tiny base)")
    add("--lr", type=float, help="of AdamW (default: 3e-4, 1e-4 for the tiny base)")
    add(
        "--lr-schedule", choices=("constant", "cosine"), default="constant", help="cosine: down to 0 at the last update"
    )
    add("--warmup", type=int, default=0, help="updates over which the rate rises from 0")
    add("--weight-decay", type=float, default=0.01)
    add("--reward-scale", type=float, default=1e-3, help="factor of the reward, which is about 0 to 1")
    add("--diffusion-scale", type=float, default=1e-5, help="factor of ImageReFL's diffusion loss")
    add("--max-grad-norm", type=float, help="clip the gradient to this norm (default: no clipping, as in the paper)")
    add("--start", type=int, help="of 40 steps, the index of t' (default: 30, SDXL 35)")
    add("--resolution", type=positive, help="pixels (default: 512, tiny 64)")
    add("--lora", type=positive, metavar="RANK", help="train low-rank adapters instead of the whole UNet")
    add("--init", choices=("base", "random"), default="base", help="random: start a UNet of the base's sizes afresh")
    add("--snr-gamma", type=float, help="with diffusion: min-SNR weighting")
    add("--caption-dropout", type=float, default=0.1, help="with diffusion: share of captions left out")
    add("--ema", type=float, help="with diffusion: save an exponential average of the weights, e.g. 0.999")
    add("--cache-latents", action="store_true", help="encode every image once, before the first update")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass to save memory")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="of autocast (default: bfloat16 where the processor has it)")
    add("--seed", type=int, default=1)
    add("--sample-every", type=int, default=50, help="updates between grids of fixed prompts; 0: none")
    add("--save-every", type=positive, default=200, help="updates between states that --resume can take up")
    add("--prompts", help="file of prompts for the grids and the final table (default: the base's own)")
    add("--output-dir", help="default: runs/METHOD-BASE, with a number where that is taken")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with the flags that it was started with")
    return parser.parse(argv)


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports, so that --help answers at once

import contextlib  # noqa: E402
import copy  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lora  # noqa: E402
import metrics  # noqa: E402
import rewards  # noqa: E402
import state  # noqa: E402
import weights  # noqa: E402
from combined import generate, switch_weights  # noqa: E402
from data import Captions, Stream, open_data, read_prompts  # noqa: E402
from diffusion import pretraining_loss  # noqa: E402
from imagerefl import imagerefl_loss, is_refl_update  # noqa: E402
from pictures import grid, save_png, to_pictures  # noqa: E402
from refl import refl_loss  # noqa: E402
from scheduler import Scheduler  # noqa: E402
from unet import UNet, UNetConfig, initialise  # noqa: E402

SCHEDULER = Scheduler(40, eta=1.0)
ADAM_EPS = 1e-15  # the loss is scaled by 1e-3 and less, so that Adam's usual 1e-8 would throttle the update


def resolve(args, row: settings.Settings) -> None:
    """Fill in what was not given. Raises ValueError for flags that do not go together."""
    args.reward = args.reward or row.reward
    args.steps = args.steps or row.updates[args.method]
    args.batch_size = args.batch_size or row.batch_size
    args.accumulate = args.accumulate or row.accumulate
    args.lr = row.lr if args.lr is None else args.lr
    args.start = row.start if args.start is None else args.start
    args.resolution = args.resolution or row.resolution
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.judge is None and args.reward == "tiny":
        args.judge = "tiny2"
    if args.dtype is None:
        fast = args.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        args.dtype = "bfloat16" if fast else "float32"
    if not 0 <= args.start < len(SCHEDULER.steps):
        raise ValueError(f"--start {args.start}: must be in 0..{len(SCHEDULER.steps) - 1}")
    if args.data is None and row is not settings.TINY:
        raise ValueError(f"--base {args.base} needs --data: a folder with metadata.jsonl, or a COCO captions file")
    if args.lora and (args.init == "random" or args.ema):
        raise ValueError("--lora trains adapters of a trained base; leave out --init random and --ema")


def new_folder(args) -> Path:
    """The folder of a new run; never one that holds a run already."""
    name = f"runs/{args.method}-{Path(args.base).name}"
    folders = [args.output_dir] if args.output_dir else [name, *(f"{name}-{i}" for i in range(2, 10_000))]
    for folder in map(Path, folders):
        if not (folder / "run.json").exists():
            return folder
    raise ValueError(f"--output-dir {args.output_dir}: holds a run already; --resume it or name another folder")


def generator_of(*numbers: int) -> torch.Generator:
    """A generator for one purpose, from a few numbers: what it draws never depends on what was drawn before."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def rate(args, update: int) -> float:
    """The learning rate of an update."""
    warm = min(1.0, (update + 1) / args.warmup) if args.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * update / args.steps)) if args.lr_schedule == "cosine" else 1.0
    return args.lr * warm * decay


@torch.no_grad()
def encode_all(vae, data, autocast, device: str) -> tuple[list, list[str]]:
    """Posterior means, log-variances and captions of a whole data set, in half precision."""
    moments, captions = [], []
    for start in tqdm(range(0, len(data), 64), desc="encoding", unit="batch"):
        rows = [data[i] for i in range(start, min(start + 64, len(data)))]
        with autocast():
            mean, logvar = vae.encode(torch.stack([image for image, _ in rows]).to(device))
        moments.append(torch.stack([mean, logvar], 1).half().cpu())  # (B, 2, C, H, W)
        captions += [caption for _, caption in rows]
    return torch.cat(moments), captions


def main(args) -> None:
    if args.resume:
        run_folder = Path(args.resume)
        if not (run_folder / "run.json").is_file():
            raise FileNotFoundError(f"--resume {args.resume}: no run.json there, so no run to go on with")
        args.__dict__.update(json.loads((run_folder / "run.json").read_text())["args"], resume=args.resume)
    config = weights.read_config(args.base, "unet")
    row = settings.of(args.base, config)
    if not args.resume:
        resolve(args, row)
        run_folder = new_folder(args)
    device, bf16 = args.device, args.dtype == "bfloat16"
    tuning = args.method != "diffusion"
    size = (args.resolution, args.resolution)

    def autocast():
        return torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()

    # The networks: the UNet trains in float32, all else is frozen.
    frozen = torch.bfloat16 if bf16 and device != "cpu" else torch.float32
    data = open_data(args.data, args.resolution)
    if isinstance(data, Captions) and args.method != "refl":
        raise ValueError(f"--data {args.data}: {args.method} needs images, and these are prompts alone")
    text = weights.load_text(args.base, device, frozen)
    vae = weights.load_vae(args.base, device, frozen).requires_grad_(False)
    vae.decoder.checkpointing = args.checkpointing
    reward = (
        rewards.build(args.reward, args.reward_weights, device, torch.bfloat16 if bf16 else None) if tuning else None
    )
    judge = rewards.load(args.judge, None, device) if tuning and args.judge else None
    if args.init == "random":
        unet = initialise(UNet(UNetConfig.from_dict(config)), generator_of(args.seed)).to(device)
    else:
        unet = weights.load_unet(args.base, device)
    base = unet if args.lora or not tuning else copy.deepcopy(unet).to(frozen).requires_grad_(False)
    parameters = lora.add(unet, args.lora, generator=generator_of(args.seed)) if args.lora else list(unet.parameters())
    unet.train().checkpointing = args.checkpointing
    ema = copy.deepcopy(unet).requires_grad_(False) if args.ema else None
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay, eps=ADAM_EPS)
    modules = {"unet": unet} | ({"ema": ema} if ema else {})

    # Where the run stands.
    first, position = 0, 0
    saved = run_folder / "state.safetensors"
    if args.resume and saved.exists():
        info = state.load(saved, modules, optimizer)
        first, position = info["update"], info["position"]
        print(f"going on after update {first} of {run_folder}")
    moments = None
    if args.cache_latents:
        moments, captions = encode_all(vae, data, autocast, device)
    stream = Stream(data, args.seed, position)
    state.write_text(run_folder / "run.json", json.dumps({"args": vars(args) | {"resume": None}}, indent=1) + "\n")

    net = torch.compile(unet) if args.compile else unet
    if args.compile:
        vae.decode = torch.compile(vae.decode)

    def batch(generator) -> tuple:
        """Scaled latents of the next real images, and their captions; no latents where no image is needed."""
        if moments is not None:
            rows = stream.indices(args.batch_size)
            mean, logvar = moments[rows].to(device).float().unbind(1)
            return vae.draw(mean, logvar, generator), [captions[i] for i in rows]
        images, prompts = stream.batch(args.batch_size)
        with torch.no_grad():
            return (vae.sample(images.to(device), generator) if args.method != "refl" else None), prompts

    def loss_of(update: int, generator) -> tuple:
        """The loss of one pass, and what to log."""
        x0, prompts = batch(generator)
        if not tuning:
            dropped = torch.rand(len(prompts), generator=generator) < args.caption_dropout
            prompts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
        conditioning = text(prompts, size)
        if not tuning:
            return pretraining_loss(net, SCHEDULER, x0, conditioning, generator, args.snr_gamma)
        if args.method == "refl" or is_refl_update(update):
            shape = (len(prompts), vae.config.latent_channels, *(side // vae.factor for side in size))
            loss, log = refl_loss(net, vae, reward, SCHEDULER, shape, conditioning, prompts, generator)
            return args.reward_scale * loss, log
        return imagerefl_loss(
            net, vae, reward, SCHEDULER, x0, args.start, conditioning, prompts, generator,
            args.reward_scale, args.diffusion_scale,
        )  # fmt: skip

    # What to show: fixed prompts and seeds, the base beside the tuned model.
    prompts = read_prompts(args.prompts) if args.prompts else list(row.prompts)

    @torch.no_grad()
    def images_of(shown: list[str], count: int, switch: int, tuned=None) -> torch.Tensor:
        """`count` images a prompt, the base taking the first `switch` of 40 steps: (prompts * count, 3, H, W)."""
        base_half, tuned_half = lora.halves(unet) if args.lora else (base, tuned or unet)
        asked, seeds = [p for p in shown for _ in range(count)], [i for _ in shown for i in range(count)]
        made, chunk = [], 2 * args.batch_size
        for at in range(0, len(asked), chunk):
            part = slice(at, at + chunk)
            with autocast():
                made.append(
                    generate(
                        base_half, tuned_half, vae, text, SCHEDULER, switch_weights(40, switch),
                        asked[part], seeds[part], size, row.guidance,
                    ).float()
                )  # fmt: skip
        return torch.cat(made)

    def show(update: int) -> None:
        shown, count = prompts[:6], 2
        if tuning:
            sides = {"base": images_of(shown, count, 40), "tuned": images_of(shown, count, 0)}
        else:  # the model in training takes all steps, with guidance
            sides = {"model": images_of(shown, 2 * count, 40, ema or unet)}
        columns = [to_pictures(images) for images in sides.values()]
        per_row = len(columns[0]) // len(shown)
        rows = [[p for side in columns for p in side[per_row * r : per_row * (r + 1)]] for r in range(len(shown))]
        heads = [f"{name}, seed {i}" for name in sides for i in range(per_row)]
        save_png(grid(rows, shown, heads), run_folder / "samples" / f"step-{update:06d}.png")

    # The loop.
    stop = []
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append("stopped"))
    before = measure(images_of(prompts, 4, 40), prompts, 4, reward, judge, row) if tuning and not first else None
    if args.sample_every and not first:
        show(0)
    log_file = open(run_folder / "log.jsonl", "a")  # noqa: SIM115
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc=args.method, unit="update")
    skipped = 0
    for update in bar:
        began = time.time()
        for group in optimizer.param_groups:
            group["lr"] = rate(args, update)
        logs: list[dict] = []
        for micro in range(args.accumulate):
            with autocast():
                loss, log = loss_of(update, generator_of(args.seed, update, micro))
            (loss / args.accumulate).backward()
            logs.append(log)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
            tqdm.write(f"update {update + 1}: the gradient is not finite, skipped (number {skipped})", file=sys.stderr)
            if skipped >= 10:
                raise ValueError("10 updates had no finite gradient; try a lower --lr, --max-grad-norm 1, or float32")
        optimizer.zero_grad(set_to_none=True)
        if ema:
            torch._foreach_lerp_(list(ema.parameters()), parameters, 1 - min(args.ema, (update + 1) / (update + 10)))

        values = {key: sum(log[key].item() for log in logs) / len(logs) for key in logs[0]}
        values |= {"grad_norm": norm.item(), "seconds": round(time.time() - began, 4)}
        if device != "cpu":
            values["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        kind = "refl" if args.method == "imagerefl" and is_refl_update(update) else args.method
        log_file.write(json.dumps({"update": update + 1, "kind": kind, "lr": rate(args, update)} | values) + "\n")
        log_file.flush()
        bar.set_postfix({key: f"{value:.3g}" for key, value in values.items()})
        last = update + 1 == args.steps or stop
        if last or (update + 1) % args.save_every == 0:
            state.save(saved, modules, optimizer, {"update": update + 1, "position": stream.position})
        if args.sample_every and ((update + 1) % args.sample_every == 0 or last):
            show(update + 1)
        if stop:
            print(f"\nstopped after update {update + 1}; go on with: python train.py --resume {run_folder}")
            return
    log_file.close()

    # The result.
    unet.eval()
    about = {"base": args.base, "method": args.method, "reward": args.reward if tuning else "none"}
    about |= {"step": str(args.steps), "version": settings.VERSION}
    if args.lora:
        lora.save(unet, run_folder, metadata=about)
    else:
        weights.save_unet(ema or unet, run_folder / "unet", metadata=about)
    finished = {"args": vars(args) | {"resume": None}, "finished": True}
    if stream.left_out:
        print(f"{len(stream.left_out)} images did not decode and were left out")
    if tuning:
        switch = row.switch[args.method]
        table = {"base": before} if before else {}
        table["tuned"] = measure(images_of(prompts, 4, 0), prompts, 4, reward, judge, row)
        table[f"--switch {switch}"] = measure(images_of(prompts, 4, switch), prompts, 4, reward, judge, row)
        print(f"\n{len(prompts)} prompts x 4 seeds\n{layout(table)}")
        finished["table"] = table
        print(
            f"\nsample from it:  python sample.py --checkpoint {run_folder} --switch {switch} --prompt '{prompts[0]}'"
        )
    state.write_text(run_folder / "run.json", json.dumps(finished, indent=1) + "\n")
    print(f"written to {run_folder}")


@torch.no_grad()
def measure(images, prompts: list[str], count: int, reward, judge, row: settings.Settings) -> dict[str, list[float]]:
    """Mean and standard deviation of the rewards, and mean diversity, of `count` images a prompt."""
    asked, group = [p for p in prompts for _ in range(count)], [i for i in range(len(prompts)) for _ in range(count)]
    table = {}
    for name, score in {"reward": reward, "judge": judge}.items():
        if score is not None:
            values = score(images, asked).float()
            table[name] = [values.mean().item(), values.std().item()]
    if row is settings.TINY:
        features = metrics.clip_features(settings.FEATURES, images.device)(images)
        per_prompt = metrics.group_diversity(features, group)
        table["diversity"] = [per_prompt.mean().item(), per_prompt.std().item()]
    return table


def layout(table: dict[str, dict[str, list[float]]]) -> str:
    """The table as text: mean and standard deviation."""
    columns = list(next(iter(table.values())))
    lines = [f"{'':12}" + "".join(f"{column:>20}" for column in columns)]
    for name, values in table.items():
        lines.append(f"{name:12}" + "".join(f"{m:>12.4f} ± {s:.3f}" for m, s in (values[c] for c in columns)))
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, ARGS)
