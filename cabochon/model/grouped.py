"""Products of rows grouped by expert on CPU, f32: BLAS over exactly the rows of each, through `jax.ffi` (grouped.cc);
and the gradient of SwiGLU in one pass.

Why: XLA on CPU has no ragged product (its `ragged_dot` computes every expert for every row), and what can be built of
static shapes either drops rows or pays for the fullest expert. Here an expert costs what its rows cost. The BLAS is
the one that scipy brings, which jaxlib itself calls for linear algebra.

Legend: S rows sorted by expert, E experts, I and O sizes of a row before and after.
"""

from __future__ import annotations

import ctypes
import subprocess
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jaxtyping import Array

from cabochon.model import native


@lru_cache(maxsize=1)
def missing() -> str:
    """Why the products cannot be used in this process, or an empty string once they are registered with XLA."""
    try:
        from scipy.linalg import cython_blas

        library = native.built(Path(__file__).with_suffix(".cc"))
        library.cabochon_use_sgemm(_address(cython_blas.__pyx_capi__["sgemm"]))
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        return native.why_not_compiled(error)
    native.register(library, "rows", "outer", "swiglu_grad")
    # grouped.cc shares the work out among XLA's threads; OpenBLAS's own would spin beside them
    threadpoolctl.ThreadpoolController().select(internal_api="openblas").limit(limits=1)
    return ""


def _address(capsule: object) -> ctypes.c_void_p:
    """The C function inside a capsule of Cython's, the way jaxlib takes scipy's functions."""
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.c_void_p(pointer(capsule, name(capsule)))


def rows(x_SI: Array, w_EIO: Array, counts_E: Array, turned: bool = False) -> Array:
    """[S, O]: each group's rows times its expert's matrix, given as [O, I] if `turned`. Rows in no group are 0."""
    out = jax.ShapeDtypeStruct((x_SI.shape[0], w_EIO.shape[1 if turned else 2]), jnp.float32)
    return jax.ffi.ffi_call("cabochon_rows", out)(x_SI, w_EIO, counts_E, turned=np.bool_(turned))


def outer(a_SI: Array, b_SO: Array, counts_E: Array) -> Array:
    """[E, I, O]: the transpose of a group's rows of `a` times its rows of `b`; 0 for an expert without rows."""
    out = jax.ShapeDtypeStruct((counts_E.shape[0], a_SI.shape[1], b_SO.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("cabochon_outer", out)(a_SI, b_SO, counts_E)


def swiglu_grad(h_S2F: Array, from_SF: Array, scale_S: Array) -> tuple[Array, Array, Array]:
    """For a = silu(gate) * up and h = [gate, up]: (scale * a [S, F], gradient of h [S, 2F], a . from [S]), where
    scale * from is the gradient of a. The last is the gradient of scale, where a's product is scaled."""
    (S, F), f32 = from_SF.shape, jnp.float32
    out = jax.ShapeDtypeStruct((S, F), f32), jax.ShapeDtypeStruct((S, 2 * F), f32), jax.ShapeDtypeStruct((S,), f32)
    scaled_SF, dh_S2F, dscale_S = jax.ffi.ffi_call("cabochon_swiglu_grad", out)(h_S2F, from_SF, scale_S)
    return scaled_SF, dh_S2F, dscale_S
