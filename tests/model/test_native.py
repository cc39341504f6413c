"""The C++ decode kernels against plain arithmetic, in f32 and bf16, and that a row never sees its neighbours."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.model import dispatch, native

NATIVE = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
BF16 = "bfloat16"
DTYPES = ["float32", BF16]


def rounded(x, dtype):
    return np.asarray(jnp.asarray(x, dtype), np.float64)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 5, 3), (7, 33, 40), (32, 64, 96), (40, 31, 65)])
def test_multiply(dtype, M, K, N):
    rng = np.random.default_rng(M)
    x, w = rng.normal(size=(M, K)).astype(np.float32), rng.normal(size=(K, N)).astype(np.float32)
    live = rng.random(M) < 0.8
    got = native.multiply(jnp.asarray(x), jnp.asarray(live), jnp.asarray(native.pack(w, dtype)), N)
    want = (rounded(x, dtype) @ rounded(w, dtype)) * live[:, None]
    np.testing.assert_allclose(got, want, atol=2e-5)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company(dtype):
    """Alone, among 2 to 40 others, and whoever of them is live."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(40, 70)).astype(np.float32), rng.normal(size=(70, 50)).astype(np.float32)
    packed = jnp.asarray(native.pack(w, dtype))
    whole = np.asarray(native.multiply(jnp.asarray(x), jnp.ones(40, bool), packed, 50))
    for M in range(1, 40):
        at = int(rng.integers(0, 40 - M))
        live = rng.random(M) < 0.7
        part = np.asarray(native.multiply(jnp.asarray(x[at : at + M]), jnp.asarray(live), packed, 50))
        np.testing.assert_array_equal(part[live], whole[at : at + M][live])
        assert (part[~live] == 0).all()


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C", "D", "F", "E"), [(1, 2, 20, 24, 4), (33, 2, 48, 40, 8), (300, 3, 32, 16, 5)])
def test_experts(dtype, N, C, D, F, E):
    """Against the dense reference at the rounded weights; some tokens go nowhere, one expert may get nothing."""
    rng = np.random.default_rng(N)
    x = rng.normal(size=(N, D)).astype(np.float32)
    up, down = rng.normal(size=(E, D, 2, F)) / D**0.5, rng.normal(size=(E, F, D)) / F**0.5
    routes = np.argsort(rng.random((N, E)), 1)[:, :C].astype(np.int32)
    routes[rng.random(N) < 0.2] = -1
    gates = rng.random((N, C)).astype(np.float32)
    got = dispatch.experts(
        jnp.asarray(x), jnp.asarray(routes), jnp.asarray(gates), jnp.asarray(native.pack_gated(up, dtype)),
        jnp.asarray(native.pack_down(down, dtype)), "native",
    )  # fmt: skip
    exact = (jnp.asarray(rounded(a, dtype), jnp.float32) for a in (up, down))
    want = dispatch.experts(
        jnp.asarray(rounded(x, dtype), jnp.float32), jnp.asarray(routes), jnp.asarray(gates), *exact, "dense"
    )
    # bf16 rounds the hidden activations too: half a unit in the 9th bit of each
    np.testing.assert_allclose(got, want, atol=2e-5 if dtype == "float32" else 2e-2)
    few = dispatch.experts(
        jnp.asarray(x[:1]), jnp.asarray(routes[:1]), jnp.asarray(gates[:1]), jnp.asarray(native.pack_gated(up, dtype)),
        jnp.asarray(native.pack_down(down, dtype)), "native",
    )  # fmt: skip
    np.testing.assert_array_equal(few[0], got[0])


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "K", "G", "H", "S", "window"),
    [(3, 1, 2, 3, 8, 40, 0), (1, 37, 1, 2, 64, 50, 9), (2, 5, 2, 1, 72, 33, 0)],
)
def test_attend(dtype, B, T, K, G, H, S, window):
    rng = np.random.default_rng(T)
    q = rng.normal(size=(B, T, K, G, H)).astype(np.float32)
    k, v = (jnp.asarray(rng.normal(size=(B, K, S, H)), dtype) for _ in "kv")
    position, live = rng.integers(0, S, (B, T)).astype(np.int32), rng.random((B, T)) < 0.8
    got = native.attend(jnp.asarray(q), k, v, jnp.asarray(position), jnp.asarray(live), H**-0.5, window)
    score = np.einsum("btkgh,bksh->btkgs", q, rounded(k, dtype)) * H**-0.5
    back = position[..., None] - np.arange(S)
    score = np.where(((back >= 0) & (back < (window or S)))[:, :, None, None], score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    want = np.einsum("btkgs,bksh->btkgh", weight / weight.sum(-1, keepdims=True), rounded(v, dtype))
    np.testing.assert_allclose(got, want * live[..., None, None, None], atol=3e-6)


@NATIVE
def test_silu_far_from_zero():
    """Gates of -1e4 to 1e4: silu neither overflows nor leaves 0 and x."""
    gate = np.array([-1e4, -200, -88, -30, -1, 0, 1, 30, 88, 1e4], np.float32)
    up = native.pack_gated(np.stack([gate, np.ones_like(gate)])[None, None], "float32")  # one expert, D = 1
    down = native.pack_down(np.ones((1, len(gate), 1)), "float32")
    one, here = jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.int32)
    got = dispatch.experts(one, here, one, jnp.asarray(up), jnp.asarray(down), "native")
    with np.errstate(over="ignore"):
        want = (gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64)))).sum()
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-6)
    assert np.isfinite(got).all()


def test_without_a_compiler_it_says_so(tmp_path):
    """An empty cache and a compiler that fails: a reason, no exception, and `auto` runs XLA's kernels."""
    code = (
        "from cabochon.model import native; from cabochon.rollouts.slots import SlotConfig\n"
        "print(SlotConfig().native, '|', native.missing())\n"
        "try: SlotConfig(kernels='native').native\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "/bin/false"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("False | ")
    assert "UserError kernels=native cannot run here" in out.stdout
    assert list(tmp_path.rglob("*.so")) == []


def test_cpu_is_the_backend_under_test():
    assert jax.default_backend() == "cpu"
