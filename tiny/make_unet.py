"""Train the UNet of the tiny base with this project's own `train.py --method diffusion`, and put it into `tiny/base/`.

    python tiny/make_unet.py             # goes on where it was stopped; remove tiny/work/unet/ to begin anew

Needs the autoencoder and the text encoder (make_vae.py, make_clip.py text). Also writes the small files that make
`tiny/base/` a whole pipeline folder, which diffusers' StableDiffusionPipeline reads.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import state
import weights
from unet import TINY

TINY_DIR = Path(__file__).parent
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {  # SD1.5's schedule, sampled as the paper does
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "variance_type": "fixed_small",
    "clip_sample": False,
}
RECIPE = (
    "--method diffusion --base tiny --init random --cache-latents --batch-size 64 --lr 6e-4 --lr-schedule cosine "
    "--warmup 100 --snr-gamma 5 --ema 0.999 --caption-dropout 0.1 --sample-every 1000 --save-every 500"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="updates of 64 images (default: 8000)")
    args = parser.parse_args()

    base, run = TINY_DIR / "base", TINY_DIR / "work" / "unet"
    state.write_text(base / "model_index.json", json.dumps(INDEX, indent=1) + "\n")
    state.write_text(base / "scheduler" / "scheduler_config.json", json.dumps(SCHEDULER, indent=1) + "\n")
    state.write_text(base / "unet" / "config.json", json.dumps(TINY.to_dict(), indent=1) + "\n")
    if (run / "run.json").exists():
        if args.steps:
            parser.error(f"--steps: {run} is there and goes on as it began; remove it to begin anew")
        flags = ["--resume", str(run)]
    else:
        flags = [*RECIPE.split(), "--steps", str(args.steps or 8000), "--output-dir", str(run)]
    subprocess.run([sys.executable, str(TINY_DIR.parent / "train.py"), *flags], check=True)
    weights.save_unet(weights.load_unet(run / "unet"), base / "unet", dtype=torch.float16)


if __name__ == "__main__":
    main()
