"""Assertions rewritten so that a failing one says what it got and expected, without changing when it fails."""

from __future__ import annotations

import ast


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
