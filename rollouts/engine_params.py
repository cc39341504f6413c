"""The engine's own copy of the policy's weights: one tree a layer, in its dtype, packed for the native kernels, or
split over the devices of an engine that has several.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cabochon import parallel
from cabochon.model import native
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig
from cabochon.rollouts.slots import SlotConfig

EngineParams = dict[str, Any]
"""`layers`: a list of parameter trees, one a layer; `embed`, `final_norm` and, untied, `head` as in the policy"""


def engine_params(model: ModelConfig, params: Mapping[str, Any], cfg: SlotConfig) -> EngineParams:
    """The engine's own copy of the policy's weights, one tree a layer, in its dtype (the router stays f32).

    For the native kernels matrices are packed, biases and norms stay f32, and `head` is packed beside the table.
    """
    if cfg.mesh is not None:
        return _spread(model, params, cfg)
    if not cfg.native:
        return _split(model, cfg.dtype, dict(params))
    host = jax.tree.map(np.asarray, dict(params))
    w = host["embed"]["table"].T if model.tied_head else host["head"]["w"]
    table = host["embed"]["table"].astype(jnp.dtype(cfg.dtype))
    rest = {"embed": {"table": table}, "final_norm": host["final_norm"], "head": {"w": native.pack(w, cfg.dtype)}}
    copy = partial(jax.tree.map, jnp.array)  # layer by layer: never are all of them there twice
    return {"layers": [copy(_packed(layer, cfg.dtype)) for layer in _layers(model, host)], **copy(rest)}


def _layers(model: ModelConfig, params: Mapping[str, Any]) -> list[Any]:
    """The stacked groups as one tree a layer, in order."""
    return [
        jax.tree.map(lambda x, i=i: x[i], params["blocks"][str(g)][str(p)])
        for g, (pattern, repeats) in enumerate(model.groups)
        for i in range(repeats)
        for p in range(len(pattern))
    ]


@partial(jax.jit, static_argnums=(0, 1))
def _split(model: ModelConfig, dtype: str, params: dict[str, Any]) -> EngineParams:
    rest = {name: params[name] for name in params if name != "blocks"}
    return tf.cast({"layers": _layers(model, params), **rest}, dtype)


def _spread(model: ModelConfig, params: Mapping[str, Any], cfg: SlotConfig) -> EngineParams:
    """Split and cast on the host, so that each device gets its part and nothing else."""
    host = jax.tree.map(np.asarray, dict(params))
    rest = {name: host[name] for name in host if name != "blocks"}
    return jax.device_put(tf.cast({"layers": _layers(model, host), **rest}, cfg.dtype), engine_shardings(model, cfg))


def engine_shardings(model: ModelConfig, cfg: SlotConfig) -> Any:
    """Where each of the engine's weights lies on `cfg.mesh`."""
    assert cfg.mesh is not None
    axes, shapes = tf.logical_axes(model), abstract_params(model, cfg)
    whole = {name: axes[name] for name in axes if name != "blocks"}
    named = jax.tree.map(lambda a: _Axes(a), axes["blocks"], is_leaf=lambda a: isinstance(a, tuple))
    layers = jax.tree.map(lambda a: a.names, _layers(model, {"blocks": named}), is_leaf=lambda a: isinstance(a, _Axes))
    return parallel.param_shardings({"layers": layers, **whole}, shapes, cfg.mesh)


class _Axes:
    """Names of a stacked array's axes; one of its layers has all but the first."""

    def __init__(self, names: tuple[str | None, ...]):
        self.names = names

    def __getitem__(self, layer: int) -> _Axes:
        return _Axes(self.names[1:])


def abstract_params(model: ModelConfig, cfg: SlotConfig) -> EngineParams:
    """`engine_params` as shapes; not for the native kernels."""
    return jax.eval_shape(lambda params: _split(model, cfg.dtype, params), tf.abstract(model))


def _packed(layer: Any, dtype: str, path: tuple[str, ...] = ()) -> Any:
    """A layer's tree with its matrices packed; `path` is where in it `layer` stands."""
    if isinstance(layer, Mapping):
        return {name: _packed(value, dtype, (*path, name)) for name, value in layer.items()}
    match path:
        case ("moe", "gate_up"):
            return native.pack_gated(layer, dtype)
        case ("moe", "down"):
            return native.pack_down(layer, dtype)
        case (*_, "qkv" | "gate_up", "w"):
            return native.pack(layer.reshape(layer.shape[0], -1), dtype)
        case (*_, "out" | "down", "w"):
            return native.pack(layer.reshape(-1, layer.shape[-1]), dtype)
    return layer
