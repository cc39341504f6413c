"""How per-token losses become one number (algorithms.md section 10), worked out on the host before the step.

Every mode is a weight per token over a divisor of the whole batch, so micro-batches, devices and packing cannot change
it. Legend: N completions of one update; counts are of trained tokens.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np

from cabochon.rl.config import Aggregation


def token_weights(
    mode: Aggregation, count_N: np.ndarray, group_N: np.ndarray, constant: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(weight of each token of a completion, the completion's share of the divisor) [N] f64.

    `constant` is the longest completion allowed for `constant_length`, the budget for `fixed_budget`. Completions
    without a trained token weigh nothing and are not counted.
    """
    n, some = count_N.astype(float), count_N > 0
    total = max(n.sum(), 1.0)
    match mode:
        case "token_mean":
            return some.astype(float), n
        case "seq_mean_token_mean":
            return np.where(some, 1 / np.maximum(n, 1), 0.0), some.astype(float)
        case "seq_mean_token_sum":
            return some.astype(float), some.astype(float)
        case "constant_length":
            return some.astype(float), some * float(constant)
        case "prompt_mean":
            in_group_N = np.array([n[group_N == g].sum() for g in group_N])
            return np.where(some, 1 / np.maximum(in_group_N, 1), 0.0), n / np.maximum(in_group_N, 1)
        case "fixed_budget":
            return some.astype(float), constant * n / total
    assert_never(mode)


def within_budget(count_N: np.ndarray, budget: int) -> np.ndarray:
    """[N] trained tokens kept of each completion, in order, `budget` in all: the last is cut (C3PO, 2506.14731)."""
    before_N = np.cumsum(count_N) - count_N
    return np.clip(budget - before_N, 0, count_N)


def shuffled_groups(group_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[N] indices: groups in random order, each whole and in its own order. Never by length or time of completion."""
    order = {group: i for i, group in enumerate(rng.permutation(np.unique(group_N)))}
    return np.argsort([order[g] for g in group_N], kind="stable")
