"""Evaluation estimators over sampled completions, with intervals (algorithms.md section 17). Host only.

Legend: P problems, n samples of each. Samples of one problem are not independent, so errors are clustered by problem.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from cabochon.errors import UserError


class Estimate(NamedTuple):
    """A mean over problems, its standard error, and the 95 % interval."""

    mean: float
    error: float
    low: float
    high: float


class Paired(NamedTuple):
    """The mean difference of two checkpoints on the same problems, its 95 % interval and two-sided p value."""

    difference: float
    low: float
    high: float
    p: float


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of the n samples, drawn without replacement, hold a correct one (2107.03374); unbiased.

    With `correct` the samples whose answer *and* reasoning are right, this is CoT-Pass@K (2506.14245).
    Raises UserError where there are fewer samples than k.
    """
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} needs {k} or more samples per problem, there are {n}")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def majority_at_k(
    answers: Sequence[Hashable | None], correct: Sequence[bool], k: int, *, draws: int = 2000, seed: int = 0
) -> float:
    """Chance that the commonest answer among k of the samples, drawn without replacement, is a correct one.

    `answers` names the equivalence class of each sample's parsed answer; None, no answer, is a class of its own that
    is never correct. Ties count in expectation. Exact where there are at most `draws` subsets, otherwise over that many
    seeded draws.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise UserError(f"maj@{k} needs {k} or more samples per problem, there are {n}")
    right = {a: ok and a is not None for a, ok in zip(answers, correct, strict=True)}

    def won(subset: Sequence[int]) -> float:
        votes: dict[Hashable | None, int] = {}
        for i in subset:
            votes[answers[i]] = votes.get(answers[i], 0) + 1
        top = max(votes.values())
        winners = [a for a, count in votes.items() if count == top]
        return sum(right[a] for a in winners) / len(winners)

    if math.comb(n, k) <= draws:
        return float(np.mean([won(s) for s in itertools.combinations(range(n), k)]))
    rng = np.random.default_rng(seed)
    return float(np.mean([won(rng.choice(n, k, replace=False).tolist()) for _ in range(draws)]))


def cot_verdicts(votes: Sequence[bool]) -> dict[str, bool]:
    """Whether reasoning is right by the judge's several votes: any, majority (the headline), or all of them."""
    yes = sum(bool(v) for v in votes)
    return {"any": yes > 0, "majority": 2 * yes > len(votes), "all": yes == len(votes) > 0}


def over_problems(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of one value per problem (such as the mean score of its samples: avg@n), errors clustered by problem.

    The interval is the normal one; it does not leave [0, 1] where the values do not.
    """
    x = np.asarray(values, float)
    if not x.size:
        raise UserError("no problem to average over")
    mean = float(x.mean())
    error = float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.inf
    low, high = mean - 1.96 * error, mean + 1.96 * error
    if x.min() >= 0 and x.max() <= 1:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(mean, error, low, high)


def bootstrap(values: Sequence[float] | np.ndarray, *, draws: int = 5000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean, by resampling whole problems. Deterministic for a seed."""
    x = np.asarray(values, float)
    means = x[np.random.default_rng(seed).integers(0, x.size, (draws, x.size))].mean(-1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_test(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, *, draws: int = 10_000, seed: int = 0
) -> Paired:
    """Whether `after` differs from `before` on the same problems: a sign-flip permutation test of the mean difference.

    Exact where all 2^P sign patterns are at most `draws`. Raises UserError where the problems are not the same number.
    """
    if len(before) != len(after) or not len(before):
        raise UserError(f"a paired test needs the same problems: there are {len(before)} and {len(after)}")
    d = np.asarray(after, float) - np.asarray(before, float)
    n = d.size
    if 2**n <= draws:
        signs = np.array(list(itertools.product((1, -1), repeat=n)))
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice((1, -1), (draws, n))
        extra = 1  # the observed pattern itself
    # a difference within rounding of the observed one is as extreme
    extreme = int((np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)).sum()) + extra
    error = float(d.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    mean = float(d.mean())
    return Paired(mean, mean - 1.96 * error, mean + 1.96 * error, extreme / (len(signs) + extra))
