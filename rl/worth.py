"""What completions earn, and which groups are worth learning from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cabochon.rl.advantages import informative
from cabochon.rl.config import Overlong
from cabochon.rl.recipe import RlConfig
from cabochon.rl.rewards import Component, Rewards, compose, earned, verified
from cabochon.types import Rollout


def rewarded(
    cfg: RlConfig, rollouts: Sequence[Rollout], models: Mapping[str, Component], *, format_: Component | None = None,
    overlong: Overlong | None = None,
) -> Rewards:  # fmt: skip
    """The recipe's rewards. `models`: what reward models said; one that is missing was not asked."""
    silent = Component(value_N=np.full(len(rollouts), np.nan), asked_N=np.zeros(len(rollouts), bool))
    given = {"environment": earned(rollouts)} if cfg.environment else {}
    given |= {name: models.get(name, silent) for name in cfg.models}
    return compose(rollouts, verified(rollouts), given, cfg.reward, format_=format_, overlong=overlong)


def worth_learning(cfg: RlConfig, rollouts: Sequence[Rollout]) -> bool:
    """Dynamic sampling: whether the rewards of a group, before any shaping, can differ. Reward models score only what
    was kept, so a group is kept where one of them will have a say; but not where it would only order answers that are
    all right, as under `gated`: such groups soon fill the batch, and most answers in them say the same."""
    bare = cfg.reward.model_copy(update={"length": None, "format_penalty": 0.0})
    reward_N = rewarded(cfg.model_copy(update={"reward": bare}), rollouts, {}).reward_N
    differ = informative(reward_N.tolist())
    if differ or not cfg.models:
        return differ
    verified_N, paid_N = verified(rollouts).asked_N, earned(rollouts).asked_N
    unasked_N = ~(verified_N | paid_N)
    match cfg.reward.combine:
        case "route" | "gated":
            said_N = unasked_N
        case "weighted" | "normalized":
            said_N = unasked_N | ~np.isnan(reward_N)
    return int(said_N.sum()) >= 2
