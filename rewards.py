"""R(x, c), the reward of an image for a prompt: what it is, and the scale on which the loss sees it.

A reward model scores an image x with a prompt c. Its raw score is what the paper's tables print; the loss, Eq. (2),
uses the rescaled score, (raw + offset) * factor, which is about 0 to 1. Several rewards are summed with weights:

    reward = rewards.load("hpsv2.1", "FOLDER")     raw scores: reward(images, prompts) -> (B,)
    total = rewards.build("hpsv2.1=1,mps=0.5")     weighted sum of rescaled scores: total(images, prompts) -> (B,)

    python rewards.py score --reward hpsv2.1 --reward-weights FOLDER --prompt "a red fox" fox.png
    python rewards.py convert-mps MPS_overall_checkpoint.pth FOLDER/model.safetensors

The networks are in `pretrained/reward_networks.py` and `pretrained/mps.py`, the files in `pretrained/reward_files.py`.
torch is imported inside functions, so that `--help` does not wait for it.
"""

import math
import sys
from pathlib import Path

# (offset, factor) of each reward. The paper: rewards are brought to [0, 1] and weigh 1e-3 in the loss, against 1e-5 of
# the diffusion loss. Its code adds an offset and multiplies, without a clamp. Raw scores are those of the paper's
# tables, which print HPSv2.1 and CLIPScore times 100.
SCALE = {
    "tiny": (0.0, 0.1),  # PickScores of the embedded base: about 3 for a wrong caption, 7 for the base's samples
    "tiny2": (0.0, 0.1),
    "rater": (0.0, 0.1),  # the ground truth of the tiny base, `tiny/rater.py`: 10 for a perfect image
    "hpsv2.1": (0.0, 1.0),  # a cosine, 0.15 to 0.40
    "hpsv2.0": (0.0, 1.0),
    "pickscore": (-20.0, 0.1),  # 20 -> 0, 22 -> 0.2, 30 -> 1
    # ImageReward's own standardisation, (r - mean) / std. The official code multiplies by std instead.
    "imagereward": (-0.16717362830052426, 1 / 1.0333394966054072),
    "mps": (0.0, 0.1),  # 10 -> 1; good images exceed it
    "clipscore": (0.0, 1.0),  # a cosine, about 0.3
}
NAMES = tuple(SCALE)


class Reward:
    """R(x, c) of one frozen reward model: `reward(images, prompts) -> (B,)`, raw scores.

    images: float (B, 3, H, W) in [-1, 1], any size, differentiable; prompts: list of B strings.
    network: one of `pretrained.reward_networks`; text: its `PromptFeatures`, which embed and cache prompts.
    prepare: `(images, size) -> pixels`. All but the vision tower computes in float32 even under autocast, the vision
    tower in `network.dtype`.
    """

    def __init__(self, name: str, network, text, prepare):
        self.name, self.network, self.text, self.prepare = name, network, text, prepare
        self.offset, self.factor = SCALE[name]
        self.size = network.config.vision_config.image_size

    def __call__(self, images, prompts: list[str]):
        import torch

        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{self.name}: images must be (B, 3, H, W), not {tuple(images.shape)}")
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(f"{self.name}: needs a list of {len(images)} prompts, one per image; got {prompts!r:.60}")
        with torch.autocast(images.device.type, enabled=False):
            return self.network(self.prepare(images, self.size), *self.text(prompts, images.device))

    def check(self, prompts: list[str]) -> None:
        """Raises ValueError for prompts that it cannot score; networks score any."""

    def rescale(self, raw):
        """Raw scores -> about [0, 1], the scale of the loss."""
        return (raw + self.offset) * self.factor

    def on_cpu(self) -> None:
        """Embed prompts on the CPU from now on, to save GPU memory."""
        self.text.on_cpu()


class WeightedSum:
    """The reward of the loss: `(images, prompts) -> (B,)`, the sum over `rewards` of weight * rescaled score."""

    def __init__(self, rewards: list[Reward], weights: list[float]):
        self.rewards, self.weights = rewards, weights
        self.names = [reward.name for reward in rewards]

    def __call__(self, images, prompts: list[str]):
        return self.total(reward(images, prompts) for reward in self.rewards)

    def total(self, scores):
        """The weighted sum of given raw scores, one tensor (B,) per reward."""
        terms = zip(self.weights, self.rewards, scores, strict=True)
        return sum(weight * reward.rescale(score) for weight, reward, score in terms)


def load(name: str, source: str | Path | None = None, device="cpu", dtype=None, original: bool = False) -> Reward:
    """The reward `name`, one of `NAMES`.

    source: a weight file, or a folder with it, the tokenizer's files and, if the sizes are not the published ones, a
    `config.json`; None means the hub's local cache, or for `tiny`, `tiny2` and `rater` this repository.
    dtype: of the vision tower, None (float32) or torch.bfloat16. original: preprocess as the reward's own repository
    does, not as the paper does; of these only HPSv2's preprocessing is differentiable.
    Raises ValueError or FileNotFoundError, in one line that says what to do.
    """
    if name not in NAMES:
        raise ValueError(f"unknown reward {name!r}; known: {', '.join(NAMES)}")
    if name == "rater":
        from tiny.rater import Rater

        if source:
            raise ValueError(f"rater: has no weights to read from {source}; leave out --reward-weights")
        return Rater(device)
    from pretrained import preprocess, reward_networks

    network, text = reward_networks.load(name, source, device, dtype)
    prepare = preprocess.preprocess
    if original:
        prepare = preprocess.preprocess_padded if name.startswith("hpsv2") else preprocess.preprocess_8bit
    return Reward(name, network, text, prepare)


def parse(spec: str) -> list[tuple[str, float]]:
    """`"hpsv2.1=1,pickscore=0.5"` -> [("hpsv2.1", 1.0), ("pickscore", 0.5)]; the default weight is 1."""
    pairs = []
    for item in spec.split(","):
        name, _, number = (part.strip() for part in item.partition("="))
        if name not in NAMES:
            raise ValueError(f"--reward {spec}: unknown reward {name!r}; known: {', '.join(NAMES)}")
        try:
            weight = float(number) if "=" in item else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise ValueError(f"--reward {spec}: the weight of {name} is {number!r}, not a number; write {name}=0.5")
        if name in dict(pairs):
            raise ValueError(f"--reward {spec}: {name} is named twice")
        pairs.append((name, weight))
    return pairs


def build(spec: str, sources: str | list | None = None, device="cpu", dtype=None, original=False) -> WeightedSum:
    """The weighted sum for `--reward SPEC --reward-weights PATH[,PATH]`.

    sources: one path per reward in the order of `spec`, as a list or joined by commas; an empty one means `load`'s
    default place.
    """
    pairs = parse(spec)
    paths = sources.split(",") if isinstance(sources, str) else list(sources or [])
    if paths and len(paths) != len(pairs):
        raise ValueError(f"--reward-weights names {len(paths)} paths, --reward {spec} needs {len(pairs)}, in its order")
    paths = paths or [None] * len(pairs)
    rewards = [load(name, path or None, device, dtype, original) for (name, _), path in zip(pairs, paths, strict=True)]
    return WeightedSum(rewards, [weight for _, weight in pairs])


if __name__ == "__main__":
    from pretrained.reward_commands import main

    sys.exit(main())
