"""The two ends of the line between a program and its tests, and what stands at one end for an object of the other.

A `Link` is one end: it asks, and it answers while it waits. Plain data crosses by value (see wire); anything else stays
where it is and is a `Remote` at the other end, of a class that stands for its class: the same bases, the same special
methods, so that `isinstance`, `len` and `+` are asked for where they are answered. An exception becomes a real one.
"""

from __future__ import annotations

import sys
from _operator import is_
from _thread import RLock

from cabochon.verifiers.sandbox.wire import PLAIN_BASES, Reader, WireError, Writer, contents, pack, plain

TYPE_CHECKING = False  # see wire
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from cabochon.verifiers.sandbox.inside import Channel

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift",
           "divmod")  # fmt: skip
COMPARING = ("__lt__", "__le__", "__gt__", "__ge__", "__abs__")
OPERATORS = (
    *(f"__{p}{n}__" for n in _BINARY for p in ("", "r", "i")), "__neg__", "__pos__", "__invert__", "__int__",
    "__float__", "__complex__", "__index__", "__round__", "__trunc__", "__floor__", "__ceil__", "__bytes__",
)  # fmt: skip
_ACCESS = ("__getitem__", "__setitem__", "__delitem__", "__format__", "__len__", "__iter__", "__next__", "__reversed__",
           "__contains__", "__enter__", "__exit__", "__aiter__", "__anext__", "__aenter__", "__aexit__")  # fmt: skip
_CLASS_NAMES = ("__members__", "__slots__", "__dataclass_fields__", "__match_args__")


class Link:
    """One end. `tags` are those of its own and the other's handles, `letters` those of messages: what it asks, what the
    other end asks, also in between a question and its answer, and what it answers."""

    root: type
    forward: dict[str, Any]  # with `root`, what stands for an object of the other end
    thing: Callable[..., Any]
    """This end's object for a target, an operation and its arguments."""

    def __init__(self, channel: Channel, tags: bytes, letters: bytes, *, carries_out: bool, carries_in: bool) -> None:
        self.channel = channel
        self.mine, self.theirs = tags[:1], tags[1:]
        self.asks, self.hears, self.answers = letters[:1], letters[1:2], letters[2:]
        self.carries_out, self.carries_in = carries_out, carries_in
        """Whether changes to arguments are told, and believed, where a value was returned as well."""
        self.turn = RLock()  # one thread talks at a time
        self.seq, self.lent = 0, False  # questions; whether an answer held something that was asked with
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.passed: set[int] = set()
        """Numbers the other end was given, and not as the class of something only."""
        self.remotes: dict[int, Any] = {}
        """Each of the other end's objects once, so that `is` means here what it means there."""
        self.keep: tuple[type, ...] = ()
        self.runner: Any = None

    def index(self, v: Any) -> int:
        n = self.numbers.setdefault(id(v), len(self.objects))
        if n == len(self.objects):
            self.objects.append(v)
        return n

    def number(self, v: Any) -> tuple[bytes, int, str]:
        """A handle: a class says so by an empty kind, another object names its class's number."""
        kind = type(v)
        if kind is RemoteClass or isinstance(kind, RemoteClass):
            return self.theirs, v._cabochon_number, ""
        self.passed.add(self.index(v))
        return self.mine, self.index(v), "" if isinstance(v, type) else str(self.index(kind))

    def resolve(self, tag: bytes, number: int, kind: str) -> Any:
        if tag == self.mine:
            return self.objects[number]
        if kind and number not in self.remotes:
            self.remotes[number] = self.stand_in(self.mirror(int(kind)), number)
        return self.remotes[number] if kind else self.mirror(number)

    def mirror(self, number: int) -> type:
        """What stands for the other end's class `number`. It is asked for once."""
        if number not in self.remotes:
            self.remotes[number] = self.root  # no class is its own base
            name, module, bases, specials, is_plain = self.ask(number, "class")
            self.remotes[number] = _library_error(name, module) or self.made(number, name, bases, specials, is_plain)
        if not isinstance(self.remotes[number], type):
            raise WireError("an object where a class is expected")
        return self.remotes[number]

    def made(self, number: int, name: str, bases: Any, specials: Any, is_plain: Any) -> type:
        mirrors: list[type] = [b for b in bases if type(b) is RemoteClass]
        errors = [b for b in bases if type(b) is type and issubclass(b, BaseException)]
        space = {s: self.forward[s] for s in specials if s in FORWARD}
        space |= {"__module__": "solution", "_cabochon_link": self, "_cabochon_number": number, "__doc__": _Doc(),
                  "_cabochon_plain": is_plain is True}  # fmt: skip
        if name == "generator":
            space["__class__"] = property(lambda _: type(_ for _ in ()))
        return RemoteClass(str(name), (*(mirrors or [self.root]), *errors), space)

    def stand_in(self, cls: type, number: int) -> Any:
        """What stands for the other end's object `number`: an exception is a real one, with its arguments and text."""
        if not issubclass(cls, BaseException):
            return _with(object.__new__(cls), _cabochon_number=number)
        args, fields, text, cause = self.ask(number, "error")
        made: Any = cls
        if type(cls) is RemoteClass:
            made = _with(made.__new__(cls), args=args, _cabochon_number=number, _cabochon_text=str(text))
        else:
            try:
                made = cls(*args)
            except Exception:  # one that wants more than it keeps
                made = made.__new__(cls, *args)
            vars(made).update(fields)
        return _with(made, __cause__=cause) if isinstance(cause, BaseException) else made

    def ask(self, target: Any, op: str, /, *args: Any, **kwargs: Any) -> Any:
        """The other end's answer; its exception is raised here. What it asks meanwhile is answered."""
        with self.turn:
            self.seq += 1
            seq, writer = self.seq, Writer(self.number, self.keep)
            self.channel.send(self.asks + self.question(writer, (seq, target, op, list(args), kwargs)))
            while (message := self.channel.read())[:1] == self.hears:
                self.channel.send(self.answers + self.answer(message[1:]))
            try:
                how, value = self.settled(seq, message[1:], writer.shared, (args, kwargs))
            except Exception as e:  # it may hold anything
                self.broken(f"the answer is malformed: {e}")
        if how == "raise":
            raise value
        return value

    def question(self, writer: Writer, message: Any) -> bytes:
        return writer.whole(message)

    def broken(self, why: str) -> NoReturn:
        raise WireError(why)

    def settled(self, seq: int, data: bytes, asked: list[Any], given: Any) -> tuple[str, Any]:
        """Checks an answer's form and carries changed arguments back into the asker's own objects."""
        reader = Reader(data, self.resolve, asked)
        answer = reader.whole()
        if type(answer) is not tuple or len(answer) < 3 or answer[0] not in (seq, 0):
            raise WireError("an answer to another question")
        if answer[1] == "bad":
            raise WireError(str(answer[2]))
        _, how, value, changed = answer
        if how not in ("value", "raise") or (how == "raise" and not isinstance(value, BaseException)):
            raise WireError("neither a value nor an exception")
        if changed is not None and (how == "raise" or value is None or self.carries_in):
            for number, parts in changed.items():
                refill(asked[number], parts)
            Writer(self.number).whole((given, asked))  # within the limits, and not within itself
        if reader.borrowed:
            self.lent = True
            Writer(self.number).whole(value)
        return how, value

    def answer(self, request: bytes) -> bytes:
        """Carries out one question. What it changed in its arguments is told where nothing is returned, so that a
        program cannot make its input agree with its answer, unless the tests look at both."""
        reader = Reader(request, self.resolve)
        try:
            seq, target, op, args, kwargs = reader.whole()
            before = [contents(c) for c in reader.shared]
        except WireError as e:
            return pack((0, "bad", str(e)))
        try:
            how, value = "value", self.act(target, op, args, kwargs)
        except WireError as e:
            return pack((seq, "bad", str(e)[:500]))
        except BaseException as e:
            how, value = "raise", e
            _without_frames(e)
        try:
            after = [contents(c) for c in reader.shared]
            changed = {i: new for i, (old, new) in enumerate(zip(before, after, strict=True)) if not _same(old, new)}
            news = changed if how == "raise" or value is None or self.carries_out else {}
            known = {id(c): i for i, c in enumerate(reader.shared)} if news or not changed else {}
            return Writer(self.number, self.keep, known).whole((seq, how, value, news or None))
        except WireError as e:
            return pack((seq, "bad", str(e)[:500]))

    def act(self, target: Any, op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        thing = self.thing(target, op, args)
        if op == "await":
            return self.wait(thing)
        if op in FORWARD or op == "__eq__":
            return getattr(thing, op)(*args, **kwargs)  # a class's own is not asked for: see RemoteClass
        return _OPS[op](thing, *args, **kwargs)

    def wait(self, thing: Any) -> Any:
        """Runs an awaitable to its end, in one loop for all that are not inside another."""
        import asyncio

        async def wait() -> Any:
            return await thing

        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            if outer is not None:
                return asyncio.run(wait())
            self.runner = self.runner or asyncio.Runner()
            return self.runner.run(wait())
        finally:
            asyncio._set_running_loop(outer)


def _described(cls: type) -> tuple[Any, ...]:
    """Name, module, bases, special methods, and whether it is plain data with something on top."""
    own = [vars(c) for c in cls.__mro__ if c is not object]
    specials = [n for n in FORWARD if next((space[n] for space in own if n in space), None) is not None]
    bases = tuple(b for b in cls.__bases__ if b.__module__ != "builtins" or issubclass(b, BaseException))
    return cls.__name__, cls.__module__, bases, specials, cls.__module__ != "builtins" and issubclass(cls, PLAIN_BASES)


def told(e: BaseException) -> tuple[Any, ...]:
    """An exception's arguments, its attributes where its class is known everywhere, its text and its cause."""
    fields = vars(e) if _is_library(type(e).__module__) else {}
    try:
        text = str(e)[:2000]
    except BaseException:  # its __str__ is the program's own code
        text = ""
    return e.args, dict(fields), text, e.__cause__


def _is_library(module: str) -> bool:
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names and top != "unittest"  # whose exceptions skip tests


def _library_error(name: str, module: str) -> type | None:
    """The standard library's exception of that name, where its module is loaded here."""
    known = vars(sys.modules[module]).get(name) if _is_library(module) and module in sys.modules else None
    kinds = BaseException if module == "builtins" else Exception
    return known if isinstance(known, type) and issubclass(known, kinds) else None


def _without_frames(e: BaseException | None) -> None:
    """Lets go of all that the functions it went through had in their hands."""
    for _ in range(100):
        e = e and (e.with_traceback(None).__cause__ or e.__context__)


def refill(v: Any, parts: Any) -> None:
    """Makes the contents of `v` what `contents` gave elsewhere. Raises nearly anything for parts that are not that."""
    if type(parts) is not (bytes if isinstance(v, bytearray) else list):
        raise WireError("contents of another kind")
    if isinstance(v, list | bytearray):
        v[:] = parts
        return
    v.clear()
    if isinstance(v, dict):
        for key, value in zip(parts[::2], parts[1::2], strict=True):
            v[key] = value
    elif isinstance(v, set):
        v.update(parts)
    else:
        v.extend(parts)


def _with(thing: Any, **attributes: Any) -> Any:
    for name, value in attributes.items():
        object.__setattr__(thing, name, value)
    return thing


def _same(old: Any, new: Any) -> bool:
    return len(old) == len(new) and all(map(is_, old, new)) if type(old) is list else bool(old == new)


def _is_root(cls: type) -> bool:
    """Whether it stands for no class of the other end."""
    return type(cls) is not RemoteClass or "_cabochon_number" not in vars(cls)


class _Doc:
    def __get__(self, one: Any, cls: Any) -> Any:
        return (cls._cabochon_class_ask if one is None else one._cabochon_ask)("get", "__doc__")


class RemoteClass(type):
    """A class of the other end: calling it makes an object there; its attributes are asked for there."""

    _cabochon_link: Link
    _cabochon_number: int

    def _cabochon_class_ask(cls, op: str, /, *args: Any, **kwargs: Any) -> Any:
        return cls._cabochon_link.ask(cls._cabochon_number, op, *args, **kwargs)

    def __call__(cls, /, *args: Any, **kwargs: Any) -> Any:
        return cls._cabochon_class_ask("call", *args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if _is_root(cls) or (name.startswith("__") and name not in _CLASS_NAMES):
            raise AttributeError(name)
        return cls._cabochon_class_ask("get", name)

    def __setattr__(cls, name: str, value: Any) -> None:
        if name.startswith(("_cabochon", "__", "_abc")):
            type.__setattr__(cls, name, value)
        else:
            cls._cabochon_class_ask("set", name, value)

    def __instancecheck__(cls, thing: Any) -> bool:
        """What its class does not say, the other end may: protocols and registered classes."""
        if type.__instancecheck__(cls, thing) or _is_root(cls) or type(type(thing)) is not RemoteClass:
            return type.__instancecheck__(cls, thing)
        return cls._cabochon_class_ask("isinstance", thing) is True

    def __subclasscheck__(cls, other: type) -> bool:
        if type.__subclasscheck__(cls, other) or _is_root(cls) or _is_root(other):
            return type.__subclasscheck__(cls, other)
        return cls._cabochon_class_ask("issubclass", other) is True

    def __iter__(cls) -> Any:
        return iter(cls._cabochon_class_ask("iter"))

    def __reversed__(cls) -> Any:
        return cls._cabochon_class_ask("reversed")

    def __len__(cls) -> int:
        return int(cls._cabochon_class_ask("len"))

    def __contains__(cls, item: Any) -> bool:
        return cls._cabochon_class_ask("contains", item) is True

    def __getitem__(cls, key: Any) -> Any:
        return cls._cabochon_class_ask("getitem", key)

    def __bool__(cls) -> bool:
        return True


class Remote(metaclass=RemoteClass):
    """An object of the other end. Asked about itself, that end answers."""

    _cabochon_text = None
    __dict__ = property(lambda self: self._cabochon_ask("get", "__dict__"))

    def _cabochon_ask(self, op: str, /, *args: Any, **kwargs: Any) -> Any:
        return type(self)._cabochon_link.ask(self._cabochon_number, op, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._cabochon_ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):  # what this interpreter notes on an exception
            object.__setattr__(self, name, value)
        else:
            self._cabochon_ask("set", name, value)

    def __delattr__(self, name: str) -> None:
        self._cabochon_ask("del", name)

    def __eq__(self, other: Any) -> Any:
        answer = self._cabochon_ask("__eq__", other)
        return answer if answer is NotImplemented else answer is True

    def __hash__(self) -> int:
        return hash(self._cabochon_ask("hash"))

    def __bool__(self) -> bool:
        return self._cabochon_ask("bool") is True

    def __str__(self) -> str:
        return str(self._cabochon_ask("str") if self._cabochon_text is None else self._cabochon_text)

    def __repr__(self) -> str:
        return str(self._cabochon_ask("repr"))


def _forward(name: str) -> Callable[..., Any]:
    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self._cabochon_ask(name, *args, **kwargs)

    return method


def _await(self: Any) -> Any:
    return self._cabochon_ask("await")
    yield


FORWARD: dict[str, Any] = {
    **{n: _forward(n) for n in (*COMPARING, *OPERATORS, *_ACCESS)}, "__call__": _forward("call"), "__await__": _await,
}  # fmt: skip
"""The special methods an object of the other end may have here, each where its class has it there."""
_OPS: dict[str, Callable[..., Any]] = {
    "call": lambda thing, /, *args, **kwargs: thing(*args, **kwargs), "get": getattr, "set": setattr, "del": delattr,
    "bool": bool, "str": str, "repr": repr, "hash": hash, "iter": iter, "len": len, "reversed": reversed,
    "contains": lambda thing, item: item in thing, "getitem": lambda thing, key: thing[key], "plain": plain,
    "isinstance": lambda cls, thing: isinstance(thing, cls), "issubclass": lambda cls, other: issubclass(other, cls),
    "class": _described, "error": told, "itself": lambda thing: thing,
    "copy": lambda thing: __import__("copy").copy(thing), "deepcopy": lambda thing: __import__("copy").deepcopy(thing),
}  # fmt: skip
Link.root, Link.forward = Remote, FORWARD
