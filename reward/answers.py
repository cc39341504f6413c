"""A judge's closed answer set: from log-probs or text to a number. Pure; algorithms.md section 4.

Choices stand worst first; choice i of n is worth i / (n - 1). P(yes) is the expected worth over (No, Yes), the expected
score over digits is that over (1, ..., M), a rubric's criterion is any other ordered list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from cabochon.reward.prompt import MARK


def worth(choices: int) -> list[float]:
    """Of each of so many choices: 0 for the worst, 1 for the best."""
    return [i / (choices - 1) for i in range(choices)]


def expected(probabilities: Sequence[float], *, normalise: bool = True) -> float:
    """Mean worth. `probabilities` of the choices need not sum to 1: the rest went to other texts, which `normalise`
    leaves out of account and which is worth 0 without it."""
    total = math.fsum(probabilities) if normalise else 1.0
    return math.fsum(p * w for p, w in zip(probabilities, worth(len(probabilities)), strict=True)) / total


def swap_mean(first_AB: float, first_BA: float) -> float:
    """P(1 beats 2) from P(A) in the order 1, 2 and P(A) in the order 2, 1."""
    return (first_AB + 1 - first_BA) / 2


def swap_logit(first_AB: float, first_BA: float) -> float:
    """The same by the mean of the log-odds."""
    odds = lambda p: math.log(p) - math.log1p(-p)  # noqa: E731
    return 1 / (1 + math.exp(-(odds(first_AB) + odds(1 - first_BA)) / 2))


def weighted(scores: Sequence[float], weights: Sequence[float]) -> float:
    """A rubric's score. Raises ValueError unless the weights sum to something positive and finite."""
    total = math.fsum(weights)
    if not 0 < total < math.inf or min(weights) < 0:
        raise ValueError(f"a rubric needs weights >= 0 with a positive, finite sum, got {list(weights)}")
    return math.fsum(s * w for s, w in zip(scores, weights, strict=True)) / total


def parse(text: str, choices: Sequence[str]) -> int | None:
    """The choice on the last line, `Verdict: CHOICE`; None for anything else, however much it sounds like one."""
    line = (text.strip().splitlines() or [""])[-1].strip().casefold()
    names = [choice.casefold() for choice in choices]
    said = [name for name in names if re.fullmatch(rf"\W*{MARK.casefold()}\W*{_whole(name)}\W*", line)]
    return names.index(max(said, key=len)) if said else None  # "-1" and not "1", whose sign would be mere decoration


def _whole(name: str) -> str:
    """Its pattern; of a number with no sign or point right before it, which would make it another: "<5", ".5"; before
    none what denies it."""
    return (r"(?<![-−+.,<>≤≥~≈≠¬!])" if name[:1].isdigit() else r"(?<![≠¬!~])") + re.escape(name)


def spelled(top: Mapping[str, float], choices: Sequence[str]) -> list[float]:
    """Probability of each choice from the log-probs of tokens that may begin the verdict.

    A token counts for the only choice that it begins, give or take space and case; no choice begins another.
    """
    names = [choice.casefold() for choice in choices]
    out = [0.0] * len(choices)
    for token, logprob in top.items():
        text = token.strip().casefold()
        begins = [i for i, name in enumerate(names) if text and name.startswith(text)]
        if len(begins) == 1:
            out[begins[0]] += math.exp(logprob)
    return out
