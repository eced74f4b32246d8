"""Scorers: networks that look at the images of a point, with their outputs cached beside the images.

A scorer is `(images (B, 3, H, W) in [-1, 1], prompts) -> {column: values (B,) or features (B, D)}`. Its name ends in
the fingerprint of its weights and is also that of its cache file. `args`: the flags of `report/options.py`, completed.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import rewards
from pretrained import reward_files
from pretrained.features import dino_features, find_dino, inception_features, is_dinov2
from pretrained.inception import find_inception
from report.covariance_definitions import definition_notes
from report.options import name_list
from report.points import fingerprint
from utils import disk
from utils.images import to_tensor

# As rewards are printed.
TABLE_SCALE = {"hpsv2.1": 100, "hpsv2.0": 100, "clipscore": 100, "tiny": 0.1, "tiny2": 0.1, "rater": 0.1}

Scorer = Callable[[Tensor, list[str]], dict[str, Tensor]]
Batches = Iterable[tuple[Tensor, list[str]]]


def reward_scorer(name: str, source: str | None, device: str, prompts: list[str]) -> Scorer:
    reward = rewards.load(name, source, device)
    reward.check(prompts)
    return lambda images, prompts: {name: reward(images, prompts) * TABLE_SCALE.get(name, 1)}


def feature_scorer(column: str, extract: Callable[[Tensor], Tensor]) -> Scorer:
    return lambda images, prompts: {column: extract(images)}


def concept_of(prompt: str) -> str:
    """What a prompt of the emoji set asks for: "octopus" of "octopus, flat style"."""
    return prompt.split(",")[0]


def held_out_clip_scorer(folder: Path, concepts: list[str], device: str) -> Scorer:
    """A CLIP that no reward has used: its features, and whether it ranks the prompt's concept first (in %)."""
    clip = rewards.load("clipscore", folder, device)

    def score(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        features = F.normalize(clip.network.encode_image(clip.prepare(images, clip.size)), dim=1)
        best = (features @ clip.text(concepts, device)[0].T).argmax(1).tolist()
        right = [100.0 * (concepts[i] == concept_of(prompt)) for i, prompt in zip(best, prompts, strict=True)]
        return {"concept": torch.tensor(right), "diversity": features, "fid": features}

    return score


def reward_scorers(args, prompts: list[str]) -> dict[str, Scorer]:
    """A scorer for each of `--rewards`.

    Raises ValueError for a repeated name, unmatched `--reward-weights`, and prompts that a reward cannot score.
    """
    names = name_list(args.rewards)
    sources = name_list(args.reward_weights) if args.reward_weights else [None] * len(names)
    if len(sources) != len(names):
        raise ValueError(f"--reward-weights names {len(sources)} paths, --rewards {args.rewards} needs {len(names)}")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--rewards {args.rewards}: {repeated[0]} is there twice; name each reward once")
    found = {}
    for name, source in zip(names, sources, strict=True):
        scorer = reward_scorer(name, source or None, args.device, prompts)
        found[f"{name}.{fingerprint(reward_files.find_checkpoint(name, source or None))}"] = scorer
    return found


def scorers_for(
    args, held_out_clip: Path | None, concepts: list[str], prompts: list[str]
) -> tuple[dict[str, Scorer], list[str]]:
    """Scorers by name and fingerprint, and notes on what is measured how, or not at all.

    `held_out_clip`: folder of the CLIP that measures the tiny base, whose prompts name one of `concepts`; None for the
    other bases, which need `--dino` and `--inception`.
    """
    found, notes = reward_scorers(args, prompts), []
    if held_out_clip:
        found[f"features.{fingerprint(held_out_clip)}"] = held_out_clip_scorer(held_out_clip, concepts, args.device)
        notes.append("Concept, diversity and the distances are measured by the held-out CLIP of the tiny base, 128 "
                     "features, where the paper has CLIP ViT-B/32, DINO and Inception.")  # fmt: skip
        return found, notes + definition_notes(args.reading, "the held-out CLIP's")
    if args.dino:
        scorer = feature_scorer("diversity", dino_features(args.dino, device=args.device))
        found[f"dino.{fingerprint(find_dino(args.dino))}"] = scorer
    else:
        notes.append("No diversity: it needs --dino, a folder of facebook/dino-vits16.")
    if args.more_metrics and args.dino and args.reference and is_dinov2(args.dino):
        scorer = feature_scorer("fdd", dino_features(args.dino, "imagenet", args.device, unit=False))
        found[f"dinov2.{fingerprint(find_dino(args.dino))}"] = scorer
    elif args.more_metrics:
        notes.append("No FD-DINOv2: it needs --dino with a folder of facebook/dinov2-large, and --reference.")
    if args.inception and args.reference:
        scorer = feature_scorer("fid", inception_features(args.inception, args.device))
        found[f"inception.{fingerprint(find_inception(args.inception))}"] = scorer
        notes += definition_notes(args.reading)
    else:
        notes.append("No FID, CovDist, LogCovDist: they need --inception, pytorch-fid's weight file, and --reference.")
    return found, notes


@torch.no_grad()
def cached_columns(path: Path, about: str, scorer: Scorer, batches: Batches) -> dict[str, Tensor]:
    """A scorer's output for batches of images, read from the file `path` if it was written for the same `about`."""
    if path.exists():
        with safe_open(path, framework="pt") as file:
            if file.metadata()["about"] == about:
                return {key: file.get_tensor(key) for key in file.keys()}
    parts = [{k: v.float().cpu() for k, v in scorer(*batch).items()} for batch in batches]
    columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    disk.write(path, {key: t.clone() for key, t in columns.items()}, {"about": about})
    return columns


def sampled_batches(args, paths: list[Path], prompts: list[str]) -> Batches:
    """Images (B, 3, H, W) from their files, with the prompt of each."""
    for at in range(0, len(paths), args.batch_size):
        part = slice(at, at + args.batch_size)
        images = [to_tensor(Image.open(path)) for path in paths[part]]
        yield torch.stack(images).to(args.device), prompts[part]


def dataset_batches(args, data, indices: list[int]) -> Batches:
    """Images (B, 3, H, W) and captions of a dataset of (image (3, H, W), caption)."""
    for at in range(0, len(indices), args.batch_size):
        images, captions = zip(*(data[i] for i in indices[at : at + args.batch_size]), strict=True)
        yield torch.stack(images).to(args.device), list(captions)
