"""The files that a reproduction needs besides the code: where each is, where it comes from, how it is checked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pretrained import hub, inception, reward_files, weight_files
from pretrained.features import DINO, find_dino

PROMPTS = "ymhao/HPDv2"  # the data set whose test.json has the 400 prompts
COMPONENTS = {"sd15": ("unet", "vae", "text_encoder"), "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2")}
PUBLISHED = {
    (base, reward): f"ControlGenAI/ImageReFL_{tuned_on}_{model}"
    for base, model in (("sd15", "SD"), ("sdxl", "SDXL"))
    for reward, tuned_on in (("hpsv2.1", "HPS"), ("pickscore", "PickScore"))
}
REWARDS = ("hpsv2.1", "mps", "pickscore", "imagereward", "clipscore")
UNET_GB = {"sd15": 3.4, "sdxl": 10.3}  # float32
GB = {"sd15": 4.3, "sdxl": 13.9, "hpsv2.1": 2.0, "mps": 2.2, "pickscore": 3.9, "imagereward": 1.8, "clipscore": 0.6}
BY_HAND = "pip install gdown && mkdir -p {0.parent} && gdown {1} -O {0}"


@dataclass
class Asset:
    """`find` returns its paths, fetching what is missing; within `hub.offline()` it raises OSError instead.

    gb: size, about. by_hand: a line to type for what cannot be fetched.
    """

    name: str
    source: str
    gb: float
    find: Callable[[], list[Path]]
    repo: str = ""
    repo_type: str = "model"
    sha256: str = "the hub's"
    by_hand: str = ""
    paths: list[Path] = field(default_factory=list)

    def locate(self) -> str:
        """Look for it without fetching: "" if it is there, else the reason why not."""
        with hub.offline():
            try:
                self.paths = self.find()
            except OSError as error:
                return str(error)
        return ""


def find_base(base: str) -> list[Path]:
    places = [weight_files.find(base, component) for component in COMPONENTS[base]]
    return [*places, weight_files.find_tokenizer(places[2], "tokenizer")]


def find_published(repo: str) -> list[Path]:
    return [weight_files.find(repo, "unet"), weight_files.find(repo, "tuned_unet")]


def find_reward(name: str) -> list[Path]:
    path = reward_files.find_checkpoint(name, None)
    return [path, reward_files.find_vocabulary(name, path.parent)]


def find_prompts() -> list[Path]:
    """HPDv2's test.json in the hub's cache, else fetched."""
    path = hub.cached(PROMPTS, "test.json", repo_type="dataset")
    return [path or hub.fetch(PROMPTS, lambda _: ["test.json"], repo_type="dataset") / "test.json"]


def reward_asset(name: str) -> Asset:
    official = reward_files.OFFICIAL[name]
    asset = Asset(f"reward {name}", f"hub: {official.repo}", GB[name], lambda: find_reward(name), official.repo)
    if official.sha256 and name != "clipscore":  # of which the hub's copy is used, and the digest is of OpenAI's file
        asset.sha256 = "known"
    if name == "mps":
        asset.source, asset.sha256, place = "by hand: a drive", "unknown", reward_files.by_hand(official.file)
        asset.repo = official.vocabulary if place.is_file() else ""  # then only the tokenizer may be missing
        asset.by_hand = "" if asset.repo else BY_HAND.format(place, reward_files.MPS_DRIVE.rpartition("/")[2])
    return asset


def assets_of(base: str, reward: str, published: bool) -> list[Asset]:
    """What a run needs, COCO apart."""
    repo = weight_files.BASES[base]
    found = [Asset(f"base {base}", f"hub: {repo}", GB[base], lambda: find_base(base), repo)]
    if published:
        model = PUBLISHED[base, reward]
        found.append(Asset("published model", f"hub: {model}", 2 * UNET_GB[base], lambda: find_published(model), model))
    found += [reward_asset(name) for name in REWARDS]
    found.append(Asset("DINO ViT-S/16", f"hub: {DINO}", 0.1, lambda: [find_dino(DINO)], DINO))
    place = "release: mseitzer/pytorch-fid"
    found.append(
        Asset("Inception", place, 0.1, lambda: [inception.find_inception("pytorch-fid")], sha256="known in part")
    )
    return [*found, Asset("HPDv2 prompts", f"hub: {PROMPTS}", 0.0, find_prompts, PROMPTS, "dataset")]


def files_of(paths: list[Path]) -> list[Path]:
    """The files behind an asset's paths, which may be folders."""
    return sorted({file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()})


def verify(asset: Asset, known: dict[str, list]) -> None:
    """Compare every file of an asset in the hub's cache with its checksum, once: `known` holds what was checked.

    Raises OSError that names a damaged file, after removing it.
    """
    for path in files_of(asset.paths):
        expected, state = hub.stored_checksum(path), [path.stat().st_size, path.stat().st_mtime_ns]
        if expected and known.get(str(path)) != state:
            if hub.checksum(path, expected) != expected:
                hub.remove(path)
                raise OSError(
                    f"{path}: damaged, its checksum is not {expected}; removed, the same command fetches it again"
                )
            known[str(path)] = state
