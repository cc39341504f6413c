"""Aggregation modes and the fixed budget against hand-worked numbers (algorithms.md sections 9 and 10)."""

import itertools

import numpy as np
import pytest

from cabochon.rl.aggregation import shuffled_groups, token_weights, within_budget

LOSSES = [np.array([4.0]), np.array([1.0, 1, 1])]


def value(mode, losses=LOSSES, group=(0, 1), constant=0):
    count = np.array([len(x) for x in losses])
    weight, share = token_weights(mode, count, np.array(group), constant)
    return sum(w * x.sum() for w, x in zip(weight, losses, strict=True)) / share.sum()


@pytest.mark.parametrize(
    ("mode", "constant", "want"),
    [
        ("token_mean", 0, 1.75),
        ("seq_mean_token_mean", 0, 2.5),
        ("seq_mean_token_sum", 0, 3.5),
        ("constant_length", 4, 0.875),
        ("fixed_budget", 8, 0.875),
        ("prompt_mean", 0, 2.5),
    ],
)
def test_modes_by_hand(mode, constant, want):
    assert value(mode, constant=constant) == pytest.approx(want)


def test_prompt_mean_weighs_prompts_alike():
    losses = [np.array([4.0]), np.array([1.0, 1, 1]), np.array([8.0, 8.0])]
    assert value("prompt_mean", losses, (0, 0, 1)) == pytest.approx((7 / 4 + 8) / 2)


def test_what_has_no_trained_token_is_not_counted():
    losses = [*LOSSES, np.array([])]
    for mode, constant in (("token_mean", 0), ("seq_mean_token_mean", 0), ("constant_length", 4), ("fixed_budget", 8)):
        assert value(mode, losses, (0, 1, 1), constant) == pytest.approx(value(mode, constant=constant))


LENGTHS, PER_TOKEN = np.array([4, 5, 3, 6]), np.array([1.0, 2, 4, 8])


def test_budget_by_hand():
    kept = within_budget(LENGTHS, 10)
    np.testing.assert_array_equal(kept, [4, 5, 1, 0])
    weight, share = token_weights("fixed_budget", kept, np.arange(4), 10)
    assert (weight * kept) @ PER_TOKEN / share.sum() == pytest.approx(1.8)
    weight, share = token_weights("fixed_budget", within_budget(LENGTHS, 30), np.arange(4), 30)
    assert (weight * LENGTHS) @ PER_TOKEN / share.sum() == pytest.approx(74 / 30), "divided by the budget all the same"
    whole = np.array([4, 5, 3, 0])
    assert value("token_mean", [np.full(n, x) for n, x in zip(whole, PER_TOKEN, strict=True)], range(4)) == (
        pytest.approx(26 / 12)
    )
    cut = [np.full(n, x) for n, x in zip(kept, PER_TOKEN, strict=True)]
    assert value("seq_mean_token_mean", cut, range(4)) == pytest.approx(7 / 3)


def test_groups_are_shuffled_whole():
    group = np.array([7, 7, 3, 3, 3, 5])
    orders = {tuple(group[shuffled_groups(group, np.random.default_rng(s))]) for s in range(40)}
    assert len(orders) == 6
    for order in orders:
        changes = sum(a != b for a, b in itertools.pairwise(order))
        assert changes == 2
    first = shuffled_groups(group, np.random.default_rng(1))
    np.testing.assert_array_equal(first, shuffled_groups(group, np.random.default_rng(1)))
    assert [i for i in first if group[i] == 3] == [2, 3, 4]
