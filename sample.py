"""Sample with combined generation (Eq. 3): the base model takes the first `--switch` steps, the tuned one the rest.

    python sample.py --switch 30

Without `--checkpoint` it uses the newest run under `runs/`, else the tuned model that comes with the tiny base. Writes
one PNG per image, with its settings as metadata, and a labelled grid.
"""

from argparse import Namespace
from itertools import product
from pathlib import Path

from training import presets
from utils import cli
from utils.sample_options import parse_args

if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports, so that --help answers at once

import torch
from tqdm import tqdm

from combined import aig_weights, cfg, combine, combined_weights, conditional, initial_noise, rescale_switch
from pretrained.loading import (
    check_resolution,
    load_text,
    load_tuned,
    load_vae,
    own_base,
    read_config,
    tuning_metadata,
)
from scheduler import Scheduler
from training.data import check_unicode, read_prompts
from utils import disk
from utils.acceleration import for_sampling
from utils.device import choose_device, default_dtype, frozen_dtype, sampling_autocast
from utils.images import grid, save_png, to_pil

GROUP = 8  # batches per group; the base model finishes a whole group before the tuned model is loaded
GRID_PROMPTS = 64  # prompts in grid.png


@torch.no_grad()
def main(args: Namespace) -> None:
    weights = resolve(args)  # of the tuned model, at each step
    scheduler, size, n = Scheduler(args.steps, args.eta), (args.resolution, args.resolution), args.images_per_prompt
    dtype, one_at_a_time = frozen_dtype(args), args.aig is None
    base, tuned = load_tuned(
        args.checkpoint, args.base, args.device, dtype, one_at_a_time, lambda unet: for_sampling(unet, args.compile)
    )
    vae, text = load_vae(args.base, args.device, dtype), load_text(args.base, args.device, dtype)
    text.report_cut(args.prompts)
    for_sampling(vae.decoder, args.compile)
    switch = weights.count(0.0) if one_at_a_time else 0
    phases = [scheduler.steps[:switch], scheduler.steps[switch:]]  # one model is in memory in each

    for number, line in enumerate(args.geneval_lines):
        disk.write_text(geneval_folder(Path(args.output_dir), number) / "metadata.jsonl", line + "\n")
    jobs = [(prompt, args.seed + k) for prompt in args.prompts for k in range(n)]
    batches = [jobs[at : at + args.batch_size] for at in range(0, len(jobs), args.batch_size)]
    output, done, shown = Path(args.output_dir), 0, []
    with tqdm(total=len(batches) * args.steps, desc="sampling", unit="step") as bar, sampling_autocast(args):
        for group in (batches[at : at + GROUP] for at in range(0, len(batches), GROUP)):
            samples = []
            for batch in group:
                prompts, seeds = map(list, zip(*batch, strict=True))
                c, c_empty = text(prompts, size), text([""] * len(batch), size)
                x_T, generators = initial_noise(vae, seeds, size, args.device)
                samples.append([x_T, generators, cfg(base, c, c_empty, args.guidance), conditional(tuned, c)])
            for steps in phases:
                for sample in samples:
                    x_t, generators, eps_base, eps_tuned = sample
                    sample[0] = combine(scheduler, eps_base, eps_tuned, weights, x_t, generators, steps, bar.update)
            for image in (image for x0, *_ in samples for image in to_pil(vae.decode(x0))):
                prompt, seed = jobs[done]
                save_png(image, image_path(output, *divmod(done, n), args), parameters_line(prompt, seed, args))
                shown += [image] if done < GRID_PROMPTS * n else []
                done += 1
    rows = [shown[i : i + n] for i in range(0, len(shown), n)]
    heads = [f"seed {args.seed + k}" for k in range(n)]
    cell = min(256, max(128, args.resolution))
    save_png(grid(rows, args.prompts[:GRID_PROMPTS], heads, cell), output / "grid.png")
    print(f"{len(jobs)} images and grid.png written to {output}")


def resolve(args: Namespace) -> list[float]:
    """Fill in defaults, in place; returns the weight schedule. Raises ValueError for bad input."""
    if args.checkpoint is None:
        newest = presets.newest_run(Path("runs"))
        args.checkpoint = str(newest or presets.TUNED)
        which = "the newest run" if newest else "the one that comes with the tiny base"
        print(f"checkpoint: {args.checkpoint} ({which})")
    known = tuning_metadata(args.checkpoint)
    args.base = args.base or known.get("base") or own_base(args.checkpoint) or "tiny"
    preset = presets.preset_for(args.base, read_config(args.base, "unet"))
    if args.aig is not None and args.switch is not None:
        raise ValueError("--aig and --switch: give one of the two")
    if args.switch is None:
        method = known.get("method")
        switch = preset.switch.get(method, 0 if method == "diffusion" else preset.switch["imagerefl"])
        args.switch = rescale_switch(switch, args.steps)
    if args.guidance is None:
        args.guidance = preset.guidance if args.aig is None else 1.0  # the official AIG guides neither model
    args.device = choose_device(args.device)
    args.dtype = args.dtype or default_dtype(args.device)
    args.resolution = args.resolution or preset.resolution
    check_resolution(args.base, args.resolution)
    args.batch_size = args.batch_size or (32 if preset is presets.TINY else 8)
    if bool(args.prompt) + bool(args.prompts) + bool(args.geneval) > 1:
        raise ValueError("--prompt, --prompts and --geneval: give one of them")
    check_unicode(args.prompt or [], "--prompt")
    prompts = args.prompts or args.geneval
    args.prompts = args.prompt or (read_prompts(prompts) if prompts else list(preset.prompts))
    args.geneval_lines = []
    if args.geneval:
        lines = Path(args.geneval).read_text(encoding="utf-8").splitlines()
        args.geneval_lines = [line for line in lines if line.strip()]
        if len(args.geneval_lines) != len(args.prompts):
            raise ValueError(f"--geneval {args.geneval}: give evaluation_metadata.jsonl, a JSON object per line")
    args.output_dir = output_folder(args)
    Scheduler(args.steps, args.eta)  # checks both
    if args.aig is not None:
        return aig_weights(args.steps, args.aig)
    try:
        return combined_weights(args.steps, args.switch)
    except ValueError as error:
        raise ValueError(f"--switch {args.switch}: {error}") from None


def geneval_folder(output: Path, number: int) -> Path:
    """The folder of a prompt that GenEval's scorer reads."""
    return output / f"{number:05d}"


def image_path(output: Path, number: int, k: int, args: Namespace) -> Path:
    """The file of the k-th image of a prompt."""
    if args.geneval:
        return geneval_folder(output, number) / "samples" / f"{k:04d}.png"
    return output / f"{number:05d}-{args.seed + k}.png"


def output_folder(args: Namespace) -> str:
    """`--output-dir`, by default the first of samples, samples-2, ... without images.

    Raises ValueError if it holds images of an earlier call that this one would not replace.
    """
    names = [args.output_dir] if args.output_dir else ["samples", *(f"samples-{i}" for i in range(2, 10_000))]
    name = next((name for name in names if not (Path(name) / "grid.png").exists()), names[0])
    cli.check_writable(Path(name))
    places = product(range(len(args.prompts)), range(args.images_per_prompt))
    ours = {image_path(Path(name), *place, args) for place in places}
    left = sorted({path for kind in ("*-*.png", "*/samples/*.png") for path in Path(name).glob("[0-9]" + kind)} - ours)
    if left:
        raise ValueError(
            f"--output-dir {name}: holds images of an earlier call, as {left[0].name}; name another folder"
        )
    return name


def parameters_line(prompt: str, seed: int, args: Namespace) -> str:
    """An image's settings in the format that A1111 writes and others read."""
    sampler = {0.0: "DDIM", 1.0: "DDPM"}.get(args.eta, f"DDIM eta {args.eta:g}")
    mix = f"AIG: {args.aig:g}" if args.aig is not None else f"Switch: {args.switch}"
    side = args.resolution
    return (
        f"{prompt}\nSteps: {args.steps}, Sampler: {sampler}, CFG scale: {args.guidance:g}, Seed: {seed}, "
        f"Size: {side}x{side}, Model: {args.base}, {mix}, Tuned: {args.checkpoint}, "
        f"Version: ImageReFL {presets.VERSION}"
    )


if __name__ == "__main__":
    cli.run(main, ARGS)
