"""Low-rank additions (Hu et al. 2106.09685): W + (alpha / rank) A B, put into a parameter tree and merged again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path, tree_map_with_path

from cabochon.errors import UserError
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig

MATRICES = ("qkv", "out", "gate_up", "down")
"""What may be a target: attention, dense and shared feed-forward. Routed experts may not."""


def add_lora(cfg: ModelConfig, params: tf.Params, lora: tf.Lora, seed: int = 0) -> tf.Params:
    """The tree with fresh `lora_a` and `lora_b` beside each target; b = 0, so the function is the same.

    Leaves that are there already stay. The draw depends on the shape and the seed. Raises UserError for a target that
    this model has no such matrix for.
    """
    everything = tf.abstract(cfg, tf.Lora(rank=1, alpha=1.0, targets=MATRICES))
    known = sorted({path[-2].key for path, _ in tree_leaves_with_path(everything) if path[-1].key == "lora_a"})
    if unknown := sorted(set(lora.targets) - set(known)):
        raise UserError(
            f"lora.targets: {unknown[0]!r} names no matrix of this model; expected some of {', '.join(known)}"
        )

    @jax.jit  # prunes inside, so that XLA never draws the weights that are not wanted
    def draw(key: jax.Array) -> tf.Params:
        blocks = tf.init(cfg, key, lora)["blocks"]
        return tree_map_with_path(lambda path, x: x if path[-1].key.startswith("lora_") else jnp.zeros(()), blocks)

    def merge(new: Any, old: Any) -> Any:
        return {k: merge(v, old.get(k, {})) if isinstance(v, dict) else old.get(k, v) for k, v in new.items()}

    return {**params, "blocks": merge(draw(jax.random.key(seed)), params["blocks"])}


def merge_lora(params: tf.Params, lora: tf.Lora | None) -> tf.Params:
    """The plain tree of the same function: each target's addition summed into its matrix, in f32; as it is without."""
    if lora is None:
        return params

    def one(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "lora_a" not in node:
            return {k: one(v) for k, v in node.items()}
        a, b, w = (node[k].astype(jnp.float32) for k in ("lora_a", "lora_b", "w"))
        n = a.shape[0]  # repeats of the scanned group
        added = jnp.einsum("nir,nro->nio", a.reshape(n, -1, lora.rank), b.reshape(n, lora.rank, -1))
        merged = w + added.reshape(w.shape) * (lora.alpha / lora.rank)
        return {**{k: v for k, v in node.items() if not k.startswith("lora_")}, "w": merged}

    return one(params)
