"""Attention without its scores in memory equals the plain form, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.model import flash


def problem(B, T, S, K, G, H, length, seed=0):
    """Queries that stand at the end of the keys; sequences of `length` packed into a row. One query sees nothing."""
    keys = jax.random.split(jax.random.key(seed), 4)
    q, weight = (jax.random.normal(k, (B, T, K, G, H)) for k in keys[:2])
    k, v = (jax.random.normal(k, (B, S, K, H)) for k in keys[2:])
    i, j = np.arange(T)[:, None] + (S - T), np.arange(S)
    allow = np.broadcast_to((i >= j) & (i // length == j // length), (B, T, S)).copy()
    allow[0, T // 2] = False
    return q, k, v, jnp.asarray(allow), weight


def plain(q, k, v, allow, scale):
    """The definition."""
    scores = jnp.where(allow[:, None, None], jnp.einsum("btkgh,bskh->bkgts", q, k) * scale, -jnp.inf)
    weights = jnp.exp(scores - jnp.maximum(scores.max(-1, keepdims=True), -1e30))
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v)


def value_and_grads(attend, q, k, v, allow, weight, scale):
    def scalar(q, k, v):
        y = attend(q, k, v, allow, scale)
        return (y * weight).sum(), y

    grads, y = jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x) for x in (y, *grads)]


def exactly(q, k, v, allow, weight, scale):
    """The plain form in f64."""
    with jax.enable_x64(True):
        q, k, v, weight = (jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v, weight))
        return value_and_grads(plain, q, k, v, allow, weight, scale)


@pytest.mark.parametrize(
    ("B", "T", "S", "K", "G", "H", "length"),
    [
        (2, 5, 5, 1, 2, 8, 100),  # less than a block, less than a vector
        (2, 64, 64, 2, 1, 16, 100),  # one block exactly
        (1, 130, 130, 3, 3, 64, 37),  # packed, blocks that end in the middle
        (2, 200, 200, 1, 2, 24, 64),  # packed at the blocks' borders
        (1, 70, 200, 2, 1, 80, 1000),  # after what is in a cache
        (1, 1, 150, 1, 4, 32, 1000),  # one token of it
    ],
)
def test_equals_the_plain_form(B, T, S, K, G, H, length):
    """Against f64: by 1e-6 of the largest value, what sums of some hundred terms in f32 leave."""
    assert flash.missing() == ""
    q, k, v, allow, weight = problem(B, T, S, K, G, H, length)
    got = value_and_grads(flash.attend, q, k, v, allow, weight, H**-0.5)
    for x, y in zip(got, exactly(q, k, v, allow, weight, H**-0.5), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6 * max(1.0, np.abs(y).max()))
    assert not got[0][0, T // 2].any()
    assert not got[1][0, T // 2].any()


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e3])
def test_scores_of_every_size(size):
    """Where all are alike, and where one key takes everything. Half a unit in the last place of a score is a relative
    error of its weight; a score's sum of 16 terms is allowed eight halves."""
    q, k, v, allow, weight = problem(1, 100, 100, 1, 1, 16, 1000)
    got = value_and_grads(flash.attend, q * size, k, v, allow, weight, 1.0)
    largest = float(jnp.abs(jnp.einsum("btkgh,bskh->bkgts", q * size, k)).max())
    for x, y in zip(got, exactly(q * size, k, v, allow, weight, 1.0), strict=True):
        assert np.abs(x - y).max() <= max(1.0, np.abs(y).max()) * (1e-6 + 8 * 2**-24 * largest)


def test_what_is_not_finite_stays_so():
    """And only there: a row beside it is untouched. So that the learner can name what broke."""
    q, k, v, allow, weight = problem(2, 70, 70, 1, 2, 16, 1000)
    clean = value_and_grads(flash.attend, q, k, v, allow, weight, 0.25)
    broken = value_and_grads(flash.attend, q.at[0, 69, 0, 0, 3].set(jnp.nan), k, v, allow, weight, 0.25)
    assert np.isnan(broken[0][0, 69, 0, 0]).all()
    for x, y in zip(clean, broken, strict=True):
        assert np.array_equal(x[1], y[1])
    assert np.isnan(broken[2][0]).any()


def test_is_the_same_however_often_it_is_asked():
    q, k, v, allow, weight = problem(4, 130, 130, 2, 2, 24, 50)
    first, *rest = (value_and_grads(flash.attend, q, k, v, allow, weight, 0.2) for _ in range(3))
    for other in rest:
        assert all(np.array_equal(x, y) for x, y in zip(first, other, strict=True))


def test_another_number_format_is_refused():
    """Not read as if it were f32."""
    q, k, v, allow, _ = problem(1, 5, 5, 1, 1, 8, 100)
    with jax.enable_x64(True), pytest.raises(jax.errors.JaxRuntimeError, match="dtype"):
        jax.block_until_ready(flash.attend(jnp.asarray(np.asarray(q), jnp.float64), k, v, allow, 1.0))
