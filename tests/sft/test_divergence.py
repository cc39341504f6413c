"""Distances from a k-sparse teacher against the worked numbers of algorithms.md section 15 (kd.*); their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.batch import Batch
from cabochon.ops import TokenOutputs
from cabochon.sft.config import DivergenceConfig
from cabochon.sft.divergence import TEACHER_TAIL, distillation, divergence, outcomes

P, Q = jnp.log(jnp.array([0.6, 0.3])), jnp.log(jnp.array([0.5, 0.2]))
ALL = jnp.ones(2, bool)


def distance(tail, beta):
    return float(divergence(outcomes(P, ALL, tail, 1e-6), outcomes(Q, ALL, tail, 1e-7), beta))


@pytest.mark.parametrize(
    ("tail", "beta", "said"),
    [
        ("bucket", 0, 0.121171),
        ("drop", 0, 0.231033),
        ("renormalize", 0, 0.005389),
        ("bucket", 1, 0.15733),
        ("drop", 1, -0.172254),  # negative: no divergence
        ("bucket", 0.5, 0.033472),
    ],
)
def test_oracles(tail, beta, said):
    assert distance(tail, beta) == pytest.approx(said, abs=2e-6)


def test_the_tail_is_one_minus_what_is_kept():
    assert float(outcomes(Q, ALL, "bucket", 1e-7)[-1]) == pytest.approx(-1.203973, abs=1e-6)


def test_generalised_jensen_shannon_between_the_two_ends():
    t, s = outcomes(P, ALL, "bucket", 1e-6), outcomes(Q, ALL, "bucket", 1e-7)
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.5, 0.2, 0.3])
    m = 0.2 * p + 0.8 * q
    want = 0.2 * (p * np.log(p / m)).sum() + 0.8 * (q * np.log(q / m)).sum()
    assert float(divergence(t, s, 0.2)) == pytest.approx(want, abs=1e-6)
    for beta, limit in ((1e-3, 0.0), (1 - 1e-3, 1.0)):  # section 15: each end after rescaling
        scale = beta if limit == 0 else 1 - beta
        assert float(divergence(t, s, beta)) / scale == pytest.approx(float(divergence(t, s, limit)), rel=0.02)


def test_the_bucket_is_a_lower_bound_that_is_zero_only_where_equal():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 50, 12)) * 2
    logp, logq = jax.nn.log_softmax(jnp.array(z[0])), jax.nn.log_softmax(jnp.array(z[1]))
    full = (jnp.exp(logp) * (logp - logq)).sum(-1)
    top, ids = jax.lax.top_k(logp, 4)
    kept = jnp.ones(ids.shape, bool)
    some = divergence(outcomes(top, kept, "bucket", 1e-6),
                      outcomes(jnp.take_along_axis(logq, ids, -1), kept, "bucket", 1e-7), 0)  # fmt: skip
    assert (some > 0).all()
    assert (some < full + 1e-6).all()
    same = divergence(outcomes(top, kept, "bucket", 1e-6), outcomes(top, kept, "bucket", 1e-7), 0)
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_absent_candidates_and_a_teacher_that_sums_to_more_than_one_stay_finite():
    """f16 rounds up; a place without a candidate is all tail on both sides."""
    teacher = jnp.log(jnp.array([[0.7, 0.301, 1.0], [1.0, 1.0, 1.0]]))
    kept = jnp.array([[True, True, False], [False, False, False]])

    def total(z, beta):
        student = jax.nn.log_softmax(z)[:, :3]
        theirs, ours = outcomes(teacher, kept, "bucket", TEACHER_TAIL), outcomes(student, kept, "bucket", 1e-7)
        found = divergence(theirs, ours, beta)
        return found.sum(), found

    z = jnp.array([[60.0, 59.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]])  # the student's tail is 0 in f32
    for beta in (0.0, 0.5, 1.0):
        (_, found), grad = jax.value_and_grad(total, has_aux=True)(z, beta)
        assert jnp.isfinite(grad).all()
        assert float(found[1]) == pytest.approx(0, abs=1e-6)
        assert not grad[1].any()


def test_the_loss_mixes_labels_in_and_counts_trained_tokens_only():
    ids = jnp.array([[[-1, -1], [5, 7], [5, -1]]])
    teacher = jnp.where(ids >= 0, jnp.array([[[0.0, 0], [P[0], P[1]], [P[0], 0.0]]]), 0.0)
    student = jnp.where(ids >= 0, jnp.array([[[0.0, 0], [Q[0], Q[1]], [Q[0], 0.0]]]), 0.0)
    batch = Batch(tokens_BT=jnp.zeros((1, 3)), segment_BT=jnp.ones((1, 3)), position_BT=jnp.arange(3)[None],
                  mask_BT=jnp.array([[0.0, 1.0, 1.0]]), candidates_BTK=ids, teacher_BTK=teacher)  # fmt: skip
    out = TokenOutputs(jnp.array([[9.0, -1.0, -3.0]]), jnp.zeros((1, 3)), candidates_BTK=student)
    second = 0.6 * np.log(0.6 / 0.5) + 0.4 * np.log(0.4 / 0.5)
    gap = (0.121171 + second) / 2
    for labels in (0.0, 0.25):
        loss = distillation(DivergenceConfig(labels=labels))(out, batch)
        assert float(loss.terms["distillation"].value) == pytest.approx((1 - labels) * gap + labels * 2.0, abs=1e-5)
    assert float(loss.metrics["divergence"].value) == pytest.approx(gap, abs=1e-5)
    assert float(loss.metrics["nll"].value) == pytest.approx(2.0)
    assert float(loss.metrics["teacher_mass"].value) == pytest.approx(0.75)
    assert float(loss.metrics["student_mass"].value) == pytest.approx(0.6)
