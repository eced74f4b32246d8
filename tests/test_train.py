"""The training command on the tiny base: its output files and the effect of its flags."""

import json
import math
from statistics import mean

import pytest
import torch
from safetensors import safe_open

import train
import weights
from training import models, monitor, options
from training import run as training_run
from training.presets import SD15, SDXL, TINY


@pytest.fixture
def one_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("octopus\n")
    return str(path)


def run(*flags: str) -> None:
    train.main(train.parse_args([*flags, "--dtype", "float32", "--batch-size", "2", "--sample-every", "0"]))


@pytest.fixture
def fake_samples(monkeypatch):
    """Noise instead of sampled images, which would take 40 steps."""
    noise = torch.Generator().manual_seed(0)

    def images(base, tuned, vae, text, scheduler, schedules, prompts, *rest):
        return [torch.rand(len(prompts), 3, 64, 64, generator=noise) * 2 - 1 for _ in schedules]

    monkeypatch.setattr(monitor, "generate_each", images)


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_imagerefl_writes_log_weights_and_table(tmp_path, one_prompt, capsys, monkeypatch):
    folder, loaded, accelerate = tmp_path / "run", [], train.accelerate
    monkeypatch.setattr(train, "accelerate", lambda args, m, *rest: loaded.append(m) or accelerate(args, m, *rest))
    run("--method", "imagerefl", "--steps", "4", "--prompts", one_prompt, "--output-dir", str(folder))
    log = log_of(folder)
    assert [row["kind"] for row in log] == ["imagerefl"] * 3 + ["refl"]
    assert all(row["grad_norm"] > 0 for row in log) and "diffusion" in log[0] and "diffusion" not in log[3]
    tuned, base = weights.load_unet(folder), weights.load_unet("tiny")
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True))
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["base"], header["method"], header["reward"], header["step"]) == ("tiny", "imagerefl", "tiny", "4")
    out = capsys.readouterr().out
    assert f"python sample.py --checkpoint {folder} --switch 30" in out
    table = json.loads((folder / "run.json").read_text())["table"]
    assert set(table) == {"base", "tuned", "--switch 30"}
    assert all(set(row) == {"reward", "tiny2", "rater", "diversity"} for row in table.values())
    assert table["base"]["reward"] != table["tuned"]["reward"]  # the base model is a copy, not the trained UNet
    vae = loaded[0].vae
    assert not any(p.requires_grad for p in vae.parameters())
    assert all(torch.equal(t, vae.state_dict()[key]) for key, t in weights.load_vae("tiny").state_dict().items())


@pytest.mark.slow
def test_the_monitor_compares_with_the_initial_scores_and_can_stop_the_run(
    tmp_path, one_prompt, fake_samples, capsys, monkeypatch
):
    seen = []
    monkeypatch.setattr(monitor, "overfits", lambda change: seen.append(change) or len(seen) == 3)
    monkeypatch.setattr(monitor, "changes", lambda first, now: {k: (now[k] - first[k]).tolist() for k in now})
    monkeypatch.setattr(monitor, "describe", str)
    (tmp_path / "prompts.txt").write_text("fox\nowl\n")
    flags = ["--monitor", "2", "--stop-on-collapse", "--prompts", one_prompt]
    run("--steps", "6", *flags, "--output-dir", str(tmp_path / "run"))
    log = log_of(tmp_path / "run")
    assert ["monitor_diversity" in row for row in log] == [False, True, False, True]  # stopped after update 4 of 6
    with safe_open(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata()["step"] == "4"
    assert seen[0] == {key: pytest.approx([0, 0], abs=1e-6) for key in ("reward", "judge", "diversity")}  # initial
    first = json.loads((tmp_path / "run" / "run.json").read_text())["monitor"]
    for row, change in zip((log[1], log[3]), seen[1:], strict=True):
        assert row["monitor_reward"] - mean(first["reward"]) == pytest.approx(mean(change["reward"]), abs=1e-4)
        assert abs(change["diversity"][0]) > 1e-4
    output = capsys.readouterr()
    assert "update 4: over-optimisation: the reward rises" in output.err and "--stop-on-collapse" in output.out
    assert (tmp_path / "run" / "unet" / "config.json").is_file()


def test_a_long_prompt_file_is_cut_for_the_table(tmp_path, fake_samples, capsys, monkeypatch):
    asked, fake = [], monitor.generate_each
    monkeypatch.setattr(monitor, "generate_each", lambda *args: asked.extend(args[6]) or fake(*args))
    monkeypatch.setattr(training_run, "TABLE_PROMPTS", 2)
    (tmp_path / "prompts.txt").write_text("fox\nowl\ncat\n")
    run("--steps", "1", "--prompts", str(tmp_path / "prompts.txt"), "--output-dir", str(tmp_path / "run"))
    assert set(asked) == {"fox", "owl"}
    assert "the first 2 of 3; evaluate.py measures all of them" in capsys.readouterr().out


def test_lora_trains_only_adapters(tmp_path, one_prompt, fake_samples):
    folder = tmp_path / "run"
    run("--method", "refl", "--lora", "2", "--steps", "1", "--prompts", one_prompt, "--output-dir", str(folder))
    assert (folder / "pytorch_lora_weights.safetensors").exists() and not (folder / "unet").exists()
    base, tuned = weights.load_tuned(folder, "tiny")
    x, context = torch.ones(1, 16, 8, 8), torch.ones(1, 4, 128)
    with torch.no_grad():
        original = weights.load_unet("tiny")(x, 1, context)
        assert torch.equal(base(x, 1, context), original)
        assert not torch.equal(tuned(x, 1, context), original)


def test_lora_on_a_gpu_trains_float32_adapters_on_one_frozen_bf16_unet(monkeypatch):
    monkeypatch.setattr(models, "frozen_dtype", lambda args: torch.bfloat16)
    args = train.parse_args(["--method", "refl", "--lora", "2"])
    options.resolve(args, TINY)
    m = models.load_models(args, TINY)
    net = models.accelerate(args, m, torch.optim.AdamW(m.parameters))
    assert net.copy is m.unet
    assert {p.dtype for p in m.unet.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in m.parameters} == {torch.float32}


def test_the_scale_of_the_loss_does_not_change_adams_updates():
    """With a loss scaled by 1e-3 or less, the first updates equal those of the unscaled loss."""
    changes = []
    for scale in (1.0, 1e-5):
        weight = torch.nn.Parameter(torch.zeros(100))
        optimizer = torch.optim.AdamW([weight], 1e-2, eps=train.ADAM_EPS, fused=True)
        for _ in range(3):
            (scale * 1e-3 * (weight * torch.arange(1.0, 101.0) / 1e3).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        changes.append(weight.detach().clone())
    assert torch.allclose(*changes, rtol=1e-3)
    assert changes[0].abs().min() > 0.029


@pytest.mark.parametrize("factor", [1.0, 1.5, 0.0, math.nan])
def test_compiling_is_refused_if_it_changes_a_gradient(factor, tmp_path, one_prompt, fake_samples, monkeypatch):
    """With a fake compiler. The real one of torch 2.13 loses the decoder's bf16 gradient on a CPU."""

    def compiler(f, **_):
        def compiled(*args, **kwargs):
            y = f(*args, **kwargs)
            return y.detach() + factor * (y - y.detach())  # same value except for NaN, different gradient

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    flags = ["--steps", "1", "--compile", "--output-dir", str(tmp_path / "run"), "--prompts", one_prompt]
    if factor == 1:
        run(*flags)
        assert log_of(tmp_path / "run")[0]["grad_norm"] > 0
    else:
        with pytest.raises(ValueError, match="--compile: the autoencoder's compiled gradient is wrong"):
            run(*flags)
        assert not (tmp_path / "run").exists()


def test_flags_accept_underscores_for_dashes():
    args = train.parse_args(["--batch_size", "3", "--output_dir=a_b"])
    assert (args.batch_size, args.output_dir) == (3, "a_b")


def test_defaults_are_the_papers():
    args = train.parse_args(["--base", "sd15", "--data", "x"])
    options.resolve(args, SD15)
    assert (args.steps, args.batch_size * args.accumulate, args.lr, args.start) == (4000, 32, 3e-4, 30)
    args = train.parse_args(["--base", "sdxl", "--data", "x", "--method", "refl"])
    options.resolve(args, SDXL)
    assert (args.steps, args.batch_size * args.accumulate, args.lr, args.start) == (2000, 16, 3e-4, 35)
    assert TINY.start == 30
