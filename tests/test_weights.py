"""Every published layout is read strictly, and other programs read the files that we write.

Mini models of the real classes, filled by the recipe on the keys of each layout; outputs are golden ones of diffusers.
"""

import atexit
import functools
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from recipe import GOLDEN, fill, filled, golden, golden_config, rnd
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import sample
import unet as unets
import vae as vaes
import weights
from pretrained import key_names, loading, lora, weight_files
from pretrained.configs import unet_config, unet_dict, vae_config, vae_dict
from unet import UNet
from vae import VAE

ROOT = Path(__file__).parent.parent
SINGLE = json.loads(gzip.decompress((GOLDEN / "keys_single_file.json.gz").read_bytes()))
FOLDERS = json.loads((GOLDEN / "keys_diffusers_layout.json").read_text())
CLIP = {"vocab_size": 99, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 77}
CLIP |= {"bos_token_id": 1, "eos_token_id": 2}
MINI = {
    "sd15": {
        "unet": golden_config("unet_sd15_mini"),
        "text_encoder": CLIP | {"hidden_size": 48, "intermediate_size": 96},
    },
    "sdxl": {
        "unet": golden_config("unet_sdxl_mini") | {"transformer_layers_per_block": [1, 2, 2]},  # of 10, to save time
        "text_encoder": CLIP | {"hidden_size": 32, "intermediate_size": 64},
        "text_encoder_2": CLIP | {"hidden_size": 48, "intermediate_size": 96, "projection_dim": 40},
    },
}
for base in MINI.values():
    base["vae"] = golden_config("vae_mini")
KINDS = ("UNet2DConditionModel", "AutoencoderKL")
BOTH = pytest.mark.parametrize("base", MINI)
BOTH_SLOWLY = pytest.mark.parametrize("base", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@functools.cache
def by_recipe(name: str) -> dict[str, torch.Tensor]:
    return {key: fill(key, shape) for key, shape in SINGLE[name].items()}


def outputs(unet: UNet, name: str) -> torch.Tensor:
    g, _ = golden(name)
    inputs = {"timesteps": g["timestep"], "context": g["context"]}
    if "text_embeds" in g:
        inputs |= {"pooled": g["text_embeds"], "time_ids": g["time_ids"]}
    with torch.no_grad():
        return unet(g["sample"], **inputs)


def clip(base: str, component: str):
    kind = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
    return filled(kind(CLIPTextConfig(**MINI[base][component])))


def on_disk(model) -> dict[str, torch.Tensor]:
    """A text encoder's tensors under the names of the official folders."""
    tensors = {f"text_model.{k.removeprefix('text_model.')}": t for k, t in model.state_dict().items()}
    tensors = {k.removeprefix("text_model.") if "text_projection" in k else k: t for k, t in tensors.items()}
    return tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def write_component(folder: Path, config: dict, tensors: dict, name: str = "diffusion_pytorch_model") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / f"{name}.safetensors")


@functools.cache
def mini_unet(base: str) -> UNet:
    with torch.device("meta"):
        unet = UNet(unet_config(MINI[base]["unet"]))
    unet.load_state_dict({key: fill(key, t.shape) for key, t in unet.state_dict().items()}, assign=True)
    return unet.eval()


@functools.cache
def pipeline_of(base: str) -> Path:
    """A mini pipeline in the diffusers layout, with the quirks of the official folders."""
    folder, config = Path(tempfile.mkdtemp()), MINI[base]
    atexit.register(shutil.rmtree, folder)
    vae = filled(VAE(vae_config(config["vae"])))
    write_component(folder / "unet", {"_class_name": KINDS[0]} | config["unet"], mini_unet(base).state_dict())
    write_component(folder / "vae", {"_class_name": KINDS[1]} | config["vae"], vae.state_dict())
    for component in ("text_encoder", "text_encoder_2"):
        if component in config:
            model = clip(base, component)
            stored = {"architectures": [type(model).__name__]} | config[component]
            write_component(folder / component, stored, on_disk(model), "model")
    return folder


def write_pipeline(folder: Path, base: str) -> Path:
    """A copy of the mini pipeline, to modify."""
    return shutil.copytree(pipeline_of(base), folder, dirs_exist_ok=True)


def write_single(path: Path, unet: str, extra: dict | None = None) -> Path:
    """A mini LDM / SGM file by the recipe, with the unused tensors of the official files."""
    tensors = by_recipe(unet) | by_recipe("vae_mini")
    tensors |= {"alphas_cumprod": torch.rand(1000), "model_ema.decay": torch.tensor(0.9)} | (extra or {})
    config = {"unet": golden_config(unet), "vae": golden_config("vae_mini")}
    save_file(tensors, path, {"config": json.dumps(config)})
    return path


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# names


@pytest.mark.parametrize(("config", "name"), [(unets.SD15, "sd15_unet"), (unets.SDXL, "sdxl_unet")])
def test_full_size_unet_names_map_onto_each_other_completely(config, name):
    single = {key_names.UNET + key_names.unet_name(key, config): shape for key, shape in FOLDERS[name].items()}
    assert single == SINGLE[name]


def test_full_size_vae_names_map_onto_each_other_completely():
    single = {key_names.VAE + key_names.vae_name(key, 4): shape for key, shape in FOLDERS["vae"].items()}
    assert {key: shape + [1] * (len(SINGLE["vae"][key]) - len(shape)) for key, shape in single.items()} == SINGLE["vae"]


def test_full_size_text_encoders_are_distinguished_by_their_projection():
    assert key_names.text_layouts(FOLDERS["clip_l_text"])[2][0] == key_names.CLIP_L
    prefix, names = key_names.text_layouts(FOLDERS["open_clip_g_text"])[1]
    assert prefix == key_names.CLIP_G
    assert names["text_model.encoder.layers.31.mlp.fc2.bias"] == "transformer.resblocks.31.mlp.c_proj.bias"
    assert len(set(names.values())) == 517


# reading, against outputs of diffusers


@pytest.mark.parametrize("name", ["unet_sd15_mini", "unet_sdxl_mini"])
def test_golden_unet_output_from_a_single_file(name, tmp_path):
    unet = weights.load_unet(write_single(tmp_path / "model.safetensors", name))
    assert (outputs(unet, name) - golden("single_file_mini")[0][f"{name}.output"]).abs().max() <= 1e-5


def test_golden_unet_output_from_a_ckpt(tmp_path):
    name = "unet_sd15_mini"
    config = golden_config(name)
    torch.save({"state_dict": by_recipe(name), "global_step": 3}, tmp_path / "diffusion_pytorch_model.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    unet = weights.load_unet(tmp_path / "diffusion_pytorch_model.ckpt")
    assert (outputs(unet, name) - golden("single_file_mini")[0][f"{name}.output"]).abs().max() <= 1e-5


def check_vae(vae: VAE, name: str) -> None:
    inputs, g = golden("vae_mini")[0], golden("single_file_mini")[0]
    vae.double()  # so that no processor's rounding comes on top of the golden images' own
    with torch.no_grad():
        mean, _ = vae.encode(inputs["image"][:1].double())
        decoded = vae.decode(inputs["latent"][:1].double() * vae.config.scale)
    assert (mean - g[f"{name}.mean"]).abs().max() <= 1e-5
    assert (decoded - g[f"{name}.decoded"]).abs().max() <= 1e-5


def test_golden_vae_outputs_from_a_single_file(tmp_path):
    check_vae(weights.load_vae(write_single(tmp_path / "model.safetensors", "unet_sd15_mini")), "vae_mini")


@pytest.mark.parametrize("convolutions", [False, True])
def test_golden_vae_outputs_from_the_older_attention_names(convolutions, tmp_path):
    tensors = dict(by_recipe("vae_mini_legacy_attention"))
    old = [key for key, t in tensors.items() if ".attentions." in key and t.ndim == 2]
    assert len(old) == 8
    if convolutions:
        tensors |= {key: tensors[key][..., None, None] for key in old}
    write_component(tmp_path, {"_class_name": "AutoencoderKL"} | golden_config("vae_mini"), tensors)
    check_vae(weights.load_vae(tmp_path), "vae_mini_legacy_attention")


def test_plain_weights_are_preferred_to_ema_weights_as_in_diffusers(tmp_path, capsys):
    """A stale EMA copy, whole or with tensors missing, is not read unless asked for."""
    name = "unet_sd15_mini"
    plain = by_recipe(name)
    ema = {}
    for key, tensor in plain.items():  # as the LDM code names a copy: the dots are removed
        ema["model_ema." + key.removeprefix("model.").replace(".", "")] = tensor + 1
    expected = golden("single_file_mini")[0][f"{name}.output"]
    path = write_single(tmp_path / "v1-5-pruned.safetensors", name, ema)
    assert (outputs(weights.load_unet(path), name) - expected).abs().max() <= 1e-5
    assert "contains plain and EMA weights of the UNet; using the plain ones" in capsys.readouterr().err
    assert torch.equal(weights.load_unet(path, ema=True).conv_in.bias, weights.load_unet(path).conv_in.bias + 1)
    weights.main(weights.parse_args(["convert", str(path), str(tmp_path / "ema"), "--ema"]))
    assert same(weights.load_unet(tmp_path / "ema").state_dict(), weights.load_unet(path, ema=True).state_dict())
    for key in [key for key in ema if "output_blocks0" in key]:
        del ema[key]
    path = write_single(tmp_path / "half.safetensors", name, ema)
    assert (outputs(weights.load_unet(path), name) - expected).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="keys do not fit: missing"):
        weights.load_unet(path, ema=True)
    with pytest.raises(ValueError, match="--ema: contains no EMA copy"):
        weights.load_unet(tmp_path / "ema", ema=True)


def test_open_clip_text_encoder_gives_open_clips_features(tmp_path):
    """As HPSv2's open_clip computed them: q, k and v in one tensor, and a projection that multiplies from the right."""
    g, meta = golden("clip_open_clip_mini")
    c = json.loads(meta["config"])
    config = {"hidden_size": c["text_width"], "intermediate_size": c["text_mlp"], "hidden_act": "gelu"}
    config |= {"num_attention_heads": c["text_heads"], "num_hidden_layers": 3, "projection_dim": c["embed_dim"]}
    with torch.device("meta"):
        keys = CLIPTextModelWithProjection(CLIPTextConfig(**config)).state_dict()
    _, names = key_names.text_layouts(keys)[1]
    shapes = {names[key]: t for key, t in keys.items()}
    fused = {key: t.shape for key, t in key_names.fuse({"x." + k: t for k, t in shapes.items()}).items()}
    tensors = {key_names.CLIP_G + k[2:]: fill(k[2:], shape) for k, shape in fused.items()}
    tensors[key_names.CLIP_G + "logit_scale"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "x.safetensors", {"config": json.dumps({"text_encoder_2": config})})
    model = weights.load_clip(tmp_path / "x.safetensors", "text_encoder_2", "cpu", torch.float32)
    with torch.no_grad():
        assert (model(g["input_ids"]).text_embeds - g["text_features"]).abs().max() <= 1e-5


# A -> B -> A


@BOTH_SLOWLY
def test_folder_to_single_file_to_folder_is_equal(base, tmp_path):
    a, b = write_pipeline(tmp_path / "a", base), tmp_path / "b.safetensors"
    weights.save_unet(weights.load_unet(a), b, "single-file", base=a)
    for load in (weights.load_unet, weights.load_vae):
        assert same(load(a).state_dict(), load(b).state_dict())
    for component in MINI[base].keys() - {"unet", "vae"}:
        models = [weights.load_clip(place, component, "cpu", torch.float32) for place in (a, b)]
        assert same(models[0].state_dict(), models[1].state_dict())
    weights.save_unet(weights.load_unet(b), tmp_path / "c")
    assert same(weights.load_unet(a).state_dict(), weights.load_unet(tmp_path / "c").state_dict())


@BOTH_SLOWLY
def test_single_file_to_folder_to_single_file_is_equal(base, tmp_path):
    pipeline, a = write_pipeline(tmp_path / "pipeline", base), tmp_path / "a.safetensors"
    weights.save_unet(weights.load_unet(pipeline), a, "single-file", base=pipeline)
    weights.save_unet(weights.load_unet(a), tmp_path / "b")
    weights.save_unet(weights.load_unet(tmp_path / "b"), tmp_path / "c.safetensors", "single-file", base=a)
    assert same(load_file(a), load_file(tmp_path / "c.safetensors"))


@BOTH
def test_a_single_file_contains_exactly_the_official_names_and_shapes(base, tmp_path):
    pipeline = write_pipeline(tmp_path / "pipeline", base)
    weights.save_unet(weights.load_unet(pipeline), tmp_path / "x.safetensors", "single-file", base=pipeline)
    written = {key: list(t.shape) for key, t in load_file(tmp_path / "x.safetensors").items()}
    expected = SINGLE[f"unet_{base}_mini"] | SINGLE["vae_mini"]
    expected = {key: shape for key, shape in expected.items() if not re.search(r"transformer_blocks\.[2-9]", key)}
    assert {key: shape for key, shape in written.items() if key in expected} == expected
    text = [key for key in written if key not in expected]
    assert all(key.startswith((key_names.CLIP_L, key_names.CLIP_L_SDXL, key_names.CLIP_G)) for key in text)
    if base == "sdxl":
        assert written[key_names.CLIP_G + "transformer.resblocks.2.attn.in_proj_weight"] == [144, 48]
        assert written[key_names.CLIP_G + "text_projection"] == [48, 40]


@pytest.mark.parametrize("name", weights.DTYPES)
def test_written_type_and_metadata(name, tmp_path):
    pipeline = write_pipeline(tmp_path / "pipeline", "sd15")
    unet, dtype = weights.load_unet(pipeline), weights.DTYPES[name]
    for path, layout in ((tmp_path / "x.safetensors", "single-file"), (tmp_path / "unet", "diffusers")):
        weights.save_unet(unet, path, layout, dtype, {"modelspec.title": "mine"}, base=pipeline)
        read = weights.load_unet(path, dtype=dtype).state_dict()
        assert same(read, {key: t.to(dtype) for key, t in unet.state_dict().items()})
        file = path if path.is_file() else path / "diffusion_pytorch_model.safetensors"
        assert {t.dtype for t in load_file(file).values()} == {dtype}
        assert weight_files.read_metadata(file)["modelspec.title"] == "mine"
    metadata = weight_files.read_metadata(tmp_path / "x.safetensors")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.resolution"] == "512x512"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pipeline",
        "unet",
        "x.safetensors",
    ]  # nothing temporary


def test_a_compiled_unet_is_saved_under_its_own_names(tmp_path):
    unet = mini_unet("sd15")
    weights.save_unet(torch.compile(unet), tmp_path)
    assert same(weights.load_unet(tmp_path).state_dict(), unet.state_dict())


def test_training_on_memory_mapped_weights_does_not_change_the_file(tmp_path):
    pipeline = write_pipeline(tmp_path, "sd15")
    unet = weights.load_unet(pipeline)
    before = unet.conv_in.weight.detach().clone()
    with torch.no_grad():
        unet.conv_in.weight.add_(1)
    assert torch.equal(weights.load_unet(pipeline).conv_in.weight, before)


# folders


def test_a_component_alone_and_its_file_alone_are_read(tmp_path):
    pipeline = pipeline_of("sd15")
    expected = weights.load_unet(pipeline).state_dict()
    assert same(weights.load_unet(pipeline / "unet").state_dict(), expected)
    assert same(weights.load_unet(pipeline / "unet" / "diffusion_pytorch_model.safetensors").state_dict(), expected)
    assert same(weights.load_vae(pipeline / "vae").state_dict(), weights.load_vae(pipeline).state_dict())


def shard(folder: Path) -> None:
    """Cut a component's file in two, as the authors' SDXL models are."""
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names, index = sorted(tensors), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    whole.unlink()


def test_shards_are_read_and_a_missing_one_is_named(tmp_path):
    pipeline = write_pipeline(tmp_path, "sd15")
    expected = {key: t.clone() for key, t in weights.load_unet(pipeline).state_dict().items()}
    shard(pipeline / "unet")
    assert same(weights.load_unet(pipeline).state_dict(), expected)
    (pipeline / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json: names .*00002-of-00002.*1 of 2 shards"):
        weights.load_unet(pipeline)


@pytest.mark.parametrize("ending", [".fp16.safetensors", pytest.param(".bin", marks=pytest.mark.slow)])
def test_half_precision_variants_and_pickled_components_are_read(ending, tmp_path):
    pipeline = write_pipeline(tmp_path, "sd15")
    expected = {key: t.half() for key, t in weights.load_unet(pipeline).state_dict().items()}
    whole = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    whole.unlink()
    path = whole.with_name("diffusion_pytorch_model" + ending)
    save_file(expected, path) if ending.endswith("safetensors") else torch.save(expected, path)
    assert same(weights.load_unet(pipeline, dtype=torch.float16).state_dict(), expected)
    assert weights.load_unet(pipeline).conv_in.weight.dtype == torch.float32


@pytest.mark.parametrize("repo", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"])
def test_the_hubs_cache_is_read_without_the_hub(repo, tmp_path):
    place = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
    write_pipeline(place / "snapshots" / "abc", "sd15")
    expected = weights.load_unet(place / "snapshots" / "abc").state_dict()
    assert same(weights.load_unet("sd15").state_dict(), expected)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "older").mkdir()
    assert same(weights.load_unet(repo).state_dict(), expected)


def test_a_single_file_in_the_hubs_cache_is_read(tmp_path):
    folder = tmp_path / "cache" / "models--stabilityai--stable-diffusion-xl-base-1.0" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    write_single(folder / "sd_xl_base_1.0.safetensors", "unet_sdxl_mini")
    assert weights.find("sdxl", "unet").name == "sd_xl_base_1.0.safetensors"
    assert weights.load_unet("sdxl").config == unet_config(golden_config("unet_sdxl_mini"))


# what is published beside the base models


@pytest.mark.slow
def test_the_authors_folders_contain_both_unets(tmp_path):
    folder = write_pipeline(tmp_path / "authors", "sdxl")
    (folder / "unet").rename(folder / "original_unet")
    tuned = mini_unet("sdxl").state_dict()
    tuned["conv_out.bias"] = tuned["conv_out.bias"] + 1
    write_component(folder / "fine_tuned_unet", {"_class_name": KINDS[0]} | MINI["sdxl"]["unet"], tuned)
    shard(folder / "fine_tuned_unet")
    base, loaded = weights.load_tuned(folder, weights.own_base(folder))
    assert same(base.state_dict(), mini_unet("sdxl").state_dict())
    difference = outputs(loaded, "unet_sdxl_mini") - outputs(base, "unet_sdxl_mini")
    assert (difference - 1).abs().max() <= 1e-5
    assert same(weights.load_unet(folder).state_dict(), base.state_dict())
    other = write_pipeline(tmp_path / "other", "sdxl")  # the folder's own base UNet is preferred to another one
    rewrite(
        other / "unet" / "diffusion_pytorch_model.safetensors",
        lambda t: t.update({"conv_out.bias": t["conv_out.bias"] + 3}),
    )
    assert same(weights.load_tuned(folder, other)[0].state_dict(), base.state_dict())
    with pytest.raises(ValueError, match="takes text of width 80, the base 48"):
        weights.load_tuned(folder, pipeline_of("sd15"))


def test_the_base_of_the_authors_repository_is_the_repository(tmp_path, monkeypatch):
    """Not the folder in the cache, which has only the UNets until other components are requested."""
    (tmp_path / "original_unet").mkdir()
    monkeypatch.setattr(loading, "find", lambda source, component: tmp_path / "fine_tuned_unet")
    assert weights.own_base("ControlGenAI/ImageReFL_HPS_SD") == "ControlGenAI/ImageReFL_HPS_SD"
    assert weights.own_base(tmp_path) == str(tmp_path)


def write_vocabulary(folder: Path) -> None:
    """A vocabulary of letters; the end token has the largest id, where CLIP pools."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["!", *letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def sampled(folder: Path, *flags) -> torch.Tensor:
    """Pixels (0 to 255) of the image that the command generates."""
    size = ["--prompt", "fox", "--images-per-prompt", "1", "--steps", "2", "--switch", "1", "--resolution", "64"]
    size += ["--dtype", "float32"]
    sample.main(sample.parse_args([*map(str, flags), *size, "--output-dir", str(folder)]))
    return torch.tensor(list(Image.open(folder / "00000-1.png").tobytes()))


@pytest.mark.slow
@BOTH
def test_the_command_samples_the_same_from_every_form_of_the_same_weights(base, tmp_path):
    pipeline, single = write_pipeline(tmp_path / "pipeline", base), tmp_path / "single" / "x.safetensors"
    tokenizers = ["tokenizer"] + ["tokenizer_2"] * (base == "sdxl")
    for name in tokenizers:
        write_vocabulary(pipeline / name)
    unet = weights.load_unet(pipeline)
    for parameter in lora.add(unet, 2):
        parameter.data.copy_(fill("adapter", parameter.shape))
    lora.save(unet, tmp_path / "run")
    expected = sampled(tmp_path / "a", "--base", pipeline, "--checkpoint", tmp_path / "run")
    weights.save_unet(weights.load_unet(pipeline), single, "single-file", base=pipeline)
    write_vocabulary(single.parent / "tokenizer")
    hub = tmp_path / "cache" / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(pipeline, hub)
    shard(hub / "unet")
    images = [sampled(tmp_path / "b", "--base", single, "--checkpoint", tmp_path / "run")]
    images += [sampled(tmp_path / "c", "--base", "some/model", "--checkpoint", tmp_path / "run")]
    weights.save_unet(lora.merge(unet), hub / "fine_tuned_unet")
    (hub / "unet").rename(hub / "original_unet")  # this is how the authors publish theirs
    images += [sampled(tmp_path / "d", "--checkpoint", "some/model")]
    for image in images:
        assert (image - expected).abs().max() <= 1  # weights that lie elsewhere, or are merged, round otherwise
    other = sampled(tmp_path / "e", "--base", pipeline, "--checkpoint", pipeline / "unet")
    assert (other - expected).abs().max() > 1


def test_a_run_is_read_with_its_base(tmp_path):
    base = write_pipeline(tmp_path / "base", "sd15")
    weights.save_unet(weights.load_unet(base), tmp_path / "run" / "unet")
    assert weights.own_base(tmp_path / "run") is None
    first, second = weights.load_tuned(tmp_path / "run", base)
    assert first is not second
    assert torch.equal(outputs(first, "unet_sd15_mini"), outputs(second, "unet_sd15_mini"))


def test_a_run_of_another_base_is_refused_with_the_flag_that_fits(tmp_path):
    run = write_pipeline(tmp_path / "run", "sdxl")
    with pytest.raises(ValueError, match=r"run: takes text of width 80, the base 48; --base the folder"):
        weights.load_tuned(run, write_pipeline(tmp_path / "base", "sd15"))


# what diffusers makes of our files


@BOTH
def test_diffusers_reads_every_key_that_is_written(base, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pipeline = pipeline_of(base)
    unet, path = weights.load_unet(pipeline), tmp_path / "x.safetensors"
    weights.save_unet(unet, tmp_path / "unet")
    weights.save_unet(unet, path, "single-file", base=pipeline)
    kind = diffusers.UNet2DConditionModel
    theirs, info = kind.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert not any(info.values())
    alike = {"config": str(pipeline), "local_files_only": True}
    for model in (theirs, kind.from_single_file(str(path), subfolder="unet", **alike)):
        assert same(dict(model.state_dict()), dict(unet.state_dict()))
    vae = diffusers.AutoencoderKL.from_single_file(str(path), subfolder="vae", **alike)
    assert same(dict(vae.state_dict()), dict(weights.load_vae(pipeline).state_dict()))


# full size: minutes, and up to 24 GB on disk

LOAD = """
import json, sys, time, torch, weights
from safetensors.torch import load_file, save_file

def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

source, dtype, inputs, output = sys.argv[1:]
dtype, before, start = getattr(torch, dtype), memory("VmRSS"), time.time()
unet = weights.load_unet(source, dtype=dtype)
loaded = time.time() - start
x = {key: t.to(dtype) for key, t in load_file(inputs).items()}
with torch.no_grad():
    save_file({"eps": unet(x.pop("latents"), 500, **x).float()}, output)
size = sum(p.nbytes for p in unet.parameters())
print(json.dumps({"seconds": loaded, "peak / weights": (memory("VmHWM") - before) / size}))
"""


def run_full(source: Path, dtype: str, folder: Path, expected: torch.Tensor, tolerance: float) -> None:
    """Load and run in a fresh process; compare output and peak memory."""
    call = [sys.executable, "-c", LOAD, str(source), dtype, str(folder / "inputs"), str(folder / "output")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    difference = (load_file(folder / "output")["eps"] - expected).abs().max().item()
    print(f"\n{source.name} {dtype}: {report}, difference {difference:.1e}")
    assert difference <= tolerance
    assert report["peak / weights"] <= 1.15


# bytes: a pipeline in float32 beside a single file of it; the sdxl UNet alone beside its two shards is 20e9
FULL_SIZE_DISK = {"sd15": 9e9, "sdxl": 29e9}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_full_size_loads_from_every_layout_and_computes_what_diffusers_does(base, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    if shutil.disk_usage(tmp_path).free < FULL_SIZE_DISK[base]:
        pytest.skip(f"{base} at full size needs {FULL_SIZE_DISK[base] / 1e9:.0f} GB of disk")
    config = {"sd15": unets.SD15, "sdxl": unets.SDXL}[base]
    keys = FOLDERS[f"{base}_unet"]
    x = {"latents": rnd("latents", 1, 4, 16, 8), "context": rnd("context", 1, 77, config.context)}
    if base == "sdxl":
        x |= {"pooled": rnd("pooled", 1, 1280), "time_ids": torch.tensor([[128.0, 64, 0, 0, 128, 64]])}
    save_file(x, tmp_path / "inputs")
    try:
        unet = tmp_path / "pipeline" / "unet"
        write_component(unet, {"_class_name": KINDS[0]} | unet_dict(config), {k: fill(k, s) for k, s in keys.items()})
        with torch.device("meta"):
            theirs = diffusers.UNet2DConditionModel.from_config(unet_dict(config)).eval()
        theirs.load_state_dict(load_file(unet / "diffusion_pytorch_model.safetensors"), assign=True)
        added = {"text_embeds": x["pooled"], "time_ids": x["time_ids"]} if base == "sdxl" else None
        with torch.no_grad():
            expected = theirs(x["latents"], 500, x["context"], added_cond_kwargs=added).sample
        del theirs
        run_full(unet, "float32", tmp_path, expected, 1e-4)
        run_full(unet, "bfloat16", tmp_path, expected, 0.1)
        shard(unet)
        run_full(unet, "float32", tmp_path, expected, 1e-4)
        write_others(unet.parent, base)
        single = tmp_path / "single.safetensors"
        call = ["convert", unet.parent, single, "--layout", "single-file"]
        assert command(*call).returncode == 0
        written = {key: list(t.shape) for key, t in weight_files.read_file(single).items()}
        official = SINGLE[f"{base}_unet"] | SINGLE["vae"]
        assert {key: written[key] for key in official} == official
        shutil.rmtree(unet.parent)
        run_full(single, "float32", tmp_path, expected, 1e-4)
        if base == "sd15":
            torch.save({"state_dict": weight_files.read_file(single)}, tmp_path / "single.ckpt")
            single.unlink()
            run_full(tmp_path / "single.ckpt", "float32", tmp_path, expected, 1e-4)
    finally:
        shutil.rmtree(tmp_path)


def write_others(pipeline: Path, base: str) -> None:
    """The autoencoder and the text encoders of a base at full size, by the recipe."""
    vae = vaes.SDXL if base == "sdxl" else vaes.SD15
    tensors = {key: fill(key, shape) for key, shape in FOLDERS["vae"].items()}
    write_component(pipeline / "vae", {"_class_name": KINDS[1]} | vae_dict(vae), tensors)
    for component, keys, kind, config in (
        ("text_encoder", "clip_l_text", "CLIPTextModel", loading.CLIP_L),
        ("text_encoder_2", "open_clip_g_text", "CLIPTextModelWithProjection", loading.CLIP_G),
    )[: 1 + (base == "sdxl")]:
        tensors = {key: fill(key, shape) for key, shape in FOLDERS[keys].items()}
        write_component(pipeline / component, {"architectures": [kind]} | config, tensors, "model")


# errors


def message(source, load=weights.load_unet) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_unexpected_and_misshaped_keys_are_named_and_counted(tmp_path):
    place = write_pipeline(tmp_path, "sd15") / "unet"
    path = place / "diffusion_pytorch_model.safetensors"
    rewrite(path, lambda t: t.update(stranger=torch.zeros(1)))
    assert "1 keys do not fit: unexpected stranger" in message(place)
    rewrite(path, lambda t: (t.pop("stranger"), t.pop("conv_in.bias"), t.update({"conv_out.bias": torch.zeros(7)})))
    assert "2 keys do not fit: missing conv_in.bias; conv_out.bias has shape (7,) instead of (4,)" in message(place)


def test_an_unexpected_key_in_a_component_of_a_single_file_is_refused(tmp_path):
    extra = {"model.diffusion_model.middle_block.9.weight": torch.zeros(1)}
    path = write_single(tmp_path / "x.safetensors", "unet_sd15_mini", extra)
    assert "1 keys do not fit: unexpected middle_block.9.weight" in message(path)
    assert weights.load_vae(path)


def test_a_file_of_another_base_is_refused_with_the_flag_that_fits(tmp_path):
    place = write_pipeline(tmp_path, "sd15") / "unet"
    save_file(mini_unet("sdxl").state_dict(), place / "diffusion_pytorch_model.safetensors")
    assert message(place).endswith("looks like an SDXL UNet; --base sdxl")
    (tmp_path / "refiner.safetensors").touch()
    save_file({"conditioner.embedders.0.model.ln_final.bias": torch.zeros(1)}, tmp_path / "refiner.safetensors")
    assert "the SDXL refiner, which is not supported" in message(tmp_path / "refiner.safetensors")


@pytest.mark.parametrize("file", ["evil.pth", "evil_plain.ckpt"])
def test_hostile_pickles_are_refused_and_leave_no_trace(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (weights.load_unet, weights.load_vae, weights.load_text, weights.read_file):
        text = message(GOLDEN / file, load)
        assert f"{file}: refused" in text and "Unsupported global: GLOBAL open was not an allowed" in text
        assert "succeed" not in text and "\x1b" not in text  # torch's advice to run it in spite of that
    shutil.copy(GOLDEN / file, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"} | MINI["sd15"]["unet"]))
    assert "refused" in message(tmp_path)
    assert sorted(os.listdir()) == ["config.json", "diffusion_pytorch_model.bin"]


def test_a_checkpoint_that_names_its_trainers_callback_is_read_without_it(tmp_path):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = type(sys)(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    added = {name: module, "pytorch_lightning.callbacks": type(sys)("callbacks"), "pytorch_lightning": type(sys)("x")}
    sys.modules |= added
    try:
        torch.save(
            {"state_dict": {"x": torch.ones(2)}, "callbacks": {module.ModelCheckpoint: {"best": 1}}},
            tmp_path / "x.ckpt",
        )
    finally:
        for key in added:
            del sys.modules[key]
    assert torch.equal(weights.read_file(tmp_path / "x.ckpt")["x"], torch.ones(2))


def test_damaged_and_incomplete_folders_give_one_clear_line(tmp_path):
    place = write_pipeline(tmp_path, "sd15") / "unet"
    path = place / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a whole safetensors file" in message(place)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "a Git LFS pointer" in message(place)
    path.unlink()
    assert "no weights; put diffusion_pytorch_model.safetensors" in message(place)
    (place / "config.json").write_text("{")
    assert "config.json: not JSON" in message(place)
    (place / "config.json").unlink()
    assert "unet: no config.json" in message(tmp_path)
    assert "no such file or folder" in message(tmp_path / "nowhere")
    assert "vae: no unet/config.json" in message(tmp_path / "vae")


@pytest.mark.parametrize("source", ["sd15", "sdxl", "ControlGenAI/ImageReFL_HPS_SD"])
def test_a_base_without_weights_says_what_to_get_and_where_to_put_it(source):
    text = message(source)
    for part in (
        weight_files.BASES.get(source, source),
        "unet/",
        "text_encoder",
        "HF_HUB_OFFLINE",
        weight_files.SINGLE.get(weight_files.BASES.get(source), ""),
    ):
        assert part in text


def test_sdxls_autoencoder_is_refused_in_float16(tmp_path):
    config = {"_class_name": "AutoencoderKL"} | golden_config("vae_mini") | {"scaling_factor": 0.13025}
    write_component(tmp_path, config, filled(VAE(vae_config(config))).state_dict())
    assert weights.load_vae(tmp_path, dtype=torch.bfloat16).config.scale == 0.13025
    with pytest.raises(ValueError, match="overflows in float16"):
        weights.load_vae(tmp_path, dtype=torch.float16)


# the command


def command(*arguments) -> subprocess.CompletedProcess:
    call = [sys.executable, str(ROOT / "weights.py"), *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.mark.slow
def test_convert_writes_and_inspect_describes(tmp_path):
    pipeline, path = pipeline_of("sdxl"), tmp_path / "x.safetensors"
    call = ["convert", str(pipeline), str(path), "--layout", "single-file", "--dtype", "fp16"]
    weights.main(weights.parse_args(call))
    assert same(
        weights.load_unet(path).state_dict(),
        {k: t.half().float() for k, t in weights.load_unet(pipeline).state_dict().items()},
    )
    text = command("inspect", path).stdout
    assert (
        "an SDXL single file" in text
        and "float16" in text
        and "modelspec.architecture: stable-diffusion-xl-v1-base" in text
    )


def test_an_adapter_is_merged_into_its_base(tmp_path):
    pipeline = write_pipeline(tmp_path / "pipeline", "sd15")
    unet = weights.load_unet(pipeline)
    for parameter in lora.add(unet, 2):
        parameter.data.copy_(fill("adapter", parameter.shape))
    lora.save(unet, tmp_path / "run")
    weights.convert(tmp_path / "run", tmp_path / "merged", "diffusers", torch.float32, str(pipeline))
    difference = outputs(weights.load_unet(tmp_path / "merged"), "unet_sd15_mini") - outputs(unet, "unet_sd15_mini")
    assert difference.abs().max() <= 1e-4
    with pytest.raises(ValueError, match="an adapter needs --base"):
        weights.convert(tmp_path / "run", tmp_path / "x", "kohya", torch.float32, None)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"args": {"base": str(pipeline)}}))  # as train.py leaves it
    weights.convert(tmp_path / "run", tmp_path / "x.safetensors", "single-file", torch.float32, None)
    assert same(
        weights.load_unet(tmp_path / "x.safetensors").state_dict(), weights.load_unet(tmp_path / "merged").state_dict()
    )
    assert weights.load_vae(tmp_path / "x.safetensors")


def test_an_adapter_is_converted_to_kohyas_names_and_back(tmp_path):
    pipeline = pipeline_of("sdxl")
    unet = weights.load_unet(pipeline)
    for parameter in lora.add(unet, 2, alpha=1.0):
        parameter.data.copy_(fill("adapter", parameter.shape))
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    lora.save(unet, a)
    for source, path, layout, dtype in ((a, b, "kohya", "fp16"), (b, c, "peft", "fp32")):
        call = ["convert", source, path, "--base", pipeline, "--layout", layout, "--dtype", dtype]
        weights.main(weights.parse_args([str(part) for part in call]))
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.alpha" in load_file(b)
    assert same(load_file(c), {key: t.half().float() for key, t in load_file(a).items()})
    assert len({weight_files.read_metadata(path)["lora_adapter_metadata"] for path in (a, c)}) == 1


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    from utils import cli

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    for arguments in (
        ["inspect", tmp_path / "nowhere"],
        ["inspect", GOLDEN / "evil.pth"],
        ["convert", tmp_path / "x.safetensors", tmp_path / "y"],
        ["convert", tmp_path / "x.safetensors"],
        ["convert", pipeline_of("sd15"), tmp_path / "y", "--layout", "single-file"],
        ["convert", pipeline_of("sd15"), tmp_path / "y.safetensors"],
        ["convert", pipeline_of("sd15"), tmp_path / "y", "--layout", "kohya"],
        ["convert", tmp_path / "x.safetensors", tmp_path / "y", "--dtype", "fp8"],
    ):
        with pytest.raises(SystemExit) as left:
            cli.run(weights.main, weights.parse_args([str(a) for a in arguments]))
        out, error = capsys.readouterr()
        assert left.value.code == 2 and error.count("\n") == 1 and out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
