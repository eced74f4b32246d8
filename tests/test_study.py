"""The user study: blind and balanced pages, answered in a browser, counted by statistics with known values."""

import base64
import io
import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from statistics import mean
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from browser import Browser, needs_browser
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_report import SVG
from test_report import make as make_evaluation

import study
from report import study_count, study_statistics
from report.study_plan import QUESTIONS, Contest, Item, Vote, answers_file, plan, read_key, read_votes, vote
from utils import cli, disk

PROMPTS = [f"caption {i}" for i in range(20)]


def run(*words) -> None:
    study.main(study.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An evaluation whose images say how they were made, as those of sample.py do, and a study of it."""
    folder = tmp_path_factory.mktemp("study")
    make_evaluation(folder / "evaluation", prompts=PROMPTS, side=16)
    for path in (folder / "evaluation" / "points").glob("*/*.png"):
        info = PngInfo()
        info.add_itxt("parameters", "Steps: 40, Switch: 30, Tuned: runs/imagerefl-0")
        info.add_text("comment", "ReFL AIG")
        Image.open(path).save(path, pnginfo=info, icc_profile=b"runs/refl-0", exif=b"Exif\0\0ReFL Combined")
    run("make", folder / "evaluation", "--pair", "imagerefl:refl", "--raters", "2", "--output-dir", folder / "study")
    return folder


def shown_in(page: Path) -> dict:
    return json.loads(re.search(r"^const study = (.*);$", page.read_text(), re.MULTILINE)[1])


# ---- the pages


def test_no_string_of_a_page_tells_the_method(made):
    evaluation = json.loads((made / "evaluation" / "results.json").read_text())
    words = {str(p[key]) for p in evaluation["points"] for key in ("label", "checkpoint", "folder")} | {
        "refl", "aig", "combined", "tuned", "switch", "checkpoint", "evaluation", "first", "second", "attention",
    }  # fmt: skip
    for page in (made / "study").glob("rater-*.html"):
        text = page.read_text()
        images = re.findall(r"data:image/webp;base64,([\w+/=]+)", text)
        assert len(images) == 2 * 2 * len(shown_in(page)["items"])
        bare = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text)
        script = re.sub(r"(?s)<style>.*?</style>", "", bare).lower()
        found = [w for w in words if w != "None" and re.search(rf"\b{re.escape(w.lower())}\b", script)]
        assert found == []
        for image in images:
            content = base64.b64decode(image)
            opened = Image.open(io.BytesIO(content))
            assert set(opened.info) <= {"loop", "background"} and opened.getexif() == {}
            chunks, at = set(), 12
            while at < len(content):
                chunks.add(content[at : at + 4])
                at += 8 + int.from_bytes(content[at + 4 : at + 8], "little") + at % 2
            assert chunks <= {b"VP8 ", b"VP8L"}  # pixels, and nothing beside them


def test_a_page_shows_the_images_of_the_key(made):
    """A method's images are where the key says: the colour of an image tells its point, prompt and seed."""
    _, contests, items = read_key(made / "study")
    by_id = {item.id: item for item in items}
    results = json.loads((made / "evaluation" / "results.json").read_text())
    points = {p["label"]: i for i, p in reversed(list(enumerate(results["points"]))) if p["row"]}
    for page in (made / "study").glob("rater-*.html"):
        for shown in shown_in(page)["items"]:
            item = by_id[shown["id"]]
            assert shown["caption"] == PROMPTS[item.prompt]
            names = {"first": contests[0].first, "second": contests[0].second}
            other = {"first": "second", "second": "first"}[item.upper]
            for row, side in (("upper", item.upper), ("lower", other)):
                if item.kind == "attention" and side == "second":
                    assert len(set(shown[row])) == 1
                    continue
                for seed, uri in enumerate(shown[row], 1):
                    pixel = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).getpixel((4, 4))
                    n = points[names[side]]
                    assert pixel == pytest.approx((40 + 12 * n, min(60 * item.prompt, 255), 80 * seed), abs=6)


def test_the_plan_is_balanced():
    tasks = [(c, p) for c in range(2) for p in range(50)]
    items = plan(tasks, raters=3, people=7, seed=1)
    plain = [i for i in items if i.kind == "task"]
    assert Counter((i.contest, i.prompt) for i in plain) == dict.fromkeys(tasks, 3)
    assert len({(i.rater, i.contest, i.prompt) for i in plain}) == 300  # nobody sees a pair twice
    shares = Counter(i.rater for i in plain)
    assert max(shares.values()) - min(shares.values()) <= 3
    for person in range(1, 8):
        own = [i for i in items if i.rater == person]
        sides = Counter(i.upper for i in own if i.kind == "task")
        assert abs(sides["first"] - sides["second"]) <= 1
        kinds = Counter(i.kind for i in own)
        assert kinds["attention"] == 2 and kinds["repeat"] == 2  # 5 % of 43
        for again in (i for i in own if i.kind == "repeat"):
            (once,) = (i for i in own if i.kind == "task" and (i.contest, i.prompt) == (again.contest, again.prompt))
            assert once.upper != again.upper and own.index(again) - own.index(once) > 10
    assert len({i.id for i in items}) == len(items)
    assert plan(tasks, 3, 7, seed=1) == items != plan(tasks, 3, 7, seed=2)


def test_a_study_is_not_overwritten_and_bad_input_is_one_line(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    for words, message in {
        ("make", "evaluation", "--output-dir", "study"): "holds a study",
        ("make", "evaluation", "--pair", "ReFL:ReFL", "--output-dir", "new"): "write FIRST:SECOND",
        ("make", "evaluation", "--people", "2", "--output-dir", "new"): "at least --raters 3",
        ("make", "nothing"): "not there",
        ("count", "nothing"): "study.py make",
        ("count", "study"): "no answers-",
        ("vote", "study", "evaluation"): "measured is nothing, not diversity",
        ("vote", "study", "evaluation", "--voters", "a,b,c"): "3 voters for 2 pages",
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            run(*words)
    with pytest.raises(SystemExit):
        cli.run(study.main, study.parse_args(["count", "nothing"]))
    assert re.fullmatch(r".*: nothing/key.json: not there.*\n", capsys.readouterr().err)


# ---- in a browser


def preference(item: Item) -> str:
    """The first method is more diverse and looks better in the rater's eyes; in accordance there is no difference."""
    return {"first": "1", "second": "2"}[item.upper]


@needs_browser
def test_two_people_answer_in_a_browser(made, tmp_path):
    name, _, items = read_key(made / "study")
    with Browser(tmp_path) as browser:
        for rater in (1, 2):
            own = {item.id: item for item in items if item.rater == rater}
            saved = answer_in(browser, made / "study" / f"rater-{rater:02d}.html", own)
            answers = json.loads(saved.read_text())
            assert (answers["study"], answers["rater"]) == (name, rater) and answers["answers"].keys() == own.keys()
    files = sorted((tmp_path / "downloads").glob("answers-*.json"))
    votes = read_votes(name, items, files)
    assert len(votes) == 3 * len(items)
    for v in votes:
        assert v.value == (0.5 if v.question == "accordance" and v.kind != "attention" else 1.0)
    table = study_count.count(made / "study", files)
    assert "| Diversity | **100.0** | 100.0 to 100.0 | 100.0 | 0.0 | 100.0 | 1.9e-06 | 40 | 20 | 100.0 | – |" in table
    assert "| Accordance | **50.0** | 50.0 to 50.0 | – | 100.0 | 50.0 | 1 | 40 | 20 | 100.0 | – |" in table
    assert "| 1 | 60 | 100.0 | 100.0 | 50.0 |" in table


@needs_browser
def test_a_page_works_with_tab_and_enter_and_where_nothing_is_kept(made, tmp_path):
    page = made / "study" / "rater-01.html"
    item = shown_in(page)["items"][0]["id"]
    with Browser(tmp_path) as browser:
        browser.open(page)
        assert browser.run("document.getElementById('unkept').hidden") is True
        browser.press("Enter", "Tab", "Tab", "Tab", "Enter")  # Begin; Back, Save, the first answer
        assert browser.run("answers") == {item: {"diversity": "upper"}}
        assert browser.run("document.activeElement.closest('.now').textContent").startswith("Question 2")
        browser.press("Tab", "Enter")
        assert browser.run("answers")[item] == {"diversity": "upper", "accordance": "lower"}
        script = "Storage.prototype.setItem = () => { throw new Error('no storage') }"
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        browser.reload()
        assert browser.run("document.getElementById('unkept').hidden") is False
        browser.press("Enter", "3", "2", "1")
        assert browser.run("answers")[item] == {"diversity": "none", "accordance": "lower", "attractiveness": "upper"}


def answer_in(browser: Browser, page: Path, own: dict[str, Item]) -> Path:
    """Answer a page with keys: the first method is more diverse and more appealing, and accordance is a tie.

    With a slip that is taken back, a reload in the middle, a narrow window, and a finger.
    """
    browser.resize(1280, 800)
    browser.open(page)
    browser.press("Enter")  # Begin has the focus

    def at():
        return browser.run("[document.getElementById('task').dataset.item, place % 3]")

    for k, shown in enumerate(shown_in(page)["items"]):
        assert at() == [shown["id"], 0]
        item = own[shown["id"]]
        key = {"first": "1", "second": "2"}[item.upper]
        if k == 1:
            browser.press({"1": "2", "2": "1"}[key], "ArrowLeft")
        browser.press(key, key if item.kind == "attention" else "3")
        if k == 2:
            browser.resize(390, 844)
            browser.run("new Promise(done => setTimeout(done, 800))")  # the browser stores in the background
            browser.reload()
            assert at() == [shown["id"], 2]
            assert browser.run("document.documentElement.scrollWidth") <= 390
            assert browser.run("document.querySelectorAll('[aria-pressed=true]').length") == 2
        if k == 3:
            browser.run(f"document.querySelectorAll('.now button')[{int(key) - 1}].click()")
        else:
            browser.press(key)
    assert browser.run("document.getElementById('end').hidden") is False
    browser.press("ArrowLeft", key, "Enter")  # back from the end, the same again; Save has the focus
    saved = browser.downloads / browser.run("document.getElementById('saved').textContent.match(/answers-.*json/)[0]")
    for _ in range(100):
        if not saved.exists():
            browser.run("new Promise(done => setTimeout(done, 50))")
    return saved


# ---- counting


def votes_of(values: dict[int, list[float]], question="diversity") -> list[Vote]:
    return [Vote(0, task, rater, question, v) for task, own in values.items() for rater, v in enumerate(own)]


def test_rates_with_and_without_ties_and_majorities():
    tasks = [[1, 1, 0], [1, 0.5, 0.5], [0, 0, 0], [1, 0.5, 0]]
    assert study_statistics.win_rate(tasks) == pytest.approx(5.5 / 12)
    assert study_statistics.win_rate_without_ties(tasks) == pytest.approx(4 / 9)
    assert study_statistics.tie_share(tasks) == 3 / 12
    assert [study_statistics.majority(task) for task in tasks] == [1, 0.5, 0, 0.5]
    assert study_statistics.majority([1, 0]) == 0.5 and study_statistics.majority([1]) == 1
    assert math.isnan(study_statistics.win_rate_without_ties([[0.5]]))


def test_the_sign_test_is_exact():
    assert study_statistics.sign_test([[1]] * 9 + [[0]] + [[0.5]] * 7) == pytest.approx(2 * 11 / 1024)
    assert study_statistics.sign_test([[1]] * 5 + [[0]] * 5) == 1
    assert study_statistics.sign_test([[0.5]]) == 1


KRIPPENDORFF = """\
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 ."""  # K. Krippendorff, Computing Krippendorff's alpha-reliability, 2011, example C


def test_alpha_is_that_of_krippendorffs_example():
    units = zip(*(line.split() for line in KRIPPENDORFF.splitlines()), strict=True)
    _, alpha = study_statistics.agreement([[v for v in unit if v != "."] for unit in units])
    assert alpha == pytest.approx(0.743, abs=5e-4)
    assert study_statistics.agreement([[1, 1, 0]])[0] == pytest.approx(1 / 3)
    assert study_statistics.agreement([[1, 1], [0, 0]]) == (1, 1)
    chance = random.Random(0)
    assert abs(study_statistics.agreement([[chance.choice([0, 1]) for _ in range(3)] for _ in range(3000)])[1]) < 0.03


def test_the_votes_that_a_difference_needs():
    assert [study_statistics.votes_needed(p) for p in (0.55, 0.6, 0.7)] == [783, 194, 47]
    rng, n = np.random.default_rng(0), study_statistics.votes_needed(0.6)
    wins = rng.binomial(n, 0.6, 20_000) / n
    power = np.mean(np.abs(wins - 0.5) > 1.96 * 0.5 / n**0.5)
    assert power == pytest.approx(0.8, abs=0.02)


def test_bradley_terry_of_two_is_the_logit_of_the_win_rate_and_of_more_finds_the_strengths():
    pair = study_statistics.bradley_terry([("a", "b", 1.0)] * 6 + [("a", "b", 0.5)] * 2 + [("b", "a", 1.0)] * 2)
    assert pair["a"] - pair["b"] == pytest.approx(math.log(7 / 3), rel=1e-2)
    true, rng = {"a": 0.8, "b": 0.1, "c": -0.9}, random.Random(1)
    duels = [(i, j, float(rng.random() < 1 / (1 + math.exp(true[j] - true[i]))))
             for i, j in (("a", "b"), ("b", "c"), ("a", "c")) for _ in range(3000)]  # fmt: skip
    found = study_statistics.bradley_terry(duels)
    assert found == pytest.approx(true, abs=0.06)
    assert all(map(math.isfinite, study_statistics.bradley_terry([("a", "b", 1.0)] * 5).values()))


def simulate(items: list[Item], rng: random.Random, mu: float, spread: float, ties: float) -> list[Vote]:
    """Answers of people whose preference depends on the task: logit mu + N(0, spread)."""
    taste = {}
    votes = []
    for item in items:
        logit = taste.setdefault((item.contest, item.prompt), rng.gauss(mu, spread))
        for_first = rng.random() < 1 / (1 + math.exp(-logit))
        answer = "none" if rng.random() < ties else "upper" if for_first == (item.upper == "first") else "lower"
        votes.append(vote(item, "diversity", answer))
    return votes


def test_the_interval_covers_a_known_preference():
    """100 studies of 60 tasks with three raters each. People agree more on some tasks, so votes are not independent."""
    grid = np.linspace(-8, 8, 4001)
    weight = np.exp(-0.5 * grid**2)
    mu, spread, ties = 0.5, 1.0, 0.2
    win = float((weight / (1 + np.exp(-(mu + spread * grid)))).sum() / weight.sum())
    truth, rng, covered = 0.5 * ties + (1 - ties) * win, random.Random(0), []
    for seed in range(100):
        items = plan([(0, p) for p in range(60)], 3, 4, seed)
        tasks = study_count.tasks_of(simulate(items, rng, mu, spread, ties), 0, "diversity")
        assert len(tasks) == 60 and {len(task) for task in tasks} == {3}
        low, high = study_statistics.win_rate_interval(tasks, seed, 1000)
        covered.append(low <= truth <= high)
    assert sum(covered) >= 93


def test_an_interval_over_votes_would_be_too_narrow():
    """What resampling whole tasks is for: with the same votes counted as independent ones the interval shrinks."""
    tasks = [[float(t % 2)] * 5 for t in range(40)]
    low, high = study_statistics.win_rate_interval(tasks)
    alone = study_statistics.win_rate_interval([[v] for task in tasks for v in task])
    assert high - low == pytest.approx(5**0.5 * (alone[1] - alone[0]), rel=0.1)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.05)
    general = study_statistics.interval(tasks, study_statistics.win_rate, resamples=500)
    assert tuple(general) == pytest.approx((low, high), abs=0.03)


def test_attention_repeats_and_sides_of_a_rater():
    def answers(kind, values):
        return [Vote(0, i, 1, "diversity", v, kind, v == 1) for i, v in enumerate(values)]

    votes = answers("task", [1, 0, 0.5, 1]) + answers("repeat", [1, 1]) + answers("attention", [1, 0.5, 1, 1])
    assert study_count.attentive(votes, 1) == 0.75
    assert study_count.consistent(votes, 1) == 0.5
    assert math.isnan(study_count.attentive(votes, 2))
    careful = [Vote(0, i, 2, "diversity", 0.0) for i in range(4)] + [Vote(0, 9, 2, "diversity", 1.0, "attention")]
    text = "\n".join(study_count.raters_table(votes + careful, [1, 2]))
    assert "| 1, left out | 4 | 75.0 | 50.0 |" in text and "| 2 | 4 | 100.0 | – | – |" in text


def test_a_careless_rater_is_left_out_and_files_are_checked(made, tmp_path):
    name, _, items = read_key(made / "study")
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "key.json").write_text((made / "study" / "key.json").read_text())
    for rater in (1, 2):
        own = {i.id: i for i in items if i.rater == rater}
        careful = {id: {q: "upper" if i.upper == "first" else "lower" for q in QUESTIONS} for id, i in own.items()}
        careless = {id: dict.fromkeys(QUESTIONS, "none") for id in own}
        disk.write_text(
            folder / f"answers-{rater}.json", answers_file(name, rater, careful if rater == 1 else careless)
        )
    text = study_count.count(folder, [])
    assert "| Diversity | **100.0** |" in text and "| 2, left out | 60 | 0.0 |" in text
    assert len((folder / "votes.csv").read_text().splitlines()) == 1 + 3 * len(items)
    again = tmp_path / "answers-1b.json"
    again.write_text((folder / "answers-1.json").read_text())
    with pytest.raises(ValueError, match="rater 1 has answered in"):
        study_count.count(folder, [folder / "answers-1.json", again])
    for damage, message in {
        '{"study": "x", "rater": 1, "answers": {}}': "another study",
        f'{{"study": "{name}", "rater": 1, "answers": {{"0": {{"diversity": "upper"}}}}}}': "fits no item",
        "[]": "not a file of answers",
        "{": "not a file of answers",
    }.items():
        again.write_text(damage)
        with pytest.raises(ValueError, match=message):
            study_count.count(folder, [again])


def test_the_picture_of_table_2_shows_rates_and_intervals():
    votes = [Vote(0, task, rater, q, float(task < 15)) for task in range(20) for rater in range(3) for q in QUESTIONS]
    svg = ElementTree.fromstring(study_count.figure(votes, [Contest("tiny", "ImageReFL", "ReFL")]))
    ticks = {t.text: float(t.get("x")) for t in svg.iter(f"{SVG}text") if t.get("text-anchor") == "middle"}
    dots = [float(c.get("cx")) for c in svg.iter(f"{SVG}circle")]
    assert len(dots) == 1 + 3  # the legend's, and one for each question
    per_point = (ticks["90"] - ticks["50"]) / 40
    assert dots[1:] == pytest.approx([ticks["50"] + 25 * per_point] * 3, abs=0.2)
    low, high = study_statistics.win_rate_interval([[float(task < 15)] * 3 for task in range(20)])
    bars = [(float(b.get("x1")), float(b.get("x2"))) for b in svg.iter(f"{SVG}line") if b.get("stroke-width") == "2"]
    assert len(bars) == 3 * 5
    assert bars[0] == pytest.approx([ticks["50"] + (100 * v - 50) * per_point for v in (low, high)], abs=0.2)


def test_three_methods_have_strengths(made, tmp_path):
    pairs = [f"--pair={a}:{b}" for a, b in (("ImageReFL", "ReFL"), ("ImageReFL", "ReFL AIG"), ("ReFL", "ReFL AIG"))]
    run("make", made / "evaluation", *pairs, "--raters", "1", "--limit", "8", "--output-dir", tmp_path)
    name, contests, items = read_key(tmp_path)
    assert len(contests) == 3 and len({(i.contest, i.prompt) for i in items}) == 24
    rank = ["ReFL AIG", "ReFL", "ImageReFL"]

    def best(item):
        c = contests[item.contest]
        wins = item.kind == "attention" or rank.index(c.first) > rank.index(c.second)
        return "upper" if wins == (item.upper == "first") else "lower"

    answers = {item.id: dict.fromkeys(QUESTIONS, best(item)) for item in items}
    disk.write_text(tmp_path / "answers-1.json", answers_file(name, 1, answers))
    rows = re.findall(r"^\| (ImageReFL|ReFL|ReFL AIG) \| ([\d.]+) \(", study_count.count(tmp_path, []), re.MULTILINE)
    shares = {label: float(value) for label, value in rows}
    assert shares["ImageReFL"] > 90 and shares["ReFL"] == pytest.approx(50, abs=2) and shares["ReFL AIG"] < 10


# ---- rewards as voters


def test_a_reward_votes_for_the_higher_score_and_the_more_diverse_row(made, tmp_path):
    evaluation = tmp_path / "evaluation"
    results = make_evaluation(evaluation, prompts=PROMPTS, side=8)
    rng = torch.Generator().manual_seed(0)
    labels = {p["folder"]: p["label"] for p in results["points"] if p["row"]}
    scores = {}
    for folder, label in labels.items():
        columns = {"tiny": torch.randn(40, generator=rng), "diversity": torch.randn(40, 6, generator=rng)}
        disk.write(evaluation / folder / "tiny.0.safetensors", {"tiny": columns["tiny"]})
        disk.write(evaluation / folder / "features.0.safetensors", {"diversity": columns["diversity"]})
        scores.setdefault(label, columns)
    run("make", evaluation, "--pair", "ImageReFL:ReFL", "--raters", "1", "--output-dir", tmp_path / "study")
    run("vote", tmp_path / "study", evaluation, "--voters", "tiny")
    name, _, items = read_key(tmp_path / "study")
    votes = read_votes(name, items, [tmp_path / "study" / "answers-1.json"])
    assert len(votes) == 3 * 21 and {v.kind for v in votes} == {"task", "repeat"}
    quality = {label: c["tiny"].view(20, 2).mean(1) for label, c in scores.items()}
    cosines = {k: torch.cosine_similarity(*c["diversity"].view(20, 2, 6).unbind(1)) for k, c in scores.items()}
    for values, question in ((quality, "accordance"), (quality, "attractiveness"), (cosines, "diversity")):
        sign = -1 if question == "diversity" else 1
        for v in (v for v in votes if v.question == question):
            difference = sign * (values["ImageReFL"][v.prompt] - values["ReFL"][v.prompt]).item()
            assert v.value == 0.5 or v.value == float(difference > 0)
        close = mean(v.value == 0.5 for v in votes if v.question == question)
        assert 0.02 < close < 0.35
