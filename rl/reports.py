"""What a step is told as: numbers of its rollouts, of its router, and where its time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from cabochon.errors import MachineError, UserError
from cabochon.rl.rewards import SHAPING, Rewards
from cabochon.types import Rollout


def rollout_row(
    rollouts: Sequence[Rollout], rewards: Rewards, step: int, dropped: Sequence[Rollout] = ()
) -> dict[str, Any]:
    """Means over a step's completions. `score` is the verifier's alone, before any shaping; both it and the reward also
    by domain, where there are several. `agreement`: of reward models with the verifier. `lag`: updates between drawing
    a token and training on it. `dropped`: of groups with nothing to teach, which `completions` and `infra_errors` count
    as well: a grader that fails makes groups such; `infra_reason` is what most of the latter failed of."""
    statuses = [r.verdict.status for r in rollouts if r.verdict is not None]
    completions = [r.completion for r in rollouts]
    tokens = np.array([int(c.mask.sum()) for c in completions])
    versions = np.concatenate([c.policy_version[c.mask] for c in completions])
    failed = unjudged([*rollouts, *dropped])
    row: dict[str, Any] = {
        "reward": mean(rewards.reward_N),
        "score": mean(rewards.parts["verifier"]),
        "completions": len(rollouts) + len(dropped),
        "tokens": float(tokens.mean()),
        "longest": int(tokens.max()),
        "truncated": float(np.mean([c.finish == "length" for c in completions])),
        "empty": float(np.mean(tokens == 0)),
        "infra_errors": len(failed),
        "status": {name: statuses.count(name) / len(statuses) for name in sorted(set(statuses))} if statuses else {},
        "parts": {name: mean(x) for name, x in rewards.parts.items()},
        "lag": {"mean": float((step - 1 - versions).mean()), "max": int((step - 1 - versions).max())}
        if len(versions)
        else {},
    }
    if failed:
        row["infra_reason"] = Counter(failed).most_common(1)[0][0]
    if agreed := agreement(rollouts, rewards):
        row["agreement"] = agreed
    domains = [r.task.domain for r in rollouts]
    if len(set(domains)) > 1:
        at = {d: np.array([x == d for x in domains]) for d in sorted(set(domains))}
        row["domains"] = {
            d: {"score": mean(rewards.parts["verifier"][m]), "reward": mean(rewards.reward_N[m])} for d, m in at.items()
        }
    return row


def unjudged(rollouts: Sequence[Rollout]) -> list[str]:
    """What the machine said of each completion that it could not judge."""
    return [r.verdict.detail for r in rollouts if r.verdict is not None and r.verdict.status == "infra_error"]


def nothing_to_learn(step: int, dropped: Sequence[Rollout], groups: int) -> UserError | MachineError:
    """Why no group is left: the tasks, unless it is that most completions could not be judged."""
    failed = unjudged(dropped)
    if failed and 2 * len(failed) >= len(dropped):
        return MachineError(
            f"step {step}: {len(failed)} of {len(dropped)} completions could not be judged, so nothing can be learnt: "
            f"{failed[0]}; `cabochon doctor` looks at sandboxes"
        )
    return UserError(
        f"step {step}: all {groups} groups were alike, all right or all wrong, so nothing can be "
        "learnt: choose easier or harder tasks, more samples (rollout.group_size), or another algorithm"
    )


def verify_seconds(rollouts: Sequence[Rollout]) -> float:
    """Spent in judging; what several samples said was judged once, and they share the verdict."""
    return sum({id(r.verdict): r.verdict.seconds for r in rollouts if r.verdict is not None}.values())


def agreement(rollouts: Sequence[Rollout], rewards: Rewards) -> dict[str, float]:
    """By reward model: the share of pairs of one prompt's completions, one better than the other by the verifier, that
    the model orders alike. Equal scores count half; a model without such a pair is left out."""
    group_N, verified_N = np.array([r.group for r in rollouts]), rewards.parts["verifier"]
    out = {}
    for name in rewards.parts.keys() - set(SHAPING):
        known_N = ~np.isnan(verified_N) & ~np.isnan(rewards.parts[name])
        wins = pairs = 0.0
        for group in np.unique(group_N):
            at = known_N & (group_N == group)
            v, q = verified_N[at], rewards.parts[name][at]
            better = v[:, None] > v[None, :] + 1e-6
            wins += ((q[:, None] > q[None, :]) + 0.5 * (q[:, None] == q[None, :]))[better].sum()
            pairs += better.sum()
        if pairs:
            out[name] = float(wins / pairs)
    return dict(sorted(out.items()))


def group_row(rollouts: Sequence[Rollout], score_N: np.ndarray) -> dict[str, float]:
    """How much groups have to teach: shares that are all right, all wrong, or mixed."""
    group_N = np.array([r.group for r in rollouts])
    kinds = []
    for group in np.unique(group_N):
        known = score_N[(group_N == group) & ~np.isnan(score_N)]
        if len(known):
            kinds.append(
                "solved"
                if known.min() >= 1
                else "failed"
                if known.max() <= 0
                else "mixed"
                if np.ptp(known) > 1e-6
                else "equal"
            )
    return {f"groups_{kind}": kinds.count(kind) / max(len(kinds), 1) for kind in ("solved", "failed", "mixed")}


def mean(x: np.ndarray) -> float | None:
    """Of what is known; None where nothing is."""
    known = x[~np.isnan(x)]
    return float(known.mean()) if len(known) else None


class Stopwatch:
    """Seconds by name.

    Example: `with watch("update"): ...` and then `watch.take()` gives `{"update_seconds": 1.2}` and begins anew.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    def take(self) -> dict[str, float]:
        out, self._seconds = {f"{name}_seconds": s for name, s in self._seconds.items()}, {}
        return out
