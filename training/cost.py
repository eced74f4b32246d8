"""What a run costs, before it starts: arithmetic, memory, and the settings that fit.

    python train.py --base sd15 --data FOLDER --plan --gpu-memory 24

The networks run on tensors without data: for the arithmetic each part of a step, for the memory one pass of it, in
which every allocation is followed. 1 multiplication with its addition is 2 FLOP.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import rewards
import unet as unets
import vae as vaes
import weights
from imagerefl import REFL_EVERY
from pretrained import lora, preprocess, reward_files, reward_networks
from pretrained.configs import unet_config, unet_dict, vae_config
from pretrained.text_encoder import CACHE_BYTES
from refl import T_MAX, reward_loss
from scheduler import Scheduler, diffusion_loss
from training import presets
from training.options import STEPS, resolve
from unet import UNet, UNetConfig, Upsample
from utils import acceleration
from vae import VAE, VAEConfig

PUBLISHED = {"sd15": (unets.SD15, vaes.SD15), "sdxl": (unets.SDXL, vaes.SDXL)}
GB = 2**30  # as makers of GPUs count
MEMORIES = (16, 24, 40, 80)  # GB of the GPUs that people have
OVERHEAD_GB = 1.0  # GB: what the driver keeps, and holes between allocations
SAVINGS = (  # flags that save memory, the later the slower
    "",
    "--checkpointing decoder",
    "--checkpointing unet,decoder",
    "--checkpointing unet,decoder --text-on-cpu",
)
SCHEDULER = Scheduler(STEPS, eta=1.0)


@dataclass
class Networks:
    """What a step runs, on any device; text encoders are only counted, as their results are kept."""

    unet: UNet
    vae: VAE
    rewards: list[nn.Module]

    def reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Every reward of the images, from text features as if they had been computed before."""
        scores = []
        with torch.autocast(images.device.type, enabled=False):
            for network in self.rewards:
                pixels = preprocess.preprocess(images, network.config.vision_config.image_size)
                scores.append(network(pixels, *text_features(network, len(images))))
        return sum(scores)


# ---------------------------------------------------------------------------------------------------- counting


def counter() -> FlopCounterMode:
    """Counts FLOPs in `get_total_flops()`; attention's backward pass as two forward ones, without recomputing."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not among those that the library counts
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    ours = {
        forward: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v),
    }
    return FlopCounterMode(display=False, custom_mapping=ours)


def fuse(network: nn.Module) -> nn.Module:
    """Fused upsampling, as `speed/` has it, if it is there."""
    speed = acceleration.speed()
    return speed.fuse(network) if speed else network


def count(f, *inputs: Tensor, backward: bool = False) -> int:
    """FLOPs of a call, with those of its backward pass where asked for."""
    with counter() as counted, nullcontext() if backward else torch.no_grad():
        output = f(*inputs)
        if backward:
            output.float().sum().backward()
    return counted.get_total_flops()


def text_features(network: nn.Module, batch: int) -> tuple[Tensor, ...]:
    """What `encode_text` returns for prompts."""
    ids = torch.zeros(batch, network.length, dtype=torch.long)
    if isinstance(network, reward_networks.MPS):
        network.condition_ids = ids[:1]
    with torch.no_grad():
        return network.encode_text(ids, torch.ones_like(ids))


def conditioning_of(config: UNetConfig, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The UNet's arguments beside latents and timestep."""
    given = {"context": torch.empty(batch, 77, config.context, dtype=dtype)}
    if config.pooled:
        given["pooled"] = torch.empty(batch, config.pooled - 6 * config.size_embedding, dtype=dtype)
        given["time_ids"] = torch.empty(batch, 6)
    return given


def build(args, unet: UNetConfig, vae: VAEConfig) -> Networks:
    """The networks of a run, in the mode for tensors without data that surrounds the call."""
    with torch.device("meta"):
        blank = (UNet(unet), VAE(vae))
    for network in blank:
        network.load_state_dict({key: torch.empty(t.shape) for key, t in network.state_dict().items()}, assign=True)
    networks = Networks(blank[0], fuse(blank[1].requires_grad_(False)), [])
    paths = (args.reward_weights or "").split(",")
    for i, (name, _) in enumerate(rewards.parse(args.reward) if args.method != "diffusion" else []):
        folder = reward_files.EMBEDDED / name if name in ("tiny", "tiny2") else Path(paths[i] if i < len(paths) else "")
        known = folder != Path() and (folder / "config.json").is_file()
        network = reward_networks.build_meta(name, folder if known else None)
        empty = {key: torch.empty(t.shape) for key, t in network.state_dict().items()}
        networks.rewards.append(reward_networks.load_strict(network, empty, name))
    return networks


def to_bf16(module: nn.Module) -> None:
    """Frozen weights in bf16; `Module.to` does not know tensors without data."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty_like(p, dtype=torch.bfloat16), requires_grad=False))


def flops(args, unet: UNetConfig, vae: VAEConfig) -> dict[str, float]:
    """FLOPs of each part of a step for one image."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        m = build(args, unet, vae)
        if args.lora:
            lora.add(fuse(m.unet), args.lora)
        x = torch.empty(1, vae.latent_channels, *[args.resolution // m.vae.factor] * 2)
        images = torch.empty(1, 3, args.resolution, args.resolution)
        given = conditioning_of(unet, 1, torch.float32)
        parts = {"UNet with gradients": count(lambda x: m.unet(x, 1, **given), x, backward=True)}
        fuse(m.unet)  # as the steps without gradients have it
        parts |= {
            "UNet forward": count(lambda x: m.unet(x, 1, **given), x),
            "decode": count(m.vae.decode, x),
            "decode with gradients": count(m.vae.decode, x.requires_grad_(), backward=True),
            "encode": count(lambda x: m.vae.encode(x)[0], images),
        }
        if m.rewards:
            whole = count(lambda x: m.reward(x, [""]), images.requires_grad_(), backward=True)
            text = count(lambda: sum(text_features(n, 1)[0].sum() for n in m.rewards))
            parts["reward with gradients"] = whole - text  # the text's features are kept
    return parts


def per_image(parts: dict[str, float], start: int = 30) -> dict[str, float]:
    """FLOPs of one image in an update of each method; t_f is drawn uniformly. `start`: the step index of t'."""
    steps = len(SCHEDULER.steps)

    def rollout(first: int, drawn_from: int) -> float:
        taken = [max(t_f - first, 0) for t_f in range(drawn_from, steps)]
        return sum(taken) / len(taken) * parts["UNet forward"]

    costs = {"diffusion": parts["UNet with gradients"] + parts["encode"]}
    if "reward with gradients" in parts:
        last = parts["UNet with gradients"] + parts["decode with gradients"] + parts["reward with gradients"]
        costs["refl"] = rollout(0, steps - T_MAX) + last
        costs["imagerefl"] = parts["encode"] + rollout(start + 1, start) + last + parts["UNet with gradients"]
        costs["3:1 mix"] = ((REFL_EVERY - 1) * costs["imagerefl"] + costs["refl"]) / REFL_EVERY
    return costs


def matrix_rate(device: str) -> float:
    """FLOP a second of a bf16 matrix product on a device, measured: the median of five."""
    n = 1024 if device == "cpu" else 8192
    a, seconds = torch.ones(n, n, device=device, dtype=torch.bfloat16), []
    for _ in range(6):
        began = time.perf_counter()
        b = a @ a
        b[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / median(seconds[1:])


class MFUMeter:
    """MFU: the share of a device's measured bf16 matrix rate that updates reach, in the arithmetic they need."""

    def __init__(self, args, unet: UNetConfig, vae: VAEConfig):
        self.costs = per_image(flops(args, unet, vae), args.start)
        self.images, self.rate = args.batch_size * args.accumulate, matrix_rate(args.device)

    def __call__(self, kind: str, seconds: float) -> float:
        """Of one update; the drawn t_f is taken to be the mean one."""
        return self.images * self.costs[kind] / seconds / self.rate


# ------------------------------------------------------------------------------------------------------ memory


class Allocations(TorchDispatchMode):
    """Follows the bytes of all tensors made within: `now`, and `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        output = f(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, output)
        return output

    def add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, identity: int, size: int) -> None:
        self.known.discard(identity)
        self.now -= size


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """What autocast does on a GPU and not on a CPU, where the tensors without data are; in the backward pass too."""

    def lifted(f: Callable) -> Callable:
        def norm(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return f(*args, **kwargs)

        return norm

    with patch.object(F, "group_norm", lifted(F.group_norm)), patch.object(F, "layer_norm", lifted(F.layer_norm)):
        yield


def text_bytes(unet: UNetConfig) -> int:
    """Of the frozen text encoders in bf16, by the published sizes: 123 million numbers, SDXL's second 695 million."""
    return 2 * (123_060_480 + (694_659_840 if unet.pooled else 0)) if unet.context >= 768 else 0


def peak_memory(args, unet: UNetConfig, vae: VAEConfig, batch: int, flags: str = "") -> tuple[float, float]:
    """Bytes that a run on a GPU in bf16 keeps between updates, and has at most in a pass of `batch` images."""
    side = args.resolution // 2 ** (len(vae.channels) - 1)
    with FakeTensorMode(allow_non_fake_inputs=True), Allocations() as memory, norms_in_float32():
        m = build(args, unet, vae)
        to_bf16(m.vae)
        fuse(m.vae)
        for network in m.rewards:  # as `reward_models.lower` has it
            network.dtype, tower = torch.bfloat16, getattr(network, "model", network).vision_model
            for linear in (module for module in tower.modules() if isinstance(module, nn.Linear)):
                to_bf16(linear)
        if args.lora:
            to_bf16(m.unet)
            trained, copies = lora.add(fuse(m.unet), args.lora), []
        else:
            trained = list(m.unet.parameters())
            convolutions = [part.conv.weight for part in m.unet.modules() if isinstance(part, Upsample)]
            copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in trained]  # for the no-grad steps
            copies += [torch.empty(*w.shape[:2], 4, 4, dtype=torch.bfloat16) for w in convolutions]  # fused
        moments = [torch.empty_like(p) for p in (*trained, *trained)]
        for p in trained:
            p.grad = torch.empty_like(p)  # of the passes before
        if "text-on-cpu" in flags:
            towers = (part for network in m.rewards for part in reward_networks.text_tower(network))
            memory.now -= sum(p.nbytes for part in towers for p in part.parameters())
        else:
            memory.now += text_bytes(unet) + CACHE_BYTES
        kept = memory.peak = memory.now  # before, float32 weights were there that a run never has on its GPU
        m.unet.checkpointing = "unet" in flags
        m.vae.decoder.checkpointing = "decoder" in flags
        x = torch.empty(batch, vae.latent_channels, side, side)
        given = conditioning_of(unet, batch, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = 0
            if args.method != "refl":
                loss = diffusion_loss(m.unet(x, 226, **given), x).mean()
            if args.method != "diffusion":
                loss = loss + reward_loss(m.unet, m.vae, m.reward, SCHEDULER, x, 35, given, [""] * batch, None)
        loss.backward()
        del copies, moments
    return kept, memory.peak


def fitting(args, unet: UNetConfig, vae: VAEConfig, gigabytes: float, known: dict) -> tuple | None:
    """The largest batch that divides an update's images and fits, with the fewest savings: (batch, flags, GB)."""
    images = args.batch_size * args.accumulate
    for flags in SAVINGS:
        if flags not in known:
            known[flags] = [peak_memory(args, unet, vae, batch, flags)[1] for batch in (1, 2)]
        one, two = known[flags]
        sizes = [n for n in range(1, images + 1) if images % n == 0]
        needs = {n: (one + (n - 1) * (two - one)) / GB + OVERHEAD_GB for n in sizes}
        fits = [n for n in sizes if needs[n] <= gigabytes]
        if fits and (max(fits) >= 4 or flags == SAVINGS[-1]):
            return max(fits), flags, needs[max(fits)]
    return None


def print_plan(args) -> None:
    """Print what a run with these flags would cost. Needs neither weights nor data."""
    unet, vae = configs(args.base)
    args.data = args.data or "."
    resolve(args, presets.preset_for(args.base, unet_dict(unet)))
    for line in cost_report(args, unet, vae):
        print(line, flush=True)


def configs(base: str) -> tuple[UNetConfig, VAEConfig]:
    """The sizes of a base; those of the published ones are known without their files."""
    if base in PUBLISHED:
        return PUBLISHED[base]
    return unet_config(weights.read_config(base, "unet")), vae_config(weights.read_config(base, "vae"))


def cost_report(args, unet: UNetConfig, vae: VAEConfig) -> Iterator[str]:
    """The plan, line by line as it is known: the memory takes minutes. `args`: those of `train.py`, resolved."""
    images = args.batch_size * args.accumulate
    yield f"{args.base}, {args.method}, {args.resolution} pixels, {images} images an update"
    parts = flops(args, unet, vae)
    yield "\nTFLOP an image"
    yield from (f"  {name:24}{value / 1e12:>10.3f}" for name, value in parts.items())
    yield "\nTFLOP an image of an update, and an update"
    for name, value in per_image(parts, args.start).items():
        yield f"  {name:24}{value / 1e12:>10.3f}{images * value / 1e12:>12.1f}"
    if args.method == "diffusion":
        return
    kind = "memory on a GPU, predicted, not compiled"
    yield f"\n{kind} (GB of 2^30 bytes, with {OVERHEAD_GB:g} for the driver), and settings"
    known: dict = {}
    for gigabytes in [args.gpu_memory] if args.gpu_memory else MEMORIES:
        found = fitting(args, unet, vae, gigabytes, known)
        if found is None:
            said = "does not fit" + ("" if args.lora else "; try --lora 16")
        else:
            batch, flags, need = found
            said = f"{need:6.1f}  --batch-size {batch} --accumulate {images // batch}"
            said += f" {flags}" if flags else ""
        yield f"  {gigabytes:>4g} GB  {said}"
    for flags, (one, two) in known.items():
        yield f"  {one / GB:.2f} with one image, {(two - one) / GB:.2f} for each more  {flags}".rstrip()
