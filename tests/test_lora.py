"""Adapters: their arithmetic, the switch, and files in the layouts of peft and kohya."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipe import fill, golden, golden_config, rnd
from safetensors.torch import load_file, save_file

import weights
from combined import combine, combined_weights, conditional
from pretrained import lora, weight_files
from pretrained.configs import unet_config, unet_dict
from scheduler import Scheduler
from unet import UNet
from utils import disk

ROOT = Path(__file__).parent.parent
MINIS = pytest.mark.parametrize("name", ["unet_sd15_mini", pytest.param("unet_sdxl_mini", marks=pytest.mark.slow)])
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"  # 48 -> 64 numbers in SD1.5, 80 -> 64 in SDXL


def blank(name: str) -> UNet:
    """The mini UNet of the golden files, SDXL's with two transformer blocks instead of ten, to save time."""
    config = golden_config(name)
    config |= {"transformer_layers_per_block": [1, 2, 2]} if "sdxl" in name else {}
    with torch.device("meta"):
        return UNet(unet_config(config)).eval()


@functools.cache
def by_recipe(name: str) -> dict[str, torch.Tensor]:
    return {key: fill(key, t.shape) for key, t in blank(name).state_dict().items()}


def mini(name: str = "unet_sd15_mini") -> UNet:
    unet = blank(name)
    unet.load_state_dict({key: t.clone() for key, t in by_recipe(name).items()}, assign=True)
    return unet


def adapted(name: str = "unet_sd15_mini", rank: int = 4, alpha: float = 2.0) -> UNet:
    """A mini UNet whose adapters are far from zero."""
    unet = mini(name)
    lora.add(unet, rank, alpha)
    for key, parameter in unet.named_parameters():
        if ".lora_" in key:
            parameter.data.copy_(fill(key, parameter.shape))
    return unet


def inputs(name: str = "unet_sd15_mini") -> tuple[torch.Tensor, dict]:
    g, _ = golden(name)
    conditioning = {"timesteps": g["timestep"], "context": g["context"]}
    if "text_embeds" in g:
        conditioning |= {"pooled": g["text_embeds"], "time_ids": g["time_ids"]}
    return g["sample"], conditioning


def run(unet, name: str = "unet_sd15_mini") -> torch.Tensor:
    x, conditioning = inputs(name)
    with torch.no_grad():
        return unet(x, **conditioning)


def adapter_tensors(unet: UNet) -> dict:
    return {key: t for key, t in unet.state_dict().items() if ".lora_" in key}


@MINIS
def test_new_adapters_do_not_change_the_output_and_are_the_only_trainable_parameters(name):
    unet = mini(name)
    before = run(unet, name)
    parameters = lora.add(unet, 4)
    assert torch.equal(run(unet, name), before)
    assert [p for p in unet.parameters() if p.requires_grad] == parameters
    blocks = sum(key.endswith("attn1.to_q.weight") for key in unet.state_dict())
    assert len(parameters) == blocks * 2 * 4 * 2  # two attentions of four layers, A and B


def test_the_first_gradient_reaches_b_and_only_then_a():
    unet = mini()
    lora.add(unet, 4)
    x, conditioning = inputs()
    unet(x, **conditioning).square().mean().backward()
    gradients = {key: p.grad for key, p in unet.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for key, gradient in gradients.items() if ".lora_B." in key)
    assert all(gradient.abs().max() == 0 for key, gradient in gradients.items() if ".lora_A." in key)


def test_initial_standard_deviation_is_one_over_the_rank_and_the_generator_is_used():
    first, again, other = (mini() for _ in range(3))
    for unet, seed in ((first, 1), (again, 1), (other, 2)):
        lora.add(unet, 8, generator=torch.Generator().manual_seed(seed))
    values = torch.cat([t.flatten() for key, t in adapter_tensors(first).items() if ".lora_A." in key])
    assert values.std().item() == pytest.approx(1 / 8, rel=0.02)
    key = LAYER + ".lora_A.weight"
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_an_adapter_adds_alpha_over_rank_times_b_a():
    layer = adapted(rank=4, alpha=2.0).get_submodule(LAYER)
    x, A, B = rnd("x", 3, 48).double(), layer.lora_A.weight.double(), layer.lora_B.weight.double()
    expected = x @ (layer.weight.double() + 0.5 * B @ A).T
    assert (layer(x.float()) - expected).abs().max() <= 1e-5


@MINIS
def test_off_is_bit_identical_to_the_base_and_on_is_the_merged_model(name):
    unet = adapted(name)
    base, tuned = lora.base_and_tuned(unet)
    on = run(tuned, name)
    assert torch.equal(run(base, name), run(mini(name), name))
    assert torch.equal(run(tuned, name), on)
    assert (on - run(base, name)).abs().max() > 0.01
    merged = run(lora.merge(unet), name)
    assert (merged - on).abs().max() <= 1e-5
    assert unet.state_dict().keys() == mini(name).state_dict().keys()


def test_the_adapters_are_on_again_after_the_base_raised():
    base, tuned = lora.base_and_tuned(adapted())
    on = run(tuned)
    with pytest.raises(ValueError, match="multiples"):
        base(torch.zeros(1, 4, 3, 3), 1, torch.zeros(1, 1, 48))
    assert torch.equal(run(tuned), on)


def test_combined_generation_with_one_set_of_weights_equals_that_with_two_models():
    unet = adapted()
    conditioning = {"context": inputs()[1]["context"][:1]}
    scheduler, noise = Scheduler(steps=6, eta=1.0), rnd("noise", 1, 4, 8, 8)
    images = []
    for base, tuned in (lora.base_and_tuned(unet), (mini(), lora.merge(adapted()))):
        predictors, generator = (
            (conditional(base, conditioning), conditional(tuned, conditioning)),
            torch.Generator().manual_seed(0),
        )
        with torch.no_grad():
            images.append(combine(scheduler, *predictors, combined_weights(6, 3), noise, generator))
    assert (images[0] - images[1]).abs().max() <= 1e-5 * images[1].abs().max()


GENERATE = """
import json, sys, torch, weights
from combined import cfg, combine, combined_weights, conditional
from scheduler import Scheduler

def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

base, *checkpoint = sys.argv[1:]
before = memory("VmRSS")
if checkpoint:
    first, second = weights.load_tuned(*checkpoint, base, dtype=torch.bfloat16)
else:
    first = second = weights.load_unet(base, dtype=torch.bfloat16)
text, empty = ({"context": torch.full((1, 77, 768), x, dtype=torch.bfloat16)} for x in (0.1, 0.0))
predictors = cfg(first, text, empty, 7.5), conditional(second, text)
with torch.no_grad():  # one model takes every step itself
    x = combine(Scheduler(2), *predictors, combined_weights(2, 1 if checkpoint else 2), torch.ones(1, 4, 8, 8))
assert x.isfinite().all()
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_combined_generation_with_an_adapter_peaks_hardly_above_one_full_size_model(tmp_path):
    """SD1.5 in bfloat16, latents of 8x8 so that weights dominate; a minute, and 2 GB on disk."""
    base, run = tmp_path / "base", tmp_path / "run"
    with torch.device("meta"):
        unet = UNet()
    tensors = {key: rnd(key, *t.shape).bfloat16() / 30 for key, t in unet.state_dict().items()}
    disk.write(base / "diffusion_pytorch_model.safetensors", tensors)
    disk.write_text(base / "config.json", json.dumps(unet_dict(unet.config)))
    lora.add(unet, 16)
    pairs = {f"unet.{key}": rnd(key, *t.shape) / 30 for key, t in adapter_tensors(unet).items()}
    disk.write(run / weight_files.ADAPTER, pairs)
    del tensors
    try:
        peak = {}
        for name, checkpoint in (("one model", []), ("with an adapter", [run]), ("two models", [base])):
            call = [sys.executable, "-c", GENERATE, base, *checkpoint]
            done = subprocess.run([str(part) for part in call], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            peak[name] = int(done.stdout)
    finally:
        shutil.rmtree(tmp_path)
    print({name: f"{size / 2**30:.2f} GiB" for name, size in peak.items()})
    assert peak["with an adapter"] <= 1.05 * peak["one model"]
    assert peak["two models"] >= 1.9 * peak["one model"]  # or the measure would not see a second set of weights


@MINIS
@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_both_layouts_load_back_to_the_same_model(name, layout, tmp_path):
    unet = adapted(name, rank=3, alpha=5.0)
    lora.save(unet, tmp_path, layout, {"note": "mine"})
    assert [path.name for path in tmp_path.iterdir()] == [weight_files.ADAPTER]
    assert weight_files.read_metadata(tmp_path / weight_files.ADAPTER)["note"] == "mine"
    loaded = mini(name)
    parameters = lora.load(loaded, tmp_path)
    assert len(parameters) == len(adapter_tensors(unet))
    pairs = zip(adapter_tensors(unet).items(), adapter_tensors(loaded).items(), strict=True)
    assert all(key == other and torch.equal(t, u) for (key, t), (other, u) in pairs)
    assert torch.equal(run(loaded, name), run(unet, name))


def test_peft_names_and_metadata_are_those_that_diffusers_writes(tmp_path):
    unet = adapted(rank=4, alpha=2.0)
    lora.save(unet, tmp_path)
    tensors, metadata = (
        load_file(tmp_path / weight_files.ADAPTER),
        weight_files.read_metadata(tmp_path / weight_files.ADAPTER),
    )
    assert tensors[f"unet.{LAYER}.lora_A.weight"].shape == (4, 48)
    assert tensors[f"unet.{LAYER}.lora_B.weight"].shape == (64, 4)
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 2.0)
    assert config["unet.target_modules"] == ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("unet_sd15_mini", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"),
        ("unet_sdxl_mini", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"),
    ],
)
def test_kohya_names_are_those_of_its_scripts(name, spelled, tmp_path):
    unet = adapted(name, rank=4, alpha=2.0)
    lora.save(unet, tmp_path / "mine.safetensors", "kohya")
    tensors = load_file(tmp_path / "mine.safetensors")
    assert torch.equal(tensors[spelled + ".lora_down.weight"], unet.get_submodule(LAYER).lora_A.weight)
    assert torch.equal(tensors[spelled + ".lora_up.weight"], unet.get_submodule(LAYER).lora_B.weight)
    assert tensors[spelled + ".alpha"].item() == 2.0
    metadata = weight_files.read_metadata(tmp_path / "mine.safetensors")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")


def test_alpha_defaults_to_the_rank(tmp_path):
    tensors = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 48), f"unet.{LAYER}.lora_B.weight": torch.ones(64, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    unet = mini()
    lora.load(unet, tmp_path / "x.safetensors")
    layer = unet.get_submodule(LAYER)
    assert (layer.alpha, layer.rank) == (2.0, 2)
    assert not isinstance(unet.get_submodule(LAYER.replace("to_k", "to_v")), lora.LoRALinear)


def test_an_adapter_in_half_precision_computes_in_the_type_of_its_input(tmp_path):
    lora.save(adapted(), tmp_path)
    unet = mini().bfloat16()
    lora.load(unet, tmp_path)
    x, conditioning = inputs()
    with torch.no_grad():
        output = unet(x.bfloat16(), **conditioning | {"context": conditioning["context"].bfloat16()})
    assert output.dtype == torch.bfloat16
    assert (output.float() - run(adapted())).abs().max() <= 0.2


def test_keys_that_do_not_fit_are_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    A, B = torch.ones(2, 48), torch.ones(64, 2)
    pair = {f"unet.{LAYER}.lora_A.weight": A, f"unet.{LAYER}.lora_B.weight": B}
    for tensors, reason in (
        ({"unet.mid.lora_A.weight": A}, "1 of 1 keys fit no layer of this UNet: unet.mid.lora_A.weight"),
        (pair | {"text_encoder.x.lora_A.weight": A + 1}, "1 of 3 keys adapt the text encoder, such as text_encoder.x"),
        (pair | {f"unet.{LAYER}.dora_scale": B + 1}, "DoRA.* not supported, .*1 of 3 keys"),
        ({f"unet.{LAYER}.lora_A.weight": A}, "only one half of the adapter of " + LAYER),
        (pair | {f"unet.{LAYER}.lora_B.weight": torch.ones(64, 3)}, r"with weight \(64, 48\) cannot take .* \(64, 3\)"),
        ({"conv_in.weight": torch.ones(3)}, "1 of 1 keys fit no layer of this UNet"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=reason) as caught:
            lora.load(mini(), path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    save_file(pair, path, {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})})
    with pytest.raises(ValueError, match="DoRA"):
        lora.load(mini(), path)
    with pytest.raises(FileNotFoundError, match=weight_files.ADAPTER):
        lora.load(mini(), tmp_path)


def test_an_adapter_of_the_other_base_is_refused(tmp_path):
    lora.save(adapted("unet_sdxl_mini"), tmp_path)
    with pytest.raises(ValueError, match="keys fit no layer of this UNet"):
        lora.load(mini(), tmp_path)


def test_misuse_says_what_to_do_instead(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        lora.switch(mini(), True)
    with pytest.raises(ValueError, match="rank .* at least 1"):
        lora.add(mini(), 0)
    with pytest.raises(ValueError, match="unknown layout"):
        lora.save(adapted(), tmp_path, "loha")
    with pytest.raises(ValueError, match="lora.merge"):
        lora.add(adapted(), 4)
    with pytest.raises(ValueError, match="lora.merge"):
        weights.save_unet(adapted(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["", weight_files.ADAPTER])
def test_a_run_with_an_adapter_is_base_and_tuned_model_in_one(place, tmp_path):
    unet = adapted()
    weights.save_unet(mini(), tmp_path / "base" / "unet")
    lora.save(unet, tmp_path / "run")
    (tmp_path / "run" / "states").mkdir()
    (tmp_path / "run" / "states" / "step-000001.safetensors").touch()
    base, tuned = weights.load_tuned(tmp_path / "run" / place, tmp_path / "base")
    assert torch.equal(run(base), run(mini()))
    assert torch.equal(run(tuned), run(unet))


def test_diffusers_loads_our_adapter_without_unexpected_keys(tmp_path):
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    unet = adapted(rank=4, alpha=2.0)
    lora.save(unet, tmp_path)
    theirs = diffusers.UNet2DConditionModel(**golden_config("unet_sd15_mini")).eval()
    theirs.load_state_dict(mini().state_dict())
    state, _, metadata = diffusers.StableDiffusionPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)[:3]
    diffusers.StableDiffusionPipeline.load_lora_into_unet(state, None, theirs, metadata=metadata)
    g, _ = golden("unet_sd15_mini")
    with torch.no_grad():
        output = theirs(g["sample"], g["timestep"], g["context"]).sample
    assert (output - run(unet)).abs().max() <= 1e-4
