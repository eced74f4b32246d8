"""Prompts -> the UNet's conditioning, by transformers' CLIP text models. The only file where SD1.5 and SDXL differ.

SD1.5 and the tiny base: the last hidden states of one encoder. SDXL: the penultimate hidden states of two encoders,
concatenated, the second one's pooled text feature, and the image size. S text tokens, D width of the states.
"""

import sys

import torch
from torch import Tensor

from utils import distributed
from utils.device import to_device

CACHE_BYTES = 2**29  # size limit of the cached prompt embeddings
BATCH = 32  # prompts per batch on a GPU


class TextEncoder:
    """Frozen text encoders and their tokenizers. `encoder(prompts, size)` gives the keyword arguments of the UNet.

    Embeddings are cached. On a CPU prompts are encoded one at a time, so an embedding does not depend on the rest of
    the batch; on a GPU they are batched.
    """

    def __init__(self, models: list, tokenizers: list):
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.tokenizers = tokenizers
        self.cache: dict[str, dict[str, Tensor]] = {}
        self.device = models[0].device  # of the returned embeddings
        self.cut_reported = False

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> "TextEncoder":
        self.models = [model.to(device, dtype) for model in self.models]
        self.cache.clear()
        self.device = self.models[0].device
        return self

    def on_cpu(self) -> None:
        """Move the encoders and the cache to the CPU; calls still return tensors on the original device."""
        self.models = [model.to("cpu") for model in self.models]
        self.cache.clear()

    def __call__(self, prompts: list[str], size: tuple[int, int]) -> dict[str, Tensor]:
        """Embed prompts. size: height and width in pixels, used by SDXL only.

        Returns context (B, S, D) and, for SDXL, pooled (B, 1280), in the encoders' dtype, and time_ids (B, 6), float32.
        """
        features = self.features(prompts)
        conditioning = {key: to_device(torch.cat([f[key] for f in features]), self.device) for key in features[0]}
        if len(self.models) == 2:
            H, W = size
            time_ids = [[H, W, 0, 0, H, W]] * len(prompts)  # original size, crop offset, target size
            conditioning["time_ids"] = to_device(torch.tensor(time_ids, dtype=torch.float32), self.device)
        return conditioning

    def report_cut(self, prompts: list[str]) -> None:
        """Say once, on stderr, how many of the prompts are too long for the encoder, and what it does not read."""
        if self.cut_reported:
            return
        tokenizer, length = self.tokenizers[0], self.models[0].config.max_position_embeddings
        tokens = {prompt: tokenizer(prompt, verbose=False).input_ids for prompt in dict.fromkeys(prompts)}
        cut = [prompt for prompt, ids in tokens.items() if len(ids) > length]
        if cut and distributed.is_main_process():
            unread = tokenizer.decode(tokens[cut[0]][length - 1 : -1])
            few = f"a prompt is longer than the {length} tokens that the text encoder reads"
            many = (
                f"{len(cut)} of {len(tokens)} prompts are longer than the {length} tokens that the text encoder reads"
            )
            print(
                f"{many if len(tokens) > 1 else few}: of {cut[0][:40]!r}... it does not read {unread[:80]!r}",
                file=sys.stderr,
            )
        self.cut_reported = bool(cut)

    def features(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """Per prompt: context (1, S, D) and, for SDXL, pooled (1, 1280)."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.cache]
        self.report_cut(new)
        together = 1 if self.models[0].device.type == "cpu" else BATCH
        for batch in (new[at : at + together] for at in range(0, len(new), together)):
            self.cache.update(zip(batch, self._encode(batch), strict=True))
        features = [self.cache[prompt] for prompt in prompts]
        kept = max(1, CACHE_BYTES // sum(t.nbytes for t in features[0].values()))
        for prompt in list(self.cache)[:-kept]:
            del self.cache[prompt]
        return features

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        outputs = []
        for model, tokenizer in zip(self.models, self.tokenizers, strict=True):
            length = model.config.max_position_embeddings
            tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            with torch.autocast(model.device.type, enabled=False):  # same result inside and outside autocast
                outputs.append(model(to_device(tokens.input_ids, model.device), output_hidden_states=True))
        if len(outputs) == 1:
            states = {"context": outputs[0].last_hidden_state}
        else:
            context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
            states = {"context": context, "pooled": outputs[1].text_embeds}
        return [{key: t[i : i + 1].clone() for key, t in states.items()} for i in range(len(prompts))]
