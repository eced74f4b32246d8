"""Mini models under the official names, keys and file names, in the folders that the stand-in of tests/hub.py serves.

Weights are seeded by their keys (tests/recipe.py), so that they are the same each time.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from recipe import filled
from safetensors.torch import save_file
from test_features import hashed_state
from test_rewards import (
    blip_config,
    clip_config,
    fill,
    imagereward_state,
    mps_state,
    open_clip_state,
    write_clip_folder,
    write_vocabulary,
)
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, ViTConfig, ViTModel

import weights
from pretrained import inception, reward_files, weight_files
from pretrained.configs import vae_dict
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

WORDS = ("a red fox", "two owls on a branch", "a boat at dusk", "the old bridge", "green apples", "a small robot")
MODEL = "ControlGenAI/ImageReFL_HPS_SD"
UNET = UNetConfig((16, 32), (1, 0), 1, 1, (2, 2), context=32, latent_channels=4, groups=4, sample_size=8)
ENTRIES = 514  # of the vocabulary of single letters


def state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: fill(k, t.shape) for k, t in network.state_dict().items() if t.is_floating_point()}


def write_base(folder: Path) -> None:
    """SD1.5's repository: UNet, autoencoder, text encoder, tokenizer, scheduler."""
    weights.save_unet(filled(UNet(UNET)), folder / "unet")
    vae = filled(VAE(VAEConfig((4, 4, 4, 8), 1, 4, 1)))
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(vae_dict(vae.config)))
    save_file(vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    write_vocabulary(folder / "tokenizer")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": ENTRIES, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    model = CLIPTextModel(CLIPTextConfig(**text))
    model.load_state_dict(state(model))
    model.save_pretrained(folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    (folder / "model_index.json").write_text("{}")


def write_published(folder: Path) -> None:
    """The authors' repository: the base's UNet and the tuned one."""
    unet = filled(UNet(UNET))
    weights.save_unet(unet, folder / "original_unet")
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.9)
    weights.save_unet(unet, folder / "fine_tuned_unet")


def write_rewards(models: Path) -> None:
    hps, clip, pick, reward, bert = (
        models / name
        for name in (
            "xswu/HPSv2",
            reward_files.CLIP_B,
            "yuvalkirstain/PickScore_v1",
            "THUDM/ImageReward",
            "google-bert/bert-base-uncased",
        )
    )
    hps.mkdir(parents=True)
    clip_config("gelu", ENTRIES).save_pretrained(hps)
    torch.save(
        {"state_dict": {k: v.half() for k, v in open_clip_state(ENTRIES).items()}}, hps / "HPS_v2.1_compressed.pt"
    )
    write_vocabulary(clip)
    config = clip_config("quick_gelu", ENTRIES)
    config.save_pretrained(clip)
    torch.save(state(CLIPModel(config)), clip / "pytorch_model.bin")
    write_clip_folder(pick)
    for path in (pick / "tokenizer").iterdir():
        path.rename(pick / path.name)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "red", "fox"]
    bert.mkdir(parents=True)
    (bert / "vocab.txt").write_text("\n".join(words) + "\n")
    reward.mkdir(parents=True)
    blip_config(len(words) + 2).save_pretrained(reward)
    torch.save(imagereward_state(len(words) + 2), reward / "ImageReward.pt")


def write_dino(folder: Path) -> None:
    model = ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        add_pooling_layer=False,
    )
    model.load_state_dict(state(model))
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def write_mps(folder: Path) -> None:
    """What a user gets by hand, with the sizes of a mini."""
    folder.mkdir(parents=True)
    clip_config("gelu", ENTRIES, 128).save_pretrained(folder)
    save_file(mps_state(ENTRIES), folder / reward_files.OFFICIAL["mps"].file)


def write_coco(folder: Path, train: int = 12, val: int = 24) -> Path:
    """A mini COCO in the layout of 2014: pictures of two colours, two captions each."""
    (folder / "annotations").mkdir(parents=True)
    number = 0
    for split, count in (("train2014", train), ("val2014", val)):
        (folder / split).mkdir()
        images, captions = [], []
        for i in range(count):
            number += 1
            name = f"COCO_{split}_{number:012d}.jpg"
            picture = Image.new("RGB", (80, 64), (7 * number % 256, 50 * i % 256, 90))
            picture.paste((250 - 9 * i % 250, 120, 11 * number % 256), (10, 8, 10 + 2 * i, 40))
            picture.save(folder / split / name)
            images.append({"id": number, "file_name": name})
            captions += [
                {"image_id": number, "caption": f"{WORDS[i % 6]}, {kind} {i // 3}"} for kind in ("photo", "view")
            ]
        (folder / "annotations" / f"captions_{split}.json").write_text(
            json.dumps({"images": images, "annotations": captions})
        )
    return folder


def write_all(root: Path) -> Path:
    """All that the stand-in serves."""
    models = root / "models"
    write_base(models / weight_files.BASES["sd15"])
    write_published(models / MODEL)
    write_rewards(models)
    write_dino(models / "facebook/dino-vits16")
    prompts = root / "datasets" / "ymhao" / "HPDv2" / "test.json"
    prompts.parent.mkdir(parents=True)
    prompts.write_text(json.dumps([{"prompt": text, "image_path": [], "rank": []} for text in WORDS]))
    (root / "releases").mkdir()
    torch.save({key: value.float() for key, value in hashed_state().items()}, root / "releases" / inception.FILE)
    return root


def adopt(monkeypatch, url: str, root: Path) -> None:
    """Take the minis for the official files: their checksums, and the release at `url`."""
    from hub import digests

    for name, official in reward_files.OFFICIAL.items():
        path = root / "models" / official.repo / official.file
        known = digests(path)[0] if official.repo and official.sha256 and path.is_file() else ""
        monkeypatch.setitem(reward_files.OFFICIAL, name, replace(official, sha256=known))
    monkeypatch.setattr(inception, "URL", f"{url}/releases/{inception.FILE}")
    monkeypatch.setattr(inception, "DIGEST", digests(root / "releases" / inception.FILE)[0])
