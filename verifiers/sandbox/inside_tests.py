"""The tests' side of a judgement, inside its own sandbox: runs the test source with the program's names as remote
stand-ins.

The stand-ins call over the channel into the other sandbox and get plain data back, so every comparison happens here,
between values of exact builtin types, with this process's own builtins. What cannot be plain data is a `Remote`: it
may be held, handed back and asked, and it equals nothing but itself. How the host prepares the source is in code_tests.
"""

from __future__ import annotations

import builtins
import sys

from cabochon.verifiers.sandbox.inside_guard import GUARDED, READS, Guarded, refuse_class
from cabochon.verifiers.sandbox.inside_remote import Link, RemoteClass
from cabochon.verifiers.sandbox.wire import ITSELF, WireError, Writer, pack, unpack

TYPE_CHECKING = False  # see wire
if TYPE_CHECKING:
    from types import FunctionType, ModuleType
    from typing import Any, NoReturn

    from cabochon.verifiers.sandbox.inside import Channel
else:
    ModuleType, FunctionType = type(sys), type(pack)

MODULE = "test_solution"
"""The name of the module the tests run in."""
_SHOWN = 300
"""characters of a value in the evidence"""


class ProgramStopped(BaseException):
    """The program broke the dialogue: its fault. The verdict is sent when this is raised, so it does not matter what
    the tests make of it."""


class Host(Link):
    """The link to the program's process."""

    def __init__(self, channel: Channel, nonce: str, mutates: bool) -> None:
        super().__init__(channel, b"kh", b"CKA", carries_out=True, carries_in=mutates)
        self.root, self.forward = Guarded, GUARDED
        self.nonce = nonce
        self.names: dict[int, str] = {}
        """The program's functions and classes, for people."""
        self.own: dict[int, Any] = {}
        """By the id of what this side made of a coroutine function, the program's: handed back, it is that again."""
        self.resuming: set[int] = set()
        """The program's `send` and `throw` of generators."""
        self.expects_end = False
        """The tests speak of StopIteration."""
        self.said: dict[tuple[Any, ...], Any] = {}
        """What closed objects said of themselves since something of the program was used."""
        self.bytes = 0
        """of answers"""
        self.asked = False
        self.last_error = ""
        self.last_call = ""

    def number(self, v: Any) -> tuple[bytes, int, str]:
        return super().number(self.own.get(id(v), v))

    def resolve(self, tag: bytes, number: int, kind: str) -> Any:
        if tag == self.mine and number not in self.passed:
            raise WireError("an object it was not given")
        return super().resolve(tag, number, kind)

    def ask(self, target: Any, op: str, /, *args: Any, **kwargs: Any) -> Any:
        self.last_error = ""
        refuse_class(self.remotes.get(target), op, args)
        if op not in READS:
            self.said.clear()
        if op == "call":
            self.last_call = _call_text(self.names.get(target, "object"), args, kwargs)
        try:
            answer = super().ask(target, op, *args, **kwargs)
        except Exception as e:
            self.last_error = type(e).__name__
            ends = isinstance(e, StopIteration) and op != "__next__" and target not in self.resuming
            if ends and not self.expects_end:  # it would end a map or a zip of the tests
                raise RuntimeError(f"the program raised {self.last_error}") from None
            raise
        if op == "get" and args[0] in ("send", "throw") and type(type(answer)) is RemoteClass:
            self.resuming.add(answer._cabochon_number)
        return answer

    def question(self, writer: Writer, message: Any) -> bytes:
        try:
            return super().question(writer, message)
        except WireError as e:
            own = not self.asked or (str(e) == ITSELF and not self.lent)  # else something of the program's may be in it
            self.verdict("unusable" if own else "malformed", f"the tests pass what cannot cross: {e}")
        finally:
            self.asked = self.asked or message[2] not in ("class", "itself")

    def settled(self, seq: int, data: bytes, asked: list[Any], given: Any) -> tuple[str, Any]:
        self.bytes += len(data)
        return super().settled(seq, data, asked, given)

    def stand_in(self, cls: type, number: int) -> Any:
        """Of a coroutine, one of this process: asyncio takes no others."""
        made = super().stand_in(cls, number)
        if cls.__name__ != "coroutine":
            return made
        waiting = _waiting(made)
        self.own[id(waiting)] = made
        return waiting

    def verdict(self, how: str, why: str) -> NoReturn:
        """Sends a verdict that no test can change any more: the host listens no further."""
        self.channel.send(b"V" + pack((self.nonce, how, why[:300], 0, 0, [])))
        raise ProgramStopped(why)

    def broken(self, why: str) -> NoReturn:
        self.verdict("malformed", f"the program's side sent something else than an answer: {why}")

    def thing(self, target: Any, op: str, args: list[Any]) -> Any:
        """An object of the tests which the program asks something of. It may use what it was given, and read and set
        attributes of objects of the tests' own classes. From elsewhere there are ways to the tests themselves."""
        thing = self.objects[target]
        if op in ("copy", "deepcopy") or (op != "class" and target not in self.passed):
            raise AttributeError("the tests gave no such object")
        if isinstance(thing, AssertionError) and op not in ("class", "isinstance"):
            return AssertionError()  # what was expected is none of its business
        if op in ("get", "set", "del") and not _may_touch(thing, op, args[0]):
            raise AttributeError(f"the tests' {type(thing).__name__} object has no .{args[0]} here")
        return thing

    def act(self, target: Any, op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        answer = super().act(target, op, args, kwargs)
        if op == "class":
            name, module, bases, *rest = answer
            answer = (name, module, tuple(b for b in bases if _is_own(b) or issubclass(b, BaseException)), *rest)
        return answer


async def _waiting(made: Any) -> Any:
    return await made


_LIBRARY = ("_io", "unittest.mock", "random", "re", "datetime", "queue", "_queue", "threading", "_thread", "logging")
"""Modules whose objects lead nowhere."""


def _is_own(kind: type) -> bool:
    return kind.__module__ == MODULE and not any(base.__module__ == "unittest.case" for base in kind.__mro__)


def _may_touch(thing: Any, op: str, name: Any) -> bool:
    kind = thing if isinstance(thing, type) else type(thing)
    if type(name) is not str or name.startswith("_"):
        return op == "get" and name in ("__name__", "__qualname__", "__doc__")
    if op != "get":  # what a class defines is not replaced: a test may call it afterwards
        return _is_own(kind) and not callable(getattr(kind, name, None))
    if kind.__module__ == "builtins":
        return isinstance(thing, BaseException) or name in ("send", "throw", "close", "asend", "aclose")
    if kind.__module__ == "unittest.mock":
        return name not in dir(kind)  # not what tells it what to say, nor what the tests ask it
    return _is_own(kind) or kind.__module__ in _LIBRARY or isinstance(thing, BaseException)


def _call_text(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    words = [show(a, 200) for a in args] + [f"{k}={show(v, 100)}" for k, v in kwargs.items()]
    return f"{name}({', '.join(words)})"[:_SHOWN]


def show(value: Any, limit: int = _SHOWN) -> str:
    """A short repr that does not take long: big containers and numbers are cut before they are written out."""
    if type(value) is int and value.bit_length() > 4000:
        return f"<int of {value.bit_length()} bits>"
    if type(value) in (str, bytes, list, tuple) and len(value) > limit:
        value = value[:limit]
    try:
        text = repr(value)
    except Exception as e:
        return f"<{type(value).__name__}: {type(e).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _given(host: Host, name: str, about: Any, open_names: list[str]) -> Any:
    """What the tests see under a name of the program."""
    made: Any
    if about[0] in ("function", "coroutine"):
        made = host.ask(name, "itself")
    elif about[0] == "object":
        made = host.resolve(b"h", about[1], str(about[2]))
    else:
        made = about[1]
    if type(made) is RemoteClass and name in open_names:
        made._cabochon_open = True
    if type(made) is RemoteClass or type(type(made)) is RemoteClass:
        host.names[made._cabochon_number] = name
    if about[0] != "coroutine":
        return made

    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        return await made(*args, **kwargs)

    coroutine.__name__ = coroutine.__qualname__ = name
    host.own[id(coroutine)] = made
    host.objects.append(coroutine)  # so that its id stays its own
    return coroutine


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # it may be the program's, or hold something of it
        return ""


class Recorder:
    """Counts what passed and says so as it goes."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.total = 0
        self.passed = 0
        self.failed = 0

    def ok(self, label: str) -> None:
        self.total += 1
        self.passed += 1
        self.host.channel.send(b"U" + pack((label, True, {})))

    def fail(self, label: str, error: BaseException) -> None:
        if type(error) is ModuleNotFoundError and all(error is not r for r in self.host.remotes.values()):
            self.host.verdict("unusable", f"the task's tests import what the sandbox does not have: {_text(error)}")
        self.total += 1
        self.failed += 1
        got = getattr(error, "cabochon_values", None) if type(error) is AssertionError else None
        about = {"call": self.host.last_call, "error": f"{type(error).__name__}: {_text(error)}"[:1000]}
        if type(got) is tuple and all(type(g) is str for g in got):  # the program's error may have any attribute
            about |= {"got": got[0], "expected": got[1]}
        if self.host.last_error and type(error).__name__ != "AssertionError":
            about["raised"] = self.host.last_error
        self.host.channel.send(b"U" + pack((label, False, about)))

    def raise_failed(self, source: str, *values: Any) -> None:
        """Raises the AssertionError of `assert source` with what was compared."""
        error = AssertionError(source)
        if len(values) == 2:
            error.cabochon_values = (show(values[0]), show(values[1]))  # type: ignore[attr-defined]
        raise error


def judge(order: dict[str, Any], channel: Channel) -> None:
    """Runs the tests of `order` once the program is loaded, then sends the verdict, with the host's nonce.

    `G` before it reads anything of the program, and `P` where it then holds no value of it to speak of: what this
    process dies of between the two, and later where there was no `P`, came from the program.
    """
    host = Host(channel, order["nonce"], order["mutates"])
    channel.send(b"G")
    try:
        _judge(order, host)
    except ProgramStopped:
        return


def _judge(order: dict[str, Any], host: Host) -> None:
    loaded = host.channel.read()[1:]
    recorder = Recorder(host)
    module, solution = ModuleType(MODULE), ModuleType(order["module"])
    space = module.__dict__
    missing: list[str] = []
    try:
        names = unpack(loaded, host.resolve)
        for name in order["wanted"]:
            about = names.get(name, ("missing",))
            if about[0] in ("missing", "module"):
                missing.append(name)
            else:
                solution.__dict__[name] = _given(host, name, about, order["classes"])
    except Exception as e:  # whatever it sent instead of a description
        host.broken(f"its description of itself: {type(e).__name__}: {e}")
    given = [v for n, v in vars(solution).items() if n in order["wanted"]]
    small = len(loaded) + host.bytes <= 4096 * (1 + len(order["wanted"]))
    if small and all(isinstance(v, type | FunctionType) or type(type(v)) is RemoteClass for v in given):
        host.channel.send(b"P")
    else:
        host.asked = True
    if order["bare_names"]:
        space.update((name, solution.__dict__[name]) for name in order["wanted"] if name not in missing)
    sys.modules[order["module"]], sys.modules[MODULE] = solution, module
    space.update(__builtins__=builtins, _cabochon_=recorder)
    if order["collect"] or any("pytest" in source for _, source, _ in order["units"]):
        from cabochon.verifiers.sandbox.inside_pytest import install

        install()
    host.expects_end = any("StopIteration" in source for _, source, _ in order["units"])
    for label, source, whole in order["units"]:
        _unit(label, source, space, recorder, whole=whole)
    if order["collect"]:
        from cabochon.verifiers.sandbox.inside_pytest import collect

        collect(module, recorder)
    if not (recorder.total or host.asked or missing):
        host.verdict("unusable", "none of the tests was run: are all of them skipped?")
    host.channel.send(b"V" + pack((host.nonce, "done", "", recorder.passed, recorder.total, missing)))


def _unit(label: str, source: str, space: dict[str, Any], recorder: Recorder, *, whole: bool) -> None:
    """Runs one piece of test source. An empty label is set-up: only its failing is told. `whole`: it is one test;
    else it reports its own assertions, and only an error outside them is told here."""
    before = recorder.total
    try:
        exec(compile(source, "<tests>", "exec", dont_inherit=True), space)
    except ProgramStopped:
        raise
    except BaseException as e:
        recorder.fail(label or "set-up", e)
    else:
        if label and (whole or recorder.total == before):
            recorder.ok(label)
