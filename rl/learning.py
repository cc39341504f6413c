"""From scored rollouts to new weights: what has to be known before the step, the advantages, the updates.

Legend: B rows, T tokens, N completions, t tokens of one. The models are held by whoever calls; nothing here has state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cabochon import parallel
from cabochon.batch import Batch
from cabochon.learner import Learner, StepReport, TrainState, check
from cabochon.model import moe, value
from cabochon.model import transformer as tf
from cabochon.model.lora import add_lora, merge_lora
from cabochon.protocols import Weights
from cabochon.rl.advantages import Advantages
from cabochon.rl.batching import Minibatch, layout, minibatches, samples, to_batch
from cabochon.rl.config import UpdateConfig
from cabochon.rl.update import Update
from cabochon.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Learners:
    """The compiled steps: the policy's, and the critic's where it has a trunk of its own."""

    policy: Learner
    critic: Learner | None = None


class States(NamedTuple):
    """What the updates change."""

    policy: TrainState
    critic: TrainState | None


class Known(NamedTuple):
    """Measured before the first update, each per completion: None where the update does not need it."""

    reference: list[np.ndarray] | None
    """[t] log-probs of the reference policy"""
    policy: list[np.ndarray] | None
    """[t] log-probs of the policy"""
    values: list[np.ndarray] | None
    """[t + 1] values of the state before each token, and after the last"""


def measure(
    learners: Learners, states: States, reference: tf.Params | None, rollouts: Sequence[Rollout], cfg: UpdateConfig,
    update: Update,
) -> Known:  # fmt: skip
    """What advantages and KL need of each completion, by forward passes over whole batches.

    One without a token (an episode that failed before its first turn) has nothing to measure, and its value is 0.
    """
    learner = learners.policy
    in_reward = cfg.kl.coef > 0 and cfg.kl.placement == "reward"
    wanted = {"reference": reference is not None, "policy": in_reward or update.critic == "shared"}
    found = {name: [np.zeros(0, np.float32) for _ in rollouts] for name, there in wanted.items() if there}
    if update.critic != "none":
        found["values"] = [np.zeros(1, np.float32) for _ in rollouts]
    drawn = [i for i, r in enumerate(rollouts) if len(r.completion.tokens)] if found else []

    def put(name: str, part: np.ndarray, measured: Sequence[np.ndarray]) -> None:
        for i, x in zip(part, measured, strict=True):
            found[name][i] = x

    for part in np.array_split(np.array(drawn, int), cfg.minibatches):
        if not len(part):
            continue
        some = [rollouts[i] for i in part]
        at = layout(some, learner.cfg.step)
        # the reference is another router: it is left its own choice of experts (section 7)
        natural = parallel.place(to_batch(some, at), learner.mesh)
        batch = parallel.place(to_batch(some, at, routes=True), learner.mesh) if update.replays_sampler else natural
        if reference is not None:
            put("reference", part, at.from_rows(_logp(learner, reference, natural)))
        if in_reward or update.critic == "shared":
            forward = learner.score(states.policy.params, batch).tokens
            put("policy", part, at.from_rows(np.asarray(forward.logp_BT)))
            if update.critic == "shared":
                put("values", part, at.states(np.asarray(forward.value_BT)))
        if learners.critic is not None and states.critic is not None:
            values_BT = learners.critic.score(states.critic.params, natural).tokens.value_BT
            put("values", part, at.states(np.asarray(values_BT)))
    return Known(found.get("reference"), found.get("policy"), found.get("values"))


def kl_penalties(known: Known, rollouts: Sequence[Rollout], coef: float) -> tuple[list[np.ndarray], float]:
    """(per completion [t] -coef x k1, mean k1 per sampled token): a KL in the reward."""
    assert known.policy is not None
    assert known.reference is not None
    masks = [r.completion.mask for r in rollouts]
    k1 = [(p - q) * m for p, q, m in zip(known.policy, known.reference, masks, strict=True)]
    tokens = sum(int(m.sum()) for m in masks)
    return [-coef * k for k in k1], float(sum(k.sum() for k in k1)) / max(tokens, 1)


def kl_of(
    cfg: UpdateConfig, known: Known, rollouts: Sequence[Rollout], coef: float
) -> tuple[list[np.ndarray] | None, float | None]:
    """The penalties of a KL in the reward and its mean; (None, None) where it is not there."""
    if not (cfg.kl.coef and cfg.kl.placement == "reward"):
        return None, None
    return kl_penalties(known, rollouts, coef)


def advantages_of(
    rollouts: Sequence[Rollout], reward_N: np.ndarray, known: Known, update: Update,
    penalties: Sequence[np.ndarray] | None,
) -> Advantages:  # fmt: skip
    """The algorithm's advantages of scored rollouts."""
    return update.advantages(samples(rollouts, reward_N, penalties=penalties, values=known.values))


class Learnt(NamedTuple):
    """After the updates on one batch of rollouts."""

    states: States
    row: dict[str, Any]
    """means over the updates, for metrics.jsonl"""
    router: moe.RouterStats | None
    """of the last update"""
    tokens: dict[str, list[np.ndarray]]
    """by name, per completion [t]: what the loss saw in the last update with it, nan at tokens that were in none"""


def learn(
    learners: Learners, states: States, rollouts: Sequence[Rollout], advantages: Advantages, known: Known,
    cfg: UpdateConfig, update: Update, rng: np.random.Generator, *, critic_only: bool = False,
) -> Learnt:  # fmt: skip
    """All epochs and minibatches. Raises NonFiniteError, with the states as before that update.

    What two updates need of the first moment (proximal log-probs, routes to replay) is measured before any of them.
    """
    made: list[Minibatch] = []
    for _ in range(cfg.epochs):
        made += minibatches(
            rollouts, advantages, update, learners.policy.cfg.step, cfg.minibatches, rng,
            reference=known.reference, values=known.values,
        )  # fmt: skip
    batches = [_with_proximal(learners.policy, states.policy, m.batch, update) for m in made]
    reports: list[Mapping[str, Any]] = []
    tokens: dict[str, list[np.ndarray]] = {}
    router = None
    for mini, batch in zip(made, batches, strict=True):
        placed = parallel.place(batch, learners.policy.mesh)
        row: dict[str, float] = {"trained_tokens": mini.trained_tokens, "trained_completions": len(mini.members)}
        if update.budget is not None:
            row["budget_fill"] = mini.fill
        policy, critic = states
        if not critic_only:
            policy, report = learners.policy.step(policy, placed)
            row |= _row(report, policy)
            router = report.router
            _keep(tokens, report, mini, rollouts)
        if learners.critic is not None and critic is not None:
            natural = replace(placed, routes_BTLC=None)
            critic, report = learners.critic.step(critic, natural)
            row |= {f"critic_{k}": v for k, v in _row(report, critic).items()}
        states = States(policy, critic)
        if "w_squared" in row:
            row["effective_samples"] = row["w"] ** 2 / max(row["w_squared"], 1e-12)
        reports.append(row)
    names = list(dict.fromkeys(k for r in reports for k in r))
    row = {k: float(np.mean([r[k] for r in reports if k in r])) for k in names}
    for total in ("trained_tokens", "trained_completions"):
        row[total] = int(sum(r[total] for r in reports))
    return Learnt(states, {**row, "updates": len(reports)}, jax.device_get(router), tokens)


def _keep(
    tokens: dict[str, list[np.ndarray]], report: StepReport, mini: Minibatch, rollouts: Sequence[Rollout]
) -> None:
    """Write what an update saw into `Learnt.tokens`."""
    for name, x_BT in jax.device_get(report.tokens).items():
        kept = tokens.setdefault(name, [np.full(len(r.completion.tokens), np.nan, np.float32) for r in rollouts])
        trained = mini.at.from_rows(np.asarray(mini.batch.mask_BT) > 0)
        for i, x, there in zip(mini.members, mini.at.from_rows(x_BT), trained, strict=True):
            kept[i][: len(x)][there > 0] = x[there > 0]


@jax.jit
def fingerprint(params: tf.Params) -> jax.Array:
    """[tensors] f32 sum of each: two sets of weights whose sums all agree are the same for all we care. Give them as an
    engine has them, since a change may be too small for its number format."""
    return jnp.stack([x.astype(jnp.float32).sum() for x in jax.tree.leaves(params)])


def _with_proximal(learner: Learner, state: TrainState, batch: Batch, update: Update) -> Batch:
    if not (update.needs_proximal or update.needs_routes):
        return batch
    forward = learner.score(state.params, parallel.place(batch, learner.mesh))
    if update.needs_proximal:
        batch = replace(batch, logp_proximal_BT=np.asarray(forward.tokens.logp_BT))
    if update.needs_routes:
        batch = replace(batch, routes_BTLC=np.asarray(forward.routes_BTLC))
    return batch


def _row(report: StepReport, state: TrainState) -> dict[str, float]:
    report = jax.device_get(report)
    check(report, int(state.step))
    named = {f"loss_{k}": m for k, m in report.loss.items()} | report.metrics
    row = {k: float(m.value) for k, m in named.items()}
    return {**row, "grad_norm": float(report.grad_norm), "learning_rate": float(report.learning_rate)}


def _logp(learner: Learner, params: tf.Params, batch: Batch) -> np.ndarray:
    return np.asarray(learner.score(params, batch).tokens.logp_BT)


# -- the policy as others take it --------------------------------------------------------------------------------------


def reference_of(learner: Learner, params: tf.Params) -> tf.Params:
    """The policy before it learnt, as a tree of the learner's own shape: additions and head are there and are zero."""
    cfg = learner.cfg
    params = params if cfg.lora_matrices is None else add_lora(cfg.model, params, cfg.lora_matrices)
    return value.with_head(cfg.model, params) if cfg.value else params


def merged(learner: Learner, states: States) -> tf.Params:
    """The policy alone: no critic's head, low-rank additions merged in."""
    return merge_lora(value.without_head(states.policy.params), learner.cfg.lora_matrices)


def weights_of(learner: Learner, states: States, version: int) -> Weights:
    """For the engine; copied to the host, since the next update takes the learner's arrays over."""
    return Weights(version=version, params=jax.tree.map(lambda x: np.array(x), merged(learner, states)))


def published_by(learner: Learner, states: States) -> np.ndarray:
    """[tensors] `fingerprint` of the weights as the engine takes them, in its number format."""
    return np.asarray(fingerprint(tf.cast(merged(learner, states), learner.cfg.precision.compute)))
