"""Weight files as people have them: what is marked as another kind of model, EMA copies, damaged values and configs."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import hub
import pytest
import torch
from hub import COMMIT, use
from safetensors.torch import load_file, save_file
from test_adapter_files import CONFIGS, kohya_tensors, mini, pairs

import weights
from pretrained import key_names, weight_files
from pretrained.configs import vae_config
from vae import VAE

SD = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def pipeline(folder: Path, scheduler: dict | None = None, base: str = "sd15", **config) -> Path:
    """A pipeline folder with a UNet and a scheduler; config: changed settings of the UNet."""
    (folder / "unet").mkdir(parents=True)
    settings = {"_class_name": "UNet2DConditionModel"} | CONFIGS[base] | config
    (folder / "unet" / "config.json").write_text(json.dumps(settings))
    save_file(mini(base).state_dict(), folder / "unet" / WEIGHTS)
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def single(path: Path, extra: dict | None = None, header: dict | None = None, base: str = "sd15") -> Path:
    """The UNet of a single file (LDM or SGM names), its sizes in the header."""
    unet = mini(base)
    tensors = {key_names.UNET + key_names.unet_name(k, unet.config): t for k, t in unet.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"config": json.dumps({"unet": CONFIGS[base]})}
    save_file(tensors | (extra or {}), path, config | (header or {}))
    return path


def message(source, load=weights.load_unet) -> str:
    """The one-line error of loading a source."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# models that do not predict the noise, or not on SD's schedule


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type v_prediction"),
        ({"prediction_type": "sample"}, "prediction_type sample"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
        ({"beta_schedule": "linear"}, "beta_schedule linear"),
        ({"beta_end": 0.02}, "beta_end 0.02"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": None}, "beta_schedule None"),
    ],
)
def test_other_schedulers_of_a_folder_are_refused(change, named, tmp_path):
    source = pipeline(tmp_path / "model", SD | change)
    for place in (source, source / "unet", source / "unet" / WEIGHTS):
        assert f"scheduler_config.json: {named}" in message(place)


def test_sds_own_schedulers_are_accepted(tmp_path):
    settings = {"prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None}
    for i, kind in enumerate(("PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")):
        assert weights.load_unet(pipeline(tmp_path / str(i), SD | settings | {"_class_name": kind}))


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    ("extra", "header", "named"),
    [
        (["v_pred", "ztsnr"], {}, "v_prediction"),
        (["ztsnr"], {}, "a zero-SNR schedule"),
        (["edm_vpred.sigma_max"], {}, "v_prediction"),
        (["edm_mean", "edm_std"], {}, "EDM"),
        ([], {"modelspec.prediction_type": "v"}, "modelspec.prediction_type"),
        ([], {"modelspec.prediction_type": "v_prediction"}, "modelspec.prediction_type"),
        ([], {"modelspec.predict_key": "v"}, "modelspec.predict_key"),
    ],
)
def test_marks_of_a_single_file_are_refused(base, extra, header, named, tmp_path):
    path = single(tmp_path / "x.safetensors", {key: torch.zeros(1) for key in extra}, header, base)
    assert named in message(path) and "only noise prediction" in message(path)
    with pytest.raises(ValueError, match="only noise prediction"):  # convert would write epsilon into its header
        weights.convert(str(path), str(tmp_path / "out"), "diffusers", torch.float32, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        'params:\n  parameterization: "v"\n',
        "params:\n  parameterization: v # as SD2\n",
        "params:\n  linear_start: 0.0001\n",
        "scaling_config:\n  target: sgm.modules.diffusionmodules.denoiser_scaling.VScalingWithEDMcNoise\n",
    ],
)
def test_a_yaml_next_to_a_file_is_read(text, tmp_path):
    path = single(tmp_path / "x.safetensors")
    path.with_suffix(".yaml").write_text(text)
    assert "x.yaml: " in message(path) and "only noise prediction" in message(path)
    path.with_suffix(".yaml").write_text('params:\n  parameterization: "eps"\n  linear_start: 0.00085\n# v: "v"\n')
    assert weights.load_unet(path)


def test_a_scheduler_folder_next_to_a_file_is_read(tmp_path):
    path = single(tmp_path / "x.safetensors")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD | {"prediction_type": "v_prediction"}))
    assert "prediction_type v_prediction" in message(path)


def test_an_adapter_of_a_v_prediction_model_is_refused(tmp_path):
    base, path = pipeline(tmp_path / "base", SD), tmp_path / "adapter.safetensors"
    save_file(kohya_tensors(pairs(), 1.0), path, {"modelspec.prediction_type": "v"})
    assert "prediction_type v" in message(path, lambda source: weights.load_tuned(source, base))


@contextlib.contextmanager
def served(monkeypatch, repository: Path):
    """A stand-in for the hub with one repository, some/model."""
    place = repository.parent / "served" / "models" / "some" / "model"
    if not place.is_symlink():
        place.parent.mkdir(parents=True)
        place.symlink_to(repository)
    with hub.serving(repository.parent / "served") as server:
        use(server.url, repository.parent / "cache", monkeypatch)
        yield


def test_a_downloaded_repository_is_checked_by_its_scheduler(tmp_path, monkeypatch):
    repository = pipeline(tmp_path / "repository", SD | {"prediction_type": "v_prediction"})
    with served(monkeypatch, repository):
        assert "prediction_type v_prediction" in message("some/model")


def test_a_repository_cached_without_its_scheduler_is_checked_all_the_same(tmp_path, monkeypatch, capsys):
    """ComfyUI and others download a UNet alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "models--some--model" / "snapshots" / COMMIT
    shutil.copytree(pipeline(tmp_path / "repository", SD | {"prediction_type": "v_prediction"}), cached)
    shutil.rmtree(cached / "scheduler")
    weights.load_unet("some/model")
    assert "some/model: its scheduler/ is not in the hub's cache" in capsys.readouterr().err
    weight_files.fetch_scheduler.cache_clear()
    with served(monkeypatch, tmp_path / "repository"):
        assert "prediction_type v_prediction" in message("some/model")


# damaged values and configs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinite_weights_are_refused_by_name(value, tmp_path):
    tensors = load_file(pipeline(tmp_path / "model") / "unet" / WEIGHTS)
    tensors["mid_block.attentions.0.proj_out.weight"][0, 0] = value
    save_file(tensors, tmp_path / "model" / "unet" / WEIGHTS)
    text = message(tmp_path / "model")
    assert "unet: mid_block.attentions.0.proj_out.weight contains NaN or infinite values" in text
    adapters = kohya_tensors(pairs(), 1.0)
    adapters[next(key for key in adapters if "up" in key)][0, 0] = value
    save_file(adapters, tmp_path / "adapter.safetensors")
    base = pipeline(tmp_path / "base")
    text = message(tmp_path / "adapter.safetensors", lambda source: weights.load_tuned(source, base))
    assert "adapter.safetensors: the adapter of down_blocks" in text and "NaN" in text


def write_vae(path: Path, config: dict | None) -> Path:
    settings = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    with torch.device("meta"):
        vae = VAE(vae_config(settings))
    path.parent.mkdir(parents=True)
    save_file({key: torch.zeros(t.shape) for key, t in vae.state_dict().items()}, path)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(settings | config))
    return path


def test_an_autoencoder_alone_has_the_scale_of_its_config_and_none_without(tmp_path):
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}
    path = write_vae(tmp_path / "a" / "sdxl_vae.safetensors", config)
    assert weights.load_vae(path).config.scale == 0.13025
    text = message(write_vae(tmp_path / "b" / "sdxl_vae.safetensors", None), weights.load_vae)
    assert "does not say its scaling factor" in text and "config.json" in text
    path = write_vae(tmp_path / "c" / "vae.safetensors", config | {"scaling_factor": None})
    assert "config.json: scaling_factor None is not a positive number" in message(path, weights.load_vae)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"norm_eps": 0.1}, "norm_eps = 0.1"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos = False"),
        ({"freq_shift": 1}, "freq_shift = 1"),
        ({"center_input_sample": True}, "center_input_sample = True"),
        ({"mid_block_scale_factor": 2.0}, "mid_block_scale_factor = 2.0"),
        ({"timestep_post_act": "silu"}, "timestep_post_act = silu"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn = silu"),
        ({"act_fn": "gelu"}, "act_fn = gelu"),
        ({"in_channels": 9}, "in_channels 9: an inpainting UNet"),
        ({"_class_name": "UNet2DModel"}, "a config of UNet2DModel"),
        ({"attention_head_dim": None}, "attention_head_dim None"),
        ({"block_out_channels": None}, "block_out_channels is None"),
        ({"block_out_channels": 8}, "block_out_channels is 8"),
        ({"layers_per_block": [1, 2, 1]}, r"layers_per_block is [1, 2, 1]"),
        ({"cross_attention_dim": {"a": 1}}, "cross_attention_dim is {'a': 1}"),
        ({"transformer_layers_per_block": [[2], [1], 1]}, "transformer_layers_per_block [[2], [1], 1]"),
        ({"down_block_types": "DownBlock2D"}, "down_block_types DownBlock2D"),
        ({"norm_num_groups": "4"}, "norm_num_groups is '4'"),
    ],
)
def test_settings_of_a_unet_that_are_not_built_or_damaged_are_refused(change, named, tmp_path):
    text = message(pipeline(tmp_path / "model", **change))
    assert "unet/config.json: " in text and named in text


def test_settings_that_mean_the_same_and_missing_ones_are_accepted(tmp_path):
    same = {"act_fn": "swish", "layers_per_block": [1, 1, 1], "cross_attention_dim": [48] * 3, "upcast_attention": True}
    source = pipeline(tmp_path / "model", only_cross_attention=[False] * 3, **same)
    config = json.loads((source / "unet" / "config.json").read_text())
    (source / "unet" / "config.json").write_text("\ufeff" + json.dumps(config), encoding="utf-8")  # a byte order mark
    assert weights.load_unet(source).config == mini().config
    minimal = {
        key: value for key, value in config.items() if key not in ("_class_name", "sample_size", "upcast_attention")
    }
    (source / "unet" / "config.json").write_text(json.dumps(minimal))
    assert weights.load_unet(source).config.layers == 1


def test_a_tokenizer_json_alone_is_the_repositorys_own_tokenizer(tmp_path):
    from transformers import CLIPTokenizer

    text, cache = tmp_path / "text_encoder", tmp_path / "cache" / "models--openai--clip-vit-large-patch14"
    tiny = Path(weight_files.BASES["tiny"])
    shutil.copytree(tiny / "tokenizer", cache / "snapshots" / "abc")
    shutil.copytree(tiny / "text_encoder", text)
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "tokenizer" / name).unlink(missing_ok=True)
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    assert weight_files.find_tokenizer(text, "tokenizer") == tmp_path / "tokenizer"
    (tmp_path / "tokenizer" / "tokenizer_config.json").unlink()
    loaded = weights.load_text(tmp_path)
    assert torch.equal(
        loaded(["a red fox"], (64, 64))["context"], weights.load_text("tiny")(["a red fox"], (64, 64))["context"]
    )


# names, suffixes, wrappers and variants


@pytest.mark.parametrize("ending", [".fp16.safetensors", ".bin", ".fp16.bin"])
def test_a_hub_repository_with_only_half_precision_or_pickles_is_downloaded(ending, tmp_path, monkeypatch):
    repository = pipeline(tmp_path / "repository", SD)
    path = repository / "unet" / WEIGHTS
    tensors = {key: t.half() if "fp16" in ending else t for key, t in load_file(path).items()}
    path.unlink()
    path = repository / "unet" / ("diffusion_pytorch_model" + ending)
    save_file(tensors, path) if ending.endswith("safetensors") else torch.save(tensors, path)
    with served(monkeypatch, repository):
        assert torch.equal(weights.load_unet("some/model").conv_in.weight, tensors["conv_in.weight"].float())


@pytest.mark.parametrize("name", ["x.sft", "x.SAFETENSORS", "x.ckpt", "x.safetensors"])
def test_a_file_is_read_by_its_content_whatever_its_suffix(name, tmp_path):
    path = single(tmp_path / name)
    assert torch.equal(weights.load_unet(path).conv_in.weight, mini().conv_in.weight)
    assert torch.equal(weights.load_unet(tmp_path).conv_in.weight, mini().conv_in.weight)
    torch.save({"state_dict": load_file(path)}, tmp_path / "y")
    shutil.move(tmp_path / "y", path)  # a pickle named like this
    assert weights.read_file(path).keys() == load_file(single(tmp_path / "z.safetensors")).keys()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "unet."])
def test_wrappers_of_training_scripts_are_removed(prefix, tmp_path):
    path = pipeline(tmp_path / "model") / "unet" / WEIGHTS
    tensors = {prefix + key: t for key, t in load_file(path).items()}
    save_file(tensors, path)
    assert torch.equal(weights.load_unet(tmp_path / "model").conv_in.weight, mini().conv_in.weight)
    path.unlink()
    torch.save({"model": tensors, "step": 3}, path.with_name("diffusion_pytorch_model.bin"))
    assert torch.equal(weights.load_unet(tmp_path / "model").conv_in.weight, mini().conv_in.weight)


def test_a_unet_with_comfyuis_prefix_is_read(tmp_path):
    path = single(tmp_path / "x.safetensors", base="sdxl")
    tensors = {key.removeprefix("model."): t for key, t in load_file(path).items()}
    save_file(tensors, path, {"config": json.dumps({"unet": CONFIGS["sdxl"]})})
    assert torch.equal(weights.load_unet(path).conv_in.weight, mini("sdxl").conv_in.weight)
    assert key_names.identify(tensors) == "an SDXL UNet; --base sdxl"


def test_training_tensors_of_an_autoencoder_file_are_left_out(tmp_path):
    path = write_vae(tmp_path / "a" / "vae.safetensors", {"_class_name": "AutoencoderKL"})
    extra = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_file(load_file(path) | extra, path)
    assert weights.load_vae(path)
    save_file(load_file(path) | {"stranger": torch.zeros(1)}, path)
    assert "1 keys do not fit: unexpected stranger" in message(path, weights.load_vae)


@pytest.mark.parametrize("source", ["text_encoder", "text_encoder_2"])
def test_components_that_a_file_lacks_are_named(source, tmp_path):
    path = single(tmp_path / "x.safetensors")
    assert "contains no autoencoder" in message(path, weights.load_vae)
    assert "contains no text encoder" in message(path, lambda p: weights.load_clip(p, source, "cpu", torch.float32))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page, not weights"),
        (b"Invalid username or password.", "text, not weights ('Invalid username or password.')"),
        (b'{"error": "Access to model is restricted"}', "text, not weights"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
    ],
)
def test_what_a_site_sends_instead_of_a_file_is_named(content, named, tmp_path):
    for name in ("x.safetensors", "x.ckpt"):
        (tmp_path / name).write_bytes(content)
        assert named in message(tmp_path / name, weights.read_file)


def test_an_adapter_as_a_base_is_told_where_it_belongs_and_as_a_checkpoint_is_not(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(kohya_tensors(pairs(), 1.0), path)
    assert "name it with --checkpoint" in message(path)
    save_file(kohya_tensors(pairs(), 1.0) | {"stranger.lora_down.weight": torch.zeros(1)}, path)
    base = pipeline(tmp_path / "base")
    assert "--checkpoint" not in message(path, lambda source: weights.load_tuned(source, base))


def test_every_row_of_the_manual_names_a_test():
    """docs/weights.md: each row of what is read and what is refused names tests that exist."""
    root = Path(__file__).parent.parent
    tables = (root / "docs" / "weights.md").read_text(encoding="utf-8").partition("## What is read")[2]
    rows = [line for line in tables.splitlines() if line.startswith("| ") and "held by" not in line]
    tests = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("test_*.py"))
    assert len(rows) > 20
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.split("|")[-2])
        assert names and all(f"def {name}(" in tests for name in names), row
