"""The payload channel: what passes comes back as it was, what does not is refused, and hostile bytes are only ever
refused."""

import collections
import contextlib
import datetime
import decimal
import enum
import fractions
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.verifiers.sandbox import wire
from cabochon.verifiers.sandbox.wire import MAX_DEPTH, MAX_FRAME, Reader, WireError, Writer, frame, pack, unpack

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


def test_what_is_one_container_stays_one():
    row, bag, queue = [0], {1}, collections.deque([1])
    counter, data = collections.Counter("a"), bytearray(b"x")
    value = [[row, row], (row, [row]), {"a": bag, "b": bag}, queue, [queue, counter, counter], data, data, [1] * 9]
    rows, (first, [second]), bags, one, [two, three, four], five, six, _ = unpack(pack(value))
    assert rows[0] is rows[1] is first is second
    assert bags["a"] is bags["b"]
    assert one is two
    assert three is four
    assert five is six
    assert unpack(pack([[0], [0]]))[0] is not unpack(pack([[0], [0]]))[1]


def test_subclasses_and_long_lists_are_one_container_too():
    class Rows(list):
        pass

    rows, numbers = Rows([1]), list(range(100))
    back = unpack(pack([rows, rows, numbers, numbers]))
    assert back == [[1], [1], numbers, numbers]
    assert back[0] is back[1]
    assert back[2] is back[3]


def laughs(leaf, levels=40):
    for _ in range(levels):
        leaf = [leaf, leaf]
    return leaf


def hostile_laughs(levels):
    """Lists of which each holds the next one twice, as nobody here would write them."""
    return (b"l" + struct.pack("<I", 2)) * levels + b"N" + b"".join(
        b"r" + struct.pack("<I", n) if n < levels else b"N" for n in range(levels, 0, -1)
    )


@pytest.mark.parametrize("leaf", [[], [0] * 100, bytearray(1000), {"a": []}, collections.deque([[]])])
def test_references_cost_what_they_stand_for(leaf):
    with pytest.raises(WireError):
        pack(laughs(leaf))
    assert unpack(pack(laughs(leaf, 5))) == laughs(leaf, 5)


def test_hostile_references_are_refused():
    assert len(pack(unpack(hostile_laughs(10)))) < 2**12
    cases = [
        hostile_laughs(60),
        b"r" + struct.pack("<I", 0),
        b"l" + struct.pack("<I", 1) + b"r" + struct.pack("<I", 0),
        b"l" + struct.pack("<I", 2) + b"l" + struct.pack("<I", 0) + b"r" + struct.pack("<I", 7),
        b"q" + struct.pack("<I", 0),
        b"e" + struct.pack("<I", 1) + b"l" + struct.pack("<I", 0),
    ]
    for data in cases:
        with pytest.raises(WireError):
            unpack(data)
    chain = b"l" + struct.pack("<I", 0)  # each list holds the one before: a depth that no bracket shows
    chain += b"".join(b"l" + struct.pack("<I", 1) + b"r" + struct.pack("<I", n) for n in range(400))
    with pytest.raises(WireError):
        unpack(b"l" + struct.pack("<I", 401) + chain)


def test_containers_of_the_question_come_back_as_themselves():
    writer = Writer()
    asked = [1, {"k": [2]}]
    question = Reader(writer.whole((asked,)))
    got = question.whole()[0]
    known = {id(c): i for i, c in enumerate(question.shared)}
    answer = Reader(Writer(known=known).whole([got[1]["k"], got, [3]]), asked=writer.shared)
    inner, outer, new = answer.whole()
    assert inner is asked[1]["k"]
    assert outer is asked
    assert new == [3]
    assert answer.borrowed


def test_an_ordered_dict_keeps_the_order_it_was_given():
    class Cache(collections.OrderedDict):
        pass

    for kind in (collections.OrderedDict, Cache):
        value = kind([(1, 2), (3, 4)])
        value.move_to_end(1)
        assert list(unpack(pack(value))) == [3, 1]


def test_enumerations_with_a_plain_base_are_their_value():
    class Letter(str, enum.Enum):  # noqa: UP042 (a StrEnum's text is its value)
        A = "a"

    class Number(enum.IntEnum):
        ONE = 1

    assert same(unpack(pack([Letter.A, Number.ONE, ValueError, NotImplemented, ...])),
                ["a", 1, ValueError, NotImplemented, ...])  # fmt: skip


def test_named_tuples_and_default_dicts_cross_beside_handles():
    Point = collections.namedtuple("Point", "x y")
    counts = collections.defaultdict(int, a=1)

    def refused(value):
        raise WireError("no handle")

    point, back = unpack(pack([Point(1, 2), counts], refused))
    assert (point.x, point._fields, point) == (1, ("x", "y"), (1, 2))
    assert (back["a"], back["b"], type(back)) == (1, 0, collections.defaultdict)
    for fields in (["x", "x"], ["1"], ["def"], ["_x"], [1], ["x = 1"]):
        with pytest.raises(WireError):
            unpack(b"x" + struct.pack("<I", 10) + b"namedtuple" + pack(("P", fields, (1, 2))))
