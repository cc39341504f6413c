"""Every expert path equals the dense reference, values and gradients, whatever the router does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.model import grouped
from cabochon.model.dispatch import _blocked, block_sizes, experts

N, D, F, E, C = 96, 16, 24, 4, 2


def problem(skew: float, n: int = N, e: int = E, c: int = C):
    k = jax.random.split(jax.random.key(int(skew * 10) + n), 5)
    x = jax.random.normal(k[0], (n, D))
    gate_up = jax.random.normal(k[1], (e, D, 2, F)) / D**0.5
    down = jax.random.normal(k[2], (e, F, D)) / F**0.5
    scores, routes = jax.lax.top_k(jax.random.normal(k[3], (n, e)) + skew * jnp.arange(e), c)
    return x, routes, jax.nn.softmax(scores), gate_up, down, jax.random.normal(k[4], (n, D))


def value_and_grads(fn, x, routes, gates, gate_up, down, weight):
    def scalar(x, gates, gate_up, down):
        return (fn(x, routes, gates, gate_up, down) * weight).sum()

    y = jax.jit(fn)(x, routes, gates, gate_up, down)
    return y, jax.jit(jax.grad(scalar, (0, 1, 2, 3)))(x, gates, gate_up, down)


def loop_over_tokens(x, routes, gates, gate_up, down):
    """The definition, in numpy, a token at a time."""
    x, routes, gates, gate_up, down = (np.asarray(a, np.float64) for a in (x, routes, gates, gate_up, down))
    y = np.zeros_like(x)
    for n in range(len(x)):
        for c in range(routes.shape[1]):
            e = int(routes[n, c])
            if 0 <= e < len(down):
                g, u = x[n] @ gate_up[e, :, 0], x[n] @ gate_up[e, :, 1]
                y[n] += gates[n, c] * ((g / (1 + np.exp(-g)) * u) @ down[e])
    return y


def test_dense_reference_is_the_definition():
    x, routes, gates, gate_up, down, _ = problem(0.0)
    routes = routes.at[3].set(-1).at[5, 1].set(E)
    np.testing.assert_allclose(
        experts(x, routes, gates, gate_up, down, "dense"), loop_over_tokens(x, routes, gates, gate_up, down), atol=1e-5
    )


@pytest.mark.parametrize("skew", [0.0, 0.7, 50.0])
@pytest.mark.parametrize("path", ["ragged", "grouped", "blocked", (0, 8), (8, 8), (24, 16), (64, 32)])
def test_paths_equal_the_reference(path, skew):
    x, routes, gates, gate_up, down, weight = problem(skew)

    def run(kind):
        if isinstance(kind, tuple):
            fn = lambda *a: _blocked(kind, *a)  # noqa: E731
        else:
            fn = lambda *a: experts(*a, kind)  # noqa: E731
        return value_and_grads(fn, x, routes, gates, gate_up, down, weight)

    for got, want in zip(jax.tree.leaves(run(path)), jax.tree.leaves(run("dense")), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_gradient_of_swiglu_in_one_pass(size):
    """Against f64: activations of every size, where exp would overflow too; what is not finite stays so."""
    k = jax.random.split(jax.random.key(1), 3)
    h, u, scale = (np.asarray(jax.random.normal(k[i], s)) for i, s in enumerate([(5, 2 * F), (5, F), (5,)]))
    h = h * np.float32(size)
    assert grouped.missing() == ""
    scaled, dh, dscale = map(np.asarray, jax.jit(grouped.swiglu_grad)(h, u, scale))
    (gate, up), u, g = np.split(h.astype(np.float64), 2, -1), u.astype(np.float64), scale.astype(np.float64)[:, None]
    sigmoid = 1 / (1 + np.exp(-np.clip(gate, -700, 700)))
    act, slope = gate * sigmoid * up, sigmoid * (1 + gate * (1 - sigmoid))
    want = g * act, np.concatenate([g * u * up * slope, g * u * gate * sigmoid], -1), (act * u).sum(-1)
    for got, exact in zip((scaled, dh, dscale), want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=2e-6, atol=2e-6 * np.abs(exact).max())
    h[2, 3] = np.nan
    assert [bool(np.isfinite(x[2]).all()) for x in jax.jit(grouped.swiglu_grad)(h, u, scale)] == [False] * 3


@pytest.mark.parametrize("path", ["dense", "ragged", "grouped", "blocked"])
def test_tokens_without_an_expert_get_zero_and_no_gradient(path):
    x, routes, gates, gate_up, down, weight = problem(0.0)
    routes = routes.at[7].set(-1)
    y, (dx, dgates, _, _) = value_and_grads(lambda *a: experts(*a, path), x, routes, gates, gate_up, down, weight)
    assert not y[7].any()
    assert not dx[7].any()
    assert not dgates[7].any()
    assert float(jnp.abs(y[8]).max()) > 1e-3


@pytest.mark.parametrize(
    ("n", "dtype", "expected"), [(96, jnp.float32, True), (4, jnp.float32, False), (96, jnp.bfloat16, False)]
)
def test_which_path_a_cpu_takes(n, dtype, expected):
    x, routes, gates, gate_up, down, _ = problem(0.0, n, 4, 2)
    program = jax.make_jaxpr(experts)(x.astype(dtype), routes, gates, gate_up.astype(dtype), down.astype(dtype))
    assert ("cabochon_rows" in str(program)) == expected


@pytest.mark.parametrize(("n", "e", "c"), [(1, 8, 2), (3, 64, 8), (32, 8, 2), (5, 2, 1)])
def test_decode_sizes(n, e, c):
    x, routes, gates, gate_up, down, _ = problem(0.3, n, e, c)
    y = jax.jit(lambda *a: experts(*a, "blocked"))(x, routes, gates, gate_up, down)
    np.testing.assert_allclose(y, loop_over_tokens(x, routes, gates, gate_up, down), atol=1e-5)


def test_a_token_does_not_depend_on_its_neighbours():
    """Dropless: the same token next to others that crowd its expert."""
    x, routes, gates, gate_up, down, _ = problem(0.0)
    fn = jax.jit(lambda r: experts(x, r, gates, gate_up, down, "blocked"))
    crowded = jnp.tile(routes[0], (N, 1))
    np.testing.assert_allclose(fn(routes)[0], fn(crowded)[0], atol=1e-6)


def test_block_sizes_cover_an_even_router():
    assert block_sizes(4096, 8) == (544, 32)
    assert block_sizes(16, 8) == (0, 8)


def test_bf16_gradients_survive_hundreds_of_overflow_blocks():
    """A collapsed router: the same expert's gradient is added up block by block."""
    n, d, f = 8192, 8, 8
    k = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(k[0], (n, d)) + 1
    gate_up, down = jax.random.normal(k[1], (8, d, 2, f)), jax.random.normal(k[2], (8, f, d))
    routes, gates = jnp.tile(jnp.array([[0, 1]]), (n, 1)), jnp.full((n, 2), 0.5)

    def grads(path, dtype):
        cast = [a.astype(dtype) for a in (x, gates, gate_up, down)]

        def total(x, gates, gate_up, down, routes):
            return experts(x, routes, gates, gate_up, down, path).astype(jnp.float32).sum()

        return jax.jit(jax.grad(total, (2, 3)))(*cast, routes)

    for got, want in zip(grads("blocked", jnp.bfloat16), grads("dense", jnp.float32), strict=True):
        assert got.dtype == jnp.bfloat16
        error = jnp.linalg.norm((got.astype(jnp.float32) - want).ravel()) / jnp.linalg.norm(want.ravel())
        assert float(error) < 0.01


def test_ragged_rows_of_no_group_may_hold_anything(monkeypatch):
    """Accelerators leave rows past the groups unspecified; CPU happens to zero them, so they are filled here."""
    real = jax.lax.ragged_dot

    @jax.custom_vjp
    def spoilt(lhs, rhs, sizes):
        return forward(lhs, rhs, sizes)[0]

    def fill(x, sizes):
        return jnp.where((jnp.arange(len(x)) < sizes.sum())[:, None], x, jnp.nan)

    def forward(lhs, rhs, sizes):
        out, pull = jax.vjp(lambda a, b: real(a, b, sizes), lhs, rhs)
        return fill(out, sizes), (pull, sizes)

    def backward(saved, d):
        pull, sizes = saved
        # what reaches the rows of no group must be zero, or it would enter the weights' gradient
        dlhs, drhs = pull(d)
        return fill(dlhs, sizes), drhs, None

    spoilt.defvjp(forward, backward)
    x, routes, gates, gate_up, down, weight = problem(0.0)
    routes = routes.at[7].set(-1).at[20:40, 1].set(E + 3)
    want = value_and_grads(lambda *a: experts(*a, "dense"), x, routes, gates, gate_up, down, weight)
    monkeypatch.setattr(jax.lax, "ragged_dot", spoilt)
    got = value_and_grads(lambda *a: experts(*a, "ragged"), x, routes, gates, gate_up, down, weight)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
