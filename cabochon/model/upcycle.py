"""Sparse upcycling (Komatsuzaki et al. 2212.05055; algorithms.md section 13): a dense model becomes a mixture.

Every expert starts as a copy of the dense feed-forward, the router starts at random. With gates that sum to 1 the new
model computes the same function at step 0: y = sum_i g_i f(x) = f(x). Train it (SFT, with a load-balance loss) before
RL: identical experts make router metrics meaningless.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from cabochon.errors import UserError
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.model.hf_names import Path, get_leaf, leaf_shapes, set_leaf, slots
from cabochon.model.value import KEY

FAMILY: dict[str, Literal["mixtral", "qwen3_moe"]] = {"llama": "mixtral", "qwen2": "mixtral", "qwen3": "qwen3_moe"}
"""What a dense family is written as afterwards. Mixtral has no place for Qwen2's biases nor for dense layers, so such
models train, but exporting them to Hugging Face is refused; `hf_export.refuse_unexportable` tells before any work."""


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters in all, and those that one token passes through (its top-k experts; embedding and head whole)."""

    total: int
    active: int


def parameter_parts(config: ModelConfig) -> Mapping[str, ParameterCounts]:
    """Counts per part of the model, by arithmetic on the config alone."""
    parts: dict[str, ParameterCounts] = {}
    for path, shape in leaf_shapes(config).items():
        name, size = _part_of(path), math.prod(shape)
        active = size // config.moe.num_experts * config.moe.top_k if config.moe and name == "experts" else size
        before = parts.get(name, ParameterCounts(total=0, active=0))
        parts[name] = ParameterCounts(total=before.total + size, active=before.active + active)
    return parts


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts of the whole model."""
    parts = parameter_parts(config).values()
    return ParameterCounts(total=sum(p.total for p in parts), active=sum(p.active for p in parts))


def _part_of(path: Path) -> str:
    match path:
        case ("embed" | "head", *_):
            return "embedding and head"
        case (*_, "attn", _, _):
            return "attention"
        case (*_, "mlp", _, _):
            return "dense feed-forward"
        case (*_, "shared", _, _):
            return "shared expert"
        case (*_, "router", _):
            return "router"
        case (*_, "moe", _):
            return "experts"
        case _:
            return "norms"


def upcycled_config(
    config: ModelConfig, *, num_experts: int, top_k: int, layers: Sequence[int] | None = None
) -> ModelConfig:
    """The sparse config. `layers` are those to convert, None for every dense one.

    Raises UserError where the result would not compute the same function or cannot be expressed.
    """
    if config.family not in FAMILY or config.moe is not None:
        raise UserError(f"upcycle: family {config.family} is not dense; expected one of {', '.join(FAMILY)}")
    if config.mlp_bias:
        raise UserError("upcycle: mlp_bias=true: experts have no biases; use a model without them")
    if not 1 <= top_k <= num_experts:
        raise UserError(f"upcycle: top_k={top_k}: expected 1 to num_experts={num_experts}")
    chosen = range(config.num_layers) if layers is None else layers
    if wrong := [i for i in chosen if not 0 <= i < config.num_layers]:
        raise UserError(f"upcycle: layer {wrong[0]}: the model has layers 0 to {config.num_layers - 1}")
    if not chosen:
        raise UserError("upcycle: no layer to convert")
    hybrid = len(set(chosen)) < config.num_layers
    return config.model_copy(update={
        "family": FAMILY[config.family],
        "ffn_dim": config.ffn_dim if hybrid else 0,
        "layer_kinds": tuple("moe" if i in chosen else "dense" for i in range(config.num_layers)) if hybrid else (),
        "moe": MoeConfig(num_experts=num_experts, top_k=top_k, ffn_dim=config.ffn_dim, gate="topk_softmax"),
    })  # fmt: skip


def upcycle(
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    num_experts: int,
    top_k: int,
    layers: Sequence[int] | None = None,
    noise: float = 0.0,
    router: Literal["normal", "orthogonal"] = "normal",
    router_std: float = 0.02,
    seed: int = 0,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Sparse config and parameters of a dense model; the same function where `noise` is 0, up to rounding.

    `noise` adds to every expert a normal draw of that fraction of the tensor's root mean square, so experts differ from
    the start (the function then changes). `router`: columns from N(0, router_std), or orthonormal columns, which is
    where SimBal's loss is zero (needs num_experts <= dim). Leaves that stay are shared with `params`.
    """
    sparse = upcycled_config(config, num_experts=num_experts, top_k=top_k, layers=layers)
    if KEY in params:
        raise UserError("upcycle: a reward model, which would lose its head; upcycle the policy and train a new one")
    if router == "orthogonal" and num_experts > config.dim:
        raise UserError(f"upcycle: router=orthogonal: {num_experts} experts cannot be orthogonal in {config.dim} "
                        "dimensions; use router=normal")  # fmt: skip
    key = jax.random.key(seed)
    out: dict[str, Any] = {}
    for path in leaf_shapes(sparse):
        if path[0] != "blocks":
            set_leaf(out, path, get_leaf(params, path))
            continue
        layers_here = [i for i, (g, p, _) in enumerate(slots(sparse)) if path[1:3] == (str(g), str(p))]
        match path[3:]:
            case ("moe", "router", "w"):
                shape = (config.dim, num_experts)
                columns = [_router(jax.random.fold_in(key, i), shape, router, router_std) for i in layers_here]
                set_leaf(out, path, jnp.stack(columns))
            case ("moe", name):
                dense = _gather(config, params, ("mlp", name, "w"), layers_here)
                experts = jnp.repeat(jnp.asarray(dense)[:, None], num_experts, axis=1)
                if noise:
                    keys = [jax.random.fold_in(jax.random.fold_in(key, i), len(name)) for i in layers_here]
                    draws = jnp.stack([jax.random.normal(k, experts.shape[1:], experts.dtype) for k in keys])
                    axes = tuple(range(2, experts.ndim))
                    rms = jnp.sqrt(jnp.mean(jnp.square(experts), axis=axes, keepdims=True))
                    experts = experts + noise * rms * draws
                set_leaf(out, path, experts)
            case suffix:
                set_leaf(out, path, _gather(config, params, suffix, layers_here))
    return sparse, out


def _router(key: jax.Array, shape: tuple[int, int], kind: str, std: float) -> jax.Array:
    """[D, E]"""
    draw = jax.random.normal(key, shape)
    return jnp.linalg.qr(draw)[0] if kind == "orthogonal" else std * draw


def _gather(config: ModelConfig, params: Mapping[str, Any], suffix: Path, layers: Sequence[int]) -> Any:
    """Some layers' rows of a dense model's leaf, stacked; the leaf itself where that is all of it, in order."""
    at = [slots(config)[i] for i in layers]
    first = ("blocks", str(at[0][0]), str(at[0][1]), *suffix)
    if at == [(*at[0][:2], i) for i in range(get_leaf(params, first).shape[0])]:
        return get_leaf(params, first)
    return jnp.stack([get_leaf(params, ("blocks", str(g), str(p), *suffix))[i] for g, p, i in at])
