"""An object of the program as the tests see it: held here, living there. See inside_tests."""

from __future__ import annotations

TYPE_CHECKING = False  # see wire
if TYPE_CHECKING:
    from typing import Any

    from cabochon.verifiers.sandbox.inside_tests import Host

_PLAIN_METHODS = {n for t in (str, bytes, list, tuple, dict, set, frozenset, int, float) for n in dir(t)} - set(
    dir(object)
)


class Remote:
    """An object of the program. Asked about itself, the program answers; asked for equality with plain data, nobody
    does."""

    def __init__(self, host: Host, number: int, kind: str) -> None:
        object.__setattr__(self, "_cabochon_host", host)
        object.__setattr__(self, "_cabochon_id", number)
        object.__setattr__(self, "_cabochon_kind", kind)
        object.__setattr__(self, "_cabochon_met", False)

    def _cabochon_ask(self, op: str, *args: Any, **kwargs: Any) -> Any:
        return object.__getattribute__(self, "_cabochon_host").ask(
            object.__getattribute__(self, "_cabochon_id"), op, *args, **kwargs
        )

    def _cabochon_open(self) -> bool:
        """Whether the tests are of its class: only then may it see plain data in operators and answer for itself. Else
        `abs(f(x) - 3) < 1e-6` would hand 3 to the program and let it decide."""
        return object.__getattribute__(self, "_cabochon_kind") in object.__getattribute__(self, "_cabochon_host").kinds

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        host, kind = object.__getattribute__(self, "_cabochon_host"), object.__getattribute__(self, "_cabochon_kind")
        return host.kinds.get(kind, Remote)

    def __getattr__(self, name: str) -> Any:
        if name in _PLAIN_METHODS and not self._cabochon_open():
            raise AttributeError(
                f"the program's {self._cabochon_kind} object is not plain data and has no .{name} here"
            )
        return self._cabochon_ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._cabochon_ask("set", name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._cabochon_ask("call", *args, **kwargs)

    def __eq__(self, other: Any) -> bool:
        if type(other) is not Remote:
            return False
        if self._cabochon_open() and other._cabochon_open():
            return self._cabochon_ask("eq", other) is True
        return bool(self._cabochon_id == other._cabochon_id)

    def __hash__(self) -> int:
        return hash(self._cabochon_ask("hash")) if self._cabochon_open() else id(self)

    def __bool__(self) -> bool:
        return self._cabochon_ask("bool") is True if self._cabochon_open() else True

    def __str__(self) -> str:
        text = self._cabochon_ask("str")
        return text if type(text) is str else ""

    def __repr__(self) -> str:
        return self._cabochon_text("repr") if self._cabochon_open() else f"<the program's {self._cabochon_kind} object>"

    def _cabochon_text(self, op: str) -> str:
        text = self._cabochon_ask(op)
        return text if type(text) is str else ""

    def __len__(self) -> int:
        n = self._cabochon_ask("len")
        if type(n) is not int:
            raise TypeError("the program's __len__ gave no int")
        return n

    def __iter__(self) -> Any:
        inner = self._cabochon_ask("iter")
        return inner if type(inner) is Remote else iter(inner)

    def __next__(self) -> Any:
        return self._cabochon_ask("next")[0]

    def __await__(self) -> Any:
        return self._cabochon_ask("await")
        yield

    def __contains__(self, item: Any) -> bool:
        if self._cabochon_open():
            return self._cabochon_ask("contains", item) is True
        return any(x is item or x == item for x in self)


_COMPARING = ("lt", "le", "gt", "ge")
_ACCESS = ("getitem", "setitem", "delitem", "__enter__", "__exit__")


def _operator(name: str, op: str, reflected: bool = False) -> None:
    """Gives Remote an operator. An object that has met plain data in one may not turn into plain data in the next, nor
    compare itself with any: `abs(f(x) - 3) < 1e-6` would let the program answer for the number it should have given."""

    def method(self: Remote, *args: Any) -> Any:
        if not self._cabochon_open():
            raise TypeError(f"the program's {self._cabochon_kind} object is not plain data and has no {name} here")
        if op in _ACCESS or name in _ACCESS:
            return self._cabochon_ask("get", name)(*args) if reflected else self._cabochon_ask(op, *args)
        met = self._cabochon_met or any(type(a) is not Remote or a._cabochon_met for a in args)
        if met and (op in _COMPARING or op == "abs"):
            raise TypeError(f"the program's {self._cabochon_kind} object may not judge plain data by {name}")
        result = self._cabochon_ask("get", name)(*args) if reflected else self._cabochon_ask(op, *args)
        if met and type(result) is not Remote:
            raise TypeError(f"the program's {self._cabochon_kind} object may not turn plain data into plain by {name}")
        if met:
            object.__setattr__(result, "_cabochon_met", True)
        return result

    setattr(Remote, name, method)


for _name in ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "abs", "matmul",
    "and",
              "or", "xor", "invert", "getitem", "setitem", "delitem"):  # fmt: skip
    _operator(f"__{_name}__", {"and": "and_", "or": "or_"}.get(_name, _name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _operator(f"__r{_name}__", _name, reflected=True)
for _name in ("enter", "exit"):
    _operator(f"__{_name}__", _name, reflected=True)
