"""Small real things for tests, in the package because Ray workers must be able to import them."""

from __future__ import annotations

from typing import Any

from cabochon.model.config import ModelConfig, MoeConfig


def tiny_config(**changes: Any) -> ModelConfig:
    """A dense model of a few thousand parameters; `changes` replace fields of ModelConfig."""
    base: dict[str, Any] = {
        "vocab_size": 64,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_dim": 48,
    }
    return ModelConfig(**(base | changes))


def tiny_moe(**changes: Any) -> ModelConfig:
    """Dense and sparse layers in turn, with a shared expert: four layers, three groups of parameters that differ."""
    base: dict[str, Any] = {
        "num_layers": 4,
        "layer_kinds": ("dense", "moe", "dense", "moe"),
        "moe": MoeConfig(num_experts=4, top_k=2, ffn_dim=24, shared_ffn_dim=16),
        "qk_norm": "head",
        "tied_head": False,
    }
    return tiny_config(**(base | changes))
