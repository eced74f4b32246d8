"""LoRA files of other programs: every layout and every place where a scale is stored; other kinds are refused.

The expected output is that of a UNet whose weights are W + scale * B A, with the scale from the adapter's definition.
"""

import json
import math

import pytest
import torch
from recipe import fill, rnd
from safetensors.torch import save_file
from torch import nn

import weights
from pretrained import key_names, lora, weight_files
from pretrained.configs import unet_config
from speed import prepacked
from unet import UNet

SIZES = {"sample_size": 8, "block_out_channels": [8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
CONFIGS = {
    "sd15": SIZES
    | {
        "cross_attention_dim": 48,
        "attention_head_dim": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "sdxl": SIZES
    | {
        "cross_attention_dim": 56,
        "attention_head_dim": [1, 2, 4],
        "transformer_layers_per_block": [1, 1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 40,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
}
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
BASES = pytest.mark.parametrize("base", CONFIGS)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 4


def mini(base: str = "sd15") -> UNet:
    """A UNet of a few thousand parameters."""
    with torch.device("meta"):
        unet = UNet(unet_config(CONFIGS[base])).eval()
    unet.load_state_dict({key: fill(key, t.shape) for key, t in unet.state_dict().items()}, assign=True)
    return unet.requires_grad_(False)  # like a UNet with adapters: gradients change the choice of kernels


def run(unet, base: str = "sd15") -> torch.Tensor:
    more = {"pooled": rnd("pooled", 2, 40), "time_ids": torch.full((2, 6), 64.0)} if base == "sdxl" else {}
    context = rnd("context", 2, 7, CONFIGS[base]["cross_attention_dim"])
    with torch.no_grad():
        return unet(rnd("x", 2, 4, 8, 8), torch.tensor([5, 700]), context=context, **more)


def pairs(ends: tuple[str, ...] = ATTENTION, base: str = "sd15") -> dict[str, tuple[torch.Tensor, ...]]:
    """Layer -> A and B, for every layer of the mini UNet with one of these name ends, as peft shapes them."""
    found = {}
    for layer, module in mini(base).named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and layer.endswith(ends):
            out, into, *kernel = module.weight.shape
            A = fill(layer + ".A", (RANK, into, *kernel)) / 4
            found[layer] = (A, fill(layer + ".B", (out, RANK, *[1] * len(kernel))))
    return found


def expected(adapters: dict[str, tuple[torch.Tensor, ...]], scale, base: str = "sd15") -> torch.Tensor:
    """The output with the adapters merged; scale: a number, or layer -> number."""
    unet = mini(base)
    with torch.no_grad():
        for layer, (A, B) in adapters.items():
            weight = unet.get_submodule(layer).weight
            factor = scale(layer) if callable(scale) else scale
            weight += factor * (B.flatten(1) @ A.flatten(1)).reshape(weight.shape)
    return run(unet, base)


def loaded(path, base: str = "sd15") -> torch.Tensor:
    unet = mini(base)
    lora.load(unet, path)
    return run(unet, base)


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-5


def peft_tensors(adapters: dict, prefix: str) -> dict[str, torch.Tensor]:
    tensors = {f"{prefix}{layer}.lora_A.weight": A for layer, (A, _) in adapters.items()}
    return tensors | {f"{prefix}{layer}.lora_B.weight": B for layer, (_, B) in adapters.items()}


def kohya_tensors(adapters: dict, alpha: float | None, spell=lambda layer: "lora_unet_" + layer.replace(".", "_")):
    tensors = {}
    for layer, (A, B) in adapters.items():
        tensors |= {spell(layer) + ".lora_down.weight": A, spell(layer) + ".lora_up.weight": B}
        tensors |= {} if alpha is None else {spell(layer) + ".alpha": torch.tensor(alpha)}
    return tensors


def write_peft_folder(folder, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors(pairs(), "base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK} | config))


# where a scale is stored

PATTERNS = {"lora_alpha": 4, "alpha_pattern": {"attn2.to_k": 6, "attn1.to_q": 20, r"down_blocks\..*attn1\.to_v": 16}}


def pattern_scale(layer: str) -> float:
    if layer.startswith("down_blocks.") and layer.endswith("attn1.to_v"):
        return 4.0
    return {"attn2.to_k": 1.5, "attn1.to_q": 5.0}.get(".".join(layer.split(".")[-2:]), 1.0)


SETTINGS = [
    ({"lora_alpha": 16}, 4.0),
    ({"lora_alpha": 8, "use_rslora": True}, 8 / math.sqrt(RANK)),
    (PATTERNS, pattern_scale),
    (PATTERNS | {"use_rslora": True}, lambda layer: pattern_scale(layer) * math.sqrt(RANK)),
    ({"lora_alpha": 4, "alpha_pattern": {"to_k": 8, "attn1.to_k": 12}}, lambda n: 2.0 if n.endswith("to_k") else 1.0),
]


@pytest.mark.parametrize(("config", "scale"), SETTINGS)
@pytest.mark.parametrize("place", ["", "adapter_model.safetensors"])
def test_the_scale_of_a_peft_folder_is_that_of_its_adapter_config(config, scale, place, tmp_path):
    write_peft_folder(tmp_path, config)
    assert agree(loaded(tmp_path / place), expected(pairs(), scale))


@pytest.mark.parametrize(("config", "scale"), SETTINGS)
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_the_scale_of_a_diffusers_file_is_that_of_its_header(prefix, config, scale, tmp_path):
    settings = {"r": RANK} | config
    header = {"lora_adapter_metadata": json.dumps({prefix + key: value for key, value in settings.items()})}
    save_file(peft_tensors(pairs(), prefix), tmp_path / weight_files.ADAPTER, header)
    assert agree(loaded(tmp_path), expected(pairs(), scale))


def test_load_tuned_reads_a_peft_folder_with_its_scale(tmp_path):
    weights.save_unet(mini(), tmp_path / "base" / "unet")
    for folder in (tmp_path / "run", tmp_path / "pipeline" / "unet"):
        write_peft_folder(folder, {"lora_alpha": 16})
    for source in (tmp_path / "run", tmp_path / "pipeline"):
        base, tuned = weights.load_tuned(source, tmp_path / "base")
        assert agree(run(tuned), expected(pairs(), 4.0)) and agree(run(base), run(mini()))


def test_kohyas_scale_is_its_alpha_tensor_and_else_its_header(tmp_path):
    path, header = tmp_path / "x.safetensors", {"ss_network_dim": "4", "ss_network_alpha": "2.0"}
    for alpha, metadata, scale in ((1.0, header, 0.25), (None, header, 0.5), (None, None, 1.0)):
        save_file(kohya_tensors(pairs(), alpha), path, metadata)
        assert agree(loaded(path), expected(pairs(), scale))
    save_file(kohya_tensors(pairs(), None), path, {"ss_network_alpha": "Dynamic"})
    assert agree(loaded(path), expected(pairs(), 1.0))


def test_a_peft_file_without_its_config_is_refused_as_its_scale_is_unknown(tmp_path):
    write_peft_folder(tmp_path, {})
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: peft stores its scale in adapter_config\.json"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changes the base's weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights loftq"),
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"lora_alpha": "high"}, "lora_alpha 'high' of .* is not a number"),
        ({"lora_alpha": None}, "lora_alpha None of .* is not a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern is a list"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern '\\(' is no regular expression"),
    ],
)
def test_settings_of_peft_that_are_not_plain_lora_are_refused(config, reason, tmp_path):
    write_peft_folder(tmp_path, {"lora_alpha": 4} | config)
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{reason}") as caught:
        loaded(tmp_path)
    assert "\n" not in str(caught.value)


# names


def sgm(layer: str, base: str) -> str:
    return key_names.unet_name(layer + ".weight", unet_config(CONFIGS[base])).removesuffix(".weight")


def old_diffusers(layer: str, infix: str) -> str:
    """A layer in diffusers' earlier names; infix: "lora" (end of 2023) or "processor" (beginning of 2023)."""
    if infix == "lora":
        return f"{layer}.lora"
    block, part = layer.removesuffix(".0").rsplit(".", 1)
    return f"{block}.processor.{part}_lora"


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("infix", ["lora", "processor"])
@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"])
def test_names_of_earlier_diffusers_are_read(prefix, infix, file, tmp_path):
    tensors = {}
    for layer, (A, B) in pairs().items():
        name = prefix + old_diffusers(layer, infix)
        tensors |= {f"{name}.down.weight": A, f"{name}.up.weight": B}
    save_file(tensors, tmp_path / file) if file.endswith("safetensors") else torch.save(tensors, tmp_path / file)
    weights.save_unet(mini(), tmp_path / "base" / "unet")
    tuned = weights.load_tuned(tmp_path / file, tmp_path / "base")[1]
    assert agree(run(tuned), expected(pairs(), 1.0)) and agree(loaded(tmp_path), expected(pairs(), 1.0))


@BASES
@pytest.mark.parametrize("kind", ["kohya", "kohya, single-file names", "OneTrainer", "OneTrainer, OMI", "ComfyUI"])
def test_names_of_kohya_onetrainer_and_comfyui_are_read(base, kind, tmp_path):
    spell = {
        "kohya": lambda layer: "lora_unet_" + layer.replace(".", "_"),
        "kohya, single-file names": lambda layer: "lora_unet_" + sgm(layer, base).replace(".", "_"),
        "OneTrainer": lambda layer: "lora_unet." + layer,
        "OneTrainer, OMI": lambda layer: "unet." + sgm(layer, base),
        "ComfyUI": lambda layer: "diffusion_model." + sgm(layer, base),
    }[kind]
    save_file(kohya_tensors(pairs(base=base), 2.0, spell), tmp_path / "x.safetensors")
    assert agree(loaded(tmp_path / "x.safetensors", base), expected(pairs(base=base), 0.5, base))


# layers

EVERYWHERE = (*ATTENTION, "proj_in", "proj_out", "net.0.proj", "net.2", "conv1", "conv2", "time_emb_proj")
EVERYWHERE += ("conv_shortcut", "samplers.0.conv", "conv_in", "conv_out", "linear_1", "linear_2")


@BASES
@pytest.mark.parametrize("write", ["peft", "kohya"])
def test_adapters_of_all_linear_layers_and_convolutions_are_applied(base, write, tmp_path):
    adapters = pairs(EVERYWHERE, base)
    kinds = {layer.rsplit(".", 1)[-1] for layer in adapters}
    assert {"conv1", "conv_shortcut", "conv", "proj_in", "2", "time_emb_proj", "conv_out"} <= kinds
    tensors = peft_tensors(adapters, "unet.") if write == "peft" else kohya_tensors(adapters, 1.0)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    scale = 1.0 if write == "peft" else 0.25
    assert agree(loaded(path, base), expected(adapters, scale, base))
    assert not agree(run(mini(base), base), expected(adapters, scale, base))


def test_adapters_everywhere_switch_off_merge_pack_and_are_written_again(tmp_path):
    adapters = pairs(EVERYWHERE)
    save_file(kohya_tensors(adapters, 1.0), tmp_path / "x.safetensors")
    unet = mini()
    lora.load(unet, tmp_path / "x.safetensors")
    base, tuned = lora.base_and_tuned(unet)
    assert torch.equal(run(base), run(mini()))
    for layout in ("peft", "kohya"):
        lora.save(unet, tmp_path / layout, layout)
        assert agree(loaded(tmp_path / layout), expected(adapters, 0.25))
    with torch.no_grad():  # packing and fusing may not drop the adapters of upsampling convolutions
        packed = prepacked.packed_copy(unet)
        assert agree(run(packed), expected(adapters, 0.25))
        assert agree(run(prepacked.prepare_for_compile(prepacked.copy.deepcopy(unet))), expected(adapters, 0.25))
    kinds = {name: type(module) for name, module in mini().named_modules()}
    lora.merge(unet)
    assert agree(run(unet), expected(adapters, 0.25))
    assert {name: type(module) for name, module in unet.named_modules()} == kinds
    assert unet.state_dict().keys() == mini().state_dict().keys()


# refused


def test_other_kinds_of_adapters_are_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    layer = "lora_unet_" + LAYER.replace(".", "_")
    for key, kind in (
        (f"{layer}.hada_w1_a", "LoHa"),
        (f"{layer}.lokr_w1", "LoKr"),
        (f"{layer}.dora_scale", "DoRA"),
        (f"base_model.model.{LAYER}.lora_magnitude_vector", "DoRA"),
        (f"{layer}.oft_blocks", "OFT"),
        (f"{layer}.lora_mid.weight", "Tucker"),
        (f"{layer}.diff", "full weight difference"),
        ("bundle_emb.token.string_to_param", "text embeddings"),
    ):
        save_file(kohya_tensors(pairs(), 1.0) | {key: torch.ones(2, 2)}, path)
        with pytest.raises(ValueError, match=f"{kind}.* not supported.*1 of .* keys, such as {key}") as caught:
            loaded(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
        "clip_l.text_model.encoder.layers.0.self_attn.q_proj.lora_down.weight",
    ],
)
def test_adapters_of_the_text_encoder_are_refused_and_counted(key, tmp_path):
    tensors = kohya_tensors(pairs(), 1.0) | {key: torch.ones(2, 48), key.replace("down", "up"): torch.ones(48, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    count = 1 if "lora_A" in key else 2
    with pytest.raises(ValueError, match=rf"{count} of {len(tensors)} keys adapt the text encoder, such as {key}"):
        loaded(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("width", "base"), [(768, "SD1.5; --base sd15"), (1024, "SD2, which is not"), (2048, "SDXL; --base sdxl")]
)
def test_an_adapter_of_another_base_is_refused_with_the_base_that_fits(width, base, tmp_path):
    key = "unet.down_blocks.3.attentions.9.transformer_blocks.0.attn2.to_k"
    save_file({f"{key}.lora_A.weight": torch.ones(2, width)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"text of width {width}, this UNet takes 48: an adapter of {base}"):
        loaded(tmp_path / "x.safetensors")


def test_two_adapters_of_one_layer_are_refused(tmp_path):
    save_file(peft_tensors(pairs(), "unet.") | peft_tensors(pairs(), ""), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds two adapters of"):
        loaded(tmp_path / "x.safetensors")
