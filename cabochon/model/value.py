"""The scalar head: a critic's value or a reward model's score, beside the policy's parameters as `params["value"]`.

Legend: D model. Kept and computed in f32: bf16 scores near 10 have a resolution of 0.06 (algorithms.md section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cabochon.model.config import ModelConfig

KEY = "value"
"""its place in the parameter tree"""


def abstract(cfg: ModelConfig) -> dict[str, Any]:
    """The head's tree with `jax.ShapeDtypeStruct` leaves."""
    return {"w": jax.ShapeDtypeStruct((cfg.dim,), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.float32)}


def logical_axes(cfg: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """The head's tree with the logical name of each dim."""
    return {"w": ("embed",), "b": ()}


def with_head(cfg: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with a head; a new one is zero, so that it says 0 of everything. One that is there stays."""
    zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract(cfg).items()}
    return {KEY: zeros, **params}


def without_head(params: Mapping[str, Any]) -> dict[str, Any]:
    """The language model alone: what an engine loads and an export writes."""
    return {name: tree for name, tree in params.items() if name != KEY}


def values(head: Mapping[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """The head on final hidden states."""
    return hidden.astype(jnp.float32) @ head["w"] + head["b"]
