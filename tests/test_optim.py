"""Schedules at their corners, what decays, and what a factored second moment saves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cabochon.config import OptimConfig
from cabochon.optim import decayed, make_optimizer, schedule


@pytest.mark.parametrize(
    ("kind", "at", "want"),
    [
        ("constant", [0, 5, 10, 500], [0.0, 0.5, 1.0, 1.0]),
        ("linear", [0, 10, 60, 110, 200], [0.0, 1.0, 0.6, 0.2, 0.2]),
        ("cosine", [5, 10, 60, 110], [0.5, 1.0, 0.6, 0.2]),
    ],
)
def test_schedule(kind, at, want):
    cfg = OptimConfig(learning_rate=1.0, schedule=kind, warmup_steps=10, total_steps=110, end_factor=0.2)
    got = [float(schedule(cfg)(t)) for t in at]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_norms_and_biases_do_not_decay():
    params = {"a": {"w": jnp.ones(2), "b": jnp.ones(2)}, "n": {"scale": jnp.ones(2)}, "moe": {"down": jnp.ones(2)}}
    assert decayed(params) == {"a": {"w": True, "b": False}, "n": {"scale": False}, "moe": {"down": True}}
    tx = make_optimizer(OptimConfig(learning_rate=1.0, weight_decay=0.1, clip_norm=0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["w"], -0.1, atol=1e-6)
    np.testing.assert_array_equal(updates["n"]["scale"], 0)


def test_clipping_is_by_the_global_norm():
    cfg = OptimConfig(learning_rate=1.0, b1=0.0, b2=0.0, eps=1.0, clip_norm=1.0)
    params = {"w": jnp.zeros(2), "v": jnp.zeros(1)}
    grads = {"w": jnp.array([30.0, 0.0]), "v": jnp.array([40.0])}
    tx = make_optimizer(cfg)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"][0], -0.6 / 1.6, atol=1e-6)
    np.testing.assert_allclose(updates["v"][0], -0.8 / 1.8, atol=1e-6)


def moments(cfg, params):
    return sum(x.size for x in jax.tree.leaves(make_optimizer(cfg).init(params)))


def test_factored_second_moment_is_small_and_learns():
    params = {"w": jnp.zeros((256, 128))}
    assert moments(OptimConfig(b1=0.0, kind="adafactor"), params) < 500
    assert moments(OptimConfig(), params) > 2 * 256 * 128
    target = jax.random.normal(jax.random.key(0), (256, 128))
    tx = make_optimizer(OptimConfig(kind="adafactor", learning_rate=0.05, clip_norm=0))
    step = jax.jit(lambda p, s: tx.update(jax.tree.map(lambda w: w - target, p), s, p))
    state = tx.init(params)
    for _ in range(60):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert float(jnp.square(params["w"] - target).mean()) < 0.05
