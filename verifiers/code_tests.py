"""A coding task's tests, made ready for the tests' sandbox: which names are the program's, and one piece of source
per test.

The task is trusted and parsed here; nothing a model wrote comes near this file.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cabochon.verifiers.code_asserts import Asserts, called_in, checks_of, refuse_toothless, reported
from cabochon.verifiers.code_given import UNPARSABLE, behind, entry_of, given_of, imported
from cabochon.verifiers.code_pytest import count_tests, is_test_file, uncrossable, unsupported
from cabochon.verifiers.sandbox.inside_guard import PLAIN_METHODS

_COMMON_IMPORTS = {
    **dict.fromkeys(("isclose", "sqrt", "inf", "nan", "pi", "floor", "ceil", "fabs"), "math"),
    **dict.fromkeys(("Counter", "defaultdict", "OrderedDict", "deque", "namedtuple"), "collections"),
    "Fraction": "fractions", "Decimal": "decimal", "permutations": "itertools", "product": "itertools",
    **dict.fromkeys(("List", "Dict", "Tuple", "Set", "Optional", "Any", "Union", "Callable", "Iterable"), "typing"),
}  # fmt: skip
_MODULES = {"pytest": "import pytest", "np": "import numpy as np", "numpy": "import numpy", "pd": "import pandas as pd"}
"""Names that are never the program's, and what brings them."""
_STREAMS = (("stdin", "input"), ("stdout", "output"))
_BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__"}
_LITERALS = (ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Set, ast.Dict)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of test source. An empty label is set-up; `whole`: it is one test, else it reports its own."""

    label: str
    source: str
    whole: bool = True
    tests: int = 1
    """How many it is known to report; 0 for set-up."""


@dataclass(frozen=True, kw_only=True)
class FunctionPlan:
    """Tests that call into the program."""

    wanted: tuple[str, ...]
    """The program's names the tests use."""
    classes: tuple[str, ...]
    """Those of them the tests may be using as classes."""
    kept: tuple[str, ...]
    """Those of the classes whose instances stay objects where they are plain data of a kind: attributes are used."""
    units: tuple[Unit, ...]
    module: str = "solution"
    bare_names: bool = True
    """The names are globals of the tests; else they are imported from `module`."""
    collect: bool = False
    """The source defines unittest or pytest tests to be collected."""
    mutates: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a whole program."""

    stdin: str
    stdout: str


@dataclass(frozen=True, kw_only=True)
class CasePlan:
    """Tests that feed standard input and read standard output."""

    cases: tuple[Case, ...]


Plan = FunctionPlan | CasePlan
Kind = Literal["asserts", "calls", "stdio", "unittest"]


def plan_of(payload: Mapping[str, Any]) -> Plan:
    """The plan of `Task.payload` (its keys: see code.py). Raises ValueError where the task is unusable."""
    kind = payload.get("kind") or _guess(payload)
    if kind == "stdio":
        return _cases(payload)
    setup = str(payload.get("setup") or payload.get("test_setup_code") or "")
    module = str(payload.get("module") or "solution")
    entry, called = entry_of(payload)
    helpers = given_of(payload)
    tests = payload.get("tests", payload.get("test_list", payload.get("test")))
    if kind == "calls":
        tests = _call_tests(payload.get("calls"), called)
    if isinstance(tests, str):
        sources, listed = (tests,), False
    elif isinstance(tests, Sequence) and tests and all(isinstance(t, str) for t in tests):
        sources, listed = tuple(tests), True
    else:
        raise ValueError(f"a code task needs payload['tests'], a text or a list of texts, got {type(tests).__name__}")
    mutates = bool(payload.get("mutates", False))
    if kind == "unittest":
        plan = _file_plan("\n".join(sources), setup, helpers, module)
        return replace(plan, mutates=mutates)
    if kind not in ("asserts", "calls"):
        raise ValueError(f"payload['kind'] must be asserts, calls, stdio or unittest, got {kind!r}")
    return _assert_plan(sources, listed, setup, helpers, entry, called, module, mutates)


def _guess(payload: Mapping[str, Any]) -> str:
    if "cases" in payload or "inputs" in payload:
        return "stdio"
    if "calls" in payload:
        return "calls"
    tests = payload.get("tests", payload.get("test"))
    if isinstance(tests, Sequence) and not isinstance(tests, str) and all(isinstance(t, str) for t in tests):
        tests = "\n".join(tests)
    return "unittest" if isinstance(tests, str) and is_test_file(tests) else "asserts"


def _cases(payload: Mapping[str, Any]) -> CasePlan:
    rows = payload.get("cases")
    if rows is None:
        given, wanted = payload.get("inputs"), payload.get("outputs")
        if not isinstance(given, list | tuple) or not isinstance(wanted, list | tuple) or len(given) != len(wanted):
            raise ValueError(
                "a code task of kind stdio needs payload['cases'], a list of {'stdin', 'stdout'}, or as many 'inputs' "
                f"as 'outputs' in lists, got {_told(given)} and {_told(wanted)}"
            )
        rows = [{"stdin": i, "stdout": o} for i, o in zip(given, wanted, strict=True)]
    if not isinstance(rows, list | tuple) or not rows:
        raise ValueError(f"payload['cases'] must be a list; a task without tests cannot be judged: got {_told(rows)}")
    cases = []
    for i, row in enumerate(rows):
        columns = row if isinstance(row, Mapping) else {}
        texts = [text for k, other in _STREAMS if isinstance(text := columns.get(k, columns.get(other)), str)]
        if len(texts) < len(_STREAMS):
            raise ValueError(f"payload['cases'][{i}] needs the texts 'stdin' and 'stdout', got {_told(row)}")
        cases.append(Case(stdin=texts[0], stdout=texts[1]))
    return CasePlan(cases=tuple(cases))


def _told(value: Any) -> str:
    """What a value is, briefly, for somebody who has to find it."""
    match value:
        case None:
            return "none"
        case Mapping():
            return f"an object with the keys {sorted(map(str, value))}"
        case list() | tuple():
            return f"a list of {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _call_tests(calls: Any, called: str) -> list[str]:
    """`{"args": [...], "kwargs": {...}, "expected": value}` as assertions; values are JSON-like and written as
    literals."""
    if not called or not isinstance(calls, list | tuple) or not calls:
        raise ValueError("payload['calls'] needs at least one call and payload['entry_point'], the function's name")
    out = []
    for i, call in enumerate(calls):
        args, kwargs = (call.get("args", ()), call.get("kwargs", {})) if isinstance(call, Mapping) else (None, None)
        if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping) or "expected" not in call:
            raise ValueError(
                f"payload['calls'][{i}] needs 'expected', 'args' as a list and 'kwargs' as an object, "
                f"got {json.dumps(call, default=repr)[:80]}"
            )
        words = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
        out.append(f"assert {called}({', '.join(words)}) == {call['expected']!r}")
    return out


def _parse(source: str, what: str) -> ast.Module:
    try:
        return ast.parse(source.replace("\r\n", "\n"))
    except UNPARSABLE as e:
        raise ValueError(f"the task's {what} do not parse: {e}") from e


def _refuse_lacking(tree: ast.Module, *, collected: bool = True) -> None:
    if lacking := unsupported(tree, collected=collected):
        raise ValueError(f"the task's tests need what is not there: {lacking}")


def _bare(tree: ast.Module, module: str) -> ast.Module:
    """Without imports from the program's module: its names are globals of assertions."""
    tree.body = [
        node for node in tree.body
        if not (isinstance(node, ast.ImportFrom) and node.module == module and not any(a.asname for a in node.names))
    ]  # fmt: skip
    return tree


def _refuse(trees: Sequence[ast.AST], wanted: Iterable[str], modules: Iterable[str]) -> None:
    lacking = uncrossable(trees, set(wanted), set(modules))
    if lacking:
        raise ValueError(f"the task's tests need the program in their own process: {lacking}")


@functools.lru_cache(maxsize=512)
def _assert_plan(
    sources: tuple[str, ...], listed: bool, setup: str, helpers: str, entry: str, called: str, module: str,
    mutates: bool,
) -> FunctionPlan:
    if listed and any(checks_of(_parse(s, "tests").body) for s in sources):
        sources, listed = ("\n".join(sources),), False  # of which each one is not a test by itself
    trees = [_bare(_parse(s, "tests"), module) for s in sources]
    setup_tree, helper_tree = _bare(_parse(setup, "set-up"), module), _parse(helpers, "helpers")
    refuse_toothless([*trees] if entry else [*trees, setup_tree], entry)
    wanted, imports = _names([*trees, setup_tree], _defined([helper_tree]), entry)
    if not wanted:
        raise ValueError("the task's tests use nothing of the program: they would hold whatever it does")
    for tree in (*trees, setup_tree):
        _refuse_lacking(tree, collected=False)
    _refuse([*trees, setup_tree], wanted, ())
    attributes = _attribute_roots([*trees, setup_tree])  # before assertions are rewritten, which adds one
    contains = any(
        isinstance(n, ast.In | ast.NotIn) or getattr(n, "attr", "") in ("contains", "__contains__")
        for tree in (*trees, setup_tree, helper_tree) for n in ast.walk(tree)
    )  # fmt: skip
    before = ["\n".join(imports), helpers, ast.unparse(setup_tree)]
    if entry and any(before):  # which may bind the program's name to something else: a module's, a reference
        before.append(f"globals().pop({entry!r}, None)\nfrom {module} import {entry}")
    units = [Unit(label="", source=s, tests=0) for s in before if s.strip()]
    if listed:
        for tree in trees:
            label = ast.unparse(tree)
            units.append(Unit(label=label[:500], source=ast.unparse(Asserts().visit(tree))))
    else:
        units += _split(trees[0], called)
    if not any(unit.label for unit in units):
        raise ValueError("the task's tests have no assertion and no call: nothing would be judged")
    named = {n.id for tree in (*trees, setup_tree) for n in ast.walk(tree) if isinstance(n, ast.Name)}
    # only a method is asked of a class that the tests do not name; closed, it has those that no plain data has
    own = () if entry in named or called.partition(".")[2] in PLAIN_METHODS else (entry,)
    classes = tuple(n for n in wanted if n[0].isupper() and n not in own and (attributes or not contains))
    kept = classes if attributes else ()
    return FunctionPlan(wanted=wanted, classes=classes, kept=kept, units=tuple(units), mutates=mutates)


def _split(tree: ast.Module, candidate: str) -> list[Unit]:
    """One unit per top-level assertion, `with pytest.raises` or call; definitions are set-up. `check` is called
    with the candidate if nobody does."""
    units: list[Unit] = []
    checks = checks_of(tree.body)
    asserted = max(1, sum(isinstance(n, ast.Assert) for n in checks[-1].body)) if checks else 1
    calls_itself = "check" in called_in(tree.body)
    for node in tree.body:
        if isinstance(node, ast.Assert) or (isinstance(node, ast.With) and ".raises(" in ast.unparse(node.items[0])):
            label = ast.unparse(node)[:500]
            units.append(
                Unit(label=label, source=ast.unparse(Asserts().visit(ast.Module(body=[node], type_ignores=[]))))
            )
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            tests = asserted if isinstance(node.value.func, ast.Name) and node.value.func.id == "check" else 1
            units.append(Unit(label=ast.unparse(node)[:500], source=ast.unparse(node), whole=False, tests=tests))
        else:
            if isinstance(node, ast.FunctionDef) and node.name == "check":
                node.body = [reported(n) if isinstance(n, ast.Assert) else Asserts().visit(n) for n in node.body]
            else:
                node = Asserts().visit(node)
            units.append(Unit(label="", source=ast.unparse(ast.fix_missing_locations(node)), tests=0))
    if checks and not calls_itself and candidate:
        units.append(Unit(label=f"check({candidate})", source=f"check({candidate})", whole=False, tests=asserted))
    return units


def _defined(trees: Sequence[ast.AST]) -> set[str]:
    """Every name the source itself binds, anywhere."""
    names: set[str] = set()
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= imported(node)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names


def _attribute_roots(trees: Sequence[ast.AST]) -> set[str]:
    """Names whose attributes the tests use, those of standard modules, builtin types and literals aside; "" for the
    attribute of an expression."""
    roots = {
        node.value.id if isinstance(node.value, ast.Name) else ""
        for tree in trees for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not isinstance(node.value, _LITERALS)
    }  # fmt: skip
    return roots - sys.stdlib_module_names - _BUILTINS - set(_MODULES)


def _names(trees: Sequence[ast.AST], known: set[str], entry: str) -> tuple[tuple[str, ...], list[str]]:
    """The program's names among the free names of the tests, and the imports that supply the others.

    A name the tests could mean from a standard module (`math.isclose`, a bare `isclose`) is never the program's while
    another name is: a program that defines `isclose` must not judge itself. A builtin name is the program's only
    where the tests use nothing else (MBPP has a function called `sum`).
    """
    free = {n.id for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Name)} - _defined(trees) - known
    modules = {
        n.value.id for tree in trees for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in sys.stdlib_module_names
    } & free  # fmt: skip
    imports = [f"import {name}" for name in sorted(modules - {entry})]
    imports += [_MODULES[name] for name in sorted(free & set(_MODULES))]
    mine = free - _BUILTINS - (modules - {entry}) - set(_MODULES)
    common = {n for n in mine if n in _COMMON_IMPORTS and n != entry}
    if entry or mine - common:
        imports += [f"from {_COMMON_IMPORTS[n]} import {n}" for n in sorted(common)]
        mine -= common
    if entry:
        mine.add(entry)
    if not mine:
        calls = [
            node.func.id for tree in trees for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in free
        ]  # fmt: skip
        mine = set(calls[:1])
    return tuple(sorted(mine)), imports


@functools.lru_cache(maxsize=512)
def _file_plan(source: str, setup: str, helpers: str, module: str) -> FunctionPlan:
    """A unittest or pytest file that imports the program from `module`, or uses its names as globals."""
    tree = _parse(behind("\n".join(filter(None, (helpers, setup))), source), "tests")
    _refuse_lacking(tree)
    tests = count_tests(tree)
    wanted: set[str] = set()
    aliases: set[str] = set()
    bare = True
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == module:
            bare = False
            wanted |= {a.name for a in node.names} - {"*"}
            if any(a.name == "*" for a in node.names):
                wanted |= set(_names([tree], set(), "")[0])
        elif isinstance(node, ast.Import):
            aliases |= {a.asname or a.name for a in node.names if a.name == module}
    if aliases:
        bare = False
        wanted |= {
            n.attr for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in aliases
        }  # fmt: skip
    if bare:
        wanted = set(_names([tree], set(), "")[0])
    if not wanted:
        raise ValueError(f"the task's test file uses nothing of the program: import it as `from {module} import ...`")
    _refuse([tree], wanted, aliases)
    classes = tuple(sorted(n for n in wanted if n[0].isupper()))
    rewritten = ast.unparse(Asserts().visit(tree))
    unit = Unit(label="", source=rewritten, tests=tests)
    return FunctionPlan(
        wanted=tuple(sorted(wanted)), classes=classes, kept=classes, units=(unit,), module=module, bare_names=bare,
        collect=True,
    )  # fmt: skip
