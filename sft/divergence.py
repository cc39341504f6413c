"""The distance of a student's distribution from what is kept of a teacher's (algorithms.md section 15).

Legend: B rows, T tokens, K kept tokens, S outcomes: the K, and the tail where it is one of them.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cabochon.batch import Batch
from cabochon.learner import Loss, LossFn
from cabochon.ops import Mean, TokenOutputs, masked_mean
from cabochon.sft.config import DivergenceConfig

Tail = Literal["bucket", "drop", "renormalize"]
NEVER = -1e9
"""log-probability of what cannot be: finite, so that its gradient is 0 and not undefined"""
TEACHER_TAIL = 1e-6
"""least probability of the teacher's tail: stored as f16, its kept tokens may sum to more than 1"""
STUDENT_TAIL = 1e-7


def outcomes(
    logp_K: Float[Array, "*B K"], kept_K: Bool[Array, "*B K"], tail: Tail, least: float
) -> Float[Array, "*B S"]:
    """Log-probabilities of the outcomes that are compared; `least` is the smallest probability of the tail bucket."""
    logp_K = jnp.where(kept_K, logp_K, NEVER)
    match tail:
        case "drop":
            return logp_K
        case "renormalize":
            return logp_K - jax.nn.logsumexp(logp_K, axis=-1, keepdims=True)
        case "bucket":
            inside = jnp.minimum(jax.nn.logsumexp(logp_K, axis=-1, keepdims=True), -least)
            return jnp.concatenate([logp_K, jnp.log(-jnp.expm1(inside))], axis=-1)


def divergence(teacher_S: Float[Array, "*B S"], student_S: Float[Array, "*B S"], beta: float) -> Float[Array, "*B"]:
    """Nats, of log-probabilities: KL(T || S) at `beta` 0, KL(S || T) at 1, between them the generalised Jensen-Shannon
    divergence beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S."""
    if beta == 0:
        return _kl(teacher_S, student_S)
    if beta == 1:
        return _kl(student_S, teacher_S)
    middle_S = jnp.logaddexp(teacher_S + math.log(beta), student_S + math.log1p(-beta))
    return beta * _kl(teacher_S, middle_S) + (1 - beta) * _kl(student_S, middle_S)


def _kl(p_S: Array, q_S: Array) -> Array:
    return (jnp.exp(p_S) * (p_S - q_S)).sum(-1)


def distillation(cfg: DivergenceConfig, *, labels: float | None = None) -> LossFn:
    """The loss of a batch that names candidates with the teacher's log-probs: the mean over trained tokens of the
    divergence, and, by `labels` (None: as configured), of the cross-entropy of the token that stands there.

    Metrics: both parts, and the probability that the teacher and the student give the kept tokens.
    """
    hard = cfg.labels if labels is None else labels

    def loss(outputs: TokenOutputs, batch: Batch) -> Loss:
        assert batch.candidates_BTK is not None
        kept_BTK = batch.candidates_BTK >= 0
        teacher_BTS = outcomes(jnp.asarray(batch.teacher_BTK), kept_BTK, cfg.tail, TEACHER_TAIL)
        student_BTS = outcomes(jnp.asarray(outputs.candidates_BTK), kept_BTK, cfg.tail, STUDENT_TAIL)
        gap = masked_mean(divergence(teacher_BTS, student_BTS, cfg.beta), batch.mask_BT)
        nll = masked_mean(-outputs.logp_BT, batch.mask_BT)
        both = Mean((1 - hard) * gap.total + hard * nll.total, gap.count)
        mass = [
            masked_mean(jnp.where(kept_BTK, jnp.exp(jnp.asarray(logp_BTK)), 0.0).sum(-1), batch.mask_BT)
            for logp_BTK in (batch.teacher_BTK, outputs.candidates_BTK)
        ]
        metrics = {"divergence": gap, "nll": nll, "teacher_mass": mass[0], "student_mass": mass[1]}
        return Loss({"distillation": both}, metrics)

    return loss
