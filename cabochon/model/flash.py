"""Attention on CPU, f32, without its scores in memory (flash.cc, through `jax.ffi`): values and gradients.

Why: XLA on CPU makes some fifteen passes over [B, heads, T, S] scores and keeps two of them for the backward pass,
half of the time of a small model's step at T = 256. Here a block of scores lives in the cache, and a block where
nothing may be seen, above the diagonal or between sequences packed into one row, costs nothing. Dao et al. 2205.14135.

Legend: B rows, T queries, S keys, K kv heads, G queries per kv head, H head dim.
"""

from __future__ import annotations

import subprocess
from functools import lru_cache, partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from cabochon.model import native


@lru_cache(maxsize=1)
def missing() -> str:
    """Why it cannot be used in this process, or an empty string once it is registered with XLA."""
    try:
        library = native.built(Path(__file__).with_suffix(".cc"))
    except (OSError, subprocess.SubprocessError) as error:
        return native.why_not_compiled(error)
    native.register(library, "flash", "flash_grad")
    return ""


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    allow_BTS: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T K G H"]:
    """softmax(scale * q k, over what is allowed) v; 0 for a query that may see nothing."""
    return _forward(q_BTKGH, k_BSKH, v_BSKH, allow_BTS, scale)[0]


def _forward(q: Array, k: Array, v: Array, allow: Array, scale: float) -> tuple[Array, Array]:
    out = jax.ShapeDtypeStruct(q.shape, np.float32), jax.ShapeDtypeStruct(q.shape[:-1], np.float32)
    y, lse = jax.ffi.ffi_call("cabochon_flash", out)(q, k, v, allow, scale=np.float32(scale))
    return y, lse


def _kept(q: Array, k: Array, v: Array, allow: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    y, lse = _forward(q, k, v, allow, scale)
    return y, (q, k, v, allow, y, lse)


def _backward(scale: float, kept: tuple[Array, ...], from_BTKGH: Array) -> tuple[Array, Array, Array, None]:
    q, k = kept[:2]
    by_head = jax.ShapeDtypeStruct((*k.shape[:3], q.shape[3], k.shape[3]), np.float32)
    out = jax.ShapeDtypeStruct(q.shape, np.float32), by_head, by_head
    dq, dk, dv = jax.ffi.ffi_call("cabochon_flash_grad", out)(*kept, from_BTKGH, scale=np.float32(scale))
    return dq, dk.sum(3), dv.sum(3), None


attend.defvjp(_kept, _backward)
