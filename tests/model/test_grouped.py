"""Products of grouped rows against numpy in f64: sizes on both sides of the pieces that sums are cut into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.model import grouped

pytestmark = pytest.mark.skipif(bool(grouped.missing()), reason=grouped.missing() or "they are there")
COUNTS = (5, 0, 11, 1)


def spread(counts):
    return np.repeat(np.arange(len(counts)), counts)


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [np.array(jax.random.normal(k, s)) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("inner", [1, 63, 64, 65, 150])
def test_rows(inner, turned):
    x, w = arrays((20, inner), (len(COUNTS), inner, 130))
    want = np.zeros((20, 130))
    want[:17] = np.einsum("si,sio->so", x[:17].astype(np.float64), w[spread(COUNTS)].astype(np.float64))
    given = w.transpose(0, 2, 1) if turned else w
    got = jax.jit(grouped.rows, static_argnums=3)(x, given, jnp.array(COUNTS, jnp.int32), turned)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_outer():
    a, b = arrays((20, 70), (20, 130))
    got = jax.jit(grouped.outer)(a, b, jnp.array(COUNTS, jnp.int32))
    for e in range(len(COUNTS)):
        mine = np.flatnonzero(spread(COUNTS) == e)
        np.testing.assert_allclose(got[e], a[mine].astype(np.float64).T @ b[mine].astype(np.float64), atol=2e-5)


def test_one_large_activation_spoils_little_of_a_value():
    """As at SmolLM2's first token. Summed in one go, all that follows is rounded at the large one's size."""
    x, w = arrays((16, 1536), (1, 1536, 64))
    x[:, 0] = 5000.0
    counts = jnp.array([16], jnp.int32)
    want = x.astype(np.float64) @ w[0].astype(np.float64)
    short = np.asarray(jax.jit(grouped.rows)(x, w, counts)) - want
    whole = np.asarray(jax.jit(grouped.rows, static_argnums=3)(x, w.transpose(0, 2, 1), counts, True)) - want
    rms = [np.sqrt(np.square(e).mean()) for e in (short, whole)]
    assert rms[0] < 0.6 * rms[1], rms
