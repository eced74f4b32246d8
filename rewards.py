"""Reward models by name: the file that holds each, the scale the loss sees it on, a command that scores.

    python rewards.py score --reward hpsv2.1 --reward-weights FOLDER --prompt "a red fox" fox.png
    python rewards.py convert-mps MPS_overall_checkpoint.pth FOLDER/model.safetensors

The networks are in `pretrained/reward_networks.py` and `pretrained/mps.py`, imported when a reward is loaded, so that
`--help` stays quick.
The files are the official ones; nothing in them is run, and nothing is downloaded.
"""

import argparse
import hashlib
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from utils import cli


@dataclass(frozen=True)
class Checkpoint:
    """Where an official reward comes from; `vocabulary` is the hub repository with its tokenizer's files."""

    repo: str
    file: str
    size: str
    sha256: str
    vocabulary: str


CLIP_B = "openai/clip-vit-base-patch32"  # its vocabulary is that of every CLIP here, and of SD1.5's tokenizer/
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
        sha256="",  # not published where we could read it
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
        repo="",  # on a drive linked from the README of github.com/Kwai-Kolors/MPS
        file="MPS_overall_checkpoint.pth",
        size="about 2.2 GB",
        sha256="",
        vocabulary=CLIP_B,
    ),
    "clipscore": Checkpoint(
        repo=CLIP_B,
        file="ViT-B-32.pt",  # OpenAI's archive; the hub repository has the same in transformers' layout
        size="about 354 MB",
        sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        vocabulary=CLIP_B,
    ),
}
EMBEDDED = Path(__file__).parent / "tiny" / "rewards"  # two tiny PickScores that come with the code
NAMES = ("tiny", "tiny2", *OFFICIAL)

# The paper: rewards are brought to [0, 1] and weigh 1e-3 in the loss, against 1e-5 of the diffusion loss. In
# its code that is a shift and a factor without a clamp: scaled = (raw + offset) * factor. Raw values are those
# of its tables, where HPSv2.1 and CLIPScore are printed times 100.
SCALE = {
    "tiny": (0.0, 0.1),  # PickScores of the embedded base: a wrong caption is near 3, the base's samples near 7
    "tiny2": (0.0, 0.1),
    "hpsv2.1": (0.0, 1.0),  # a cosine, 0.15 .. 0.40
    "hpsv2.0": (0.0, 1.0),
    "pickscore": (-20.0, 0.1),  # 20 -> 0, 22 -> 0.2, 30 -> 1
    # ImageReward's own standardisation; the paper's code multiplies where this divides, and never trains on it
    "imagereward": (-0.16717362830052426, 1 / 1.0333394966054072),
    "mps": (0.0, 0.1),  # 10 -> 1; good images exceed it
    "clipscore": (0.0, 1.0),  # a cosine, about 0.3
}


def missing(name: str, place: str) -> FileNotFoundError:
    """What to say when no checkpoint is at `place`: which file of which repository, and where it goes."""
    if name not in OFFICIAL:
        return FileNotFoundError(f"{place}: no model.safetensors of {name}; restore it with git checkout")
    official = OFFICIAL[name]
    sha = f"sha256 {official.sha256}" if official.sha256 else "sha256 not published"
    fetch = f"of huggingface.co/{official.repo} (`hf download {official.repo} {official.file}`)"
    if name == "mps":
        fetch = "from the drive that the README of github.com/Kwai-Kolors/MPS links to"
    if name == "clipscore":
        fetch = f"that github.com/openai/CLIP loads, or the same weights by `hf download {official.repo}`"
    return FileNotFoundError(
        f"{place}: no checkpoint of {name}; get {official.file} ({official.size}, {sha}) {fetch} and the tokenizer of "
        f"huggingface.co/{official.vocabulary}; put both into one folder and name it with --reward-weights, or leave "
        f"both in the hub's local cache"
    )


def cached(repo: str, *files: str) -> Path | None:
    """The first of `files` that the hub's local cache holds; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repo, file) for file in files if repo)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def find_checkpoint(name: str, source: str | Path | None) -> Path:
    """The weight file of `name`: `source`, or in the folder `source`, or without one in the hub's cache."""
    files = ("model.safetensors", "pytorch_model.bin")
    if name in OFFICIAL:  # a converted file is read faster than an official archive, so it is preferred
        files = (files[0], OFFICIAL[name].file, files[1])
    if source is None and name in OFFICIAL:
        path = cached(OFFICIAL[name].repo, *files)
        if path is None:
            raise missing(name, "local hub cache")
        return path
    source = Path(source or EMBEDDED / name)
    path = source if source.is_file() else next((source / f for f in files if (source / f).is_file()), None)
    if path is None:
        raise missing(name, str(source))
    return path


def find_vocabulary(name: str, folder: Path) -> Path:
    """The folder with the tokenizer's files: that of the weights, `tokenizer/` in it, or the hub's cache."""
    wanted = [["tokenizer.json"], ["vocab.txt"] if name == "imagereward" else ["vocab.json", "merges.txt"]]
    for place in (folder, folder / "tokenizer"):
        if any(all((place / file).is_file() for file in files) for files in wanted):
            return place
    repo = OFFICIAL[name].vocabulary if name in OFFICIAL else ""
    for files in wanted if repo else []:
        if all(cached(repo, file) for file in files):
            return cached(repo, files[0]).parent
    raise FileNotFoundError(
        f"{folder}: no vocabulary for {name}; put {' and '.join(wanted[1])} of huggingface.co/{repo or CLIP_B} there"
    )


def check_digest(name: str, path: Path) -> None:
    """Warns when a file that bears the official name is not the official file, byte for byte."""
    official = OFFICIAL.get(name)
    if official and official.sha256 and path.name == official.file:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != official.sha256:
            warnings.warn(f"{path}: sha256 is {found}, the official file's is {official.sha256}", stacklevel=3)


def read_checkpoint(name: str, path: Path):
    """Every tensor of a reward's weight file, by the file's own keys, whichever kind of file it is."""
    import zipfile

    import torch

    import weights
    from pretrained import mps

    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        if name == "mps":
            return mps.read_pickled(path)
        with zipfile.ZipFile(path) as archive:
            scripted = any(member.endswith("/constants.pkl") for member in archive.namelist())
        if scripted:  # as OpenAI publishes; torch.load refuses TorchScript, and loading it runs no Python
            state = torch.jit.load(path, map_location="cpu").state_dict()
            return {key: value for key, value in state.items() if value.is_floating_point()}  # else three sizes
    state = weights.read_file(path)
    return {key.removeprefix("module."): value for key, value in state.items()}


def load(name: str, source: str | Path | None = None, device="cpu", dtype=None, original: bool = False):
    """The reward `name` as a callable `reward(images, prompts) -> (B,)`; see `reward_models.Reward`.

    source: a weight file, or the folder that holds it, the tokenizer's files and, when the sizes are not the
    published ones, a `config.json`; None means the hub's local cache, for `tiny` and `tiny2` this repository.
    dtype: of the vision tower, None (float32) or torch.bfloat16. original: preprocess as the reward's own
    repository does, not as the paper does; only HPSv2's way is differentiable.
    Raises ValueError or FileNotFoundError, in one line that says what to do.
    """
    if name not in NAMES:
        raise ValueError(f"unknown reward {name!r}; known: {', '.join(NAMES)}")
    path = find_checkpoint(name, source)
    vocabulary = find_vocabulary(name, path.parent)
    check_digest(name, path)

    from pretrained import reward_networks as models

    config = path.parent if (path.parent / "config.json").is_file() else None
    network, tokenizer = models.build_meta(name, config), models.tokenizer(name, vocabulary)
    models.load_strict(network, models.rename(name, read_checkpoint(name, path)), path)
    reward = models.Reward(name, network.to(device), tokenizer, SCALE[name])
    if dtype is not None:
        models.to_bf16(network, dtype)
    if original:
        reward.prepare = models.preprocess_padded if name.startswith("hpsv2") else models.preprocess_8bit
    return reward


class WeightedSum:
    """`(images, prompts) -> (B,)`: the sum of weight * scaled reward, over `rewards`, called `names`."""

    def __init__(self, rewards: list, weights: list[float]):
        self.rewards, self.weights = rewards, weights
        self.names = [reward.name for reward in rewards]

    def __call__(self, images, prompts: list[str]):
        return self.total(reward(images, prompts) for reward in self.rewards)

    def total(self, scores):
        """The weighted sum of raw scores that are already there, one tensor a reward."""
        terms = zip(self.weights, self.rewards, scores, strict=True)
        return sum(weight * reward.rescale(score) for weight, reward, score in terms)


def parse(spec: str) -> list[tuple[str, float]]:
    """`"hpsv2.1=1,pickscore=0.5"` -> [("hpsv2.1", 1.0), ("pickscore", 0.5)]; a bare name weighs 1."""
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
    """The weighted sum that `--reward SPEC --reward-weights PATH[,PATH]` asks for.

    sources: one path a reward in the order of `spec`, as a list or joined by commas; an empty one, or None,
    means the place where `load` looks by itself.
    """
    pairs = parse(spec)
    paths = sources.split(",") if isinstance(sources, str) else list(sources or [])
    if paths and len(paths) != len(pairs):
        raise ValueError(f"--reward-weights names {len(paths)} paths, --reward {spec} needs {len(pairs)}, in its order")
    paths = paths or [None] * len(pairs)
    rewards = [load(name, path or None, device, dtype, original) for (name, _), path in zip(pairs, paths, strict=True)]
    return WeightedSum(rewards, [weight for _, weight in pairs])


# ---------------------------------------------------------------------------------------------------- command


def read_image(path: str):
    """One picture as (1, 3, H, W) in [-1, 1]."""
    from utils.images import read_image, to_tensor

    return to_tensor(read_image(path))[None]


def score(args: argparse.Namespace) -> None:
    """Prints one line a picture: each raw score, and the weighted sum of the scaled ones."""
    if len(args.prompt) not in (1, len(args.image)):
        raise ValueError(f"--prompt was given {len(args.prompt)} times for {len(args.image)} images; give 1 or as many")
    import torch

    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device}: there is none here; leave it out to use the CPU") from None
    reward = build(args.reward, args.reward_weights, args.device, original=args.original)
    prompts = args.prompt * len(args.image) if len(args.prompt) == 1 else args.prompt
    width = max(len(path) for path in (*args.image, "image"))
    columns = [*reward.names, "weighted"]
    print(f"{'image':<{width}}", *(f"{name:>11}" for name in columns))
    for path, prompt in zip(args.image, prompts, strict=True):
        image = read_image(path).to(args.device)
        with torch.no_grad():
            scores = [each(image, [prompt]) for each in reward.rewards]
        print(f"{path:<{width}}", *(f"{value.item():>11.4f}" for value in (*scores, reward.total(scores))))


def convert_mps(args: argparse.Namespace) -> None:
    """Writes the tensors of the pickled MPS module as a safetensors file, as they are."""
    if Path(args.output).suffix != ".safetensors":
        raise ValueError(f"{args.output}: the output is written as .safetensors; name it so")
    if not Path(args.input).is_file():
        raise missing("mps", args.input)
    from pretrained import mps
    from utils import disk

    tensors = mps.read_pickled(args.input)
    disk.write(args.output, tensors)
    print(f"{args.output}: {len(tensors)} tensors; put vocab.json and merges.txt of huggingface.co/{CLIP_B} beside it")


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser("Score pictures with reward models.", prog="rewards.py")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("score", help="print a table of scores")
    command.set_defaults(run=score)
    command.add_argument("--reward", required=True, metavar="SPEC", help=f"NAME[=WEIGHT],... of {', '.join(NAMES)}")
    command.add_argument("--reward-weights", metavar="PATH[,PATH]", help="file or folder of each, in SPEC's order")
    command.add_argument("--prompt", required=True, action="append", help="one for all images, or one an image")
    command.add_argument("--original", action="store_true", help="preprocess as the reward's own repository does")
    command.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    command.add_argument("image", nargs="+")

    command = commands.add_parser("convert-mps", help="rewrite MPS's pickled checkpoint, without running it")
    command.set_defaults(run=convert_mps)
    command.add_argument("input", help="MPS_overall_checkpoint.pth")
    command.add_argument("output", help="the .safetensors file to write")

    args = parser.parse(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"rewards.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
