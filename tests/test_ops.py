"""Token log-probs and means against hand-worked numbers (algorithms.md sections 1, 2, 20: sft, pack, entropy)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import rows_stand_alone

from cabochon.ops import Mean, before, has_target, masked_mean, segment_sum, token_outputs


def identity(h):
    return h


def test_targets_stay_inside_their_segment():
    got = has_target(jnp.array([[1, 1, 1, 2, 2, 0]]))[0]
    # seen from the target: the valid-target mask [1 1 0 1 0 0] of the source position, shifted by one
    np.testing.assert_array_equal(got, [False, True, True, False, True, False])


def test_log_prob_comes_from_the_hidden_state_before():
    hidden = jnp.array([[[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]]])
    out = token_outputs(hidden, jnp.array([[2, 0]]), jnp.ones((1, 2), jnp.int32), identity, entropy=True)
    np.testing.assert_allclose(out.logp_BT, [[0.0, -0.407606]], atol=1e-6)
    np.testing.assert_allclose(out.lse_BT[0, 1] ** 2, 5.796566, atol=1e-5)
    np.testing.assert_allclose(out.entropy_BT, [[0.0, 0.832396]], atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 6, 8, 100])
def test_chunks_change_nothing(chunk):
    k = jax.random.split(jax.random.key(0), 3)
    hidden, w = jax.random.normal(k[0], (2, 7, 5)), jax.random.normal(k[1], (5, 11))
    tokens = jax.random.randint(k[2], (2, 7), 0, 11)
    segment = jnp.array([[1, 1, 1, 2, 2, 2, 0], [1] * 7])

    def run(chunk):
        def loss(hidden, w):
            out = token_outputs(hidden, tokens, segment, lambda h: h @ w, chunk=chunk, entropy=True)
            return (out.logp_BT * jnp.arange(7.0)).sum() + (out.entropy_BT * out.lse_BT).sum(), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, w)

    for a, b in zip(jax.tree.leaves(run(chunk)), jax.tree.leaves(run(0)), strict=True):
        # with AVX2 a row by itself is another kernel's, which rounds otherwise: one ulp of a logit is 8 of a gradient
        np.testing.assert_allclose(a, b, atol=1e-5 if rows_stand_alone() else max(1e-5, 2e-6 * float(abs(b).max())))


@pytest.mark.parametrize("chunk", [0, 1, 6])
def test_candidates_are_read_from_the_same_distribution(chunk):
    k = jax.random.split(jax.random.key(1), 3)
    hidden, w = jax.random.normal(k[0], (2, 7, 5)), jax.random.normal(k[1], (5, 11))
    tokens = jax.random.randint(k[2], (2, 7), 0, 11)
    segment = jnp.array([[1, 1, 1, 2, 2, 2, 0], [1] * 7])
    candidates = jnp.stack([tokens, jnp.full_like(tokens, 3), jnp.full_like(tokens, -1)], -1)
    out = token_outputs(hidden, tokens, segment, lambda h: h @ w, chunk=chunk, candidates_BTK=candidates)
    np.testing.assert_allclose(out.candidates_BTK[..., 0], out.logp_BT, atol=1e-5)
    want = jax.nn.log_softmax(jnp.roll(hidden, 1, axis=1) @ w)[..., 3]
    np.testing.assert_allclose(out.candidates_BTK[..., 1], want * has_target(segment), atol=1e-5)
    assert not out.candidates_BTK[..., 2].any()


def test_means_add_before_they_divide():
    shards = [Mean(jnp.array(1.0 + 2 + 3), jnp.array(3.0)), Mean(jnp.array(4.0), jnp.array(1.0))]
    assert float((shards[0] + shards[1]).value) == 2.5


def test_nothing_counted_is_zero_with_a_finite_gradient():
    def value(x):
        return masked_mean(jnp.log(x), jnp.zeros(2)).value

    x = jnp.array([0.0, 1.0])
    assert float(value(x)) == 0
    assert jnp.isfinite(jax.grad(value)(jnp.array([0.5, 1.0]))).all()


def test_garbage_under_the_mask_is_not_read():
    got = masked_mean(jnp.array([jnp.nan, 3.0, 5.0]), jnp.array([0.0, 1.0, 3.0]))
    assert float(got.value) == pytest.approx((3 + 15) / 4)


SEGMENTS = jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])


def test_the_state_before_a_token_is_that_of_its_own_segment():
    x = jnp.arange(12.0).reshape(2, 6) + 1
    np.testing.assert_array_equal(before(x, SEGMENTS), [[0, 1, 0, 3, 4, 0], [0, 7, 8, 9, 10, 11]])


def test_sums_are_per_segment_never_per_row():
    x = jnp.arange(12.0).reshape(2, 6)
    np.testing.assert_array_equal(segment_sum(x, SEGMENTS), [[1, 1, 9, 9, 9, 0], [51] * 6])
    weight = jnp.arange(12.0).reshape(2, 6)
    got = jax.grad(lambda x: (segment_sum(x, SEGMENTS) * weight).sum())(x)
    np.testing.assert_array_equal(got, segment_sum(weight, SEGMENTS))
