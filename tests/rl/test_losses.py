"""Surrogates, KL, weights and value loss against hand-worked numbers and each other (algorithms.md 6 to 8 and 11)."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.batch import Batch
from cabochon.ops import TokenOutputs
from cabochon.rl import losses
from cabochon.rl.advantages import leave_one_out
from cabochon.rl.config import Clip, KlConfig, MismatchConfig

NO_MISMATCH = MismatchConfig(weight="none", token_band=None, veto=0)
NO_KL = KlConfig()


@pytest.fixture(autouse=True)
def no_silent_broadcast():
    with jax.numpy_rank_promotion("raise"):
        yield


def row(*x):
    return jnp.array([x], jnp.float32)


def surrogate(ratio, advantage, clip):
    """Loss per token and its gradient with respect to the log-prob."""
    log, advantage = jnp.log(row(*ratio)), row(*advantage)
    loss, clipped = losses.clipped_surrogate(log, advantage, clip)
    grad = jax.grad(lambda x: losses.clipped_surrogate(x, advantage, clip)[0].sum())(log)
    return np.asarray(loss[0]), np.asarray(grad[0]), np.asarray(clipped[0])


def batch(mask, advantage, segment=None, position=None, **fields):
    mask = jnp.atleast_2d(jnp.asarray(mask, jnp.float32))
    segment = jnp.ones(mask.shape, jnp.int32) if segment is None else jnp.asarray(segment, jnp.int32)
    zero = jnp.zeros(mask.shape, jnp.int32)
    fields = {k: jnp.atleast_2d(jnp.asarray(v, jnp.float32)) for k, v in fields.items()}
    return Batch(
        tokens_BT=zero, position_BT=zero, segment_BT=segment, mask_BT=mask,
        advantage_BT=jnp.broadcast_to(jnp.asarray(advantage, jnp.float32), mask.shape), **fields,
    )  # fmt: skip


def outputs(logp, **more):
    logp = jnp.atleast_2d(jnp.asarray(logp, jnp.float32))
    return TokenOutputs(logp, jnp.zeros_like(logp), **more)


def value_and_grad(make, data, logp, term="policy"):
    f = lambda x: make(outputs(x), data).terms[term].value  # noqa: E731
    value, grad = jax.value_and_grad(f)(jnp.atleast_2d(jnp.asarray(logp, jnp.float32)))
    return float(value), np.asarray(grad)


# -- surrogates --------------------------------------------------------------------------------------------------------


def test_clipped_surrogate_by_hand():
    loss, grad, clipped = surrogate([0.5, 1.5, 1.5, 0.5], [1, 1, -1, -1], Clip())
    np.testing.assert_allclose(loss, [-0.5, -1.2, 1.5, 0.8], rtol=1e-6)
    np.testing.assert_allclose(grad, [-0.5, 0, 1.5, 0], atol=1e-6)
    np.testing.assert_array_equal(clipped, [False, True, False, True])


def test_clip_higher_leaves_more_room_above():
    assert surrogate([1.25], [1], Clip())[0] == pytest.approx(-1.2)
    assert surrogate([1.25], [1], Clip(low=0.2, high=0.28))[0] == pytest.approx(-1.25)


def test_dual_clip_bounds_a_bad_token_s_loss():
    assert surrogate([5.0], [-1], Clip())[0] == pytest.approx(5)
    loss, grad, clipped = surrogate([5.0], [-1], Clip(dual=3))
    assert loss == pytest.approx(3)
    assert grad == 0
    assert clipped
    np.testing.assert_allclose(surrogate([5.0], [1], Clip(dual=3))[0], surrogate([5.0], [1], Clip())[0])


def test_on_policy_the_tie_of_the_two_branches_keeps_the_whole_gradient():
    for advantage in (2.0, -3.0):
        _, grad, clipped = surrogate([1.0], [advantage], Clip(low=0.2, high=0.28, dual=3))
        assert grad == -advantage
        assert not clipped


def test_gspo_by_hand():
    clip = Clip(low=3e-4, high=4e-4)
    ratios = row(0.02, -0.01, 0.05)
    mean = losses.segment_mean(ratios, jnp.ones((1, 3), bool), jnp.ones((1, 3), jnp.int32))
    np.testing.assert_allclose(jnp.exp(mean), [[1.020201] * 3], rtol=1e-6)
    for advantage, want in ((1.0, -1.0004), (-1.0, 1.020201)):
        make = losses.policy_loss(losses.geometric_clipped(clip), NO_MISMATCH, NO_KL, 0.0)
        data = batch(np.full(3, 1 / 3), advantage, logp_proximal_BT=[-1.0, -1, -1])
        value, _ = value_and_grad(make, data, [-0.98, -1.01, -0.95])
        assert value == pytest.approx(want, rel=1e-6)


def test_cispo_keeps_the_gradient_that_clipping_takes():
    logp, ratio = np.array([-2, -1, -0.5]), np.array([0.5, 1, 3])
    data = batch(np.ones(3), 1.0, logp_proximal_BT=logp - np.log(ratio))
    make = losses.policy_loss(losses.capped(2.0), NO_MISMATCH, NO_KL, 0.0)
    value, grad = value_and_grad(make, data, logp)
    assert value == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(grad, [[-1 / 6, -1 / 3, -2 / 3]], rtol=1e-5)
    clipped = losses.policy_loss(losses.token_clipped(Clip()), NO_MISMATCH, NO_KL, 0.0)
    np.testing.assert_allclose(value_and_grad(clipped, data, logp)[1], [[-0.5 / 3, -1 / 3, 0]], atol=1e-6)


ALL = [
    losses.token_clipped(Clip(low=0.2, high=0.28, dual=3)),
    losses.geometric_clipped(Clip(low=3e-4, high=4e-4)),
    losses.capped(5.0),
    losses.reinforce(),
]


@pytest.mark.parametrize("proximal", ["current", "scored"])
def test_on_policy_all_surrogates_have_the_gradient_of_reinforce(proximal):
    logp = np.array([[-0.5, -1.5, -2.5, -0.25]])
    scored = {"logp_proximal_BT": logp} if proximal == "scored" else {}
    data = batch([[0, 1, 1, 1]], [[9.0, 2, 2, 2]], **scored)
    grads = [value_and_grad(losses.policy_loss(s, NO_MISMATCH, NO_KL, 0.0), data, logp)[1] for s in ALL]
    np.testing.assert_allclose(grads[0], [[0, -2 / 3, -2 / 3, -2 / 3]], rtol=1e-6)
    for grad in grads[1:]:
        np.testing.assert_allclose(grad, grads[0], rtol=1e-6)


def test_the_whole_response_s_ratio_on_policy_is_reinforce_summed():
    logp = np.array([[-0.5, -1.5, -2.5]])
    product = losses.policy_loss(losses.product_clipped(Clip()), NO_MISMATCH, NO_KL, 0.0)
    summed = losses.policy_loss(losses.reinforce(), NO_MISMATCH, NO_KL, 0.0)
    _, a = value_and_grad(product, batch(np.full(3, 1 / 3), 2.0), logp)
    data = batch(np.ones(3), 2.0)
    _, b = value_and_grad(summed, Batch(**{**vars(data), "divisor_B": jnp.ones(1)}), logp)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(a, [[-2, -2, -2]], rtol=1e-6)


@pytest.mark.parametrize("make", ALL)
def test_a_step_against_the_gradient_raises_a_good_token_and_lowers_a_bad_one(make):
    logp = np.array([[-1.0, -1.0]])
    _, grad = value_and_grad(losses.policy_loss(make, NO_MISMATCH, NO_KL, 0.0), batch(np.ones(2), [[1.0, 1]]), logp)
    assert (grad < 0).all()
    _, grad = value_and_grad(losses.policy_loss(make, NO_MISMATCH, NO_KL, 0.0), batch(np.ones(2), [[-1.0, -1]]), logp)
    assert (grad > 0).all()


@pytest.mark.parametrize("make", [*ALL, losses.product_clipped(Clip())])
def test_packed_responses_are_what_they_are_in_rows_of_their_own(make):
    rng = np.random.default_rng(0)
    logp, proximal, behaviour = (-rng.uniform(0.1, 0.4, 6) for _ in range(3))
    advantage, weight = rng.normal(size=6), np.array([0, 0.5, 0.5, 0, 1, 1])
    cfg = MismatchConfig(weight="sequence", sequence_band=(0.7, 1.4), token_band=None)

    def run(shape, segment):
        fields = {"logp_proximal_BT": proximal.reshape(shape), "logp_behaviour_BT": behaviour.reshape(shape)}
        data = batch(weight.reshape(shape), advantage.reshape(shape), segment=segment, **fields)
        return value_and_grad(losses.policy_loss(make, cfg, NO_KL, 0.0), data, logp.reshape(shape))

    value, grad = run((1, 6), [[1, 1, 1, 2, 2, 2]])
    want, want_grad = run((2, 3), [[1, 1, 1], [1, 1, 1]])
    assert value == pytest.approx(want, rel=1e-6)
    np.testing.assert_allclose(grad.reshape(2, 3), want_grad, rtol=1e-5, atol=1e-8)


def test_garbage_where_nothing_is_trained_reaches_neither_loss_nor_gradient():
    nan, inf = np.nan, np.inf
    logp = np.array([[-inf, -1.0, -1.0, nan]])
    bad = [[nan, -1.0, -1.2, inf]]
    data = batch([[0, 1, 1, 0]], [[nan, 1.0, 1.0, inf]], logp_proximal_BT=bad, logp_behaviour_BT=bad,
                 logp_reference_BT=bad)  # fmt: skip
    make = losses.policy_loss(losses.token_clipped(Clip()), MismatchConfig(), KlConfig(coef=0.1), 0.0)
    for term in ("policy", "kl"):
        value, grad = value_and_grad(make, data, logp, term)
        assert math.isfinite(value)
        assert np.isfinite(grad).all()
        assert grad[0, 0] == grad[0, 3] == 0


def test_an_empty_batch_has_no_loss_and_no_gradient():
    data = batch(np.zeros(3), 1.0, logp_behaviour_BT=np.zeros(3))
    make = losses.policy_loss(losses.token_clipped(Clip()), MismatchConfig(), NO_KL, 0.0)
    value, grad = value_and_grad(make, data, [-1.0, -1, -1])
    assert value == 0
    assert not grad.any()


def test_ratios_beyond_the_bound_are_cut_with_their_gradient():
    data = batch(np.ones(2), -1.0, logp_proximal_BT=[-100.0, -0.1])
    make = losses.policy_loss(losses.token_clipped(Clip()), NO_MISMATCH, NO_KL, 0.0)
    value, grad = value_and_grad(make, data, [-0.1, -0.1])
    assert value == pytest.approx((math.exp(20) + 1) / 2, rel=1e-5)
    assert grad[0, 0] == 0
    assert grad[0, 1] == 0.5


# -- KL ----------------------------------------------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    d = row(0.5, -0.5)
    np.testing.assert_allclose(losses.kl_estimate("k1", d), d)
    np.testing.assert_allclose(losses.kl_estimate("k2", d), [[0.125, 0.125]], rtol=1e-6)
    np.testing.assert_allclose(losses.kl_estimate("k3", d), [[0.106531, 0.148721]], atol=1e-6)
    assert losses.kl_estimate("k3", row(-20.0)) == losses.MAX_K3


P, REF = np.array([0.5, 0.5]), np.array([0.25, 0.75])


def expected_gradient(per_token, p=P):
    """Over both tokens of a vocabulary of two, weighted by their probability held constant: no sampling."""

    def loss(z):
        logp = jax.nn.log_softmax(z)[None]
        return (jnp.asarray(p, jnp.float32)[None] * per_token(logp)).sum()

    return jax.grad(loss)(jnp.log(jnp.asarray(p, jnp.float32)))


FAR = np.array([0.07, 0.93]), np.array([0.99, 0.01])


@pytest.mark.parametrize(("p", "q", "true"), [(P, REF, 0.274653), (*FAR, -0.467536)], ids=["near", "beyond MAX_K3"])
def test_expected_gradients_of_kl_losses(p, q, true):
    ref, all_two = jnp.log(jnp.asarray(q, jnp.float32))[None], jnp.ones((1, 2), bool)

    def corrected(kind):
        def per_token(logp):
            ratio = losses.log_ratio(logp, jax.lax.stop_gradient(logp), all_two)
            return losses.kl_loss(kind, losses.log_ratio(logp, ref, all_two), ratio)

        return per_token

    for kind in ("k1", "k2", "k3"):
        np.testing.assert_allclose(expected_gradient(corrected(kind), p), [true, -true], atol=1e-6)


def test_expected_gradients_and_values_of_kl_estimates():
    ref = jnp.log(jnp.asarray(REF, jnp.float32))[None]
    naive = lambda kind: lambda logp: losses.kl_estimate(kind, logp - ref)  # noqa: E731
    np.testing.assert_allclose(expected_gradient(naive("k1")), [0, 0], atol=1e-6)
    np.testing.assert_allclose(expected_gradient(naive("k3")), [0.25, -0.25], atol=1e-6)
    values = [P @ np.asarray(losses.kl_estimate(k, jnp.log(jnp.asarray(P))[None] - ref))[0] for k in ("k1", "k2", "k3")]
    np.testing.assert_allclose(values, [0.143841, 0.161214, 0.143841], atol=1e-6)


def test_corrected_k3_has_the_gradient_of_k2_sample_by_sample():
    d = row(0.5, -0.5, 1.3, -2.7, -5.0)

    def grad(kind):
        return jax.grad(lambda x: losses.kl_loss(kind, d + x, x).sum())(jnp.zeros_like(d))

    np.testing.assert_allclose(grad("k3"), d, rtol=1e-5)
    np.testing.assert_allclose(grad("k2"), d, rtol=1e-5)


def test_kl_term_is_its_coefficient_times_the_aggregated_estimate():
    data = batch([[0, 1, 1]], 0.0, logp_reference_BT=[0, -1.5, -0.5])
    for kind, want in (("k2", 0.125), ("k3", (0.106531 + 0.148721) / 2), ("k1", 0.0)):
        make = losses.policy_loss(losses.reinforce(), NO_MISMATCH, KlConfig(coef=0.1, estimator=kind), 0.0)
        value, _ = value_and_grad(make, data, [0.0, -1.0, -1.0], "kl")
        assert value == pytest.approx(0.1 * want, abs=1e-7)
    rewarded = losses.policy_loss(losses.reinforce(), NO_MISMATCH, KlConfig(coef=0.1, placement="reward"), 0.0)
    assert set(rewarded(outputs([0.0, -1, -1]), data).terms) == {"policy"}


def test_adaptive_coefficient():
    cfg = KlConfig(coef=0.2, placement="reward", target=6, horizon=10_000)
    assert losses.adapted_coef(0.2, 9, cfg, 256) == pytest.approx(0.201024)
    assert losses.adapted_coef(0.2, 0.0, cfg, 256) == pytest.approx(0.2 * (1 - 0.2 * 0.0256))
    assert losses.adapted_coef(0.2, 9, KlConfig(coef=0.2), 256) == 0.2


def test_entropy_bonus_is_a_mean_over_trained_tokens_and_is_minimised_negative():
    make = losses.policy_loss(losses.reinforce(), NO_MISMATCH, NO_KL, 0.5)
    out = outputs([0.0, -1, -1], entropy_BT=row(7.0, 1.0, 3.0))
    loss = make(out, batch([[0, 0.1, 0.3]], 0.0))
    assert float(loss.terms["entropy"].value) == pytest.approx(-0.5 * 2)
    assert float(loss.metrics["entropy"].value) == pytest.approx(2)


# -- importance weights ------------------------------------------------------------------------------------------------

W = np.array([1.0, 3.0, 0.25])


def weights(cfg, w=W, segment=(1, 1, 1)):
    log_w, trained = row(*np.log(w)), jnp.ones((1, len(w)), bool)
    weight, kept = losses.importance_weights(log_w, trained, jnp.array([segment]), cfg)
    return np.where(kept, weight, 0)[0]


def test_importance_weights_by_hand():
    free = {"token_band": None, "veto": 0}
    np.testing.assert_allclose(weights(MismatchConfig(cap=2, **free)), [1, 2, 0.25], rtol=1e-6)
    np.testing.assert_allclose(weights(MismatchConfig(cap=99, veto=0)), [1, 3, 0], rtol=1e-6)
    np.testing.assert_allclose(weights(MismatchConfig(cap=99, veto=0, token_band=(0.5, 2))), [1, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(weights(MismatchConfig(weight="sequence", **free)), [0.75] * 3, rtol=1e-6)
    np.testing.assert_allclose(weights(MismatchConfig(weight="none", **free)), [1, 1, 1])
    geometric = 0.90856  # of the three
    inside = MismatchConfig(weight="none", sequence_band=(0.908, 1.01), **free)
    outside = MismatchConfig(weight="none", sequence_band=(0.91, 1.01), **free)
    assert np.exp(np.log(W).mean()) == pytest.approx(geometric, abs=1e-5)
    assert weights(inside).all()
    assert not weights(outside).any()


def test_one_impossible_token_vetoes_its_response_and_no_other():
    cfg = MismatchConfig(weight="token", token_band=None, veto=1e-4)
    got = weights(cfg, np.array([1, 1e-5, 1, 1]), (1, 1, 2, 2))
    np.testing.assert_allclose(got, [0, 0, 1, 1])


def test_refused_tokens_still_count_in_the_divisor():
    data = batch(np.ones(2), 1.0, logp_proximal_BT=[-1.0, -1.0], logp_behaviour_BT=[-1.0, -4.0])
    make = losses.policy_loss(losses.token_clipped(Clip()), MismatchConfig(), NO_KL, 0.0)
    value, grad = value_and_grad(make, data, [-1.0, -1.0])
    assert value == pytest.approx(-0.5)
    np.testing.assert_allclose(grad, [[-0.5, 0]])


def test_decoupled_and_bypass_by_hand():
    mu, prox, pi = (math.log(x) for x in (0.2, 0.3, 0.33))
    data = batch(np.ones(1), 1.0, logp_proximal_BT=[prox], logp_behaviour_BT=[mu])
    decoupled = losses.policy_loss(losses.token_clipped(Clip()), MismatchConfig(), NO_KL, 0.0)
    assert value_and_grad(decoupled, data, [pi])[0] == pytest.approx(-1.65, rel=1e-5)
    bypass = MismatchConfig(proximal="sampler", weight="none", token_band=None, veto=0)
    value, _ = value_and_grad(losses.policy_loss(losses.token_clipped(Clip()), bypass, NO_KL, 0.0), data, [pi])
    assert value == pytest.approx(-1.2, rel=1e-6)


def test_mismatch_metrics_by_hand():
    data = batch(np.ones(3), 1.0, logp_proximal_BT=np.log(W) - 1, logp_behaviour_BT=[-1.0, -1, -1])
    make = losses.policy_loss(losses.token_clipped(Clip()), MismatchConfig(cap=2), NO_KL, 0.0)
    metrics = {k: float(m.value) for k, m in make(outputs(np.log(W) - 1), data).metrics.items()}
    assert metrics["w_kl"] == pytest.approx(0.512561, abs=1e-5)
    assert metrics["w"] ** 2 / metrics["w_squared"] == pytest.approx(0.695473, abs=1e-5)
    assert metrics["w_refused"] == pytest.approx(1 / 3)
    assert metrics["w_large"] == 0
    assert metrics["off_ratio"] == 0
    assert metrics["clip_fraction"] == 0


def test_a_ratio_to_the_sampler_hides_no_gap_between_sampler_and_learner():
    bypass = MismatchConfig(proximal="sampler", weight="none", token_band=None, veto=0)
    data = batch(np.ones(3), 1.0, logp_behaviour_BT=[-1.0, -1, -3.5])
    found = losses.policy_loss(losses.token_clipped(Clip()), bypass, NO_KL, 0.0)(outputs(np.log(W) - 1), data)
    metrics = {k: float(m.value) for k, m in found.metrics.items()}
    gap = np.add(np.log(W), [0, 0, 2.5])
    assert metrics["w_gap"] == pytest.approx(np.abs(gap).mean(), rel=1e-5)
    assert metrics["w_kl"] == pytest.approx((np.expm1(gap) - gap).mean(), rel=1e-5)
    assert (metrics["w_large"], metrics["w"], metrics["w_refused"]) == (0, 1, 0)
    far = outputs(np.add(np.log(W), [-1, -1, 1.0]))
    loss = losses.policy_loss(losses.token_clipped(Clip()), bypass, NO_KL, 0.0)(far, data)
    assert float(loss.metrics["w_large"].value) == pytest.approx(1 / 3)


def test_weights_carry_no_gradient():
    def loss(behaviour):
        data = batch(np.ones(2), 1.0, logp_behaviour_BT=[0.0, 0.0])
        data = Batch(**{**vars(data), "logp_behaviour_BT": behaviour})
        make = losses.policy_loss(losses.reinforce(), MismatchConfig(), NO_KL, 0.0)
        return make(outputs([-1.0, -1.1]), data).terms["policy"].value

    assert not np.asarray(jax.grad(loss)(row(-1.1, -1.0))).any()


# -- the critic --------------------------------------------------------------------------------------------------------


def test_value_loss_by_hand():
    one = row(1.0)
    assert losses.clipped_value_loss(one, row(0.5), row(0.9), 0.2) == pytest.approx(0.02, rel=1e-5)
    assert losses.clipped_value_loss(one, row(0.5), row(0.9), 0.0) == pytest.approx(0.005, rel=1e-5)


def test_the_critic_s_value_of_a_token_is_that_of_the_state_before_it():
    data = batch([[0, 1, 1, 0, 1, 0]], 0.0, segment=[[1, 1, 1, 2, 2, 0]],
                 return_BT=[0, 1.0, 1.0, 0, 3.0, 0], value_BT=np.zeros(6))  # fmt: skip
    make = losses.value_loss(0.0)
    f = lambda v: make(outputs(np.zeros(6), value_BT=v), data).terms["value"].value  # noqa: E731
    value, grad = jax.value_and_grad(f)(row(1.5, 1, 9, 2, 9, 9))
    assert float(value) == pytest.approx((0.5**2 + 0 + 1) / 2 / 3)
    np.testing.assert_allclose(grad, row(0.5 / 3, 0, 0, -1 / 3, 0, 0), atol=1e-6)


# -- unbiasedness ------------------------------------------------------------------------------------------------------


def test_policy_gradient_with_leave_one_out_is_unbiased_by_enumeration():
    """Every pair of two-token responses over a vocabulary of two, each with its probability: the exact expectation."""
    reward = {(0, 0): 1.0, (0, 1): 0.0, (1, 0): 0.3, (1, 1): 2.0}
    z0 = jnp.array([[0.3, -0.2], [0.1, 0.5], [-0.4, 0.2]])  # logits of the first token, and of the second after 0 and 1

    def logps(z, y):
        logp = jax.nn.log_softmax(z)
        return jnp.stack([logp[0, y[0]], logp[1 + y[0], y[1]]])

    def true_value(z):
        return sum(jnp.exp(logps(z, y).sum()) * r for y, r in reward.items())

    make = losses.policy_loss(losses.reinforce(), NO_MISMATCH, NO_KL, 0.0)

    def expected_loss(z):
        total = 0.0
        for pair in itertools.product(reward, repeat=2):
            advantage, _ = leave_one_out(np.array([reward[y] for y in pair]), np.zeros(2, int))
            data = batch(np.ones((2, 2)), advantage[:, None] * np.ones((2, 2)))
            data = Batch(**{**vars(data), "divisor_B": jnp.ones(2)})  # mean over responses of the sum over tokens
            logp = jnp.stack([logps(z, y) for y in pair])
            weight = jnp.exp(jax.lax.stop_gradient(logp).sum())
            total += weight * make(TokenOutputs(logp, jnp.zeros_like(logp)), data).terms["policy"].value
        return total

    np.testing.assert_allclose(jax.grad(expected_loss)(z0), -jax.grad(true_value)(z0), atol=1e-6)


def test_a_policy_loss_tells_which_tokens_were_clipped_and_their_entropy():
    """By hand: ratios 1.5, 1.5, 1, 1.5 with advantages +, -, +, + and the last token not trained."""
    data = batch([1, 1, 1, 0], [[1.0, -1.0, 1.0, 1.0]], logp_proximal_BT=[-1.0, -1, -1, -1])
    logp = np.log([1.5, 1.5, 1.0, 1.5]) - 1
    entropy = jnp.array([[0.1, 0.2, 0.3, 0.4]])
    loss = losses.policy_loss(losses.token_clipped(Clip()), NO_MISMATCH, NO_KL, 0.0)
    found = loss(outputs(logp, entropy_BT=entropy), data)
    np.testing.assert_array_equal(found.tokens["clipped"], [[1, 0, 0, 0]])
    np.testing.assert_array_equal(found.tokens["entropy"], entropy)
    assert float(found.metrics["clip_fraction"].value) == pytest.approx(1 / 3)
    assert "entropy" not in loss(outputs(logp), data).tokens, "only where the learner computes it"
