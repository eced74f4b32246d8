import json

import pytest
import torch
import torch.nn.functional as F
from recipe import GOLDEN, filled, golden, golden_config, rnd

from pretrained.configs import unet_config, unet_dict
from speed import cpu_attention
from speed.cpu_attention import attention
from unet import SD15, SDXL, TINY, UNet

MINIS = ["unet_sd15_mini", "unet_sdxl_mini"]


def mini(name: str) -> tuple[UNet, dict, dict]:
    """A mini UNet, its golden tensors and its golden inputs."""
    g, _ = golden(name)
    inputs = {"timesteps": g["timestep"], "context": g["context"]}
    if "text_embeds" in g:
        inputs |= {"pooled": g["text_embeds"], "time_ids": g["time_ids"]}
    return filled(UNet(unet_config(golden_config(name)))), g, inputs


@pytest.mark.parametrize("name", MINIS)
def test_output_and_input_gradient_equal_diffusers(name):
    unet, g, inputs = mini(name)
    x = g["sample"].requires_grad_()
    output = unet(x, **inputs)
    output.square().mean().backward()
    assert (output - g["output"]).abs().max() <= 1e-5
    assert (x.grad - g["grad_sample_of_mean_square"]).abs().max() <= 1e-5


@pytest.mark.parametrize(("config", "layout"), [(SD15, "sd15_unet"), (SDXL, "sdxl_unet")])
def test_full_size_keys_and_shapes_are_the_published_ones(config, layout):
    with torch.device("meta"):
        state = UNet(config).state_dict()
    published = json.loads((GOLDEN / "keys_diffusers_layout.json").read_text())[layout]
    assert {key: list(t.shape) for key, t in state.items()} == published


@pytest.mark.parametrize("config", [SD15, SDXL, TINY])
def test_config_survives_its_json(config):
    assert unet_config(json.loads(json.dumps(unet_dict(config)))) == config


def test_published_config_is_the_constant():
    published = {
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
    }
    published |= {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "sample_size": 64}
    assert unet_config(published) == SD15


def test_config_of_an_unsupported_network_is_refused():
    with pytest.raises(ValueError, match="resnet_time_scale_shift"):
        unet_config(unet_dict(SD15) | {"resnet_time_scale_shift": "scale_shift"})


def test_scalar_timestep_applies_to_the_whole_batch():
    unet, g, inputs = mini("unet_sd15_mini")
    inputs["timesteps"] = 7
    with torch.no_grad():
        scalar = unet(g["sample"], **inputs)
        inputs["timesteps"] = torch.tensor([7, 7])
        assert torch.equal(scalar, unet(g["sample"], **inputs))


@pytest.mark.parametrize(("batch", "H", "W"), [(1, 8, 24), (3, 16, 8)])
def test_odd_batches_and_non_square_latents_work(batch, H, W):
    unet, _, _ = mini("unet_sd15_mini")
    x, context = rnd("x", batch, 4, H, W), rnd("context", batch, 5, 48)
    with torch.no_grad():
        batch_output = unet(x, 500, context)
        single = unet(x[:1], 500, context[:1])
    assert batch_output.shape == x.shape
    assert (batch_output[:1] - single).abs().max() <= 1e-5


def test_sides_not_divisible_by_the_downsampling_factor_are_reported():
    unet, _, _ = mini("unet_sd15_mini")
    with pytest.raises(ValueError, match="multiples of 8, got 12x16"):
        unet(rnd("x", 1, 4, 12, 16), 1, rnd("context", 1, 5, 48))


def test_sdxl_without_time_ids_is_an_error():
    unet, g, _ = mini("unet_sdxl_mini")
    with pytest.raises(ValueError, match="time_ids"):
        unet(g["sample"], 1, g["context"])


def test_checkpointing_changes_no_gradient():
    unet, g, inputs = mini("unet_sdxl_mini")
    gradients = []
    for unet.checkpointing in (False, True):
        unet.zero_grad()
        unet(g["sample"], **inputs).square().mean().backward()
        gradients.append(unet.conv_in.weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-7)


def test_attention_head_by_head_equals_fused_attention(monkeypatch):
    """For many tokens in bf16 without gradients; two images, a last chunk that is not full, other keys than queries."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu_attention, "CHUNK", 500)
    exact = [
        rnd(name, 2, n, 3 * 8).view(2, n, 3, 8).transpose(1, 2) for name, n in (("q", 1100), ("k", 1024), ("v", 1024))
    ]
    ours = [t.bfloat16() for t in exact]
    fused = F.scaled_dot_product_attention(*ours)
    output, expected = cpu_attention.long_attention(*ours), F.scaled_dot_product_attention(*exact)
    assert not torch.equal(output, fused) and output.shape == fused.shape
    assert (output - expected).norm() <= 3 * (fused - expected).norm()
    for inputs in (exact, [t.requires_grad_() for t in ours], [t[:, :, :1000].detach() for t in ours]):
        assert torch.equal(cpu_attention.long_attention(*inputs), F.scaled_dot_product_attention(*inputs))


def test_attention_for_few_tokens_in_bf16_equals_fused_attention():
    inputs = [rnd(name, 2, 4, n, 24) for name, n in (("q", 16), ("k", 24), ("v", 24))]
    ours, exact = ([t.to(kind).requires_grad_() for t in inputs] for kind in (torch.bfloat16, torch.float64))
    output, expected = attention(*ours), F.scaled_dot_product_attention(*exact)
    assert output.grad_fn.name() != expected.grad_fn.name()  # not the fused kernel
    for o in (output, expected):
        (o.double() * rnd("weight", *o.shape)).sum().backward()
    for mine, theirs in zip((output, *(t.grad for t in ours)), (expected, *(t.grad for t in exact)), strict=True):
        assert (mine - theirs).norm() < 0.01 * theirs.norm()
