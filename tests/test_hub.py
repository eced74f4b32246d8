"""Fetching from a stand-in for the hub: what is fetched, and what each fault leads to."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hub as stand_in
import minis
import pytest
import torch
from hub import TOKEN, Fault, use

import rewards
import weights
from pretrained import features, hub, inception, weight_files

REPO, FILE = "some/model", "unet/model.safetensors"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub with one repository, an empty cache, and short waits."""
    folder = tmp_path / "served" / "models" / REPO
    (folder / "unet").mkdir(parents=True)
    (folder / FILE).write_bytes(bytes(range(256)) * 400)
    (folder / "config.json").write_text("{}")
    (folder / "other.txt").write_text("not wanted")
    with stand_in.serving(tmp_path / "served") as server:
        use(server.url, tmp_path / "cache", monkeypatch)
        yield server


def choose(files):
    return [name for name in files if name != "other.txt"]


def refusal(repo: str = REPO) -> str:
    """The message of a fetch that fails: one line that names the file; and no file is taken for whole."""
    with pytest.raises(OSError) as caught:
        hub.fetch(repo, choose)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(repo)
    return message


def whole(server) -> bool:
    path = hub.cached(REPO, FILE)
    return path is not None and path.read_bytes() == (server.root / "models" / REPO / FILE).read_bytes()


def leftovers(tmp_path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").rglob("*.incomplete")]


def test_only_what_is_wanted_and_missing_is_fetched(server, tmp_path):
    folder = hub.fetch(REPO, choose)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == ["config.json", FILE] and whole(server)
    server.requests.clear()
    hub.cached(REPO, "config.json").unlink()
    assert hub.fetch(REPO, choose) == folder
    assert not server.fetched() and hub.cached(REPO, "config.json")  # the blob was still there
    hub.remove(hub.cached(REPO, FILE))
    hub.fetch(REPO, choose)
    assert server.fetched() == ["model.safetensors"] and whole(server)


@pytest.mark.parametrize("fault", ["slow", "drop", "short", "wrong", 429, 500], ids=str)
def test_a_passing_fault_is_recovered_from(server, tmp_path, fault):
    server.faults.append(Fault(fault, "model.safetensors", times=1))
    hub.fetch(REPO, choose)
    assert whole(server) and not leftovers(tmp_path)


def test_a_broken_connection_is_resumed_in_the_middle_of_the_file(server):
    server.faults.append(Fault("drop", "model.safetensors", times=1))
    hub.fetch(REPO, choose)
    ranges = [asked for method, path, asked in server.requests if method == "GET" and "/cdn/" in path]
    assert ranges == [None, "bytes=51200-"]


LASTING = {
    401: ("refused (401)", "HF_TOKEN"),
    403: ("refused (403)", "HF_TOKEN"),
    404: ("not there (404)", "get it by hand"),
    429: ("too many requests (429)", "wait five minutes"),
    500: ("the server fails (500)", "repeat the command later"),
    "gated": ("gated (403)", "accept its terms at http://127.0.0.1"),
    "drop": ("no connection, or it broke off", "repeat the command"),
    "short": ("no connection, or it broke off", "repeat the command"),
    "wrong": ("arrived several times with checksum", "repeat the command later"),
}
ANSWERS = [(fault, "api/models") for fault in list(LASTING)[:6]]  # to the request for the list of files


@pytest.mark.parametrize("fault, place", [*((fault, "model.safetensors") for fault in LASTING), *ANSWERS])
def test_a_lasting_fault_is_one_line_with_file_cause_and_remedy(server, tmp_path, fault, place):
    server.faults.append(Fault(fault, place))
    message, (cause, remedy) = refusal(), LASTING[fault]
    assert cause in message and remedy in message and (FILE in message) == (place != "api/models")
    assert hub.cached(REPO, FILE) is None and not leftovers(tmp_path)
    assert [path for path in (tmp_path / "cache").rglob("blobs/*") if path.stat().st_size > 10] == []
    server.faults.clear()
    hub.fetch(REPO, choose)
    assert whole(server)


def test_a_wait_that_the_hub_asks_for_is_kept(server, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(hub, "time", SimpleNamespace(sleep=waits.append))
    server.faults += [Fault(429, "api/models", 1, retry_after=7), Fault(429, "api/models", 1, retry_after=10_000)]
    hub.fetch(REPO, choose)
    assert waits == [7, hub.LONGEST_WAIT]
    assert "some/model: HfHubHTTPError, next attempt in 7 s" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_not_tried_again(server, monkeypatch):
    def full(*_, **__):
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    tries = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    assert "config.json: the disk is full; make room, or set HF_HOME to a larger one" in refusal() and len(tries) == 1


def test_a_token_opens_a_gated_repository(server, monkeypatch):
    server.faults.append(Fault("gated"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fetch(REPO, choose)
    assert whole(server)


def test_offline_nothing_is_asked(server):
    with hub.offline():
        assert "HF_HUB_OFFLINE is set" in refusal()
    assert server.requests == []


def test_a_hub_that_is_not_there(server, monkeypatch, tmp_path):
    use("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    assert "no connection" in refusal() and "http://127.0.0.1:9 (HF_ENDPOINT)" in refusal()


def test_a_repository_that_is_not_there_or_lacks_the_file(server):
    assert "not there (404)" in refusal("some/other")
    with pytest.raises(OSError, match="some/model: the repository has no such file; it has config.json, other.txt"):
        hub.fetch(REPO, lambda files: [])
    with pytest.raises(OSError, match="some/model: the repository has no a.bin"):
        hub.fetch(REPO, lambda files: ["a.bin"])


def test_another_file_than_the_authors_is_refused(server):
    with pytest.raises(OSError, match=f"{FILE}: arrived several times with checksum .* instead of {'0' * 64}"):
        hub.fetch(REPO, choose, known={FILE: "0" * 64})
    assert hub.cached(REPO, FILE) is None
    right = hashlib.sha256((server.root / "models" / REPO / FILE).read_bytes()).hexdigest()
    hub.fetch(REPO, choose, known={FILE: right})
    assert whole(server)


def test_the_cache_knows_the_checksum_of_its_files(server, tmp_path):
    hub.fetch(REPO, choose)
    for name in ("config.json", FILE):
        path = hub.cached(REPO, name)
        assert hub.checksum(path, hub.stored_checksum(path)) == hub.stored_checksum(path)
    assert hub.stored_checksum(server.root / "models" / REPO / FILE) is None


# ---- a file of a release


@pytest.fixture
def release(server):
    path = server.root / "releases" / "weights.pth"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 300)
    return f"{server.url}/releases/weights.pth", hashlib.sha256(path.read_bytes()).hexdigest()[:8]


@pytest.mark.parametrize("fault", ["slow", "drop", "short", "wrong", 429, 500], ids=str)
def test_a_release_is_fetched_in_spite_of_a_passing_fault(server, release, tmp_path, fault):
    server.faults.append(Fault(fault, "weights.pth", times=1))
    place = hub.fetch_release(release[0], tmp_path / "a" / "weights.pth", release[1])
    assert place.read_bytes() == bytes(range(256)) * 300 and not place.with_name("weights.pth.part").exists()
    server.requests.clear()
    hub.fetch_release(release[0], place, release[1])
    assert server.requests == []


def test_a_release_goes_on_where_another_process_stopped(server, release, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes((bytes(range(256)) * 300)[:1000])
    hub.fetch_release(release[0], tmp_path / "weights.pth", release[1])
    assert [asked for _, path, asked in server.requests if "/cdn/" in path] == ["bytes=1000-"]


def test_remains_of_another_file_are_not_continued(server, release, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(bytes(80_000))  # longer than the file
    hub.fetch_release(release[0], tmp_path / "weights.pth", release[1])
    assert (tmp_path / "weights.pth").read_bytes() == bytes(range(256)) * 300


@pytest.mark.parametrize("fault, cause", [("wrong", "checksum"), (404, "not there (404)"), (500, "server fails (500)")])
def test_a_release_that_cannot_be_had_is_one_line(server, release, tmp_path, fault, cause):
    server.faults.append(Fault(fault, "weights.pth"))
    with pytest.raises(OSError) as caught:
        hub.fetch_release(release[0], tmp_path / "weights.pth", release[1])
    assert cause in str(caught.value) and release[0] in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "weights.pth").exists()


# ---- killed while it fetches

FETCH = "import sys; from pretrained import hub; hub.fetch('some/model', lambda files: files)"


def test_a_killed_fetch_leaves_no_half_file_and_is_repeated(server, tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
    }
    server.faults.append(Fault("slow", "model.safetensors", times=1))
    process = subprocess.Popen([sys.executable, "-c", FETCH], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    while not server.fetched():
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert hub.cached(REPO, "config.json") and hub.cached(REPO, FILE) is None
    subprocess.run([sys.executable, "-c", FETCH], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert whole(server) and json.loads(hub.cached(REPO, "config.json").read_text()) == {}


# ---- mini models under the official names


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return minis.write_all(tmp_path_factory.mktemp("served"))


@pytest.fixture
def official(served, tmp_path, monkeypatch):
    """The stand-in with all official names, and empty caches."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with stand_in.serving(served) as server:
        use(server.url, tmp_path / "cache", monkeypatch)
        minis.adopt(monkeypatch, server.url, served)
        yield server


def test_bases_and_published_models_are_fetched_once(official):
    for _ in range(2):
        weights.load_unet("sd15"), weights.load_vae("sd15"), weights.load_text("sd15")
        base, tuned = weights.load_tuned(minis.MODEL, "sd15")
    assert not torch.equal(base.conv_out.weight, tuned.conv_out.weight)
    names = official.fetched()
    assert len(names) == 5 == sum(name.endswith(".safetensors") for name in names)


@pytest.mark.parametrize("name", ["hpsv2.1", "pickscore", "imagereward", "clipscore", "mps"])
def test_a_reward_is_fetched_with_its_tokenizer(official, name, tmp_path):
    if name == "mps":
        with pytest.raises(FileNotFoundError, match="drive.google.com"):
            rewards.load(name)
        minis.write_mps(tmp_path / "torch" / "hub" / "checkpoints")
    scores = [rewards.load(name)(torch.zeros(1, 3, 64, 64), ["a red fox"]) for _ in range(2)]
    assert torch.equal(*scores) and scores[0].isfinite().all()
    expected = {"hpsv2.1": "HPS_v2.1_compressed.pt", "imagereward": "ImageReward.pt", "pickscore": "model.safetensors"}
    fetched = official.fetched()
    assert fetched == ([] if name == "mps" else [expected.get(name, "pytorch_model.bin")])


def test_a_reward_that_cannot_be_fetched_says_why_and_what_to_get(official):
    official.faults.append(Fault("gated", "xswu"))
    with pytest.raises(FileNotFoundError) as caught:
        rewards.load("hpsv2.1")
    for part in ("HPS_v2.1_compressed.pt", "hf download xswu/HPSv2", "accept its terms", "--reward-weights"):
        assert part in str(caught.value)
    official.faults[:] = [Fault(404, "clip-vit-base-patch32")]
    with pytest.raises(FileNotFoundError, match=r"no vocabulary for hpsv2\.1; put vocab\.json .*not there \(404\)"):
        rewards.load("hpsv2.1")


def test_the_measuring_networks_are_fetched(official, tmp_path):
    extract = features.dino_features(features.DINO)
    assert extract(torch.zeros(1, 3, 64, 64)).shape == (1, 32)
    place = inception.find_inception("pytorch-fid")
    assert place == tmp_path / "torch" / "hub" / "checkpoints" / inception.FILE and place.is_file()
    assert official.fetched() == ["pytorch_model.bin", inception.FILE]
    features.dino_features(features.DINO), inception.find_inception("pytorch-fid")
    assert len(official.fetched()) == 2
    with pytest.raises(FileNotFoundError, match=r"facebook/other: neither a folder .*not there \(404\)"):
        features.find_dino("facebook/other")
    place.unlink()
    official.faults.append(Fault(404, "releases"))
    with pytest.raises(FileNotFoundError, match=r"no Inception weights; get http.*not there \(404\)"):
        inception.find_inception("pytorch-fid")


SDXL = """
.gitattributes LICENSE.md README.md model_index.json sd_xl_base_1.0.safetensors sd_xl_base_1.0_0.9vae.safetensors
scheduler/scheduler_config.json text_encoder/config.json text_encoder/flax_model.msgpack
text_encoder/model.fp16.safetensors
text_encoder/model.onnx text_encoder/model.safetensors text_encoder_2/config.json text_encoder_2/model.fp16.safetensors
text_encoder_2/model.safetensors tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
tokenizer/vocab.json tokenizer_2/merges.txt tokenizer_2/vocab.json unet/config.json unet/model.onnx unet/model.onnx_data
unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.safetensors vae/config.json
vae/diffusion_pytorch_model.fp16.safetensors vae/diffusion_pytorch_model.safetensors vae_1_0/config.json
vae_1_0/diffusion_pytorch_model.safetensors vae_decoder/config.json vae_decoder/model.onnx
""".split()


@pytest.mark.parametrize(
    "component, expected",
    [
        ("unet", {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}),
        ("vae", {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}),
        ("text_encoder", {name for name in SDXL if name.startswith(("text_encoder", "tokenizer"))}
         - {name for name in SDXL if name.endswith((".msgpack", ".onnx", "fp16.safetensors"))}),
    ],
)  # fmt: skip
def test_of_a_large_repository_only_what_is_read_is_fetched(component, expected, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda repo, choose: set(choose(SDXL)))
    always = {"model_index.json", "scheduler/scheduler_config.json"}
    assert weight_files.download("some/model", component) == expected | always
    half = [name for name in SDXL if not name.endswith("model.safetensors")]
    monkeypatch.setattr(hub, "fetch", lambda repo, choose: set(choose(half)))
    found = weight_files.download("some/model", component)
    assert {name for name in found if name.endswith("safetensors")} == {
        name.replace(".safetensors", ".fp16.safetensors") for name in expected if name.endswith("safetensors")
    }


def test_a_data_set_and_a_release_are_named_by_their_pages(official):
    official.faults += [Fault(404, "HPDv2"), Fault(404, "releases")]
    with pytest.raises(OSError) as caught:
        hub.fetch("ymhao/HPDv2", lambda files: files, repo_type="dataset")
    assert f"look at {official.url}/datasets/ymhao/HPDv2," in str(caught.value)
    with pytest.raises(FileNotFoundError, match=f"look at {official.url}/releases/"):
        inception.find_inception("pytorch-fid")
