"""What an engine takes of its devices, as programs to compile and bytes: for `cabochon plan`. Nothing is allocated.

An engine lives on devices of its own, apart from the learner's. While it takes over new weights it holds two sets of
them, and of its caches: the new one is proved on a probe before the old one is let go (`rollouts/worker.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from cabochon.model.config import ModelConfig
from cabochon.rollouts.engine_params import abstract_params, engine_shardings
from cabochon.rollouts.programs import programs
from cabochon.rollouts.slots import SlotConfig, cache_sharding, empty_prefix, empty_slots


@dataclass(frozen=True, kw_only=True)
class EngineProgram:
    """One of the sampler's programs; sizes are bytes on each of its devices."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    resident: dict[str, int]
    beside: dict[str, int]
    devices: int


def engine_programs(model: ModelConfig, cfg: SlotConfig, devices: Sequence[jax.Device]) -> Iterator[EngineProgram]:
    """Prefill at its longest chunk, and decode, as XLA programs for the first `cfg.tensor` of `devices`.

    Raises UserError where there are fewer. Must be called (and lowered) under `target.compiling_for(devices)`.
    """
    cfg = replace(cfg, kernels="xla")
    mesh, alone = cfg.mesh, jax.sharding.SingleDeviceSharding(devices[0])

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: _shape(x, cache_sharding(mesh, x) or alone), tree)

    weights = abstract_params(model, cfg)
    places = jax.tree.map(lambda x: alone, weights) if mesh is None else engine_shardings(model, cfg)
    weights = jax.tree.map(_shape, weights, places)
    slots = placed(jax.eval_shape(lambda: empty_slots(model, cfg)))
    prefix = placed(jax.eval_shape(lambda: empty_prefix(model, cfg)))
    run = programs(model, cfg)
    size = {
        "parameters": _bytes(weights), "KV cache": _bytes(slots), "KV cache of the prompt being read": _bytes(prefix)
    }  # fmt: skip
    both = {"new weights and their cache, while they are proved": sum(size.values())}
    if mesh is None:  # split on the device, from a copy of the policy's own layout
        both["new weights as they arrive"] = size["parameters"]
    chunk = max(cfg.chunks)
    scalar = placed(jax.ShapeDtypeStruct((), jnp.int32))
    tokens = placed(jax.ShapeDtypeStruct((chunk,), jnp.int32))
    stopped, waiting = placed(jax.ShapeDtypeStruct((cfg.slots,), bool)), placed(jax.ShapeDtypeStruct((), bool))

    def split(*names: str) -> tuple[dict[str, int], dict[str, int]]:
        return {n: size[n] for n in names}, {n: s for n, s in size.items() if n not in names} | both

    resident, beside = split("parameters", "KV cache of the prompt being read")
    yield EngineProgram(
        name="prefill", resident=resident, beside=beside, devices=cfg.tensor,
        lower=lambda: run.prefill.lower(weights, prefix, tokens, scalar, scalar),
    )  # fmt: skip
    resident, beside = split("parameters", "KV cache")
    yield EngineProgram(
        name="decode", resident=resident, beside=beside, devices=cfg.tensor,
        lower=lambda: run.decode.lower(weights, slots, stopped, waiting),
    )  # fmt: skip


def _shape(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
