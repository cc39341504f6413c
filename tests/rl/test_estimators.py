"""Estimators against hand-worked numbers and brute force (algorithms.md sections 17 and 23)."""

import itertools

import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.rl.estimators import (
    cot_verdicts,
    majority_at_k,
    over_problems,
    paired_test,
    pass_at_k,
)


def test_pass_at_k_by_hand():
    assert [pass_at_k(5, 2, k) for k in (1, 2, 3, 4)] == pytest.approx([0.4, 0.7, 0.9, 1.0])
    assert [pass_at_k(5, 1, k) for k in (1, 2, 5)] == pytest.approx([0.2, 0.4, 1.0])
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_what_enumeration_gives(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations(range(n), k))
        want = np.mean([any(i < correct for i in s) for s in subsets])
        assert pass_at_k(n, correct, k) == pytest.approx(want)


def test_too_few_samples():
    with pytest.raises(UserError, match="pass@3 needs 3 or more samples per problem, there are 2"):
        pass_at_k(2, 1, 3)
    with pytest.raises(UserError, match="maj@0 needs"):
        majority_at_k(["a"], [True], 0)


def test_majority_by_hand():
    answers, correct = ["A", "A", "B", "C"], [True, True, False, False]
    assert [majority_at_k(answers, correct, k) for k in (1, 2, 3, 4)] == pytest.approx([0.5, 0.5, 2 / 3, 1])
    # the order of the samples, which decides ties elsewhere, is nothing here
    assert majority_at_k(answers[::-1], correct[::-1], 2) == pytest.approx(0.5)


def test_no_answer_is_a_class_that_never_wins_a_point():
    assert majority_at_k([None, None, "A"], [True, True, True], 3) == 0
    assert majority_at_k([None, "A"], [False, True], 2) == 0.5


def test_drawn_majorities_are_near_the_exact_ones_and_repeat():
    rng = np.random.default_rng(0)
    answers = ["AABC"[i] for i in rng.integers(0, 4, 16)]
    correct = [a == "A" for a in answers]
    exact = majority_at_k(answers, correct, 5, draws=10_000)
    drawn = majority_at_k(answers, correct, 5, draws=3000)
    assert drawn == pytest.approx(exact, abs=0.04)
    assert drawn == majority_at_k(answers, correct, 5, draws=3000)


def test_votes_on_reasoning():
    assert cot_verdicts([True, False, False]) == {"any": True, "majority": False, "all": False}
    assert cot_verdicts([True, True, False])["majority"]
    assert cot_verdicts([True] * 3)["all"]
    assert cot_verdicts([]) == {"any": False, "majority": False, "all": False}


def test_errors_are_clustered_by_problem():
    per_problem = [1.0, 0.0, 0.5, 0.5]  # whether from 2 or from 200 samples each
    got = over_problems(per_problem)
    assert got.mean == 0.5
    assert got.error == pytest.approx(np.std(per_problem, ddof=1) / 2)
    # Wilson's with t(3) = 3.1824 at n = 0.25 / error^2 = 6: 0.5 +- t / (1 + t^2 / n) sqrt(0.25 / n + t^2 / 4 n^2)
    assert (got.low, got.high) == pytest.approx((0.10378, 0.89622), abs=1e-5)
    with pytest.raises(UserError, match="no problem"):
        over_problems([])


def test_intervals_of_a_few_problems():
    assert over_problems([0.3])[1:] == (np.inf, 0.0, 1.0), "one problem says nothing of others"
    alike = over_problems([1.0] * 5)
    assert (alike.error, alike.high) == (0.0, pytest.approx(1.0))
    assert 0.3 < alike.low < 0.5, "five right of five: Wilson's with t(4)"
    assert over_problems([0.5, 0.5]).low < 0.5 < over_problems([0.5, 0.5]).high
    assert over_problems([3.0, 5.0])[2:] == pytest.approx((4 - 12.7062, 4 + 12.7062), abs=1e-3), "Student's t(1)"


@pytest.mark.parametrize("problems", [3, 7, 21, 60])
@pytest.mark.parametrize("beta", [(0.5, 4), (2, 2), (20, 1), (0.1, 0.1)], ids=str)
def test_intervals_cover_as_often_as_they_say(beta, problems):
    """Also where few of few problems are solved, where the normal one covers 80 to 89 %."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(600):
        found = over_problems(rng.binomial(4, rng.beta(*beta, problems)) / 4)
        inside += found.low <= beta[0] / sum(beta) <= found.high
    assert inside / 600 >= 0.93


@pytest.mark.parametrize("problems", [3, 5, 8, 12, 21])
def test_paired_intervals_cover_and_agree_with_the_p_value(problems):
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        before, after = (rng.binomial(4, rng.beta(2, 2, problems)) / 4 for _ in range(2))
        found = paired_test(before, after, draws=4096)
        inside += found.low <= 0 <= found.high
        if problems <= 12:
            assert (found.p <= 0.05) <= (found.low >= 0 or found.high <= 0)
            assert (found.low > 0 or found.high < 0) <= (found.p <= 0.05 + 2**-11)
    assert inside / 400 >= 0.92


def test_no_five_problems_prove_a_difference():
    """Their least p value is 1/16: an interval that left out zero would contradict it."""
    assert paired_test([1, 1, 1, 1, 1], [0.02, 0, 0.03, 0, 0.01])[1:] == (-np.inf, np.inf, pytest.approx(2 / 32))
    six = paired_test([0.0] * 6, [0.5, 0.25, 0.75, 0.5, 1.0, 0.5])
    assert (six.low, six.high, six.p) == (0.25, 1.0, pytest.approx(2 / 64))


def test_paired_test_by_hand_and_by_draws():
    same = paired_test([0.2, 0.4], [0.2, 0.4])
    assert (same.difference, same.p) == (0.0, 1.0)
    better = paired_test([0, 0, 0, 0, 0], [1, 1, 1, 1, 1])
    assert better.difference == 1
    assert better.p == pytest.approx(2 / 32)
    rng = np.random.default_rng(1)
    before = rng.random(14)
    after = before + rng.normal(0.05, 0.1, 14)
    exact, drawn = paired_test(before, after, draws=2**14), paired_test(before, after, draws=2**13)
    assert drawn.p == pytest.approx(exact.p, abs=0.02)
    assert exact.low < exact.difference < exact.high
    with pytest.raises(UserError, match="the same problems: there are 1 and 2"):
        paired_test([1], [1, 0])


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(0)
    p = [paired_test(rng.random(10), rng.random(10)).p for _ in range(400)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(p) == pytest.approx(0.5, abs=0.06)
