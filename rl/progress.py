"""Where a run is: what its checkpoints hold, and what it begins or goes on with."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax

from cabochon.model import transformer as tf
from cabochon.rl.learning import Learners, States
from cabochon.rl.recipe import RlConfig
from cabochon.run import Run


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a checkpoint holds besides the weights."""

    places: list[int] = field(default_factory=list)
    """in the schedule of each phase"""
    rates: dict[str, float] = field(default_factory=dict)
    """running solve rates of the curriculum"""
    next_group: int = 0
    unfinished: list[str] = field(default_factory=list)
    """ids of tasks that were in flight, or still to be started again: a resume starts them, so that none is lost"""
    kl_coef: float = 0.0
    alarms: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    """held-out accuracy before the first step"""


def begin(run: Run, cfg: RlConfig, learners: Learners, params: tf.Params) -> tuple[States, int, Progress]:
    """States, steps done and progress: of the newest checkpoint, or fresh ones of a copy of these weights."""
    policy, critic = learners.policy, learners.critic
    abstract = States(policy.abstract_state(), critic.abstract_state() if critic else None)
    if saved := run.restore(abstract._asdict()):
        return States(**saved.state), saved.step, Progress(**saved.meta)
    fresh = States(policy.init_state(_copy(params)), critic.init_state(_copy(params)) if critic else None)
    return fresh, 0, Progress(kl_coef=cfg.update.kl.coef)


def _copy(params: tf.Params) -> tf.Params:
    return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), params)
