"""Against closed forms, brute force and scipy."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from cabochon.reward.calibration import (
    Platt,
    auc,
    correlation,
    expected_calibration_error,
    fit,
    length_groups,
    logit,
    pair_report,
    reliability,
    sigmoid,
)


def test_calibration_error_by_hand():
    p, right = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55]), np.array([1, 1, 1, 0, 1, 0])
    assert expected_calibration_error(p, right) == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0.0
    assert np.isnan(expected_calibration_error(np.array([]), np.array([])))
    assert reliability(p, right) == {
        "0.5 to 0.6": {"confidence": pytest.approx(0.55), "right": 0.5, "count": 2},
        "0.9 to 1.0": {"confidence": pytest.approx(0.95), "right": 0.75, "count": 4},
    }


def test_the_fit_is_the_minimum_and_recovers_what_made_the_labels():
    draw = np.random.default_rng(0)
    x = draw.normal(size=20_000) * 3
    right = draw.random(20_000) < sigmoid(0.4 * x - 0.7)
    found = fit(x, right)
    assert found.slope == pytest.approx(0.4, abs=0.02)
    assert found.intercept == pytest.approx(-0.7, abs=0.05)
    good, bad = right.sum(), (~right).sum()
    target = np.where(right, (good + 1) / (good + 2), 1 / (bad + 2))
    nll = lambda w: (np.logaddexp(0, w[0] * x + w[1]) - target * (w[0] * x + w[1])).sum()  # noqa: E731
    best = scipy.optimize.minimize(nll, [1.0, 0.0]).x
    assert [*found] == pytest.approx(best, abs=1e-4)
    assert expected_calibration_error(found(x), right) < 0.02 < expected_calibration_error(sigmoid(x), right)
    assert fit(x, right, intercept=False).intercept == 0.0


def test_the_fit_is_finite_where_scores_separate_and_the_identity_for_one_class():
    separated = fit(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([False, False, True, True]))
    assert 0 < separated.slope < 20
    assert fit(np.array([1.0, 2.0]), np.array([True, True])) == Platt(1.0, 0.0)


def test_auc_and_rank_correlation():
    draw = np.random.default_rng(1)
    score, right = draw.integers(0, 5, 60), draw.random(60) < 0.5
    pairs = [(a > b) + (a == b) / 2 for a in score[right] for b in score[~right]]
    assert auc(score, right) == pytest.approx(np.mean(pairs))
    assert np.isnan(auc(score, np.ones(60, bool)))
    other = score + draw.integers(0, 4, 60)
    assert correlation(score, other) == pytest.approx(scipy.stats.spearmanr(score, other).statistic)
    assert np.isnan(correlation(score, np.ones(60)))


def test_logit_and_sigmoid_are_inverse_and_bounded():
    p = np.array([1e-5, 0.2, 0.5, 0.9])
    assert sigmoid(logit(p)) == pytest.approx(p)
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()
    assert sigmoid(np.array([-1e4, 1e4])).tolist() == [0.0, 1.0]


def test_accuracy_by_length():
    groups = length_groups(np.array([-1, -2, 0, 3]), np.array([True, False, True, False]))
    assert groups == {
        "better is shorter": {"pairs": 2, "accuracy": 0.5},
        "same length": {"pairs": 1, "accuracy": 1.0},
        "better is longer": {"pairs": 1, "accuracy": 0.0},
    }


def test_a_report_on_pairs():
    better, worse = np.array([2.0, 1.0, 0.0, -1.0]), np.array([0.0, 2.0, 0.0, -3.0])
    report = pair_report(better, worse, np.array([[5, 4], [4, 5], [3, 3], [2, 1]]))
    assert report.accuracy == 0.5  # a tie is not right
    assert report.difference == pytest.approx(0.75)
    assert report.loss == pytest.approx(np.logaddexp(0, -(better - worse)).mean())
    assert report.by_length["better is longer"] == {"pairs": 2, "accuracy": 1.0}


def test_answers_that_are_not_there_have_no_part_in_what_is_said_of_lengths():
    """Rows with a label have one answer; the other's score is 0 and it has no tokens."""
    better, worse = np.array([3.0, 2.0, 0.0, 5.0]), np.array([0.0, 0.0, 1.0, 4.0])
    report = pair_report(better, worse, np.array([[3, 0], [4, 0], [0, 5], [1, 2]]))
    assert report.length_correlation == pytest.approx(-1.0)  # 5.0 has 1 token, 4.0 has 2, ... 1.0 has 5
    assert report.by_length == {"better is shorter": {"pairs": 1, "accuracy": 1.0}}
    assert report.accuracy == 0.75
    alone = pair_report(better[:2], worse[:2], np.array([[3, 0], [4, 0]]))
    assert alone.by_length == {}


def test_a_score_that_is_mostly_wrong_way_round_is_not_believed():
    """The fit says that the higher score is the worse answer in four of five."""
    d = np.array([-1.0] * 80 + [1.0] * 20)
    report = pair_report(d, np.zeros(100), np.ones((100, 2)))
    assert report.temperature == float("inf")
    assert report.ece == pytest.approx(1 / (1 + np.exp(-1)) - 0.2)
    assert report.ece_scaled < 0.02


def test_a_tie_says_nothing_and_is_held_to_that():
    report = pair_report(np.zeros(10), np.zeros(10), np.ones((10, 2)))
    assert (report.accuracy, report.ece) == (0.0, 0.0)


def test_the_temperature_undoes_overconfidence():
    draw = np.random.default_rng(2)
    d = draw.normal(size=20_000) * 2
    flip = draw.random(20_000) > sigmoid(np.abs(d))
    d = np.where(flip, -np.abs(d), np.abs(d))
    report = pair_report(d * 3, np.zeros(20_000), np.ones((20_000, 2)))
    assert report.temperature == pytest.approx(3.0, rel=0.05)
    assert report.ece_scaled < 0.02 < report.ece
