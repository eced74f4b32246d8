"""Defaults that differ between the tiny base, SD1.5 and SDXL: one preset each.

The numbers of SD1.5 and SDXL are the paper's (training: Section 5.3; guidance and base steps: 5.4 and A.2); where it is
silent, the official code's. Free of slow imports, so that `--help` answers at once.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

VERSION = "0.1.0"
METHODS = ("refl", "imagerefl")
BASELINES = ("draft", "drtune", "dpo")  # see baselines/
FEATURES = Path(__file__).parent.parent / "tiny" / "features"  # held-out CLIP for the tiny base's metrics
TUNED = Path(__file__).parent.parent / "tiny" / "tuned"  # a tuned model for the tiny base
SAMPLE_PROMPTS = (
    "a lighthouse on a cliff at dusk, oil painting",
    "a red bicycle leaning on a brick wall",
    "a bowl of ramen, photographed from above",
    "an astronaut playing a violin in a forest",
    "a portrait of an old fisherman",
    "a small robot watering a garden",
)


@dataclass(frozen=True)
class Preset:
    """Defaults of the commands for one base."""

    resolution: int  # pixels
    reward: str
    guidance: float  # classifier-free guidance of the base model; the tuned one has none
    switch: dict[str, int]  # base steps of 40 in combined generation, by training method
    start: int  # step index of t', the noise level of ImageReFL's real images
    lr: float
    batch_size: int  # micro-batch size
    accumulate: int  # micro-batches per update
    updates: dict[str, int]  # by training method
    shift: int  # maximum random shift, in pixels, of the images that the reward scores
    dpo_beta: float  # of Diffusion-DPO; belongs to a mean over the elements of a latent
    dpo_lr: float  # lower, since the loss goes on falling while images get worse
    dpo_draws: int  # timesteps per pair
    prompts: tuple[str, ...]  # for a run's sample grids and table


TINY_REWARDS = ("rater", "tiny", "tiny2")  # of the tiny base: the ground truth, for its own captions; two readings


def switches(refl: int, imagerefl: int) -> dict[str, int]:
    """Base steps by the method's name in a checkpoint. Late where it trains the last steps alone, as from an image."""
    late = ("imagerefl", "draft", *(f"image-{name}" for name in BASELINES))
    return dict.fromkeys(("refl", "drtune", "dpo"), refl) | dict.fromkeys(late, imagerefl)


TINY = Preset(
    resolution=64,
    reward=TINY_REWARDS[0],
    guidance=2.0,
    switch=switches(refl=10, imagerefl=30),
    start=30,
    lr=4.5e-5,
    batch_size=16,
    accumulate=1,
    updates={"refl": 30, "imagerefl": 30, "draft": 30, "drtune": 30, "dpo": 30},
    shift=8,
    dpo_beta=300.0,
    dpo_lr=1.5e-5,
    dpo_draws=4,
    prompts=(
        "octopus",
        "tiger",
        "red apple",
        "cactus",
        "penguin",
        "rocket",
        "frog",
        "strawberry",
        "butterfly",
        "hamburger",
        "ghost",
        "car",
        "owl",
        "sunflower",
        "ice cream",
        "fox",
    ),  # fmt: skip
)
SD15 = Preset(
    resolution=512,
    reward="hpsv2.1",
    guidance=7.5,
    switch=switches(refl=10, imagerefl=30),
    start=30,
    lr=3e-4,
    batch_size=8,
    accumulate=4,
    updates={"refl": 2000, "imagerefl": 4000, "draft": 2000, "drtune": 2000, "dpo": 2000},
    shift=0,
    dpo_beta=5000.0,
    dpo_lr=2e-5,  # of the official launcher, rounded: 1e-8 x 2048
    dpo_draws=1,
    prompts=SAMPLE_PROMPTS,
)
SDXL = replace(  # t' follows the names of the official runs
    SD15,
    guidance=5.0,
    switch=switches(refl=20, imagerefl=35),
    start=35,
    batch_size=4,
)
PRESETS = {"tiny": TINY, "sd15": SD15, "sdxl": SDXL}


def preset_for(base: str, config: dict | None = None) -> Preset:
    """The preset of a named base; of a folder by the text embedding width in its UNet's `config.json`.

    Raises ValueError for SD2.
    """
    if base in PRESETS:
        return PRESETS[base]
    width = (config or {}).get("cross_attention_dim")
    if width == 1024:
        raise ValueError(f"{base}: an SD2 model (its text embeddings have width 1024); SD1.5 and SDXL are supported")
    return {768: SD15, 2048: SDXL}.get(width, TINY)


def newest_run(folder: Path) -> Path | None:
    """The most recently finished run under `folder`, or None."""

    def is_finished(path: Path) -> bool:
        try:
            return bool(json.loads(path.read_text()).get("finished"))
        except (ValueError, AttributeError):
            return False  # damaged

    finished = [path for path in folder.glob("*/run.json") if is_finished(path)]
    return max(finished, key=lambda path: path.stat().st_mtime).parent if finished else None
