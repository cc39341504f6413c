"""Mismatch against hand-worked numbers (algorithms.md section 11)."""

import numpy as np
import pytest

from cabochon.rl.off_policy import mismatch

W = np.array([1.0, 3.0, 0.25])


def test_mismatch_by_hand():
    behaviour = np.array([-1.0, -2.0, -3.0])
    got = mismatch([np.log(W) + behaviour, np.array([5.0])], [behaviour, np.array([0.0])],
                   [np.ones(3, bool), np.zeros(1, bool)])  # fmt: skip
    assert got["k3"] == pytest.approx(0.512561, abs=1e-5)
    assert got["effective_sample_size"] == pytest.approx(0.695473, abs=1e-6)
    assert got["max_abs_log_w"] == pytest.approx(np.log(4))
    assert got["k1"] == pytest.approx(-np.log(0.75) / 3)
    same = mismatch([behaviour], [behaviour], [np.ones(3, bool)])
    assert same == {"k1": 0, "k3": 0, "max_abs_log_w": 0, "effective_sample_size": 1, "correlation": pytest.approx(1)}


def test_what_is_undefined_does_not_poison_the_rest():
    inf = np.array([-np.inf, -1.0])
    got = mismatch([inf], [inf], [np.ones(2, bool)])
    assert got["k3"] == 0
    assert got["correlation"] == 1
    assert mismatch([], [], []) == {}
    assert mismatch([inf], [inf], [np.zeros(2, bool)]) == {}
