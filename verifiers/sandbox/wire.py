"""Plain data between host and sandbox: typed, size-limited, no pickle, no eval, no JSON.

Runs on both sides, so it imports nothing but `struct` and works alone. Reading hostile bytes raises WireError and
nothing else. One value is one tag byte and its body; a frame is a little-endian u32 length and that many bytes.

What passes: None, bool, int, float, complex, str (lone surrogates too), bytes, bytearray, list, tuple, set,
frozenset, dict, builtin types by name, a few standard-library values rebuilt outside from plain parts (Counter,
deque, Fraction, dates ...). Subclasses are flattened to their plain base, so no code of the sender's class ever runs
at the receiver. Anything else is a handle: a number the sender can resolve and the receiver can only hold (`h`, `k`),
or a name of the receiver's own (`g`).
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False  # the real one costs an import that takes longer than all of this
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

MAX_FRAME = 8 << 20
"""bytes"""
MAX_DEPTH = 200
MAX_NODES = 1_000_000

BUILTIN_TYPES: dict[str, Any] = {
    t.__name__: t
    for t in (int, float, str, bool, bytes, bytearray, complex, list, tuple, set, frozenset, dict, object, type(None),
              type, range, slice)
}  # fmt: skip
_INT64 = range(-(1 << 63), 1 << 63)


class WireError(ValueError):
    """The value cannot pass, or the bytes are not one."""


class Handle:
    """A sender's object that is not plain data. `kind` is its class name, for people."""

    __slots__ = ("id", "kind")

    def __init__(self, id: int, kind: str) -> None:
        self.id = id
        self.kind = kind


class Writer:
    """Encodes one value. `handle` numbers what is not plain data; without it such a value is a WireError. Instances
    of `keep` are numbered even where they have a plain base."""

    def __init__(
        self, handle: Callable[[Any], tuple[bytes, int, str]] | None = None, keep: tuple[type, ...] = ()
    ) -> None:
        self.keep = keep
        self.out = bytearray()
        self.nodes = 0
        self.handle = handle

    def sized(self, tag: bytes, body: bytes | bytearray) -> None:
        self.out += tag + struct.pack("<I", len(body)) + body
        if len(self.out) > MAX_FRAME:
            raise WireError(f"a value over {MAX_FRAME} bytes")

    def put(self, v: Any, depth: int = 0) -> None:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise WireError(f"a value nested over {MAX_DEPTH} deep or with over {MAX_NODES} parts")
        kind = type(v)
        if v is None:
            self.out += b"N"
        elif kind is bool:
            self.out += b"T" if v else b"F"
        elif kind is int:
            self.sized(b"i", int.to_bytes(v, v.bit_length() // 8 + 1, "little", signed=True))
        elif kind is float:
            self.out += b"d" + struct.pack("<d", v)
        elif kind is str:
            self.sized(b"s", v.encode("utf-8", "surrogatepass"))
        elif kind is list:
            self._list(v, depth)
        elif kind in (tuple, set, frozenset):
            self._items(b"t" if kind is tuple else b"e" if kind is set else b"z", v, depth)
        elif kind is dict:
            self._items(b"m", (x for pair in v.items() for x in pair), depth, 2 * len(v))
        elif kind is bytes or kind is bytearray:
            self.sized(b"b" if kind is bytes else b"a", v)
        elif kind is complex:
            self.out += b"c" + struct.pack("<dd", v.real, v.imag)
        else:
            self._rare(v, depth)

    def _list(self, v: list[Any], depth: int) -> None:
        kinds = set(map(type, v)) if len(v) >= 8 else set()
        if kinds == {int} and min(v) in _INT64 and max(v) in _INT64:
            self.sized(b"I", struct.pack(f"<{len(v)}q", *v))
        elif kinds == {float}:
            self.sized(b"D", struct.pack(f"<{len(v)}d", *v))
        else:
            self._items(b"l", v, depth)

    def _items(self, tag: bytes, items: Iterable[Any], depth: int, n: int | None = None) -> None:
        self.out += tag + struct.pack("<I", len(items) if n is None else n)  # type: ignore[arg-type]
        for x in items:
            self.put(x, depth + 1)
        if len(self.out) > MAX_FRAME:
            raise WireError(f"a value over {MAX_FRAME} bytes")

    def _rare(self, v: Any, depth: int) -> None:
        """Builtin types by name, standard-library values by parts, subclasses by their plain base, handles."""
        kind = type(v)
        name: Any = v.__name__ if kind is type else ""
        if name and BUILTIN_TYPES.get(name) is v:
            self.sized(b"y", name.encode())
            return
        parts = _parts(v, f"{kind.__module__}.{kind.__name__}")
        if parts is not None:
            self.sized(b"x", parts[0].encode())
            self.put(parts[1], depth + 1)
            return
        kept = isinstance(v, self.keep)
        for base in () if kept else (bool, int, float, complex, str, bytes, bytearray):
            if isinstance(v, base):
                plain: Any = bytearray(bytes(v)) if base is bytearray else base.__new__(base, v)  # type: ignore
                self.put(plain, depth + 1)
                return
        for container in () if kept else (list, tuple, set, frozenset):
            if isinstance(v, container):
                self.put(container(container.__iter__(v)), depth + 1)  # type: ignore[arg-type]
                return
        if isinstance(v, dict) and not kept:
            self.put(dict(dict.items(v)), depth + 1)
            return
        if self.handle is None:
            raise WireError(f"a {kind.__name__} is not plain data")
        tag, number, name = self.handle(v)
        self.out += tag + struct.pack("<I", number)
        self.sized(b"", name.encode("utf-8", "replace")[:100])


def _parts(v: Any, kind: str) -> tuple[str, Any] | None:
    """A standard-library value as (name, plain parts); None where it is not one of the known ones."""
    if kind in ("collections.Counter", "collections.OrderedDict"):
        return kind, list(dict.items(v))
    if kind == "collections.deque":
        return kind, (list(v), v.maxlen)
    if kind == "fractions.Fraction":
        return kind, (int(v.numerator), int(v.denominator))
    if kind == "decimal.Decimal":
        return kind, str(v)
    if kind in ("datetime.date", "datetime.datetime", "datetime.time"):
        return None if getattr(v, "tzinfo", None) is not None else (kind, v.isoformat())
    if kind == "datetime.timedelta":
        return kind, (v.days, v.seconds, v.microseconds)
    if kind == "builtins.range":
        return kind, (v.start, v.stop, v.step)
    if kind in ("builtins.dict_keys", "builtins.dict_values", "builtins.dict_items"):
        return kind, list(v)
    return None


_FORMS: dict[str, tuple[type, ...]] = {
    "deque": (list, object), "Fraction": (int, int), "timedelta": (int, int, int), "range": (int, int, int),
}  # fmt: skip
_PAIRS = ("Counter", "OrderedDict", "dict_items")


def _as_sent(name: str, parts: Any) -> bool:
    """Whether `parts` have the types `_parts` gives them. A range where a list should be is a few bytes here and would
    be all of memory there; Fraction reads exponents."""
    if name in _FORMS:
        forms = _FORMS[name]
        return type(parts) is tuple and len(parts) == len(forms) and all(map(isinstance, parts, forms))
    if name in _PAIRS:
        return type(parts) is list and all(type(pair) is tuple for pair in parts)
    return type(parts) is list if name in ("dict_keys", "dict_values") else type(parts) is str


def _rebuild(kind: str, parts: Any) -> Any:
    """The inverse of `_parts`, with the receiver's own standard library."""
    module, _, name = kind.rpartition(".")
    if not _as_sent(name, parts):
        raise WireError(f"a {kind} of odd parts")
    if module == "collections":
        import collections

        if name == "deque":
            return collections.deque(parts[0], parts[1])
        return collections.Counter(dict(parts)) if name == "Counter" else collections.OrderedDict(parts)
    if kind == "fractions.Fraction":
        from fractions import Fraction

        return Fraction(parts[0], parts[1])
    if kind == "decimal.Decimal":
        from decimal import Decimal

        return Decimal(parts)
    if module == "datetime":
        import datetime

        if name == "timedelta":
            return datetime.timedelta(*parts)
        kinds: Any = {"date": datetime.date, "datetime": datetime.datetime, "time": datetime.time}
        return kinds[name].fromisoformat(parts)
    if name == "range":
        return range(*parts)
    if name == "dict_keys":
        return dict.fromkeys(parts).keys()
    if name == "dict_values":
        return dict(enumerate(parts)).values()
    if name == "dict_items":
        return dict(parts).items()
    raise WireError(f"no value of kind {kind!r}")


class Reader:
    """Decodes one value. `resolve` turns (tag, number, kind) of a handle into what the receiver uses for it."""

    def __init__(self, data: bytes, resolve: Callable[[bytes, int, str], Any] | None = None) -> None:
        self.data = data
        self.at = 0
        self.nodes = 0
        self.resolve = resolve

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise WireError("the value is cut off")
        self.at += n
        return self.data[self.at - n : self.at]

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def get(self, depth: int = 0) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise WireError(f"a value nested over {MAX_DEPTH} deep or with over {MAX_NODES} parts")
        tag = self.take(1)
        if tag in b"NTF":
            return {b"N": None, b"T": True, b"F": False}[tag]
        if tag == b"d":
            return struct.unpack("<d", self.take(8))[0]
        if tag == b"c":
            return complex(*struct.unpack("<dd", self.take(16)))
        n = self.u32()
        if tag in b"letzm":
            return self._container(tag, n, depth)
        if tag in b"hkg":
            kind = self.take(self.u32()).decode("utf-8", "replace")
            if self.resolve is None:
                raise WireError(f"an object of class {kind} where plain data is expected")
            return self.resolve(tag, n, kind)
        body = self.take(n)
        if tag == b"i":
            return int.from_bytes(body, "little", signed=True)
        if tag == b"s":
            return body.decode("utf-8", "surrogatepass")
        if tag in b"ID" and not n % 8:
            return list(struct.unpack(f"<{n // 8}{'q' if tag == b'I' else 'd'}", body))
        if tag in b"ba":
            return body if tag == b"b" else bytearray(body)
        if tag == b"y":
            return BUILTIN_TYPES[body.decode()]
        if tag == b"x":
            return _rebuild(body.decode(), self.get(depth + 1))
        raise WireError(f"no value has the tag {tag!r}")

    def _container(self, tag: bytes, n: int, depth: int) -> Any:
        if n > len(self.data) - self.at:
            raise WireError("the value is cut off")
        items = [self.get(depth + 1) for _ in range(n)]
        if tag == b"l":
            return items
        if tag == b"t":
            return tuple(items)
        if tag == b"m":
            return dict(zip(items[::2], items[1::2], strict=True))
        return set(items) if tag == b"e" else frozenset(items)


def pack(
    value: Any, handle: Callable[[Any], tuple[bytes, int, str]] | None = None, keep: tuple[type, ...] = ()
) -> bytes:
    """The bytes of `value`. Raises WireError where it is not plain data within the limits."""
    writer = Writer(handle, keep)
    try:
        writer.put(value)
    except (ValueError, TypeError, RecursionError, AttributeError, RuntimeError, struct.error, OverflowError) as e:
        raise e if isinstance(e, WireError) else WireError(f"{type(e).__name__}: {e}") from None
    return bytes(writer.out)


def unpack(data: bytes, resolve: Callable[[bytes, int, str], Any] | None = None) -> Any:
    """The value in `data`. Raises WireError, and nothing else, for anything that is not one whole value."""
    reader = Reader(data, resolve)
    try:
        value = reader.get()
    except WireError:
        raise
    except Exception as e:  # a standard-library constructor on hostile parts may raise nearly anything
        raise WireError(f"{type(e).__name__}: {str(e)[:200]}") from None
    if reader.at != len(data):
        raise WireError("bytes are left over after the value")
    return value


def frame(payload: bytes) -> bytes:
    """`payload` with its length in front. Raises WireError over MAX_FRAME."""
    if len(payload) > MAX_FRAME:
        raise WireError(f"a message over {MAX_FRAME} bytes")
    return struct.pack("<I", len(payload)) + payload
