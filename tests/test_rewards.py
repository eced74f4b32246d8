"""Reward models against the numbers of their original code (`tests/golden/`), and the properties training needs.

    python tests/test_rewards.py FOLDER     writes a mini CLIP folder that `--reward pickscore` can load

Golden weights are made from their own key names by `fill`; how is told in the metadata of each golden file.
`clip_merges.txt.gz` is the used part of OpenAI CLIP's vocabulary (MIT), `bert_vocab.txt.gz` that of bert-base-uncased
(Apache-2.0).
"""

import csv
import gzip
import hashlib
import json
import math
import shutil
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BlipConfig, CLIPConfig, CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

import rewards
from pretrained import mps, preprocess, reward_commands, reward_files
from pretrained import reward_networks as models

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
CLOSE = {"rtol": 0, "atol": 1e-5}


def rnd(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def fill(key: str, shape) -> torch.Tensor:
    """One tensor of a made-up checkpoint, from its own key."""
    if key.endswith("inv_freq"):
        return 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
    if "cross_model" in key and key.endswith("norm.bias"):
        return torch.zeros(*shape)
    if len(shape) == 0:
        return torch.tensor(2.0)
    t = rnd(key, *shape)
    if len(shape) == 1:
        return 1 + 0.1 * t if key.endswith("weight") else 0.05 * t
    return t / math.sqrt(math.prod(shape[1:]))


# ------------------------------------------------------------------------------ made-up checkpoints in original keys


def clip_config(act="gelu", vocabulary=49408, joint=32) -> CLIPConfig:
    layers = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": act}
    text = {"hidden_size": 48, "intermediate_size": 192, "vocab_size": vocabulary}
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    vision = {"hidden_size": 64, "intermediate_size": 256, "image_size": 56, "patch_size": 14}
    return CLIPConfig(text_config={**text, **layers}, vision_config={**vision, **layers}, projection_dim=joint)


def blip_config(vocabulary=30524) -> BlipConfig:
    layers = {"num_hidden_layers": 3, "num_attention_heads": 4}
    vision = {"hidden_size": 64, "intermediate_size": 256, "image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6}
    text = {"hidden_size": 48, "intermediate_size": 96, "encoder_hidden_size": 64, "vocab_size": vocabulary}
    text = {**text, "is_decoder": True, "pad_token_id": 0}
    return BlipConfig(vision_config={**vision, **layers}, text_config={**text, **layers}, mlp_widths=[64, 32, 16, 8])


def open_clip_state(vocabulary=49408) -> dict[str, torch.Tensor]:
    """A mini CLIP in the keys of open_clip, which are OpenAI's."""
    shapes = {"positional_embedding": (77, 48), "text_projection": (48, 32), "logit_scale": ()}
    shapes |= {"token_embedding.weight": (vocabulary, 48), "ln_final.weight": (48,), "ln_final.bias": (48,)}
    shapes |= {"visual.class_embedding": (64,), "visual.positional_embedding": (17, 64), "visual.proj": (64, 32)}
    shapes |= {"visual.conv1.weight": (64, 3, 14, 14)}
    shapes |= {f"visual.ln_{end}.{kind}": (64,) for end in ("pre", "post") for kind in ("weight", "bias")}
    for tower, w in (("visual.transformer", 64), ("transformer", 48)):
        for block in (f"{tower}.resblocks.{n}." for n in range(3)):
            shapes |= {block + "attn.in_proj_weight": (3 * w, w), block + "attn.in_proj_bias": (3 * w,)}
            linear = {"attn.out_proj": (w, w), "mlp.c_fc": (4 * w, w), "mlp.c_proj": (w, 4 * w)}
            shapes |= {f"{block}{name}.weight": shape for name, shape in linear.items()}
            shapes |= {f"{block}{name}.bias": shape[:1] for name, shape in linear.items()}
            shapes |= {f"{block}{ln}.{kind}": (w,) for ln in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    return {key: fill(key, shape) for key, shape in shapes.items()}


def imagereward_state(vocabulary=30524) -> dict[str, torch.Tensor]:
    """A mini ImageReward in its own keys: the full-size list with smaller sizes."""
    small = {1024: 64, 768: 48, 3072: 192, 4096: 256, 197: 17, 30524: vocabulary, 256: 32}
    out = {}
    for key, shape in json.loads((GOLDEN / "keys_rewards_full.json").read_text())["imagereward_v1"].items():
        block = next((int(part) for part in key.split(".")[:5] if part.isdigit() and not key.startswith("mlp")), 0)
        if key.endswith("position_ids"):
            out[key] = torch.arange(512)[None]
        elif key.startswith("mlp.layers."):
            sizes = dict(zip((0, 2, 4, 6, 7), ((64, 48), (32, 64), (16, 32), (8, 16), (1, 8)), strict=True))
            shape = sizes[int(key.split(".")[2])][: len(shape)]
            out[key] = fill(key, shape)
        elif block < 3:
            shape = [small.get(n, n) for n in shape]
            if "text_encoder" in key and "attention" not in key:  # this mini's text feed-forward is 2 wide, not 4
                shape = [96 if n == 192 else n for n in shape]
            out[key] = fill(key, shape)
    return out


def mps_state(vocabulary=49408) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        network = models.MPS(clip_config(vocabulary=vocabulary, joint=128))
    return {key: fill(key, value.shape) for key, value in network.state_dict().items()}


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def filled(network_type, config, name, state, **options):
    with torch.device("meta"):
        network = network_type(config, **options)
    return models.load_strict(network, models.rename(name, state), "golden")


# ----------------------------------------------------------------------------------------- mini folders for `load`


def write_vocabulary(folder: Path) -> int:
    """A CLIP vocabulary of bytes without merges: 256 letters, 256 word ends, start, end."""
    ordinary = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(n) for n in ordinary] + [chr(256 + n) for n in range(256 - len(ordinary))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return len(tokens)


def write_clip_folder(folder: Path) -> Path:
    """A mini CLIPModel folder as `tiny/rewards/` has them: config.json, half precision weights, tokenizer/."""
    config = clip_config(vocabulary=write_vocabulary(folder / "tokenizer"))
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in CLIPModel(config).state_dict().items()}
    state = {key: fill(key, shape).half() for key, shape in shapes.items()}
    state["logit_scale"] = torch.tensor(math.log(100)).half()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Scripted(torch.nn.Module):
    """A TorchScript archive with OpenAI's keys: a tree of modules that hold the tensors, and three sizes."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        children = {}
        for key, value in state.items():
            head, _, tail = key.partition(".")
            if tail:
                children.setdefault(head, {})[tail] = value
            else:
                self.register_buffer(head, value)
        for name, child in children.items():
            self.add_module(name, Scripted(child))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder per reward, with a file of the kind and with the keys that its authors publish."""
    root = tmp_path_factory.mktemp("rewards")
    out = {name: root / name for name in ("hpsv2.1", "clipscore", "pickscore", "imagereward", "mps")}
    entries = 514
    for name in ("hpsv2.1", "clipscore", "mps"):
        write_vocabulary(out[name])
        joint = 128 if name == "mps" else 32
        act = "quick_gelu" if name == "clipscore" else "gelu"
        clip_config(act, entries, joint).save_pretrained(out[name])
    state = open_clip_state(entries)
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, out["hpsv2.1"] / "HPS_v2.1_compressed.pt")
    sizes = {"input_resolution": torch.tensor(56), "context_length": torch.tensor(77)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Scripted({**state, **sizes})).save(out["clipscore"] / "ViT-B-32.pt")
    save_file(mps_state(entries), out["mps"] / "model.safetensors")
    write_clip_folder(out["pickscore"])
    out["imagereward"].mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "red", "fox"]
    (out["imagereward"] / "vocab.txt").write_text("\n".join(words) + "\n")
    blip_config(len(words) + 2).save_pretrained(out["imagereward"])
    torch.save(imagereward_state(len(words) + 2), out["imagereward"] / "ImageReward.pt")
    return out


@pytest.fixture(scope="module")
def loaded(folders):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # none of the files has the official digest
        return {name: rewards.load(name, folder) for name, folder in folders.items()}


NAMES = ("hpsv2.1", "clipscore", "pickscore", "imagereward", "mps")
each_reward = pytest.mark.parametrize("name", NAMES)


def pictures(batch: int, height=40, width=40) -> torch.Tensor:
    return rnd("pictures", 3, 3, height, width)[:batch].mul(0.3).clamp(-0.9, 0.9)


# --------------------------------------------------------------------------------------- the original code's numbers


@pytest.mark.parametrize("file, act", [("clip_open_clip_mini", "gelu"), ("clip_openai_quickgelu_mini", "quick_gelu")])
def test_clip_equals_the_original_in_features_scores_and_gradient(file, act):
    g = golden(file)
    network = filled(models.Cosine, clip_config(act), "hpsv2.1", open_clip_state(), temperature=False)
    image = g["image"].requires_grad_()
    (text,) = network.encode_text(g["input_ids"], torch.ones_like(g["input_ids"]))
    torch.testing.assert_close(text, torch.nn.functional.normalize(g["text_features"], dim=-1), **CLOSE)
    torch.testing.assert_close(network.encode_image(image), g["image_features"], **CLOSE)
    for shift in range(3):  # every image with every text
        torch.testing.assert_close(network(image, text.roll(-shift, 0)), g["cosine"].roll(-shift, 1).diag(), **CLOSE)
    network(image, text).sum().backward()
    torch.testing.assert_close(image.grad, g["grad_image_of_sum_diagonal_cosine"], rtol=0, atol=1e-7)


def test_imagereward_equals_the_original_in_states_scores_and_gradient():
    g = golden("imagereward_mini")
    network = filled(models.ImageReward, blip_config(), "imagereward", imagereward_state())
    image = g["image"].requires_grad_()
    states = network.vision_model(pixel_values=image).last_hidden_state
    torch.testing.assert_close(states, g["vision_last_hidden_state"], **CLOSE)
    score = network(image, *network.encode_text(g["input_ids"], g["attention_mask"]))
    torch.testing.assert_close(score, g["score_raw"][:, 0], **CLOSE)
    offset, factor = rewards.SCALE["imagereward"]
    torch.testing.assert_close((score + offset) * factor, g["score_normalised"][:, 0], **CLOSE)
    score.sum().backward()
    torch.testing.assert_close(image.grad, g["grad_image_of_sum_score_raw"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.6])
def test_mps_equals_the_original_in_tokens_masks_scores_and_gradient(threshold, mps_weights):
    g, at = golden("mps_mini"), f"threshold_{threshold}"
    config = clip_config(joint=128)
    network = filled(models.MPS, config, "mps", mps_weights, threshold=threshold)
    network.condition_ids = g["condition_ids"]
    tokens, keep, text = network.encode_text(g["input_ids"], None)
    torch.testing.assert_close(tokens, g["text_tokens"], **CLOSE)
    torch.testing.assert_close(text, g["text_eot"], **CLOSE)
    torch.testing.assert_close(batch_relative_similarity(network, tokens), g["relative_similarity"], **CLOSE)
    assert torch.equal(keep, g[f"keep_mask.{at}"])
    image = g["image"].requires_grad_()
    tokens, keep, text = (x.repeat(2, *[1] * (x.ndim - 1)) for x in (tokens, keep, text))  # image i, prompt i % 3
    image_tokens = network.encode_image(image)
    torch.testing.assert_close(image_tokens, g["image_tokens"], **CLOSE)
    cls = network.cross_model(image_tokens, tokens, keep)[:, 0]
    torch.testing.assert_close(cls, g[f"cross_cls.{at}"], **CLOSE)
    score = network(image, tokens, keep, text)
    torch.testing.assert_close(score, g[f"score.{at}"], **CLOSE)
    if threshold == 0.3:
        torch.testing.assert_close(score, g[f"score_published_single.{at}"], **CLOSE)
    score.sum().backward()
    torch.testing.assert_close(image.grad, g[f"grad_image_of_sum_score.{at}"], rtol=0, atol=1e-6)


def batch_relative_similarity(network: models.MPS, tokens: torch.Tensor) -> torch.Tensor:
    """Similarity to the condition as published: relative to the maximum of the whole batch, not of each prompt."""
    condition = network.encode_text(network.condition_ids, None)[0][0]
    similarity = (tokens @ condition.T).amax(-1)
    return similarity / similarity.max()


@pytest.fixture(scope="module")
def mps_weights():
    return mps_state()


def test_resizing_equals_torchvision_and_pillow():
    g = golden("resize_golden")
    for name, shape in (("wide", (3, 96, 128)), ("tall", (3, 130, 70)), ("large", (3, 301, 419))):
        images = rnd(f"resize.{name}", *shape).clamp(0, 1)[None] * 2 - 1
        torch.testing.assert_close(preprocess.preprocess(images, 224)[0], g[f"{name}.tensor_path"], rtol=0, atol=3e-6)
        ours, theirs = preprocess.preprocess_8bit(images, 224)[0], g[f"{name}.pil_path_uint8"]
        torch.testing.assert_close(ours, preprocess.normalise(theirs / 255), rtol=0, atol=1e-6)


def test_padding_to_a_square_keeps_the_whole_picture_in_the_middle():
    pixels = preprocess.preprocess_padded(torch.ones(1, 3, 512, 768), 224)
    black = preprocess.normalise(torch.zeros(1, 3, 1, 1))
    white = (pixels - black).abs().amax(1)[0] > 1
    assert not white[:37].any() and white[37:186].all() and not white[186:].any()  # 149 rows, one more below
    square = rnd("square", 1, 3, 90, 90).clamp(-1, 1)
    assert torch.equal(preprocess.preprocess_padded(square, 56), preprocess.preprocess(square, 56))


# ------------------------------------------------------------------------------------------------------ tokenizers


@pytest.fixture(scope="module")
def full_vocabularies(tmp_path_factory):
    """Tokenizer files as the hub has them, from the plain vocabularies: (CLIP folder, BERT folder)."""
    clip, bert = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("bert")
    merges = gzip.decompress((GOLDEN / "clip_merges.txt.gz").read_bytes()).decode().splitlines()
    write_vocabulary(clip)
    letters = list(json.loads((clip / "vocab.json").read_text()))[:512]
    tokens = [*letters, *("".join(merge.split()) for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    (clip / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (clip / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    vocabulary = gzip.decompress((GOLDEN / "bert_vocab.txt.gz").read_bytes())
    expected = json.loads((GOLDEN / "tokenizer_golden.json").read_text())["bert_vocabulary"]["sha256"]
    assert hashlib.sha256(vocabulary).hexdigest() == expected
    (bert / "vocab.txt").write_bytes(vocabulary)
    return clip, bert


def bare_text(name: str, folder: Path) -> models.PromptFeatures:
    """The prompts of a reward that can only tokenize, with the published sizes and no weights."""
    return models.PromptFeatures(name, models.build_meta(name), models.tokenizer(name, folder))


@pytest.mark.parametrize("name, field", [("hpsv2.1", "open_clip"), ("clipscore", "openai"), ("mps", "hf_clip")])
def test_clip_token_ids_equal_the_originals(name, field, full_vocabularies):
    prompts = json.loads((GOLDEN / "tokenizer_golden.json").read_text())["prompts"]
    ids, mask = bare_text(name, full_vocabularies[0]).ids([prompt["text"] for prompt in prompts])
    for row, kept, prompt in zip(ids.tolist(), mask.sum(-1).tolist(), prompts, strict=True):
        assert row == prompt.get(field, prompt["open_clip"]), prompt["text"]  # OpenAI's are told where they differ
        assert row[kept - 1] == 49407


def test_special_tokens_in_a_prompt_are_those_of_the_original_tokenizer(full_vocabularies):
    texts = ["a <START_OF_TEXT> a <end_of_text> a", "a <|STARTOFTEXT|> a <|endoftext|> a"]
    spelled = [49406, 320, 49406, 320, 49407, 320, 49407]
    hps, clip = (bare_text(name, full_vocabularies[0]).ids(texts)[0].tolist() for name in ("hpsv2.1", "clipscore"))
    assert hps[0][:8] == [*spelled, 0] and 49406 not in hps[1][1:] and hps[1].count(49407) == 1
    assert clip[1][:8] == [*spelled, 0] and 49406 not in clip[0][1:] and clip[0].count(49407) == 1


def test_bert_token_ids_equal_the_original(full_vocabularies):
    prompts = json.loads((GOLDEN / "tokenizer_golden.json").read_text())["prompts"]
    ids, mask = bare_text("imagereward", full_vocabularies[1]).ids([prompt["text"] for prompt in prompts])
    assert ids.tolist() == [prompt["bert"] for prompt in prompts]
    assert mask.sum(-1).tolist() == [prompt["bert_length"] for prompt in prompts]


def test_mps_condition_is_47_tokens(full_vocabularies):
    ids = bare_text("mps", full_vocabularies[0]).network.condition_ids
    assert torch.equal(ids, golden("mps_mini")["condition_ids"])
    assert (ids != 49407).sum() == 46


@pytest.mark.parametrize(
    "published", [2, 49407]
)  # a legacy value that old configs hold, and one not of this vocabulary
def test_the_end_token_is_the_tokenizers_whatever_the_config_says(published, folders, loaded, tmp_path):
    shutil.copytree(folders["pickscore"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = published
    (tmp_path / "config.json").write_text(json.dumps(config))
    score = rewards.load("pickscore", tmp_path)(pictures(2), ["red", "a fox"])
    torch.testing.assert_close(score, loaded["pickscore"](pictures(2), ["red", "a fox"]), rtol=1e-5, atol=1e-5)


def test_a_tokenizer_with_another_vocabulary_is_refused(tmp_path):
    write_vocabulary(tmp_path)
    with pytest.raises(ValueError, match="514 entries, the checkpoint 49408"):
        bare_text("hpsv2.1", tmp_path)


# ----------------------------------------------------------------------------------------------- full-size key lists


@pytest.mark.parametrize(
    "name, published, tensors, values",
    [
        ("hpsv2.1", "hps_v2_1", 686, 986_109_441),
        ("pickscore", "pickscore_v1", 910, 986_109_441),
        ("imagereward", "imagereward_v1", 625, None),
        ("mps", "mps_overall", 964, 986_109_441 + 118_505_600),
        ("clipscore", "openai_clip_vit_b_32", 302, 151_277_313),
    ],
)
def test_full_size_checkpoints_fit_key_for_key(name, published, tensors, values):
    shapes = json.loads((GOLDEN / "keys_rewards_full.json").read_text())[published]
    assert len(shapes) == tensors
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    network = models.load_strict(models.build_meta(name), models.rename(name, state), name)
    if values:
        assert sum(value.numel() for value in network.state_dict().values()) == values
    del state[next(key for key in state if key.endswith("mlp.fc1.bias") or key.endswith("c_fc.bias"))]
    with pytest.raises(ValueError, match="1 keys do not fit: missing"):
        models.load_strict(models.build_meta(name), models.rename(name, state), name)


def test_published_networks_have_the_constants_that_no_shape_shows():
    """Activations, heads and epsilons of the full-size models, where transformers' defaults would load as well."""
    networks = {name: models.build_meta(name) for name in ("hpsv2.1", "pickscore", "mps", "clipscore", "imagereward")}
    for name in ("hpsv2.1", "pickscore", "mps"):
        config = networks[name].config
        for part in (config.text_config, config.vision_config):
            assert (part.hidden_act, part.num_attention_heads, part.layer_norm_eps) == ("gelu", 16, 1e-5)
    config = networks["clipscore"].config
    for part, heads in ((config.text_config, 8), (config.vision_config, 12)):
        assert (part.hidden_act, part.num_attention_heads, part.layer_norm_eps) == ("quick_gelu", heads, 1e-5)
    config = networks["imagereward"].config
    text, vision = config.text_config, config.vision_config
    assert (vision.hidden_act, vision.num_attention_heads, vision.layer_norm_eps) == ("gelu", 16, 1e-6)
    assert (text.hidden_act, text.num_attention_heads, text.layer_norm_eps) == ("gelu", 12, 1e-12)
    assert networks["mps"].threshold == 0.01
    assert [networks[name].temperature for name in ("hpsv2.1", "clipscore", "pickscore")] == [False, False, True]


def test_unexpected_and_misshaped_keys_are_named(folders, tmp_path):
    state = load_file(folders["pickscore"] / "model.safetensors")
    wrong = tmp_path / "wrong.safetensors"
    for name in ("config.json", "tokenizer"):
        (tmp_path / name).symlink_to(folders["pickscore"] / name)
    save_file({**state, "extra.weight": torch.zeros(1)}, wrong)
    with pytest.raises(ValueError, match=r"wrong\.safetensors: .*1 keys do not fit: unexpected model\.extra\.weight"):
        rewards.load("pickscore", wrong)
    save_file({**state, "text_projection.weight": torch.zeros(32, 47)}, wrong)
    with pytest.raises(ValueError, match=r"text_projection\.weight is \(32, 47\), not \(32, 48\)"):
        rewards.load("pickscore", wrong)


# ------------------------------------------------------------------------------------------- what training relies on


@each_reward
def test_the_gradient_agrees_with_finite_differences(name, loaded):
    images, prompts, reward = pictures(2, 40, 30).requires_grad_(), ["a red fox", "fox"], loaded[name]
    score = reward(images, prompts)
    assert score.shape == (2,) and score.dtype == torch.float32
    (grad,) = torch.autograd.grad(score.sum(), images)
    for direction in (grad, grad + rnd("direction", *grad.shape) * grad.std()):
        step = 0.02 * direction / direction.norm()
        with torch.no_grad():
            slope = (reward(images + step, prompts) - reward(images - step, prompts)).sum() / (2 * step.norm())
        torch.testing.assert_close(slope, (grad * step).sum() / step.norm(), rtol=0.01, atol=1e-5)


@each_reward
def test_no_parameter_of_a_reward_gets_a_gradient(name, loaded):
    images = pictures(1).requires_grad_()
    loaded[name](images, ["a red fox"]).sum().backward()
    assert images.grad.abs().max() > 0
    for parameter in loaded[name].network.parameters():
        assert not parameter.requires_grad and parameter.grad is None
    assert not loaded[name].network.training


@each_reward
def test_a_score_depends_neither_on_its_batch_nor_on_the_cache(name, loaded):
    reward, images, prompts = loaded[name], pictures(3), ["a red fox", "", "fox, light, color, 4k " * 9]
    reward.text.cache.clear()
    together = reward(images, prompts)
    assert torch.equal(together, reward(images, prompts))  # from the cache
    for i in (2, 0, 1):
        reward.text.cache.clear()
        alone = reward(images[i : i + 1], prompts[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-6, atol=1e-5)
    assert (together - together.mean()).abs().max() > 1e-3  # and the pairs do differ


def test_the_cache_is_bounded_and_serves_training_after_an_evaluation(loaded, monkeypatch):
    reward, images = loaded["pickscore"], pictures(3)
    monkeypatch.setattr(models.PromptFeatures, "kept", 2)
    reward.text.cache.clear()
    with torch.inference_mode():
        evaluated = reward(images, ["red", "fox", "red fox"])
    assert list(reward.text.cache) == ["fox", "red fox"]
    images.requires_grad_()
    trained = reward(images, ["red", "fox", "red fox"])
    trained.sum().backward()
    torch.testing.assert_close(trained.detach(), evaluated.clone(), rtol=1e-5, atol=1e-5)


@each_reward
def test_bfloat16_is_used_in_the_vision_tower_only(name, folders, loaded):
    images, prompts = pictures(2).requires_grad_(), ["a red fox", "fox"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reward = rewards.load(name, folders[name], dtype=torch.bfloat16)
    exact, rounded = loaded[name](images, prompts), reward(images, prompts)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).abs().max()
    assert 0 < error < 0.02 * (1 + exact.abs().max())
    (grad,) = torch.autograd.grad(rounded.sum(), images)
    (true,) = torch.autograd.grad(exact.sum(), images)
    assert torch.nn.functional.cosine_similarity(grad.flatten(), true.flatten(), dim=0) > 0.99
    tower = loaded[name].network
    try:  # storing matrices in bfloat16 gives what autocast alone gives
        tower.dtype = torch.bfloat16
        assert torch.equal(loaded[name](images, prompts), rounded)
    finally:
        tower.dtype = torch.float32
    loaded[name].text.cache.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # around a training step; half-precision images come out of it
        assert torch.equal(loaded[name](images, prompts), exact)
        torch.testing.assert_close(loaded[name](images.bfloat16(), prompts), exact, rtol=0.05, atol=0.05)


def test_wrong_arguments_are_refused(loaded):
    reward = loaded["pickscore"]
    with pytest.raises(ValueError, match="images must be"):
        reward(torch.zeros(3, 8, 8), ["a"])
    for prompts in ("a cat", ["one", "two"]):
        with pytest.raises(ValueError, match="one per image"):
            reward(torch.zeros(1, 3, 8, 8), prompts)


def test_pickscore_is_the_cosine_times_its_temperature(folders, loaded):
    images, prompts = pictures(2), ["a red fox", "fox"]
    cosine = rewards.load("hpsv2.1", folders["pickscore"])  # the same weights without the temperature
    torch.testing.assert_close(loaded["pickscore"](images, prompts), 100 * cosine(images, prompts), rtol=1e-3, atol=0)
    assert cosine(images, prompts).abs().max() <= 1


def test_original_preprocessing_differs_only_where_it_should(folders, loaded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        padded = rewards.load("hpsv2.1", folders["hpsv2.1"], original=True)
    prompts = ["a red fox"]
    square, wide = pictures(1), pictures(1, 40, 90)
    torch.testing.assert_close(padded(square, prompts), loaded["hpsv2.1"](square, prompts), **CLOSE)
    assert (padded(wide, prompts) - loaded["hpsv2.1"](wide, prompts)).abs() > 1e-3
    eight_bit = rewards.load("pickscore", folders["pickscore"], original=True)
    torch.testing.assert_close(eight_bit(square, prompts), loaded["pickscore"](square, prompts), rtol=0.02, atol=0.1)


# -------------------------------------------------------------------------------------------- scales, specs, sums


def test_scales_map_the_papers_values():
    for name, raw, scaled in (("pickscore", 22.0, 0.2), ("hpsv2.1", 0.378, 0.378), ("mps", 10.0, 1.0)):
        offset, factor = rewards.SCALE[name]
        assert (raw + offset) * factor == pytest.approx(scaled)
    offset, factor = rewards.SCALE["imagereward"]
    assert offset * factor == pytest.approx(-0.16178, abs=1e-5)  # a head of zeros
    assert set(rewards.SCALE) == set(rewards.NAMES)


def test_a_spec_is_parsed_or_refused_with_the_reason():
    assert rewards.parse("hpsv2.1=1, pickscore=0.5") == [("hpsv2.1", 1.0), ("pickscore", 0.5)]
    assert rewards.parse("tiny") == [("tiny", 1.0)]
    for spec, reason in {
        "": "unknown reward ''",
        "hps=1": "known: tiny, tiny2, rater, hpsv2.1",
        "mps=": "weight of mps is ''",
        "mps=nan": "weight of mps is 'nan'",
        "mps=a": "weight of mps is 'a'",
        "mps=1,mps=2": "mps is named twice",
    }.items():
        with pytest.raises(ValueError, match=reason):
            rewards.parse(spec)


def test_a_weighted_sum_is_the_sum_of_the_scaled_rewards(folders, loaded):
    images, prompts = pictures(2), ["a red fox", "fox"]
    total = rewards.build("pickscore=0.5,mps=2", f"{folders['pickscore']},{folders['mps']}")
    pickscore, mps = (loaded[name](images, prompts) for name in ("pickscore", "mps"))
    expected = 0.5 * (pickscore - 20) / 10 + 2 * mps / 10
    torch.testing.assert_close(total(images, prompts), expected, **CLOSE)
    assert total.names == ["pickscore", "mps"]
    with pytest.raises(ValueError, match="--reward-weights names 1 paths, --reward pickscore,mps needs 2"):
        rewards.build("pickscore,mps", str(folders["mps"]))


# ----------------------------------------------------------------------------------------------- files and refusals


def test_the_pickled_mps_module_is_read_without_its_classes():
    told = json.loads((GOLDEN / "mps_mini_pickled.json").read_text())
    assert "trainer" not in sys.modules
    state = reward_files.read_checkpoint("mps", GOLDEN / "mps_mini_pickled.pth")
    assert set(state) == set(told["tensors"])
    for key, expected in told["tensors"].items():
        value = state[key].double()
        assert list(value.shape) == expected["shape"] and str(state[key].dtype).endswith(expected["dtype"])
        assert value.sum().item() == pytest.approx(expected["sum"], abs=1e-9)
    with pytest.raises(ModuleNotFoundError):
        __import__("trainer.models.clip_model")


def test_the_pickled_mps_module_scores_as_the_original():
    checks = json.loads((GOLDEN / "mps_mini_pickled.json").read_text())["checks"]
    config = clip_config(vocabulary=600, joint=128)
    state, exact = mps.read_pickled(GOLDEN / "mps_mini_pickled.pth"), fill("inv_freq", (32,))
    for field, frequencies in (("", None), ("_with_exact_rotary_frequencies", exact)):
        if frequencies is not None:
            state = {key: frequencies if key.endswith("inv_freq") else value for key, value in state.items()}
        for threshold, expected in checks[f"scores_by_threshold{field}"].items():
            network = filled(models.MPS, config, "mps", state, threshold=float(threshold))
            network.condition_ids = torch.tensor(checks["condition_ids"])
            tokens, keep, text = network.encode_text(torch.tensor(checks["input_ids"]), None)
            kept = batch_relative_similarity(network, tokens) > float(threshold)
            score = network(rnd("mps_pickled.image", 2, 3, 56, 56), tokens, kept, text)
            torch.testing.assert_close(score, torch.tensor(expected["score"]), **CLOSE)
            assert kept.sum(-1).tolist() == expected["kept_tokens"]
            assert torch.equal(keep, kept) == (threshold != "0.6")  # there the second prompt has the batch's maximum


@pytest.mark.parametrize("file", ["evil.pth", "evil_plain.ckpt"])
def test_hostile_pickles_are_refused_and_leave_no_trace(file, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (mps.read_pickled, lambda path: reward_files.read_checkpoint("hpsv2.1", path)):
        with pytest.raises(ValueError, match=f"{file}: refused"):
            read(GOLDEN / file)
    assert reward_commands.main(["convert-mps", str(GOLDEN / file), "out.safetensors"]) == 2
    assert list(tmp_path.iterdir()) == []


class Call:
    """Pickles as a call of a function in a package that a pickled MPS module may name."""

    def __reduce__(self):
        return transformers.utils.logging.set_verbosity, (10,)


def test_functions_that_a_pickle_names_are_never_called(tmp_path):
    with pytest.raises(ValueError, match=r"it names builtins\.open"):
        mps.read_pickled(GOLDEN / "evil.pth")
    torch.save({"state_dict": {}, "call": Call()}, tmp_path / "call.pth")
    before = transformers.utils.logging.get_verbosity()
    with pytest.raises(ValueError, match=r"call\.pth: refused"):
        mps.read_pickled(tmp_path / "call.pth")
    assert transformers.utils.logging.get_verbosity() == before != 10


@pytest.mark.parametrize("name", reward_files.OFFICIAL)
def test_a_missing_checkpoint_says_what_to_get_and_where_it_goes(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        rewards.load(name, tmp_path)
    message, official = str(caught.value), reward_files.OFFICIAL[name]
    for part in (str(tmp_path), name, official.file, official.repo, official.size, official.sha256, "--reward-weights"):
        assert part in message
    assert "\n" not in message


def test_missing_files_of_other_kinds_are_named(tmp_path, monkeypatch, folders):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        FileNotFoundError, match=r"MPS_overall_checkpoint\.pth: no checkpoint of mps; .*Kwai-Kolors/MPS"
    ):
        rewards.load("mps")
    monkeypatch.setattr(reward_files, "EMBEDDED", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tiny2: no model\.safetensors of tiny2"):
        rewards.load("tiny2")
    (tmp_path / "HPS_v2.1_compressed.pt").symlink_to(folders["hpsv2.1"] / "HPS_v2.1_compressed.pt")
    with pytest.raises(FileNotFoundError, match=r"no vocabulary for hpsv2\.1; put vocab\.json and merges\.txt"):
        rewards.load("hpsv2.1", tmp_path)
    with pytest.raises(ValueError, match="unknown reward 'hps'"):
        rewards.load("hps")


def test_the_embedded_rewards_are_pickscores(folders, loaded, tmp_path, monkeypatch):
    shutil.copytree(folders["pickscore"], tmp_path / "tiny", ignore=shutil.ignore_patterns("tokenizer"))
    CLIPTokenizer.from_pretrained(folders["pickscore"] / "tokenizer").save_pretrained(tmp_path / "tiny")
    assert (tmp_path / "tiny" / "tokenizer.json").is_file()  # the form in which transformers writes vocabularies
    monkeypatch.setattr(reward_files, "EMBEDDED", tmp_path)
    images = pictures(2)
    tiny, pickscore = (reward(images, ["red", "fox"]) for reward in (rewards.load("tiny"), loaded["pickscore"]))
    torch.testing.assert_close(tiny, pickscore, rtol=1e-5, atol=1e-5)


def test_files_in_the_hubs_cache_are_found_without_a_path(folders, loaded, tmp_path, monkeypatch):
    repo = tmp_path / "models--yuvalkirstain--PickScore_v1"
    shutil.copytree(folders["pickscore"], repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached, given = (reward(pictures(1), ["fox"]) for reward in (rewards.load("pickscore"), loaded["pickscore"]))
    torch.testing.assert_close(cached, given, rtol=1e-5, atol=1e-5)


def test_a_wrong_digest_gives_a_warning_that_names_both(folders):
    path = folders["hpsv2.1"] / "HPS_v2.1_compressed.pt"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.warns(UserWarning, match=f"{found}.*{reward_files.OFFICIAL['hpsv2.1'].sha256}"):
        rewards.load("hpsv2.1", folders["hpsv2.1"])


def test_the_official_digest_raises_no_warning(folders, monkeypatch):
    path = folders["hpsv2.1"] / "HPS_v2.1_compressed.pt"
    official = reward_files.OFFICIAL["hpsv2.1"]
    known = reward_files.Checkpoint(**{**vars(official), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    monkeypatch.setitem(reward_files.OFFICIAL, "hpsv2.1", known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards.load("hpsv2.1", path)


# -------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "fox.png"
    Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(path)
    return str(path)


def test_the_score_command_prints_what_the_library_computes(folders, loaded, picture, capsys):
    sources = f"{folders['pickscore']},{folders['mps']}"
    spec = ["score", "--reward", "pickscore=0.5,mps", "--reward-weights", sources]
    assert reward_commands.main([*spec, "--prompt", "a red fox", "--prompt", "fox", picture, picture]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["image", "pickscore", "mps", "weighted"]
    image = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)[None] / 127.5 - 1
    for line, prompt in ((first, "a red fox"), (second, "fox")):
        pick, preference = (loaded[name](image, [prompt]).item() for name in ("pickscore", "mps"))
        expected = [pick, preference, 0.5 * (pick - 20) / 10 + preference / 10]
        assert [float(number) for number in line.split()[1:]] == pytest.approx(expected, abs=1e-4)


def test_a_folder_is_scored_with_a_prompt_file_into_a_csv(folders, picture, tmp_path, capsys):
    """Prompts belong to sample.py's images by number, to other images in the order of their names."""
    spec = ["score", "--reward", "pickscore", "--reward-weights", str(folders["pickscore"])]
    prompts, table = tmp_path / "prompts.txt", tmp_path / "scores.csv"
    prompts.write_text('a red fox\na "tame", fox\n')
    for name in ("00001-5.png", "00000-5.png", "00001-6.png", "grid.png", "notes.txt"):
        (tmp_path / "samples").mkdir(exist_ok=True)
        shutil.copy(picture, tmp_path / "samples" / name)
    command = [*spec, "--prompts", str(prompts), "--csv", str(table)]
    assert reward_commands.main([*command, str(tmp_path / "samples")]) == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [Path(row["image"]).name for row in rows] == ["00000-5.png", "00001-5.png", "00001-6.png"]
    assert [row["prompt"] for row in rows] == ["a red fox", *['a "tame", fox'] * 2]
    assert f"{table}: 3 images; mean pickscore" in capsys.readouterr().out
    assert reward_commands.main([*spec, "--prompt", "a red fox", picture]) == 0
    alone = float(capsys.readouterr().out.split()[-2])
    assert float(rows[0]["pickscore"]) == pytest.approx(alone, abs=1e-4) != pytest.approx(float(rows[1]["pickscore"]))

    shutil.copy(picture, tmp_path / "samples" / "00002-5.png")
    assert reward_commands.main([*command, str(tmp_path / "samples")]) == 2
    assert "2 prompts, but there is 00002-*.png" in capsys.readouterr().err
    assert reward_commands.main([*command, picture]) == 2
    assert "2 prompts for 1 images" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folders, tmp_path, value):
    shutil.copytree(folders["pickscore"], tmp_path / "broken")
    file = next((tmp_path / "broken").glob("*.safetensors"))
    weights = load_file(file)
    weights["visual_projection.weight"][0, 0] = value
    save_file(weights, file)
    with pytest.raises(ValueError, match="visual_projection.weight contains NaN or infinite values"):
        rewards.load("pickscore", tmp_path / "broken")


def test_the_converter_writes_what_mps_can_load(tmp_path, capsys):
    output = tmp_path / "new" / "model.safetensors"
    assert reward_commands.main(["convert-mps", str(GOLDEN / "mps_mini_pickled.pth"), str(output)]) == 0
    assert "164 tensors" in capsys.readouterr().out
    written, read = load_file(output), mps.read_pickled(GOLDEN / "mps_mini_pickled.pth")
    assert written.keys() == read.keys() and all(torch.equal(written[key], read[key]) for key in read)
    filled(models.MPS, clip_config(vocabulary=600, joint=128), "mps", reward_files.read_checkpoint("mps", output))


def test_bad_input_to_the_command_is_one_line_and_exit_code_2(folders, picture, tmp_path, capsys):
    ordinary = ["score", "--reward", "pickscore", "--reward-weights", str(folders["pickscore"]), "--prompt", "fox"]
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    for arguments, reason in (
        (["score", "--reward", "nice", "--prompt", "fox", picture], "unknown reward 'nice'"),
        ([*ordinary, "absent.png"], "absent.png: no such image"),
        ([*ordinary, picture, "--device", "nowhere"], "--device nowhere: there is none here"),
        ([*ordinary, str(text)], "not a readable image"),
        ([*ordinary, "--prompt", "two", picture], "--prompt was given 2 times for 1 images"),
        ([*ordinary[:3], "--prompt", "fox", "--reward-weights", str(tmp_path), picture], "no checkpoint of pickscore"),
        (["convert-mps", "absent.pth", "out.safetensors"], "absent.pth: no checkpoint of mps"),
        (["convert-mps", str(GOLDEN / "evil.pth"), "out.pth"], "name it so"),
    ):
        assert reward_commands.main(arguments) == 2
        out, error = capsys.readouterr()
        assert reason in error and error.count("\n") == 1 and len(out.splitlines()) <= 1


def test_help_needs_no_torch():
    code = """import sys
from pretrained import reward_commands
try: reward_commands.main(["score", "--help"])
except SystemExit: sys.exit("torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--reward-weights" in done.stdout


if __name__ == "__main__":
    print(write_clip_folder(Path(sys.argv[1])))
