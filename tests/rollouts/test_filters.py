"""Filters against numbers worked by hand, and the draw against its own distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.rollouts.filters import Knobs, draw, filtered, pick

P = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])


def knobs(rows=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, bias=()):
    ids, values = np.full((rows, 4), 10**6, np.int32), np.zeros((rows, 4), np.float32)
    for i, (token, value) in enumerate(bias):
        ids[:, i], values[:, i] = token, value
    full = [np.full(rows, x, d) for x, d in ((temperature, "f4"), (top_k, "i4"), (top_p, "f4"), (min_p, "f4"))]
    return Knobs(*map(jnp.asarray, (*full, ids, values)))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 6),
        ({"top_k": 3}, 3),
        ({"top_k": 6}, 6),
        ({"top_k": 100}, 6),
        ({"top_p": 0.3}, 1),  # the likeliest alone has 0.4
        ({"top_p": 0.5}, 2),  # 0.4 is not enough, 0.65 is
        ({"top_p": 0.79}, 3),
        ({"top_p": 0.81}, 4),
        ({"top_p": 0.999}, 6),
        ({"min_p": 0.3}, 3),  # at least 0.12
        ({"min_p": 1.0}, 1),
        ({"top_k": 2, "top_p": 0.6}, 1),  # of 0.65 the first has 0.615
        ({"top_k": 2, "top_p": 0.62}, 2),
        ({"top_k": 4, "min_p": 0.5}, 2),
    ],
)
def test_what_each_filter_keeps(settings, kept):
    order = np.random.default_rng(0).permutation(6)  # thresholds, not places, decide
    z = np.log(P).astype(np.float32)[order][None]
    got = np.asarray(filtered(jnp.asarray(z), knobs(**settings)))[0]
    np.testing.assert_array_equal(np.isfinite(got), (order < kept))
    np.testing.assert_array_equal(got[order < kept], z[0][order < kept])


def test_rows_have_settings_of_their_own_and_ties_stay():
    z = jnp.asarray(np.log(np.stack([P, P, np.full(6, 1 / 6)])), jnp.float32)
    three = knobs(3)._replace(top_k_B=jnp.array([0, 2, 3], jnp.int32), top_p_B=jnp.array([0.5, 1, 1], jnp.float32))
    got = np.isfinite(np.asarray(filtered(z, three)))
    assert got.sum(-1).tolist() == [2, 2, 6]


def test_negative_huge_and_refused_logits():
    z = jnp.array([[-3.0, 1e30, -jnp.inf, -0.0, 0.0, -1e30]], jnp.float32)
    # zero has two signs; the filter orders them, +0 first
    assert np.isfinite(np.asarray(filtered(z, knobs(top_k=3)))).tolist() == [[False, True, False, True, True, False]]
    assert np.isfinite(np.asarray(filtered(z, knobs(top_k=1)))).tolist() == [[False, True, False, False, False, False]]


def test_log_probs_are_of_the_distribution_drawn_from_and_of_the_policy():
    z = jnp.asarray(np.log(P), jnp.float32)[None]
    no_ban, u, live = jnp.full((1, 1), 99), jnp.array([[0.0, 0.99]], jnp.float32), jnp.array([True])
    # one block of columns: the second uniform decides, and 0.99 takes the last token that is left
    got = draw(z, knobs(top_k=2, temperature=0.5), no_ban, u, live)
    p = P[:2] ** 2 / (P[:2] ** 2).sum()
    assert int(got.token_B[0]) == 1
    np.testing.assert_allclose(got.logp_B[0], np.log(p[1]), rtol=1e-5)
    np.testing.assert_allclose(got.raw_logp_B[0], np.log(0.25), rtol=1e-5)

    got = draw(z, knobs(bias=[(5, 4.0), (0, -100.0)]), no_ban, u, live)
    biased = P * np.exp([-100, 0, 0, 0, 0, 4.0])
    assert int(got.token_B[0]) == 5
    np.testing.assert_allclose(got.logp_B[0], np.log(biased[5] / biased.sum()), rtol=1e-5)
    np.testing.assert_allclose(got.raw_logp_B[0], np.log(0.04), rtol=1e-5)

    got = draw(z, knobs(), jnp.array([[5]]), u, live)  # a banned token is not drawn, and the rest sums to one
    assert int(got.token_B[0]) == 4
    np.testing.assert_allclose(got.logp_B[0], np.log(0.06 / 0.96), rtol=1e-5)

    got = draw(z, knobs(temperature=0.0), no_ban, u, live)
    assert (int(got.token_B[0]), float(got.logp_B[0])) == (0, 0.0)
    np.testing.assert_allclose(got.raw_logp_B[0], np.log(0.4), rtol=1e-5)


def test_inversion_over_a_grid_of_uniforms_gives_the_weights():
    """300 columns, three blocks: the share of the unit square that leads to a column is its weight."""
    n = 400
    weight = np.random.default_rng(1).random(300).astype(np.float32) ** 8
    weight[[0, 7, 130, 299]] = 0.0
    grid = (np.arange(n, dtype=np.float32) + 0.5) / n
    u = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    one = jax.jit(jax.vmap(lambda u: jax.tree.map(lambda x: x[0], pick(jnp.asarray(weight)[None], u[None]))))
    token, total = one(u)
    share = np.bincount(token, minlength=300) / n**2
    np.testing.assert_allclose(total[0], weight.sum(), rtol=1e-5)
    assert share[weight == 0].sum() == 0
    np.testing.assert_allclose(share, weight / weight.sum(), atol=3 / n * 0.5)
    assert abs(share - weight / weight.sum()).sum() < 0.05


@pytest.mark.parametrize("u", [0.0, 1 - 2**-23])
def test_the_ends_of_the_uniform_never_draw_weight_zero(u):
    weight = np.zeros((1, 500), np.float32)
    weight[0, 200:300] = 1e-3
    token, _ = pick(jnp.asarray(weight), jnp.full((1, 2), u, jnp.float32))
    assert 200 <= int(token[0]) < 300
