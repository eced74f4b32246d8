"""Train small CLIPs on the emoji: the text encoder of the tiny base, and the held-out features of its metrics.

    python tiny/make_clip.py text        # -> tiny/base/text_encoder/, tiny/base/tokenizer/
    python tiny/make_clip.py features    # -> tiny/features/, another seed, never used as a reward

Contrastive training of transformers' CLIPModel. A caption's positives are all images it describes, not only its own.
Many batches contain few concepts, so the model must also learn style and background.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from pretrained.preprocess import CLIP_MEAN, CLIP_STD
from training.data import Composition, EmojiSet
from utils import disk
from utils.device import autocast
from utils.images import to_tensor

TINY_DIR = Path(__file__).parent
LENGTH = 24  # text tokens
START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"


def learn_tokenizer(captions: list[str], folder: Path) -> None:
    """Learn byte pairs until each word of the captions is one token; write CLIP's `vocab.json` and `merges.txt`."""
    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix=SUFFIX))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(sorted(captions), trainers.BpeTrainer(end_of_word_suffix=SUFFIX, show_progress=False))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = [chr(c) for c in range(33, 127)]
    tokens = [START, END, *letters, *(c + SUFFIX for c in letters), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    disk.write_text(folder / "vocab.json", json.dumps(vocabulary) + "\n")
    disk.write_text(folder / "merges.txt", "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "bos_token": START}
    settings |= {"eos_token": END, "pad_token": END, "unk_token": END}
    disk.write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")


def build(vocabulary: int, vision: tuple[int, int], text: tuple[int, int], patch: int = 8) -> CLIPModel:
    """A CLIP for 64x64 images; `vision` and `text` are (width, layers), `patch` is the side of a patch in pixels."""
    shared = {"hidden_act": "quick_gelu", "num_attention_heads": 4, "projection_dim": 128}
    return CLIPModel(
        CLIPConfig(
            vision_config=shared
            | {"hidden_size": vision[0], "intermediate_size": 4 * vision[0], "num_hidden_layers": vision[1]}
            | {"image_size": 64, "patch_size": patch},
            text_config=shared
            | {"hidden_size": text[0], "intermediate_size": 4 * text[0], "num_hidden_layers": text[1]}
            | {"vocab_size": vocabulary, "max_position_embeddings": LENGTH}
            | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
            projection_dim=128,
            attn_implementation="eager",  # the fused kernel's backward pass is slow on a CPU for so few tokens
        )
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise images (B, 3, 64, 64) in [-1, 1] as CLIP expects."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images / 2 + 0.5 - mean) / std


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> dict[str, torch.Tensor]:
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")


def sample_batch(emoji: EmojiSet, rng: np.random.Generator, count: int) -> list[Composition]:
    """Compositions for a batch: of all concepts, of 12, or of 3, where style and background matter most."""
    everything = emoji.concepts
    emoji.concepts = list(rng.choice(everything, rng.choice([len(everything), 12, 3]), replace=False))
    batch = [emoji.describe(int(i)) for i in rng.integers(2**31, size=count)]
    emoji.concepts = everything
    return batch


def augment(picture: Image.Image, rng: np.random.Generator) -> torch.Tensor:
    """Random flip, crop, contrast, brightness and noise, to which a metric should be invariant."""
    if rng.random() < 0.3:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        side = int(rng.integers(54, 65))
        x, y = (int(v) for v in rng.integers(0, 65 - side, 2))
        picture = picture.crop((x, y, x + side, y + side)).resize((64, 64), Image.Resampling.BILINEAR)
    image = to_tensor(picture)
    image = image * float(rng.uniform(0.85, 1.1)) + float(rng.uniform(-0.08, 0.08))
    noise = rng.standard_normal(image.shape, dtype=np.float32) * float(rng.choice([0, 0, 0.05, 0.1]))
    return (image + torch.from_numpy(noise)).clamp(-1, 1)


def matches(captions: list[str], compositions: list[Composition]) -> torch.Tensor:
    """(captions, images): 1 if the caption describes the image, else 0."""
    rows = []
    for caption in captions:
        concept, *attributes = caption.split(", ")
        rows.append([p.concept == concept and all(a in _attributes(p) for a in attributes) for p in compositions])
    return torch.tensor(rows, dtype=torch.float32)


def _attributes(p: Composition) -> tuple[str, str, str]:
    return f"{p.style} style", f"on a {p.background} background", f"on an {p.background} background"


def contrastive_loss(clip: CLIPModel, images: torch.Tensor, tokens: dict, match: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE with several positives. match: (captions, images)."""
    output = clip(pixel_values=normalise(images), **tokens)
    logits = output.logits_per_text.float()  # (captions, images)
    directions = ((logits, match), (logits.T, match.T))
    return sum(-(m * F.log_softmax(x, dim=1)).sum(1).div(m.sum(1)).mean() for x, m in directions) / 2


def train(clip: CLIPModel, tokenizer, emoji: EmojiSet, steps: int, batch: int, lr: float, device: str) -> None:
    """Contrastive training with a cosine schedule."""
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.98))
    rng, began = np.random.default_rng([emoji.seed, 1]), time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        compositions = sample_batch(emoji, rng, batch)
        captions = [p.caption for p in compositions]
        images = torch.stack([augment(emoji.draw(p), rng) for p in compositions]).to(device)
        tokens = {k: v.to(device) for k, v in tokenize(tokenizer, captions).items()}
        with autocast(device):
            loss = contrastive_loss(clip, images, tokens, matches(captions, compositions).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, {(time.time() - began) / (step + 1):.3f} s", flush=True)


@torch.no_grad()
def accuracy(clip: CLIPModel, tokenizer, emoji: EmojiSet, count: int = 512) -> dict[str, float]:
    """Top-1 accuracy for concept, style and background on new compositions."""
    compositions = [emoji.describe(i) for i in range(count)]
    images = normalise(torch.stack([to_tensor(emoji.draw(p)) for p in compositions]))
    features = F.normalize(clip.get_image_features(pixel_values=images).pooler_output, dim=1)

    def top1(choices: list[list[str]], answers: list[int]) -> float:
        flat = tokenize(tokenizer, [c for row in choices for c in row])
        words = F.normalize(clip.get_text_features(**flat).pooler_output, dim=1).view(count, -1, features.shape[1])
        best = torch.einsum("nd,ncd->nc", features, words).argmax(1)
        return (best == torch.tensor(answers)).float().mean().item()

    styles = [[f"{p.concept}, {s} style" for s in emoji.styles] for p in compositions]
    grounds = [
        [f"{p.concept}, on a{'n' * (b == 'orange')} {b} background" for b in emoji.backgrounds] for p in compositions
    ]
    return {
        "concept": top1([emoji.concepts] * count, [emoji.concepts.index(p.concept) for p in compositions]),
        "style": top1(styles, [emoji.styles.index(p.style) for p in compositions]),
        "background": top1(grounds, [emoji.backgrounds.index(p.background) for p in compositions]),
    }


ROLES = {  # seed, vision (width, layers), text (width, layers), updates
    "text": (0, (128, 4), (128, 3), 1000),
    "features": (1, (96, 4), (64, 2), 1200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=list(ROLES))
    parser.add_argument("--steps", type=int, help="updates")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    seed, vision, text, steps = ROLES[args.role]
    torch.manual_seed(seed)
    folder = TINY_DIR / "base" / "tokenizer"
    if not (folder / "vocab.json").exists():
        emoji = EmojiSet()
        learn_tokenizer([emoji.describe(i).caption for i in range(10_000)], folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    clip = build(len(tokenizer), vision, text).to(args.device)
    train(clip, tokenizer, EmojiSet(seed=100 + seed), args.steps or steps, args.batch_size, args.lr, args.device)
    clip = clip.cpu().eval().half()
    if args.role == "text":
        clip.text_model.save_pretrained(TINY_DIR / "base" / "text_encoder")
    else:
        clip.save_pretrained(TINY_DIR / args.role)
        tokenizer.save_pretrained(TINY_DIR / args.role)
    print(args.role, accuracy(clip.float(), tokenizer, EmojiSet(seed=999)))


if __name__ == "__main__":
    main()
