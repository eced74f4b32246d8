"""ReFL, ImageReFL and the diffusion loss on a mini UNet and VAE: which calls carry gradients, and the loss values."""

import pytest
import torch
from recipe import filled, rnd

import imagerefl
import refl
from combined import conditional
from imagerefl import imagerefl_losses
from refl import refl_loss, reward_loss, sample_t_f, score_latents
from scheduler import Scheduler, denoise, diffusion_loss, sample_noise
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

SCHEDULER = Scheduler(40)
PROMPTS = ["a", "b"]
CONDITIONING = {"context": rnd("context", 2, 5, 16)}


def brightness(images, prompts):
    assert len(images) == len(prompts)
    return images.mean((1, 2, 3))


@pytest.fixture
def unet():
    config = UNetConfig(channels=(32, 32), depths=(1, 0), layers=1, heads=(2, 2), context=16)
    unet = filled(UNet(config))
    unet.calls = []  # (timestep, gradients enabled) of each call
    forward = unet.forward

    def spy(x, t, *args, **kwargs):
        unet.calls.append((int(torch.as_tensor(t).flatten()[0]), torch.is_grad_enabled()))
        return forward(x, t, *args, **kwargs)

    unet.forward = spy
    return unet


@pytest.fixture
def vae():
    return filled(VAE(VAEConfig(channels=(32, 32), layers=1))).requires_grad_(False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run_refl(unet, vae, seed=0):
    generator = seeded(seed)
    x_T = sample_noise((2, 4, 4, 4), generator)
    return refl_loss(unet, vae, brightness, SCHEDULER, x_T, CONDITIONING, PROMPTS, generator)


def run_imagerefl(unet, vae, seed=0):
    """(reward loss, diffusion loss)"""
    x0 = rnd("x0", 2, 4, 4, 4)
    return imagerefl_losses(unet, vae, brightness, SCHEDULER, x0, 30, CONDITIONING, PROMPTS, seeded(seed))


@pytest.mark.parametrize("seed", range(3))
def test_only_the_last_call_of_refl_carries_gradients(unet, vae, seed):
    run_refl(unet, vae, seed).backward()
    timesteps, with_gradients = zip(*unet.calls, strict=True)
    assert list(timesteps) == SCHEDULER.timesteps[: len(timesteps)]
    assert with_gradients == (False,) * (len(timesteps) - 1) + (True,)
    assert 30 <= len(timesteps) - 1 <= 39


@pytest.mark.parametrize("seed", range(3))
def test_exactly_two_calls_of_imagerefl_carry_gradients(unet, vae, seed):
    sum(run_imagerefl(unet, vae, seed)).backward()
    (t_start, diffusion_call), *no_grad_calls, (t_f, reward_call) = unet.calls
    visited = list(dict.fromkeys([t_start, *(t for t, _ in no_grad_calls), t_f]))
    assert visited == SCHEDULER.timesteps[30 : 30 + len(visited)] and len(no_grad_calls) == max(len(visited) - 2, 0)
    assert not any(gradients for _, gradients in no_grad_calls)
    assert reward_call and diffusion_call
    assert t_start == 226


@pytest.mark.parametrize("t_f", [30, 31, 34])
def test_imagerefl_equals_its_equations_with_a_forward_pass_per_prediction(unet, vae, monkeypatch, t_f):
    """`imagerefl_losses` reuses the diffusion loss's prediction for the first no-grad step."""
    monkeypatch.setattr(imagerefl, "sample_t_f", lambda *_: t_f)
    l_reward, l_diffusion = run_imagerefl(unet, vae)
    (1e-3 * l_reward + 1e-5 * l_diffusion).backward()
    ours = [p.grad for p in unet.parameters()]
    unet.zero_grad()

    generator = seeded()
    eps = torch.randn(2, 4, 4, 4, generator=generator)
    x_start = SCHEDULER.add_noise(rnd("x0", 2, 4, 4, 4), eps, 226)
    with torch.no_grad():
        x_t = denoise(SCHEDULER, conditional(unet, CONDITIONING), x_start, range(30, t_f), generator)
    loss = 1e-3 * reward_loss(unet, vae, brightness, SCHEDULER, x_t, t_f, CONDITIONING, PROMPTS, generator)
    (loss + 1e-5 * (unet(x_start, 226, **CONDITIONING) - eps).square().mean()).backward()
    assert all(torch.allclose(a, p.grad, rtol=1e-4, atol=1e-9) for a, p in zip(ours, unet.parameters(), strict=True))


def test_frozen_networks_get_no_gradient_and_every_trained_weight_gets_one(unet, vae):
    sum(run_imagerefl(unet, vae)).backward()
    assert all(p.grad is None for p in vae.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_t_f_is_uniform_over_the_last_ten_steps():
    generator = seeded()
    sampled = [sample_t_f(30, SCHEDULER, generator) for _ in range(5000)]
    counts = torch.bincount(torch.tensor(sampled), minlength=40)
    assert counts[:30].sum() == 0
    assert counts[30:].min() > 400


def test_refl_gradient_equals_finite_differences(unet, vae):
    unet, vae = unet.double(), vae.double()
    conditioning = {"context": CONDITIONING["context"].double()}
    x_t, weight = rnd("x_t", 2, 4, 4, 4).double(), unet.conv_out.bias

    def value():
        return reward_loss(unet, vae, brightness, SCHEDULER, x_t, 35, conditioning, PROMPTS, seeded())

    value().backward()
    with torch.no_grad():
        for i in range(4):
            weight[i] += 1e-5
            up = value()
            weight[i] -= 2e-5
            down = value()
            weight[i] += 1e-5
            assert weight.grad[i].item() == pytest.approx(((up - down) / 2e-5).item(), rel=1e-5)


def test_imagerefl_starts_from_the_image_noised_to_t_prime(unet, vae):
    seen, forward = [], unet.forward
    unet.forward = lambda x, t, **c: (seen.append(x), forward(x, t, **c))[1]
    run_imagerefl(unet, vae)
    eps = torch.randn(2, 4, 4, 4, generator=seeded())
    assert torch.equal(seen[0], SCHEDULER.add_noise(rnd("x0", 2, 4, 4, 4), eps, 226))


def test_t_f_equal_to_t_prime_takes_no_no_grad_step(unet, vae, monkeypatch):
    monkeypatch.setattr(imagerefl, "sample_t_f", lambda *_: 30)
    run_imagerefl(unet, vae)
    assert unet.calls == [(226, True), (226, True)]


@pytest.mark.parametrize("t_f", [30, 33])
def test_the_losses_are_unscaled(unet, vae, monkeypatch, t_f):
    """Eq. (4) is the negative mean reward of the predicted image, Eq. (5) the mean squared error at t'."""
    monkeypatch.setattr(imagerefl, "sample_t_f", lambda *_: t_f)
    rewards = []

    def reward(images, prompts):
        rewards.append(brightness(images, prompts))
        return rewards[-1]

    x0, generator = rnd("x0", 2, 4, 4, 4), seeded()
    losses = imagerefl_losses(unet, vae, reward, SCHEDULER, x0, 30, CONDITIONING, PROMPTS, generator)
    eps = torch.randn(2, 4, 4, 4, generator=seeded())
    predicted = unet(SCHEDULER.add_noise(x0, eps, 226), 226, **CONDITIONING)
    assert losses[0].item() == pytest.approx(-rewards[0].mean().item())
    assert losses[1].item() == pytest.approx((predicted - eps).square().mean().item(), rel=1e-5)


def test_diffusion_loss_is_the_per_image_mse_of_the_noise():
    eps = rnd("eps", 3, 4, 8, 8)
    loss = diffusion_loss(torch.zeros_like(eps), eps)
    assert torch.allclose(loss, eps.square().mean((1, 2, 3)))


def test_the_reward_sees_the_decoded_predicted_image(unet, vae):
    x_t, seen = rnd("x_t", 2, 4, 4, 4), {}

    def reward(images, prompts):
        seen["images"], seen["prompts"] = images, prompts
        return brightness(images, prompts)

    with torch.no_grad():
        reward_loss(unet, vae, reward, SCHEDULER, x_t, 35, CONDITIONING, PROMPTS, seeded())
        eps = unet(x_t, 101, **CONDITIONING)
    abar = SCHEDULER.abar[101].item()
    x0 = (x_t - (1 - abar) ** 0.5 * eps) / abar**0.5
    assert torch.allclose(seen["images"], vae.decode(x0), atol=1e-5) and seen["prompts"] == PROMPTS


def test_refl_depends_only_on_its_generator(unet, vae):
    torch.manual_seed(1)
    first = run_refl(unet, vae, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, run_refl(unet, vae, seed=5))
    assert refl.T_MAX == 10


def test_latents_stay_float32_under_autocast(unet, vae, monkeypatch):
    seen = []
    monkeypatch.setattr(imagerefl, "reward_loss", lambda *args: (seen.append(args[4]), reward_loss(*args))[1])
    monkeypatch.setattr(imagerefl, "sample_t_f", lambda *_: 33)
    with torch.autocast("cpu", torch.bfloat16):
        x0 = vae.sample(rnd("image", 2, 3, 8, 8), seeded())
        imagerefl_losses(unet, vae, brightness, SCHEDULER, x0, 30, CONDITIONING, PROMPTS, seeded())
    assert x0.dtype == seen[0].dtype == torch.float32


def test_random_shift_stays_within_bounds_and_repeats_the_edges():
    images = rnd("images", 64, 3, 16, 16)
    shifted = refl.random_shift(images, 4, seeded())
    offsets = set()
    for image, other in zip(images, shifted, strict=True):
        fits = [
            (y, x) for y in range(5) for x in range(5) if torch.equal(other[:, y:, x:], image[:, : 16 - y, : 16 - x])
        ]
        assert len(fits) == 1
        offsets.add(fits[0])
        y, x = fits[0]
        assert torch.equal(other[:, :y, x:], image[:, :1, : 16 - x].expand(-1, y, -1))
    assert len(offsets) > 15


def test_latents_are_scored_by_decoding_them(vae):
    x0 = rnd("x0", 2, 4, 4, 4)
    with torch.no_grad():
        expected = brightness(vae.decode(x0), PROMPTS)
        assert torch.equal(score_latents(vae, brightness, x0, PROMPTS), expected)
        shifted = score_latents(vae, brightness, x0, PROMPTS, seeded(), max_shift=4)
    assert not torch.equal(shifted, expected) and torch.allclose(shifted, expected, atol=0.5)
