"""How far a score can be trusted: calibration, ranking, biases. Pure functions on numpy arrays, f64.

Legend: N judgements.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Platt(NamedTuple):
    """P(right) = sigmoid(slope * logit + intercept). Temperature scaling is the case intercept = 0."""

    slope: float
    intercept: float

    def __call__(self, logit_N: np.ndarray) -> np.ndarray:
        return sigmoid(self.slope * np.asarray(logit_N, np.float64) + self.intercept)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, np.exp(-np.abs(x))) / (1.0 + np.exp(-np.abs(x)))


def logit(p: np.ndarray, edge: float = 1e-6) -> np.ndarray:
    """Of probabilities kept `edge` away from 0 and 1."""
    p = np.clip(np.asarray(p, np.float64), edge, 1 - edge)
    return np.log(p) - np.log1p(-p)


def reliability(p_N: np.ndarray, right_N: np.ndarray, bins: int = 10) -> dict[str, dict[str, float]]:
    """By bin of equal width in the confidence, empty ones left out: mean `confidence`, share `right`, `count`."""
    p, right = np.asarray(p_N, np.float64), np.asarray(right_N, np.float64)
    index = np.minimum((p * bins).astype(int), bins - 1)
    return {
        f"{b / bins:.1f} to {(b + 1) / bins:.1f}": {
            "confidence": float(p[index == b].mean()), "right": float(right[index == b].mean()),
            "count": int((index == b).sum()),
        }
        for b in np.unique(index)
    }  # fmt: skip


def expected_calibration_error(p_N: np.ndarray, right_N: np.ndarray, bins: int = 10) -> float:
    """Mean over judgements of |share right - confidence| of their bin, see `reliability`."""
    found = reliability(p_N, right_N, bins).values()
    gaps = sum(abs(b["confidence"] - b["right"]) * b["count"] for b in found)
    return float(gaps / len(p_N)) if len(p_N) else float("nan")


def fit(logit_N: np.ndarray, right_N: np.ndarray, *, intercept: bool = True, steps: int = 50) -> Platt:
    """The Platt scaling of least negative log-likelihood (Newton's method, labels smoothed as Platt 1999 has it).

    Smoothing keeps it finite where the scores separate the labels. One class alone gives the identity.
    """
    x, right = np.asarray(logit_N, np.float64), np.asarray(right_N, bool)
    good, bad = int(right.sum()), int((~right).sum())
    if not good or not bad:
        return Platt(1.0, 0.0)
    target = np.where(right, (good + 1) / (good + 2), 1 / (bad + 2))
    design = np.stack([x, np.ones_like(x)], 1)[:, : 1 + intercept]
    w = np.zeros(1 + intercept)
    loss = _nll(design @ w, target)
    for _ in range(steps):
        p = sigmoid(design @ w)
        gradient = design.T @ (p - target)
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(len(w))
        step = np.linalg.solve(hessian, gradient)
        while (new := _nll(design @ (w - step), target)) > loss and np.abs(step).max() > 1e-12:
            step = step / 2
        w, loss = w - step, new
        if np.abs(step).max() < 1e-10:
            break
    return Platt(float(w[0]), float(w[1]) if intercept else 0.0)


def _nll(z: np.ndarray, target: np.ndarray) -> float:
    return float((np.logaddexp(0, z) - target * z).sum())


def auc(score_N: np.ndarray, right_N: np.ndarray) -> float:
    """P(a right one scores above a wrong one), ties half; nan where there is one kind only."""
    score, right = np.asarray(score_N, np.float64), np.asarray(right_N, bool)
    good, bad = score[right], score[~right]
    if not len(good) or not len(bad):
        return float("nan")
    below = np.searchsorted(np.sort(bad), good, "left") + np.searchsorted(np.sort(bad), good, "right")
    return float(below.sum() / 2 / len(good) / len(bad))


def correlation(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; nan where either does not vary."""
    a, b = _ranks(np.asarray(x_N, np.float64)), _ranks(np.asarray(y_N, np.float64))
    spread = a.std() * b.std() if len(a) else 0.0
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else float("nan")


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


class PairReport(NamedTuple):
    """What a scalar model makes of pairs."""

    pairs: int
    accuracy: float
    difference: float
    """mean score of the better answer less that of the worse"""
    loss: float
    """Bradley-Terry, without margins, nats"""
    ece: float
    """of sigmoid(|difference|) as the confidence in the answer that scores higher"""
    temperature: float
    """what differences are to be divided by for the best likelihood"""
    ece_scaled: float
    """with that temperature"""
    length_correlation: float
    """rank correlation of score and tokens over the answers; a preference for length shows against the label's own"""
    by_length: dict[str, dict[str, float]]
    """accuracy by which of the two is longer; empty where no row has both"""


def pair_report(better_N: np.ndarray, worse_N: np.ndarray, tokens_N2: np.ndarray) -> PairReport:
    """`better_N`, `worse_N`: scores; `tokens_N2`: lengths of the better and of the worse, 0 for one that is not there,
    whose score is 0: it has no part in what is said of lengths."""
    d = np.asarray(better_N, np.float64) - np.asarray(worse_N, np.float64)
    tokens = np.asarray(tokens_N2)
    there = tokens > 0
    both = there.all(-1)
    right = d > 0
    said = np.where(d == 0, 0.5, right)  # a tie says nothing, which is neither right nor wrong
    # Every pair is seen from both sides, so that the fit has both classes and no intercept.
    slope = fit(np.concatenate([d, -d]), np.repeat([True, False], len(d)), intercept=False).slope
    scores = np.stack([better_N, worse_N], -1)
    return PairReport(
        pairs=len(d),
        accuracy=float(right.mean()),
        difference=float(d.mean()),
        loss=float(np.logaddexp(0, -d).mean()),
        ece=expected_calibration_error(sigmoid(np.abs(d)), said),
        temperature=float(1 / slope) if slope > 0 else float("inf"),
        ece_scaled=expected_calibration_error(sigmoid(slope * np.abs(d)), said),
        length_correlation=correlation(scores[there], tokens[there]),
        by_length=length_groups((tokens[:, 0] - tokens[:, 1])[both], right[both]),
    )


def length_groups(difference_N: np.ndarray, right_N: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy on pairs by which of the two answers is longer. `difference_N`: tokens of the better less the worse."""
    d, right = np.asarray(difference_N), np.asarray(right_N, np.float64)
    groups = {"better is shorter": d < 0, "same length": d == 0, "better is longer": d > 0}
    return {
        name: {"pairs": int(of.sum()), "accuracy": float(right[of].mean())} for name, of in groups.items() if of.any()
    }
