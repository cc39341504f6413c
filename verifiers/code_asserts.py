"""Assertions rewritten so that a failing one says what it got and expected, without changing when it fails; and tests
that assert nothing, refused."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence

from cabochon.verifiers.code_given import bound_by


class Asserts(ast.NodeTransformer):
    """`assert a == b` -> `if not ((l := a) == (r := b)): raise_failed(source, l, r)`."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        test = node.test
        label = ast.Constant(ast.unparse(node)[:500])
        shown: list[ast.expr] = []
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            left, right = "_cabochon_left", "_cabochon_right"
            test = ast.Compare(
                left=ast.NamedExpr(target=ast.Name(left, ast.Store()), value=test.left),
                ops=test.ops,
                comparators=[ast.NamedExpr(target=ast.Name(right, ast.Store()), value=test.comparators[0])],
            )
            shown = [ast.Name(left, ast.Load()), ast.Name(right, ast.Load())]
        call = ast.Call(
            func=ast.Attribute(ast.Name("_cabochon_", ast.Load()), "raise_failed", ast.Load()),
            args=[label, *shown],
            keywords=[],
        )
        new = ast.If(test=ast.UnaryOp(ast.Not(), test), body=[ast.Expr(call)], orelse=[])
        return ast.fix_missing_locations(ast.copy_location(new, node))

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """Left alone: names stored in a class body would become its attributes."""
        node.body = [n if isinstance(n, ast.Assert) else self.visit(n) for n in node.body]
        return node


def reported(node: ast.Assert) -> ast.stmt:
    """An assertion that says how it went and lets the next one have its turn. Only for direct children of `check`,
    where nothing around it could have caught the failure."""
    label = ast.unparse(node)[:500]
    wrapped = ast.parse(
        f"try:\n    pass\n    _cabochon_.ok({label!r})\nexcept Exception as _cabochon_error:\n"
        f"    _cabochon_.fail({label!r}, _cabochon_error)"
    ).body[0]
    assert isinstance(wrapped, ast.Try)
    wrapped.body[0] = Asserts().visit(node)
    return wrapped


_ASSERTING = (ast.Assert, ast.Raise, ast.With, ast.Try)


def refuse_toothless(trees: Sequence[ast.Module], entry: str) -> None:
    """What looks like a test and would hold whatever the program does, or is of something else than the program."""
    top = [node for tree in trees for node in tree.body]
    for node in _statements(top):
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Tuple) and node.test.elts:
            raise ValueError(f"the task's tests assert a tuple, which always holds: {ast.unparse(node)[:80]}")
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare):
            raise ValueError(f"the task's tests compare without an assertion: {ast.unparse(node)[:80]}")
    for node in checks_of(top):
        if not any(isinstance(n, _ASSERTING) or isinstance(getattr(n, "value", None), ast.Call)
                   for n in _statements(node.body)):  # fmt: skip
            raise ValueError("the task's check asserts nothing")
    if not entry and checks_of(top) and "check" not in called_in(top):
        raise ValueError("the task's tests define check and nobody calls it: it needs payload['entry_point']")
    bound = bound_by(top)
    if entry in bound:
        raise ValueError(f"the task's tests define {entry}, which is asked of the program")
    if "*" in bound and not entry:
        raise ValueError("the task's tests import all names of a module: then payload['entry_point'] has to say which "
                         "name is the program's")  # fmt: skip


def _statements(body: Iterable[ast.AST]) -> Iterable[ast.AST]:
    """All statements but those of a `with` or a `try`, which may be about an exception."""
    for node in body:
        yield node
        if not isinstance(node, ast.With | ast.AsyncWith | ast.Try):
            yield from _statements(n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt))


def checks_of(body: Iterable[ast.AST]) -> list[ast.FunctionDef]:
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"]


def called_in(body: Iterable[ast.AST]) -> set[str]:
    """The names that are called where statements are carried out, not where a function is only defined."""
    nodes = (n for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef) for n in ast.walk(node))
    return {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
