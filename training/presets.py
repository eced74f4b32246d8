"""What differs between the tiny base, SD1.5 and SDXL: one row each, from Section 5 of the paper where it has them.

No torch here, so that `--help` answers at once.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

VERSION = "0.1.0"
METHODS = ("diffusion", "refl", "imagerefl")
FEATURES = Path(__file__).parent.parent / "tiny" / "features"  # the held-out CLIP that judges the tiny base
TUNED = Path(__file__).parent.parent / "tiny" / "tuned"  # a tuned model that ships with the tiny base
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
    guidance: float  # of the base model; the tuned one runs without
    switch: dict[str, int]  # steps of 40 that the base model takes, by the tuned model's method
    start: int  # step index of t', where ImageReFL's noised images stand
    lr: float
    batch_size: int  # images in one forward and backward pass
    accumulate: int  # passes an update
    updates: dict[str, int]
    shift: int  # pixels by which the images that the reward sees are moved at random
    prompts: tuple[str, ...]  # for the grids and the table of a run


TINY = Preset(
    resolution=64,
    reward="tiny",
    guidance=2.0,
    switch={"refl": 10, "imagerefl": 30},
    start=30,
    lr=4.5e-5,
    batch_size=16,
    accumulate=1,
    updates={"diffusion": 5000, "refl": 75, "imagerefl": 150},
    shift=8,
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
SD15 = Preset(  # Table 1, SD1.5 rows; Section 5.1; `diffusion` is ours
    resolution=512,
    reward="hpsv2.1",
    guidance=7.5,
    switch={"refl": 10, "imagerefl": 30},
    start=30,
    lr=3e-4,
    batch_size=8,
    accumulate=4,
    updates={"diffusion": 4000, "refl": 2000, "imagerefl": 4000},
    shift=0,
    prompts=SAMPLE_PROMPTS,
)
SDXL = replace(  # Section 5.1; t' follows the names of the official runs
    SD15,
    guidance=5.0,
    switch={"refl": 20, "imagerefl": 35},
    start=35,
    batch_size=4,
)
PRESETS = {"tiny": TINY, "sd15": SD15, "sdxl": SDXL}


def preset_for(base: str, config: dict | None = None) -> Preset:
    """The row of a named base, or of a folder by its UNet's `config.json`: by the width of the text states.

    Raises ValueError for SD2.
    """
    if base in PRESETS:
        return PRESETS[base]
    width = (config or {}).get("cross_attention_dim")
    if width == 1024:
        raise ValueError(f"{base}: an SD2 model by its text states of width 1024; SD1.5 and SDXL are supported")
    return {768: SD15, 2048: SDXL}.get(width, TINY)


def newest_run(folder: Path) -> Path | None:
    """The run folder under `folder` that was finished last, if there is one."""

    def is_finished(path: Path) -> bool:
        try:
            return bool(json.loads(path.read_text()).get("finished"))
        except (ValueError, AttributeError):
            return False  # damaged

    finished = [path for path in folder.glob("*/run.json") if is_finished(path)]
    return max(finished, key=lambda path: path.stat().st_mtime).parent if finished else None
