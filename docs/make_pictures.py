"""Make the pictures of the documents from the tiny base and two default runs.

python train.py --method imagerefl
python train.py --method refl --reward tiny
python docs/make_pictures.py       # docs/main.png, tiny/sheet.png
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs"
sys.path.insert(0, str(ROOT))
import weights
from combined import combined_weights, generate
from scheduler import Scheduler
from training import presets
from training.data import EmojiSet
from utils.images import grid, save_png, to_pil


def sample(checkpoint: str | None, switch: int, prompts: list[str], seeds: list[int]) -> list:
    """Pictures with the base taking the first `switch` of 40 steps."""
    unet = weights.load_unet("tiny")
    base, tuned = weights.load_tuned(checkpoint, "tiny") if checkpoint else (unet, unet)
    vae, text = weights.load_vae("tiny"), weights.load_text("tiny")
    mixture, size = combined_weights(40, switch), (64, 64)
    return to_pil(generate(base, tuned, vae, text, Scheduler(40), mixture, prompts, seeds, size, presets.TINY.guidance))


def main() -> None:
    torch.manual_seed(0)
    prompts, seeds = ["octopus", "fox", "strawberry", "butterfly"], [1, 2, 3, 4]
    asked, all_seeds = [p for p in prompts for _ in seeds], seeds * len(prompts)
    rows = {
        "base model": sample(None, 40, asked, all_seeds),
        "ImageReFL, --switch 30": sample(f"{RUNS}/imagerefl-tiny", 30, asked, all_seeds),
        "ImageReFL alone": sample(f"{RUNS}/imagerefl-tiny", 0, asked, all_seeds),
        "ReFL on a learned reward, --switch 10": sample(f"{RUNS}/refl-tiny", 10, asked, all_seeds),
        "ReFL alone": sample(f"{RUNS}/refl-tiny", 0, asked, all_seeds),
    }
    heads = [f"{p}" if seed == seeds[0] else "" for p in prompts for seed in seeds]
    save_png(grid(list(rows.values()), list(rows), heads, cell=72), ROOT / "docs" / "main.png")

    emoji = EmojiSet(seed=7)
    shown = [emoji.describe(i) for i in range(48)]
    real = [emoji.draw(c) for c in shown]
    made = sample(None, 40, [c.caption for c in shown], list(range(48)))
    cells = [side[i : i + 8] for i in range(0, 48, 8) for side in (real, made)]
    heads = ["real", "generated"] * 6
    save_png(grid(cells, heads, [""] * 8, cell=80), ROOT / "tiny" / "sheet.png")


if __name__ == "__main__":
    main()
