"""Make the pictures of the documents from the tiny base and four runs.

python train.py --method imagerefl
python train.py --method refl
python train.py --reward tiny --steps 56 --output-dir runs/collapsed
python train.py --reward tiny --steps 52 --kl-scale 3e-4 --output-dir runs/held
python docs/make_pictures.py       # docs/main.png, docs/results/collapse.png, tiny/sheet.png
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


def compare(rows: dict[str, tuple], prompts: list[str], path: Path) -> None:
    """A row per model and switch: the same prompts, and four seeds of each."""
    seeds = [1, 2, 3, 4]
    asked, all_seeds = [p for p in prompts for _ in seeds], seeds * len(prompts)
    pictures = [sample(*row, asked, all_seeds) for row in rows.values()]
    heads = [p if seed == seeds[0] else "" for p in prompts for seed in seeds]
    save_png(grid(pictures, list(rows), heads, cell=72), path)


def main() -> None:
    torch.manual_seed(0)
    main_rows = {
        "base model": (None, 40),
        "ImageReFL, --switch 30": (f"{RUNS}/imagerefl-tiny", 30),
        "ImageReFL alone": (f"{RUNS}/imagerefl-tiny", 0),
        "ReFL, --switch 10": (f"{RUNS}/refl-tiny", 10),
        "ReFL alone": (f"{RUNS}/refl-tiny", 0),
    }
    compare(main_rows, ["octopus", "fox", "strawberry", "butterfly"], ROOT / "docs" / "main.png")
    collapse_rows = {
        "base model": (None, 40),
        "ImageReFL alone": (f"{RUNS}/collapsed", 0),
        "ImageReFL, --switch 30": (f"{RUNS}/collapsed", 30),
        "--kl-scale 3e-4, alone": (f"{RUNS}/held", 0),
    }
    compare(collapse_rows, ["octopus", "fox", "ghost", "pizza"], ROOT / "docs" / "results" / "collapse.png")

    emoji = EmojiSet(seed=7)
    shown = [emoji.describe(i) for i in range(48)]
    real = [emoji.draw(c) for c in shown]
    made = sample(None, 40, [c.caption for c in shown], list(range(48)))
    cells = [side[i : i + 8] for i in range(0, 48, 8) for side in (real, made)]
    heads = ["real", "generated"] * 6
    save_png(grid(cells, heads, [""] * 8, cell=80), ROOT / "tiny" / "sheet.png")


if __name__ == "__main__":
    main()
