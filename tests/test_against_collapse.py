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
from training import monitor


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


def test_a_capped_reward_has_the_gradient_of_relu():
    images = torch.tensor([-0.5, 0.1, 0.7]).view(3, 1, 1, 1).expand(3, 3, 4, 4).clone().requires_grad_()
    score = against_collapse.capped(brightness, 0.2)(images, ["a"] * 3)
    (ours,) = torch.autograd.grad(-score.mean(), images)
    (expected,) = torch.autograd.grad(torch.relu(0.2 - brightness(images, ["a"] * 3)).mean(), images)
    assert torch.equal(ours, expected) and ours.flatten(1).abs().sum(1).gt(0).tolist() == [True, True, False]


@pytest.mark.parametrize("method, cap, trains", [("refl", -5.0, False), ("draft", 5.0, True)])
def test_a_run_below_its_cap_trains_and_above_does_not(method, cap, trains, base, tmp_path, fast):
    (row,) = run(base, tmp_path / "run", "--steps", "1", "--method", method, "--reward-cap", str(cap))
    assert (row["grad_norm"] > 0) == trains and (row["reward"] == cap) != trains


def test_a_flat_reward_is_that_of_the_worst_image_nearby():
    """For R = w x the worst image at distance rho has the reward R - rho |w|; its gradient stays that of R there."""
    w = rnd("w", 3, 4, 4)
    images = rnd("images", 2, 3, 4, 4).requires_grad_()

    def linear(images, prompts):
        return (images * w).sum((1, 2, 3))

    def quadratic(images, prompts):
        return images.square().sum((1, 2, 3))

    scores = against_collapse.flat(linear, 0.3)(images, ["a", "b"])
    assert torch.allclose(scores, linear(images, None) - 0.3 * w.norm(), rtol=1e-5)
    scores = against_collapse.flat(quadratic, 0.3)(images, ["a", "b"])
    norms = images.flatten(1).norm(dim=1)
    assert torch.allclose(scores, (norms - 0.3).square(), rtol=1e-5)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert torch.allclose(gradient, 2 * images * (1 - 0.3 / norms).view(2, 1, 1, 1), rtol=1e-4)
    with torch.no_grad():
        assert torch.allclose(against_collapse.flat(quadratic, 0.3)(images, ["a", "b"]), scores)


def test_a_run_maximises_the_flat_reward(base, tmp_path, fast):
    rows = [run(base, tmp_path / rho, "--steps", "1", "--method", "refl", "--flat", rho)[0] for rho in ("0", "3")]
    assert rows[1]["reward"] < rows[0]["reward"] - 1e-3 and rows[1]["grad_norm"] > 0


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
