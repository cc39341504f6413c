"""Router, statistics and auxiliary losses against hand-worked numbers (algorithms.md section 12: moe, r3, simbal)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.model import moe
from cabochon.model.config import MoeConfig

Z = jnp.array([[2.0, 1.0, 0.0, -1.0]])


def config(**changes):
    return MoeConfig(**({"num_experts": 4, "top_k": 2, "ffn_dim": 8} | changes))


def test_gates_of_both_orders():
    used, gates, _ = moe.route(Z, config())
    np.testing.assert_array_equal(used, [[0, 1]])
    np.testing.assert_allclose(gates, [[0.731059, 0.268941]], atol=1e-6)
    _, raw, _ = moe.route(Z, config(gate="softmax_topk"))
    np.testing.assert_allclose(raw, [[0.643914, 0.236883]], atol=1e-6)
    np.testing.assert_allclose(raw.sum(), 0.880797, atol=1e-6)


def test_top1_raw_gate_trains_the_router_and_renormalised_does_not():
    def gate(z, kind):
        return moe.route(z, config(top_k=1, gate=kind))[1].sum()

    assert float(jnp.abs(jax.grad(gate)(Z, "softmax_topk")).max()) > 0.1
    assert float(jnp.abs(jax.grad(gate)(Z, "topk_softmax")).max()) == 0


def test_replay_uses_recorded_experts_with_live_gates_and_trains_the_router():
    z = jnp.array([[2.0, 1.0, 1.1, -1.0]])
    used, gates, natural = moe.route(z, config())
    np.testing.assert_array_equal(used, [[0, 2]])
    np.testing.assert_allclose(gates, [[0.710950, 0.289050]], atol=1e-6)
    replay = jnp.array([[0, 1]])
    used, gates, natural = moe.route(z, config(), replay_NC=replay)
    np.testing.assert_array_equal(used, [[0, 1]])
    np.testing.assert_array_equal(natural, [[0, 2]])
    np.testing.assert_allclose(gates, [[0.731059, 0.268941]], atol=1e-6)
    grad = jax.grad(lambda z: moe.route(z, config(), replay_NC=replay)[1][0, 0])(z)
    assert float(jnp.abs(grad[0, :2]).min()) > 0.1
    assert not grad[0, 2:].any()


def test_missing_replay_routes_naturally_and_natural_replay_is_a_bitwise_no_op():
    z = jax.random.normal(jax.random.key(0), (32, 4))
    free = moe.route(z, config())
    partly, foreign = jnp.tile(jnp.array([0, -1]), (32, 1)), jnp.tile(jnp.array([0, 255]), (32, 1))
    for replay in (jnp.full((32, 2), -1), partly, foreign, free[2]):
        again = moe.route(z, config(), replay_NC=replay)
        for a, b in zip(free, again, strict=True):
            np.testing.assert_array_equal(a, b)


def test_ties_take_the_lower_expert():
    np.testing.assert_array_equal(moe.route(jnp.zeros((1, 4)), config())[0], [[0, 1]])


def test_selection_bias_picks_but_does_not_weigh():
    p = jnp.array([0.6, 0.25, 0.15])
    used, gates, _ = moe.route(
        jnp.log(p)[None], config(num_experts=3, top_k=1, gate="softmax_topk"), jnp.array([-0.4, 0.0, 0.0])
    )
    np.testing.assert_array_equal(used, [[1]])
    np.testing.assert_allclose(gates, [[0.25]], atol=1e-6)


def stats(natural, prob, tokens, z=0.0):
    one = lambda x: jnp.asarray(x, jnp.float32)[None]  # noqa: E731
    zero = jnp.zeros(1)
    return moe.RouterStats(one(tokens), one(natural), one(natural), one(prob), one(z), zero, zero, zero)


def test_balance_loss_switch_and_uniform():
    total, tokens = moe.balance_loss(stats([7.5, 2.5], [6.0, 4.0], 10.0), top_k=1)
    np.testing.assert_allclose(total / tokens, 1.1, atol=1e-6)
    total, tokens = moe.balance_loss(stats([4.0] * 4, [2.0] * 4, 8.0), top_k=2)
    np.testing.assert_allclose(total / tokens, 1.0, atol=1e-6)


def test_balance_loss_takes_logits_once():
    """The double softmax of some implementations would give P = [.36 .24 .21 .20] here."""
    real = jnp.array([True])
    s = moe.router_stats(Z, jnp.array([[0, 1]]), jnp.array([[0, 1]]), real)
    np.testing.assert_allclose(s.prob_E, [0.643914, 0.236883, 0.087144, 0.032059], atol=1e-6)
    np.testing.assert_allclose(s.z, 5.954526, atol=1e-5)


def test_balance_gradient_flows_through_probabilities_only():
    s = stats([7.5, 2.5], [6.0, 4.0], 10.0)
    grad = jax.grad(lambda p, n: moe.balance_loss(s._replace(prob_E=p, natural_E=n), 1)[0], (0, 1))(
        s.prob_E, s.natural_E
    )
    np.testing.assert_allclose(grad[0], [[1.5, 0.5]], atol=1e-6)
    assert not grad[1].any()


def test_padding_is_not_counted():
    z = jax.random.normal(jax.random.key(1), (6, 4))
    natural = moe.route(z, config())[2]
    part = moe.router_stats(z[:4], natural[:4], natural[:4], jnp.ones(4, bool))
    whole = moe.router_stats(z, natural, natural, jnp.arange(6) < 4)
    for a, b in zip(part, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert float(whole.tokens) == 4
    assert float(whole.natural_E.sum()) == 8


def test_agreement_ignores_order():
    z = jnp.tile(Z, (2, 1))
    s = moe.router_stats(z, jnp.array([[0, 1], [0, 1]]), jnp.array([[1, 0], [0, 2]]), jnp.ones(2, bool))
    assert float(s.agree) == 1
    np.testing.assert_allclose(s.margin, 2.0, atol=1e-6)


def test_simbal_value_and_gradient():
    r = jnp.array([[1.0, 0.6], [0.0, 0.8], [0.0, 0.0]])[None]
    np.testing.assert_allclose(moe.simbal_loss(r), 1.2, atol=1e-6)
    np.testing.assert_allclose(jax.grad(moe.simbal_loss)(r)[0], [[1.2, 2.0], [1.6, 0.0], [0.0, 0.0]], atol=1e-5)
    rest = jnp.eye(3)[:, :2][None] * (1 + 1e-5)
    assert not jax.grad(moe.simbal_loss)(rest).any(), "inside the dead zone the router rests"


def test_bias_rule():
    got = moe.bias_step(jnp.zeros((1, 4)), jnp.array([[6.0, 2.0, 0.0, 0.0]]), 1e-3)
    np.testing.assert_allclose(got[0], [-0.00125, -0.00025, 0.00075, 0.00075], atol=1e-9)


def test_metrics():
    m = moe.router_metrics(stats([6.0, 2.0, 0.0, 0.0], [1.0] * 4, 4.0))
    np.testing.assert_allclose(m["max_violation"], [2.0], atol=1e-6)
    np.testing.assert_allclose(m["load_entropy"], [0.562335], atol=1e-6)
    np.testing.assert_allclose(m["effective_experts"], [1.754765], atol=1e-5)
    nothing_routed = moe.router_metrics(stats([0.0] * 4, [0.0] * 4, 0.0))
    np.testing.assert_array_equal(nothing_routed["max_violation"], [0.0])


def test_config_refuses_more_choices_than_experts():
    with pytest.raises(ValueError, match="top_k=5 is more than num_experts=4"):
        config(top_k=5)
