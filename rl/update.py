"""From a config to functions: the one place that knows the algorithms by name.

The rest of the stage sees an `Update`: what to compute before the step, the loss of the step, how tokens are weighed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, assert_never

from cabochon.errors import UserError
from cabochon.learner import LossFn
from cabochon.rl import losses
from cabochon.rl.advantages import (
    Advantages,
    Samples,
    critic_advantages,
    group_advantage,
    leave_one_out,
    per_token,
    token_returns,
)
from cabochon.rl.config import (
    Aggregation,
    C3po,
    Cispo,
    Dapo,
    DrGrpo,
    GroupBaseline,
    Grpo,
    Gspo,
    Overlong,
    Ppo,
    ReinforcePP,
    Rloo,
    UpdateConfig,
)


@dataclass(frozen=True, kw_only=True)
class Update:
    """An algorithm, taken apart."""

    advantages: Callable[[Samples], Advantages]
    loss: LossFn
    """the policy's; with a shared critic its value loss too"""
    aggregation: Aggregation = "token_mean"
    constant: int = 0
    """what `aggregation` needs besides counts: longest completion, or trained tokens per update"""
    critic: Literal["none", "own", "shared"] = "none"
    critic_loss: LossFn | None = None
    """of a critic with a trunk of its own"""
    warmup_updates: int = 0
    """updates of the critic alone, first"""
    critic_rate: float | None = None
    """learning rate of a critic with a trunk of its own; None: the policy's"""
    overlong: Overlong | None = None
    """added to the reward"""
    dynamic_sampling: bool = False
    """groups that are not `informative` are sampled anew"""
    needs_reference: bool = False
    needs_proximal: bool = False
    """score each batch by the learner before the first update; otherwise the current log-probs stand in exactly"""
    needs_routes: bool = False
    """install the routes of that scoring as the ones to replay (R2)"""
    replays_sampler: bool = False
    """install the sampler's routes (R3); sample with `routes=True`"""

    @property
    def budget(self) -> int | None:
        """Trained tokens per update, where they are limited."""
        return self.constant if self.aggregation == "fixed_budget" else None


def plan_update(cfg: UpdateConfig, *, sparse: bool) -> Update:
    """The functions for `cfg`; `sparse`: the policy has routers. Raises UserError where keys contradict each other."""
    algorithm = cfg.algorithm
    updates = cfg.minibatches * cfg.epochs
    replay = cfg.router.replay if sparse else "none"

    def policy(surrogate: losses.Surrogate) -> LossFn:
        return losses.policy_loss(surrogate, cfg.mismatch, cfg.kl, cfg.entropy_coef)

    def update(advantages: Callable[[Samples], Advantages], loss: LossFn, **parts: object) -> Update:
        return Update(
            advantages=advantages,
            loss=loss,
            needs_reference=cfg.kl.coef > 0,
            needs_proximal=updates > 1 and cfg.mismatch.proximal == "learner",
            needs_routes=updates > 1 and replay == "r2",  # of a single update they would be its own
            replays_sampler=replay == "r3",
            **parts,  # type: ignore[arg-type]
        )

    match algorithm:
        case Grpo():
            surrogate = losses.token_clipped(algorithm.clip)
            return update(_grouped(algorithm.baseline), policy(surrogate), aggregation=algorithm.aggregation)
        case DrGrpo():
            surrogate = losses.token_clipped(algorithm.clip)
            plain = _grouped(GroupBaseline(scale="none", zero_variance="keep"))
            return update(plain, policy(surrogate), aggregation="constant_length", constant=algorithm.max_tokens)
        case Rloo(clip=None):
            if updates > 1:
                raise UserError(
                    f"algorithm.clip=null is plain REINFORCE, which takes one update per rollout batch, not "
                    f"minibatches x epochs = {updates}; set algorithm.clip, or both to 1"
                )
            return update(_others, policy(losses.reinforce()), aggregation="seq_mean_token_sum")
        case Rloo(clip=clip):
            assert clip is not None
            return update(_others, policy(losses.product_clipped(clip)), aggregation="seq_mean_token_mean")
        case ReinforcePP():
            return update(
                lambda samples: token_returns(samples, group_baseline=algorithm.group_baseline),
                policy(losses.token_clipped(algorithm.clip)),
                aggregation=algorithm.aggregation,
            )
        case Dapo():
            return update(
                _grouped(algorithm.baseline),
                policy(losses.token_clipped(algorithm.clip)),
                overlong=algorithm.overlong,
                dynamic_sampling=algorithm.dynamic_sampling,
            )
        case Gspo():
            surrogate = losses.geometric_clipped(algorithm.clip)
            return update(_grouped(algorithm.baseline), policy(surrogate), aggregation="seq_mean_token_mean")
        case Cispo():
            surrogate = losses.capped(algorithm.ratio_cap)
            return update(_grouped(algorithm.baseline), policy(surrogate), aggregation=algorithm.aggregation)
        case C3po():
            surrogate = losses.token_clipped(algorithm.clip)
            return update(
                _grouped(algorithm.baseline),
                policy(surrogate),
                aggregation="fixed_budget",
                constant=algorithm.budget,
            )
        case Ppo():
            loss, shared = policy(losses.token_clipped(algorithm.clip)), algorithm.critic == "shared"
            value = losses.value_loss(algorithm.value_clip, algorithm.value_coef if shared else 1.0)
            return update(
                lambda samples: critic_advantages(samples, algorithm),
                losses.both(loss, value) if shared else loss,
                aggregation=algorithm.aggregation,
                critic=algorithm.critic,
                critic_loss=None if shared else value,
                warmup_updates=algorithm.warmup_updates,
                critic_rate=algorithm.critic_learning_rate,
            )
    assert_never(algorithm)


def _grouped(baseline: GroupBaseline) -> Callable[[Samples], Advantages]:
    def advantages(samples: Samples) -> Advantages:
        advantage_N, keep_N = group_advantage(
            samples.whole_reward_N(), samples.group_N, samples.domains, baseline
        )
        return Advantages(tokens=per_token(advantage_N, samples), keep_N=keep_N)

    return advantages


def _others(samples: Samples) -> Advantages:
    advantage_N, keep_N = leave_one_out(samples.whole_reward_N(), samples.group_N)
    return Advantages(tokens=per_token(advantage_N, samples), keep_N=keep_N)
