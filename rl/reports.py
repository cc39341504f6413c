"""What a step is told as: numbers of its rollouts, of its router, and where its time went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np

from cabochon.errors import MachineError, UserError
from cabochon.rl.rewards import SHAPING, Rewards, verified
from cabochon.types import Rollout

Kind = Literal["solved", "failed", "mixed", "equal"]
"""of a group: all right, all wrong, or neither, with scores that differ or that do not"""


def rollout_row(
    rollouts: Sequence[Rollout], rewards: Rewards, step: int, dropped: Sequence[Rollout] = ()
) -> dict[str, Any]:
    """Numbers of a step's completions. Of all that were drawn, those of `dropped` groups with them: `score`, which is
    the verifier's alone, before any shaping, `tokens`, `truncated` and what verdicts say; `infra_reason` is what most
    that could not be judged failed of. Of the `kept`, which are learnt from: `reward` and what it was made of, what
    `unrewarded` ones failed of by source, `agreement` of reward models with the verifier, and `lag`, updates between
    drawing a token and training on it. Score and reward also by domain, where there are several."""
    drawn = [*rollouts, *dropped]
    statuses = [r.verdict.status for r in drawn if r.verdict is not None]
    tokens = np.array([int(r.completion.mask.sum()) for r in drawn])
    versions = np.concatenate([r.completion.policy_version[r.completion.mask] for r in rollouts])
    failed, score_N, rewarded_N = unjudged(drawn), verified(drawn).value_N, ~np.isnan(rewards.reward_N)
    row: dict[str, Any] = {
        "reward": mean(rewards.reward_N),
        "score": mean(score_N),
        "completions": len(drawn),
        "kept": len(rollouts),
        "tokens": float(tokens.mean()),
        "longest": int(tokens.max()),
        "truncated": float(np.mean([r.completion.finish == "length" for r in drawn])),
        "empty": float(np.mean((tokens == 0) & [r.completion.finish != "abort" for r in drawn])),
        "infra_errors": len(failed),
        "unrewarded": int((~rewarded_N).sum()),
        "reward_clipped": float(rewards.clipped_N[rewarded_N].mean()) if rewarded_N.any() else 0.0,
        "status": {name: statuses.count(name) / len(statuses) for name in sorted(set(statuses))} if statuses else {},
        "parts": {name: mean(x) for name, x in rewards.parts.items()},
        "lag": {"mean": float((step - 1 - versions).mean()), "max": int((step - 1 - versions).max())}
        if len(versions)
        else {},
    }
    if failed:
        row["infra_reason"] = Counter(failed).most_common(1)[0][0]
    if rewards.lost:
        row["unrewarded_by"] = dict(rewards.lost)
    if agreed := agreement(rollouts, rewards):
        row["agreement"] = agreed
    domain_N = np.array([r.task.domain for r in drawn])
    if len(domains := sorted(set(domain_N.tolist()))) > 1:
        row["domains"] = {
            d: {"score": mean(score_N[domain_N == d]),
                "reward": mean(rewards.reward_N[domain_N[: len(rollouts)] == d])} for d in domains
        }  # fmt: skip
    return row


def unjudged(rollouts: Sequence[Rollout]) -> list[str]:
    """What the machine said of each completion that it could not judge."""
    return [r.verdict.detail for r in rollouts if r.verdict is not None and r.verdict.status == "infra_error"]


def nothing_to_learn(step: int, dropped: Sequence[Rollout], stale: int) -> UserError | MachineError:
    """Why no group is left: that most completions could not be judged, the tasks, or that all groups (`stale`) were
    too old."""
    failed = unjudged(dropped)
    if failed and 2 * len(failed) >= len(dropped):
        return MachineError(
            f"step {step}: {len(failed)} of {len(dropped)} completions could not be judged, so nothing can be learnt: "
            f"{failed[0]}; `cabochon doctor` looks at sandboxes"
        )
    if not dropped:
        return UserError(
            f"step {step}: all {stale} groups were drawn by weights too old to learn from: raise rollout.max_lag, or "
            "draw faster (engine.ray.workers, engine.slots)"
        )
    kinds, groups = group_kinds(dropped, verified(dropped).value_N), len({r.group for r in dropped})
    right, wrong = kinds.count("solved"), kinds.count("failed")
    cut = [r.completion.finish for r in dropped].count("length")
    if right == groups:
        how, what = "every completion was right", "choose harder tasks"
    elif 2 * cut >= len(dropped):
        how = f"{right} all right and {wrong} all wrong, with {cut} of {len(dropped)} completions cut off"
        what = "raise sampling.max_tokens"
    elif wrong == groups:
        how, what = "every completion was wrong", "choose easier tasks, or more samples (rollout.group_size)"
    else:
        how = f"{right} all right, {wrong} all wrong, {groups - right - wrong} with the same reward throughout"
        what = "choose other tasks, more samples (rollout.group_size), or another algorithm"
    return UserError(f"step {step}: all {groups} groups were alike, so nothing can be learnt ({how}): {what}")


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


def group_row(rollouts: Sequence[Rollout], rewards: Rewards, dropped: Sequence[Rollout] = ()) -> dict[str, float]:
    """How much groups have to teach. Of all that were drawn, shares by what the verifier says: all right, all wrong,
    mixed, or all the same in between. `groups_alike`: of those that are learnt from, the share whose rewards are all
    the same, whoever gave them."""
    drawn = [*rollouts, *dropped]
    kinds, group_N = group_kinds(drawn, verified(drawn).value_N), np.array([r.group for r in rollouts])
    row = {f"groups_{kind}": kinds.count(kind) / max(len(kinds), 1) for kind in get_args(Kind)}
    known = [rewards.reward_N[(group_N == g) & ~np.isnan(rewards.reward_N)] for g in np.unique(group_N)]
    alike = [np.ptp(x) <= 1e-6 for x in known if len(x) >= 2]
    return {"groups": len({r.group for r in drawn}), **row} | ({"groups_alike": float(np.mean(alike))} if alike else {})


def group_kinds(rollouts: Sequence[Rollout], score_N: np.ndarray) -> list[Kind]:
    """Of each group of which something is known."""
    group_N = np.array([r.group for r in rollouts])
    kinds: list[Kind] = []
    for group in np.unique(group_N):
        known = score_N[(group_N == group) & ~np.isnan(score_N)]
        if not len(known):
            continue
        if known.min() >= 1:
            kinds.append("solved")
        elif known.max() <= 0:
            kinds.append("failed")
        else:
            kinds.append("mixed" if np.ptp(known) > 1e-6 else "equal")
    return kinds


def all_solved(rollouts: Sequence[Rollout]) -> bool:
    """Every group, and every completion of it, is right."""
    kinds = group_kinds(rollouts, verified(rollouts).value_N)
    return len(kinds) == len({r.group for r in rollouts}) > 0 and set(kinds) == {"solved"}


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
