import base64

import numpy as np
import pytest

from cabochon.report.series import FAIR, Curves, Loads


def curves(rows, most):
    out = Curves(most)
    for step, row in rows:
        out.add(step, row)
    return out.columns()


def test_a_short_run_is_shown_as_it_is():
    found = curves([(1, {"a": 0.5, "b": {"c": 2}, "text": "x", "flag": True}), (2, {"a": None}), (3, {"a": 1.0})], 10)
    assert found == {"width": 1, "step": [1, 2, 3], "values": {"a": [0.5, None, 1], "b/c": [2, None, None]}}


def test_a_long_run_keeps_mean_least_and_greatest_of_neighbours():
    y = np.arange(1, 1001, dtype=float)
    found = curves([(s, {"y": float(v)}) for s, v in enumerate(y, 1)], 100)
    assert found["width"] == 16
    assert len(found["step"]) == 63
    assert found["step"][0] == 16
    assert found["step"][-1] == 1000
    for i, start in enumerate(range(0, 1000, 16)):
        part = y[start : start + 16]
        assert found["values"]["y"][i] == pytest.approx(part.mean())
        assert (found["low"]["y"][i], found["high"]["y"][i]) == (part.min(), part.max())


def test_rare_readings_survive_and_what_is_not_finite_is_no_number():
    rows = [(s, {"x": float("nan"), **({"held": s} if s % 100 == 0 else {})}) for s in range(1, 401)]
    found = curves(rows, 50)
    assert [v for v in found["values"]["held"] if v is not None] == [100, 200, 300, 400]
    assert "x" not in found["values"]


def levels(heat):
    raw = np.frombuffer(base64.b64decode(heat["load"]), np.uint8)
    return raw.reshape(len(heat["step"]), heat["layers"], heat["experts"])


def test_loads_are_shares_of_an_equal_one_and_zero_is_no_token():
    loads = Loads()
    loads.add({"step": 1, "used": [[10, 10], [0, 20]], "agreement": [1.0, 0.5]})
    loads.add({"step": 2, "used": [[199, 1], [0, 200]]})
    loads.add({"step": 3, "used": "nonsense"})
    loads.add({"step": 3, "used": [[1, 2, 3]]})
    heat = loads.heat()
    assert levels(heat)[0].tolist() == [[FAIR, FAIR], [0, 2 * FAIR]]
    assert levels(heat)[1, 0].tolist() == [round(1.99 * FAIR), 1], "few is not none"
    assert heat["agreement"] == [[1, 0.5], None]


def test_columns_of_a_long_run_are_sums():
    loads = Loads(cells=64)  # 8 columns of 2 x 4
    for step in range(1, 33):
        loads.add({"step": step, "used": [[step, 0, 0, 0], [1, 1, 1, 1]], "agreement": [1.0, step / 32]})
    heat = loads.heat()
    assert (heat["width"], heat["step"]) == (4, [4, 8, 12, 16, 20, 24, 28, 32])
    assert levels(heat)[:, 0].tolist() == [[4 * FAIR, 0, 0, 0]] * 8
    assert heat["agreement"][0][1] == pytest.approx((1 + 2 + 3 + 4) / 4 / 32, abs=1e-5)


def test_no_experts_no_heat():
    assert Loads().heat() is None
