"""Sequences become rows: positions, segments, masks, packing."""

import numpy as np
import pytest

from cabochon.batch import best_fit, from_rows, from_sequences, to_rows
from cabochon.errors import UserError


def test_the_docstring_example():
    tokens = [np.array([5, 6, 7]), np.array([8, 9])]
    batch = from_sequences(tokens, [np.array([0, 0, 1]), np.array([1, 1])], 6, rows=[[0, 1]])
    np.testing.assert_array_equal(batch.tokens_BT, [[5, 6, 7, 8, 9, 0]])
    np.testing.assert_array_equal(batch.segment_BT, [[1, 1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(batch.position_BT, [[0, 1, 2, 0, 1, 0]])
    np.testing.assert_array_equal(batch.mask_BT, [[0, 0, 1, 0, 1, 0]])


def test_routes_lie_beside_their_tokens():
    routes = [np.tile([3, 4], (2, 1, 1)), np.tile([5, 6], (1, 1, 1))]
    batch = from_sequences([np.array([1, 2]), np.array([3])], [np.ones(2), np.ones(1)], 4, rows=[[0, 1]], routes=routes)
    np.testing.assert_array_equal(batch.routes_BTLC[0, :, 0, 0], [3, 3, 5, -1])


def test_values_lie_beside_their_tokens_and_come_back():
    lengths, rows = [3, 1, 2], [[1, 2], [0]]
    tokens = [np.arange(n) + 10 * i for i, n in enumerate(lengths, 1)]
    batch = from_sequences(tokens, [np.ones(n) for n in lengths], 4, rows=rows)
    laid = to_rows([t / 2 for t in tokens], rows, 4)
    np.testing.assert_array_equal(laid, batch.tokens_BT / 2)
    for got, want in zip(from_rows(batch.tokens_BT, rows, lengths), tokens, strict=True):
        np.testing.assert_array_equal(got, want)


def test_best_fit_fills_rows_and_keeps_every_sequence_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 300).tolist()
    rows = best_fit(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(300))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 128
    assert len(rows) <= 11 / 9 * np.ceil(sum(lengths) / 128) + 1


def test_best_fit_takes_the_fullest_row_that_fits():
    assert best_fit([6, 5, 4, 3], 10) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("bad", [0, 9])
def test_lengths_that_cannot_fit(bad):
    with pytest.raises(UserError, match=f"sequence 1 has {bad} tokens; expected 1 to 8"):
        best_fit([3, bad], 8)


def test_overflowing_row():
    with pytest.raises(UserError, match="row 0: sequences"):
        from_sequences([np.ones(3, np.int32)] * 2, [np.ones(3)] * 2, 5, rows=[[0, 1]])


def test_a_route_that_names_an_expert_twice():
    routes = [np.array([[[0, 1]], [[2, 2]]]), np.array([[[-1, -1]]])]
    with pytest.raises(UserError, match="sequence 0: the routes of token 1, sparse layer 0 name an expert twice"):
        from_sequences([np.array([1, 2]), np.array([3])], [np.ones(2), np.ones(1)], 4, routes=routes)
