"""Curves of any length in a bounded space: rows come one by one, neighbouring steps share a bucket.

When the buckets would be too many, each gets twice as many steps. A bucket keeps what it takes for mean, least and
greatest. So the result is a function of the rows alone, whether they were read at once or as they came.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cabochon.report.files import count_of

POINTS = 400
"""buckets of a curve at most"""
CELLS = 400_000
"""cells of a heat map at most: layers x experts x buckets"""
FAIR = 50
"""the byte that stands for an expert's fair share; 5.1 times that and more is 255"""


def scalars(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a row, nested names joined by `/`. Raises OverflowError for an integer beyond floats."""
    out: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            out |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            out[f"{prefix}{name}"] = float(value)
    return out


def short(x: float) -> float | int | None:
    """Five digits: what a screen can show. None for what is not finite, such as the sum of two that nearly were not."""
    x = float(f"{x:.5g}")
    if not math.isfinite(x):
        return None
    return int(x) if x.is_integer() and abs(x) < 1e15 else x


class Curves:
    """Every number of metrics.jsonl. `odd`: rows passed over, since they cannot be read as such."""

    def __init__(self, most: int = POINTS) -> None:
        self.most, self.width = most, 1
        self.rows = self.odd = 0
        self._buckets: dict[int, dict[str, list[float]]] = {}  # name -> [count, total, low, high]

    def add(self, step: Any, row: Mapping[str, Any]) -> None:
        try:
            found = scalars(row)
        except (OverflowError, RecursionError):
            self.odd += 1
            return
        if count_of(step) is None:
            self.odd += 1
            return
        self.rows += 1
        while step > self.most * self.width:
            self._widen()
        bucket = self._buckets.setdefault((step - 1) // self.width, {"step": [0, 0, 0, 0]})
        at = bucket["step"]
        at[3] = max(at[3], step)
        for name, x in found.items():
            if name != "step":
                _count(bucket, name, [1, x, x, x])

    def _widen(self) -> None:
        self.width *= 2
        old, self._buckets = self._buckets, {}
        for index, bucket in sorted(old.items()):
            new = self._buckets.setdefault(index // 2, {"step": [0, 0, 0, 0]})
            for name, item in bucket.items():
                _count(new, name, item)

    def columns(self) -> dict[str, Any]:
        """`step`: the last one of each bucket; `values`: name -> means, null where there are none; `low` and `high`
        where buckets hold more than one step."""
        order = [self._buckets[i] for i in sorted(self._buckets)]
        names = sorted({name for bucket in order for name in bucket} - {"step"})
        out: dict[str, Any] = {"width": self.width, "step": [int(b["step"][3]) for b in order]}
        out["values"] = {n: [short(b[n][1] / b[n][0]) if n in b else None for b in order] for n in names}
        if self.width > 1:
            for key, at in (("low", 2), ("high", 3)):
                out[key] = {n: [short(b[n][at]) if n in b else None for b in order] for n in names}
        return out


def _count(bucket: dict[str, list[float]], name: str, new: list[float]) -> None:
    at = bucket.get(name)
    if at is None:
        bucket[name] = list(new)
        return
    at[0] += new[0]
    at[1] += new[1]
    at[2] = min(at[2], new[2])
    at[3] = max(at[3], new[3])


class Loads:
    """The expert loads of moe.jsonl: layer x expert x bucket of steps. `odd`: rows passed over, since they cannot be
    read as such, or are not of the shape of those before."""

    def __init__(self, cells: int = CELLS) -> None:
        self.cells, self.width, self.shape = cells, 1, (0, 0)
        self._most = self.odd = 0
        self._buckets: dict[int, dict[str, Any]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        try:
            used = np.asarray(row["used"], np.float64)
            agreement = row.get("agreement")
            known = None if agreement is None else np.asarray(agreement, np.float64)
        except (KeyError, TypeError, ValueError, OverflowError):
            self.odd += 1
            return
        step, shape = count_of(row.get("step")), self.shape if self._buckets else used.shape
        fits = used.ndim == 2 and used.size > 0 and used.shape == shape and bool(((used >= 0) & (used < 1e12)).all())
        if step is None or not fits or (known is not None and known.shape != used.shape[:1]):
            self.odd += 1
            return
        if not self._buckets:
            self.shape = (used.shape[0], used.shape[1])
            self._most = max(8, min(160, self.cells // used.size))
        while step > self._most * self.width:
            self.width *= 2
            old, self._buckets = self._buckets, {}
            for index, bucket in sorted(old.items()):
                self._merge(index // 2, **bucket)
        self._merge((step - 1) // self.width, step=step, used=used, agreement=known, count=1)

    def _merge(self, index: int, step: int, used: np.ndarray, agreement: np.ndarray | None, count: int) -> None:
        at = self._buckets.get(index)
        if at is None:
            self._buckets[index] = {"step": step, "used": used, "agreement": agreement, "count": count}
            return
        both = None
        if agreement is not None and at["agreement"] is not None:
            both = (at["agreement"] * at["count"] + agreement * count) / (at["count"] + count)
        self._buckets[index] = {
            "step": max(at["step"], step), "used": at["used"] + used, "agreement": both, "count": at["count"] + count,
        }  # fmt: skip

    def heat(self) -> dict[str, Any] | None:
        """`load`: base64 of bytes [step][layer][expert], `fair` for an equal share and 0 for no token at all;
        `agreement` [step][layer], null where it is not known. None where nothing was recorded."""
        if not self._buckets:
            return None
        order = [self._buckets[i] for i in sorted(self._buckets)]
        used = np.stack([b["used"] for b in order])
        share = used / np.maximum(used.sum(-1, keepdims=True), 1) * used.shape[-1]
        level = np.where(used > 0, np.clip(np.rint(share * FAIR), 1, 255), 0).astype(np.uint8)
        agreement = [None if b["agreement"] is None else [short(x) for x in b["agreement"]] for b in order]
        return {
            "step": [b["step"] for b in order], "layers": self.shape[0], "experts": self.shape[1], "fair": FAIR,
            "width": self.width, "load": base64.b64encode(level.tobytes()).decode(), "agreement": agreement,
        }  # fmt: skip
