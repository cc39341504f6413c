"""A batch in parts: cut into micro-batches, measured one after the other, put together again.

Legend: B rows of the batch, M micro-batches, b = B / M rows of one. A part that is all padding is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from cabochon import parallel
from cabochon.batch import Batch


def cut(batch: Batch, count: int, mesh: Mesh | None) -> Batch:
    """[M, b, ...]: part m takes rows m, m + M, ...: rows stay on their device."""

    def one(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, parallel.ROWS)))

    return jax.tree.map(one, batch)


def joined(tree: Any) -> Any:
    """The rows of [M, b, ...] in the order they had before `cut`: [B, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def over(measure: Callable[[Batch], tuple[Any, Any]], parts: Batch) -> tuple[Any, Any]:
    """`measure(part)` gives what is added up over the parts, and what is kept of each: the latter comes back as
    [M, ...], 0 for a part of padding."""
    first = jax.tree.map(lambda x: x[0], parts)
    if parts.tokens_BT.shape[0] == 1:
        total, each = measure(first)
        return total, jax.tree.map(lambda x: x[None], each)
    zero, blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(measure, first))

    def add(total: Any, part: Batch) -> tuple[Any, Any]:
        def more() -> tuple[Any, Any]:
            one, each = measure(part)
            return jax.tree.map(jnp.add, total, one), each

        return jax.lax.cond((part.segment_BT != 0).any(), more, lambda: (total, blank))

    return jax.lax.scan(add, zero, parts)
