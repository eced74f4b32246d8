"""Ours beside diffusers, in one run, on the same weights, inputs and noise: time and memory.

    python benchmarks/bench.py                             on a CPU: nine minutes on two cores
    python benchmarks/bench.py --device cuda --compile     full sizes in bf16, where compiling takes the time

Weights are random. That both sides compute the same is asserted in float32 before anything is timed. The sides take
turns, so that a busy machine slows both; medians are reported. Writes a JSON file and a Markdown table.
"""

import argparse
import copy
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import diffusers
import torch
from torch import Tensor, nn

import rewards
import unet as unets
import vae as vaes
from combined import cfg, conditional
from imagerefl import imagerefl_loss
from pretrained import preprocess, reward_networks
from pretrained.configs import unet_dict, vae_dict
from refl import LAST, refl_loss, sample_t_f
from scheduler import Scheduler, denoise, sample_noise
from speed import prepacked
from speed.fused_upsample import fuse
from speed.inference_copy import InferenceCopy
from train import ADAM_EPS
from training import cost, presets
from utils.cli import Parser, positive, run

WORK = ("unet-sd15", "unet-sdxl", "decode", "sample", "sample-guided", "refl", "imagerefl")
MIDDLE_UNET = replace(unets.SD15, channels=(128, 256, 512, 512))  # a sixth of SD1.5's arithmetic
MIDDLE_VAE = replace(vaes.SD15, channels=(32, 64, 128, 128))
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULE |= {"clip_sample": False, "timestep_spacing": "leading"}
COLUMNS = ("work", "TFLOP", "ours", "diffusers", "x", "ours compiled", "diffusers compiled", "x")
COLUMNS += ("peak, ours / diffusers", "difference", "rate")
FAST = {  # of inductor, as diffusers' documentation of fast inference has them
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "epilogue_fusion": False,
    "coordinate_descent_check_all_directions": True,
}


@dataclass(frozen=True)
class Sizes:
    """What is measured on a device. Sides are those of the latents."""

    unet: unets.UNetConfig  # of sampling and of the steps; the forward passes are of SD1.5 and SDXL themselves
    vae: vaes.VAEConfig  # of the steps; decoding is SD1.5's
    side: int  # of sampling and the steps
    side_sd15: int
    side_sdxl: int
    side_decode: int
    batch: int  # of the forward passes, decoding and sampling
    batch_step: int  # images in one pass of a step
    accumulate: int
    dtype: torch.dtype  # of the forward passes, decoding and sampling


SIZES = {
    "tiny": Sizes(unets.TINY, vaes.TINY, 8, 8, 8, 4, 1, 1, 1, torch.float32),  # a rehearsal
    "cpu": Sizes(MIDDLE_UNET, MIDDLE_VAE, 16, 32, 32, 16, 1, 2, 1, torch.float32),
    "gpu": Sizes(unets.SD15, vaes.SD15, 64, 64, 128, 64, 8, 4, 8, torch.bfloat16),
}


@dataclass
class Side:
    """One way of doing the work: `run` does it once, `kept` is all it keeps between two calls."""

    run: Callable[[], object]
    kept: Callable[[], list[Tensor]]


# ------------------------------------------------------------------------------------------- the same networks


def random_weights(shapes: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Weights that keep a signal's variance, cut from one block of noise: billions of them in seconds."""
    block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).to(device)
    made = {}
    for key, t in shapes.items():
        values = block.repeat(-(-t.numel() // len(block)))[: t.numel()].view(t.shape)
        if t.ndim > 1:
            made[key] = values.mul_(t[0].numel() ** -0.5)
        else:
            made[key] = values.mul_(0.1).add_(1) if key.endswith("weight") else values.mul_(0.05)
        made[key] = made[key].clone()  # without the rest of what was repeated
    return made


def both(ours: Callable[[], nn.Module], theirs: type, config: dict, device: str) -> tuple[nn.Module, nn.Module]:
    """A network of ours and diffusers' with the same random weights, in the same memory."""
    with torch.device("meta"):
        pair = (ours(), theirs.from_config(config))
    tensors = random_weights(pair[0].state_dict(), device)
    for network in pair:
        network.load_state_dict(tensors, assign=True)
        network.eval().requires_grad_(False)
    return pair


def both_unets(config: unets.UNetConfig, device: str) -> tuple[nn.Module, nn.Module]:
    return both(lambda: unets.UNet(config), diffusers.UNet2DConditionModel, unet_dict(config), device)


def both_vaes(config: vaes.VAEConfig, device: str) -> tuple[nn.Module, nn.Module]:
    return both(lambda: vaes.VAE(config), diffusers.AutoencoderKL, vae_dict(config), device)


def lowered(pair: tuple[nn.Module, nn.Module], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Both networks in another type, still in the same memory."""
    pair[0].to(dtype)
    pair[1].load_state_dict(pair[0].state_dict(), assign=True)
    return pair


def copied(network: nn.Module) -> nn.Module:
    """The same network with weights of its own that train."""
    network.load_state_dict({key: t.clone() for key, t in network.state_dict().items()}, assign=True)
    return network.requires_grad_(True)


def conditioning_of(config: unets.UNetConfig, batch: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Our UNet's arguments beside latents and timestep."""
    generator = torch.Generator().manual_seed(1)
    given = {"context": sample_noise((batch, 77, config.context), generator, device).to(dtype)}
    if config.pooled:
        sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device=device)
        given |= {
            "pooled": sample_noise((batch, 1280), generator, device).to(dtype),
            "time_ids": sizes.expand(batch, -1),
        }
    return given


def in_their_words(given: dict[str, Tensor]) -> dict:
    words = {"encoder_hidden_states": given["context"], "return_dict": False}
    if "pooled" in given:
        words["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    return words


def their_best(network: nn.Module, method: str = "forward") -> None:
    """Compile a network of diffusers as its documentation of fast inference does."""
    network.to(memory_format=torch.channels_last)
    if method == "forward":
        network.fuse_qkv_projections()
    compiled = torch.compile(getattr(network, method), mode="max-autotune", fullgraph=True)

    def first(*args, **kwargs):  # which compiles; our networks keep inductor's defaults
        with torch._inductor.config.patch(FAST):
            output = compiled(*args, **kwargs)
        setattr(network, method, compiled)
        return output

    setattr(network, method, first)


def apart(ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    """|ours - theirs| / |theirs|, norms over all numbers. Raises ValueError above the tolerance."""
    error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    if not error <= tolerance:
        raise ValueError(f"the two sides differ by {error:.1e} of the result, allowed are {tolerance:.0e}")
    return error


def tensors_of(*things) -> list[Tensor]:
    """Weights of modules, and states of optimizers."""
    found = []
    for thing in things:
        if isinstance(thing, nn.Module):
            found += thing.state_dict().values()
        else:
            found += [t for moments in thing.state.values() for t in moments.values() if isinstance(t, Tensor)]
    return found


# ---------------------------------------------------------------------------------------------------- the work


def forward(args, sizes: Sizes, config: unets.UNetConfig, side: int) -> tuple[dict[str, Side], float, str]:
    """One forward pass of a UNet: the sides, their disagreement, and what is done in words."""
    pair = both_unets(config, args.device)
    quick = prepacked.packed_copy(pair[0])
    x = sample_noise((1, config.latent_channels, side, side), torch.Generator().manual_seed(2), args.device)
    given = conditioning_of(config, 1, args.device, torch.float32)
    with torch.no_grad():
        error = apart(quick(x, 500, **given), pair[1](x, 500, **in_their_words(given))[0], 1e-4)
    ours, theirs = lowered(pair, sizes.dtype)
    prepacked.invalidate(quick)
    x = x.expand(sizes.batch, -1, -1, -1).to(sizes.dtype).contiguous()
    given = conditioning_of(config, sizes.batch, args.device, sizes.dtype)
    t = torch.full((sizes.batch,), 500, device=args.device)

    def kept() -> list[Tensor]:
        return tensors_of(ours)

    sides = {
        "ours": Side(lambda: quick(x, t, **given), kept),
        "diffusers": Side(lambda: theirs(x, t, **in_their_words(given)), kept),
    }
    if args.device == "cpu":
        sides["ours, not packed"] = Side(lambda: ours(x, t, **given), kept)
    if args.channels_last:
        last = copy.deepcopy(ours).to(memory_format=torch.channels_last)
        sides["channels_last"] = Side(lambda: last(x, t, **given), lambda: tensors_of(last))
    if args.compile:
        net = torch.compile(prepacked.prepare_for_compile(copy.deepcopy(ours)))
        best = both_unets(config, args.device)[1].to(sizes.dtype)
        their_best(best)
        sides["ours compiled"] = Side(lambda: net(x, t, **given), kept)
        sides["diffusers compiled"] = Side(lambda: best(x, t, **in_their_words(given)), kept)
    return sides, error, f"batch {sizes.batch}, {8 * side} pixels, {name_of(sizes.dtype)}"


def decode(args, sizes: Sizes) -> tuple[dict[str, Side], float, str]:
    """Latents to images by SD1.5's autoencoder."""
    config = sizes.vae if args.sizes == "tiny" else vaes.SD15
    pair = both_vaes(config, args.device)
    quick = prepacked.packed_copy(pair[0])
    z = sample_noise(
        (1, config.latent_channels, *[sizes.side_decode] * 2), torch.Generator().manual_seed(2), args.device
    )
    with torch.no_grad():
        error = apart(quick.decode(z), pair[1].decode(z / config.scale, return_dict=False)[0], 1e-4)
    ours, theirs = lowered(pair, sizes.dtype)
    prepacked.invalidate(quick)
    z = z.expand(sizes.batch, -1, -1, -1).to(sizes.dtype).contiguous()

    def kept() -> list[Tensor]:
        return tensors_of(ours)

    sides = {
        "ours": Side(lambda: quick.decode(z), kept),
        "diffusers": Side(lambda: theirs.decode(z / config.scale, return_dict=False), kept),
    }
    if args.device == "cpu":
        sides["ours, not packed"] = Side(lambda: ours.decode(z), kept)
    if args.compile:
        compiled = torch.compile(prepacked.prepare_for_compile(copy.deepcopy(ours)).decode)
        best = both_vaes(config, args.device)[1].to(sizes.dtype)
        their_best(best, "decode")
        sides["ours compiled"] = Side(lambda: compiled(z), kept)
        sides["diffusers compiled"] = Side(lambda: best.decode(z / config.scale, return_dict=False), kept)
    return sides, error, f"batch {sizes.batch}, {8 * sizes.side_decode} pixels, {name_of(sizes.dtype)}"


def sample(args, sizes: Sizes, guidance: float) -> tuple[dict[str, Side], float, str]:
    """Forty steps from noise to latents: our `denoise` beside diffusers' pipeline."""
    config = sizes.unet
    pair = both_unets(config, args.device)
    vae = both_vaes(sizes.vae, args.device)[1]
    scheduler = Scheduler(40, eta=1.0)
    theirs = diffusers.DDIMScheduler(**SCHEDULE, set_alpha_to_one=True)

    def pipeline(unet) -> Callable:
        parts = {"vae": vae, "text_encoder": None, "tokenizer": None, "unet": unet, "scheduler": theirs}
        off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        made = diffusers.StableDiffusionPipeline(**parts, **off)
        made.set_progress_bar_config(disable=True)
        return made

    def inputs(batch: int, dtype: torch.dtype) -> tuple[Tensor, dict, dict]:
        x = sample_noise(
            (batch, config.latent_channels, *[sizes.side] * 2), torch.Generator().manual_seed(2), args.device
        )
        given = conditioning_of(config, batch, args.device, dtype)
        return x, given, {key: torch.zeros_like(t) for key, t in given.items()}

    def seeds(batch: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(batch)]

    @torch.no_grad()
    def by_us(unet, x: Tensor, given: dict, empty: dict) -> Tensor:
        predict = cfg(unet, given, empty, guidance) if guidance != 1 else conditional(unet, given)
        return denoise(scheduler, predict, x, scheduler.steps, seeds(len(x)))

    def by_them(made, x: Tensor, given: dict, empty: dict) -> Tensor:
        return made(
            prompt_embeds=given["context"], negative_prompt_embeds=empty["context"], latents=x.to(made.unet.dtype),
            num_inference_steps=40, guidance_scale=guidance, eta=1.0, generator=seeds(len(x)), output_type="latent",
        ).images  # fmt: skip

    once, quick = inputs(1, torch.float32), prepacked.packed_copy(pair[0])
    error = apart(by_us(quick, *once), by_them(pipeline(pair[1]), *once), 1e-3)
    unet, made = lowered(pair, sizes.dtype)[0], pipeline(pair[1])
    prepacked.invalidate(quick)
    given = inputs(sizes.batch, sizes.dtype)

    def kept() -> list[Tensor]:
        return tensors_of(unet)

    sides = {
        "ours": Side(lambda: by_us(quick, *given), kept),
        "diffusers": Side(lambda: by_them(made, *given), kept),
    }
    if args.device == "cpu":
        sides["ours, not packed"] = Side(lambda: by_us(unet, *given), kept)
    if args.compile:
        fast = InferenceCopy(unet, unet, sizes.dtype, compiled=True)
        best = both_unets(config, args.device)[1].to(sizes.dtype)
        their_best(best)
        tuned = pipeline(best)
        sides["ours compiled"] = Side(lambda: by_us(fast, *given), kept)
        sides["diffusers compiled"] = Side(lambda: by_them(tuned, *given), kept)
    words = f"batch {sizes.batch}, {8 * sizes.side} pixels, guidance {guidance:g}, {name_of(sizes.dtype)}"
    return sides, error, words


def reward_of(args) -> tuple[Callable, Callable]:
    """The frozen reward of both sides, the tiny one, or for full sizes HPSv2's towers with random weights; and a call
    that rounds it to bf16, as training has it."""
    if args.sizes != "gpu":
        return rewards.load("tiny", device=args.device), lambda: None
    network = reward_networks.build_meta("hpsv2.1")
    network = reward_networks.load_strict(network, random_weights(network.state_dict(), "cpu"), "random").to(
        args.device
    )
    text = torch.nn.functional.normalize(torch.ones(1, network.config.projection_dim, device=args.device), dim=-1)

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return network(preprocess.preprocess(images, 224), text)

    return reward, lambda: reward_networks.to_bf16(network, torch.bfloat16)


def step(args, sizes: Sizes, method: str) -> tuple[dict[str, Side], float, str]:
    """One optimizer step of a method: ours, beside one put together from diffusers as the official code has it.

    Theirs: float32 weights and autoencoder under autocast, `scheduler.step`, AdamW with its defaults, not compiled.
    """
    config, start, (reward, lower) = sizes.unet, 30, reward_of(args)
    (unet, their_unet), (vae, their_vae) = both_unets(config, args.device), both_vaes(sizes.vae, args.device)
    copied(unet), copied(their_unet)
    scheduler = Scheduler(40, eta=1.0)
    theirs = diffusers.DDPMScheduler(**SCHEDULE, variance_type="fixed_small")
    theirs.set_timesteps(40, device=args.device)
    steps = theirs.timesteps
    low = args.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    pixels = sizes.side * vae.factor

    def autocast(on: bool = low):
        return torch.autocast(args.device, torch.bfloat16, enabled=on)

    def inputs(batch: int) -> dict:
        images = sample_noise((batch, 3, pixels, pixels), torch.Generator().manual_seed(3), args.device).clamp(-1, 1)
        text = conditioning_of(config, batch, args.device, torch.float32)
        return {"images": images, "text": text, "prompts": ["octopus"] * batch}

    def our_loss(net, vae, images: Tensor, text: dict, prompts: list[str], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if method == "refl":
            shape = (len(images), config.latent_channels, sizes.side, sizes.side)
            return 1e-3 * refl_loss(net, vae, reward, scheduler, shape, text, prompts, generator)[0]
        with torch.no_grad():
            x0 = vae.sample(images, generator)
        given = (net, vae, reward, scheduler, x0, start, text, prompts, generator)
        return imagerefl_loss(*given, reward_scale=1e-3, diffusion_scale=1e-5)[0]

    def their_loss(images: Tensor, text: dict, prompts: list[str], seed: int) -> Tensor:
        generator, context = torch.Generator().manual_seed(seed), text["context"]
        shape = (len(images), config.latent_channels, sizes.side, sizes.side)
        if method == "refl":
            first, x = 0, sample_noise(shape, generator, args.device)
        else:
            with torch.no_grad():
                x0 = their_vae.encode(images).latent_dist.sample(generator) * their_vae.config.scaling_factor
            noise = sample_noise(shape, generator, args.device)
            first, x = start, theirs.add_noise(x0, noise, steps[start].expand(len(images)))
            noised = x
        t_f = sample_t_f(40 - LAST, scheduler, generator)
        with torch.no_grad():
            for t in steps[first:t_f]:
                eps = their_unet(x, t, encoder_hidden_states=context).sample
                x = theirs.step(eps, t, x, generator=generator).prev_sample
        eps = their_unet(x, steps[t_f], encoder_hidden_states=context).sample
        x0 = theirs.step(eps, steps[t_f], x).pred_original_sample
        loss = -1e-3 * reward(their_vae.decode(x0 / their_vae.config.scaling_factor).sample, prompts).mean()
        if method == "imagerefl":
            eps = their_unet(noised, steps[start], encoder_hidden_states=context).sample
            loss = loss + 1e-5 * torch.nn.functional.mse_loss(eps.float(), noise.float())
        return loss

    def gradient(network: nn.Module, loss: Tensor) -> Tensor:
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
        return flat

    with autocast(False):
        once, keys = inputs(1), [key for key, _ in unet.named_parameters()]
        mine = gradient(unet, our_loss(unet, vae, **once, seed=0))
        ordered = dict(their_unet.named_parameters())
        their = torch.autograd.grad(their_loss(**once, seed=0), [ordered[key] for key in keys])
        error = apart(mine, torch.cat([g.flatten() for g in their]), 1e-2)
        del mine, their
    lower()

    given, seed = inputs(sizes.batch_step), 1  # one seed: every call draws the same t_f, so that all do the same work

    def do(loss_of: Callable, optimizer: torch.optim.Optimizer) -> None:
        for part in range(sizes.accumulate):
            with autocast():
                loss = loss_of(**given, seed=seed + part)
            (loss / sizes.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def ours(compiled: bool) -> Side:
        frozen = torch.bfloat16 if args.device != "cpu" else torch.float32
        mine, own = copied(both_unets(config, args.device)[0]), fuse(both_vaes(sizes.vae, args.device)[0].to(frozen))
        optimizer = torch.optim.AdamW(mine.parameters(), 1e-6, eps=ADAM_EPS, fused=True)
        net, kept = torch.compile(mine) if compiled else mine, [mine, own, optimizer]
        if compiled:
            prepacked.prepare_for_compile(own.decoder)
            own.decode = torch.compile(own.decode)
        net = InferenceCopy(net, mine, None if args.device == "cpu" else frozen, compiled)
        kept += [] if args.device == "cpu" else [net.copy]

        def once() -> None:
            do(lambda **given: our_loss(net, own, **given), optimizer)
            net.refresh()

        return Side(once, lambda: tensors_of(*kept))

    optimizer = torch.optim.AdamW(their_unet.parameters(), 1e-6)
    sides = {
        "ours": ours(False),
        "diffusers": Side(lambda: do(their_loss, optimizer), lambda: tensors_of(their_unet, their_vae, optimizer)),
    }
    if args.compile and args.device != "cpu":
        sides["ours compiled"] = ours(True)
    del unet, vae
    batch = f"batch {sizes.batch_step} x {sizes.accumulate}" if sizes.accumulate > 1 else f"batch {sizes.batch_step}"
    return sides, error, f"{batch}, {pixels} pixels, {'bf16 autocast' if low else 'float32'}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------- measuring


def resident() -> tuple[int, int]:
    """Bytes of this process in memory, now and at most since the last `forget_peak` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return tuple(1024 * int(values[key].split()[0]) for key in ("VmRSS", "VmHWM"))


def forget_peak() -> None:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def timed(side: Side, device: str) -> tuple[float, float]:
    """Seconds of one call, and gigabytes at its peak: what this side keeps, and what the call took beside it."""
    if device == "cpu":
        forget_peak()
        before = resident()[0]
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    side.run()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = resident()[1] if device == "cpu" else torch.cuda.max_memory_allocated()
    kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in side.kept()}.values())
    return seconds, (kept + peak - before) / 1e9


def measure(args, sides: dict[str, Side]) -> dict[str, dict]:
    """Medians over turns, the order turned round each time, after a call of each that does not count."""
    for side in sides.values():
        timed(side, args.device)
    runs: dict[str, list] = {name: [] for name in sides}
    began = time.perf_counter()
    for turn in range(args.repeats):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            runs[name].append(timed(sides[name], args.device))
        if turn >= 2 and time.perf_counter() - began > args.seconds:
            break
    return {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in values),
            "runs": [round(seconds, 5) for seconds, _ in values],
            "peak_gb": round(max(peak for _, peak in values), 3),
        }
        for name, values in runs.items()
    }


def machine(args) -> dict:
    """What the numbers depend on."""
    about = {"date": date.today().isoformat(), "device": args.device, "threads": torch.get_num_threads()}
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    about |= {"cpu": cpu[0].split(":")[1].strip() if cpu else platform.machine(), "cores": os.cpu_count()}
    if args.device != "cpu":
        about["gpu"] = torch.cuda.get_device_name()
    about["bf16_tflops"] = round(cost.matrix_rate(args.device) / 1e12, 3)
    about |= {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    return about | {"imagerefl": presets.VERSION}


def table(about: dict, rows: list[dict]) -> str:
    """The results as Markdown."""
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    lines = ["# Ours beside diffusers", "", f"{said}.", ""]
    lines += [
        "Medians in seconds; `x`: diffusers' time over ours, range over turns in brackets; without a compiled side of",
        "theirs, their eager one is taken. Peak: what a side keeps (weights, optimizer) and what the call takes beside",
        "it, GB. Difference: of the float32 results, by norm. Rate: diffusers' arithmetic in the time of our fastest",
        "side, as a share of the device's measured bf16 matrix rate; ours is up to 15 % less. A dash: not measured. On",
        "a CPU ours are packed, as in `sample.py` (`speed/prepacked.py`); the JSON file also has them as they are.",
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
            theirs = theirs or sides["diffusers"]
            cells.append(ratio(ours, theirs) if ours else "–")
        cells.append(f"{sides['ours']['peak_gb']:.2f} / {sides['diffusers']['peak_gb']:.2f}")
        best = min(side["seconds"] for name, side in sides.items() if name.startswith("ours"))
        cells += [f"{row['difference']:.0e}", f"{100 * row['tflop'] / best / about['bf16_tflops']:.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ratio(ours: dict, theirs: dict) -> str:
    """How much faster, by medians, and the range over the turns."""
    turns = [b / a for a, b in zip(ours["runs"], theirs["runs"], strict=True)]
    return f"**{theirs['seconds'] / ours['seconds']:.2f}** ({min(turns):.2f}–{max(turns):.2f})"


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # the results are compared in float32
    args.sizes = args.sizes or ("cpu" if args.device == "cpu" else "gpu")
    sizes, about, rows = SIZES[args.sizes], machine(args), []
    small = args.sizes == "tiny"
    work = {
        "unet-sd15": lambda: forward(args, sizes, sizes.unet if small else unets.SD15, sizes.side_sd15),
        "unet-sdxl": lambda: forward(args, sizes, sizes.unet if small else unets.SDXL, sizes.side_sdxl),
        "decode": lambda: decode(args, sizes),
        "sample": lambda: sample(args, sizes, 1.0),
        "sample-guided": lambda: sample(args, sizes, 7.5),
        "refl": lambda: step(args, sizes, "refl"),
        "imagerefl": lambda: step(args, sizes, "imagerefl"),
    }
    for name in args.work:
        torch.compiler.reset()  # else sizes that differ from those before are compiled as unknown ones
        sides, difference, words = work[name]()
        training = name in ("refl", "imagerefl")
        with torch.set_grad_enabled(training), cost.counter() as counted:
            sides["diffusers"].run()
        row = {"work": name, "words": words, "difference": difference, "tflop": counted.get_total_flops() / 1e12}
        with torch.set_grad_enabled(training):
            rows.append(row | {"sides": measure(args, sides)})
        told = [f"{side} {values['seconds']:.3g} s" for side, values in rows[-1]["sides"].items()]
        print(f"{name}: {', '.join(told)}", flush=True)
        del sides
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(about, rows))
    print(table(about, rows))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--sizes", choices=SIZES, help="default: cpu or gpu, by the device; tiny is a rehearsal")
    add("--work", nargs="+", choices=WORK, default=WORK, help="default: all")
    add("--compile", action="store_true", help="also compiled sides, which take minutes to tune")
    add("--channels-last", action="store_true", help="also our UNets in that memory format, in the JSON file alone")
    add("--threads", type=positive, help="default: all cores")
    add("--repeats", type=positive, default=7, help="turns at most (default: 7)")
    add("--seconds", type=float, default=25, help="after which a row ends, three turns at least (default: 25)")
    add("--output", default=str(Path(__file__).parent / "results" / "latest"), help="without suffix")
    return parser.parse(argv)


if __name__ == "__main__":
    run(main, parse_args())
