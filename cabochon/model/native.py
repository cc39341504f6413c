"""Decode kernels in C++ for CPUs with AVX-512, compiled at first use and called through `jax.ffi` (native.cc).

Why: at 8 to 64 rows XLA's matmuls on CPU reach a third of the machine, its bf16 is slower than its f32, a slice of a
cache is a copy, and experts are a loop of many small steps. Here weights are packed once, in f32 or bf16 (products of
bf16 pairs, sums in f32), rows that are not live cost nothing, and attention reads each row's own positions only.

Legend: K inputs, N outputs, P panels of 32 columns, M rows, B rows, T tokens, S cache positions, G queries per kv head,
H head dim, D model, F ffn, E experts, C experts per token. Activations are f32 throughout.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array

from cabochon import target

COLUMNS = 32
"""of a panel"""
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-w")
BUILD_SECONDS = 120
MAX_HEAD_DIM = 256


def missing() -> str:
    """Why the kernels cannot be used here, or an empty string once they are compiled and registered with XLA."""
    if target.platform() != "cpu":
        return f"they are for CPUs, the backend is {target.platform()}"
    return _missing_on_this_cpu()


@lru_cache(maxsize=1)
def _missing_on_this_cpu() -> str:
    if "avx512bw" not in _cpu_flags():
        return "this CPU has no AVX-512"
    try:
        library = built(Path(__file__).with_suffix(".cc"))
    except (OSError, subprocess.SubprocessError) as error:
        return why_not_compiled(error)
    register(library, "multiply", "experts", "attend")
    return ""


def why_not_compiled(error: Exception) -> str:
    """One line about what `built` raised."""
    detail = getattr(error, "stderr", None) or error
    return f"they could not be compiled: {str(detail).strip().splitlines()[0][:200]}"


def register(library: ctypes.CDLL, *names: str) -> None:
    """Make the library's `cabochon_NAME` callable by `jax.ffi.ffi_call("cabochon_NAME", ...)`."""
    for name in names:
        jax.ffi.register_ffi_target(
            f"cabochon_{name}", jax.ffi.pycapsule(getattr(library, f"cabochon_{name}")), platform="cpu"
        )


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def built(source: Path) -> ctypes.CDLL:
    """The library of a C++ source for this CPU and JAX, from the user's cache or compiled into it now.

    Raises OSError where there is no compiler or no place to keep it, SubprocessError where it does not compile.
    """
    texts = (path.read_text() for path in [source, *sorted(source.parent.glob("*.h"))])
    parts = (*texts, jax.__version__, *FLAGS, *sorted(_cpu_flags()))
    name = f"{source.stem}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cabochon"
    if not (folder / name).exists():
        _compile(source, folder / name)
    return ctypes.cdll.LoadLibrary(str(folder / name))


def _compile(source: Path, to: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++, clang++, or CXX)")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as temporary:
        made = Path(temporary) / to.name
        subprocess.run(
            [compiler, *FLAGS, "-I", jax.ffi.include_dir(), str(source), "-o", str(made)],
            check=True, capture_output=True, text=True, timeout=BUILD_SECONDS,
        )  # fmt: skip
        made.rename(to)  # several processes may build it at once; each replaces it whole


# -- packing (host) ----------------------------------------------------------------------------------------------------


def pack(w: np.ndarray, dtype: str) -> np.ndarray:
    """[..., K, N] -> f32 [..., P, K, 32] or bf16 [..., P, K/2, 32, 2], padded with zeros."""
    *lead, K, N = w.shape
    panels = -(-N // COLUMNS)
    pairs = 1 if dtype == "float32" else 2
    rows = -(-K // pairs)
    w = np.asarray(w, np.float32 if pairs == 1 else ml_dtypes.bfloat16)
    full = np.zeros((*lead, rows * pairs, panels * COLUMNS), w.dtype)
    full[..., :K, :N] = w
    tiles = np.moveaxis(full.reshape(*lead, rows, pairs, panels, COLUMNS), (-2, -4, -1, -3), (-4, -3, -2, -1))
    return np.ascontiguousarray(tiles.reshape(*lead, panels, rows, COLUMNS) if pairs == 1 else tiles)


def pack_gated(gate_up: np.ndarray, dtype: str) -> np.ndarray:
    """[..., D, 2, F], packed so that a panel holds 16 gate columns and the 16 up columns beside them."""
    *lead, D, _, F = gate_up.shape
    half = COLUMNS // 2
    panels = -(-F // half)
    full = np.zeros((*lead, D, 2, panels * half), gate_up.dtype)
    full[..., :F] = gate_up
    beside = np.moveaxis(full.reshape(*lead, D, 2, panels, half), -3, -2)
    return pack(beside.reshape(*lead, D, panels * COLUMNS), dtype)


def pack_down(down: np.ndarray, dtype: str) -> np.ndarray:
    """[..., F, D] with F padded as `pack_gated` pads it."""
    *lead, F, D = down.shape
    full = np.zeros((*lead, -(-F // (COLUMNS // 2)) * (COLUMNS // 2), D), down.dtype)
    full[..., :F, :] = down
    return pack(full, dtype)


# -- calls (inside jit) ------------------------------------------------------------------------------------------------


def multiply(x: Array, live: Array, packed: Array, columns: int) -> Array:
    """f32 [..., K] times what `pack` made of [K, columns]; rows that are not live (bool [...]) give zeros."""
    out = jax.ShapeDtypeStruct((*x.shape[:-1], columns), jnp.float32)
    return jax.ffi.ffi_call("cabochon_multiply", out)(x, live, packed)


def experts(x_ND: Array, routes_NC: Array, gates_NC: Array, up: Array, down: Array) -> Array:
    """Sum over a token's experts of gate * SwiGLU expert, [N, D]; a route outside [0, E) contributes nothing."""
    out = jax.ShapeDtypeStruct(x_ND.shape, jnp.float32)
    return jax.ffi.ffi_call("cabochon_experts", out)(x_ND, routes_NC, gates_NC, up, down)


def attend(
    q_BTKGH: Array, k_BKSH: Array, v_BKSH: Array, position_BT: Array, live_BT: Array, scale: float, window: int
) -> Array:
    """Attention of each token over cache positions up to its own, at most `window` back (0: all); f32 [B,T,K,G,H]."""
    out = jax.ShapeDtypeStruct(q_BTKGH.shape, jnp.float32)
    call = jax.ffi.ffi_call("cabochon_attend", out)
    return call(q_BTKGH, k_BKSH, v_BKSH, position_BT, live_BT, scale=np.float32(scale), window=np.int64(window))


def linear(live: Array, outs: tuple[int, ...], x: Array, packed: Array, ins: int) -> Array:
    """`multiply` over `ins` trailing dims of x, with named output dims."""
    lead = x.shape[: x.ndim - ins]
    flat = x.reshape(*lead, math.prod(x.shape[x.ndim - ins :]))
    return multiply(flat, live, packed, math.prod(outs)).reshape(*lead, *outs)
