"""What the tests hold for an object of the program: asked about plain data only where the tests are of its class."""

from __future__ import annotations

import _operator as operator

from cabochon.verifiers.sandbox.inside_remote import COMPARING, FORWARD, OPERATORS, Remote, RemoteClass

TYPE_CHECKING = False  # see wire
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


READS = ("get", "bool", "__len__", "class", "itself", "error")
PLAIN_METHODS = {n for t in (str, bytes, list, tuple, dict, set, frozenset, int, float) for n in dir(t)} - set(
    dir(object)
)


def refuse_class(kind: Any, op: str, args: tuple[Any, ...]) -> None:
    """A class that the tests do not name is no plain data either, whatever its metaclass makes of it."""
    as_data = op in ("iter", "reversed", "len", "contains", "getitem") or (op == "get" and args[0] in PLAIN_METHODS)
    if as_data and type(kind) is RemoteClass and not kind._cabochon_open:
        raise TypeError(f"the program's class {kind.__name__} is not plain data here")


class Guarded(Remote):
    """An object of the program. It is asked about plain data only where the tests are of its class ("open"): else
    `abs(f(x) - 3) < 1e-6` would hand it 3 and let it decide. Closed, it equals nothing but itself."""

    _cabochon_open = False
    _cabochon_met = False
    """It has met plain data in an operator."""
    _cabochon_plain = False
    """It is plain data with something on top, which is compared with plain data here."""

    def __getattr__(self, name: str) -> Any:
        if name in PLAIN_METHODS and not self._cabochon_open:
            raise AttributeError(f"{_name(self)} is not plain data and has no .{name} here")
        return self._cabochon_read("get", name)

    def _cabochon_read(self, op: str, /, *args: Any) -> Any:
        """What a closed object says of itself. It says it again until something of the program is used: a node that is
        false when asked first and true when asked then would learn the shape it is compared with."""
        said, key = type(self)._cabochon_link.said, (self._cabochon_number, op, *args)  # type: ignore[attr-defined]
        if self._cabochon_open or key not in said:
            value = self._cabochon_ask(op, *args)
            if not (value is None or type(value) in (bool, int, float, str) or type(type(value)) is RemoteClass):
                return value
            said[key] = value
        return said[key]

    def __bool__(self) -> bool:
        return self._cabochon_read("bool") is True

    def __eq__(self, other: Any) -> Any:
        if type(type(other)) is not RemoteClass:
            return bool(self._cabochon_plain and not self._cabochon_met and self._cabochon_ask("plain") == other)
        if self._cabochon_open and other._cabochon_open:
            return super().__eq__(other)
        return bool(self._cabochon_number == other._cabochon_number)

    def __hash__(self) -> int:
        asked = super().__hash__()  # which it may not have
        return asked if self._cabochon_open else id(self)

    def __repr__(self) -> str:
        return super().__repr__() if self._cabochon_open else f"<{_name(self)}>"

    def __copy__(self, how: str = "copy") -> Any:
        made = self._cabochon_ask(how)
        if self._cabochon_met:
            _mark_met(made, how)
        return made

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__copy__("deepcopy")


def _mark_met(thing: Any, by: str) -> None:
    if type(type(thing)) is not RemoteClass:
        raise TypeError(f"an object of the program may not turn plain data into plain by {by}")
    object.__setattr__(thing, "_cabochon_met", True)


def _name(thing: Guarded) -> str:
    return f"the program's {type(thing).__name__} object"


def _operator(name: str) -> Callable[..., Any]:
    """An operator of Guarded. An object that has met plain data in one may not turn into plain data in the next, nor
    compare itself with any: `abs(f(x) - 3) < 1e-6` would let the program answer for the number it should have given."""

    def method(self: Any, *args: Any) -> Any:
        plain = any(type(type(a)) is not RemoteClass for a in args)
        if (not args or name == "__round__") and not self._cabochon_met:  # nothing of what is expected is in it
            return self._cabochon_ask(name, *args)
        if plain and name in COMPARING and self._cabochon_plain and not self._cabochon_met:
            return getattr(operator, name.strip("_"))(self._cabochon_ask("plain"), *args)
        if not self._cabochon_open:
            raise TypeError(f"{_name(self)} is not plain data and has no {name} here")
        if plain and name in COMPARING:
            raise TypeError(f"{_name(self)} may not judge plain data by {name}")
        result = self._cabochon_ask(name, *args)
        if args and name in COMPARING:  # two objects of the program, as with ==
            return result
        met = self._cabochon_met or plain or any(a._cabochon_met for a in args)
        for one in (result if type(result) is tuple else (result,)) if met and result is not NotImplemented else ():
            _mark_met(one, name)
        return result

    return method


def _len(self: Any) -> Any:
    return self._cabochon_read("__len__")


def _contains(self: Any, item: Any) -> bool:
    if self._cabochon_open:
        return self._cabochon_ask("__contains__", item) is True
    return any(x is item or x == item for x in self)


def _exit(self: Any, kind: Any, error: Any, trace: Any) -> bool:
    """No program may put a failed assertion of the tests away."""
    return bool(self._cabochon_ask("__exit__", kind, error, None)) and not isinstance(error, AssertionError)


async def _aexit(self: Any, kind: Any, error: Any, trace: Any) -> bool:
    return bool(await self._cabochon_ask("__aexit__", kind, error, None)) and not isinstance(error, AssertionError)


GUARDED = FORWARD | {n: _operator(n) for n in (*COMPARING, *OPERATORS)}
GUARDED |= {"__len__": _len, "__contains__": _contains, "__exit__": _exit, "__aexit__": _aexit}
