"""One reward per completion out of what verifiers and models said (algorithms.md sections 5, 8 and 16).

Legend: N completions. Every component stays visible beside the reward it went into. A component that was asked for and
gave no value (the machine failed, a judge wrote nothing readable) leaves the completion without a reward, NaN, and so
out of its group: never 0, which would teach the policy to make judges fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import numpy as np
from pydantic import Field, model_validator

from cabochon.config import Frozen
from cabochon.errors import UserError
from cabochon.rl.advantages import overlong_penalty
from cabochon.rl.config import Overlong
from cabochon.types import Rollout, Score, Task

SHAPING = ("verifier", "quality", "length", "format", "overlong")
"""parts of a reward that are not a model's score"""


class LengthReward(Frozen):
    """LCPO (2503.04697): a number of tokens that the prompt asks for, in the task's payload under `tokens`."""

    kind: Literal["exact", "max"] = "max"
    """`exact`: minus slope x |asked - sampled|. `max`: times slope x (asked - sampled) + offset, within [0, 1]"""
    slope: float = Field(3e-4, gt=0)
    """per token. With `exact`, keep slope x the largest miss below 1, or a wrong answer of the asked length wins"""
    offset: float = Field(0.5, ge=0, le=1)
    """`max` only: what an answer of exactly the asked length is worth"""


class RewardConfig(Frozen):
    """How components become a reward. What a task has no such component for is passed over."""

    combine: Literal["route", "gated", "weighted", "normalized"] = "route"
    """`route`: the verifier where the task has one, else the environment, else the first model. `gated`: the same, but
    the environment, or else the first model, re-orders right answers: v (1 + quality (q - 1/2)). `weighted`: the
    weighted sum. `normalized`: the weighted sum of components normalised within their group (GDPO: choose scale=batch
    for the advantage)"""
    quality: float = Field(0.1, ge=0, lt=2)
    """`gated` only; below 2 no answer that the verifier scores 0 can beat one it scores more. q is in [0, 1]: of a
    scalar model the sigmoid of its score, as Bradley-Terry has it; an environment that pays anything else is refused"""
    weights: Mapping[str, float] = Field(default_factory=dict)
    """component (verifier, environment, or a model's name) -> its weight in `weighted` and `normalized`; 1 where not
    named"""
    format_penalty: float = Field(0.0, ge=0, lt=1)
    """taken off where thinking tags are not in order: of completions that had a thinking budget (sampling.thinking) or
    whose prompt names `<think>`; others lose nothing"""
    length: LengthReward | None = None
    clip: tuple[float, float] = (-1.0, 1.2)
    """the reward's range; of `normalized` none"""

    @model_validator(mode="after")
    def _check(self) -> RewardConfig:
        if not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip={list(self.clip)}: expected [low, high] with low < high")
        if self.weights and self.combine in ("route", "gated"):
            raise ValueError(f"weights are not used by combine={self.combine}: set it to weighted or normalized")
        if self.quality != type(self).model_fields["quality"].default and self.combine != "gated":
            raise ValueError(f"quality={self.quality} is not used by combine={self.combine}: set it to gated")
        return self

    def check_components(self, names: Sequence[str]) -> None:
        """Raises UserError for a weight of a component that is not among `names`."""
        if unknown := sorted(set(self.weights) - set(names)):
            raise UserError(f"reward.weights.{unknown[0]}: no such component; expected some of {', '.join(names)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Component:
    """What one source said of N completions."""

    value_N: np.ndarray
    """f64, NaN where it said nothing"""
    asked_N: np.ndarray
    """bool: where it was asked and meant to answer. A missing answer there costs the completion its reward, where the
    reward depends on it"""
    logit: bool = False
    """log-odds, as scalar models give, instead of a number in [0, 1]"""

    @property
    def failed_N(self) -> np.ndarray:
        return self.asked_N & np.isnan(self.value_N)

    @property
    def said_N(self) -> np.ndarray:
        """f64, NaN where it was not asked as well"""
        return np.where(self.asked_N, self.value_N, np.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rewards:
    """The reward, and by name what it was made of (NaN where a completion has no such part)."""

    reward_N: np.ndarray
    parts: dict[str, np.ndarray]
    clipped_N: np.ndarray
    """bool: where `clip` changed it"""
    lost: dict[str, int]
    """by source that failed: completions which have no reward for that"""


def verified(rollouts: Sequence[Rollout]) -> Component:
    """The verdicts. A verdict without a score is the machine's failure, or a reward function that abstains."""
    verdicts = [r.verdict for r in rollouts]
    value = [np.nan if v is None or v.score is None else v.score for v in verdicts]
    asked = [v is not None and (v.score is not None or v.status == "infra_error") for v in verdicts]
    return Component(value_N=np.array(value, float), asked_N=np.array(asked, bool))


def earned(rollouts: Sequence[Rollout]) -> Component:
    """What environments gave for whole episodes; an episode that earned nothing has no such part."""
    value = np.array([np.nan if r.completion.reward is None else r.completion.reward for r in rollouts], float)
    return Component(value_N=value, asked_N=~np.isnan(value))


def scored(scores: Sequence[Score | None], *, logit: bool = False) -> Component:
    """A model's scores; None for a completion that it was not asked about."""
    value = [np.nan if s is None or s.value is None else s.value for s in scores]
    asked = [s is not None for s in scores]
    return Component(value_N=np.array(value, float), asked_N=np.array(asked, bool), logit=logit)


def compose(
    rollouts: Sequence[Rollout],
    verifier: Component,
    models: Mapping[str, Component],
    cfg: RewardConfig,
    *,
    format_: Component | None = None,
    overlong: Overlong | None = None,
) -> Rewards:
    """Rewards of the rollouts. `models`: judges and scalar models by name, in order of preference.

    `parts` holds every component, `quality` (what the combination gave), and each shaping term. Metrics such as the
    solve rate look at the verifier's part, dynamic sampling (`worth.py`) at rewards before shaping. Raises UserError
    for a weight of a component that is not there, a quality outside [0, 1], or a length reward without its number.
    """
    sources = {"verifier": verifier, **models}
    cfg.check_components([*sources])
    parts = {name: c.said_N for name, c in sources.items()}
    group_N = np.array([r.group for r in rollouts])
    reward_N = _combined(sources, group_N, cfg)
    parts["quality"] = reward_N.copy()
    tokens_N = np.array([r.completion.mask.sum() for r in rollouts])
    if cfg.length is not None:
        asked_N = np.array([asked_tokens(r.task) for r in rollouts])
        shaped = length_reward(reward_N, tokens_N, asked_N, cfg.length)
        parts["length"], reward_N = shaped - reward_N, shaped
    if cfg.format_penalty and format_ is not None:
        off = np.where(format_.asked_N, -cfg.format_penalty * (1 - format_.value_N), 0.0)
        parts["format"], reward_N = off, reward_N + off
    if overlong is not None:
        parts["overlong"] = overlong_penalty(tokens_N, overlong)
        reward_N = reward_N + parts["overlong"]
    kept_N = reward_N if cfg.combine == "normalized" else np.clip(reward_N, *cfg.clip)
    clipped_N = np.abs(kept_N - reward_N) > 1e-6  # not where there is no reward
    return Rewards(reward_N=kept_N, parts=parts, clipped_N=clipped_N, lost=_lost(sources, reward_N, cfg))


def _combined(sources: Mapping[str, Component], group_N: np.ndarray, cfg: RewardConfig) -> np.ndarray:
    """NaN where what it depends on failed, or nobody said anything; what cannot change it may fail."""
    match cfg.combine:
        case "route":
            return _first(sources)
        case "gated":
            reward_N = _first(sources)
            judges = {name: c for name, c in sources.items() if name != "verifier"}
            judged_N = np.any([c.asked_N for c in judges.values()], axis=0) if judges else False
            gated_N = sources["verifier"].asked_N & (reward_N > 0) & judged_N & (cfg.quality > 0)
            quality_N = _first({name: _in_unit(name, c, gated_N) for name, c in judges.items()})
            return np.where(gated_N, reward_N * (1 + cfg.quality * (quality_N - 0.5)), reward_N)
        case "weighted" | "normalized":
            reward_N = np.zeros(len(group_N))
            for name, c in sources.items():
                if weight := cfg.weights.get(name, 1.0):
                    part_N = c.value_N if cfg.combine == "weighted" else normalized(c.said_N, group_N)
                    reward_N += weight * np.where(c.failed_N, np.nan, np.where(c.asked_N, part_N, 0.0))
            return np.where(np.all([np.isnan(c.said_N) for c in sources.values()], axis=0), np.nan, reward_N)
        case _:
            assert_never(cfg.combine)


def _first(sources: Mapping[str, Component]) -> np.ndarray:
    """[N] what the first that was asked said. Where it failed, NaN: a group is not judged on two scales."""
    some = list(sources.values())
    return np.select([c.asked_N for c in some], [c.value_N for c in some], np.nan) if some else np.array(np.nan)


def _in_unit(name: str, c: Component, gated_N: np.ndarray) -> Component:
    """A quality in [0, 1], in which what `gated` promises holds."""
    if c.logit:
        return replace(c, value_N=0.5 * (1 + np.tanh(c.value_N / 2)))  # the sigmoid
    used = c.value_N[gated_N & c.asked_N]
    if (bad := used[(used < 0) | (used > 1)]).size:
        raise UserError(
            f"reward.combine=gated takes qualities in [0, 1], and {name} gave {bad[0]:g}: scale it, or set "
            "reward.combine to weighted or normalized"
        )
    return c


def _lost(sources: Mapping[str, Component], reward_N: np.ndarray, cfg: RewardConfig) -> dict[str, int]:
    """A completion that several sources failed on is the first one's, of those with a weight if it can be."""
    open_N, lost = np.isnan(reward_N), {}
    for name in sorted(sources, key=lambda name: cfg.weights.get(name, 1.0) == 0):
        if count := int((open_N & sources[name].failed_N).sum()):
            lost[name] = count
        open_N = open_N & ~sources[name].failed_N
    return lost


def normalized(x_N: np.ndarray, group_N: np.ndarray, tolerance: float = 1e-6) -> np.ndarray:
    """[N] (x - mean of its group) / its deviation (ddof 1); 0 in a group that is flat, and where x is NaN.

    A nearly constant judge would otherwise have its noise scaled to full weight.
    """
    out = np.zeros(len(x_N))
    for group in np.unique(group_N):
        members = np.flatnonzero((group_N == group) & ~np.isnan(x_N))
        x = x_N[members]
        if len(x) >= 2 and np.ptp(x) > tolerance:
            out[members] = (x - x.mean()) / x.std(ddof=1)
    return out


def length_reward(reward_N: np.ndarray, tokens_N: np.ndarray, asked_N: np.ndarray, cfg: LengthReward) -> np.ndarray:
    """[N] the reward shaped by how the sampled tokens (thinking and answer) compare with those asked for."""
    if cfg.kind == "exact":
        return reward_N - cfg.slope * np.abs(asked_N - tokens_N)
    share_N = np.clip(cfg.slope * (asked_N - tokens_N) + cfg.offset, 0.0, 1.0)
    return np.where(reward_N < 0, reward_N, reward_N * share_N)  # length never makes a bad answer less bad


def asked_tokens(task: Task) -> float:
    """That `LengthReward` compares with. Raises UserError naming the task."""
    if "tokens" not in task.payload:
        raise UserError(f"task {task.id}: reward.length needs payload.tokens, the length its prompt asks for")
    given = task.payload["tokens"]
    try:
        tokens = float(given)
    except (TypeError, ValueError):
        tokens = np.nan
    if not 0 <= tokens < np.inf:
        raise UserError(f"task {task.id}: payload.tokens={given!r}; reward.length needs a number of tokens")
    return tokens
