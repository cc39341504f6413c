"""The tests' side of a judgement, inside its own sandbox: runs the test source with the program's names as remote
stand-ins.

The stand-ins call over the channel into the other sandbox and get plain data back, so every comparison happens here,
between values of exact builtin types, with this process's own builtins. What cannot be plain data is a `Remote`: it
may be held, handed back and asked, and it equals nothing but itself. How the host prepares the source is in code_tests.
"""

from __future__ import annotations

import builtins
import sys

from cabochon.verifiers.sandbox.inside_remote import Remote
from cabochon.verifiers.sandbox.wire import WireError, pack, unpack

TYPE_CHECKING = False  # see wire
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any, NoReturn

    from cabochon.verifiers.sandbox.inside import Channel
else:
    ModuleType = type(sys)

_SHOWN = 300
"""characters of a value in the evidence"""


class ProgramStopped(BaseException):
    """The program broke the dialogue: its fault. The verdict is sent when this is raised, so it does not matter what
    the tests make of it."""


class ProgramError(Exception):
    """An exception of a class of the program's own."""


class Host:
    """The link to the program's process."""

    def __init__(self, channel: Channel, nonce: str, mutates: bool, open_names: list[str]) -> None:
        self.channel = channel
        self.nonce = nonce
        self.mutates = mutates
        self.open_names = open_names
        self.seq = 0
        self.functions: list[Any] = []
        self.remotes: dict[tuple[int, str], Remote] = {}
        """Each of the program's objects once, so that `is` means here what it means there."""
        self.own: dict[int, tuple[str, Any]] = {}
        """The program's functions and classes by the id of what stands for them: handed back, they are names."""
        self.kinds: dict[str, type] = {}
        self.errors: dict[str, type] = {}
        self.last_error = ""
        self.last_call = ""

    def number(self, value: Any) -> tuple[bytes, int, str]:
        if isinstance(value, Remote):
            return b"h", object.__getattribute__(value, "_cabochon_id"), type(value).__name__
        if id(value) in self.own:
            return b"g", 0, self.own[id(value)][0]
        if callable(value):
            self.functions.append(value)
            return b"k", len(self.functions) - 1, getattr(value, "__name__", "function")
        raise WireError(f"a {type(value).__name__} is not plain data")

    def resolve(self, tag: bytes, number: int, kind: str) -> Any:
        if tag == b"k":
            return self.functions[number]
        if tag != b"h":
            raise WireError("a name where an object is expected")
        if (number, kind) not in self.remotes:
            self.remotes[number, kind] = Remote(self, number, kind)
        return self.remotes[number, kind]

    def ask(self, target: Any, op: str, *args: Any, **kwargs: Any) -> Any:
        """The program's answer as plain data; its exception raised here. Raises ProgramStopped on a broken answer.

        A function of the tests that the program calls meanwhile may ask again, so the question's number is local.
        """
        self.seq += 1
        seq = self.seq
        self.last_error = ""
        if op == "call":
            self.last_call = _call_text(target, args, kwargs)
        self.channel.send(b"C" + pack((seq, target, op, list(args), kwargs), self.number))
        while True:
            message = self.channel.read()
            try:
                answer = unpack(message[1:], self.resolve)
                if message[:1] == b"K":
                    number, inner_args, inner_kwargs = answer
                    function = self.functions[number]
                else:
                    raised = self.accept(seq, answer, args)
            except (WireError, IndexError, ValueError, TypeError, KeyError) as e:
                self.stop(f"the program's answer is malformed: {e}")
            if message[:1] != b"K":
                if raised is not None:
                    raise raised
                return answer[2]
            self.channel.send(b"A" + self.call_back(function, inner_args, inner_kwargs))

    def stop(self, why: str) -> NoReturn:
        """Sends the verdict on a program that broke the dialogue; the host listens no further."""
        self.channel.send(b"V" + pack((self.nonce, "malformed", why[:300], 0, 0, [])))
        raise ProgramStopped(why)

    def call_back(self, function: Any, args: Any, kwargs: Any) -> bytes:
        try:
            return pack(("value", function(*args, **kwargs)), self.number)
        except Exception as e:
            return pack(("raise", type(e).__name__, str(e)[:500]))

    def accept(self, seq: int, answer: Any, args: tuple[Any, ...]) -> Exception | None:
        """Checks an answer's form and carries changed arguments back; the exception it tells of. Raises WireError."""
        if type(answer) is not tuple or len(answer) < 3 or answer[0] not in (seq, 0):
            raise WireError("an answer to another question")
        if answer[1] == "value" and len(answer) == 4:
            value, changed = answer[2], answer[3]
            if type(changed) is list and (value is None or self.mutates):
                for mine, new in zip(args, changed, strict=True):
                    _update(mine, new)
            return None
        if answer[1] == "raise" and len(answer) == 5:
            return self.error(str(answer[2]), str(answer[3]), str(answer[4]))
        raise WireError(str(answer[2]))

    def error(self, name: str, base: str, message: str) -> Exception:
        """The program's exception as one of this process. What would end a process instead is an ordinary error
        here."""
        self.last_error = name
        known = self.errors.get(name)
        if known is not None:
            return known(message)
        for candidate in (name, base):
            kind = getattr(builtins, candidate, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    error = kind(message)
                except TypeError:  # UnicodeDecodeError and its like want more
                    continue
                return error
        return ProgramError(f"{name}: {message}")


def _update(mine: Any, new: Any) -> None:
    """Carries a change the program made to an argument back into the caller's object."""
    if new is None or type(mine) is not type(new):
        return
    if type(mine) is list or type(mine) is bytearray:
        mine[:] = new
    elif type(mine) is dict or type(mine) is set:
        mine.clear()
        mine.update(new)


def _call_text(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    words = [show(a, 200) for a in args] + [f"{k}={show(v, 100)}" for k, v in kwargs.items()]
    return f"{target if type(target) is str else 'object'}({', '.join(words)})"[:_SHOWN]


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


def stand_in(host: Host, name: str, about: Any) -> Any:
    """What the tests see under a name of the program. Raises LookupError where the program has no such name."""
    made = _stand_in(host, name, about)
    if about[0] in ("function", "coroutine", "class", "exception"):
        host.own[id(made)] = (name, made)
    return made


def _stand_in(host: Host, name: str, about: Any) -> Any:
    kind = about[0]
    if kind == "function":

        def function(*args: Any, **kwargs: Any) -> Any:
            return host.ask(name, "call", *args, **kwargs)

        function.__name__ = function.__qualname__ = name
        return function
    if kind == "coroutine":

        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return await host.ask(name, "call", *args, **kwargs)

        coroutine.__name__ = coroutine.__qualname__ = name
        return coroutine
    if kind == "class":
        made = _RemoteClass(name, (), {})
        made._host_ = host  # type: ignore[attr-defined]
        if name in host.open_names:
            host.kinds[name] = made
        return made
    if kind == "exception":
        base = getattr(builtins, about[1], Exception)
        made = type(name, (base if issubclass(base, Exception) else Exception,), {})  # type: ignore
        host.errors[name] = made
        return made
    if kind == "value":
        return about[1]
    if kind == "object":
        return Remote(host, about[1], about[2])
    raise LookupError(name)


class _RemoteClass(type):
    """A class of the program: calling it makes an object there; its attributes are asked for there."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._host_.ask(cls.__name__, "call", *args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or name == "_host_":
            raise AttributeError(name)
        return cls._host_.ask(cls.__name__, "get", name)


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
        self.total += 1
        self.failed += 1
        got = getattr(error, "cabochon_values", None)
        about = {"call": self.host.last_call, "error": f"{type(error).__name__}: {error}"[:1000]}
        if got is not None:
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
    host = Host(channel, order["nonce"], order["mutates"], order["classes"])
    channel.send(b"G")
    loaded = channel.read()[1:]
    recorder = Recorder(host)
    module = ModuleType("test_solution")
    space = module.__dict__
    space["__builtins__"] = builtins
    solution = ModuleType(order["module"])
    missing: list[str] = []
    try:
        names = unpack(loaded, host.resolve)
        for name in order["wanted"]:
            if names.get(name, ("missing",))[0] in ("missing", "module"):
                missing.append(name)
                continue
            solution.__dict__[name] = stand_in(host, name, names[name])
    except Exception as e:  # whatever it sent instead of a description
        host.stop(f"the program's description of itself is malformed: {type(e).__name__}: {e}")
    small = len(loaded) <= 256 * (1 + len(order["wanted"]))
    if small and all(type(about) is tuple and about[:1] != ("value",) for about in names.values()):
        channel.send(b"P")
    if order["bare_names"]:
        space.update((name, solution.__dict__[name]) for name in order["wanted"] if name not in missing)
    if not order["bare_names"]:
        sys.modules[order["module"]] = solution
        sys.modules["test_solution"] = module
    space["_cabochon_"] = recorder
    try:
        if order["collect"]:
            from cabochon.verifiers.sandbox.inside_pytest import install

            install()
        for label, source, whole in order["units"]:
            _unit(label, source, space, recorder, whole=whole)
        if order["collect"]:
            from cabochon.verifiers.sandbox.inside_pytest import collect

            collect(module, recorder)
    except ProgramStopped:
        return
    channel.send(b"V" + pack((order["nonce"], "done", "", recorder.passed, recorder.total, missing)))


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
