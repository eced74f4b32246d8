"""The networks of the rewards: (pixels, prompt) -> raw score.

HPSv2, PickScore and CLIPScore are a cosine of CLIP features; ImageReward is BLIP with an MLP head; MPS is CLIP with a
cross-attention model (`pretrained/mps.py`). Backbones are transformers' (5.x; comments say where 4.x differs).
Each network has `encode_text(ids, mask)`, a tuple of tensors that depend only on the prompt and are cached, and
`forward(pixels, *text) -> (B,)`. Shapes: B pairs, S text tokens, L image tokens, D joint width, W other widths.
"""

import html
import itertools
import re
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
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

from pretrained import reward_files
from pretrained.mps import MPS
from pretrained.weight_files import all_finite
from utils.device import to_device

# --------------------------------------------------------------------------------------------- prompts -> ids


CLEANED = ("hpsv2.1", "hpsv2.0", "clipscore")  # rewards whose tokenizers clean the text first


def clean(text: str) -> str:
    """Text cleaning of the tokenizers of open_clip and OpenAI's CLIP, then lower case.

    Repairs HTML entities, UTF-8 read as Windows-1252 (mojibake), ligatures and full-width forms, curly quotes and
    control characters, which affects 1 % of real prompts. The originals use ftfy, which also repairs mojibake in parts
    of a text. PickScore and MPS were trained without cleaning.
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
    """Replace open_clip's start and end tokens by OpenAI's, which the vocabulary files have.

    open_clip reads OpenAI's tokens in a prompt as ordinary text. A space inserted into them has the same effect here
    and changes nothing else, as the tokenizer splits there anyway.
    """
    text = re.sub(r"<\|(start|end)oftext\|>", r"<| \1oftext |>", text)
    return re.sub("<(start|end)_of_text>", r"<|\1oftext|>", text)


def original_text(name: str, prompt: str) -> str:
    """A prompt as the tokenizer of the reward's training would read it."""
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
    """transformers' settings of a transformer whose MLP is four times as wide."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**dict(zip(names, (width, 4 * width, layers, heads), strict=True)), **more}


def clip_vit_h() -> CLIPConfig:
    """ViT-H-14 of HPSv2, PickScore and MPS, with the exact GELU; transformers' default is QuickGELU."""
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
    """ImageReward: ViT-L/16, and BERT-base with cross-attention. transformers' default eps and heads differ."""
    return BlipConfig(
        vision_config=sizes(1024, 24, 16, image_size=224, patch_size=16, layer_norm_eps=1e-6),
        text_config=sizes(768, 12, 12, encoder_hidden_size=1024, vocab_size=30524, is_decoder=True, pad_token_id=0),
    )


def run_tower(tower: nn.Module, pixels: torch.Tensor, dtype: torch.dtype):
    """Run a vision tower under autocast to `dtype`; everything else stays float32."""
    with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return tower(pixel_values=pixels)


class Cosine(nn.Module):
    """cos(image, text) of a CLIP; with `temperature` multiplied by exp(logit_scale), as in PickScore."""

    dtype = torch.float32  # of the vision tower

    def __init__(self, config: CLIPConfig, temperature: bool):
        super().__init__()
        self.model, self.temperature = CLIPModel(config), temperature
        self.config, self.length = config, config.text_config.max_position_embeddings

    def encode_text(self, ids, mask):
        """-> unit text features (B, D), of the first end token, which does not see padding: the mask is unused."""
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
    """BERT encodes the prompt with cross-attention to the image; an MLP maps its [CLS] state to the raw score.

    The paper's tables print the raw score; ImageReward itself reports the standardised one (`rewards.SCALE`).
    """

    dtype = torch.float32

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.config, self.length = config, 35
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_model = BlipTextModel(config.text_config, add_pooling_layer=False)
        widths = [config.text_config.hidden_size, *getattr(config, "mlp_widths", (1024, 128, 64, 16)), 1]
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        first = [module for layer in linear[:3] for module in (layer, nn.Identity())]  # in place of dropouts
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(*first, *linear[3:])})  # no activations, as published

    def encode_text(self, ids, mask):
        """-> ids and mask (B, S): the text is encoded together with the image, so only tokens can be cached."""
        return ids, mask

    def forward(self, pixels, ids, mask):
        image = run_tower(self.vision_model, pixels, self.dtype).last_hidden_state.float()  # (B, L, Wv)
        # The additive mask, (B, 1, 1, S): given a boolean one, transformers checks if it is all ones, which syncs.
        hidden = (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
        # Configured with is_decoder to have cross-attention, but called without, as the text is not causal.
        text = self.text_model(ids, hidden, encoder_hidden_states=image, is_decoder=False)
        return self.mlp["layers"](text.last_hidden_state[:, 0]).squeeze(-1)  # (B, S, Wt) -> (B,)


def build_meta(name: str, folder=None) -> nn.Module:
    """A reward's network on the meta device, with the sizes of `folder`'s config.json or the published ones."""
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
    """Rename the tensors of a reward's checkpoint to those of its network."""
    if name == "imagereward":
        return from_imagereward(state)
    if name == "mps":  # its checkpoint has the network's names
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
        "visual.ln_pre.": "vision_model.pre_layrnorm.",  # sic
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
        else:  # the projections are stored for x @ W; the text's is square, so its shape shows nothing
            out[key] = value.T if key in ("visual_projection.weight", "text_projection.weight") else value
    return out


def from_imagereward(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ImageReward's names -> transformers' BLIP; drops two projections that the score does not use."""
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
    """Load `state` strictly into a network on the meta device, in float32; frozen, in eval mode.

    Raises ValueError that names `origin` and the missing, unexpected or misshaped keys.
    """
    state = {key: value.float() for key, value in state.items() if not key.endswith("position_ids")}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    wrong = [f"missing {key}" for key in wanted if key not in shapes]
    wrong += [f"unexpected {key}" for key in shapes if key not in wanted]
    wrong += [f"{k} is {shapes[k]}, not {wanted[k]}" for k in wanted if k in shapes and shapes[k] != wanted[k]]
    if wrong:
        raise ValueError(f"{origin}: another model's file: {len(wrong)} keys do not fit: {'; '.join(wrong[:3])}")
    network.load_state_dict(state, assign=True)
    for module in network.modules():
        if hasattr(module, "position_ids"):  # not read from the file, and still on the meta device
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return network.requires_grad_(False).eval()


def text_tower(network: nn.Module) -> list[nn.Module]:
    """Modules whose output depends on the prompt only; ImageReward has none."""
    return [] if isinstance(network, ImageReward) else [network.model.text_model, network.model.text_projection]


def to_bf16(network: nn.Module, dtype: torch.dtype) -> None:
    """Run the vision tower in `dtype`. Its linear layers are stored in it, or autocast would cast them at each call."""
    network.dtype = dtype
    for module in getattr(network, "model", network).vision_model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)


# --------------------------------------------------------------------------------------------- prompts and loading


class PromptFeatures:
    """Tokenize and embed the prompts of a reward: `text(prompts, device)` -> the text arguments of `network`, B rows.

    Embeddings have no gradient; those of the latest `kept` prompts are cached.
    """

    kept = 1024

    def __init__(self, name: str, network: nn.Module, tokenizer):
        self.name, self.network, self.tokenizer = name, network, tokenizer
        self.cache: dict[str, list[torch.Tensor]] = {}
        self.device = None  # where prompts are embedded; None: where the images are
        entries = network.config.text_config.vocab_size
        if not 0 <= entries - len(tokenizer) <= 2:  # ImageReward has two more tokens, which no prompt contains
            raise ValueError(f"{name}: the tokenizer has {len(tokenizer)} entries, the checkpoint {entries}")
        if name != "imagereward":  # published configs say 2, which transformers treats as a special case
            network.model.text_model.eos_token_id = tokenizer.eos_token_id
        if name == "mps":
            network.condition_ids = self.ids([network.condition])[0]

    def __call__(self, prompts: list[str], device) -> list[torch.Tensor]:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cache]
        if new:
            with torch.no_grad():
                columns = self.network.encode_text(*(to_device(x, self.device or device) for x in self.ids(new)))
                rows = ([to_device(column[i].clone(), device) for column in columns] for i in range(len(new)))
                self.cache.update(zip(new, rows, strict=True))
        rows = [self.cache[prompt] for prompt in prompts]
        for prompt in list(self.cache)[: -self.kept]:
            del self.cache[prompt]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def ids(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask (B, S). A prompt that is too long is cut but keeps the end token."""
        texts = [original_text(self.name, prompt) for prompt in prompts]
        length = {"padding": "max_length", "truncation": True, "max_length": self.network.length}
        out = self.tokenizer(texts, return_tensors="pt", **length)
        return out.input_ids, out.attention_mask

    def on_cpu(self) -> None:
        """Move the text tower to the CPU and embed prompts there."""
        for part in text_tower(self.network):
            part.to("cpu")
            self.device = "cpu"


def load(name: str, source: str | Path | None, device, dtype: torch.dtype | None) -> tuple[nn.Module, PromptFeatures]:
    """The network of a reward with its weights, and its prompt features; see `rewards.load`."""
    path = reward_files.find_checkpoint(name, source)
    vocabulary = reward_files.find_vocabulary(name, path.parent)
    reward_files.check_digest(name, path)
    config = path.parent if reward_files.has_sizes(path.parent) else None
    network, words = build_meta(name, config), tokenizer(name, vocabulary)
    weights = all_finite(reward_files.read_checkpoint(name, path), path)
    load_strict(network, rename(name, weights), path)
    text = PromptFeatures(name, network.to(device), words)
    if dtype is not None:
        to_bf16(network, dtype)
    return network, text
