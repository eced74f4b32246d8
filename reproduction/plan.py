"""What a reproduction will take, before it starts: FLOPs of each stage, GPU memory and the flags that fit it, disk."""

from dataclasses import dataclass
from pathlib import Path

import torch

from combined import aig_weights, combined_weights
from pretrained import hub, weight_files
from pretrained.configs import unet_config, vae_config
from reproduction.assets import PUBLISHED
from training import cost, presets
from training.options import STEPS, parse_args, resolve
from unet import UNet, UNetConfig
from vae import VAEConfig
from weights import read_config

H100 = {"train refl": 0.140, "train imagerefl": 0.154, "evaluate": 0.199}  # PFLOP/s, of benchmarks/results/h100.md
PNG_BYTES = 1.75  # per pixel of a sampled image, about


@dataclass(frozen=True)
class Sizes:
    """How much is trained and sampled: the paper's, or a rehearsal's."""

    updates: dict[str, int]
    prompts: int
    images: int  # per prompt
    coco: int
    sample_every: int = 200


QUICK = Sizes({"refl": 2, "imagerefl": 4}, 4, 2, 16, 0)


@dataclass(frozen=True)
class Settings:
    """What is reproduced: a column of Table 1 or 3, and how."""

    base: str
    reward: str
    data: Path | None
    published: bool = False
    quick: bool = False
    resolution: int | None = None
    lora: int | None = None

    @property
    def sizes(self) -> Sizes:
        return QUICK if self.quick else Sizes(presets.PRESETS[self.base].updates, 400, 5, 10_000)

    @property
    def methods(self) -> tuple[str, ...]:
        return () if self.published else presets.METHODS

    @property
    def model(self) -> str:
        return PUBLISHED[self.base, self.reward]


def train_args(settings: Settings, method: str):
    """The resolved flags of train.py, without a look at data or GPU."""
    flags = ["--base", settings.base, "--method", method, "--reward", settings.reward, "--data", ".", "--device", "cpu"]
    flags += ["--resolution", str(settings.resolution)] if settings.resolution else []
    flags += ["--lora", str(settings.lora)] if settings.lora else []
    args = parse_args(flags)
    resolve(args, presets.PRESETS[settings.base])
    return args


def shapes(base: str, fetch: bool = False) -> tuple[UNetConfig, VAEConfig]:
    """The sizes of the networks: those of the base in the hub's cache, else the published ones. fetch: its configs."""
    with hub.offline():
        try:
            return unet_config(read_config(base)), vae_config(read_config(base, "vae"))
        except OSError:
            if not fetch:
                return cost.PUBLISHED[base]
    folder = hub.fetch(weight_files.BASES[base], lambda _: ["unet/config.json", "vae/config.json"])
    unet, vae = (weight_files.read_json(folder / part / "config.json") for part in ("unet", "vae"))
    return unet_config(unet), vae_config(vae)


def schedules(settings: Settings) -> list[tuple[list[float], float]]:
    """(weights of the tuned model, guidance of the base model) of each row that `evaluate.py` samples."""
    preset = presets.PRESETS[settings.base]
    combined = {method: (combined_weights(STEPS, n), preset.guidance) for method, n in preset.switch.items()}
    rows = [(combined_weights(STEPS, STEPS), preset.guidance), (combined_weights(STEPS, STEPS), 1.0)]
    if not settings.published:
        rows += [(combined_weights(STEPS, 0), preset.guidance), (aig_weights(STEPS), 1.0), combined["refl"]]
    return [*rows, combined["imagerefl"]]


def forward_passes(weights: list[float], guidance: float) -> int:
    """UNet calls for one image: guidance takes two of the base model."""
    return sum((2 if guidance != 1 else 1) * (w < 1) + (w > 0) for w in weights)


def petaflops(settings: Settings, sizes: tuple[UNetConfig, VAEConfig]) -> dict[str, float]:
    """PFLOP of each stage that computes; text encoders, rewards and features of an evaluation are left out."""
    args = train_args(settings, "imagerefl")
    parts = cost.flops(args, *sizes)
    update = cost.per_image(parts, args.start)
    images = args.batch_size * args.accumulate
    kinds, n = {"refl": "refl", "imagerefl": "3:1 mix"}, settings.sizes
    found = {f"train {method}": n.updates[method] * images * update[kinds[method]] for method in settings.methods}
    image = sum(forward_passes(*row) * parts["UNet forward"] + parts["decode"] for row in schedules(settings))
    found |= {"evaluate hpdv2": n.prompts * n.images * image, "evaluate coco": n.coco * image}
    return {name: flop / 1e15 for name, flop in found.items()}


def hours_on_an_h100(petaflops: dict[str, float]) -> float:
    """Hours at the rates that were measured at SD1.5's size with random weights."""
    return sum(value / H100.get(name, H100["evaluate"]) for name, value in petaflops.items()) / 3600


def disk_gb(settings: Settings, sizes: tuple[UNetConfig, VAEConfig]) -> float:
    """GB of the run's folder: of each training a UNet and up to three checkpoints, of each row its images."""
    with torch.device("meta"):
        unet = 4 * sum(p.numel() for p in UNet(sizes[0]).parameters())
    n, side = settings.sizes, settings.resolution or presets.PRESETS[settings.base].resolution
    share = 0.1 if settings.lora else 1 + 3 * (1 if settings.quick else 3)  # a checkpoint holds Adam's moments, too
    runs = len(settings.methods) * share * unet
    images = len(schedules(settings)) * (n.prompts * n.images + n.coco) * side**2 * PNG_BYTES
    return (runs + images) / 1e9


def training_flags(settings: Settings, sizes: tuple[UNetConfig, VAEConfig], gigabytes: float) -> tuple[list[str], str]:
    """Flags of train.py with which a GPU's memory suffices, and a sentence; the images per update stay the paper's.

    Raises ValueError, with what to change, if nothing fits.
    """
    args, known = train_args(settings, "imagerefl"), {}
    found = cost.best_settings(args, cost.MemoryModel(args, *sizes), gigabytes, known)
    if found is None:
        least = min(one for one, _ in known.values()) / cost.GB + cost.OVERHEAD_GB
        remedy = (
            "use a GPU with more memory"
            if settings.lora
            else "use a larger GPU, or --lora 16, which is not the paper's"
        )
        raise ValueError(
            f"training {settings.base} takes at least {least:.0f} GB, the GPU has {gigabytes:.0f}; {remedy}"
        )
    batch, flags, need = found
    accumulate = args.batch_size * args.accumulate // batch
    flags = ["--batch-size", str(batch), "--accumulate", str(accumulate), *flags.split()]
    return flags, f"training takes about {need:.0f} of {gigabytes:.0f} GB of GPU memory with {' '.join(flags)}"
