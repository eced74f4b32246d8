"""Optimisations for speed and memory do not change results; the cost model's predictions are right."""

import copy
import itertools
import platform
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from recipe import filled, golden, golden_config, rnd
from test_rewards import folders  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rewards
import sample
import speed
import train
import weights
from pretrained import loading, lora
from pretrained.configs import unet_config
from refl import refl_loss
from scheduler import Scheduler, sample_noise
from speed import inference_copy, prepacked
from speed.inference_copy import UNPACKED_CALLS, InferenceCopy
from training import cost, fake_tensors, monitor
from unet import TransformerBlock, UNet, UNetConfig
from vae import VAE, VAEConfig

SCHEDULER = Scheduler(40)
CONFIG = UNetConfig(channels=(32, 32), depths=(1, 0), layers=1, heads=(2, 2), context=16)
SMALL_VAE = VAEConfig(channels=(32, 32), layers=1)
TEXT = {"context": rnd("context", 2, 5, 16)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture
def unet():
    return filled(UNet(CONFIG))


@pytest.fixture
def vae():
    return filled(VAE(SMALL_VAE)).requires_grad_(False)


def loss_of(net, vae, seed: int = 0, text: dict = TEXT, device: str = "cpu") -> torch.Tensor:
    generator = seeded(seed)
    x_T = sample_noise((2, 4, 4, 4), generator, device)
    return refl_loss(net, vae, brightness, SCHEDULER, x_T, text, ["a", "b"], generator)


def gradient_of(net, unet, vae) -> tuple[torch.Tensor, torch.Tensor]:
    unet.zero_grad()
    loss = loss_of(net, vae)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in unet.parameters()])


def test_no_grad_steps_on_a_float32_copy_change_nothing(unet, vae):
    inference_copy = InferenceCopy(unet, unet, torch.float32)
    for ours, expected in zip(gradient_of(inference_copy, unet, vae), gradient_of(unet, unet, vae), strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-5 * expected.abs().max())


def operations_of(call) -> tuple[int, int]:
    """How many operations other than views a call runs, and how many numbers it converts to another dtype."""
    names, converted = [], 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            nonlocal converted
            output = f(*args, **(kwargs or {}))
            names.extend([str(f)] if not f.is_view and "_unsafe_view" not in str(f) else [])
            converted += output.numel() if f is torch.ops.aten._to_copy.default else 0
            return output

    with Counter(), torch.autocast("cpu", torch.bfloat16):
        call()
    return len(names), converted


def test_adapters_on_bf16_weights_take_two_operations_a_layer_and_convert_no_full_weight(unet):
    """The frozen weights are never converted; the adapters once per update, and in calls with gradients."""
    unet, plain = unet.bfloat16().requires_grad_(False), copy.deepcopy(unet)
    trained = lora.add(unet, 2, generator=seeded())
    inference_copy, frozen = (InferenceCopy(net, net, torch.bfloat16, copied=False) for net in (unet, plain))
    x, layers = rnd("x", 2, 4, 4, 4), len(lora.adapters(unet))
    context = {"context": TEXT["context"].bfloat16()}
    with torch.no_grad():
        count, converted = operations_of(lambda: inference_copy(x, 5, **context))
        expected, inputs = operations_of(lambda: frozen(x, 5, **context))
    assert count - expected == 2 * layers and converted == inputs
    assert operations_of(lambda: inference_copy(x, 5, **context))[1] - inputs == sum(p.numel() for p in trained)


@pytest.mark.parametrize("adapters", [False, True])
def test_equal_weights_predict_the_same_as_reference_and_in_training(unet, adapters):
    """So a KL starts at 0 and DPO at log 2 in bf16, too: both models use the same kernels and precision."""
    if adapters:
        unet = unet.bfloat16().requires_grad_(False)
        lora.add(unet, 2, generator=seeded())
        base, _ = lora.base_and_tuned(unet)
    else:
        base = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad])
    dtype = torch.bfloat16 if adapters else torch.float32
    net = speed.for_training(unet, unet, optimizer, dtype, compiled=False, adapters=adapters)
    reference, x = speed.reference(base, unet), rnd("x", 2, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = net(x, 301, **TEXT)
        with torch.no_grad():
            theirs = reference(x, 301, **TEXT)
    assert ours.requires_grad and torch.equal(ours, theirs)


def test_rounded_adapters_follow_the_optimizer(unet):
    unet = unet.bfloat16()
    trained = lora.add(unet, 2, generator=seeded())
    optimizer = torch.optim.AdamW(trained, 0.1)
    net = speed.for_training(unet, unet, optimizer, torch.bfloat16, False, True)
    x, context = rnd("x", 2, 4, 4, 4), {"context": TEXT["context"].bfloat16()}
    with torch.no_grad():
        before = net(x, 5, **context)
    net(x, 5, **context).float().square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after, expected = net(x, 5, **context), unet(x, 5, **context)
        for layer in lora.adapters(unet).values():
            layer.rounded = None
        exact = unet(x, 5, **context)
    assert torch.equal(after, expected) and torch.equal(after, exact) and not torch.equal(after, before)


def test_the_copy_runs_only_the_no_grad_steps(unet, vae):
    inference_copy = InferenceCopy(unet, unet, torch.float32)
    inference_copy.copy.load_state_dict({key: 0 * t for key, t in unet.state_dict().items()})
    assert not torch.equal(gradient_of(inference_copy, unet, vae)[1], gradient_of(unet, unet, vae)[1])
    assert all(p.grad is None for p in inference_copy.copy.parameters())
    inference_copy.refresh()
    for ours, expected in zip(gradient_of(inference_copy, unet, vae), gradient_of(unet, unet, vae), strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_a_bf16_copy_is_as_accurate_as_autocast(unet):
    x, inference_copy = rnd("x", 2, 4, 8, 8), InferenceCopy(unet, unet)
    with torch.no_grad():
        exact = unet(x, 301, **TEXT)
        with torch.autocast("cpu", torch.bfloat16):
            autocast_error = (unet(x, 301, **TEXT) - exact).norm() / exact.norm()
            error = (inference_copy(x, 301, **TEXT) - exact).norm() / exact.norm()
    assert 0 < error < 1.5 * autocast_error + 1e-3


@pytest.mark.parametrize("frozen_dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_each_network_is_compiled_once(unet, vae, monkeypatch, frozen_dtype):
    """Checking the gradients compiles the graphs of training; only the copy's follows, in its first step."""
    graphs, compiler = [], torch.compile

    def count(graph, inputs):
        graphs.append("with gradients" if torch.is_grad_enabled() else "without")
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiler(f, dynamic=dynamic, backend=count))
    torch.compiler.reset()
    x, parameters = rnd("x", 2, 4, 4, 4).requires_grad_(), list(unet.parameters())
    net, vae.decode = speed.compile_for_training(unet, vae, parameters, x, TEXT, nullcontext, False)
    assert graphs == ["with gradients"] * 2  # the autoencoder's decoder and the UNet
    optimizer = torch.optim.SGD(parameters, 0.1)
    fast = speed.for_training(net, unet, optimizer, frozen_dtype, True, False)
    for seed in range(2):
        loss_of(fast, vae, seed).backward()
        optimizer.step()
    assert graphs == ["with gradients"] * 2 + ["without"]


@pytest.mark.slow
def test_with_adapters_a_frozen_bf16_unet_needs_no_copy(unet, vae):
    """Adapter gradients on a bf16 UNet are as accurate as on a float32 UNet with a bf16 copy."""

    def gradient(frozen_dtype: torch.dtype, autocast: bool, seed: int) -> torch.Tensor:
        m = copy.deepcopy(unet).to(frozen_dtype)
        trained = lora.add(m, 4)
        for i, p in enumerate(trained):
            p.data.copy_(0.3 * rnd(f"adapter {i}", *p.shape))
        net = InferenceCopy(m, m, torch.bfloat16, copied=False) if autocast else m
        if autocast and frozen_dtype == torch.float32:
            net.fast = copy.deepcopy(m).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss_of(net, vae, seed).backward()
        return torch.cat([p.grad.flatten() for p in trained])

    errors = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for seed in range(2):
        exact = gradient(torch.float32, False, seed)
        for dtype in errors:
            errors[dtype] += ((gradient(dtype, True, seed) - exact).norm() / exact.norm()).item()
    assert 0 < errors[torch.bfloat16] < 1.3 * errors[torch.float32] < 0.4


@pytest.mark.parametrize("dtype", [None, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_copy_follows_the_weights_during_training(dtype, tmp_path, monkeypatch):
    """With prepacked layers, and in bf16 as on a GPU: the copy is refreshed after each update."""
    seen = []

    class Spy(InferenceCopy):
        def __call__(self, *args, **kwargs):
            predicted = super().__call__(*args, **kwargs)
            if not torch.is_grad_enabled() and dtype:
                pairs = zip(self.copy.parameters(), self.unet.parameters(), strict=True)
                seen.append(all(torch.equal(a, b.bfloat16()) for a, b in pairs))
            elif not torch.is_grad_enabled():
                seen.append(torch.allclose(predicted, self.unet(*args, **kwargs), rtol=0, atol=1e-4))
            return predicted

    monkeypatch.setattr(inference_copy, "UNPACKED_CALLS", 0)
    monkeypatch.setattr(speed, "InferenceCopy", lambda net, unet, _: Spy(net, unet, dtype))
    monkeypatch.setattr(monitor, "evaluate", lambda *_: None)
    monkeypatch.setattr(monitor, "summarise", lambda *_: {"base": {"reward": [0.0, 0.0]}})
    flags = ["--method", "imagerefl", "--steps", "3", "--batch-size", "1", "--sample-every", "0", "--lr", "0.1"]
    train.main(train.parse_args([*flags, "--dtype", "float32", "--output-dir", str(tmp_path / "run")]))
    assert len(seen) > 3 and all(seen)


def prepacked_layers(network) -> list[prepacked.PrepackedLayer]:
    return [module for module in network.modules() if isinstance(module, prepacked.PrepackedLayer)]


x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="layers are prepacked on x86 only")


@x86
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("unet_sd15_mini", "unet_sdxl_mini")), "vae"]
)
def test_prepacking_changes_no_output(name, vae):
    """In float32 up to rounding, also for other input sizes; in bf16 as accurate as autocast."""
    if name == "vae":
        network, x, inputs = vae.decoder, rnd("x", 2, 4, 8, 8), {}
    else:
        network, (g, _) = filled(UNet(unet_config(golden_config(name)))), golden(name)
        x, inputs = g["sample"], {"timesteps": g["timestep"], "context": g["context"]}
        inputs |= {"pooled": g["text_embeds"], "time_ids": g["time_ids"]} if "text_embeds" in g else {}
    batch = {key: t.repeat(3, *[1] * (t.ndim - 1)) if t.ndim else t for key, t in inputs.items()}
    with torch.no_grad():
        exact, ours = network(x, **inputs), prepacked.packed_copy(network)
        assert prepacked_layers(ours)
        assert torch.allclose(ours(x, **inputs), exact, rtol=0, atol=1e-5 * exact.abs().max())
        wide = x.repeat(3, 1, 1, 2)
        assert torch.allclose(ours(wide, **batch), network(wide, **batch), rtol=0, atol=1e-5 * exact.abs().max())
        prepacked.invalidate(ours)
        with torch.autocast("cpu", torch.bfloat16):
            autocast_error, error = ((net(x, **inputs) - exact).norm() / exact.norm() for net in (network, ours))
    assert 0 < error < 1.3 * autocast_error
    if prepacked.is_supported(torch.bfloat16):
        assert {layer.packed.dtype for layer in prepacked_layers(ours)} == {torch.bfloat16}


@x86
def test_prepacking_in_place_frees_the_original_weights(unet):
    original, x = dict(unet.named_parameters()), rnd("x", 2, 4, 8, 8)
    with torch.no_grad():
        packed = prepacked.packed_copy(unet)
        packed(x, 1, **TEXT)
        assert {id(p) for p in packed.parameters()} == {id(p) for p in original.values()}
        prepacked.prepack(unet)(x, 1, **TEXT)
    with pytest.raises(RuntimeError, match="passes no gradient on"):
        unet(x.requires_grad_(), 1, **TEXT)
    assert {key for key in original if "norm" not in key}.isdisjoint(dict(unet.named_parameters()))
    assert sum(p.numel() for p in unet.parameters()) < sum(p.numel() for p in original.values()) / 20
    assert len(prepacked_layers(unet)) == len([key for key in original if "norm" not in key and "weight" in key])


@x86
@torch.no_grad()
def test_keys_and_values_of_the_text_are_computed_once(unet, monkeypatch):
    """They are computed again for another tensor, for one that has changed in place, and for other weights."""
    packed, x, context, calls = prepacked.packed_copy(unet), rnd("x", 2, 4, 8, 8), TEXT["context"].clone(), []
    forward = prepacked.PrepackedLayer.forward
    counted = lambda self, x: calls.append(self) or forward(self, x)  # noqa: E731
    monkeypatch.setattr(prepacked.PrepackedLayer, "forward", counted)

    def projections(context: torch.Tensor) -> int:
        calls.clear()
        torch.testing.assert_close(packed(x, 301, context), unet(x, 301, context), rtol=1e-4, atol=1e-5)
        return sum(isinstance(layer, prepacked.TextProjection) for layer in calls)

    count = sum(isinstance(module, prepacked.TextProjection) for module in packed.modules())
    assert count == 2 * sum(isinstance(module, TransformerBlock) for module in unet.modules())
    assert [projections(context), projections(context), projections(context.clone())] == [count, 0, count]
    assert [projections(context), projections(context.mul_(2)), projections(context)] == [count, count, 0]
    for layer in unet.modules():
        if isinstance(layer, TransformerBlock):
            layer.attn2.to_k.weight.mul_(3)
    prepacked.invalidate(packed)
    assert projections(context) == count
    with torch.inference_mode():  # such tensors have no version
        assert projections(context.clone()) == count


@x86
def test_a_prepacked_copy_follows_the_weights_on_refresh(unet):
    x, inference_copy = rnd("x", 2, 4, 8, 8), InferenceCopy(unet, unet, None)

    def packed_output() -> torch.Tensor:
        assert inference_copy(x, 301, **TEXT).requires_grad  # ends the previous micro-batch
        with torch.no_grad():
            for _ in range(UNPACKED_CALLS):
                inference_copy(x, 301, **TEXT)
            return inference_copy(x, 301, **TEXT)

    with torch.no_grad():
        for _ in range(UNPACKED_CALLS):
            inference_copy(x, 301, **TEXT)
    assert all(layer.packed is None for layer in prepacked_layers(inference_copy.copy))
    before = packed_output()
    assert all(layer.packed is not None for layer in prepacked_layers(inference_copy.copy))
    with torch.no_grad():
        unet.conv_out.weight.mul_(2)
    assert torch.equal(packed_output(), before)
    inference_copy.refresh()
    after = packed_output()
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(after, unet(x, 301, **TEXT), rtol=0, atol=1e-5 * after.abs().max())


@x86
def test_adapters_can_be_switched_off_in_a_prepacked_network(unet):
    x = rnd("x", 2, 4, 8, 8)
    for i, p in enumerate(lora.add(unet, 4)):
        p.data.copy_(0.3 * rnd(f"adapter {i}", *p.shape))
    with torch.no_grad():
        expected = [model(x, 301, **TEXT) for model in lora.base_and_tuned(unet)]
        ours = [model(x, 301, **TEXT) for model in lora.base_and_tuned(prepacked.prepack(unet))]
    assert prepacked_layers(unet) and not torch.allclose(*expected, atol=1e-2)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5 * b.abs().max()) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("missing", ["x86", "bf16"])
def test_without_support_for_prepacking_layers_run_unchanged(unet, missing, monkeypatch):
    x = rnd("x", 2, 4, 8, 8)
    if missing == "x86":
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network = prepacked.packed_copy(unet)
        ours, expected = network(x, 301, **TEXT), unet(x, 301, **TEXT)
    assert all(layer.packed is None for layer in prepacked_layers(network))
    if missing == "bf16":
        assert prepacked_layers(network) and torch.equal(ours, expected)
    else:  # upsampling is still fused, which rounds differently
        assert not prepacked_layers(network) and 0 < (ours - expected).norm() < 0.03 * expected.norm()


def test_a_copy_with_only_fused_upsampling_follows_a_change_of_dtype(unet, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    fused, x = prepacked.packed_copy(unet), rnd("x", 2, 4, 8, 8)
    unet.double()
    prepacked.invalidate(fused)
    with torch.no_grad():
        ours, expected = (net(x.double(), 301, TEXT["context"].double()) for net in (fused, unet))
    assert torch.allclose(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_one_model_at_a_time_samples_the_same_images(tmp_path):
    """Only one UNet is in memory, and each is loaded once for all batches."""
    paths = [tmp_path / name for name in ("base", "tuned")]
    tiny = weights.load_unet("tiny")
    weights.save_unet(tiny, paths[0])
    with torch.no_grad():
        tiny.conv_out.bias.add_(0.1)
    weights.save_unet(tiny, paths[1])
    reads, load_unet = [], weights.load_unet

    def load(source, *args):
        reads.append((Path(source), args[0]))
        return load_unet(source, *args)

    flags = ["--prompt", "owl", "--images-per-prompt", "3", "--batch-size", "2", "--steps", "3", "--switch", "2"]
    flags += ["--base", "tiny", "--checkpoint", str(paths[1]), "--dtype", "float32", "--output-dir"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_unet", load)
        patch.setattr(loading, "own_base", lambda _: paths[0])
        sample.main(sample.parse_args([*flags, str(tmp_path / "one")]))
        assert reads == [(paths[0], "meta"), (paths[1], "meta"), (paths[0], "cpu"), (paths[1], "cpu")]
        patch.setattr(loading, "one_at_a_time", lambda base, tuned, *_: [load_unet(path) for path in (base, tuned)])
        sample.main(sample.parse_args([*flags, str(tmp_path / "two")]))
    for k in (1, 2, 3):
        one, two = (np.asarray(Image.open(tmp_path / name / f"00000-{k}.png")).astype(int) for name in ("one", "two"))
        assert abs(one - two).max() <= 1 and one.std() > 20


def test_a_wrong_tuned_model_is_reported_before_the_base_runs(tmp_path):
    weights.save_unet(weights.load_unet("tiny"), tmp_path)
    config = (tmp_path / "config.json").read_text().replace("160", "224")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="keys do not fit"):
        weights.one_at_a_time("tiny", tmp_path, "cpu", torch.float32)


def test_counted_flops_are_the_closed_form():
    conv, attention = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.functional.scaled_dot_product_attention
    x, q = torch.zeros(2, 3, 4, 4), torch.zeros(1, 2, 10, 8)
    assert cost.count(conv, x) == 2 * (2 * 8 * 16) * (3 * 9)
    assert cost.count(attention, q, q, q) == 2 * 2 * (2 * 10 * 10 * 8)
    q = q.clone().requires_grad_()
    assert cost.count(attention, q, q, q, backward=True) == 3 * 2 * 2 * (2 * 10 * 10 * 8)


def test_the_cost_of_an_image_adds_up():
    """ReFL: 34.5 no-grad steps on average. ImageReFL: 4.5, of which the first reuses another prediction: 3.6."""
    names = ("UNet forward", "UNet with gradients", "decode with gradients", "encode", "reward with gradients")
    costs = cost.per_image(dict(zip(names, (1, 3, 6, 2, 0.5), strict=True)))
    assert costs["refl"] == 34.5 + 3 + 6 + 0.5
    assert costs["imagerefl"] == 2 + 3.6 + 3 + 6 + 0.5 + 3
    assert costs["3:1 mix"] == (3 * costs["imagerefl"] + costs["refl"]) / 4
    assert cost.mixed(2.0, 7.0) == 3.25


@pytest.mark.slow
def test_mps_has_a_plan(capsys):
    train.main(train.parse_args(["--base", "sd15", "--reward", "mps", "--plan", "--gpu-memory", "80"]))
    assert "--batch-size" in capsys.readouterr().out


def test_mps_runs_on_tensors_without_data():
    args = SimpleNamespace(method="refl", reward="mps", reward_weights=None)
    with fake_tensors.ShapeMode(), torch.no_grad():
        m = cost.build_fake(args, CONFIG, SMALL_VAE)
        assert m.reward(torch.zeros(2, 3, 16, 16), ["a", "b"]).shape == (2,)


def test_tracked_allocations_are_those_of_the_tensors():
    with fake_tensors.AllocationTracker() as memory:
        a = torch.empty(1000)
        b = (a + 1) + 2  # two more, one of which is freed
        assert (memory.current, memory.peak) == (8000, 12000)
        view = b[10:]
        del a, b
        assert memory.current == 4000
        del view
    assert memory.current == 0


def test_tensors_without_data_are_tracked_like_real_and_like_torchs_fake_ones():
    peaks = []
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True), fake_tensors.ShapeMode()):
        with mode, fake_tensors.AllocationTracker() as memory:
            loss = UNet(CONFIG)(torch.zeros(4, 4, 16, 16), 5, torch.zeros(4, 5, 16)).square().mean()
            loss.backward()
        peaks.append(memory.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02)
    assert peaks[2] == pytest.approx(peaks[0], rel=0.02)


def operations(mode, autocast: bool) -> list[tuple]:
    """Every operation of a forward and backward pass: its name, and shape, strides and dtype of what it returns."""
    found = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            output = f(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
            found.append((str(f), [(t.shape, t.stride(), t.dtype) for t in tensors]))
            return output

    with mode, fake_tensors.norms_in_float32(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        unet, vae = UNet(CONFIG), VAE(SMALL_VAE)
        x, context = torch.zeros(4, 4, 8, 8), torch.zeros(4, 5, 16)
        with Recorder():
            vae.decode(unet(x, 5, context)).float().square().mean().backward()
    return found


@pytest.mark.parametrize("autocast", [False, True])
def test_tensors_without_data_take_the_operations_of_real_ones(autocast):
    assert operations(fake_tensors.ShapeMode(), autocast) == operations(nullcontext(), autocast)


def test_reading_a_value_of_a_tensor_without_data_is_an_error():
    with fake_tensors.ShapeMode():
        x = torch.ones(3)
        x.add_(1)
        assert x.sum().shape == () and x[1:].shape == (2,)
        with pytest.raises(RuntimeError, match="meta tensors"):
            x.sum().item()
    with pytest.raises(RuntimeError, match="within a ShapeMode only"):
        x + 1


PLAIN = {"from_image": False, "kl_scale": 0.0}  # flags of baselines/ that are not given


def test_memory_of_any_number_of_images_from_one_micro_batch(folders):  # noqa: F811
    """The same peaks as in micro-batches of that many images. MPS encodes one more text than there are images."""
    files = {"reward": "mps", "reward_weights": str(folders["mps"])}
    args = SimpleNamespace(method="refl", resolution=16, lora=None, **files, **PLAIN)
    memory = cost.MemoryModel(args, CONFIG, SMALL_VAE)
    kept, peaks = memory.peak("--checkpointing decoder", (1, 2, 5))
    assert kept == memory.between_updates + memory.text_bytes
    for n, peak in zip((1, 2, 5), peaks, strict=True):
        memory.IMAGES = n
        assert kept + max(itertools.accumulate(memory.micro_batch(False, True))) == pytest.approx(peak, abs=10_000)
    assert memory.peak("--text-on-cpu")[0] < kept - memory.text_bytes


@pytest.mark.slow
def test_memory_with_adapters_is_a_bf16_unet_and_the_activations():
    """Memory needed only while building the networks does not count."""
    config = replace(CONFIG, channels=(128, 128))
    args = {"method": "diffusion", "reward_weights": None, "resolution": 16} | PLAIN
    bf16_bytes = sum(p.nbytes for p in UNet(config).parameters()) / 2
    (full, _), (lora_kept, (one, two)) = (
        cost.MemoryModel(SimpleNamespace(**args, lora=rank), config, SMALL_VAE).peak("text-on-cpu")
        for rank in (None, 1)
    )
    # float32 weights, gradients, two moments and the copy, instead of the frozen bf16 weights
    assert full - lora_kept == pytest.approx(8 * bf16_bytes, rel=0.03)
    assert 0.5e6 < two - one < one - lora_kept


def test_norms_are_float32_as_on_a_gpu_also_when_recomputed():
    unet = UNet(CONFIG)
    unet.checkpointing = True
    with fake_tensors.ShapeMode(), fake_tensors.norms_in_float32():
        norm = torch.nn.GroupNorm(2, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32
            loss = unet(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 5, 16)).square().mean()
        loss.backward()  # raises if the recomputed tensors have another dtype


def test_the_plan_names_settings_that_fit(monkeypatch, capsys):
    """Needs neither weights nor data; recomputes activations if fewer than four images would fit otherwise."""
    names = ("UNet forward", "UNet with gradients", "decode with gradients", "encode", "reward with gradients")
    need = dict(zip(cost.SAVINGS, [(20, 9), (15, 3), (14, 1), (12, 1)], strict=True))  # GB: fixed, per image

    class Memory:
        def __init__(self, args, unet, vae):
            pass

        def peak(self, flags):
            fixed, per_image = need[flags]
            return 0, [(fixed + per_image * batch) * cost.GB for batch in (1, 2)]

    monkeypatch.setattr(cost, "flops", lambda *_: dict.fromkeys(names, 1e12))
    monkeypatch.setattr(cost, "MemoryModel", Memory)
    train.main(train.parse_args(["--base", "sd15", "--plan"]))
    out = capsys.readouterr().out
    for gigabytes, settings in {
        16: "15.0  --batch-size 2 --accumulate 16 --checkpointing unet,decoder --text-on-cpu",
        24: "23.0  --batch-size 8 --accumulate 4 --checkpointing unet,decoder",
        40: "40.0  --batch-size 8 --accumulate 4 --checkpointing decoder",
        80: "57.0  --batch-size 4 --accumulate 8\n",
    }.items():
        assert f"{gigabytes} GB    {settings}" in out


def test_text_on_cpu_gives_embeddings_on_the_gpu(monkeypatch):
    """On fake tensors, which have a device without needing a GPU."""

    def to(module, device, dtype=None):
        for part in module.modules():
            for key, p in [*part._parameters.items(), *part._buffers.items()]:
                if p is not None:
                    p = mode.from_tensor(p) if not isinstance(p, FakeTensor) else p
                    tensors = part._parameters if key in part._parameters else part._buffers
                    tensors[key] = p.detach().to(device)
        return module

    reward, text = rewards.load("tiny"), weights.load_text("tiny")
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t)  # fake tensors cannot be pinned
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        reward.network.to("cuda:0")
        text.to("cuda:0")
        reward.on_cpu()
        text.on_cpu()
        context = text(["a", "b"], (64, 64))["context"]
        (features,) = reward.text(["a", "b"], torch.device("cuda:0"))
    towers = [text.models[0], reward.network.model.text_model, reward.network.model.vision_model]
    assert [next(tower.parameters()).device.type for tower in towers] == ["cpu", "cpu", "cuda"]
    assert {text.cache["a"]["context"].device.type} == {"cpu"}
    assert (context.device.type, features.device.type) == ("cuda", "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_micro_batch_never_synchronises_with_the_gpu(unet, vae):
    unet, vae = unet.cuda(), vae.cuda()
    text = {key: t.cuda() for key, t in TEXT.items()}

    def micro_batch():
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(inference_copy, vae, text=text, device="cuda")
        loss.backward()

    inference_copy = InferenceCopy(unet, unet)
    micro_batch()  # initialises libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_batch()
        inference_copy.refresh()
    finally:
        torch.cuda.set_sync_debug_mode("default")
