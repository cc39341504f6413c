"""Policy-gradient surrogates, KL terms, importance weights and the value loss (algorithms.md sections 6 to 8 and 11).

Legend: B rows, T tokens. Functions of arrays, f32; nothing here sees a model. Three policies: behaviour (the
sampler's), proximal (the learner's before the first update on these tokens), current. ratio = current / proximal
carries the gradient, w = proximal / behaviour is a constant. `mask_BT` holds each token's weight in the sum and
`divisor_B` what the sum is divided by (`cabochon/rl/aggregation.py`): every term's count depends on the batch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Int

from cabochon.batch import Batch
from cabochon.learner import Loss, LossFn
from cabochon.ops import Leaf, Mean, TokenOutputs, before, segment_sum
from cabochon.rl.config import Clip, KlConfig, MismatchConfig

MAX_LOG_RATIO = 20.0
"""beyond it a log-ratio is cut, and with it its gradient"""
MAX_K3 = 10.0
LARGE_LOG_W = 2.0
"""|log w| above which a token counts as one that sampler and learner disagree on (section 22)"""

Tokens = Float[Array, "B T"]
Surrogate = Callable[[Tokens, Tokens, Tokens, Bool[Array, "B T"], Int[Array, "B T"]], tuple[Tokens, Bool[Array, "B T"]]]
"""(logp, log ratio, advantage, trained, segment) -> (loss per token, whether clipping took its gradient)"""


def _given(x: Leaf | None, name: str) -> Array:
    if x is None:
        raise ValueError(f"this loss reads {name}, which is None")
    return jnp.asarray(x)


def log_ratio(a: Tokens, b: Tokens, trained: Bool[Array, "B T"]) -> Tokens:
    """a - b within +-20, and 0 (with a zero gradient) where a token is not trained or the difference is undefined."""
    d = jnp.where(trained, a, 0.0) - jnp.where(trained, b, 0.0)
    return jnp.clip(jnp.where(jnp.isnan(d), 0.0, d), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def segment_mean(x: Tokens, trained: Bool[Array, "B T"], segment_BT: Int[Array, "B T"]) -> Tokens:
    """At each token the mean of x over the trained tokens of its segment."""
    n = segment_sum(trained.astype(jnp.float32), segment_BT)
    return segment_sum(jnp.where(trained, x, 0.0), segment_BT) / jnp.maximum(n, 1.0)


# -- surrogates --------------------------------------------------------------------------------------------------------


def clipped_surrogate(log_ratio: Tokens, advantage: Tokens, clip: Clip) -> tuple[Tokens, Bool[Array, "B T"]]:
    """PPO's pessimistic bound with asymmetric clip and, where asked for, dual clip (1912.09729).

    On the tie at ratio 1 `maximum` halves the gradient between two branches of equal slope: the whole is right.
    """
    ratio = jnp.exp(log_ratio)
    inside = jnp.clip(ratio, 1 - clip.low, 1 + clip.high)
    plain, bound = -advantage * ratio, -advantage * inside
    loss, clipped = jnp.maximum(plain, bound), bound > plain
    if clip.dual:
        cut = (advantage < 0) & (loss > -clip.dual * advantage)
        loss, clipped = jnp.where(cut, -clip.dual * advantage, loss), clipped | cut
    return loss, clipped


def token_clipped(clip: Clip) -> Surrogate:
    """One ratio per token: PPO, GRPO and most others."""
    return lambda logp, ratio, advantage, trained, segment: clipped_surrogate(ratio, advantage, clip)


def geometric_clipped(clip: Clip) -> Surrogate:
    """One ratio per response, the geometric mean of its tokens' (GSPO)."""
    return lambda logp, ratio, advantage, trained, segment: clipped_surrogate(
        segment_mean(ratio, trained, segment), advantage, clip
    )


def product_clipped(clip: Clip) -> Surrogate:
    """One ratio per response, that of its whole probability (RLOO with several updates)."""

    def loss(logp: Tokens, ratio: Tokens, advantage: Tokens, trained: Array, segment: Array) -> tuple[Tokens, Array]:
        product = jnp.clip(segment_sum(ratio, segment), -MAX_LOG_RATIO, MAX_LOG_RATIO)
        return clipped_surrogate(product, advantage, clip)

    return loss


def capped(cap: float) -> Surrogate:
    """CISPO: -min(ratio, cap) A logp with the weight held constant, so every token keeps a gradient."""

    def loss(logp: Tokens, ratio: Tokens, advantage: Tokens, trained: Array, segment: Array) -> tuple[Tokens, Array]:
        ratio = stop_gradient(jnp.exp(ratio))
        return -jnp.minimum(ratio, cap) * advantage * logp, ratio > cap

    return loss


def reinforce() -> Surrogate:
    """-A logp: on-policy only."""
    return lambda logp, ratio, advantage, trained, segment: (-advantage * logp, jnp.zeros_like(trained))


# -- KL ----------------------------------------------------------------------------------------------------------------


def kl_estimate(kind: Literal["k1", "k2", "k3"], d: Tokens) -> Tokens:
    """Per-token estimate of KL(current, reference) from d = logp - logp_reference, within +-20; k3 up to 10."""
    match kind:
        case "k1":
            return d
        case "k2":
            return d * d / 2
        case "k3":
            return jnp.minimum(jnp.expm1(-d) + d, MAX_K3)


def kl_loss(kind: Literal["k1", "k2", "k3"], d: Tokens, log_ratio: Tokens) -> Tokens:
    """A per-token loss whose expected gradient is that of KL(current, reference) (section 7, 2506.09477).

    k2 is that as it stands, k1 where the ratio has its gradient too. k3 times the ratio would have the gradient of k2
    times the ratio, but not beyond `MAX_K3`, where it points away from the reference: here it is so everywhere.
    """
    value, ratio = kl_estimate(kind, d), jnp.exp(log_ratio)
    match kind:
        case "k1":
            return value * ratio
        case "k2":
            return value
        case "k3":
            k2 = kl_estimate("k2", d)
            return stop_gradient(ratio) * (k2 + stop_gradient(value - k2))


def adapted_coef(coef: float, kl: float, cfg: KlConfig, samples: int) -> float:
    """Ziegler's controller: the next coefficient after `samples` responses of mean KL `kl` per sampled token."""
    if cfg.target is None:
        return coef
    error = min(max(kl / cfg.target - 1, -0.2), 0.2)
    return coef * (1 + error * samples / cfg.horizon)


# -- importance weights ------------------------------------------------------------------------------------------------


def importance_weights(
    log_w: Tokens, trained: Bool[Array, "B T"], segment_BT: Int[Array, "B T"], cfg: MismatchConfig
) -> tuple[Tokens, Bool[Array, "B T"]]:
    """(truncated weights, trained tokens that are not refused), both constants: the loss takes their product."""
    log_w = stop_gradient(log_w)
    w = jnp.exp(log_w)
    match cfg.weight:
        case "none":
            weight = jnp.ones_like(w)
        case "token":
            weight = jnp.minimum(w, cfg.cap)
        case "sequence":
            product = jnp.clip(segment_sum(jnp.where(trained, log_w, 0.0), segment_BT), -MAX_LOG_RATIO, MAX_LOG_RATIO)
            weight = jnp.minimum(jnp.exp(product), cfg.cap)
    kept = trained
    if cfg.token_band is not None:
        kept &= (w >= cfg.token_band[0]) & (w <= cfg.token_band[1])
    if cfg.sequence_band is not None:
        mean = jnp.exp(segment_mean(log_w, trained, segment_BT))
        kept &= (mean >= cfg.sequence_band[0]) & (mean <= cfg.sequence_band[1])
    if cfg.veto:
        vetoed = jnp.where(trained & (w < cfg.veto), 1.0, 0.0)
        kept &= segment_sum(vetoed, segment_BT) == 0
    return weight, kept


# -- losses for the learner --------------------------------------------------------------------------------------------


def weighted(x: Tokens, batch: Batch) -> Mean:
    """The batch's own aggregation of a per-token loss: its weights over its divisor. x may be anything at weight 0."""
    total = (jnp.where(batch.mask_BT > 0, x, 0.0) * batch.mask_BT).sum()
    return Mean(total, batch.mask_BT.sum() if batch.divisor_B is None else batch.divisor_B.sum())


def token_mean(x: Tokens | Bool[Array, "B T"], trained: Bool[Array, "B T"]) -> Mean:
    """Mean over trained tokens, each counted once."""
    return Mean(jnp.where(trained, x, 0.0).sum(), trained.sum().astype(jnp.float32))


def policy_loss(surrogate: Surrogate, mismatch: MismatchConfig, kl: KlConfig, entropy_coef: float) -> LossFn:
    """The whole policy objective: weighted surrogate, KL to the reference, entropy bonus, each with its coefficient.

    Reads from the batch: advantage, behaviour log-probs where there are any, proximal ones where there are (None: the
    current ones, so that the ratio is 1 bit for bit), reference ones where the KL is a loss.
    """

    def loss(outputs: TokenOutputs, batch: Batch) -> Loss:
        trained, segment = batch.mask_BT > 0, batch.segment_BT
        logp = jnp.where(trained, outputs.logp_BT, 0.0)
        own = stop_gradient(logp) if batch.logp_proximal_BT is None else jnp.asarray(batch.logp_proximal_BT)
        bypass = mismatch.proximal == "sampler"
        proximal = _given(batch.logp_behaviour_BT, "logp_behaviour_BT") if bypass else own
        ratio = log_ratio(logp, proximal, trained)
        per_token, clipped = surrogate(logp, ratio, _given(batch.advantage_BT, "advantage_BT"), trained, segment)
        metrics = {
            "clip_fraction": token_mean(clipped, trained),
            "kl_proximal": token_mean(kl_estimate("k3", stop_gradient(ratio)), trained),
            "off_ratio": token_mean(stop_gradient(ratio) != 0, trained),
        }
        if batch.logp_behaviour_BT is not None:
            gap = stop_gradient(log_ratio(own, jnp.asarray(batch.logp_behaviour_BT), trained))
            log_w = jnp.zeros_like(gap) if bypass else gap
            weight, kept = importance_weights(log_w, trained, segment, mismatch)
            per_token = per_token * jnp.where(kept, weight, 0.0)
            metrics |= _mismatch_metrics(gap, weight, kept, trained)
        terms = {"policy": weighted(per_token, batch)}
        tokens = {"clipped": jnp.where(trained, clipped, False).astype(jnp.float32)}
        if kl.coef and kl.placement == "loss":
            d = log_ratio(logp, _given(batch.logp_reference_BT, "logp_reference_BT"), trained)
            terms["kl"] = weighted(kl.coef * kl_loss(kl.estimator, d, ratio), batch)
            metrics["kl_reference"] = token_mean(stop_gradient(kl_estimate("k3", d)), trained)
        if outputs.entropy_BT is not None:
            tokens["entropy"] = stop_gradient(outputs.entropy_BT)
            metrics["entropy"] = token_mean(tokens["entropy"], trained)
            if entropy_coef:
                terms["entropy"] = token_mean(-entropy_coef * outputs.entropy_BT, trained)
        return Loss(terms, metrics, tokens)

    return loss


def _mismatch_metrics(gap: Tokens, weight: Tokens, kept: Array, trained: Array) -> dict[str, Mean]:
    """Over every trained token, refused ones included. Effective sample size: w^2 / w_squared of the two means. `gap`:
    the learner's log-probs less the sampler's, whichever of them the ratio is taken to."""
    return {
        "w": token_mean(weight, trained),
        "w_squared": token_mean(weight * weight, trained),
        "w_kl": token_mean(jnp.expm1(gap) - gap, trained),
        "w_gap": token_mean(jnp.abs(gap), trained),
        "w_large": token_mean(jnp.abs(gap) > LARGE_LOG_W, trained),
        "w_refused": token_mean(~kept, trained),
    }


def clipped_value_loss(value: Tokens, old: Tokens, target: Tokens, clip: float) -> Tokens:
    """Half the squared error: the worse of the value and the value held within `clip` of the old one (0: no hold)."""
    error = (value - target) ** 2
    if clip:
        held = old + jnp.clip(value - old, -clip, clip)
        error = jnp.maximum(error, (held - target) ** 2)
    return error / 2


def value_loss(clip: float, coef: float = 1.0) -> LossFn:
    """The critic's objective, a mean over trained tokens: value of the state before each token against its return."""

    def loss(outputs: TokenOutputs, batch: Batch) -> Loss:
        trained = batch.mask_BT > 0
        value = jnp.where(trained, before(_given(outputs.value_BT, "value_BT"), batch.segment_BT), 0.0)
        target = jnp.where(trained, _given(batch.return_BT, "return_BT"), 0.0)
        old = jnp.where(trained, _given(batch.value_BT, "value_BT"), 0.0) if clip else value
        term = token_mean(coef * clipped_value_loss(value, old, target, clip), trained)
        error = stop_gradient(value) - target
        metrics = {
            "value": token_mean(stop_gradient(value), trained),
            "return": token_mean(target, trained),
            "return_squared": token_mean(target * target, trained),
            "value_error_squared": token_mean(error * error, trained),
        }
        return Loss({"value": term}, metrics)

    return loss


def both(first: LossFn, second: LossFn) -> LossFn:
    """The terms of two losses on one trunk."""

    def loss(outputs: TokenOutputs, batch: Batch) -> Loss:
        a, b = first(outputs, batch), second(outputs, batch)
        return Loss(a.terms | b.terms, a.metrics | b.metrics, a.tokens | b.tokens)

    return loss
