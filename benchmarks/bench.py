"""Time and memory of our code and of diffusers, in one run, with the same weights, inputs and noise.

    python benchmarks/bench.py                             on a CPU: nine minutes on two cores
    python benchmarks/bench.py --device cuda --compile     full sizes in bf16; most of the time is compilation
    python benchmarks/bench.py --engines openvino onnxruntime --work unet-sd15 decode sample

Weights are random. That both sides compute the same is asserted in float32 before anything is timed. The sides take
turns, so that a busy machine slows both; medians are reported. Writes a JSON file and a Markdown table.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.options import bench_args
from utils.cli import run

if __name__ == "__main__":
    ARGS = bench_args(__doc__)

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import speed
import unet as unets
import vae as vaes
from benchmarks import engines, networks, updates
from benchmarks.measure import Side, count_tflop, machine, measure, resident_bytes, tensors_of
from combined import cfg
from scheduler import Scheduler, denoise, sample_noise
from speed import prepacked
from utils import disk

MIDDLE_UNET = replace(unets.SD15, channels=(128, 256, 512, 512))  # a sixth of SD1.5's arithmetic
MIDDLE_VAE = replace(vaes.SD15, channels=(32, 64, 128, 128))
COLUMNS = ("work", "TFLOP", "ours", "diffusers", "x", "ours compiled", "diffusers compiled", "x")
COLUMNS += ("peak, ours / diffusers", "difference", "rate")


@dataclass(frozen=True)
class Sizes:
    """What is measured on a device. Sides are those of the latents."""

    unet: unets.UNetConfig  # of sampling and updates; the forward passes use SD1.5 and SDXL themselves
    vae: vaes.VAEConfig  # of updates; decoding uses SD1.5's
    side: int  # of sampling and updates
    side_sd15: int
    side_sdxl: int
    side_decode: int
    batch: int  # of forward passes, decoding and sampling
    batch_update: int  # micro-batch of an update
    accumulate: int
    dtype: torch.dtype  # of forward passes, decoding and sampling


SIZES = {
    "tiny": Sizes(unets.TINY, vaes.TINY, 8, 8, 8, 4, 1, 1, 1, torch.float32),  # a rehearsal
    "cpu": Sizes(MIDDLE_UNET, MIDDLE_VAE, 16, 32, 32, 16, 1, 2, 1, torch.float32),
    "gpu": Sizes(unets.SD15, vaes.SD15, 64, 64, 128, 64, 8, 4, 8, torch.bfloat16),
}

Row = tuple[dict[str, Side], float, str]  # the sides, their difference in float32, a description


def noise(config, batch: int, side: int, device: str) -> Tensor:
    return sample_noise((batch, config.latent_channels, side, side), torch.Generator().manual_seed(2), device)


def sides_of(
    args, sizes: Sizes, pair: networks.Pair, packed, fresh: Callable, ours: Callable, theirs: Callable, inputs: tuple
) -> dict:
    """The sides of a row without gradients: `ours(network)` and `theirs(network)` do the work with a network.

    `packed` is a packed copy of our network, `fresh()` makes another pair with the same weights. `inputs`: one call's.
    """
    built = build_engines(args, sizes, pair[0], inputs)
    started = our_startup(pair[0], inputs, sizes.dtype) if built else None
    method = "forward" if isinstance(pair[0], unets.UNet) else "decode"
    networks.to_dtype(pair, sizes.dtype)
    prepacked.invalidate(packed)

    def side(f: Callable, network, owner=None) -> Side:
        return Side(lambda: f(network), lambda: tensors_of(owner or network))

    sides = {"ours": replace(side(ours, packed, pair[0]), startup=started)}
    if pair[1] is not None:
        sides["diffusers"] = side(theirs, pair[1], pair[0])
    if args.device == "cpu":
        sides["ours, not packed"] = side(ours, pair[0])
    if args.channels_last and method == "forward":
        sides["channels_last"] = side(ours, copy.deepcopy(pair[0]).to(memory_format=torch.channels_last))
    if args.compile:
        compiled = copy.deepcopy(pair[0])
        speed.for_sampling(compiled if method == "forward" else compiled.decoder, compiled=True)
        sides["ours compiled"] = side(ours, compiled)
        if pair[1] is not None:
            best = networks.compile_diffusers(fresh()[1].to(sizes.dtype), method, args.mode)
            sides["diffusers compiled"] = side(theirs, best)
    return sides | engine_sides(built, sizes, pair[0], ours)


def build_engines(args, sizes: Sizes, network: nn.Module, inputs: tuple) -> dict[str, tuple[engines.Engine, float]]:
    """Our float32 network in the engines of `--engines`, and GB by which the process has grown with each."""
    built = {}
    for name in args.engines:
        before = resident_bytes()[0]
        engine = engines.Engine(name, network, inputs, sizes.dtype)
        built[name] = engine, max(resident_bytes()[0] - before, 0) / 1e9
    return built


@torch.no_grad()
def engine_sides(built: dict, sizes: Sizes, network: nn.Module, ours: Callable) -> dict[str, Side]:
    """Sides of engines whose results equal ours: in float32 to 1e-3, in bf16 to its rounding over all layers."""
    sides = {}
    for name, (engine, kept) in built.items():
        tolerance = 1e-3 if sizes.dtype == torch.float32 else 0.1
        difference = networks.check_equal(ours(engine), ours(network), tolerance)
        print(
            f"  {name}: conversion {engine.conversion:.1f} s, start-up {engine.startup:.1f} s, keeps {kept:.2f} GB, "
            f"differs by {difference:.0e}",
            flush=True,
        )
        sides[name] = Side(functools.partial(ours, engine), list, kept, engine.startup)
    return sides


@torch.no_grad()
def our_startup(network: nn.Module, inputs: tuple, dtype: torch.dtype) -> float:
    """Seconds from a safetensors file to a packed network that has run once, less a second run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.safetensors")
        save_file(network.state_dict(), path)

        def load() -> nn.Module:
            with torch.device("meta"):
                ours = type(network)(network.config)
            ours.load_state_dict(load_file(path), assign=True)
            return prepacked.prepack(ours.requires_grad_(False).to(dtype))

        given = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        return engines.startup(load, lambda ours: engines.Positional(ours)(*given))[0]


def forward(args, sizes: Sizes, config: unets.UNetConfig, side: int) -> Row:
    """One forward pass of a UNet."""
    pair = networks.unet_pair(config, args.device)
    packed, x = speed.packed_copy(pair[0]), noise(config, 1, side, args.device)
    c = networks.conditioning(config, 1, args.device, torch.float32)
    with torch.no_grad():
        theirs = pair[1](x, 500, **networks.diffusers_arguments(c))[0]
        difference = networks.check_equal(packed(x, 500, **c), theirs, 1e-4)
    x = x.expand(sizes.batch, -1, -1, -1).to(sizes.dtype).contiguous()
    c = networks.conditioning(config, sizes.batch, args.device, sizes.dtype)
    t, their_c = torch.full((sizes.batch,), 500, device=args.device), networks.diffusers_arguments(c)
    sides = sides_of(
        args, sizes, pair, packed, lambda: networks.unet_pair(config, args.device),
        lambda unet: unet(x, t, **c), lambda unet: unet(x, t, **their_c), (x, t, *c.values()),
    )  # fmt: skip
    return sides, difference, f"batch {sizes.batch}, {8 * side} pixels, {name_of(sizes.dtype)}"


def decode(args, sizes: Sizes) -> Row:
    """Latents to images with SD1.5's autoencoder."""
    config = sizes.vae if args.sizes == "tiny" else vaes.SD15
    pair = networks.vae_pair(config, args.device)
    packed, z = speed.packed_copy(pair[0]), noise(config, 1, sizes.side_decode, args.device)
    with torch.no_grad():
        theirs = pair[1].decode(z / config.scale, return_dict=False)[0]
        difference = networks.check_equal(packed.decode(z), theirs, 1e-4)
    z = z.expand(sizes.batch, -1, -1, -1).to(sizes.dtype).contiguous()
    sides = sides_of(
        args, sizes, pair, packed, lambda: networks.vae_pair(config, args.device),
        lambda vae: vae.decode(z), lambda vae: vae.decode(z / config.scale, return_dict=False), (z,),
    )  # fmt: skip
    return sides, difference, f"batch {sizes.batch}, {8 * sizes.side_decode} pixels, {name_of(sizes.dtype)}"


def sample(args, sizes: Sizes, guidance: float) -> tuple[dict[str, Side], float | None, str]:
    """Forty steps from noise to latents: ours as in `sample.py`, and diffusers' pipeline if it is installed."""
    config, scheduler = sizes.unet, Scheduler(40, eta=1.0)
    pair, vae = networks.unet_pair(config, args.device), networks.vae_pair(sizes.vae, args.device)[1]
    packed = speed.packed_copy(pair[0])

    def inputs(batch: int, dtype: torch.dtype) -> tuple[Tensor, dict, dict]:
        c = networks.conditioning(config, batch, args.device, dtype)
        return noise(config, batch, sizes.side, args.device), c, {key: torch.zeros_like(t) for key, t in c.items()}

    def seeds(batch: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(batch)]

    @torch.no_grad()
    def ours(unet, x_T: Tensor, c: dict, c_empty: dict) -> Tensor:
        return denoise(scheduler, cfg(unet, c, c_empty, guidance), x_T, scheduler.steps, seeds(len(x_T)))

    def theirs(unet, x_T: Tensor, c: dict, c_empty: dict) -> Tensor:
        import diffusers

        steps = diffusers.DDIMScheduler(**networks.SCHEDULE, set_alpha_to_one=True)
        parts = {"vae": vae, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": steps}
        off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**parts, **off)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            prompt_embeds=c["context"], negative_prompt_embeds=c_empty["context"], latents=x_T.to(unet.dtype),
            num_inference_steps=40, guidance_scale=guidance, eta=1.0, generator=seeds(len(x_T)), output_type="latent",
        ).images  # fmt: skip

    once, difference = inputs(1, torch.float32), None
    if pair[1] is not None:
        difference = networks.check_equal(ours(packed, *once), theirs(pair[1], *once), 1e-3)
    batch, t = inputs(sizes.batch, sizes.dtype), torch.full((sizes.batch,), 500)
    sides = sides_of(
        args, sizes, pair, packed, lambda: networks.unet_pair(config, args.device),
        lambda unet: ours(unet, *batch), lambda unet: theirs(unet, *batch),
        tuple(torch.cat([t] * (1 if guidance == 1 else 2)) for t in (batch[0], t, *batch[1].values())),
    )  # fmt: skip
    words = f"batch {sizes.batch}, {8 * sizes.side} pixels, guidance {guidance:g}, {name_of(sizes.dtype)}"
    return sides, difference, words


def update(args, sizes: Sizes, method: str) -> Row:
    """One optimizer update of a method: ours, and one composed from diffusers as in the official code."""
    reward = {"gpu": "hpsv2.1"}.get(args.sizes, "tiny")
    batch = (sizes.batch_update, sizes.accumulate)
    task = updates.Task(sizes.unet, sizes.vae, sizes.side, *batch, args.device, reward)
    reward = task.load_reward()
    difference = updates.check_gradient(method, task, reward)
    updates.to_training_dtype(task, reward)
    sides = {"ours": updates.our_sides([method], task, reward)[method]}
    sides["diffusers"] = updates.diffusers_side(method, task, reward)
    if args.compile and args.device != "cpu":
        sides["ours compiled"] = updates.our_sides([method], task, reward, compiled=True)[method]
    batch = " x ".join(map(str, batch[: 1 + (batch[1] > 1)]))
    dtype = "bf16 autocast" if task.args().dtype == "bfloat16" else "float32"
    return sides, difference, f"batch {batch}, {task.pixels} pixels, {dtype}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row_of(args, name: str) -> Row:
    sizes = SIZES[args.sizes]
    if args.dtype:
        sizes = replace(sizes, dtype=getattr(torch, args.dtype))
    sd15, sdxl = (sizes.unet, sizes.unet) if args.sizes == "tiny" else (unets.SD15, unets.SDXL)
    return {
        "unet-sd15": lambda: forward(args, sizes, sd15, sizes.side_sd15),
        "unet-sd15-large": lambda: forward(args, sizes, sd15, 2 * sizes.side_sd15),  # on a CPU 512 pixels
        "unet-sdxl": lambda: forward(args, sizes, sdxl, sizes.side_sdxl),
        "decode": lambda: decode(args, sizes),
        "sample": lambda: sample(args, sizes, 1.0),
        "sample-guided": lambda: sample(args, sizes, 7.5),
        "refl": lambda: update(args, sizes, "refl"),
        "imagerefl": lambda: update(args, sizes, "imagerefl"),
    }[name]()


def table(about: dict, rows: list[dict]) -> str:
    """The results as Markdown."""
    lines = ["# Ours beside diffusers", "", f"{', '.join(f'{key} {value}' for key, value in about.items())}.", ""]
    lines += [
        "Medians in seconds. `x`: diffusers' time divided by ours, with its range over the turns in brackets; where",
        "diffusers has no compiled side, its eager one is used. Peak: what a side keeps (weights, optimizer) plus what",
        "the call allocates, GB. Difference: relative, of the float32 results. Rate: FLOPs of diffusers divided by the",
        "time of our fastest side, as a share of the device's measured matrix rate (on a CPU that of the row's dtype,",
        "else of bf16); our own FLOPs are up to 15 % fewer. A dash: not measured. On a CPU our layers are packed, as",
        "in `sample.py` (`speed/prepacked.py`); the JSON file also has unpacked ones.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        sides = row["sides"]
        cells = [f"{row['work']}: {row['words']}", f"{row['tflop']:.3g}"]
        for suffix in ("", " compiled"):
            ours, theirs = sides.get("ours" + suffix), sides.get("diffusers" + suffix)
            cells += [f"{side['seconds']:.3g}" if side else "–" for side in (ours, theirs)]
            cells.append(ratio(ours, theirs or sides["diffusers"]) if ours else "–")
        cells.append(f"{sides['ours']['peak_gb']:.2f} / {sides['diffusers']['peak_gb']:.2f}")
        best = min(side["seconds"] for name, side in sides.items() if name.startswith("ours"))
        rate = about.get("float32_tflops" if "float32" in row["words"] else "bf16_tflops", about["bf16_tflops"])
        cells += [f"{row['difference']:.0e}", f"{100 * row['tflop'] / best / rate:.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines + engine_table(rows)) + "\n"


def engine_table(rows: list[dict]) -> list[str]:
    """A second table, of other engines beside ours, if `--engines` was given. Start-up: from a file of weights."""
    heads = ("work", "engine", "s", "x", "start-up, s", "with start-up, s", "peak, GB")
    lines = ["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        ours = row["sides"]["ours"]["seconds"]
        for name, side in row["sides"].items():
            if "startup" in side:
                cells = f"{row['work']}: {row['words']}", name, f"{side['seconds']:.3g}"
                cells += f"{side['seconds'] / ours:.2f}", f"{side['startup']:.1f}"
                cells += f"{side['startup'] + side['seconds']:.3g}", f"{side['peak_gb']:.2f}"
                lines.append("| " + " | ".join(cells) + " |")
    return lines if len(lines) > 3 else []


def ratio(ours: dict, theirs: dict) -> str:
    """How many times faster ours is, by medians, and the range over the turns; bold where ours is faster in each."""
    turns = [b / a for a, b in zip(ours["runs"], theirs["runs"], strict=True)]
    bold = "**" * (min(turns) > 1)
    return f"{bold}{theirs['seconds'] / ours['seconds']:.2f}{bold} ({min(turns):.2f}–{max(turns):.2f})"


def main(args: argparse.Namespace) -> None:
    if not networks.has_diffusers():
        raise ValueError("diffusers is not installed; pip install -r requirements-dev.txt")
    for engine in args.engines:
        if absent := engines.missing(engine):
            raise ValueError(f"--engines {engine}: pip install {' '.join(absent)}")
    if args.engines and args.device != "cpu":
        raise ValueError("--engines: measured on a CPU only")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # the results are compared in float32
    args.mode = "max-autotune"  # of diffusers' compiled side
    args.sizes = args.sizes or ("cpu" if args.device == "cpu" else "gpu")
    about, rows = machine(args.device), []
    for name in args.work:
        torch.compiler.reset()  # sizes that differ from an earlier row's would be compiled as dynamic ones
        sides, difference, words = row_of(args, name)
        with torch.set_grad_enabled(name in ("refl", "imagerefl")):
            row = {"work": name, "words": words, "difference": difference}
            row["tflop"] = count_tflop(sides["diffusers"].run)
            rows.append(row | {"sides": measure(sides, args.device, args.repeats, args.seconds)})
        seconds = [f"{side} {values['seconds']:.3g} s" for side, values in rows[-1]["sides"].items()]
        print(f"{name}: {', '.join(seconds)}", flush=True)
        del sides
    again = machine(args.device)  # matrix rates: the higher of before and after, as other work may have slowed one
    about |= {key: max(about[key], again[key]) for key in about if key.endswith("_tflops")}
    path = Path(args.output)
    disk.write_text(path.with_suffix(".json"), json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    disk.write_text(path.with_suffix(".md"), table(about, rows))
    print(table(about, rows))


if __name__ == "__main__":
    run(main, ARGS)
