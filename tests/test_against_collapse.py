"""What `--prior` and the other additions against collapse compute, and that a run uses them."""

# ruff: noqa: F401, F811 - fixtures

import pytest
import torch
from recipe import rnd
from test_baselines import base, fast, run
from test_methods import CONDITIONING, PROMPTS, SCHEDULER, brightness, seeded, unet, vae

import train
import weights
from baselines import against_collapse
from training import cost, monitor, options


def test_the_prior_is_the_diffusion_loss_at_any_t(unet):
    x0 = rnd("x0", 2, 4, 4, 4)
    loss = against_collapse.prior_loss(unet, SCHEDULER, x0, CONDITIONING, seeded())
    generator = seeded()
    eps = torch.randn(2, 4, 4, 4, generator=generator)
    t = torch.randint(1000, (2,), generator=generator)
    abar = SCHEDULER.abar[t].float().view(-1, 1, 1, 1)
    predicted = unet(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t, **CONDITIONING)
    assert loss.item() == pytest.approx((predicted - eps).square().mean().item(), rel=1e-5)
    assert len(t.unique()) == 2 and loss.requires_grad


@pytest.mark.parametrize("method", ["refl", pytest.param("imagerefl", marks=pytest.mark.slow), "dpo"])
def test_the_prior_is_added_to_the_loss_with_its_weight(method, base, tmp_path, fast, monkeypatch):
    gradients = []

    def loss(unet, scheduler, x0, c, generator):
        assert x0.shape == (1, 4, 8, 8) and len(c["context"]) == 1
        value = against_collapse.prior_loss(unet, scheduler, x0, c, generator)
        value.register_hook(lambda gradient: gradients.append(gradient.item()))
        return value

    monkeypatch.setattr(train, "prior_loss", loss)
    run(base, tmp_path / "run", "--method", method, "--steps", "1", "--prior", "0.5")
    assert gradients == [0.5]


def test_the_kl_is_the_squared_distance_of_the_calls_with_gradients(unet):
    x, base_calls = rnd("x", 2, 4, 4, 4), []

    def base(x_t, t, context):
        base_calls.append((t.tolist(), torch.is_grad_enabled()))
        return torch.zeros_like(x_t)

    both = against_collapse.KLToBase(unet, base)
    with torch.no_grad():
        both(x, 976, **CONDITIONING)
    outputs = [both(x, t, **CONDITIONING) for t in (226, 101)]
    loss = both.loss()
    assert loss.item() == pytest.approx(torch.stack(outputs).square().mean().item(), rel=1e-5)
    assert base_calls == [([226, 226], False), ([101, 101], False)] and both.terms == []
    loss.backward()
    assert unet.conv_out.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("flags", [["refl"], ["draft", "--lora", "2"]], ids=" ".join)
def test_the_kl_of_a_run_is_zero_until_the_first_update(flags, base, tmp_path, fast, monkeypatch):
    values, loss = [], against_collapse.KLToBase.loss
    monkeypatch.setattr(against_collapse.KLToBase, "loss", lambda self: values.append(loss(self)) or values[-1])
    run(base, tmp_path / "run", "--steps", "2", "--lr", "0.01", "--kl", "1", "--method", *flags)
    assert values[0].item() < 1e-9 < 1e-6 < values[1].item()


@pytest.mark.parametrize(
    "flags, name, expected",
    [
        (["refl", "--kl", "1"], "refl", 44 + 1),
        (["refl", "--prior", "1"], "refl", 44 + 3 + 2),
        (["imagerefl", "--kl", "1", "--prior", "1"], "3:1 mix", (3 * 18.1 + 44) / 4 + (3 * 2 + 1) / 4 + 3),
        (["draft", "--kl", "1"], "draft", 52.5 + 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_they_add_to_the_cost_of_an_image(flags, name, expected):
    names = ("UNet forward", "UNet with gradients", "decode with gradients", "encode", "reward with gradients")
    args = options.parse_args(["--method", *flags])
    options.resolve(args, options.presets.TINY)
    costs = cost.costs_of(args, dict(zip(names, (1, 3, 6, 2, 0.5), strict=True)))
    assert costs[name] == pytest.approx(expected) and costs["diffusion"] in (5, 6)


def test_the_average_of_the_weights_is_saved_and_sampled(base, tmp_path, fast, monkeypatch):
    seen, table = [], []
    update_ema = against_collapse.update_ema

    def recorded(average, parameters, decay, update):
        update_ema(average, parameters, decay, update)
        seen.append([p.detach().clone() for p in parameters])

    monkeypatch.setattr(train, "update_ema", recorded)
    monkeypatch.setattr(monitor, "evaluate", lambda run, steps: table.append(run.models))
    run(base, tmp_path / "run", "--steps", "2", "--method", "refl", "--ema", "0.5")
    initial = weights.load_unet(base).parameters()
    saved = list(weights.load_unet(tmp_path / "run").parameters())
    for p0, p1, p2, average in zip(initial, *seen, saved, strict=True):  # decays 1 / 10 and 2 / 11
        assert torch.allclose(average, 2 / 11 * (0.1 * p0 + 0.9 * p1) + 9 / 11 * p2, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(table[0].tuned.parameters(), saved, strict=True))


@pytest.mark.slow
def test_a_resumed_run_with_an_average_ends_with_the_same_weights(base, tmp_path, fast):
    flags = ["--method", "refl", "--ema", "0.9"]
    run(base, tmp_path / "uninterrupted", *flags, "--steps", "3")
    run(base, tmp_path / "resumed", *flags, "--steps", "2")
    train.main(train.parse_args(["--resume", str(tmp_path / "resumed"), "--steps", "3"]))
    pairs = [weights.load_unet(tmp_path / name).parameters() for name in ("uninterrupted", "resumed")]
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
