"""What a pytest file uses that sandbox/inside_pytest.py does not have, and how many tests it holds.

A file that needs more than is there would fail every program, or pass every one: the task is unusable, and its owner is
told so instead of the model.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence, Set
from itertools import chain

_KNOWN = {"raises", "approx", "mark", "skip", "fixture", "fail", "param", "main"}
_REFUSED_MARKS = {"xfail", "usefixtures"}
_KEYWORDS = {
    "parametrize": {"argnames", "argvalues", "ids"}, "fixture": {"scope", "autouse", "name"}, "param": {"id"},
    "approx": {"rel", "abs", "nan_ok"}, "skip": {"reason"}, "skipif": {"condition", "reason"},
    "fail": {"reason"},
}  # fmt: skip
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_test_file(source: str) -> bool:
    """Whether it defines tests for somebody else to call: a class of them, or functions that it does not call."""
    try:
        tree = ast.parse(source.replace("\r\n", "\n"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    for node in tree.body:
        if isinstance(node, _Function) and node.name.startswith("test") and node.name not in called:
            return True
        if isinstance(node, ast.ClassDef) and (
            any(_last(b).endswith("TestCase") for b in node.bases)
            or any(isinstance(f, _Function) and f.name.startswith("test") for f in node.body)
        ):
            return True
    return False


def unsupported(tree: ast.Module, *, collected: bool = True) -> str:
    """The first thing `tree` uses and would not get, in words; "" where there is none. `collected`: it is a file of
    tests, whose functions and classes are run."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    cases: list[ast.ClassDef] = []
    for c in classes:
        if any(_last(b).endswith("TestCase") or _last(b) in [case.name for case in cases] for b in c.bases):
            cases.append(c)
    bases = {_last(b) for c in classes for b in c.bases}
    plain = [c for c in classes if c not in cases and (c.name.startswith("Test") or c.name in bases)]
    module = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.Import)
              for a in n.names if a.name == "pytest"}  # fmt: skip
    run = chain(_functions(tree, plain), _mixtures(tree, cases)) if collected else ()
    return next(chain(_names(tree, module), _calls(tree, module), run), "")


_IN_ONE_PROCESS = {
    "mock": {"patch"}, "contextlib": {"redirect_stdout", "redirect_stderr"}, "builtins": {"open"}, "io": {"open"},
    "tempfile": {"NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile", "mkdtemp", "mkstemp"},
    "inspect": {"getsource", "signature", "getfullargspec", "isfunction", "isgeneratorfunction"},
    "self": {"assertLogs", "assertNoLogs", "assertWarns", "assertWarnsRegex"}, "os": {"chdir"},
}  # fmt: skip
"""By module or object: what reaches into the process of what is tested, or shares its files."""
_RUN = {"pickle": {"load", "loads"}, "marshal": {"load", "loads"}, "importlib": {"import_module"}}
_RUN_BARE = {"eval", "exec", "compile", "__import__"}
"""What makes code of data: of the program's answer, code of the program in the tests' process."""
_STREAMS = {"sys.stdin", "sys.stdout", "sys.stderr", "sys.argv", "os.environ"}
_BARE = {"patch", "redirect_stdout", "redirect_stderr", "open"} | _IN_ONE_PROCESS["tempfile"]


def uncrossable(trees: Sequence[ast.AST], wanted: Set[str], modules: Set[str]) -> str:
    """The first thing tests use that works in the program's own process only, in words; "" where there is none.
    `wanted` are the program's names, `modules` those of its module."""
    nodes = [n for tree in trees for n in ast.walk(tree)]
    targets = [t for n in nodes if isinstance(n, ast.Assign | ast.Delete) for t in n.targets]
    changed = {id(n) for t in targets for n in ast.walk(t)}
    for node in nodes:
        if isinstance(node, ast.Call) and not all(isinstance(a, ast.Constant) for a in node.args):
            within = node.func.value if isinstance(node.func, ast.Attribute) else None
            if _last(node.func) in (_RUN.get(_last(within), ()) if within else _RUN_BARE - wanted):
                return f"{ast.unparse(node)[:80]}, which would run there what the program says"
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                owner = _last(base.value) if isinstance(base, ast.Attribute) else ""
                if owner in modules or (isinstance(base, ast.Name) and base.id in wanted):
                    return f"a class {node.name} derived from the program's {_last(base)}"
        elif isinstance(node, ast.Name) and node.id in _BARE - wanted and isinstance(node.ctx, ast.Load):
            return f"{node.id}, which does not reach the program"
        elif isinstance(node, ast.Attribute) and node.attr in _IN_ONE_PROCESS.get(_last(node.value), ()):
            return f"{ast.unparse(node)}, which does not reach the program"
        elif isinstance(node, ast.Attribute) and id(node) in changed and ast.unparse(node) in _STREAMS:
            return f"a change of {ast.unparse(node)}, which does not reach the program"
    return ""


def count_tests(tree: ast.Module) -> int:
    """How many tests the file holds; a parametrized one counts as many as its rows where they are written out, and
    those that are made while the file runs as one.

    Raises ValueError where there is none and nothing that could become one, or where one hides another of its name.
    """
    named = (getattr(node, "name", getattr(node, "value", None)) for node in ast.walk(tree))
    if not any(isinstance(name, str) and name.startswith(("test", "runTest")) for name in named):
        raise ValueError("the task's test file holds no test: no function or method has a name that begins with test")
    found = [f for f in tree.body if isinstance(f, _Function) and f.name.startswith("test")]
    names = [n.name for n in tree.body if n in found or isinstance(n, ast.ClassDef)]
    if hidden := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"the task's tests define {hidden[0]} twice: the first would never be run")
    total = sum(_rows(f) for f in found)
    for c in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        total += sum(_rows(f) * _rows(c) for f in c.body if isinstance(f, _Function) and f.name.startswith("test"))
    return max(total, 1)


def _rows(node: _Function | ast.ClassDef) -> int:
    rows = 1
    for call in (d for d in node.decorator_list if isinstance(d, ast.Call) and _last(d.func) == "parametrize"):
        given = call.args[1] if len(call.args) > 1 else None
        rows *= max(1, len(given.elts)) if isinstance(given, ast.List | ast.Tuple) else 1
    return rows


def _last(node: ast.expr) -> str:
    """`c` of `a.b.c`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _names(tree: ast.Module, module: set[str]) -> Iterator[str]:
    """Parts of pytest and its plug-ins that are not there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "pytest":
            yield from (f"pytest.{a.name}" for a in node.names if a.name not in _KNOWN)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (f"the module {m}" for m in modules if m.startswith(("pytest_", "_pytest", "pytest.")))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in module:
            if node.attr not in _KNOWN:
                yield f"pytest.{node.attr}"
        elif isinstance(node, ast.Attribute) and _last(node.value) == "mark" and node.attr in _REFUSED_MARKS:
            yield f"pytest.mark.{node.attr}"


def _of_pytest(node: ast.expr, module: set[str], bare: set[str]) -> bool:
    if isinstance(node, ast.Attribute):
        return (isinstance(node.value, ast.Name) and node.value.id in module) or _last(node.value) == "mark"
    return isinstance(node, ast.Name) and node.id in bare


def _calls(tree: ast.Module, module: set[str]) -> Iterator[str]:
    """Arguments that would not be understood."""
    bare = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "pytest"
            for a in n.names}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _of_pytest(node.func, module, bare):
            name = _last(node.func)
            yield from (
                f"the argument {k.arg} of pytest's {name}" for k in node.keywords
                if name in _KEYWORDS and k.arg not in _KEYWORDS[name]
            )  # fmt: skip
            condition = node.args[0] if name == "skipif" and node.args else None
            if isinstance(condition, ast.Constant) and isinstance(condition.value, str):
                yield "a condition of skipif as a text"
        elif isinstance(node, ast.Assign) and any(_last(t) == "pytestmark" for t in node.targets):
            marks = {_last(n) for n in ast.walk(node.value) if isinstance(n, ast.Attribute)}
            yield from (f"pytestmark with {m}" for m in sorted(marks & {"parametrize", "skip", "skipif"}))


def _functions(tree: ast.Module, classes: list[ast.ClassDef]) -> Iterator[str]:
    """Tests and fixtures that ask for a fixture that is not there, and forms that would not be run."""
    owned = [(f, False) for f in tree.body if isinstance(f, _Function)]
    owned += [(f, True) for c in classes for f in c.body if isinstance(f, _Function)]
    fixtures = [(f, d) for f, _ in owned for d in f.decorator_list if _is_fixture(d)]
    known = {_literal(d, "name") or f.name for f, d in fixtures}
    known |= {_last(t) for n in tree.body if isinstance(n, ast.Assign) and any(map(_is_fixture, ast.walk(n.value)))
              for t in n.targets}  # fmt: skip
    known |= {p for n in (*classes, *(f for f, _ in owned)) for p in _parameters(n)}
    for function, inside in owned:
        made = any(map(_is_fixture, function.decorator_list))
        if not made and not function.name.startswith("test"):
            continue
        if made and isinstance(function, ast.AsyncFunctionDef):
            yield f"the asynchronous fixture {function.name}"
        if not made and any(isinstance(n, ast.Yield | ast.YieldFrom) for n in _own_nodes(function)):
            yield f"a yield in the test {function.name}"
        static = any(_last(d) == "staticmethod" for d in function.decorator_list)
        words = _required(function)[1 if inside and not static else 0 :]
        yield from (f"the fixture {w!r}, which {function.name} asks for" for w in words if w not in known)


def _mixtures(tree: ast.Module, cases: list[ast.ClassDef]) -> Iterator[str]:
    """What unittest, which runs its own classes, would not see or not wait for."""
    waits = "IsolatedAsyncioTestCase" in {_last(n) for n in ast.walk(tree) if isinstance(n, ast.expr)}
    for case in cases:
        for function in (f for f in case.body if isinstance(f, _Function)):
            if any(map(_is_fixture, function.decorator_list)):
                yield f"the fixture {function.name} of a TestCase"
            if isinstance(function, ast.AsyncFunctionDef) and function.name.startswith("test") and not waits:
                yield f"the asynchronous {function.name} of a TestCase, which nobody would wait for"
    for function in (f for f in tree.body if cases and isinstance(f, _Function)):
        for call in (d for d in function.decorator_list if _is_fixture(d) and isinstance(d, ast.Call)):
            if any(k.arg == "autouse" for k in call.keywords):
                yield f"the fixture {function.name} around tests of a TestCase"


def _is_fixture(node: ast.AST) -> bool:
    return isinstance(node, ast.expr) and _last(node.func if isinstance(node, ast.Call) else node) == "fixture"


def _literal(node: ast.expr, keyword: str) -> str:
    words = [k.value for k in node.keywords if k.arg == keyword] if isinstance(node, ast.Call) else []
    return str(words[0].value) if words and isinstance(words[0], ast.Constant) else ""


def _parameters(node: _Function | ast.ClassDef) -> Iterator[str]:
    """The names that the `parametrize` marks of `node` give."""
    for call in (d for d in node.decorator_list if isinstance(d, ast.Call) and _last(d.func) == "parametrize"):
        names = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "argnames"), None)
        for part in ast.walk(names) if names is not None else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield from (w.strip() for w in part.value.split(","))


def _required(function: _Function) -> list[str]:
    """Parameters without a default."""
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    plain = plain[: len(plain) - len(a.defaults)]
    return [p.arg for p in plain] + [p.arg for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is None]


def _own_nodes(function: _Function) -> Iterator[ast.AST]:
    """The nodes of `function`, those of functions inside it aside."""
    todo: list[ast.AST] = [*function.body]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, _Function | ast.Lambda | ast.ClassDef):
            todo += ast.iter_child_nodes(node)
