"""tiny/pretrain.py: the diffusion loss over all timesteps, and the options of the tiny base's recipe."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from scheduler import Scheduler
from tiny import pretrain

SCHEDULER = Scheduler(40)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(*flags: str) -> None:
    pretrain.main(pretrain.parse_args([*flags, "--dtype", "float32", "--batch-size", "2", "--sample-every", "0"]))


def test_min_snr_down_weights_low_noise_timesteps():
    def zero(x, t):
        return torch.zeros_like(x)

    x0 = torch.zeros(4096, 1, 2, 2)
    loss, unweighted = pretrain.pretraining_loss(zero, SCHEDULER, x0, {}, seeded())
    weighted, unweighted_again = pretrain.pretraining_loss(zero, SCHEDULER, x0, {}, seeded(), snr_gamma=5.0)
    snr = SCHEDULER.abar / (1 - SCHEDULER.abar)
    expected = (5.0 / snr).clamp(max=1).mean().item()  # the squared error of predicting no noise is 1
    assert loss.item() == pytest.approx(1, abs=0.05)
    assert unweighted.item() == unweighted_again.item() == pytest.approx(loss.item())
    assert weighted.item() == pytest.approx(expected, abs=0.05)


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_accumulation_averages_over_micro_batches(tmp_path):
    flags = ["--steps", "1", "--accumulate", "3"]
    run(*flags, "--output-dir", str(tmp_path / "run"))
    state = load_file(tmp_path / "run" / "states" / "step-000001.safetensors")
    assert state["optimizer.0.step"].item() == 1  # one optimizer step per update
    norm = log_of(tmp_path / "run")[0]["grad_norm"]
    first_moments = [t for key, t in state.items() if key.endswith("exp_avg")]
    total = torch.stack([t.square().sum() for t in first_moments]).sum().sqrt().item()
    assert total == pytest.approx(0.1 * norm, rel=1e-4)


def test_training_on_a_folder_counts_images_that_cannot_be_decoded(tmp_path, capsys):
    lines = []
    for i in range(3):
        Image.new("RGB", (80, 70), "red").save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "red"}))
    (tmp_path / "1.png").write_bytes(b"broken")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    run("--data", str(tmp_path), "--steps", "2", "--output-dir", str(tmp_path / "run"))
    captured = capsys.readouterr()
    assert "1.png" in captured.err and "1 images could not be decoded" in captured.out
    with pytest.raises(ValueError, match=r"--cache-latents: .*1\.png"):
        run("--data", str(tmp_path), "--cache-latents", "--output-dir", str(tmp_path / "other"))


def test_latents_are_cached_in_batches():
    batches, args = [], pretrain.parse_args(["--batch-size", "2", "--device", "cpu", "--dtype", "float32"])
    vae = SimpleNamespace(encode=lambda x: batches.append(len(x)) or (x[:, :1], x[:, 1:2]))
    data = [(torch.full((3, 2, 2), float(i)), f"caption {i}") for i in range(5)]
    posteriors, captions = pretrain.encode_all(args, vae, data)
    assert batches == [2, 2, 1] and captions == [f"caption {i}" for i in range(5)]
    assert posteriors.shape == (5, 2, 1, 2, 2) and posteriors[4, 0, 0, 0, 0] == 4
