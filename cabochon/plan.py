"""What a step will take of each device's memory, before anything is allocated: the lines of `--dry-run`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cabochon import parallel
from cabochon.batch import Batch
from cabochon.learner import Learner


def device_bytes(tree: Any) -> int:
    """Of shapes with or without shardings, on the device that holds most."""
    return sum(_shard(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _shard(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape))


def abstract_batch(learner: Learner) -> Batch:
    """A batch of the step's shape, as shapes."""
    shape = (learner.cfg.step.batch_size, learner.cfg.step.sequence_length)
    sharding = None if learner.mesh is None else parallel.rows(learner.mesh)
    leaf: Callable[[Any], Any] = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    return Batch(
        tokens_BT=leaf(jnp.int32), segment_BT=leaf(jnp.int32), position_BT=leaf(jnp.int32), mask_BT=leaf(jnp.float32)
    )


def memory_lines(learner: Learner, batch: Batch | None = None) -> list[str]:
    """Bytes of weights, optimiser and, from the compiled step, everything that lives only while it runs.

    Compiles the step for the devices that are there, so that the numbers are the compiler's and not a guess. `batch`:
    as shapes, where the loss needs more of it than tokens and masks.
    """
    state = learner.abstract_state()
    weights, optimizer = device_bytes(state.params), device_bytes(state.opt_state)
    compiled = learner.step.lower(state, batch or abstract_batch(learner)).compile().memory_analysis()
    during = int(compiled.temp_size_in_bytes) if compiled is not None else 0
    devices = 1 if learner.mesh is None else learner.mesh.size
    parts = {"weights": weights, "optimiser state": optimizer, "gradients, activations, logits": during}
    lines = [f"{name:32}{size / 1e9:9.3f} GB" for name, size in parts.items()]
    return [f"memory of each of {devices} devices" if devices > 1 else "memory of the device", *lines,
            f"{'together':32}{sum(parts.values()) / 1e9:9.3f} GB"]  # fmt: skip
