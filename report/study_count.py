"""Count a user study: Table 2 with intervals, agreement, and beside it the paper's Table 2."""

import math
from collections.abc import Callable
from csv import writer
from io import StringIO
from pathlib import Path

from report import paper, study_figure
from report import study_statistics as statistics
from report.study_plan import QUESTIONS, Contest, Vote, read_key, read_votes
from report.study_statistics import grouped
from utils import disk

ATTENTIVE = 0.8  # share of right answers in attention tasks, below which a rater's votes are left out
NEEDED = (0.52, 0.55, 0.6, 0.7)
PAPER_VOTES = (
    "it gives 4,800 votes, so 400 for each of 3 questions in 4 set-ups, here taken as independent. Not clear: the "
    "interval contains 50."
)


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}"


def span(interval: tuple[float, float]) -> str:
    return f"{percent(interval[0])} to {percent(interval[1])}"


def lines_of(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table: the first column text, the others numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["", *("| " + " | ".join(row) + " |" for row in (head, rule, *rows))]


def tasks_of(votes: list[Vote], contest: int, question: str) -> list[list[float]]:
    """The values of the votes on each task of a contest."""
    own = [v for v in votes if v.kind == "task" and (v.contest, v.question) == (contest, question)]
    return list(grouped((v.prompt, v.value) for v in own).values())


def attentive(votes: list[Vote], rater: int) -> float:
    """Share of right answers in a rater's attention tasks; nan without any. No preference is wrong there."""
    right = [v.value == 1 for v in votes if v.kind == "attention" and v.rater == rater]
    return sum(right) / len(right) if right else math.nan


def consistent(votes: list[Vote], rater: int) -> float:
    """Share of a rater's repeated tasks with the same answer, though the sides were swapped; nan without any."""
    first = {(v.contest, v.prompt, v.question): v.value for v in votes if v.kind == "task" and v.rater == rater}
    again = [v for v in votes if v.kind == "repeat" and v.rater == rater]
    same = [first[key] == v.value for v in again if (key := (v.contest, v.prompt, v.question)) in first]
    return sum(same) / len(same) if same else math.nan


def upper_share(votes: list[Vote], rater: int) -> float:
    sides = [v.upper for v in votes if v.kind == "task" and v.rater == rater and v.upper is not None]
    return sum(sides) / len(sides) if sides else math.nan


def raters_table(votes: list[Vote], raters: list[int]) -> list[str]:
    head = ["Rater", "Votes", "Attention tasks right, %", "Same answer with sides swapped, %", "Upper row, %"]
    rows = []
    for rater in raters:
        count = sum(v.kind == "task" and v.rater == rater for v in votes)
        shares = [percent(share(votes, rater)) for share in (attentive, consistent, upper_share)]
        out = attentive(votes, rater) < ATTENTIVE
        rows.append([f"{rater}{', left out' * out}", str(count), *shares])
    return lines_of(head, rows)


def contest_table(votes: list[Vote], contest: int) -> list[str]:
    head = ["Win rate of the first, %", "Ties as halves", "95 % interval", "Without ties", "Ties", "Majority",
            "p, sign test", "Votes", "Tasks", "Agreeing pairs of raters", "alpha"]  # fmt: skip
    rows = []
    for question in QUESTIONS:
        if not (tasks := tasks_of(votes, contest, question)):
            continue
        same, alpha = statistics.agreement(tasks)
        rows.append([
            question.capitalize(),
            f"**{percent(statistics.win_rate(tasks))}**",
            span(statistics.win_rate_interval(tasks)),
            percent(statistics.win_rate_without_ties(tasks)),
            percent(statistics.tie_share(tasks)),
            percent(statistics.win_rate([[statistics.majority(task)] for task in tasks])),
            f"{statistics.sign_test(tasks):.2g}",
            str(sum(map(len, tasks))),
            str(len(tasks)),
            percent(same),
            "–" if math.isnan(alpha) else f"{alpha:.2f}",
        ])  # fmt: skip
    return lines_of(head, rows)


def summary_table(votes: list[Vote], contests: list[Contest]) -> list[str]:
    """Table 2: the win rate of each contest's first method, ties as halves, with its interval."""
    head = ["Win rate, %", *(f"{c.setup}: {c.first} against {c.second}" for c in contests)]
    rows = []
    for question in QUESTIONS:
        cells = []
        for number in range(len(contests)):
            tasks = tasks_of(votes, number, question)
            rate = statistics.win_rate(tasks) if tasks else math.nan
            cells.append(f"{percent(rate)} ({span(statistics.win_rate_interval(tasks))})" if tasks else "–")
        rows.append([question.capitalize(), *cells])
    return lines_of(head, rows)


def strengths_table(votes: list[Vote], contests: list[Contest], setup: str) -> list[str]:
    """Bradley-Terry: how often each method beats an average one, if three or more were compared in a set-up."""
    own = [i for i, c in enumerate(contests) if c.setup == setup]
    names = list(dict.fromkeys(n for i in own for n in (contests[i].first, contests[i].second)))
    if len(names) < 3:
        return []

    def shares(question: str) -> Callable[[list[list[tuple]]], list[float]]:
        def of(tasks: list[list[tuple]]) -> list[float]:
            theta = statistics.bradley_terry([duel for task in tasks for duel in task])
            return [1 / (1 + math.exp(-theta.get(name, math.nan))) for name in names]

        return of

    rows = {name: [name] for name in names}
    for question in QUESTIONS:
        duels = [
            (v.prompt, (contests[v.contest].first, contests[v.contest].second, v.value))
            for v in votes
            if v.kind == "task" and v.contest in own and v.question == question
        ]
        tasks = list(grouped(duels).values())  # all votes on one prompt move together
        if not tasks:
            continue
        low, high = statistics.interval(tasks, shares(question), resamples=200)
        for name, value, a, b in zip(names, shares(question)(tasks), low, high, strict=True):
            rows[name].append(f"{percent(value)} ({span((a, b))})")
    head = [f"Wins against an average method, %: {setup}", *(q.capitalize() for q in QUESTIONS)]
    return lines_of(head, list(rows.values()))


def paper_table() -> list[str]:
    """The paper's Table 2, with the intervals that its 400 votes for each number allow."""
    table = paper.read()["Table 2"]
    rows = []
    for question in QUESTIONS:
        cells = []
        for value in table["rows"][question.capitalize()]:
            low, high = statistics.normal_interval(value / 100, table["votes"])
            unclear = low < 0.5 < high
            cells.append(f"{value:g} ({span((low, high))}){' not clear' * unclear}")
        rows.append([question.capitalize(), *cells])
    return lines_of(["The paper's Table 2, %", *table["columns"]], rows)


def figure(votes: list[Vote], contests: list[Contest]) -> str:
    """Table 2 as a picture: the contests, then the paper's set-ups."""
    table, several, groups = paper.read()["Table 2"], len({c.setup for c in contests}) > 1, {}
    for question in QUESTIONS:
        rows = groups.setdefault(question.capitalize(), [])
        for number, c in enumerate(contests):
            if tasks := tasks_of(votes, number, question):
                label = f"{c.first} : {c.second}" + f", {c.setup}" * several
                rows.append((label, True, statistics.win_rate(tasks), statistics.win_rate_interval(tasks)))
        for setup, value in zip(table["columns"], table["rows"][question.capitalize()], strict=True):
            interval = statistics.normal_interval(value / 100, table["votes"])
            rows.append((f"ImageReFL : ReFL, {setup}", False, value / 100, interval))
    return study_figure.draw(groups)


def votes_csv(votes: list[Vote], contests: list[Contest]) -> str:
    """All votes, one per line, for other statistics."""
    out = StringIO()
    lines = writer(out, lineterminator="\n")
    lines.writerow(["setup", "first", "second", "prompt", "rater", "question", "kind", "first_wins"])
    for v in votes:
        c = contests[v.contest]
        lines.writerow([c.setup, c.first, c.second, v.prompt, v.rater, v.question, v.kind, v.value])
    return out.getvalue()


def count(folder: Path, files: list[Path]) -> str:
    """Count the answers, by default all in the folder; writes table2.md, table2.svg and votes.csv, returns the text.

    Raises ValueError or OSError for a folder that is no study, or files that are not its answers.
    """
    study, contests, items = read_key(folder)
    files = files or sorted(folder.glob("answers-*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: no answers-*.json there; put the files that people saved into it")
    votes = read_votes(study, items, files)
    raters = sorted({v.rater for v in votes})
    kept = [v for v in votes if not attentive(votes, v.rater) < ATTENTIVE]
    lines = ["# User study", *summary_table(kept, contests)]
    lines += paper_table()
    lines += ["", f"In brackets: 95 % intervals, ties as halves. The paper's are ours: {PAPER_VOTES}"]
    for number, contest in enumerate(contests):
        lines += ["", f"**{contest.first} against {contest.second}**, {contest.setup}"]
        lines += contest_table(kept, number)
    for setup in dict.fromkeys(c.setup for c in contests):
        lines += strengths_table(kept, contests, setup)
    lines += ["", "Ties are votes without preference. Intervals: bootstrap over tasks, so they hold for other prompts, "
              "not for other raters. Majority: the answer of more than half of a task's raters, else a tie. Alpha: "
              "Krippendorff's, 0 is chance."]  # fmt: skip
    lines += raters_table(votes, raters)
    lines += ["", f"Left out: raters with fewer than {100 * ATTENTIVE:.0f} % right in the attention tasks."]
    lines += ["", "Independent votes needed to tell a win rate from 50 % (5 % level, 80 % power): "
              + ", ".join(f"{statistics.votes_needed(p):,} for {100 * p:g} %" for p in NEEDED) + "."]  # fmt: skip
    text = "\n".join(lines) + "\n"
    disk.write_text(folder / "table2.md", text)
    disk.write_text(folder / "table2.svg", figure(kept, contests))
    disk.write_text(folder / "votes.csv", votes_csv(votes, contests))
    return text
