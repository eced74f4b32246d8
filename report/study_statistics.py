"""The statistics of a user study: win rates with intervals, agreement, votes needed, Bradley-Terry strengths.

A vote's value is 1 for the first method, 0 for the second, 0.5 for a tie (no preference). Votes on one task are not
independent, so every interval resamples whole tasks: a 95 % percentile bootstrap.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

RESAMPLES = 2000
Z_95, Z_POWER = 1.959964, 0.841621  # two-sided 5 % level, 80 % power


def grouped(pairs: Iterable[tuple[Hashable, object]]) -> dict:
    """Values by key, in order of first appearance."""
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return dict(groups)


def win_rate(tasks: Sequence[Sequence[float]]) -> float:
    """Share of all votes for the first method, a tie as half a vote. `tasks`: the values of the votes on each task."""
    values = [v for task in tasks for v in task]
    return sum(values) / len(values)


def win_rate_without_ties(tasks: Sequence[Sequence[float]]) -> float:
    """Share of the votes with a preference that are for the first method; nan where there is none."""
    values = [v for task in tasks for v in task if v != 0.5]
    return sum(values) / len(values) if values else math.nan


def tie_share(tasks: Sequence[Sequence[float]]) -> float:
    values = [v for task in tasks for v in task]
    return values.count(0.5) / len(values)


def majority(task: Sequence[float]) -> float:
    """The answer of more than half of the raters of a task; a tie without one."""
    answer, count = Counter(task).most_common(1)[0]
    return answer if 2 * count > len(task) else 0.5


def sign_test(tasks: Sequence[Sequence[float]]) -> float:
    """Two-sided exact p-value of as uneven a split of the tasks' majorities, ties left out, if neither is better."""
    won = [majority(task) for task in tasks]
    wins, losses = won.count(1.0), won.count(0.0)
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n)


def interval(tasks: Sequence, statistic: Callable[[list], Sequence[float]], resamples: int, seed: int = 0) -> list:
    """Ends of the 95 % percentile bootstrap intervals of what `statistic` returns for a list of tasks.

    Whole tasks are drawn with replacement.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(tasks), size=(resamples, len(tasks))).tolist()
    values = [statistic([tasks[i] for i in row]) for row in drawn]
    return np.quantile(values, [0.025, 0.975], axis=0).tolist()


def win_rate_interval(tasks: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES) -> tuple:
    """`interval` of `win_rate`, computed from the sums of the tasks."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(tasks), size=(resamples, len(tasks)))
    sums, counts = np.array([sum(t) for t in tasks]), np.array([len(t) for t in tasks])
    return tuple(float(q) for q in np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975]))


def agreement(tasks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(share of pairs of raters of a task with the same answer, Krippendorff's nominal alpha).

    alpha = 1 - observed / expected disagreement: 1 for perfect agreement, 0 for that of chance. nan where no task has
    two raters, or nothing varies.
    """
    rated = [Counter(task) for task in tasks if len(task) > 1]
    n = sum(c.total() for c in rated)
    if not n:
        return math.nan, math.nan
    totals = sum(rated, Counter())
    pairs = sum(c.total() * (c.total() - 1) for c in rated)
    same = sum(k * (k - 1) for c in rated for k in c.values())
    observed = sum((c.total() ** 2 - sum(k * k for k in c.values())) / (c.total() - 1) for c in rated) / n
    expected = (n * n - sum(k * k for k in totals.values())) / (n * (n - 1))
    return same / pairs, 1 - observed / expected if expected else math.nan


def votes_needed(p: float) -> int:
    """Independent votes that tell a win rate p from one half: 5 % level, 80 % power.

    n = (1.96 / 2 + 0.84 sqrt(p (1 - p)))^2 / (p - 1/2)^2
    """
    return math.ceil((Z_95 / 2 + Z_POWER * math.sqrt(p * (1 - p))) ** 2 / (p - 0.5) ** 2)


def normal_interval(p: float, votes: int) -> tuple[float, float]:
    """95 % interval of a win rate from independent votes, where only the rate and their number are known."""
    half = Z_95 * math.sqrt(p * (1 - p) / votes)
    return p - half, p + half


def bradley_terry(duels: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """Strengths theta with P(i beats j) = 1 / (1 + exp(theta_j - theta_i)), of mean 0; duels are (i, j, value).

    Maximum likelihood by Newton's method; a tie is half a win each. A weak prior keeps the strength of a method that
    wins or loses all finite.
    """
    names = list(dict.fromkeys(name for i, j, _ in duels for name in (i, j)))
    at = {name: k for k, name in enumerate(names)}
    wins, games = np.zeros((len(names), len(names))), np.zeros((len(names), len(names)))
    for i, j, value in duels:
        wins[at[i], at[j]] += value
        wins[at[j], at[i]] += 1 - value
        games[at[i], at[j]] += 1
        games[at[j], at[i]] += 1
    theta, prior = np.zeros(len(names)), 1e-3
    for _ in range(50):
        p = 1 / (1 + np.exp(theta[None] - theta[:, None]))
        gradient = (wins - games * p).sum(1) - prior * theta
        weight = games * p * (1 - p)
        hessian = np.diag(weight.sum(1) + prior) - weight
        step = np.clip(np.linalg.solve(hessian, gradient), -1, 1)
        theta = theta + step
        if abs(step).max() < 1e-6:
            break
    return dict(zip(names, (theta - theta.mean()).tolist(), strict=True))
