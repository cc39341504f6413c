"""Runs a unittest or pytest file inside the tests' sandbox: unittest is the real one, pytest a small stand-in.

The sandbox's Python has no packages, and a test file of a coding task uses little of pytest: plain test functions and
classes, `raises`, `approx`, `mark.parametrize`, `fixture`, `param`, `skip`, `fail`. That much is here. Anything else
of pytest is an AttributeError, so a task that needs more is seen to need it.
"""

from __future__ import annotations

import inspect
import math
import sys
import unittest
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cabochon.verifiers.sandbox.inside_tests import Recorder


class Skipped(Exception):
    """A test that says it does not apply; neither passed nor failed."""


class _Raises:
    def __init__(self, kinds: Any, match: str | None) -> None:
        self.kinds = kinds
        self.match = match
        self.value: BaseException | None = None

    def __enter__(self) -> _Raises:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            raise AssertionError(f"did not raise {self.kinds}")
        if not isinstance(error, self.kinds):
            return False
        if self.match is not None:
            import re

            if not re.search(self.match, str(error)):
                raise AssertionError(f"{str(error)!r} does not match {self.match!r}")
        self.value = error
        return True


def _raises(kinds: Any, *args: Any, match: str | None = None) -> Any:
    context = _Raises(kinds, match)
    if not args:
        return context
    with context:
        args[0](*args[1:])
    return context


class _Approx:
    """Equal within max(rel * |expected|, abs), elementwise in plain containers."""

    def __init__(self, expected: Any, rel: float | None, abs_: float | None) -> None:
        self.expected, self.rel, self.abs = expected, rel, abs_

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
        if type(want) in (int, float) and type(got) in (int, float, bool):
            if math.isinf(want) or math.isinf(got):
                return bool(got == want)
            rel = 1e-6 if self.rel is None and self.abs is None else self.rel or 0.0
            return abs(got - want) <= max(rel * abs(want), 1e-12 if self.abs is None else self.abs)
        return bool(got == want)


class _Mark:
    def parametrize(self, names: Any, rows: Any, ids: Any = None) -> Callable[[Any], Any]:
        words = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)

        def mark(function: Any) -> Any:
            sets = [dict(zip(words, row if len(words) > 1 else (row,), strict=True)) for row in rows]
            function.cabochon_rows = [
                {**old, **new} for old in getattr(function, "cabochon_rows", [{}]) for new in sets
            ]
            return function

        return mark

    def skip(self, reason: Any = "") -> Any:
        def mark(function: Any) -> Any:
            function.cabochon_skip = True
            return function

        return mark(reason) if callable(reason) else mark

    def __getattr__(self, name: str) -> Any:
        """Any other mark changes nothing here."""
        return lambda *args, **kwargs: args[0] if len(args) == 1 and callable(args[0]) else (lambda function: function)


def _fixture(
    function: Any = None, *, scope: str = "function", params: Any = None, autouse: bool = False, name: Any = None
) -> Any:
    def mark(f: Any) -> Any:
        f.cabochon_fixture = True
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
        raises=_raises, approx=lambda expected, rel=None, abs=None: _Approx(expected, rel, abs), mark=_Mark(),
        skip=_skip,
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


def collect(module: ModuleType, recorder: Recorder) -> None:
    """Runs every test of the module, in source order within its kinds."""
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    suite.run(_Result(recorder))
    fixtures = {n: f for n, f in vars(module).items() if getattr(f, "cabochon_fixture", False)}
    for name, thing in list(vars(module).items()):
        if name.startswith("test") and inspect.isfunction(thing):
            _rows(name, thing, fixtures, recorder)
        elif name.startswith("Test") and inspect.isclass(thing) and not issubclass(thing, unittest.TestCase):
            for inner in [n for n in vars(thing) if n.startswith("test")]:
                subject = thing()
                prepare = getattr(subject, "setup_method", None)
                if prepare is not None:
                    prepare(*[None] * len(inspect.signature(prepare).parameters))
                own = {n: getattr(subject, n) for n, f in vars(thing).items() if getattr(f, "cabochon_fixture", False)}
                _rows(f"{name}.{inner}", getattr(subject, inner), {**fixtures, **own}, recorder)


def _rows(label: str, function: Any, fixtures: dict[str, Any], recorder: Recorder) -> None:
    if getattr(function, "cabochon_skip", False):
        return
    rows = getattr(function, "cabochon_rows", [{}])
    for i, row in enumerate(rows):
        one = f"{label}[{i}]" if len(rows) > 1 else label
        undo: list[Iterator[Any]] = []
        try:
            function(
                **{n: row[n] if n in row else _value(n, fixtures, undo) for n in inspect.signature(function).parameters}
            )
            for generator in reversed(undo):
                next(generator, None)
        except Skipped:
            continue
        except Exception as e:
            recorder.fail(one, e)
        else:
            recorder.ok(one)


def _value(name: str, fixtures: dict[str, Any], undo: list[Iterator[Any]]) -> Any:
    if name not in fixtures:
        raise LookupError(f"no fixture {name!r}: only fixtures of the test file itself are known here")
    function = fixtures[name]
    value = function(**{n: _value(n, fixtures, undo) for n in inspect.signature(function).parameters})
    if inspect.isgenerator(value):
        undo.append(value)
        return next(value)
    return value
