"""The README's commands as a user types them, and loading the result into diffusers. Takes minutes: marked slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weights

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def command(folder, *words: str) -> str:
    """Run a script in another folder, with its own `runs/` and `samples/`."""
    words = [sys.executable, str(ROOT / words[0]), *words[1:]]
    return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True, env=os.environ).stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder in which the default training run was made."""
    folder = tmp_path_factory.mktemp("main")
    command(folder, "train.py", "--method", "imagerefl", "--base", "tiny")
    return folder


def test_the_rater_and_both_independent_rewards_rise_and_the_images_stay_varied(run):
    """Base against `--switch 30`, as ImageReFL samples; 64 images, errors of a single mean."""
    table = json.loads((run / "runs" / "imagerefl-tiny" / "run.json").read_text())["table"]
    base, tuned = table["base"], table["--switch 30"]
    assert set(base) == {"reward", "tiny", "tiny2", "diversity"}
    for name, errors in (("reward", 3), ("tiny", 1), ("tiny2", 1)):
        before, deviation = base[name]
        assert tuned[name][0] - before > errors * deviation / 64**0.5, name
    assert tuned["diversity"][0] > 0.75 * base["diversity"][0]


def test_the_newest_run_is_sampled_with_combined_generation(run):
    out = command(run, "sample.py", "--switch", "30")
    assert "runs/imagerefl-tiny (the newest run)" in out
    assert len(list((run / "samples").glob("*.png"))) == 65


def test_diffusers_loads_the_result(run):
    diffusers = pytest.importorskip("diffusers")
    folder = run / "runs" / "imagerefl-tiny" / "unet"
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder)
    x, context = torch.randn(2, 16, 8, 8), torch.randn(2, 24, 128)
    with torch.no_grad():
        difference = theirs(x, 500, context).sample - weights.load_unet(folder)(x, 500, context)
    assert difference.abs().max() <= 1e-5


def test_diffusers_loads_the_tiny_base_as_a_pipeline():
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(ROOT / "tiny" / "base", torch_dtype=torch.float32)
    unet, vae = weights.load_unet("tiny"), weights.load_vae("tiny")
    x, context = torch.randn(1, 16, 8, 8), torch.randn(1, 24, 128)
    with torch.no_grad():
        assert (pipeline.unet(x, 7, context).sample - unet(x, 7, context)).abs().max() <= 1e-5
        assert (pipeline.vae.decode(x / vae.config.scale).sample - vae.decode(x)).abs().max() <= 1e-5
        ids = pipeline.tokenizer("octopus", padding="max_length", max_length=24, return_tensors="pt").input_ids
        states = pipeline.text_encoder(ids).last_hidden_state
        assert (states - weights.load_text("tiny")(["octopus"], (64, 64))["context"]).abs().max() <= 1e-5
    image = pipeline("octopus", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)
