"""The official files of each reward: where they come from, where they are on disk, and their tensors.

What is missing is fetched from the hub, MPS apart. No pickle or archive executes code.
"""

import hashlib
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrained import hub, mps, weight_files


@dataclass(frozen=True)
class Checkpoint:
    """The source of an official reward; `vocabulary` is the hub repository with its tokenizer's files."""

    repo: str
    file: str
    size: str
    sha256: str
    vocabulary: str


CLIP_B = "openai/clip-vit-base-patch32"  # all CLIPs here and SD1.5's tokenizer/ share its vocabulary
OFFICIAL = {
    "hpsv2.1": Checkpoint(
        repo="xswu/HPSv2",
        file="HPS_v2.1_compressed.pt",
        size="1,972,490,005 bytes",
        sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        vocabulary=CLIP_B,
    ),
    "hpsv2.0": Checkpoint(
        repo="xswu/HPSv2",
        file="HPS_v2_compressed.pt",
        size="1,972,484,501 bytes",
        sha256="07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
        vocabulary=CLIP_B,
    ),
    "pickscore": Checkpoint(
        repo="yuvalkirstain/PickScore_v1",
        file="model.safetensors",
        size="about 3.94 GB",
        sha256="",  # unknown
        vocabulary="yuvalkirstain/PickScore_v1",
    ),
    "imagereward": Checkpoint(
        repo="THUDM/ImageReward",
        file="ImageReward.pt",
        size="1,786,880,927 bytes",
        sha256="d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
        vocabulary="google-bert/bert-base-uncased",
    ),
    "mps": Checkpoint(
        repo="",  # on a drive linked in the README of github.com/Kwai-Kolors/MPS
        file="MPS_overall_checkpoint.pth",
        size="about 2.2 GB",
        sha256="",
        vocabulary=CLIP_B,
    ),
    "clipscore": Checkpoint(
        repo=CLIP_B,
        file="ViT-B-32.pt",  # OpenAI's archive; the hub repository has the same weights in transformers' layout
        size="about 354 MB",
        sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        vocabulary=CLIP_B,
    ),
}
MPS_DRIVE = "https://drive.google.com/file/d/17qrK_aJkVNM75ZEvMEePpLj6L867MLkN"  # a browser or gdown gets it
EMBEDDED = Path(__file__).parent.parent / "tiny" / "rewards"  # two tiny PickScores, part of this repository


def missing_checkpoint(name: str, place: str) -> FileNotFoundError:
    """The error if `place` has no checkpoint: which file of which repository to get, and where to put it."""
    if name not in OFFICIAL:
        return FileNotFoundError(f"{place}: no model.safetensors of {name}; restore it with git checkout")
    official = OFFICIAL[name]
    sha = f"sha256 {official.sha256}" if official.sha256 else "sha256 not published"
    fetch = f"of huggingface.co/{official.repo} (`hf download {official.repo} {official.file}`)"
    if name == "mps":
        fetch = f"from the drive that the README of github.com/Kwai-Kolors/MPS links to ({MPS_DRIVE})"
    if name == "clipscore":
        fetch = f"that github.com/openai/CLIP loads, or the same weights by `hf download {official.repo}`"
    default = "both in the hub's local cache" if official.repo else f"the file in {by_hand(official.file).parent}"
    return FileNotFoundError(
        f"{place}: no checkpoint of {name}; get {official.file} ({official.size}, {sha}) {fetch} and the tokenizer of "
        f"huggingface.co/{official.vocabulary}; put both into one folder and name it with --reward-weights, or leave "
        f"{default}"
    )


def fetch(name: str, repo: str, choices: list[list[str]], extra: str = "") -> Path:
    """Fetch the first of `choices` (lists of files) that a repository has, with `extra` if it is there; the folder.

    Raises OSError, in one line.
    """

    def choose(files: list[str]) -> list[str]:
        found = next((choice for choice in choices if set(choice) <= set(files)), [])
        return found + [extra] * bool(found and extra in files)

    official = OFFICIAL[name]
    return hub.fetch(repo, choose, known={official.file: official.sha256})


def find_checkpoint(name: str, source: str | Path | None) -> Path:
    """The weight file of `name`: the file `source`, or in the folder `source`, or by default in the hub's cache.

    What the cache lacks is fetched. Raises FileNotFoundError that names the file and its source.
    """
    files = ("model.safetensors", "pytorch_model.bin")
    if name == "rater":
        return EMBEDDED.parent / "data" / "emoji.png"  # what it looks images up in
    if name in OFFICIAL:  # a converted file loads faster than an official archive
        files = (files[0], OFFICIAL[name].file, files[1])
    if source is None and name in OFFICIAL:
        return find_official(name, files)
    source = Path(source or EMBEDDED / name)
    path = source if source.is_file() else next((source / f for f in files if (source / f).is_file()), None)
    if path is None:
        raise missing_checkpoint(name, str(source))
    return path


def find_official(name: str, files: tuple[str, ...]) -> Path:
    """The first of `files` of a reward in the hub's cache or fetched; MPS's where `by_hand` says."""
    official = OFFICIAL[name]
    if not official.repo:
        if by_hand(official.file).is_file():
            return by_hand(official.file)
        raise missing_checkpoint(name, str(by_hand(official.file)))
    path = hub.cached(official.repo, *files)
    if path is None:
        try:
            fetch(name, official.repo, [[file] for file in files], "config.json")
        except OSError as error:
            raise FileNotFoundError(f"{missing_checkpoint(name, 'local hub cache')} ({error})") from None
        path = hub.cached(official.repo, *files)
    return path


def by_hand(file: str) -> Path:
    """Where files that are not on the hub are kept: torch's folder of downloaded weights (TORCH_HOME)."""
    return Path(torch.hub.get_dir(), "checkpoints", file)


def find_vocabulary(name: str, folder: Path) -> Path:
    """The folder of the tokenizer's files: that of the weights, its `tokenizer/`, or the hub's cache, else fetched."""
    wanted = [["tokenizer.json"], ["vocab.txt"] if name == "imagereward" else ["vocab.json", "merges.txt"]]
    for place in (folder, folder / "tokenizer"):
        if any(all((place / file).is_file() for file in files) for files in wanted):
            return place
    repo, reason = OFFICIAL[name].vocabulary if name in OFFICIAL else "", ""
    for files in wanted if repo else []:
        if all(hub.cached(repo, file) for file in files):
            return hub.cached(repo, files[0]).parent
    if repo:
        try:
            return fetch(name, repo, wanted[::-1])
        except OSError as error:
            reason = f" ({error})"
    files = " and ".join(wanted[1])
    raise FileNotFoundError(
        f"{folder}: no vocabulary for {name}; put {files} of huggingface.co/{repo or CLIP_B} there{reason}"
    )


def has_sizes(folder: Path) -> bool:
    """True if a folder has the config.json of a reward; some repositories have one of another kind."""
    path = folder / "config.json"
    return path.is_file() and "vision_config" in weight_files.read_json(path)


def check_digest(name: str, path: Path) -> None:
    """Warn if a file with the official name has another digest than the official file."""
    official = OFFICIAL.get(name)
    if official and official.sha256 and path.name == official.file:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != official.sha256:
            warnings.warn(f"{path}: sha256 is {found}, the official file's is {official.sha256}", stacklevel=3)


def read_checkpoint(name: str, path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a reward's weight file under the file's own keys, for any kind of file."""
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        if name == "mps":
            return mps.read_pickled(path)
        with zipfile.ZipFile(path) as archive:
            scripted = any(member.endswith("/constants.pkl") for member in archive.namelist())
        if scripted:  # as OpenAI publishes; torch.load refuses TorchScript, and torch.jit.load runs no Python
            state = torch.jit.load(path, map_location="cpu").state_dict()
            return {key: value for key, value in state.items() if value.is_floating_point()}  # no sizes
    state = weight_files.read_file(path)
    return {key.removeprefix("module."): value for key, value in state.items()}
