"""Fused upsampling and convolution: the same numbers, with fewer multiplications."""

import copy

import pytest
import torch
from recipe import filled, rnd

from speed.fused_upsample import fuse, fused_kernel
from training import cost
from unet import UNet, UNetConfig, Upsample
from vae import VAE, VAEConfig


def fused(layer: Upsample):
    """The layer that replaces an `Upsample`."""
    return fuse(torch.nn.Sequential(layer))[0]


def test_the_fused_kernel_combines_upsampling_and_convolution():
    """Computed by hand along one axis: taps a, b, c meet pairs of equal pixels."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1] = torch.tensor([1.0, 10.0, 100.0])  # only the middle row
    assert fused_kernel(weight)[0, 0].tolist() == [[0] * 4, [100, 110, 11, 1], [100, 110, 11, 1], [0] * 4]


@pytest.mark.parametrize("sides", [(1, 1), (5, 8)])
def test_fusing_changes_no_output(sides):
    layer, x = filled(Upsample(6)).double(), rnd("x", 2, 6, *sides).double()
    expected, layer = layer(x), fused(layer)
    assert expected.shape == (2, 6, 2 * sides[0], 2 * sides[1])
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)


def test_a_fused_decoder_has_the_same_input_gradient():
    vae = filled(VAE(VAEConfig(channels=(32, 32, 32), layers=1))).requires_grad_(False)
    z, gradients = rnd("z", 2, 4, 4, 4).requires_grad_(), []
    for network in (vae, fuse(copy.deepcopy(vae))):
        gradients += torch.autograd.grad(network.decode(z).square().mean(), z)
    assert torch.allclose(*gradients, rtol=0, atol=1e-5 * gradients[0].abs().max())


def test_fusing_again_updates_the_kernel_in_place():
    layer = fused(filled(Upsample(4)))
    address, before = layer.kernel.data_ptr(), layer.kernel.clone()
    with torch.no_grad():
        layer.conv.weight.mul_(2)
    assert torch.equal(layer.kernel, before)
    fuse(layer)
    assert torch.equal(layer.kernel, 2 * before) and layer.kernel.data_ptr() == address


def test_fusing_again_follows_a_change_of_dtype():
    layer = fused(filled(Upsample(4)))
    assert fuse(layer.bfloat16().to(torch.float16)).kernel.dtype == torch.float16
    layer.kernel = layer.kernel.float()
    assert fuse(layer)(torch.ones(1, 4, 2, 2, dtype=torch.float16)).dtype == torch.float16


def test_bf16_rounds_each_sum_once():
    weight = rnd("w", 8, 8, 3, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_kernel(weight), fused_kernel(weight.float()).bfloat16())


def test_fusing_changes_no_state_dict():
    unet = filled(UNet(UNetConfig(channels=(32, 32), depths=(1, 0), layers=1, heads=(2, 2), context=16)))
    before = unet.state_dict()
    after = fuse(unet).state_dict()
    assert before.keys() == after.keys() and all(map(torch.equal, before.values(), after.values()))


def test_fusing_leaves_four_of_nine_multiplications():
    x, layer = rnd("x", 1, 8, 16, 16), Upsample(8)
    unfused = cost.count(layer, x)
    assert cost.count(fused(layer), x) / unfused == 4 / 9
