"""What a run costs, before it starts: FLOPs, GPU memory, and the flags that fit a GPU.

    python train.py --base sd15 --data FOLDER --plan --gpu-memory 24

The networks run on tensors that have shapes but no data: FLOPs are counted for each part of a step, memory is
tracked through one micro-batch. A multiplication and its addition are 2 FLOP.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import rewards
import unet as unets
import vae as vaes
import weights
from baselines.dpo import dpo_loss, ranked_pairs
from baselines.draft import draft_loss
from baselines.kl import KLToBase
from imagerefl import REFL_EVERY
from pretrained import lora, preprocess, reward_files, reward_networks
from pretrained.configs import unet_config, unet_dict, vae_config
from pretrained.text_encoder import CACHE_BYTES
from refl import T_MAX, reward_loss
from scheduler import Scheduler, diffusion_loss
from training import presets
from training.fake_tensors import AllocationTracker, ShapeMode, norms_in_float32, to_bf16
from training.models import calls_base
from training.options import STEPS, resolve
from unet import UNet, UNetConfig, Upsample
from utils import acceleration
from utils.cli import number_range
from vae import VAE, VAEConfig

PUBLISHED = {"sd15": (unets.SD15, vaes.SD15), "sdxl": (unets.SDXL, vaes.SDXL)}
GB = 2**30  # bytes, as GPU vendors count
GPU_MEMORY = (16, 24, 40, 80)  # GB of common GPUs
OVERHEAD_GB = 1.0  # CUDA context and fragmentation
SAVINGS = (  # flags that save memory, from fast to slow
    "",
    "--checkpointing decoder",
    "--checkpointing unet,decoder",
    "--checkpointing unet,decoder --text-on-cpu",
)
SCHEDULER = Scheduler(STEPS, eta=1.0)
RATIOS = {  # rough FLOPs, in forward passes of the UNet
    "UNet forward": 1, "UNet with gradients": 3, "decode with gradients": 8, "reward with gradients": 0.5, "encode": 2,
}  # fmt: skip


@dataclass
class FakeNetworks:
    """The networks of a run on tensors without data. Text encoders are left out: prompt embeddings are cached."""

    unet: UNet
    vae: VAE
    rewards: list[nn.Module]

    def reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Sum of all rewards (B,) of images (B, 3, H, W); the rater, which has no network, compares pixels alone."""
        scores = [images.float().square().mean((1, 2, 3))]
        with torch.autocast(images.device.type, enabled=False):
            for network in self.rewards:
                pixels = preprocess.preprocess(images, network.config.vision_config.image_size)
                scores.append(network(pixels, *text_features(network, len(images))))
        return sum(scores)


def counter() -> FlopCounterMode:
    """A FLOP counter that knows the CPU's attention kernels. Recomputation in their backward pass does not count."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        forward: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def fuse(network: nn.Module) -> nn.Module:
    """Fuse upsampling with its convolution, if the folder `speed/` exists."""
    speed = acceleration.speed()
    return speed.fuse(network) if speed else network


def count(f, *inputs: Tensor, backward: bool = False) -> int:
    """FLOPs of `f(*inputs)`, with `backward` also those of its backward pass."""
    with counter() as counted, nullcontext() if backward else torch.no_grad():
        output = f(*inputs)
        if backward:
            output.float().sum().backward()
    return counted.get_total_flops()


def text_features(network: nn.Module, batch: int) -> tuple[Tensor, ...]:
    """A reward's text features for `batch` prompts."""
    ids = torch.zeros(batch, network.length, dtype=torch.long)
    if isinstance(network, reward_networks.MPS):
        network.condition_ids = ids[:1].clone()
    with torch.no_grad():
        return network.encode_text(ids, torch.ones_like(ids))


def fake_conditioning(config: UNetConfig, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The UNet's text conditioning for `batch` prompts."""
    c = {"context": torch.empty(batch, 77, config.context, dtype=dtype)}
    if config.pooled:
        c["pooled"] = torch.empty(batch, config.pooled - 6 * config.size_embedding, dtype=dtype)
        c["time_ids"] = torch.empty(batch, 6)
    return c


def fake_state(network: nn.Module) -> dict[str, Tensor]:
    """Float32 weights without data for a network on the meta device."""
    return {key: torch.empty(t.shape) for key, t in network.state_dict().items()}


def build_fake(args, unet_sizes: UNetConfig, vae_sizes: VAEConfig) -> FakeNetworks:
    """The networks of a run; call it within a ShapeMode."""
    with torch.device("meta"):
        unet, vae = UNet(unet_sizes), VAE(vae_sizes)
    for network in (unet, vae):
        network.load_state_dict(fake_state(network), assign=True)
    networks = FakeNetworks(unet, fuse(vae.requires_grad_(False)), [])
    if args.method == "diffusion":
        return networks
    paths = (args.reward_weights or "").split(",")
    for i, (name, _) in enumerate(rewards.parse(args.reward)):
        if name == "rater":  # which has no network
            continue
        folder = reward_files.EMBEDDED / name if name in ("tiny", "tiny2") else Path(paths[i] if i < len(paths) else "")
        has_config = folder != Path() and (folder / "config.json").is_file()
        network = reward_networks.build_meta(name, folder if has_config else None)
        networks.rewards.append(reward_networks.load_strict(network, fake_state(network), name))
    return networks


def flops(args, unet: UNetConfig, vae: VAEConfig) -> dict[str, float]:
    """FLOPs of each part of a step for one image."""
    with ShapeMode():
        m = build_fake(args, unet, vae)
        if args.lora:
            lora.add(fuse(m.unet), args.lora)
        x = torch.empty(1, vae.latent_channels, *[args.resolution // m.vae.factor] * 2)
        images = torch.empty(1, 3, args.resolution, args.resolution)
        c = fake_conditioning(unet, 1, torch.float32)
        parts = {"UNet with gradients": count(lambda x: m.unet(x, 1, **c), x, backward=True)}
        fuse(m.unet)  # as in the no-grad steps
        parts |= {
            "UNet forward": count(lambda x: m.unet(x, 1, **c), x),
            "decode": count(m.vae.decode, x),
            "decode with gradients": count(m.vae.decode, x.requires_grad_(), backward=True),
            "encode": count(lambda x: m.vae.encode(x)[0], images),
        }
        if m.rewards:
            total = count(lambda x: m.reward(x, [""]), images.requires_grad_(), backward=True)
            text = count(lambda: sum(text_features(n, 1)[0].sum() for n in m.rewards))
            parts["reward with gradients"] = total - text  # text features are cached
        elif args.method != "diffusion":
            parts["reward with gradients"] = 0.0  # the rater's, which has no network
    return parts


def per_image(parts: dict[str, float], start: int = 30, kl: bool = False) -> dict[str, float]:
    """Mean FLOPs per image of an update of each method. `start`: step index of t'; `kl`: with --kl-scale."""
    steps, parts = len(SCHEDULER.steps), with_kl(parts) if kl else parts

    def no_grad_steps(first: int, lowest_t_f: int) -> float:
        """FLOPs of denoising from step `first` to t_f, averaged over t_f in lowest_t_f..steps - 1."""
        counts = [max(t_f - first, 0) for t_f in range(lowest_t_f, steps)]
        return sum(counts) / len(counts) * parts["UNet forward"]

    costs = {"diffusion": parts["UNet with gradients"] + parts["encode"]}
    if "reward with gradients" in parts:
        last = parts["UNet with gradients"] + parts["decode with gradients"] + parts["reward with gradients"]
        costs["refl"] = no_grad_steps(0, steps - T_MAX) + last
        costs["imagerefl"] = parts["encode"] + no_grad_steps(start + 1, start) + last + parts["UNet with gradients"]
        costs["3:1 mix"] = mixed(costs["imagerefl"], costs["refl"])
    return costs


def mixed(from_image: float, from_noise: float) -> float:
    """The mean over updates that start from images and the one of `REFL_EVERY` that starts from noise."""
    return from_image + (from_noise - from_image) / REFL_EVERY


def with_kl(parts: dict[str, float]) -> dict[str, float]:
    """Parts in which each call with gradients comes with one of the base model."""
    return parts | {"UNet with gradients": parts["UNet with gradients"] + parts["UNet forward"]}


def baseline_cost(args, parts: dict[str, float]) -> float:
    """Mean FLOPs per image of an update of DRaFT, DRTune or DPO; with --from-image of its mix of updates."""
    parts = with_kl(parts) if args.kl_scale else parts
    T, forward, gradients = len(SCHEDULER.steps), parts["UNet forward"], parts["UNet with gradients"]
    scoring = parts["decode with gradients"] + parts["reward with gradients"]

    def update(first: int) -> float:
        """From step `first` to x0."""
        if args.method == "dpo":  # two samples, their scores without gradients, about half, and the loss
            draws = mean(number_range(args.gradient_steps))
            return 2 * ((T - first) * forward + scoring / 2 + draws * (gradients + forward))
        stops = range(T - 1, T) if args.method == "draft" else range(max(first, T - T_MAX), T)
        counts = [
            (stop + 1 - first, min(K, stop + 1 - first)) for stop in stops for K in number_range(args.gradient_steps)
        ]
        rollout = mean((steps - K) * forward + K * gradients for steps, K in counts)
        return rollout + scoring + (args.lv_samples or 0) * (gradients + scoring)

    if not args.from_image:
        return update(0)
    from_image = parts["encode"] + gradients + update(args.start)
    return mixed(from_image, update(0))


def costs_of(args, parts: dict[str, float]) -> dict[str, float]:
    """`per_image`, and the method of the run if it is a baseline."""
    baseline = {args.method: baseline_cost(args, parts)} if args.method in presets.BASELINES else {}
    return per_image(parts, args.start, bool(args.kl_scale)) | baseline


def matrix_rate(device: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Measured FLOP/s of a matrix product on a device: the fastest of ten."""
    n = 2048 if device == "cpu" else 8192
    a, seconds = torch.ones(n, n, device=device, dtype=dtype), []
    for _ in range(10):
        began = time.perf_counter()
        b = a @ a
        b[0, 0].item()  # synchronise
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


class MFUMeter:
    """Model FLOPs utilisation: needed FLOP/s divided by the device's measured bf16 matrix rate."""

    def __init__(self, args, unet: UNetConfig, vae: VAEConfig):
        self.costs = costs_of(args, flops(args, unet, vae))
        self.images, self.rate = args.batch_size * args.accumulate, matrix_rate(args.device)

    def __call__(self, kind: str, seconds: float) -> float:
        """MFU of one update of a method, with the mean cost over t_f."""
        return self.images * self.costs[kind] / seconds / self.rate


def text_encoder_bytes(unet: UNetConfig) -> int:
    """Size of the frozen text encoders in bf16: CLIP-L with 123 M parameters, for SDXL also bigG with 695 M."""
    return 2 * (123_060_480 + (694_659_840 if unet.pooled else 0)) if unet.context >= 768 else 0


class MemoryModel:
    """GPU memory of a bf16 run, from one micro-batch on tensors without data.

    It has so many images that each size divides into bytes per image and a remainder, the bytes for any number of them.
    """

    IMAGES = 2**29  # larger than any weight in bytes

    def __init__(self, args, unet: UNetConfig, vae: VAEConfig):
        self.args, self.memory, self.text_bytes = args, AllocationTracker(), text_encoder_bytes(unet) + CACHE_BYTES
        self.traces: dict[tuple[bool, bool], list[int]] = {}  # which of UNet and decoder recompute -> events
        with ShapeMode(), self.memory:
            self.networks = m = build_fake(args, unet, vae)
            to_bf16(m.vae)
            fuse(m.vae)
            for network in m.rewards:  # as `reward_networks.to_bf16` does
                network.dtype, tower = torch.bfloat16, getattr(network, "model", network).vision_model
                for linear in (module for module in tower.modules() if isinstance(module, nn.Linear)):
                    to_bf16(linear)
            if args.lora:
                to_bf16(m.unet)
                trained, self.kept = lora.add(fuse(m.unet), args.lora), []
            else:
                trained = list(m.unet.parameters())
                convolutions = [part.conv.weight for part in m.unet.modules() if isinstance(part, Upsample)]
                self.kept = [torch.empty_like(p, dtype=torch.bfloat16) for p in trained]  # for the no-grad steps
                self.kept += [torch.empty(*w.shape[:2], 4, 4, dtype=torch.bfloat16) for w in convolutions]  # fused
            self.kept += [torch.empty_like(p) for p in (*trained, *trained)]  # the optimizer's moments
            if calls_base(args) and not args.lora:
                self.kept += [torch.empty_like(p) for p in trained]  # the base model
            for p in trained:
                p.grad = torch.empty_like(p)  # accumulated by earlier micro-batches
        # Only what is left counts: building went through float32 weights that a run never holds on its GPU.
        self.between_updates = self.memory.current

    def peak(self, flags: str = "", images: tuple[int, ...] = (1, 2)) -> tuple[float, list[float]]:
        """Bytes with these flags: between updates, and the peak during a micro-batch of so many images."""
        if "text-on-cpu" in flags:
            towers = (part for network in self.networks.rewards for part in reward_networks.text_tower(network))
            between_updates = self.between_updates - sum(p.nbytes for part in towers for p in part.parameters())
        else:
            between_updates = self.between_updates + self.text_bytes
        checkpointing = "unet" in flags, "decoder" in flags
        if checkpointing not in self.traces:
            self.traces[checkpointing] = self.micro_batch(*checkpointing)
        events = self.traces[checkpointing]

        def size(event: int, n: int) -> int:
            per_image, fixed = divmod(abs(event), self.IMAGES)
            return (per_image * n + fixed) * (1 if event > 0 else -1)

        peaks = (max(itertools.accumulate(size(event, n) for event in events)) for n in images)
        return between_updates, [between_updates + peak for peak in peaks]

    def micro_batch(self, checkpoint_unet: bool, checkpoint_decoder: bool) -> list[int]:
        """Bytes that a micro-batch allocates, and negative ones that it frees, in order."""
        m, start = self.networks, len(self.memory.events)
        m.unet.checkpointing, m.vae.decoder.checkpointing = checkpoint_unet, checkpoint_decoder
        with ShapeMode(), self.memory, norms_in_float32():
            side = self.args.resolution // m.vae.factor
            x = torch.empty(self.IMAGES, m.vae.config.latent_channels, side, side)
            c = fake_conditioning(m.unet.config, self.IMAGES, torch.bfloat16)

            def unet(*inputs, **conditioning) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=not self.args.lora):  # as `InferenceCopy` does
                    return m.unet(*inputs, **conditioning)

            with torch.autocast("cpu", torch.bfloat16):
                loss = fake_loss(self.args, m, unet, x, c)
            loss.backward()
        return self.memory.events[start:]


def fake_loss(args, m: FakeNetworks, unet: Callable, x: Tensor, c: dict) -> Tensor:
    """The loss of a micro-batch, from where activations are kept on."""
    unet = KLToBase(unet, unet) if args.kl_scale else unet
    loss, inputs = 0, (unet, m.vae, m.reward, SCHEDULER)
    K = number_range(args.gradient_steps)[-1] if args.method in presets.BASELINES else 0
    if args.method == "dpo":
        x, c = torch.cat([x, x]), {key: torch.cat([t, t]) for key, t in c.items()}
    if args.method in ("diffusion", "imagerefl") or args.from_image:
        loss = diffusion_loss(unet(x, 226, **c), x).mean()
    if args.method in ("refl", "imagerefl"):
        loss = loss + reward_loss(*inputs, x, 35, c, [], None)
    elif args.method in ("draft", "drtune"):
        loss = loss + draft_loss(*inputs, x, STEPS - K, c, [], None, K=K, lv_samples=args.lv_samples or 0)
    elif args.method == "dpo":
        x, _ = ranked_pairs(*inputs, x, STEPS - 1, c, [], None)
        loss = loss + dpo_loss(unet, unet, SCHEDULER, x, c, None, K=K)
    return loss + unet.loss() if args.kl_scale else loss


def best_settings(args, memory: MemoryModel, gigabytes: float, known: dict) -> tuple | None:
    """(micro-batch size, flags, GB) that fit a GPU: the fewest savings that leave at least four images, if any do.

    The micro-batch size divides the effective batch size. `known` caches peaks by flags.
    """
    images = args.batch_size * args.accumulate
    for flags in SAVINGS:
        if flags not in known:
            known[flags] = memory.peak(flags)[1]
        one, two = known[flags]
        sizes = [n for n in range(1, images + 1) if images % n == 0]
        needs = {n: (one + (n - 1) * (two - one)) / GB + OVERHEAD_GB for n in sizes}
        fits = [n for n in sizes if needs[n] <= gigabytes]
        if fits and (max(fits) >= 4 or flags == SAVINGS[-1]):
            return max(fits), flags, needs[max(fits)]
    return None


def print_plan(args) -> None:
    """Print the cost of a run with these flags. Needs no data, and weights only for bases other than sd15 and sdxl."""
    if args.base in PUBLISHED:
        unet, vae = PUBLISHED[args.base]
    else:
        unet, vae = unet_config(weights.read_config(args.base)), vae_config(weights.read_config(args.base, "vae"))
    args.data = args.data or "."
    resolve(args, presets.preset_for(args.base, unet_dict(unet)))
    for line in cost_report(args, unet, vae):
        print(line, flush=True)


def cost_report(args, unet: UNetConfig, vae: VAEConfig) -> Iterator[str]:
    """The lines of the plan, as they become known. `args`: resolved flags of `train.py`."""
    images = args.batch_size * args.accumulate
    yield f"{args.base}, {args.method}, {args.resolution} pixels, {images} images per update"
    parts = flops(args, unet, vae)
    yield "\nTFLOP per image"
    yield from (f"  {name:24}{value / 1e12:>10.3f}" for name, value in parts.items())
    yield "\nTFLOP of an update: per image, and in all"
    for name, value in costs_of(args, parts).items():
        yield f"  {name:24}{value / 1e12:>10.3f}{images * value / 1e12:>12.1f}"
    yield f"\npredicted GPU memory without --compile (GB of 2^30 bytes, {OVERHEAD_GB:g} of it overhead), and settings"
    known, memory = {}, MemoryModel(args, unet, vae)
    for gigabytes in [args.gpu_memory] if args.gpu_memory else GPU_MEMORY:
        settings = best_settings(args, memory, gigabytes, known)
        if settings is None:
            text = "does not fit" + ("" if args.lora else "; try --lora 16")
        else:
            batch, flags, need = settings
            text = f"{need:6.1f}  --batch-size {batch} --accumulate {images // batch} {flags}".rstrip()
        yield f"  {gigabytes:>4g} GB  {text}"
    for flags, (one, two) in known.items():
        yield f"  {one / GB:.2f} for one image, {(two - one) / GB:.2f} for each further one  {flags}".rstrip()
