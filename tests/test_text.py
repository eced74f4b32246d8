"""Prompts -> conditioning: token ids of the published tokenizers, and which hidden states the UNet gets."""

import copy
import gzip
import json
from pathlib import Path

import pytest
import torch
from recipe import GOLDEN, filled
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import weights
from pretrained import text_encoder

PROMPTS = json.loads((GOLDEN / "tokenizer_golden.json").read_text())["prompts"]
CLIP = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
FIRST = CLIP | {"architectures": ["CLIPTextModel"], "eos_token_id": 2}
SECOND = CLIP | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 24, "hidden_act": "gelu"}


def write_vocabulary(folder: Path) -> None:
    """CLIP's vocabulary in the hub's order: bytes, bytes at a word's end, merges, start and end token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = gzip.decompress((GOLDEN / "clip_merges.txt.gz").read_bytes()).decode().splitlines()
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def write_encoder(folder: Path, model: nn.Module, config: dict) -> None:
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """The text half of a mini SDXL pipeline, with the whole vocabulary."""
    folder = tmp_path_factory.mktemp("sdxl")
    write_vocabulary(folder / "tokenizer")
    write_vocabulary(folder / "tokenizer_2")
    write_encoder(folder / "text_encoder", filled(CLIPTextModel(CLIPTextConfig(**FIRST))), FIRST)
    second = filled(CLIPTextModelWithProjection(CLIPTextConfig(**SECOND)))
    write_encoder(folder / "text_encoder_2", second, SECOND)
    return folder


@pytest.fixture(scope="module")
def sdxl(pipeline) -> text_encoder.TextEncoder:
    return weights.load_text(pipeline)


@pytest.fixture(scope="module")
def sd15(sdxl) -> text_encoder.TextEncoder:
    return text_encoder.TextEncoder(sdxl.models[:1], sdxl.tokenizers[:1])


def ids(tokenizer, prompt: str) -> list[int]:
    return tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids


def test_the_first_tokenizer_pads_with_the_end_and_the_second_with_0(sdxl):
    alike = 0
    for prompt in PROMPTS:
        first, second = (ids(tokenizer, prompt["text"]) for tokenizer in sdxl.tokenizers)
        assert first == prompt["hf_clip"]
        end = first.index(49407)
        if "!" not in prompt["text"] and prompt["kind"] != "special token text":
            assert second == first[: end + 1] + [0] * (76 - end)
        alike += second == prompt["open_clip"]
    assert alike >= 25  # open_clip cleans its text before it reads it, and some of the 40 prompts are there to show it


def test_the_second_tokenizer_reads_an_exclamation_mark_as_its_padding_as_published(sdxl):
    assert ids(sdxl.tokenizers[0], "!")[:3] == [49406, 256, 49407]
    assert ids(sdxl.tokenizers[1], "!")[:3] == [49406, 0, 49407]


def last_states(model: nn.Module, tokens: torch.Tensor, layers: int, normed: bool) -> torch.Tensor:
    """Hidden states after `layers` layers, by truncating the model."""
    model = copy.deepcopy(getattr(model, "text_model", model))
    del model.encoder.layers[layers:]
    if not normed:
        model.final_layer_norm = nn.Identity()
    with torch.no_grad():
        return model(tokens).last_hidden_state


def test_sd15_gets_the_last_states_after_the_final_norm(sd15):
    tokens = torch.tensor([ids(sd15.tokenizers[0], "a red fox")])
    conditioning = sd15(["a red fox"], (512, 512))
    assert conditioning.keys() == {"context"}
    assert conditioning["context"].shape == (1, 77, 32)
    expected = last_states(sd15.models[0], tokens, 3, normed=True)
    assert (conditioning["context"] - expected).abs().max() <= 1e-6


def test_sdxl_gets_both_penultimate_states_side_by_side_without_the_norm(sdxl):
    conditioning = sdxl(["a red fox"], (512, 768))
    assert conditioning["context"].shape == (1, 77, 64)
    states = []
    for model, tokenizer in zip(sdxl.models, sdxl.tokenizers, strict=True):
        states.append(last_states(model, torch.tensor([ids(tokenizer, "a red fox")]), 2, normed=False))
    assert (conditioning["context"] - torch.cat(states, dim=-1)).abs().max() <= 1e-6


def test_pooled_text_is_the_projected_state_at_the_end_of_the_second_encoder(sdxl):
    tokens = ids(sdxl.tokenizers[1], "a red fox")
    states = last_states(sdxl.models[1], torch.tensor([tokens]), 3, normed=True)
    expected = states[0, tokens.index(49407)] @ sdxl.models[1].text_projection.weight.T
    pooled = sdxl(["a red fox"], (512, 512))["pooled"]
    assert pooled.shape == (1, 24)
    assert (pooled[0] - expected).abs().max() <= 1e-6


def test_time_ids_are_the_size_no_crop_and_the_size_again(sdxl):
    ids = sdxl(["a", "b"], (512, 768))["time_ids"]
    assert ids.tolist() == [[512, 768, 0, 0, 512, 768]] * 2


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(sdxl):
    alone, together = sdxl(["a cat"], (64, 64)), sdxl(["", "a cat", "a long and winding road"], (64, 64))
    assert all(torch.equal(alone[key][0], together[key][1]) for key in alone)


def test_batched_encoding_equals_encoding_one_at_a_time(sdxl):
    """As on a GPU, but for rounding."""
    prompts = ["", "a cat", "a long and winding road"]
    for prompt, together in zip(prompts, sdxl._encode(prompts), strict=True):
        (alone,) = sdxl.features([prompt])
        assert together.keys() == alone.keys() == {"context", "pooled"}
        assert all((together[key] - alone[key]).abs().max() <= 1e-5 for key in alone)


def test_the_cache_is_bounded_in_bytes_and_reused(sd15, monkeypatch):
    (first,) = sd15.features(["a cat"])
    assert sd15.features(["a cat"])[0] is first
    monkeypatch.setattr(text_encoder, "CACHE_BYTES", 3 * first["context"].nbytes)
    for i in range(5):
        sd15.features([f"a cat and {i} dogs"])
    assert len(sd15.cache) == 3


def test_what_is_not_read_of_long_prompts_is_reported_once(sd15, capsys):
    """77 tokens, the start and the end among them: 75 words of one token each are read."""
    encoder = text_encoder.TextEncoder(sd15.models, sd15.tokenizers)
    fits, long = "cat " * 75, "dog " * 74 + "red fox jumps"
    assert torch.equal(encoder([long], (64, 64))["context"], encoder([long + " high"], (64, 64))["context"])
    said = capsys.readouterr().err
    assert "longer than the 77 tokens" in said and "'fox jumps'" in said and said.count("\n") == 1
    encoder.cut_reported = False
    encoder.report_cut(["a cat", fits, long, long, long + " high"])
    assert "2 of 4 prompts are longer" in capsys.readouterr().err
    encoder = text_encoder.TextEncoder(sd15.models, sd15.tokenizers)
    encoder([fits], (64, 64))
    assert capsys.readouterr().err == ""


def test_encoders_are_frozen_and_move_together(sdxl):
    assert not any(p.requires_grad for model in sdxl.models for p in model.parameters())
    moved = copy.deepcopy(sdxl).to("cpu", torch.bfloat16)
    assert moved(["a cat"], (64, 64))["context"].dtype == torch.bfloat16


def test_a_single_file_takes_its_vocabulary_from_its_folder(pipeline, tmp_path):
    tensors = load_file(pipeline / "text_encoder" / "model.safetensors")
    bare = {key.removeprefix("text_model."): t for key, t in tensors.items()}
    stored = {f"cond_stage_model.transformer.text_model.{key}": t for key, t in bare.items()}
    save_file(stored, tmp_path / "x.safetensors", {"config": json.dumps({"text_encoder": FIRST})})
    (tmp_path / "tokenizer").symlink_to(pipeline / "tokenizer")
    encoder = weights.load_text(tmp_path / "x.safetensors")
    assert len(encoder.models) == 1
    alike = text_encoder.TextEncoder(
        [weights.load_clip(pipeline, "text_encoder", "cpu", torch.float32)], encoder.tokenizers
    )
    assert torch.equal(encoder(["a cat"], (64, 64))["context"], alike(["a cat"], (64, 64))["context"])


def test_without_a_vocabulary_it_says_what_to_get(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text_encoder").symlink_to(pipeline / "text_encoder")
    with pytest.raises(FileNotFoundError, match="no tokenizer/vocab.json next to it; put vocab.json and merges.txt of"):
        weights.load_text(tmp_path)
    (tmp_path / "tokenizer").symlink_to(pipeline / "tokenizer")
    assert len(weights.load_text(tmp_path).models) == 1
