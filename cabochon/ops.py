"""Masked sums and token log-probabilities; all probability arithmetic is f32.

Legend: B rows, T tokens, D model, V vocab, K candidates. Index t always means "the token at position t": logp_BT[:, t]
is log p(token_t | tokens before it), taken from the hidden state at t-1; undefined (0) at the first token of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Leaf = Any
"""A leaf of a carrier that is a pytree: an array on the device, but as well numpy, a shape, a sharding."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A sum and what it is divided by, kept apart so that micro-batches and devices add; divided once."""

    total: Leaf
    count: Leaf

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Array:
        """total / count, 0 where nothing was counted."""
        return jnp.where(self.count == 0, 0.0, self.total / jnp.where(self.count == 0, 1.0, self.count))


def masked_mean(x: Float[Array, "*S"], mask: Float[Array, "*S"]) -> Mean:
    """Sum of x where mask > 0 (weighted by it) over the sum of the mask. x may be NaN where the mask is 0."""
    mask = mask.astype(jnp.float32)
    return Mean((jnp.where(mask > 0, x, 0.0) * mask).sum(), mask.sum())


def has_target(segment_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at tokens that follow one of their own segment, so have a log-prob (algorithms.md section 2)."""
    before = jnp.pad(segment_BT, ((0, 0), (1, 0)))[:, :-1]
    return (segment_BT == before) & (segment_BT != 0)


def before(x_BT: Float[Array, "B T"], segment_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """x at the token before, 0 at the first of a segment and at padding: of the state in which the token was drawn."""
    return jnp.where(has_target(segment_BT), jnp.roll(x_BT, 1, axis=1), 0.0)


def segment_sum(x_BT: Float[Array, "B T"], segment_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """At each token the sum of x over its segment, 0 at padding. Packed rows give what separate rows give."""

    def row(x_T: Array, segment_T: Array) -> Array:
        return jax.ops.segment_sum(x_T, segment_T, num_segments=x_T.shape[0] + 1)[segment_T]

    return jnp.where(segment_BT != 0, jax.vmap(row)(x_BT, segment_BT), 0.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenOutputs:
    """What a loss sees of the policy: all [B, T] f32, 0 where the token has no log-prob (`value_BT`: at padding)."""

    logp_BT: Leaf
    """log-prob of the token that stands there, nats"""
    lse_BT: Leaf
    """log-sum-exp of the logits it was drawn from"""
    entropy_BT: Leaf | None = None
    """entropy of the distribution it was drawn from, nats; only where asked for"""
    value_BT: Leaf | None = None
    """the scalar head on the hidden state *of* token t, which has read it; only where asked for. The value of the
    state that token t was drawn in is `before(value_BT, segment_BT)`; a score is read at the last token"""
    candidates_BTK: Leaf | None = None
    """log-probs of the tokens that the batch names as candidates for that place, nats; 0 where it names none"""


def token_outputs(
    hidden_BTD: Float[Array, "B T D"],
    tokens_BT: Int[Array, "B T"],
    segment_BT: Int[Array, "B T"],
    logits: Callable[[Array], Array],
    *,
    chunk: int = 0,
    entropy: bool = False,
    candidates_BTK: Int[Array, "B T K"] | None = None,
) -> TokenOutputs:
    """Log-probs of the tokens, and of other candidates for their place (-1: none), under the hidden states before them.

    `logits` maps [..., D] to f32 [..., V]. With `chunk`, at most about that many tokens' logits exist at one time: they
    are computed, reduced and recomputed in the backward pass, chunk by chunk along T. The result is the same.
    """
    B, T, _ = hidden_BTD.shape
    before_BTD = jnp.roll(hidden_BTD, 1, axis=1)

    def reduce(h: Array, tokens: Array, candidates: Array | None) -> dict[str, Array]:
        z = logits(h)
        lse = jax.nn.logsumexp(z, axis=-1)
        # a compare-and-sum is one fused pass, and so is its gradient; a gather's would be a scatter into [.., V]
        chosen = jnp.where(jnp.arange(z.shape[-1]) == tokens[..., None], z, 0.0).sum(-1)
        out = {"logp_BT": chosen - lse, "lse_BT": lse}
        if entropy:
            out["entropy_BT"] = lse - (jnp.exp(z - lse[..., None]) * z).sum(-1)
        if candidates is not None:
            logp = jnp.take_along_axis(z, jnp.maximum(candidates, 0), axis=-1) - lse[..., None]
            out["candidates_BTK"] = jnp.where(candidates >= 0, logp, 0.0)
        return out

    step = min(T, max(1, chunk // B)) if chunk else T
    inputs = (before_BTD, tokens_BT, candidates_BTK)
    if step == T:
        out = reduce(*inputs)
    else:
        n = -(-T // step)

        def cut(x: Array) -> Array:
            x = jnp.pad(x, ((0, 0), (0, n * step - T), *((0, 0) for _ in x.shape[2:])))
            return x.reshape(B, n, step, *x.shape[2:]).swapaxes(0, 1)

        parts = jax.lax.map(jax.checkpoint(lambda each: reduce(*each)), jax.tree.map(cut, inputs))
        out = {k: p.swapaxes(0, 1).reshape(B, n * step, *p.shape[3:])[:, :T] for k, p in parts.items()}
    defined = has_target(segment_BT)
    return TokenOutputs(**{k: jnp.where(defined.reshape(B, T, *[1] * (x.ndim - 2)), x, 0.0) for k, x in out.items()})
