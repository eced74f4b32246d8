"""The paper's Figure 2 while it happens: the trained reward rises, the held-out reward and the diversity fall.

`train.py --monitor N` samples fixed prompts with fixed seeds every N updates and compares them with the first look.
"""

from torch import Tensor

from metrics import paired_difference

ERRORS = 2.0  # a change counts from so many of its standard errors on

Scores = dict[str, Tensor]  # "reward", "judge" and "diversity", those that are measured, one value a prompt (P,)


def changes(first: Scores, now: Scores) -> dict[str, tuple[float, float]]:
    """Mean change of each score since the first look, and its standard error over the prompts."""
    return {key: paired_difference(now[key], first[key]) for key in now}


def overfits(change: dict[str, tuple[float, float]]) -> bool:
    """Whether the reward has risen while all that is not trained on has fallen, each beyond its error."""
    risen = {key: difference > ERRORS * error for key, (difference, error) in change.items()}
    fallen = {key: -difference > ERRORS * error for key, (difference, error) in change.items()}
    return risen["reward"] and all(fell for key, fell in fallen.items() if key != "reward")


def line(change: dict[str, tuple[float, float]]) -> str:
    """The changes in words: "reward +0.120 ± 0.010, judge -0.051 ± 0.012"."""
    return ", ".join(f"{key} {difference:+.3f} ± {error:.3f}" for key, (difference, error) in change.items())
