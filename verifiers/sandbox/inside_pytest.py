"""Runs a unittest or pytest file inside the tests' sandbox: unittest is the real one, pytest a small stand-in.

The sandbox's Python has no packages, and a test file of a coding task uses little of pytest: plain test functions and
classes, `raises`, `approx`, `mark.parametrize`, `fixture`, `param`, `skip`, `fail`, and set-up and tear-down functions.
That much is here; code_pytest refuses a task that needs more.
"""

from __future__ import annotations

import asyncio
import cmath
import inspect
import sys
import unittest
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cabochon.verifiers.sandbox.inside_tests import Recorder


class Skipped(Exception):
    """A test that says it does not apply; neither passed nor failed."""


class _Raises:
    def __init__(self, kinds: Any, match: str | None) -> None:
        self.kinds = kinds
        self.wanted = match
        self.value: BaseException | None = None
        self.type: type[BaseException] | None = None

    def __enter__(self) -> _Raises:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            raise AssertionError(f"did not raise {self.kinds}")
        if not isinstance(error, self.kinds):
            return False
        self.value, self.type = error, type(error)
        if self.wanted is not None:
            self.match(self.wanted)
        return True

    def match(self, pattern: str) -> bool:
        import re

        if not re.search(pattern, str(self.value)):
            raise AssertionError(f"{str(self.value)!r} does not match {pattern!r}")
        return True


def _raises(kinds: Any, *args: Any, match: str | None = None, **kwargs: Any) -> Any:
    context = _Raises(kinds, match)
    if not args:
        return context
    with context:
        args[0](*args[1:], **kwargs)
    return context


class _Approx:
    """Equal within max(rel * |expected|, abs), elementwise in plain containers."""

    def __init__(self, expected: Any, rel: float | None, abs_: float | None, nan_ok: bool) -> None:
        self.expected, self.rel, self.abs, self.nan_ok = expected, rel, abs_, nan_ok

    def __eq__(self, got: Any) -> bool:
        return self._near(got, self.expected)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"approx({self.expected!r})"

    def _near(self, got: Any, want: Any) -> bool:
        if type(want) in (list, tuple):
            return type(got) in (list, tuple) and len(got) == len(want) and all(map(self._near, got, want))
        if type(want) is dict:
            return type(got) is dict and got.keys() == want.keys() and all(self._near(got[k], want[k]) for k in want)
        if type(want) in (int, float, complex) and type(got) in (int, float, complex, bool):
            if cmath.isnan(want):
                return self.nan_ok and cmath.isnan(got)
            if cmath.isinf(want) or cmath.isinf(got):
                return bool(got == want)
            rel = 1e-6 if self.rel is None and self.abs is None else self.rel or 0.0
            return abs(got - want) <= max(rel * abs(want), 1e-12 if self.abs is None else self.abs)
        return bool(got == want)


class _Mark:
    def parametrize(self, argnames: Any, argvalues: Any, ids: Any = None) -> Callable[[Any], Any]:
        words = [n.strip() for n in argnames.split(",")] if isinstance(argnames, str) else list(argnames)

        def mark(function: Any) -> Any:
            sets = [dict(zip(words, row if len(words) > 1 else (row,), strict=True)) for row in argvalues]
            function.cabochon_rows = [
                {**old, **new} for old in _marked(function, "cabochon_rows", [{}]) for new in sets
            ]
            return function

        return mark

    def skip(self, reason: Any = "") -> Any:
        def mark(function: Any) -> Any:
            function.cabochon_skip = True
            return function

        return mark(reason) if callable(reason) else mark

    def skipif(self, condition: Any, *, reason: str = "") -> Any:
        return self.skip(reason) if condition else lambda function: function

    def __getattr__(self, name: str) -> Any:
        """Any other mark changes nothing here."""
        return lambda *args, **kwargs: args[0] if len(args) == 1 and callable(args[0]) else (lambda function: function)


def _fixture(function: Any = None, *, scope: str = "function", autouse: bool = False, name: str = "") -> Any:
    def mark(f: Any) -> Any:
        f.cabochon_fixture = name or f.__name__
        f.cabochon_autouse = autouse
        return f

    return mark(function) if function is not None else mark


def _skip(reason: str = "") -> None:
    raise Skipped(reason)


def _fail(reason: str = "") -> None:
    raise AssertionError(reason)


def pytest_module() -> ModuleType:
    """The stand-in for `import pytest`."""
    module = ModuleType("pytest")
    module.__dict__.update(
        raises=_raises, mark=_Mark(), skip=_skip,
        approx=lambda expected, rel=None, abs=None, nan_ok=False: _Approx(expected, rel, abs, nan_ok),
        fixture=_fixture, fail=_fail, param=lambda *values, **_: values if len(values) != 1 else values[0],
        main=lambda *_: 0,
    )  # fmt: skip
    return module


def install() -> None:
    sys.modules["pytest"] = pytest_module()
    unittest.main = lambda *args, **kwargs: None  # type: ignore


class _Result(unittest.TestResult):
    """Each test method is one test; a skip is none; an expected failure that fails is a pass."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.subtests_failed: set[int] = set()

    def addSuccess(self, test: Any) -> None:
        if id(test) not in self.subtests_failed:
            self.recorder.ok(test.id())

    def addFailure(self, test: Any, err: Any) -> None:
        self.recorder.fail(test.id(), err[1])

    addError = addFailure

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.subtests_failed.add(id(test))
            self.recorder.fail(subtest.id(), err[1])

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self.recorder.ok(test.id())

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.recorder.fail(test.id(), AssertionError("passed where a failure was expected"))


def _marked(thing: Any, name: str, default: Any) -> Any:
    """What a function, module, class or one of its bases has itself. Not by getattr, which may ask the program."""
    return next((vars(holder)[name] for holder in getattr(thing, "__mro__", (thing,)) if name in vars(holder)), default)


def _members(thing: type) -> dict[str, Any]:
    """A class's functions, inherited ones too, in source order."""
    members = {n: value for base in reversed(thing.__mro__) for n, value in vars(base).items()}
    return {n: v for n, v in members.items() if isinstance(v, FunctionType | staticmethod | classmethod)}


def _hook(owner: Any, name: str, argument: Any) -> None:
    """Calls `owner`'s function `name`, if it has one, with `argument` where that takes one."""
    if _marked(owner if isinstance(owner, type | ModuleType) else type(owner), name, None) is not None:
        function = getattr(owner, name)
        function(*[argument] * len(inspect.signature(function).parameters))


def collect(module: ModuleType, recorder: Recorder) -> None:
    """Runs every test of the module, in source order within its kinds."""
    try:
        _hook(module, "setup_module", module)
        unittest.defaultTestLoader.loadTestsFromModule(module).run(_Result(recorder))
        fixtures = _fixtures(module, vars(module))
        for name, thing in list(vars(module).items()):
            if name.startswith("test") and inspect.isfunction(thing):
                _rows(name, module, name, fixtures, recorder)
            elif name.startswith("Test") and inspect.isclass(thing) and not issubclass(thing, unittest.TestCase):
                _class(name, thing, fixtures, recorder)
        _hook(module, "teardown_module", module)
    except BaseException as e:
        recorder.fail("the module's set-up or tear-down", e)


def _class(name: str, thing: type, fixtures: dict[str, Any], recorder: Recorder) -> None:
    tests = [n for n in _members(thing) if n.startswith("test")]
    if not tests or not _marked(thing, "__test__", True) or _marked(thing, "cabochon_skip", False):
        return
    try:
        _hook(thing, "setup_class", thing)
        for test in tests:
            _rows(f"{name}.{test}", thing, test, fixtures, recorder)
        _hook(thing, "teardown_class", thing)
    except BaseException as e:
        recorder.fail(name, e)


def _fixtures(owner: Any, members: dict[str, Any]) -> dict[str, Any]:
    """By the name tests ask for, as seen from `owner`."""
    return {
        vars(f)["cabochon_fixture"]: getattr(owner, n) for n, f in members.items()
        if isinstance(f, FunctionType) and "cabochon_fixture" in vars(f)
    }  # fmt: skip


def _rows(label: str, owner: Any, name: str, fixtures: dict[str, Any], recorder: Recorder) -> None:
    """Runs one test for each row of its parameters, in a class each time on a new object."""
    in_class = isinstance(owner, type)
    function = _members(owner)[name] if in_class else vars(owner)[name]
    if _marked(function, "cabochon_skip", False):
        return
    of_owner, of_function = _marked(owner, "cabochon_rows", [{}]), _marked(function, "cabochon_rows", [{}])
    rows = [{**outer, **inner} for outer in of_owner for inner in of_function]
    for i, row in enumerate(rows):
        one = f"{label}[{i}]" if len(rows) > 1 else label
        try:
            subject = owner() if in_class else owner
            own = _fixtures(subject, _members(owner)) if in_class else {}
            _one(subject, name, "method" if in_class else "function", row, {**fixtures, **own})
        except Skipped:
            continue
        except BaseException as e:
            recorder.fail(one, e)
        else:
            recorder.ok(one)


def _one(subject: Any, name: str, kind: str, row: dict[str, Any], fixtures: dict[str, Any]) -> None:
    """One test between its set-up and its tear-down, which is done whatever becomes of it."""
    values, undo = dict(row), list[Iterator[Any]]()
    test = getattr(subject, name)
    try:
        _hook(subject, f"setup_{kind}", test)
        for fixture, function in fixtures.items():
            if function.cabochon_autouse:
                _value(fixture, fixtures, values, undo)
        result = test(**{n: _value(n, fixtures, values, undo) for n in _asked(test)})
        if inspect.iscoroutine(result):
            asyncio.run(result)
    finally:
        for generator in reversed(undo):
            next(generator, None)
        _hook(subject, f"teardown_{kind}", test)


def _asked(function: Any) -> list[str]:
    """The parameters a caller has to fill."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in named and p.default is p.empty]


def _value(name: str, fixtures: dict[str, Any], values: dict[str, Any], undo: list[Iterator[Any]]) -> Any:
    """A parameter's value, or a fixture's, made once for one test."""
    if name not in values:
        if name not in fixtures:
            raise LookupError(f"no fixture {name!r}: only fixtures of the test file itself are known here")
        function = fixtures[name]
        value = function(**{n: _value(n, fixtures, values, undo) for n in _asked(function)})
        if inspect.isgenerator(value):
            undo.append(value)
            value = next(value)
        values[name] = value
    return values[name]
