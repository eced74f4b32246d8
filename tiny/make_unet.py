"""Train the UNet of the tiny base with `tiny/pretrain.py`, and write it to `tiny/base/`.

    python tiny/make_unet.py             # resumes an interrupted run; remove tiny/work/ to start again

Needs the autoencoder and the text encoder (make_vae.py, make_clip.py text). Also writes the configuration files that
make `tiny/base/` a folder for diffusers' StableDiffusionPipeline.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import weights
from pretrained.configs import unet_dict
from unet import TINY
from utils import disk

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
SCHEDULER = {  # SD1.5's noise schedule, with the paper's sampler
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
    "--base tiny --cache-latents --batch-size 64 --lr-schedule cosine "
    "--warmup 100 --snr-gamma 5 --ema 0.999 --caption-dropout 0.1 --sample-every 1000 --save-every 500"
)
STAGES = {  # each starts from the one before; for the shipped base the first two saw perfect pictures only
    "unet": "--init random --lr 6e-4 --steps 8000",
    "unet-more": "--lr 3e-4 --steps 3000 --seed 1",
    "unet-mixed": "--lr 4e-4 --steps 1586 --seed 2 --batch-size 256",
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    base, work = TINY_DIR / "base", TINY_DIR / "work"
    disk.write_text(base / "model_index.json", json.dumps(INDEX, indent=1) + "\n")
    disk.write_text(base / "scheduler" / "scheduler_config.json", json.dumps(SCHEDULER, indent=1) + "\n")
    disk.write_text(base / "unet" / "config.json", json.dumps(unet_dict(TINY), indent=1) + "\n")
    for name, stage in STAGES.items():
        run = work / name
        if not (run / "unet" / "config.json").exists():
            begun = (run / "run.json").exists()
            flags = ["--resume", str(run)] if begun else [*f"{RECIPE} {stage}".split(), "--output-dir", str(run)]
            subprocess.run([sys.executable, str(TINY_DIR / "pretrain.py"), *flags], check=True)
        weights.save_unet(weights.load_unet(run / "unet"), base / "unet", dtype=torch.float16)


if __name__ == "__main__":
    main()
