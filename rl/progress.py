"""Where a run is: what its checkpoints hold, what it begins or goes on with, what it is remembered by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import jax

from cabochon.checkpoint import Checkpointer
from cabochon.errors import UserError
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


def check_steps(cfg: RlConfig) -> None:
    """Raises UserError where more steps are done than the recipe has now: its last step would not be what was made."""
    done = Checkpointer(Path(cfg.run.dir) / "checkpoints").latest()
    if done is not None and done > cfg.steps:
        raise UserError(
            f"{cfg.run.dir}: {done} steps are done there, steps={cfg.steps} has fewer: give steps={done} or more, or "
            "another run.dir"
        )


def begin(run: Run, cfg: RlConfig, learners: Learners, params: tf.Params) -> tuple[States, int, Progress]:
    """States, steps done and progress: of the newest checkpoint, or fresh ones of a copy of these weights."""
    policy, critic = learners.policy, learners.critic
    abstract = States(policy.abstract_state(), critic.abstract_state() if critic else None)
    if saved := run.restore(abstract._asdict()):
        return States(**saved.state), saved.step, Progress(**saved.meta)
    fresh = States(policy.init_state(_copy(params)), critic.init_state(_copy(params)) if critic else None)
    return fresh, 0, Progress(kl_coef=cfg.update.kl.coef)


def results(run: Run, before: dict[str, float]) -> dict[str, float]:
    """What the run is remembered by: the last reward, held-out accuracy before and after."""
    rows = run.rows()
    last = rows[-1] if rows else {}
    out = {"reward": last.get("reward"), "held_out": last.get("held_out"), "held_out_before": before.get("all")}
    return {name: value for name, value in out.items() if value is not None}


def told(accuracy: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in accuracy.items())


def _copy(params: tf.Params) -> tf.Params:
    return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), params)
