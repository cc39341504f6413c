"""Sampling on device: bias, temperature, top-k, top-p and min-p, one uniform draw, and both log-probs.

Legend: B rows, V vocab, M entries of a row's short list. All f32. No sort: a filter is a threshold on the logits, found
by bisection over their bit patterns, 32 passes whatever the vocabulary. Every row's arithmetic is its own, so a row's
token depends on its logits, settings and key alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from cabochon.ops import Leaf

WIDTH = 128
"""columns summed together in the first of the draw's two levels"""


class Knobs(NamedTuple):
    """How each row samples; the device form of `Sampling`."""

    temperature_B: Leaf
    top_k_B: Leaf
    """int32, 0 for off"""
    top_p_B: Leaf
    min_p_B: Leaf
    bias_id_BM: Leaf
    """int32; an id of V or more is an empty place"""
    bias_BM: Leaf


class Draw(NamedTuple):
    """A token per row, its log-prob in the distribution sampled from, and under the raw logits; nats."""

    token_B: Array
    logp_B: Array
    raw_logp_B: Array


def draw(
    logits_BV: Float[Array, "B V"],
    knobs: Knobs,
    ban_BM: Int[Array, "B M"],
    uniform_B2: Float[Array, "B 2"],
    live_B: Array,
) -> Draw:
    """Sample. `ban_BM` are ids that may not be drawn (V or more: none); rows that are not live pay for no filter."""
    B = logits_BV.shape[0]
    row_B1 = jnp.arange(B)[:, None]
    z_BV = jax.lax.cond(
        (live_B & (knobs.bias_BM != 0).any(-1)).any(),
        lambda z: z.at[row_B1, knobs.bias_id_BM].add(knobs.bias_BM, mode="drop"),
        lambda z: z,
        logits_BV,
    )
    z_BV = jax.lax.cond(
        (live_B[:, None] & (ban_BM < z_BV.shape[1])).any(),
        lambda z: z.at[row_B1, ban_BM].set(-jnp.inf, mode="drop"),
        lambda z: z,
        z_BV,
    )
    greedy_B = knobs.temperature_B == 0
    z_BV = z_BV / jnp.where(greedy_B, 1.0, knobs.temperature_B)[:, None]
    on_B = (knobs.top_k_B > 0) | (knobs.top_p_B < 1) | (knobs.min_p_B > 0)
    z_BV = jax.lax.cond((live_B & on_B & ~greedy_B).any(), lambda z: filtered(z, knobs), lambda z: z, z_BV)
    most_B = z_BV.max(-1)
    weight_BV = jnp.exp(z_BV - most_B[:, None])
    token_B, total_B = pick(weight_BV, uniform_B2)
    best_B = jax.lax.cond(greedy_B.any(), lambda z: jnp.argmax(z, -1).astype(jnp.int32), lambda z: token_B, z_BV)
    token_B = jnp.where(greedy_B, best_B, token_B).astype(jnp.int32)
    chosen_B = jnp.take_along_axis(z_BV, token_B[:, None], 1)[:, 0]
    logp_B = jnp.where(greedy_B, 0.0, chosen_B - most_B - jnp.log(total_B))
    raw_B = jnp.take_along_axis(logits_BV, token_B[:, None], 1)[:, 0] - jax.nn.logsumexp(logits_BV, axis=-1)
    return Draw(token_B, logp_B, raw_B)


def pick(
    weight_BV: Float[Array, "B V"], uniform_B2: Float[Array, "B 2"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """(index drawn in proportion to the weights, their sum), by inversion: first a block of columns, then one in it.

    Two uniforms of 23 bits each, so that a weight of 1e-9 of the whole is still drawn as often as it should be.
    """
    B, V = weight_BV.shape
    blocks = -(-V // WIDTH)
    weight_BNW = jnp.pad(weight_BV, ((0, 0), (0, blocks * WIDTH - V))).reshape(B, blocks, WIDTH)
    sums_BN = weight_BNW.sum(-1)
    block_B, total_B = _invert(sums_BN, uniform_B2[:, 0])
    inner_B, _ = _invert(jnp.take_along_axis(weight_BNW, block_B[:, None, None], 1)[:, 0], uniform_B2[:, 1])
    return block_B * WIDTH + inner_B, total_B


def _invert(weight_BN: Array, uniform_B: Array) -> tuple[Array, Array]:
    """First index whose running total exceeds uniform * total; never one of weight 0, whatever the rounding."""
    running_BN = jnp.cumsum(weight_BN, -1)
    total_B = running_BN[:, -1]
    beyond_BN = (running_BN > (uniform_B * total_B)[:, None]) & (weight_BN > 0)
    last_B = weight_BN.shape[1] - 1 - jnp.argmax(weight_BN[:, ::-1] > 0, -1)
    return jnp.where(beyond_BN.any(-1), jnp.argmax(beyond_BN, -1), last_B), total_B


def filtered(z_BV: Float[Array, "B V"], knobs: Knobs) -> Float[Array, "B V"]:
    """Logits with what top-k, top-p and min-p refuse at -inf. Top-p counts the mass left by top-k as 1."""
    key_BV = _ordered(z_BV)
    most_B = z_BV.max(-1)
    weight_BV = jnp.exp(z_BV - most_B[:, None])

    def count(at_least_B: Array) -> Array:
        return (key_BV >= at_least_B[:, None]).sum(-1).astype(jnp.float32)

    def mass(at_least_B: Array) -> Array:
        return jnp.where(key_BV >= at_least_B[:, None], weight_BV, 0.0).sum(-1)

    top_k_B = jnp.where(knobs.top_k_B > 0, knobs.top_k_B, z_BV.shape[1])
    by_k_B = _largest(count, top_k_B.astype(jnp.float32))
    by_k_B = jnp.where(knobs.top_k_B > 0, by_k_B, 0)
    by_p_B = _largest(mass, knobs.top_p_B * mass(by_k_B))
    by_p_B = jnp.where(knobs.top_p_B < 1, by_p_B, 0)
    min_B = jnp.where(knobs.min_p_B > 0, most_B + jnp.log(knobs.min_p_B), -jnp.inf)
    keep_BV = (key_BV >= jnp.maximum(by_k_B, by_p_B)[:, None]) & (z_BV >= min_B[:, None])
    return jnp.where(keep_BV, z_BV, -jnp.inf)


def _ordered(z: Array) -> UInt32[Array, "B V"]:
    """uint32 in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(z, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(measure: Callable[[Array], Array], target_B: Array) -> Array:
    """The largest key at which `measure`, which falls as the key grows, still reaches the target; 0 if none."""

    def bit(i: Array, found_B: Array) -> Array:
        tried_B = found_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(measure(tried_B) >= target_B, tried_B, found_B)

    return jax.lax.fori_loop(0, 32, bit, jnp.zeros(target_B.shape, jnp.uint32))
