"""The payload channel: what passes comes back as it was, what does not is refused, and hostile bytes are only ever
refused."""

import collections
import contextlib
import datetime
import decimal
import fractions
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.verifiers.sandbox import wire
from cabochon.verifiers.sandbox.wire import MAX_DEPTH, MAX_FRAME, WireError, frame, pack, unpack

atoms = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
    | st.text(st.characters()) | st.text(st.characters(categories=["Cs", "Lu"])) | st.binary()
)  # fmt: skip
hashable = st.recursive(atoms, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=6)
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=5) | st.tuples(inner) | st.sets(hashable, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
    ),
    max_leaves=30,
)  # fmt: skip


def same(a, b):
    """Equal, and of the same types all the way down."""
    if type(a) is not type(b) or a != b:
        return False
    if isinstance(a, list | tuple):
        return all(map(same, a, b))
    if isinstance(a, dict):
        return all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    return True


@given(values)
def test_plain_data_comes_back(value):
    assert same(unpack(pack(value)), value)


@given(st.lists(st.integers(-(2**70), 2**70), min_size=8) | st.lists(st.floats(allow_nan=False), min_size=8))
def test_long_lists_of_numbers_come_back(value):
    assert same(unpack(pack(value)), value)


@settings(max_examples=400)
@given(st.binary(max_size=300))
def test_hostile_bytes_are_refused_and_nothing_else(data):
    with contextlib.suppress(WireError):
        pack(unpack(data))


@settings(max_examples=400)
@given(values, st.data())
def test_damaged_messages_are_refused_or_plain(value, data):
    message = bytearray(pack(value))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(WireError):
        unpack(bytes(message))


@pytest.mark.parametrize(
    "value",
    [float("inf"), -0.0, 10**500, -(10**500), bytearray(b"x"), range(1, 9, 2), collections.Counter("aab"),
     collections.OrderedDict([(2, 1), (1, 2)]), collections.deque([1, 2], maxlen=3), fractions.Fraction(1, 3),
     decimal.Decimal("1.10"), datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
     datetime.timedelta(days=-1, seconds=5), {1: 2}.keys(), {1: 2}.items(), int, str, dict],
)  # fmt: skip
def test_library_values_come_back(value):
    back = unpack(pack(value))
    assert type(back) is type(value)
    assert back == value


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("collections.deque", (range(10**12), None)), ("builtins.dict_keys", range(10**12)),
     ("builtins.dict_values", range(10**12)), ("builtins.dict_items", [range(10**12)]),
     ("collections.Counter", [range(10**12)]), ("collections.OrderedDict", {1: 2}),
     ("fractions.Fraction", ("1e999999999", None)), ("fractions.Fraction", (1.5, 2)), ("builtins.range", [1, 2, 3]),
     ("decimal.Decimal", (0, (1,), 5)), ("datetime.timedelta", (1.5, 0, 0)), ("datetime.date", 5),
     ("x.deque", ([], None))],
)  # fmt: skip
def test_library_values_of_odd_parts_are_refused_at_once(kind, parts):
    with pytest.raises(WireError):
        unpack(b"x" + struct.pack("<I", len(kind)) + kind.encode() + pack(parts))


def test_nan_and_negative_zero():
    assert math.isnan(unpack(pack(float("nan"))))
    assert math.copysign(1, unpack(pack(-0.0))) == -1


def test_subclasses_become_plain():
    class Sneaky(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    class Mapping(dict):
        def items(self):
            return []

    Point = collections.namedtuple("Point", "x y")
    assert same(unpack(pack([Sneaky(3), Mapping(a=1), Point(1, 2), collections.defaultdict(list, {1: [2]})])),
                [3, {"a": 1}, (1, 2), {1: [2]}])  # fmt: skip


def test_limits(monkeypatch):
    monkeypatch.setattr(wire, "MAX_NODES", 5000)
    deep = []
    for _ in range(MAX_DEPTH + 5):
        deep = [deep]
    cycle = []
    cycle.append(cycle)
    for value in (deep, cycle, "x" * (MAX_FRAME + 1), [[]] * 6000, object(), lambda: 0):
        with pytest.raises(WireError):
            pack(value)
    with pytest.raises(WireError):
        unpack(b"l" + struct.pack("<I", 2**31) + b"N" * 10)
    with pytest.raises(WireError):
        unpack((b"l" + struct.pack("<I", 1)) * 5000 + b"N")
    with pytest.raises(WireError):
        frame(bytes(MAX_FRAME + 1))
