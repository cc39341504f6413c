"""What is trained, its learning-rate schedule, and the optax chain from an OptimConfig."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from cabochon.config import OptimConfig
from cabochon.model import value

NOT_DECAYED = ("scale", "b", "bias")
"""Leaf names without weight decay: norms and biases."""


def schedule(cfg: OptimConfig) -> optax.Schedule:
    """Learning rate at an update count from 0: linear warm-up, then constant or down to the end value."""
    peak, end, span = cfg.learning_rate, cfg.learning_rate * cfg.end_factor, cfg.total_steps - cfg.warmup_steps
    match cfg.schedule:
        case "constant":
            after: optax.Schedule = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, end, span)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, span, cfg.end_factor)
    if not cfg.warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, cfg.warmup_steps), after], [cfg.warmup_steps])


def split_trained(params: Any, *, lora: bool, freeze_router: bool = False) -> tuple[Any, Any]:
    """(trained, frozen) trees with None in the other's places.

    Trained are the lora leaves and a value head, or without `lora` everything but selection biases, which move by a
    rule; `freeze_router` keeps the routers as they are.
    """

    def trained(path: tuple[Any, ...]) -> bool:
        names = [p.key for p in path]
        if lora:
            return names[-1].startswith("lora_") or names[0] == value.KEY
        return names[-1] != "bias" and not (freeze_router and "router" in names)

    pick = jax.tree_util.tree_map_with_path
    return pick(lambda p, x: x if trained(p) else None, params), pick(lambda p, x: None if trained(p) else x, params)


def join(trained: Any, frozen: Any) -> Any:
    """The inverse of `split_trained`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)


def decayed(params: Any) -> Any:
    """True for the matrices, by leaf name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def make_optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
    """Clip, second moment, decoupled decay, schedule. State is f32.

    `adafactor` keeps row and column means of the squared gradient (Shazeer & Stern 1804.04235) for arrays with two dims
    of 128 or more; its decay rises as 1 - t^-0.8 up to b2, so no bias correction. b1 = 0 drops the first moment.
    """
    parts: list[optax.GradientTransformation] = []
    if cfg.clip_norm:
        parts.append(optax.clip_by_global_norm(cfg.clip_norm))
    if cfg.kind == "adamw":
        parts.append(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps))
    else:

        def decay(step: Any, power: float) -> Any:
            return jnp.minimum(cfg.b2, 1.0 - (step + 1.0) ** -power)

        parts.append(optax.scale_by_factored_rms(decay_rate=0.8, epsilon=cfg.eps**2, decay_rate_fn=decay))
        if cfg.b1:
            parts.append(optax.ema(cfg.b1))
    if cfg.weight_decay:
        parts.append(optax.add_decayed_weights(cfg.weight_decay, mask=decayed))
    parts.append(optax.scale_by_learning_rate(schedule(cfg)))
    return optax.chain(*parts)
