"""The rows of `gpu.py`; those of group (a) are in `gpu_checks.py`. Each returns a dict of results."""

import copy
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import speed
import unet as unets
from benchmarks import bench, gpu_checks, networks, updates
from benchmarks.gpu_checks import METHODS, Session, check, unet_inputs
from benchmarks.measure import Side, count_tflop, machine, measure
from benchmarks.networks import relative_difference
from combined import conditional
from pretrained import saving
from pretrained.configs import vae_dict
from refl import T_MAX, reward_loss
from scheduler import denoise, sample_noise
from training.models import accelerate
from utils import disk
from utils.device import choose_device, frozen_dtype, is_out_of_memory

ROOT = Path(__file__).parent.parent


def measured(s: Session, sides: dict[str, Side], key: str = "", eager: bool = True) -> dict:
    """One line per side: seconds, arithmetic, MFU and peak memory; or that memory ran out.

    FLOPs are counted in an eager call: of a side "x compiled" those of "x", and with `eager=False` those that an
    earlier row counted under the same key.
    """
    values = {}
    for name, side in sides.items():
        counted = key + name.removesuffix(" compiled")
        try:
            if eager and counted == key + name and counted not in s.tflop:
                s.tflop[counted] = count_tflop(side.run)
            found = measure({name: side}, s.device, s.repeats, 20)[name]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            values[name] = "out of memory"
            s.free()
            continue
        values[name] = f"{found['seconds']:.3g} s, peak {found['peak_gb']:.2f} GB"
        if counted in s.tflop:
            rate = s.tflop[counted] / found["seconds"]
            values[name] += f", {rate:.3g} TFLOP/s, MFU {100 * rate / s.about['bf16_tflops']:.0f} %"
    return values


def updates_row(s: Session, key: str = "b ", task: updates.Task | None = None, eager: bool = True, **more) -> dict:
    return measured(s, updates.our_sides(METHODS, task or s.task, s.reward(), **more), key, eager)


def b_compiled(s: Session) -> dict:
    values = updates_row(s, eager=False, compiled=True)
    spent = torch._dynamo.utils.calculate_time_spent()
    return values | {"compilation": ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in spent.items())}


def b_diffusers(s: Session) -> dict:
    values, reward = {}, s.reward()
    for method in METHODS:
        values |= measured(s, {method: updates.diffusers_side(method, s.task, reward)}, "diffusers ")
        s.free()
    return values


def b_plan(s: Session) -> dict:
    """The memory that `train.py --plan` predicts for (b), in GB of 1e9 bytes without the driver's."""
    out, errors = s.plan.communicate()
    found = re.search(r"^  ([\d.]+) for one image, ([\d.]+) for each further one$", out, re.MULTILINE)
    if not found:
        raise ValueError(f"train.py --plan: {errors or out}")
    one, more = map(float, found.groups())
    return {"imagerefl, predicted peak": f"{(one + (s.task.batch - 1) * more) * 2**30 / 1e9:.2f} GB"}


def start_plan(s: Session) -> subprocess.Popen:
    """`train.py --plan` for (b), on the CPU beside the first rows."""
    base = ["--base", "tiny"] if s.tiny else ["--base", "sd15", "--data", "."]
    command = [sys.executable, "train.py", *base, "--batch-size", s.task.batch, "--accumulate", 1]
    command = [*map(str, command), "--device", "cpu", "--plan", "--gpu-memory", "80"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def c_sample(s: Session, guidance: float) -> dict:
    """Guided sampling runs the UNet on two inputs per image, so half the images need the same compiled graph."""
    batch = max(1, s.task.batch // (2 if guidance != 1 else 1))
    sizes = replace(bench.SIZES["gpu"], unet=s.task.unet, vae=s.task.vae, side=s.task.side, batch=batch, dtype=s.dtype)
    args = Namespace(device=s.device, compile=True, channels_last=False, mode=None, engines=())
    sides, difference, words = bench.sample(args, sizes, guidance)
    with torch.no_grad():
        values = measured(s, sides, words)
    return (
        {"setting": words} | ({"difference, float32": f"{difference:.1g}"} if difference is not None else {}) | values
    )


def d_tiny(s: Session) -> dict:
    """Rewards of the same updates on the device, on the CPU, and stopped halfway and resumed; float32."""
    values, running, curves = {}, [], {}
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "prompts.txt").write_text("octopus\ntiger\n")

        def train(name: str, *flags, device: str = s.device, steps: int = s.updates) -> subprocess.Popen:
            new = ["--base", "tiny", "--output-dir", Path(temporary, name), "--prompts", Path(temporary, "prompts.txt")]
            new += ["--sample-every", 0, *(["--batch-size", 2] if s.tiny else [])]
            command = [sys.executable, "train.py", *(flags or new), "--steps", steps]
            command += ["--device", device, "--dtype", "float32"]
            with open(Path(temporary, f"{name}.log"), "a") as log:
                running.append(subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log))
            return running[-1]

        try:
            on_cpu, on_device = train("CPU", device="cpu"), train("device")
            train("resumed", steps=s.updates // 2).wait()
            train("resumed", "--resume", Path(temporary, "resumed")).wait()
            on_cpu.wait(), on_device.wait()
        finally:
            for process in running:
                process.kill()
        for name in ("device", "CPU", "resumed"):
            log = Path(temporary, name, "log.jsonl")
            rewards = [json.loads(line)["reward"] for line in log.read_text().splitlines()] if log.is_file() else []
            if len(rewards) != s.updates:
                raise ValueError(f"train.py, {name}: {Path(temporary, f'{name}.log').read_text()[-500:]}")
            curves[name] = torch.tensor(rewards)
    for name, limit in (("CPU", 0.02), ("resumed", 0.002)):  # differences of rounding grow with the updates
        check(values, f"device against {name}", relative_difference(curves["device"], curves[name]), limit)
    return values | {"reward, first and last": f"{curves['device'][0]:.4f}, {curves['device'][-1]:.4f}"}


def write_base(s: Session, folder: Path) -> None:
    """A base of the row's size with random weights and the tiny base's text encoder, and eight captioned images."""
    unet, vae = replace(s.task.unet, context=128), s.task.vae
    saving.save_unet(networks.unet_pair(unet, "cpu", False)[0], folder / "unet")
    autoencoder = networks.vae_pair(vae, "cpu", False)[0]
    disk.write(folder / "vae" / "diffusion_pytorch_model.safetensors", autoencoder.state_dict())
    disk.write_text(folder / "vae" / "config.json", json.dumps(vae_dict(vae)))
    for name in ("text_encoder", "tokenizer"):
        (folder / name).symlink_to(ROOT / "tiny" / "base" / name)
    (folder / "images").mkdir()
    for number in range(8):
        Image.effect_noise((512, 512), 90).convert("RGB").save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("octopus\n")
    (folder / "prompts.txt").write_text("octopus\n")


def d_commands(s: Session) -> dict:
    """`train.py --compile` in bf16 and `sample.py --switch 30` as a user types them: seconds of each and of updates."""
    values = {}
    with tempfile.TemporaryDirectory() as temporary:
        base, run = Path(temporary, "base"), Path(temporary, "run")
        write_base(s, base)
        train = ["train.py", "--base", base, "--data", base / "images", "--reward", "tiny", "--steps", 4]
        train += ["--compile"] if s.device != "cpu" else []  # inductor would take minutes there
        train += ["--resolution", s.task.pixels, "--batch-size", s.task.batch, "--accumulate", 1]
        train += ["--prompts", base / "prompts.txt", "--sample-every", 0, "--output-dir", run]
        sample = ["sample.py", "--base", base, "--checkpoint", run, "--switch", 30, "--prompt", "octopus"]
        sample += ["--images-per-prompt", 1, "--output-dir", base / "samples"]
        for command in (train, sample):
            command, began = [sys.executable, *map(str, [*command, "--device", s.device])], time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{command[1]}: {done.stderr[-500:]}")
            values[command[1]] = f"{time.perf_counter() - began:.1f} s"
        for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
            found = [f"{key} {row[key]}" for key in ("seconds", "peak_gb", "mfu", "grad_norm") if key in row]
            values[f"update {row['update']}, {row['kind']}"] = ", ".join(found)
    return values


CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def f_cudnn_attention(s: Session) -> dict:
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return updates_row(s, "f ")


def f_several_t_f(s: Session) -> dict:
    """ReFL where two t_f share a rollout: the second continues from the first, instead of from new noise."""
    task, reward = s.task, s.reward()
    m = updates.our_models(task, task.args(), reward)
    optimizer = torch.optim.AdamW(m.parameters, updates.LR, fused=True)
    unet, scheduler = accelerate(task.args(), m, optimizer), updates.SCHEDULER
    last = len(scheduler.steps)

    def loss_of(images: Tensor, c: dict, prompts: list[str], seed: int) -> Tensor:
        rng, loss, done = torch.Generator().manual_seed(seed), 0, 0
        x_t = sample_noise(task.latent_shape(len(prompts)), rng, s.device)
        for t_f in (last - T_MAX, last - 1):
            with torch.no_grad():
                x_t = denoise(scheduler, conditional(unet, c), x_t, scheduler.steps[done:t_f], rng)
            loss, done = loss + reward_loss(unet, m.vae, reward, scheduler, x_t, t_f, c, prompts, rng), t_f
        return updates.K_R * loss / 2

    update = updates.update_of(task, loss_of, optimizer, frozen_dtype(task.args()))
    return measured(s, {"two t_f": Side(update, list)})


KERNELS = {  # kind -> parts of the names of its kernels
    "layout": ("nchwToNhwc", "nhwcToNchw", "nchwToFold", "convertTensor"),
    "attention": ("flash", "fmha", "attention"),
    "convolution": ("conv", "cudnn", "implicit", "xmma_fprop", "wgrad", "dgrad"),
    "matrix product": ("gemm", "nvjet", "cutlass", "cublas"),
    "norm": ("norm", "RowwiseMoments", "Welford", "ComputeFusedParams"),
    "concatenation": ("CatArray",),
    "copy": ("copy", "Memcpy", "Memset"),
    "elementwise": ("elementwise",),
}


def kernel_times(run: Callable[[], object]) -> str:
    """Milliseconds on the GPU by kind of kernel, the three longest other kernels, and the number of kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times, other = dict.fromkeys(KERNELS, 0.0), {}
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in events:
        kind = next(
            (kind for kind, parts in KERNELS.items() if any(part.lower() in event.name.lower() for part in parts)), None
        )
        target, name = (other, event.name[:60]) if kind is None else (times, kind)
        target[name] = target.get(name, 0) + event.device_time_total / 1e3
    times |= dict(sorted(other.items(), key=lambda item: -item[1])[:3])
    return f"{len(events)} kernels, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in times.items())


def f_eager(s: Session) -> dict:
    """A forward pass of the UNet in bf16 without gradients: memory formats, attention, and where its time goes."""
    unet = speed.for_sampling(networks.unet_pair(s.task.unet, s.device, theirs=False)[0].to(s.dtype))
    last = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    x, t, c = unet_inputs(s, s.dtype)

    def cudnn() -> None:
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            unet(x, t, **c)

    calls = {"UNet": lambda: unet(x, t, **c), "channels_last": lambda: last(x, t, **c), "cuDNN attention": cudnn}
    with torch.no_grad():
        values = measured(s, {name: Side(call, list) for name, call in calls.items()})
        for name, call in calls.items() if s.device != "cpu" else ():
            values[f"{name}, kernels"] = kernel_times(call)
    return values


def f_mode(s: Session, mode: str) -> dict:
    """A forward pass of the UNet in bf16: eager, compiled as `sample.py --compile` does it, and compiled in `mode`."""
    unet = networks.unet_pair(s.task.unet, s.device, theirs=False)[0].to(s.dtype)
    x, t, c = unet_inputs(s, s.dtype)
    default, other = (copy.deepcopy(unet) for _ in range(2))
    speed.for_sampling(default, compiled=True)
    compiled = torch.compile(speed.prepacked.prepare_for_compile(other), dynamic=False, mode=mode)

    def run(network: nn.Module) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        network(x, t, **c)

    sides = {"UNet": unet, "UNet compiled": default, f"{mode} compiled": compiled}
    with torch.no_grad():
        return measured(s, {name: Side(functools.partial(run, net), list) for name, net in sides.items()})


def compile_blocks(unet: nn.Module) -> None:
    """Regional compilation: each kind of block is compiled once and reused."""
    for module in unet.modules():
        if isinstance(module, unets.ResnetBlock | unets.TransformerBlock):
            module.compile(dynamic=False)


def f_regional(s: Session) -> dict:
    """Blocks have more shapes than dynamo compiles by default; beyond its limit it would silently run them eagerly."""
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        return updates_row(s, eager=False, prepare=compile_blocks)


def to_channels_last(unet: nn.Module) -> None:
    unet.to(memory_format=torch.channels_last)


FUNCTIONS: dict[str, Callable[[Session], dict]] = {
    "a-unet": gpu_checks.a_unet,
    "a-decoder": gpu_checks.a_decoder,
    "a-rewards": gpu_checks.a_rewards,
    "a-updates": gpu_checks.a_updates,
    "a-diffusers": gpu_checks.a_diffusers,
    "a-no-wait": gpu_checks.a_no_wait,
    "b-eager": updates_row,
    "b-diffusers": b_diffusers,
    "b-plan": b_plan,
    "b-compiled": b_compiled,
    "c-sample": lambda s: c_sample(s, 1.0),
    "c-guided": lambda s: c_sample(s, 7.5),
    "d-tiny": d_tiny,
    "d-commands": d_commands,
    "e-lora": lambda s: updates_row(s, "lora ", replace(s.sdxl, lora=16)),
    "e-full": lambda s: updates_row(s, "sdxl ", s.sdxl),
    "f-eager": f_eager,
    "f-cudnn-attention": f_cudnn_attention,
    "f-several-t_f": f_several_t_f,
    "f-reduce-overhead": lambda s: f_mode(s, "reduce-overhead"),
    "f-regional": f_regional,
    "f-channels-last": lambda s: updates_row(s, eager=False, compiled=True, prepare=to_channels_last),
    "f-max-autotune": lambda s: f_mode(s, "max-autotune"),
}


@contextmanager
def session(args: Namespace) -> Iterator[tuple[dict[str, Callable[[], dict]], dict]]:
    """The functions of the rows by name, and a description of the machine."""
    args.device = choose_device(args.device)
    about, compiler = machine(args.device), torch.compile
    if args.device == "cpu":
        torch.compile = functools.partial(compiler, backend="eager")  # graphs are traced; inductor would take minutes
        about |= {"rehearsal": "on a CPU: nothing is measured, and compiled means traced"}
    s = Session(args, about)
    s.plan = start_plan(s)

    def call(f: Callable[[Session], dict]) -> dict:
        torch.compiler.reset()  # sizes that differ from an earlier row's would be compiled as dynamic ones
        try:
            return f(s)
        finally:
            s.free()

    try:
        yield {name: functools.partial(call, f) for name, f in FUNCTIONS.items()}, about
    finally:
        torch.compile = compiler
        s.plan.kill()
