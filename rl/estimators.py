"""Evaluation estimators over sampled completions, with intervals (algorithms.md section 17). Host only.

Legend: P problems, n samples of each. Samples of one problem are not independent, so errors are clustered by problem.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

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
    is_of_nC = np.array([[answer == each for each in right] for answer in answers], np.int32)
    if math.comb(n, k) <= draws:
        subsets_Sk = np.array(list(itertools.combinations(range(n), k)))
    else:
        subsets_Sk = np.random.default_rng(seed).random((draws, n)).argsort(-1)[:, :k]
    votes_SC = is_of_nC[subsets_Sk].sum(1)
    wins_SC = votes_SC == votes_SC.max(-1, keepdims=True)
    return float(np.mean(wins_SC @ np.array(list(right.values()), float) / wins_SC.sum(-1)))


def cot_verdicts(votes: Sequence[bool]) -> dict[str, bool]:
    """Whether reasoning is right by the judge's several votes: any, majority (the headline), or all of them."""
    yes = sum(bool(v) for v in votes)
    return {"any": yes > 0, "majority": 2 * yes > len(votes), "all": yes == len(votes) > 0}


def over_problems(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of one value per problem (such as the mean score of its samples: avg@n), errors clustered by problem.

    Of values in [0, 1] the interval is Wilson's at the effective sample size (Dean and Pagano, 2015), with Student's t:
    the normal one covers 80 to 90 % where problems are few or nearly all alike, and has no width where all are. Of
    others it is Student's.
    """
    x = np.asarray(values, float)
    if not x.size:
        raise UserError("no problem to average over")
    mean = float(x.mean())
    bounded = bool(x.min() >= 0 and x.max() <= 1)
    if x.size == 1:
        return Estimate(mean, math.inf, *((0.0, 1.0) if bounded else (-math.inf, math.inf)))
    error, t = float(x.std(ddof=1) / math.sqrt(x.size)), _student(x.size)
    if not bounded:
        return Estimate(mean, error, mean - t * error, mean + t * error)
    variance = mean * (1 - mean)
    n = variance / error**2 if error else x.size
    middle, half = mean + t * t / (2 * n), t * math.sqrt(variance / n + t * t / (4 * n * n))
    return Estimate(mean, error, (middle - half) / (1 + t * t / n), (middle + half) / (1 + t * t / n))


def _student(n: int) -> float:
    """Student's t for a two-sided 95 % interval of a mean of n values."""
    return float(stdtrit(n - 1, 0.975))


def paired_test(
    before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray, *, draws: int = 10_000, seed: int = 0
) -> Paired:
    """Whether `after` differs from `before` on the same problems: a sign-flip permutation test of the mean difference.

    Exact where all 2^P sign patterns are at most `draws`; there the interval is the differences which the test does not
    refuse (order statistics of the means of all subsets: Hartigan, 1969), unbounded below 6 problems, of which no
    outcome has a p value under 0.05. Otherwise it is Student's. Raises UserError where the problems are not the same
    number.
    """
    if len(before) != len(after) or not len(before):
        raise UserError(f"a paired test needs the same problems: there are {len(before)} and {len(after)}")
    b, a = np.asarray(before, float), np.asarray(after, float)
    d, n = a - b, len(a)
    mean = float(d.mean())
    exact = 2**n <= draws
    if exact:
        kept = np.array(list(itertools.product((1, 0), repeat=n)))  # the last keeps none
        signs, extra = 2 * kept - 1, 0
        means = np.sort((kept[:-1] @ d) / kept[:-1].sum(-1))
        cut = int(0.025 * 2**n)
        low, high = (float(means[cut - 1]), float(means[-cut])) if cut else (-math.inf, math.inf)
    else:
        signs = np.random.default_rng(seed).choice((1, -1), (draws, n))
        extra = 1  # the observed pattern itself
        half = _student(n) * float(d.std(ddof=1)) / math.sqrt(n)
        low, high = mean - half, mean + half
    # a difference within rounding of the observed one is as extreme
    extreme = int((np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)).sum()) + extra
    if math.isfinite(low) and min(a.min(), b.min()) >= 0 and max(a.max(), b.max()) <= 1:
        low, high = max(low, -1.0), min(high, 1.0)
    return Paired(mean, low, high, extreme / (len(signs) + extra))
