"""Sample: combined generation (Eq. 3), the base model in the first `--switch` steps, the tuned one in the rest.

    python sample.py --switch 30

With no `--checkpoint` the newest run under `runs/` is used, else the tuned model that ships with the tiny base. Writes
one PNG an image, with its settings inside, and a labelled grid.
"""

from pathlib import Path

from training import presets
from utils import cli
from utils.cli import Parser, number, positive, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", action="append", help="what to draw; may be given several times")
    add("--prompts", help="file of prompts, one a line, or a JSON list")
    add("--base", help="tiny, sd15, sdxl, or a folder, file or hub id (default: the checkpoint's base, else tiny)")
    add("--checkpoint", help="tuned model: a run's folder, a UNet's, an adapter's file, or a published hub id")
    add("--switch", type=int, help="steps of the base model; 0: the tuned one alone (default: the paper's)")
    add(
        "--aig",
        type=number(float, 0),
        metavar="P",
        help="instead of a switch: AIG, tuned weight (i / T)^P, and no guidance",
    )
    add("--steps", type=positive, default=40)
    add(
        "--guidance",
        type=number(float, 0),
        help="of the base model (default: 7.5, SDXL 5.0, tiny 2.0); the tuned one has none",
    )
    add("--eta", type=float, default=1.0, help="0: DDIM, 1: DDPM (default: 1, as in the official code)")
    add("--resolution", type=positive, help="pixels (default: 512, tiny 64)")
    add(
        "--seed",
        type=number(int, 0, 2**62),
        default=1,
        help="of the first image of each prompt; the next have the next seeds",
    )
    add("--images-per-prompt", type=positive, default=4)
    add("--batch-size", type=positive, help="images at a time (default: 8, tiny 32)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 where the processor has it")
    add("--compile", action="store_true", help="torch.compile the networks: for GPUs, slow to start")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--output-dir", default="samples")
    return parser.parse(argv)


ARGS = parse_args() if __name__ == "__main__" else None  # before the slow imports, so that --help answers at once

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import weights  # noqa: E402
from combined import aig_weights, combined_weights, generate  # noqa: E402
from scheduler import Scheduler  # noqa: E402
from speed import prepacked  # noqa: E402
from training.data import check_unicode, read_prompts  # noqa: E402
from utils.images import grid, save_png, to_pil  # noqa: E402

TOGETHER = 8  # batches that one change from base to tuned model serves
GRID = 64  # prompts in grid.png, the first ones


def parameters_line(prompt: str, seed: int, args, size: tuple[int, int]) -> str:
    """How an image was made, in the form that A1111 writes and others read."""
    H, W = size
    sampler = {0.0: "DDIM", 1.0: "DDPM"}.get(args.eta, f"DDIM eta {args.eta:g}")
    mix = f"AIG: {args.aig:g}" if args.aig is not None else f"Switch: {args.switch}"
    return (
        f"{prompt}\nSteps: {args.steps}, Sampler: {sampler}, CFG scale: {args.guidance:g}, Seed: {seed}, "
        f"Size: {W}x{H}, Model: {args.base}, {mix}, Tuned: {args.checkpoint}, Version: ImageReFL {presets.VERSION}"
    )


def choose(args) -> dict:
    """Fill in checkpoint and base; returns what is known of how the checkpoint was tuned."""
    if args.checkpoint is None:
        newest = presets.newest_run(Path("runs"))
        args.checkpoint = str(newest or presets.TUNED)
        print(
            f"checkpoint: {args.checkpoint} ({'the newest run' if newest else 'the one that ships with the tiny base'})"
        )
    known = weights.tuning_metadata(args.checkpoint)
    args.base = args.base or known.get("base") or weights.own_base(args.checkpoint) or "tiny"
    return known


def ticking(unet, bar: tqdm):
    """The UNet, and a tick of the bar after each pass through it."""

    def call(*args, **kwargs):
        eps = unet(*args, **kwargs)
        bar.update()
        return eps

    return call


def compiled(network: torch.nn.Module) -> None:
    """A graph for each number of images: in one for all, convolutions would not be as fast on a GPU."""
    prepacked.prepare_for_compile(network).compile(dynamic=False)


def main(args) -> None:
    known = choose(args)
    config = weights.read_config(args.base, "unet")
    row = presets.preset_for(args.base, config)
    if args.aig is not None and args.switch is not None:
        raise ValueError("--aig and --switch: give one of the two")
    if args.switch is None:
        method = known.get("method")
        switch = row.switch.get(method, 0 if method == "diffusion" else row.switch["imagerefl"])
        args.switch = round(switch * args.steps / 40)
    if args.guidance is None:
        args.guidance = row.guidance if args.aig is None else 1.0  # the official AIG guides neither model
    args.device = cli.device(args.device)
    args.dtype = args.dtype or cli.dtype(args.device)
    resolution = args.resolution or row.resolution
    weights.check_resolution(args.base, resolution)
    batch = args.batch_size or (32 if row is presets.TINY else 8)
    if args.prompt and args.prompts:
        raise ValueError("--prompt and --prompts: give one of the two")
    check_unicode(args.prompt or [], "--prompt")
    cli.check_writable(Path(args.output_dir))
    prompts = args.prompt or (read_prompts(args.prompts) if args.prompts else list(row.prompts))
    scheduler = Scheduler(args.steps, args.eta)
    if args.aig is not None:
        mixture = aig_weights(args.steps, args.aig)
    else:
        try:
            mixture = combined_weights(args.steps, args.switch)
        except ValueError as error:
            raise ValueError(f"--switch {args.switch}: {error}") from None

    dtype = cli.stored(args)
    faster = compiled if args.compile else prepacked.prepack
    base, tuned = weights.load_tuned(args.checkpoint, args.base, args.device, dtype, args.aig is None, faster)
    vae, text = weights.load_vae(args.base, args.device, dtype), weights.load_text(args.base, args.device, dtype)
    faster(vae.decoder)

    output, size = Path(args.output_dir), (resolution, resolution)
    jobs = [(p, args.seed + k) for p in prompts for k in range(args.images_per_prompt)]
    n, together = args.images_per_prompt, TOGETHER * batch
    shown = []  # in the grid
    passes = -(-len(jobs) // batch) * sum((w < 1) + (w > 0) for w in mixture)
    with tqdm(total=passes, desc="sampling", unit="pass") as bar:
        base, tuned = ticking(base, bar), ticking(tuned, bar)
        for at in range(0, len(jobs), together):
            asked, seeds = zip(*jobs[at : at + together], strict=True)
            with cli.sampling(args):
                images = generate(
                    base, tuned, vae, text, scheduler, mixture, list(asked), list(seeds), size, args.guidance, batch
                )
            pictures = to_pil(images)
            for i, (prompt, seed, picture) in enumerate(zip(asked, seeds, pictures, strict=True), at):
                save_png(picture, output / f"{i // n:05d}-{seed}.png", parameters_line(prompt, seed, args, size))
            shown = (shown + pictures)[: GRID * n]
    rows = [shown[i : i + n] for i in range(0, len(shown), n)]
    heads = [f"seed {args.seed + k}" for k in range(n)]
    save_png(grid(rows, prompts[:GRID], heads, cell=min(256, max(128, resolution))), output / "grid.png")
    print(f"{len(jobs)} images and grid.png written to {output}")


if __name__ == "__main__":
    run(main, ARGS)
