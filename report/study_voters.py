"""Metrics as voters in a user study: a reward answers the same items as a person, into the same kind of file.

A voter is a column of scores that evaluate.py has cached beside the images: `tiny`, `rater`, `hpsv2.1`. It prefers the
row with the higher mean score, for accordance and attractiveness alike, since a reward judges both at once; where the
evaluation knows whether an image shows the right concept, that decides accordance. The more diverse row is that of the
higher DinoDiversity. Voters skip attention tasks, whose noise has no score.
"""

import statistics
from pathlib import Path

import torch
from safetensors import safe_open

import metrics
from report.study_page import Evaluation
from report.study_plan import QUESTIONS, Item, answers_file, read_key
from utils import disk

INDIFFERENT = 0.25  # no preference below this difference, in standard deviations of a row's value over the study


class Scores:
    """The cached columns of an evaluation's points."""

    def __init__(self, evaluation: Evaluation):
        self.evaluation, self.columns = evaluation, {}
        for label, point in evaluation.rows.items():
            found = self.columns[label] = {}
            for path in (evaluation.folder / point["folder"]).glob("*.safetensors"):
                with safe_open(path, framework="pt") as file:
                    found |= {key: file.get_tensor(key) for key in file.keys()}

    def row(self, label: str, key: str, prompt: int) -> torch.Tensor:
        """A column at the images of a row. Raises ValueError where it was not measured."""
        each = self.evaluation.results["images_per_prompt"]
        if key not in self.columns[label]:
            known = ", ".join(sorted(self.columns[label])) or "nothing"
            raise ValueError(f"{self.evaluation.folder}: measured is {known}, not {key}, in {label}; see --rewards")
        return self.columns[label][key][prompt * each : prompt * each + self.evaluation.count]

    def value(self, voter: str, question: str, label: str, prompt: int) -> float:
        """What a voter compares."""
        if question == "diversity":
            features = self.row(label, "diversity", prompt)
            return metrics.diversity(features, [0] * len(features))
        by_concept = question == "accordance" and "concept" in self.columns[label]
        return self.row(label, "concept" if by_concept else voter, prompt).mean().item()


def vote(folder: Path, evaluations: list[Path], voters: list[str]) -> list[Path]:
    """Answer a study: the k-th voter takes the page of rater k. Returns the files.

    Raises ValueError or OSError for unknown columns, other evaluations than the study's, or more voters than pages.
    """
    study, contests, items = read_key(folder)
    scores = {path.name: Scores(Evaluation(path)) for path in evaluations}
    if missing := sorted({c.setup for c in contests} - set(scores)):
        raise ValueError(f"{folder}: made from {', '.join(missing)} too; name all its evaluations")
    people = max(item.rater for item in items)
    if len(voters) > people:
        raise ValueError(f"{len(voters)} voters for {people} pages; name fewer, or make the study with --people")
    written = []
    for rater, voter in enumerate(voters, 1):
        own = [item for item in items if item.rater == rater and item.kind != "attention"]
        answers: dict[str, dict[str, str]] = {item.id: {} for item in own}
        for question in QUESTIONS:
            pairs = {item.id: values(scores, contests[item.contest], item, voter, question) for item in own}
            spread = statistics.pstdev(value for pair in pairs.values() for value in pair)
            for item in own:
                answers[item.id][question] = preference(item, *pairs[item.id], INDIFFERENT * spread)
        written.append(folder / f"answers-{rater}.json")
        disk.write_text(written[-1], answers_file(study, rater, answers))
    return written


def values(scores: dict[str, Scores], contest, item: Item, voter: str, question: str) -> tuple[float, float]:
    own = scores[contest.setup]
    first, second = (own.value(voter, question, label, item.prompt) for label in (contest.first, contest.second))
    return first, second


def preference(item: Item, first: float, second: float, margin: float) -> str:
    """The answer about the rows as they are shown."""
    if abs(first - second) <= margin:
        return "none"
    return "upper" if (first > second) == (item.upper == "first") else "lower"
