"""Plain data between host and sandbox: typed, size-limited, no pickle, no eval, no JSON.

Runs on both sides, so it imports nothing but `struct` and works alone. Reading hostile bytes raises WireError and
nothing else. One value is one tag byte and its body; a frame is a little-endian u32 length and that many bytes.

What passes: None, bool, int, float, complex, str (lone surrogates too), bytes, bytearray, list, tuple, set,
frozenset, dict, builtin types and exception classes by name, a few standard-library values rebuilt outside from plain
parts (Counter, deque, Fraction, dates ...). Subclasses are flattened to their plain base, so no code of the sender's
class ever runs at the receiver. Anything else is a handle: a number one side can resolve and the other can only hold.

A container that is met twice in a message is sent once and then named by its number, so that what was one object stays
one. Such a name counts as much as what it stands for: no message is larger for whoever compares, prints or sends it on
than its bytes written out could be. What contains itself is refused.
"""

from __future__ import annotations

import builtins
import struct

TYPE_CHECKING = False  # the real one costs an import that takes longer than all of this
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Numbering = Callable[[Any], tuple[bytes, int, str]] | None
    Resolving = Callable[[bytes, int, str], Any] | None

MAX_FRAME = 8 << 20  # bytes
ITSELF = "a value that contains itself"
MAX_DEPTH = 200
MAX_NODES = 1_000_000

_PLAIN: dict[Any, Callable[[Any], Any]] = {
    int: int.__int__, float: float.__float__, complex: complex.__complex__, str: str.__str__,
    bytes: lambda v: bytes(memoryview(v)), tuple: lambda v: tuple(tuple.__iter__(v)),
    frozenset: lambda v: frozenset(frozenset.__iter__(v)),
}  # fmt: skip
"""What makes an instance of a subclass plain, without its own methods."""
CONTAINERS = (list, set, dict, bytearray)
PLAIN_BASES = (*_PLAIN, *CONTAINERS)
_ERRORS = [t for t in vars(builtins).values() if isinstance(t, type) and issubclass(t, BaseException)]
BUILTIN_TYPES: dict[str, Any] = {
    t.__name__: t for t in (*PLAIN_BASES, *_ERRORS, bool, object, type(None), type, range, slice)
} | {"NotImplemented": NotImplemented, "Ellipsis": Ellipsis}
_INT64 = range(-(1 << 63), 1 << 63)


class WireError(ValueError):
    """The value cannot pass, or the bytes are not one."""


class _Message:
    """The containers of one message by number, and how much each of them is when it is written out."""

    def __init__(self) -> None:
        self.shared: list[Any] = []
        self.sizes: list[tuple[int, int, int] | None] = []
        """nodes, bytes and depth below; None for one that is not at its end"""
        self.nodes = 0
        self.extra = 0
        """bytes that references stand for"""
        self.deepest = 0

    at = 0  # bytes written or read

    def count(self, depth: int) -> None:
        self.nodes += 1
        if depth > self.deepest:
            self.deepest = depth
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise WireError(f"a value nested over {MAX_DEPTH} deep or with over {MAX_NODES} parts")

    def begin(self, v: Any, depth: int) -> tuple[int, int, int, int]:
        mark = (len(self.shared), self.nodes, self.at + self.extra, self.deepest)
        self.shared.append(v)
        self.sizes.append(None)
        self.deepest = depth
        return mark

    def end(self, mark: tuple[int, int, int, int], depth: int) -> None:
        number, nodes, at, deepest = mark
        self.sizes[number] = (self.nodes - nodes, self.at + self.extra - at, self.deepest - depth)
        self.deepest = max(deepest, self.deepest)

    def again(self, number: int, depth: int) -> None:
        """Counts what container `number` stands for once more."""
        size = self.sizes[number]
        if size is None:
            raise WireError(ITSELF)
        self.nodes += size[0]
        self.extra += size[1]
        self.count(depth + size[2])
        if self.at + self.extra > MAX_FRAME:
            raise WireError(f"a value over {MAX_FRAME} bytes")


class Writer(_Message):
    """Encodes one value. `handle` numbers what is not plain data, else a WireError, and instances of `keep` whatever
    they are. `known`: by id, the number of a container the receiver has from the message this one answers."""

    def __init__(
        self, handle: Numbering = None, keep: tuple[type, ...] = (), known: dict[int, int] | None = None
    ) -> None:
        super().__init__()
        self.keep = keep
        self.known = known or {}
        self.seen: dict[int, int] = {}
        self.out = bytearray()
        self.handle = handle

    def whole(self, value: Any) -> bytes:
        try:
            self.put(value)
        except (ValueError, TypeError, RecursionError, AttributeError, RuntimeError, struct.error, OverflowError) as e:
            raise e if isinstance(e, WireError) else WireError(f"{type(e).__name__}: {e}") from None
        return bytes(self.out)

    @property
    def at(self) -> int:  # type: ignore[override]
        return len(self.out)

    def sized(self, tag: bytes, body: bytes | bytearray) -> None:
        self.out += tag + struct.pack("<I", len(body)) + body
        if len(self.out) + self.extra > MAX_FRAME:
            raise WireError(f"a value over {MAX_FRAME} bytes")

    def put(self, v: Any, depth: int = 0) -> None:
        kind = type(v)
        if kind is list or kind is dict or kind is set or kind is bytearray:
            return self._container(v, kind, depth)
        self.count(depth)
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
        elif kind is tuple or kind is frozenset:
            self._items(b"t" if kind is tuple else b"z", v, depth)
        elif kind is bytes:
            self.sized(b"b", v)
        elif kind is complex:
            self.out += b"c" + struct.pack("<dd", v.real, v.imag)
        else:
            self._rare(v, depth)

    def _container(self, v: Any, kind: Any, depth: int) -> None:
        """What can be changed: in full once, then by number. `kind` is its plain base, or a known name and parts."""
        if (number := self.seen.get(id(v))) is not None:
            self.out += b"r" + struct.pack("<I", number)
            return self.again(number, depth)
        self.count(depth)
        if id(v) in self.known:
            self.out += b"q" + struct.pack("<I", self.known[id(v)])
            return None
        self.seen[id(v)] = len(self.shared)
        mark = self.begin(v, depth)
        if type(kind) is tuple:
            self.sized(b"x", kind[0].encode())
            self.put(kind[1], depth + 1)
        elif kind is bytearray:
            self.sized(b"a", contents(v))
        elif kind is list:
            self._list(v if type(v) is list else contents(v), depth)
        else:
            self._items(b"e" if kind is set else b"m", contents(v), depth)
        return self.end(mark, depth)

    def _list(self, v: list[Any], depth: int) -> None:
        kinds = set(map(type, v)) if len(v) >= 8 else set()
        if kinds == {int} and min(v) in _INT64 and max(v) in _INT64:
            self.sized(b"I", struct.pack(f"<{len(v)}q", *v))
        elif kinds == {float}:
            self.sized(b"D", struct.pack(f"<{len(v)}d", *v))
        else:
            self._items(b"l", v, depth)

    def _items(self, tag: bytes, items: Any, depth: int) -> None:
        self.out += tag + struct.pack("<I", len(items))
        for x in items:
            self.put(x, depth + 1)
        if len(self.out) + self.extra > MAX_FRAME:
            raise WireError(f"a value over {MAX_FRAME} bytes")

    def _rare(self, v: Any, depth: int) -> None:
        """Builtin types by name, standard-library values by parts, subclasses by their plain base, handles."""
        kind = type(v)
        name: Any = v.__name__ if kind is type else repr(v) if v is NotImplemented or v is Ellipsis else ""
        if name and BUILTIN_TYPES.get(name) is v:
            return self.sized(b"y", name.encode())
        kept = issubclass(kind, self.keep)
        parts = None if kept else _parts(v, f"{kind.__module__}.{kind.__name__}", self.handle is not None)
        if parts is not None:
            return self._container(v, parts, depth)
        for base in () if kept else PLAIN_BASES:
            if issubclass(kind, base):
                return self._container(v, base, depth) if base in CONTAINERS else self.put(plain(v), depth)
        if self.handle is None:
            raise WireError(f"a {kind.__name__} is not plain data")
        tag, number, name = self.handle(v)
        self.out += tag + struct.pack("<I", number)
        self.sized(b"", name.encode("utf-8", "replace")[:100])


def contents(v: Any) -> Any:
    """A container's parts by reference, keys and values in turn: enough to see a change or to make another the same.
    None for what cannot be changed."""
    if isinstance(v, list):
        return list(list.__iter__(v))
    if isinstance(v, dict):
        return [x for pair in _pairs(v) for x in pair]
    if isinstance(v, set):
        return list(set.__iter__(v))
    if isinstance(v, bytearray):
        return bytes(memoryview(v))
    return list(v) if _is_of_collections(type(v), "deque") else None


def plain(v: Any) -> Any:
    """`v` as its plain base, by none of its own methods; None where it has no such base."""
    base = next((b for b in PLAIN_BASES if issubclass(type(v), b)), None)
    if base not in CONTAINERS:
        return _PLAIN[base](v) if base else None
    parts = contents(v)
    return dict(zip(parts[::2], parts[1::2], strict=True)) if base is dict else base(parts)


def _is_of_collections(kind: type, name: str) -> bool:
    return kind.__name__ == name and kind.__module__ == "collections"


def _pairs(v: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Not by its own `items`, which may be anything; an OrderedDict keeps its order elsewhere than a dict."""
    base: Any = next(c for c in type(v).__mro__ if c is dict or _is_of_collections(c, "OrderedDict"))
    return list(base.items(v))


_KINDS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "collections.Counter": ("pairs", _pairs), "collections.OrderedDict": ("pairs", _pairs),
    "collections.defaultdict": ((object, "pairs"), lambda v: (v.default_factory, _pairs(v))),
    "collections.deque": ((list, object), lambda v: (list(v), v.maxlen)),
    "fractions.Fraction": ((int, int), lambda v: (int(v.numerator), int(v.denominator))),
    "decimal.Decimal": (str, str), "uuid.UUID": (str, str), "pathlib.PosixPath": (str, str),
    **{f"datetime.{n}": (str, lambda v: v.isoformat()) for n in ("date", "datetime", "time")},
    "datetime.timedelta": ((int, int, int), lambda v: (v.days, v.seconds, v.microseconds)),
    **{f"builtins.{n}": ((object,) * 3, lambda v: (v.start, v.stop, v.step)) for n in ("range", "slice")},
    "builtins.dict_keys": (list, list), "builtins.dict_values": (list, list), "builtins.dict_items": ("pairs", list),
    "namedtuple": ((str, list, tuple), lambda v: (type(v).__name__, list(v._fields), plain(v))),
}  # fmt: skip
"""Standard-library values: the form of their plain parts, and how they are taken apart."""


def _parts(v: Any, kind: str, handles: bool) -> tuple[str, Any] | None:
    """`v` as (name, plain parts); None where it is not one of the known kinds. What is a namedtuple or defaultdict only
    crosses as such beside handles: alone it is a tuple or dict."""
    if handles and issubclass(type(v), tuple) and vars(type(v)).get("_fields"):
        kind = "namedtuple"
    if kind not in _KINDS or (kind == "collections.defaultdict" and not handles):
        return None
    return None if getattr(v, "tzinfo", None) is not None else (kind, _KINDS[kind][1](v))


def _fits(parts: Any, form: Any) -> bool:
    """A range where a list should be is a few bytes here and would be all of memory there; Fraction reads exponents."""
    if form == "pairs":
        return type(parts) is list and all(type(pair) is tuple for pair in parts)
    if type(form) is tuple:
        return type(parts) is tuple and len(parts) == len(form) and all(map(_fits, parts, form))
    return form is object or isinstance(parts, form)


def _rebuild(kind: str, parts: Any) -> Any:
    """The inverse of `_parts`, with the receiver's own standard library."""
    if kind not in _KINDS or not _fits(parts, _KINDS[kind][0]):
        raise WireError(f"no value of kind {kind!r}, or of odd parts")
    module, _, name = kind.rpartition(".")
    if name in ("dict_keys", "dict_values"):
        return dict.fromkeys(parts).keys() if name == "dict_keys" else dict(enumerate(parts)).values()
    if name == "dict_items":
        return dict(parts).items()
    made: Any = getattr(__import__(module or "collections"), name)
    if not module:
        return made(*parts[:2])(*parts[2])
    if type(_KINDS[kind][0]) is tuple:
        return made(*parts)
    return made.fromisoformat(parts) if module == "datetime" else made(dict(parts) if name == "Counter" else parts)


class Reader(_Message):
    """Decodes one value. `resolve` turns (tag, number, kind) of a handle into what the receiver uses for it. `asked`:
    the containers of the message this one answers, by number."""

    def __init__(self, data: bytes, resolve: Resolving = None, asked: list[Any] | None = None) -> None:
        super().__init__()
        self.data = data
        self.at = 0
        self.resolve = resolve
        self.asked = asked or []
        self.borrowed = False
        """The value holds some of `asked`, whose size is not counted here."""

    def whole(self) -> Any:
        try:
            value = self.get()
        except Exception as e:  # a standard-library constructor on hostile parts may raise nearly anything
            raise e if isinstance(e, WireError) else WireError(f"{type(e).__name__}: {str(e)[:200]}") from None
        if self.at != len(self.data):
            raise WireError("bytes are left over after the value")
        return value

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise WireError("the value is cut off")
        self.at += n
        return self.data[self.at - n : self.at]

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def get(self, depth: int = 0) -> Any:
        tag = self.take(1)
        if tag == b"r":
            self.again(number := self.u32(), depth)
            return self.shared[number]
        self.count(depth)
        if tag in b"NTF":
            return {b"N": None, b"T": True, b"F": False}[tag]
        if tag == b"d":
            return struct.unpack("<d", self.take(8))[0]
        if tag == b"c":
            return complex(*struct.unpack("<dd", self.take(16)))
        n = self.u32()
        if tag in b"tz":
            items = self._items(n, depth)
            return tuple(items) if tag == b"t" else frozenset(items)
        if tag in b"lemaIDx":
            mark = self.begin(None, depth)
            value = self._container(tag, n, depth)
            self.end(mark, depth)
            self.shared[mark[0]] = value
            return value
        if tag == b"q":
            self.borrowed = True
            return self.asked[n]
        if tag in b"hk":
            kind = self.take(self.u32()).decode("utf-8", "replace")
            if self.resolve is None:
                raise WireError("an object where plain data is expected")
            return self.resolve(tag, n, kind)
        body = self.take(n)
        if tag == b"i":
            return int.from_bytes(body, "little", signed=True)
        if tag == b"s":
            return body.decode("utf-8", "surrogatepass")
        if tag == b"b":
            return body
        if tag == b"y":
            return BUILTIN_TYPES[body.decode()]
        raise WireError(f"no value has the tag {tag!r}")

    def _items(self, n: int, depth: int) -> list[Any]:
        if n > len(self.data) - self.at:
            raise WireError("the value is cut off")
        return [self.get(depth + 1) for _ in range(n)]

    def _container(self, tag: bytes, n: int, depth: int) -> Any:
        if tag in b"lem":
            items = self._items(n, depth)
            if tag == b"m":
                return dict(zip(items[::2], items[1::2], strict=True))
            return items if tag == b"l" else set(items)
        body = self.take(n)
        if tag == b"a":
            return bytearray(body)
        if tag == b"x":
            return _rebuild(body.decode(), self.get(depth + 1))
        return list(struct.unpack(f"<{n // 8}{'q' if tag == b'I' else 'd'}", body))


def pack(value: Any, handle: Numbering = None, keep: tuple[type, ...] = ()) -> bytes:
    """The bytes of `value`. Raises WireError where it is not plain data within the limits."""
    return Writer(handle, keep).whole(value)


def unpack(data: bytes, resolve: Resolving = None) -> Any:
    """The value in `data`. Raises WireError, and nothing else, for anything that is not one whole value."""
    return Reader(data, resolve).whole()


def frame(payload: bytes) -> bytes:
    """`payload` with its length in front. Raises WireError over MAX_FRAME."""
    if len(payload) > MAX_FRAME:
        raise WireError(f"a message over {MAX_FRAME} bytes")
    return struct.pack("<I", len(payload)) + payload
