"""Bradley-Terry over pairs that lie in one row (algorithms.md section 3).

Segments 2i - 1 and 2i of a row are a pair; either may be missing, and then scores 0: that is how a completion with a
label and no partner is learnt (cross-entropy of its label against sigmoid(score)). `Batch.mask_BT` is +1 at the last
token of the better answer, -1 at that of the worse and 0 elsewhere, so a pair's masked sum is the difference of scores.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cabochon.batch import Batch
from cabochon.learner import Loss, LossFn
from cabochon.ops import Mean, TokenOutputs, masked_mean, segment_sum


class Pairs(NamedTuple):
    """[B, T], each pair's numbers at every token of it."""

    difference: Float[Array, "B T"]
    """score of the better less that of the worse"""
    total: Float[Array, "B T"]
    margin: Float[Array, "B T"]
    one: Bool[Array, "B T"]
    """True at one token of each pair"""


def pairs_of(value_BT: Float[Array, "B T"], batch: Batch) -> Pairs:
    """The pairs of a batch under these scores."""
    mask = batch.mask_BT
    pair_BT = (batch.segment_BT + 1) // 2
    better = segment_sum(jnp.where(mask > 0, 1.0, 0.0), pair_BT)
    margin = jnp.zeros_like(value_BT) if batch.margin_BT is None else batch.margin_BT
    return Pairs(
        difference=segment_sum(mask * value_BT, pair_BT),
        total=segment_sum(jnp.abs(mask) * value_BT, pair_BT),
        margin=segment_sum(margin, pair_BT),
        one=(mask > 0) | ((mask < 0) & (better == 0)),
    )


def bradley_terry(*, centre: float = 0.0, margin_scale: float = 1.0) -> LossFn:
    """softplus(margin - difference) + centre * (sum of the two)^2, a mean over pairs. The divisor is the pairs."""

    def loss(outputs: TokenOutputs, batch: Batch) -> Loss:
        assert outputs.value_BT is not None
        pairs = pairs_of(outputs.value_BT, batch)
        one = pairs.one.astype(jnp.float32)
        # not -log(sigmoid(d)), which overflows; a pair's number stands at many tokens, so one of them counts
        ranking = jax.nn.softplus(margin_scale * pairs.margin - pairs.difference)
        terms = {"ranking": masked_mean(ranking, one)}
        if centre:
            squares = masked_mean(pairs.total**2, one)
            terms["centring"] = Mean(centre * squares.total, squares.count)
        metrics = {
            "accuracy": masked_mean((pairs.difference > 0).astype(jnp.float32), one),
            "difference": masked_mean(pairs.difference, one),
            "score": masked_mean(outputs.value_BT, jnp.abs(batch.mask_BT)),
        }
        return Loss(terms, metrics)

    return loss
