"""A user study as data: who sees which task, on which side, and what the answers say about the methods (Section 5.6).

A task is a prompt of a contest: a row of images of its `first` method against a row of its `second`. An item is a task
as one person sees it. People answer about the upper and the lower row; only `key.json` knows which method that is.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from utils import disk

ANSWERS = ("upper", "lower", "none")
QUESTIONS = {  # Appendix A.1, word for word; the names are those of Table 2
    "diversity": (
        "Which row of images is more diverse?",
        "To what extent do the images within a single row differ from each other in terms of content, colors, "
        "composition, and other visual elements?",
    ),
    "accordance": (
        "Which row of images corresponds better to the textual description?",
        "To what degree do the images reflect the content described in the textual prompt above?",
    ),
    "attractiveness": (
        "Which row of images is more visually appealing?",
        "Which images are more aesthetically pleasing in terms of visual quality, design, and overall presentation?",
    ),
}
REPEATED, ATTENTION = 0.05, 2  # share of a person's tasks that come again with sides swapped; attention tasks each


@dataclass(frozen=True)
class Contest:
    """Two rows of one evaluation's table, by their labels. `setup` names the evaluation."""

    setup: str
    first: str
    second: str


@dataclass(frozen=True)
class Item:
    """What a person sees at once. In an attention task the second row is one noise picture, repeated."""

    id: str  # random: says nothing
    rater: int
    kind: str  # "task", "repeat" or "attention"
    contest: int
    prompt: int
    upper: str  # "first" or "second", the method in the upper row


@dataclass(frozen=True)
class Vote:
    """One answer: 1 for the first method of the contest, 0 for the second, 0.5 for no preference."""

    contest: int
    prompt: int
    rater: int
    question: str
    value: float
    kind: str = "task"
    upper: bool | None = None  # whether it is for the upper row; None: no preference


def plan(tasks: list[tuple[int, int]], raters: int, people: int, seed: int) -> list[Item]:
    """Items of all people, in the order in which they are shown, for tasks (contest, prompt).

    Each task goes to exactly `raters` people, whose numbers of tasks differ by one at most. The first method is in the
    upper row of half of a person's tasks.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(tasks, len(tasks))
    items = []
    for person in range(people):
        mine = [task for i, task in enumerate(shuffled) if (person - i * raters) % people < raters]
        rng.shuffle(mine)
        sides = ["first", "second"] * (len(mine) // 2 + 1)
        sides = rng.sample(sides[: len(mine)], len(mine))
        shown = [("task", *task, side) for task, side in zip(mine, sides, strict=True)]
        again = shown[: max(1, round(REPEATED * len(shown)))]  # early tasks, to be repeated in the second half
        swapped = {"first": "second", "second": "first"}
        more = [("repeat", *task, swapped[side]) for _, *task, side in again]
        more += [("attention", *rng.choice(mine), rng.choice(["first", "second"])) for _ in range(ATTENTION)]
        for one in more:
            shown.insert(rng.randint((len(shown) + 1) // 2, len(shown)), one)
        items += [Item(f"{rng.getrandbits(48):012x}", person + 1, *one) for one in shown]
    return items


def write_key(path: Path, study: str, contests: list[Contest], items: list[Item]) -> None:
    key = {"study": study, "contests": [asdict(c) for c in contests], "items": [asdict(i) for i in items]}
    disk.write_text(path, json.dumps(key, indent=1) + "\n")


def read_key(folder: Path) -> tuple[str, list[Contest], list[Item]]:
    """Name of the study, contests, items. Raises ValueError or OSError for a folder that is no study."""
    path = folder / "key.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; give the folder that `study.py make` wrote")
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        return key["study"], [Contest(**c) for c in key["contests"]], [Item(**i) for i in key["items"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not as `study.py make` writes it ({error!r})") from None


def answers_file(study: str, rater: int, answers: dict[str, dict[str, str]]) -> str:
    """The content of an answers file, as the page saves it: {item: {question: "upper", "lower" or "none"}}."""
    return json.dumps({"study": study, "rater": rater, "answers": answers}, indent=1) + "\n"


def read_votes(study: str, items: list[Item], paths: Iterable[Path]) -> list[Vote]:
    """The votes in answers files. Raises ValueError for files of another study, or two of one person."""
    by_id, votes, seen = {item.id: item for item in items}, [], {}
    for path in paths:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            name, rater, answers = found["study"], found["rater"], found["answers"]
            rows = [(id, question, answer) for id, own in answers.items() for question, answer in own.items()]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a file of answers ({error!r}); save it again from the page") from None
        if name != study:
            raise ValueError(f"{path}: answers to another study ({name}, not {study}); leave it out")
        if rater in seen:
            raise ValueError(f"{path}: rater {rater} has answered in {seen[rater]} already; keep one of the two")
        seen[rater] = path
        for id, question, answer in rows:
            if id not in by_id or by_id[id].rater != rater or question not in QUESTIONS or answer not in ANSWERS:
                raise ValueError(f"{path}: {question}: {answer} for {id} fits no item of rater {rater}; save it again")
            votes.append(vote(by_id[id], question, answer))
    return votes


def vote(item: Item, question: str, answer: str) -> Vote:
    for_first = {"upper": item.upper == "first", "lower": item.upper != "first", "none": 0.5}[answer]
    side = None if answer == "none" else answer == "upper"
    return Vote(item.contest, item.prompt, item.rater, question, float(for_first), item.kind, side)
