"""Rotary scaling, masks and norms against hand-worked numbers (algorithms.md section 14, rope.* yarn.* gqa.*)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cabochon.model.config import RopeConfig
from cabochon.model.layers import Attention, Linear, RMSNorm, may_attend, rope_frequencies, rotate
from cabochon.testing import tiny_config


@pytest.mark.parametrize(
    ("cfg", "want"),
    [
        (RopeConfig(), [1, 0.01]),
        (RopeConfig(kind="linear", factor=4), [0.25, 0.0025]),
        (RopeConfig(kind="ntk", factor=4), [1, 0.0025]),
    ],
)
def test_frequencies(cfg, want):
    got, scale = rope_frequencies(cfg, 4)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert scale == 1


def test_yarn():
    got, scale = rope_frequencies(RopeConfig(kind="yarn", factor=4, original_max_positions=2048), 8)
    np.testing.assert_allclose(got, [1, 0.1, 0.00625, 0.00025], rtol=1e-5)
    assert scale == pytest.approx(1.138629, abs=1e-6)


def test_llama3_leaves_high_frequencies_and_divides_low_ones():
    cfg = RopeConfig(kind="llama3", theta=500_000, factor=8, original_max_positions=8192)
    plain, _ = rope_frequencies(RopeConfig(theta=500_000), 128)
    got, _ = rope_frequencies(cfg, 128)
    wave = 2 * np.pi / plain
    np.testing.assert_allclose(got[wave < 2048], plain[wave < 2048], rtol=1e-6)
    np.testing.assert_allclose(got[wave > 8192], plain[wave > 8192] / 8, rtol=1e-6)
    middle = (wave > 2048) & (wave < 8192)
    assert (got[middle] < plain[middle]).all()
    assert (got[middle] > plain[middle] / 8).all()


def test_rotation_makes_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    inv, _ = rope_frequencies(RopeConfig(), 8)

    def score(i, j):
        angle = lambda p: jnp.full((1, 1, 1), p, jnp.float32) * inv  # noqa: E731
        return (rotate(q, jnp.cos(angle(i)), jnp.sin(angle(i))) * rotate(k, jnp.cos(angle(j)), jnp.sin(angle(j)))).sum()

    np.testing.assert_allclose(score(5, 2), score(1003, 1000), atol=1e-4)
    assert abs(float(score(5, 2) - score(5, 4))) > 1e-3


def test_rms_norm_is_exact_and_finite_on_zeros():
    norm = RMSNorm((4,), (None,), 1e-5, nnx.Rngs(0))
    norm.scale[...] = jnp.array([1.0, 2.0, 1.0, 1.0])
    x = jnp.array([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(norm(x), [[1.2, 3.2, 0, 0], [0, 0, 0, 0]], atol=1e-5)


def test_who_may_attend():
    position = jnp.array([[0, 1, 2, 0, 1, 0]])
    segment = jnp.array([[1, 1, 1, 2, 2, 0]])
    got = may_attend(position, position, segment, segment)[0].astype(int)
    want = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0] * 6]
    np.testing.assert_array_equal(got, want)
    narrow = may_attend(position, position, segment, segment, window=2)[0].astype(int)
    np.testing.assert_array_equal(narrow[2], [0, 1, 1, 0, 0, 0])


def test_a_query_with_nothing_to_see_is_finite_in_value_and_gradient():
    cfg = tiny_config()
    attn = Attention(cfg, nnx.Rngs(0), (), None, None)
    q, k, v = jnp.ones((1, 2, 2, 2, 8)), jnp.ones((1, 2, 2, 8)), jnp.ones((1, 2, 2, 8))
    none = jnp.zeros((1, 2, 2), bool)
    grad = jax.grad(lambda q: attn.attend(q, k, v, none).sum())(q)
    assert jnp.isfinite(grad).all()
    assert jnp.isfinite(attn.attend(q, k, v, none)).all()


def test_query_head_h_reads_kv_head_h_over_group():
    cfg = tiny_config(dim=8, num_heads=8, num_kv_heads=2, head_dim=4)
    attn = Attention(cfg, nnx.Rngs(0), (), None, None)
    x = jax.random.normal(jax.random.key(0), (1, 1, 8))
    cos, sin = jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 2))
    _, k, _ = attn.project(x, cos, sin)
    one = jnp.ones((1, 1, 1), bool)

    def head(v, h):  # what query head h adds to the output when only the values are v
        w = jnp.zeros_like(attn.out.w[...]).at[h // 4, h % 4].set(attn.out.w[...][h // 4, h % 4])
        return jnp.einsum("kh,kghd->d", v[0, 0], w), one

    v = jnp.arange(8.0).reshape(1, 1, 2, 4)
    whole = attn.attend(attn.project(x, cos, sin)[0], k, v, one)[0, 0]
    np.testing.assert_allclose(sum(head(v, h)[0] for h in range(8)), whole, atol=1e-5)


def test_lora_starts_as_nothing_and_adds_a_b_alpha_over_rank():
    plain = Linear((4,), (3,), (None, None), nnx.Rngs(0))
    low = Linear((4,), (3,), (None, None), nnx.Rngs(0), lora=(2, 6.0))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    np.testing.assert_array_equal(low(x), x @ low.w[...])
    low.lora_b[...] = jnp.ones((2, 3))
    np.testing.assert_allclose(low(x), x @ (low.w[...] + 3.0 * low.lora_a[...] @ jnp.ones((2, 3))), atol=1e-5)
    assert plain.w.shape == (4, 3)
