"""The page to play with T': the scores and images of every state, sliders by keyboard, phone width, nothing loaded."""

import base64
import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from browser import Browser, needs_browser
from PIL import Image
from recipe import mini_base

import metrics
import rewards
import weights
from docs import make_play
from report import points
from training import checkpoint
from utils.images import to_tensor

UPDATES = {"refl": (1, 2), "imagerefl": (4,)}


def write_run(folder: Path, method: str, base: str) -> None:
    """A run with checkpoints, as train.py writes them; their weights are those of the base, scaled."""
    folder.mkdir()
    flags = {"method": method, "base": base, "reward": "tiny", "lora": None}
    (folder / "run.json").write_text(json.dumps({"args": flags}))
    for update in UPDATES[method]:
        unet = weights.load_unet(base)
        with torch.no_grad():
            unet.conv_out.bias += len(method) + update
        tensors = {f"unet.{key}": t for key, t in unet.state_dict().items()}
        checkpoint.write_checkpoint(folder / "states" / f"step-{update:06d}.safetensors", tensors, {"update": update})


def fake_images(base, tuned, vae, text, scheduler, schedules, prompts, seeds, size, guidance):
    """Instead of sampling: noise, seeded by the tuned model if it takes any step, T', the prompt and the seed."""
    made = []
    for schedule in schedules:
        model = int(100 * tuned.conv_out.bias.sum()) if any(schedule) else 0
        numbers = [[model, int(sum(schedule)), len(prompt), seed] for prompt, seed in zip(prompts, seeds, strict=True)]
        pixels = [torch.Generator().manual_seed(hash(tuple(n)) % 2**40) for n in numbers]
        made.append(torch.stack([torch.rand(3, 1, 1, generator=g).expand(3, 64, 64) * 2 - 1 for g in pixels]))
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("play")
    base = mini_base(folder / "base")
    for method in UPDATES:
        write_run(folder / method, method, base)
    flags = [f"--{method}={folder / method}" for method in UPDATES]
    flags += ["--limit", "2", f"--cache={folder / 'cache'}", f"--output={folder / 'play.html'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points, "generate_each", fake_images)
        patch.setattr(points, "for_sampling", lambda network: network)
        patch.setattr(make_play, "TUNED_STEPS", (0, 10, 20, 40))
        patch.setattr(make_play.presets, "TINY_REWARDS", ("tiny", "tiny2"))  # the rater takes seconds to load
        make_play.main(make_play.parse_args(flags))
    return folder


@pytest.fixture(scope="module")
def play(made):
    return json.loads(re.search(r"^const play = (.*);$", (made / "play.html").read_text(), re.MULTILINE)[1])


def images_on_disk(made, name: str, base_steps: int) -> list[Image.Image]:
    (folder,) = (made / "cache" / "points").glob(f"{name}-*.switch={base_steps}.*")
    return [Image.open(path) for path in sorted(folder.glob("*.png"))]


def test_every_state_has_its_point_and_states_of_the_same_models_share_one(play):
    refl, imagerefl = play["methods"]
    assert (refl["name"], refl["updates"], imagerefl["name"], imagerefl["updates"]) == (
        "ReFL", [0, 1, 2], "ImageReFL", [0, 4],
    )  # fmt: skip
    assert refl["trained"] == ["tiny"]
    assert refl["points"][0] == imagerefl["points"][0]  # at 0 updates both are the base model
    assert {row[0] for method in play["methods"] for row in method["points"]} == {0}  # T' = 0: the base model alone
    others = [n for row in (refl["points"][0], *refl["points"][1:], imagerefl["points"][1]) for n in row[1:]]
    assert sorted(others) == list(range(1, len(play["points"])))


def test_scores_and_images_of_a_state_are_those_of_the_images_on_disk(made, play):
    point = play["points"][play["methods"][1]["points"][1][play["tunedSteps"].index(10)]]
    images = images_on_disk(made, "imagerefl-step-000004", 30)
    asked = [prompt for prompt in make_play.presets.TINY.prompts[:2] for _ in range(4)]
    score = 0.1 * rewards.load("tiny2")(torch.stack([to_tensor(image) for image in images]), asked)
    assert point["values"]["tiny2"] == pytest.approx(metrics.mean_and_error(score, asked), abs=1e-5)
    shown = [uri for row in point["images"] for uri in row]
    assert len(shown) == len(images) == 8
    for uri, image in zip(shown, images, strict=True):
        decoded = to_tensor(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
        assert decoded.shape == (3, make_play.SIDE, make_play.SIDE)
        assert (decoded.mean((1, 2)) - to_tensor(image).mean((1, 2))).abs().max() < 0.05


def test_the_page_is_small_and_names_nothing_outside(made):
    page = (made / "play.html").read_bytes()
    assert len(page) <= 3_000_000
    bare = re.sub(rb"data:image/webp;base64,[\w+/=]+", b"", page)
    assert re.findall(rb"https?:|//\w+\.|url\(|@import|<link (?!rel=\"icon\" href=\"data:,\")|fetch\(", bare) == []


@pytest.mark.parametrize(
    "flags, message", [({"method": "imagerefl"}, "not a run of train.py --method refl"), ({"lora": 4}, "adapters")]
)
def test_a_run_that_cannot_be_used_is_refused(made, tmp_path, flags, message):
    (tmp_path / "states").symlink_to(made / "refl" / "states")
    known = {"method": "refl", "base": str(made / "base"), "reward": "tiny"}
    (tmp_path / "run.json").write_text(json.dumps({"args": known | flags}))
    with pytest.raises(ValueError, match=message):
        make_play.read_training(tmp_path, "refl", tmp_path)


STATE = """({
    hash: location.hash.slice(1), focus: document.activeElement.id,
    images: [...document.querySelectorAll(".four img")].map(img => img.src),
    alt: document.querySelector(".four img").alt,
    values: [...document.querySelectorAll("#values dd")].map(dd => dd.firstChild.data),
    text: document.getElementById("now").textContent,
    marked: document.getElementById("marked").getAttribute("d"),
    said: ["updates", "tuned"].map(id => document.getElementById(id).getAttribute("aria-valuetext")),
})"""


def check_state(play: dict, state: dict) -> None:
    """The page shows the images and scores of the state that its address names."""
    name, updates, tuned = state["hash"].split("-")
    method = play["methods"][["refl", "imagerefl"].index(name)]
    row = method["points"][method["updates"].index(int(updates))]
    point = play["points"][row[play["tunedSteps"].index(int(tuned))]]
    assert state["images"] == [uri for row in point["images"] for uri in row]
    assert state["values"] == [f"{point['values'][c['key']][0]:.3f}".replace("-", "−") for c in play["columns"]]
    assert state["said"] == [f"{updates} of {method['updates'][-1]}", f"{tuned} of 40"]
    assert state["alt"].endswith(f"{method['name']}, {updates} updates, T′ = {tuned}")


@needs_browser
def test_keys_change_images_scores_and_the_marked_point(made, play, tmp_path):
    with Browser(tmp_path) as browser:
        browser.resize(1200, 800)
        browser.open(made / "play.html")
        states = [browser.run(STATE)]
        for keys in (["Tab", "Tab", "Tab", "ArrowRight"], ["ArrowRight"], ["Back", "ArrowLeft"], ["Back", "ArrowLeft"]):
            for key in keys:
                if key == "Back":
                    browser.call(
                        "Input.dispatchKeyEvent", type="keyDown", key="Tab", windowsVirtualKeyCode=9, modifiers=8
                    )
                else:
                    browser.press(key)
            states.append(browser.run(STATE))
        assert [state["hash"] for state in states] == [
            "imagerefl-4-10", "imagerefl-4-20", "imagerefl-4-40", "imagerefl-0-40", "refl-0-40",
        ]  # fmt: skip
        for state in states:
            check_state(play, state)
        for before, after in list(pairwise(states))[:3]:
            assert all(before[key] != after[key] for key in ("images", "values", "marked", "text"))
        assert states[2]["focus"] == "tuned" and states[3]["focus"] == "updates"
        browser.reload()  # the address keeps the state
        assert browser.run(STATE)["hash"] == "refl-0-40"
        loaded = "performance.getEntriesByType('resource').map(entry => entry.name)"
        assert [name for name in browser.run(loaded) if not name.startswith("data:")] == []


@needs_browser
def test_a_phone_and_a_wide_window_need_no_horizontal_scrolling_and_a_click_picks_a_point(made, tmp_path):
    with Browser(tmp_path) as browser:
        for width in (1200, 360):
            browser.resize(width, 740)
            browser.open(made / "play.html")
            assert browser.run("document.documentElement.scrollWidth") <= width  # innerWidth grows with the content
            outside = f"filter(e => e.getBoundingClientRect().right > {width + 1}).map(e => e.outerHTML.slice(0, 80))"
            assert browser.run(f"[...document.querySelectorAll('body *')].{outside}") == []
        assert browser.run("[...document.querySelectorAll('input, select')].every(e => e.labels.length == 1)")
        box = "document.querySelector('svg .base').getBoundingClientRect()"
        place = f"{{clientX: {box}.x + {box}.width / 2, clientY: {box}.y + {box}.height / 2, bubbles: true}}"
        browser.run(f"document.querySelector('svg').dispatchEvent(new MouseEvent('click', {place}))")
        assert browser.run("location.hash") == "#imagerefl-4-0"
