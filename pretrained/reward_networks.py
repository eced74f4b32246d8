"""The networks behind `rewards.py`: what happens between an image, a prompt and a number.

HPSv2, PickScore and CLIPScore are a cosine of CLIP features; ImageReward is BLIP with a head; MPS is CLIP
with a cross model (`pretrained/mps.py`). Backbones are transformers' (5.x; where 4.x differs a comment says so).
Each network has `encode_text(ids, mask)`, a tuple of tensors that depend on the prompt alone and are cached,
and `forward(pixels, *text) -> (B,)`. Shapes: B pairs, S text tokens, L image tokens, D joint width, W others.
"""

import html
import itertools
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipTextModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)

from pretrained.mps import MPS
from utils import images as pictures
from utils.device import to_device
from utils.images import CLIP_MEAN, CLIP_STD

# ------------------------------------------------------------------------------------------- images -> pixels


def normalise(x: torch.Tensor) -> torch.Tensor:
    """By CLIP's statistics, which BLIP shares."""
    return (x - x.new_tensor(CLIP_MEAN)[:, None, None]) / x.new_tensor(CLIP_STD)[:, None, None]


def unit_range(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1], clamped as in the paper's code; float32, as antialiasing knows no other on CPU."""
    return (images.float() / 2 + 0.5).clamp(0, 1)


def shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the shorter side at `size`, the longer truncated as torchvision does."""
    return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)


def preprocess(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> normalised pixels (B, 3, size, size), differentiable.

    The paper's path for every reward: shortest side to `size` by antialiased bicubic, centre crop, CLIP
    statistics; equal to torchvision's. Bicubic overshoots [0, 1] by a few percent, which is not clamped.
    """
    return pictures.preprocess(images.float(), size, CLIP_MEAN, CLIP_STD)


def preprocess_padded(images: torch.Tensor, size: int) -> torch.Tensor:
    """HPSv2's own path, differentiable: the longest side to `size`, black borders, CLIP statistics."""
    x = unit_range(images)
    scale = size / max(x.shape[-2:])
    height, width = round(x.shape[-2] * scale), round(x.shape[-1] * scale)
    x = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return normalise(F.pad(x, (left, size - width - left, top, size - height - top)))


def preprocess_8bit(images: torch.Tensor, size: int) -> torch.Tensor:
    """The other repositories' own path: as `preprocess`, but 8-bit and with Pillow, so without a gradient."""
    pixels = []
    for image in (unit_range(images) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        height, width = shortest_side(*image.shape[:2], size)
        resized = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        top, left = round((height - size) / 2), round((width - size) / 2)
        pixels.append(torch.from_numpy(resized[top : top + size, left : left + size]).permute(2, 0, 1) / 255)
    return normalise(torch.stack(pixels).to(images.device))


# --------------------------------------------------------------------------------------------- prompts -> ids


CLEANED = ("hpsv2.1", "hpsv2.0", "clipscore")  # whose tokenizers repair the text first


def clean(text: str) -> str:
    """What the tokenizers of open_clip and OpenAI's CLIP do to a text first: repairs, then lower case.

    HTML entities; UTF-8 that was read as Windows-1252; ligatures and full-width forms; curly quotes; control
    characters. They concern 1 % of real prompts. The originals use ftfy, which also finds mojibake inside
    text that is otherwise sound; PickScore and MPS were trained without any of this.
    """
    text = html.unescape(html.unescape(text))
    try:
        text = b"".join(c.encode("latin-1" if "\x80" <= c <= "\x9f" else "cp1252") for c in text).decode("utf-8")
    except UnicodeError:
        pass  # not mojibake
    text = re.sub("[\u3000\ufb00-\ufb06\uff01-\uffef]", lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("[\u02bc\u2018-\u201b]", "'", re.sub("[\u201c-\u201f]", '"', text))
    return re.sub("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]", "", text).lower()


def respell(text: str) -> str:
    """What open_clip calls the start and the end of a text, in OpenAI's words, which the vocabulary files have.

    To open_clip those words in a prompt are ordinary text. A space between sign and letter keeps them that, and
    changes nothing else: the pattern that cuts text into words cuts there anyway.
    """
    text = re.sub(r"<\|(start|end)oftext\|>", r"<| \1oftext |>", text)
    return re.sub("<(start|end)_of_text>", r"<|\1oftext|>", text)


def original_text(name: str, prompt: str) -> str:
    """A prompt as the tokenizer that a reward was trained with understands it."""
    prompt = clean(prompt) if name in CLEANED else prompt
    return respell(prompt) if name.startswith("hpsv2") else prompt


def tokenizer(name: str, folder) -> CLIPTokenizer | BertTokenizer:
    """The tokenizer of a reward from the vocabulary files in `folder`."""
    if name == "imagereward":
        return BertTokenizer.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    if name in CLEANED:
        tokenizer.pad_token = "!"  # id 0, as the originals pad; only MPS sees its padding at all
    return tokenizer


# --------------------------------------------------------------------------------------------------- networks


def sizes(width: int, layers: int, heads: int, **more) -> dict:
    """A transformer in the library's words; all of them have a feed-forward four times as wide."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip(names, (width, 4 * width, layers, heads), strict=True)), **more}


def clip_vit_h() -> CLIPConfig:
    """ViT-H-14 of HPSv2, PickScore and MPS, with the exact GELU: the library's default is QuickGELU."""
    return CLIPConfig(
        text_config=sizes(1024, 24, 16, hidden_act="gelu"),
        vision_config=sizes(1280, 32, 16, hidden_act="gelu", image_size=224, patch_size=14),
        projection_dim=1024,
    )


def clip_vit_b() -> CLIPConfig:
    """OpenAI's ViT-B/32, with QuickGELU."""
    return CLIPConfig(
        text_config=sizes(512, 12, 8, hidden_act="quick_gelu"),
        vision_config=sizes(768, 12, 12, hidden_act="quick_gelu", image_size=224, patch_size=32),
        projection_dim=512,
    )


def blip_large() -> BlipConfig:
    """ImageReward: ViT-L/16, and BERT-base with cross-attention. The library's eps and heads differ."""
    return BlipConfig(
        vision_config=sizes(1024, 24, 16, image_size=224, patch_size=16, layer_norm_eps=1e-6),
        text_config=sizes(768, 12, 12, encoder_hidden_size=1024, vocab_size=30524, is_decoder=True, pad_token_id=0),
    )


def run_tower(tower: nn.Module, pixels: torch.Tensor, dtype: torch.dtype):
    """A vision tower in `dtype` autocast; everything outside of it stays float32."""
    with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return tower(pixel_values=pixels)


class Cosine(nn.Module):
    """cos(image, text) of a CLIP; with `temperature` times exp(logit_scale), as PickScore has it."""

    dtype = torch.float32  # of the vision tower

    def __init__(self, config: CLIPConfig, temperature: bool):
        super().__init__()
        self.model, self.temperature = CLIPModel(config), temperature
        self.config, self.length = config, config.text_config.max_position_embeddings

    def encode_text(self, ids, mask):
        """-> unit text features (B, D). The first end token is pooled and sees no padding, so the mask is not used."""
        # In transformers 4.x get_text_features returns the projected feature itself, not an object.
        return (F.normalize(self.model.get_text_features(ids).pooler_output, dim=-1),)

    def encode_image(self, pixels):
        """-> image features (B, D), not normalised."""
        pooled = run_tower(self.model.vision_model, pixels, self.dtype).pooler_output
        return self.model.visual_projection(pooled.float())  # (B, Wv) -> (B, D)

    def forward(self, pixels, text):
        cosine = (F.normalize(self.encode_image(pixels), dim=-1) * text).sum(-1)  # (B, D), (B, D) -> (B,)
        return cosine * self.model.logit_scale.exp() if self.temperature else cosine


class ImageReward(nn.Module):
    """BERT reads the prompt while it looks at the image; a head turns its [CLS] state into the raw score.

    The raw score is what the paper tabulates; ImageReward itself publishes the standardised one (`rewards.SCALE`).
    """

    dtype = torch.float32

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.config, self.length = config, 35
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_model = BlipTextModel(config.text_config, add_pooling_layer=False)
        widths = [config.text_config.hidden_size, *getattr(config, "mlp_widths", (1024, 128, 64, 16)), 1]
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        first = [module for layer in linear[:3] for module in (layer, nn.Identity())]  # dropouts stood between them
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*first, *linear[3:])})  # no activations: that is published

    def encode_text(self, ids, mask):
        """-> ids and mask (B, S): the text is read together with the image, so no features can be kept."""
        return ids, mask

    def forward(self, pixels, ids, mask):
        image = run_tower(self.vision_model, pixels, self.dtype).last_hidden_state.float()  # (B, L, Wv)
        # As it is added to the scores, (B, 1, 1, S): of the mask itself transformers asks whether it hides anything,
        # and the host would wait for a GPU's answer.
        hidden = (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
        # Configured with is_decoder, to own cross-attention, but called without, or the text would be causal.
        text = self.text_model(ids, hidden, encoder_hidden_states=image, is_decoder=False)
        return self.mlp["layers"](text.last_hidden_state[:, 0]).squeeze(-1)  # (B, S, Wt) -> (B,)


def build_meta(name: str, folder=None) -> nn.Module:
    """A reward's network on the meta device, of the sizes in `folder`'s config.json or the published ones."""
    read = BlipConfig if name == "imagereward" else CLIPConfig
    published = {"imagereward": blip_large, "clipscore": clip_vit_b}.get(name, clip_vit_h)
    config = read.from_pretrained(folder) if folder else published()
    with torch.device("meta"):
        if name == "imagereward":
            return ImageReward(config)
        if name == "mps":
            return MPS(config)
        return Cosine(config, temperature=name in ("pickscore", "tiny", "tiny2"))


# --------------------------------------------------------------------------------- checkpoint -> network keys


def rename(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a reward's checkpoint under the names of its network."""
    if name == "imagereward":
        return from_imagereward(state)
    if name == "mps":  # written with the names that it is read with
        return state
    state = from_open_clip(state) if "visual.conv1.weight" in state else state
    return {f"model.{key}": value for key, value in state.items()}


def from_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of open_clip and OpenAI's CLIP -> transformers' CLIPModel."""
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text_projection": "text_projection.weight",
    }
    parts = {
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        "transformer.resblocks.": "text_model.encoder.layers.",
        "visual.ln_pre.": "vision_model.pre_layrnorm.",  # the library's spelling
        "visual.ln_post.": "vision_model.post_layernorm.",
        "ln_final.": "text_model.final_layer_norm.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".mlp.c_fc.": ".mlp.fc1.",
        ".mlp.c_proj.": ".mlp.fc2.",
        ".attn.": ".self_attn.",
    }
    out = {}
    for old, value in state.items():
        key = names.get(old, old)
        for part, new in parts.items():
            key = key.replace(part, new)
        if ".in_proj_" in key:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("in_proj_", f"{letter}_proj.")] = third
        else:  # the two projections are stored for x @ W; the text's is square, so no shape would tell
            out[key] = value.T if key in ("visual_projection.weight", "text_projection.weight") else value
    return out


def from_imagereward(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ImageReward's names -> transformers' BLIP; two projections that the score never uses are left out."""
    names = {
        "blip.text_encoder.": "text_model.",
        "blip.visual_encoder.": "vision_model.",
        ".cls_token": ".embeddings.class_embedding",
        ".pos_embed": ".embeddings.position_embedding",
        ".patch_embed.proj.": ".embeddings.patch_embedding.",
        "vision_model.blocks.": "vision_model.encoder.layers.",
        ".norm1.": ".layer_norm1.",
        ".norm2.": ".layer_norm2.",
        ".attn.qkv.": ".self_attn.qkv.",
        ".attn.proj.": ".self_attn.projection.",
        "vision_model.norm.": "vision_model.post_layernorm.",
    }
    out = {}
    for key, value in state.items():
        if not key.startswith(("blip.vision_proj.", "blip.text_proj.")):
            for old, new in names.items():
                key = key.replace(old, new)
            out[key] = value
    return out


def load_strict(network: nn.Module, state: dict[str, torch.Tensor], origin: str | Path) -> nn.Module:
    """Puts `state` into a network on the meta device: every key accounted for, float32, frozen, eval mode.

    Raises ValueError naming `origin` and the keys that are missing, unexpected or misshaped.
    """
    state = {key: value.float() for key, value in state.items() if not key.endswith("position_ids")}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    wrong = [f"missing {key}" for key in wanted if key not in shapes]
    wrong += [f"unexpected {key}" for key in shapes if key not in wanted]
    wrong += [f"{k} is {shapes[k]}, not {wanted[k]}" for k in wanted if k in shapes and shapes[k] != wanted[k]]
    if wrong:
        raise ValueError(f"{origin}: not this reward's: {len(wrong)} keys do not fit: {'; '.join(wrong[:3])}")
    network.load_state_dict(state, assign=True)
    for module in network.modules():
        if hasattr(module, "position_ids"):  # not in the file, or not needed from it, and still without values
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return network.requires_grad_(False).eval()


def text_tower(network: nn.Module) -> list[nn.Module]:
    """What reads a prompt once and for all: nothing of ImageReward, which looks at each image while it reads."""
    return [] if isinstance(network, ImageReward) else [network.model.text_model, network.model.text_projection]


def to_bf16(network: nn.Module, dtype: torch.dtype) -> None:
    """Runs the vision tower in `dtype`. Its matrices are kept so: autocast would round them again at every call."""
    network.dtype = dtype
    for module in getattr(network, "model", network).vision_model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)


# ----------------------------------------------------------------------------------------------------- reward


class Reward:
    """`reward(images, prompts) -> (B,)`: the raw score; the loss sees it after `rescale`.

    images: float (B, 3, H, W) in [-1, 1], any size, differentiable; prompts: B strings. The network is frozen.
    Whatever autocast surrounds the call, all but the vision tower is float32, and that too unless `network.dtype`
    is lower.
    scale: (offset, factor), this reward's line of `rewards.SCALE`. `prepare` turns images into pixels.
    """

    kept = 1024  # prompts whose text features are remembered

    def __init__(self, name: str, network: nn.Module, tokenizer, scale: tuple[float, float]):
        self.name, self.network, self.tokenizer = name, network, tokenizer
        self.offset, self.factor = scale
        self.size, self.prepare, self.cache = network.config.vision_config.image_size, preprocess, {}
        self.text_device = None  # where the prompts are encoded; None: where the images are
        entries = network.config.text_config.vocab_size
        if not 0 <= entries - len(tokenizer) <= 2:  # ImageReward has two tokens more, which no prompt contains
            raise ValueError(f"{name}: the tokenizer has {len(tokenizer)} entries, the checkpoint {entries}")
        if name != "imagereward":  # published configs say 2, a value the library treats in a way of its own
            network.model.text_model.eos_token_id = tokenizer.eos_token_id
        if name == "mps":
            network.condition_ids = self.ids([network.condition])[0]

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{self.name}: images must be (B, 3, H, W), not {tuple(images.shape)}")
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(f"{self.name}: one prompt an image, in a list; got {prompts!r:.60} for {len(images)}")
        with torch.autocast(images.device.type, enabled=False):
            return self.network(self.prepare(images, self.size), *self.text(prompts, images.device))

    def on_cpu(self) -> None:
        """Encode prompts there from now on."""
        for part in text_tower(self.network):
            part.to("cpu")
            self.text_device = "cpu"

    def rescale(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw scores brought to about [0, 1]."""
        return (raw + self.offset) * self.factor

    def ids(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask (B, S); a prompt that is too long loses its tail but keeps the end token."""
        texts = [original_text(self.name, prompt) for prompt in prompts]
        length = {"padding": "max_length", "truncation": True, "max_length": self.network.length}
        out = self.tokenizer(texts, return_tensors="pt", **length)
        return out.input_ids, out.attention_mask

    def text(self, prompts: list[str], device) -> list[torch.Tensor]:
        """What the network keeps of each prompt, stacked over the batch; computed once, without gradient."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cache]
        if new:
            with torch.no_grad():
                columns = self.network.encode_text(*(to_device(x, self.text_device or device) for x in self.ids(new)))
                rows = ([to_device(column[i].clone(), device) for column in columns] for i in range(len(new)))
                self.cache.update(zip(new, rows, strict=True))
        rows = [self.cache[prompt] for prompt in prompts]
        for prompt in list(self.cache)[: -self.kept]:
            del self.cache[prompt]
        return [torch.stack(column) for column in zip(*rows, strict=True)]
