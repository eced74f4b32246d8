import json
from unittest.mock import patch

import pytest
import torch
from recipe import GOLDEN, filled, golden, golden_config, rnd

from pretrained.configs import vae_config, vae_dict
from vae import SD15, SDXL, TINY, VAE


@pytest.fixture
def mini() -> VAE:
    return filled(VAE(vae_config(golden_config("vae_mini"))))


# Golden images have values up to 5 and a rounding error of 9e-6; in float32 the CPU's own rounding is added.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 2e-5)])
def test_posterior_and_decoded_image_equal_diffusers(mini, dtype, tolerance):
    g = {name: t.to(dtype) for name, t in golden("vae_mini")[0].items()}
    mini.to(dtype)
    with torch.no_grad():
        mean, logvar = mini.encode(g["image"])
        decoded = mini.decode(g["latent"] * mini.config.scale)
    assert (mean - g["mean"]).abs().max() <= 1e-5
    assert (logvar - g["logvar"]).abs().max() <= 1e-5
    assert (decoded - g["decoded"]).abs().max() <= tolerance


def test_full_size_keys_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = VAE(SD15).state_dict()
    published = json.loads((GOLDEN / "keys_diffusers_layout.json").read_text())["vae"]
    assert {key: list(t.shape) for key, t in state.items()} == published


@pytest.mark.parametrize("config", [SD15, SDXL, TINY])
def test_config_survives_its_json(config):
    assert vae_config(json.loads(json.dumps(vae_dict(config)))) == config


def test_a_shifted_latent_space_is_refused():
    with pytest.raises(ValueError, match="shift_factor"):
        vae_config(vae_dict(SD15) | {"shift_factor": 0.1})


def test_sampled_latents_follow_the_scaled_posterior(mini):
    x = rnd("image", 1, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        mean, logvar = mini.encode(x)
        many = [t.expand(2000, -1, -1, -1) for t in (mean, logvar)]
        latents, scale = mini.draw(*many, torch.Generator().manual_seed(0)), mini.config.scale
        one = [
            mini.sample(x, torch.Generator().manual_seed(3)),
            mini.draw(mean, logvar, torch.Generator().manual_seed(3)),
        ]
    assert torch.equal(*one)
    assert torch.allclose(latents.mean(0), mean[0] * scale, atol=0.1 * scale)
    assert torch.allclose(latents.std(0), (0.5 * logvar[0]).exp() * scale, rtol=0.1)


def test_sides_not_divisible_by_the_factor_are_reported(mini):
    with pytest.raises(ValueError, match="multiples of 8, got 64x60"):
        mini.encode(torch.zeros(1, 3, 64, 60))


def test_bf16_weights_run_without_autocast(mini):
    mini.bfloat16()
    x, z = rnd("image", 1, 3, 16, 16), rnd("z", 1, 4, 2, 2)
    with torch.no_grad():
        without = (*mini.encode(x), mini.decode(z))
        with torch.autocast("cpu", torch.bfloat16), patch.object(torch.nn.GroupNorm, "forward", refusing_autocast):
            within = (*mini.encode(x), mini.decode(z))
    assert all(torch.equal(a, b) for a, b in zip(without, within, strict=True))


def refusing_autocast(norm: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    assert not torch.is_autocast_enabled("cpu")
    return torch.nn.functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def test_checkpointing_changes_no_gradient(mini):
    z, gradients = rnd("z", 1, 4, 8, 8).requires_grad_(), []
    for mini.decoder.checkpointing in (False, True):
        (gradient,) = torch.autograd.grad(mini.decode(z).square().mean(), z)
        gradients.append(gradient)
    assert torch.allclose(*gradients, atol=1e-7)
