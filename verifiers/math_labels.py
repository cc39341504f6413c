"""Names before an answer: `x = 1, 2` for `x = 1, x = 2`, `\\text{Area} = 5` for 5, `n` for `k` where both are integers.

Nothing here compares; each function gives an answer in the form that the gold has, or leaves it alone.
"""

from __future__ import annotations

import re

import sympy
from sympy.core.function import AppliedUndef

from cabochon.verifiers.math_values import DEGREE, Chain, Items, Leaf, NamedSet, SetOperation, Value, Words

_NO_NAMES = frozenset(["not", "no", "false", "wrong", "incorrect", "true", "yes"])
_NO_NAME = re.compile(
    r"\b(?:not|wrong|incorrect|half|twice|double|bound|negative|square|root|reciprocal) ?(?:of|the|answer|$)",
    re.IGNORECASE,
)


def distributed(value: Value) -> Value:
    """`x = 1, 2, 3` as `x = 1, x = 2, x = 3`, and `(x, y) = (1, 2), (2, 1)` likewise."""
    if not isinstance(value, Items) or value.kind != "list":
        return value
    first, *rest = value.items
    if not isinstance(first, Chain) or first.relations != ("=",) or not rest:
        return value
    name, one = first.items
    if isinstance(name, Leaf) and name.expr.is_Symbol:
        alike = all(isinstance(item, Leaf) and item.expr.is_number for item in (one, *rest))
    else:
        alike = all(
            isinstance(item, Items) and item.kind == "tuple" and len(item.items) == len(_parts(name))
            for item in (name, one, *rest)
        )
    if not alike:
        return value
    return Items("list", tuple(Chain((name, item), ("=",)) for item in (one, *rest)), value.brackets)


def _parts(value: Value) -> tuple[Value, ...]:
    return value.items if isinstance(value, Items) else (value,)


def unnumbered(value: Value) -> Value:
    """`x_1 = 1, x_2 = 2`, the roots of one equation, as `x = 1, x = 2`."""
    if not isinstance(value, Items) or value.kind != "list" or len(value.items) < 2:
        return value
    parts: list[Value] = []
    for place, item in enumerate(value.items, start=1):
        if not isinstance(item, Chain) or item.relations != ("=",) or not isinstance(item.items[0], Leaf):
            return value
        letter, mark, index = str(item.items[0].expr).partition("_")
        if not mark or index != str(place) or not re.fullmatch("[a-z]", letter):
            return value
        parts.append(Chain((Leaf(sympy.Symbol(letter)), item.items[1]), ("=",)))
    return Items("list", tuple(parts), value.brackets)


def by_name(value: Value) -> Value:
    """`(a, b) = (2, 3)` as `a = 2, b = 3`."""
    match value:
        case Chain(relations=("=",), items=(Items(kind="tuple") as names, Items(kind="tuple") as values)) if (
            names.brackets == values.brackets == "()" and len(names.items) == len(values.items)
        ):
            pairs = zip(names.items, values.items, strict=True)
            return Items("list", tuple(Chain(pair, ("=",)) for pair in pairs), ",")
    return value


def unnamed(value: Value) -> Value | None:
    """What is said of a quantity: `\\text{Area} = 5`, `x + y = 5`, `|AB| = 5`; None where no quantity is named so."""
    if not isinstance(value, Chain) or set(value.relations) != {"="}:
        return None
    name, *rest = value.items
    match name:
        case Words(text=text):
            names = text not in _NO_NAMES and len(text) <= 40 and not _NO_NAME.search(text)
        case Leaf(expr=expr):
            names = _is_quantity(expr) and all(_is_number(item) for item in rest)
        case _:
            names = False
    if not names:
        return None
    return rest[0] if len(rest) == 1 else Chain(tuple(rest), value.relations[1:])


def _is_quantity(expr: sympy.Expr) -> bool:
    """`x + y`, the sum of lengths `AB + BC`, the length `|AB|`, the size `|S|`, the angle `m\\angle A`; `|x| = 5` is an
    equation.
    """
    if expr.is_Add:
        return all(part.is_Symbol or _is_length(part) for part in expr.args)
    if isinstance(expr, sympy.Abs):
        inside = expr.args[0]
        return _is_length(inside) or (bool(inside.is_Symbol) and inside.name.isupper())
    if not expr.is_Mul or not all(part.is_Symbol for part in expr.args):
        return False
    return sorted(part.name.partition("_")[0] for part in expr.args) == ["angle", "m"]


def _is_number(value: Value) -> bool:
    return isinstance(value, Leaf) and not value.expr.free_symbols - {DEGREE}


def _is_length(expr: sympy.Expr) -> bool:
    return bool(expr.is_Mul) and all(part.is_Symbol and part.name.isupper() for part in expr.args)


def same_parameter(gold: Value, answer: Value) -> Value:
    """The answer with its integer named as in the gold: `x = 2n\\pi, n \\in Z` for `x = 2k\\pi, k \\in Z`."""
    wanted, given = _integer(gold), _integer(answer)
    if wanted is None or given is None or wanted == given or wanted in _named(answer):
        return answer
    return _renamed(answer, {given: wanted})


def same_arguments(gold: Value, answer: Value) -> Value:
    """The answer with its function's arguments named as in the gold: `f(t) = 2t` for `f(x) = 2x`."""
    match gold, answer:
        case (
            Chain(relations=("=",), items=(Leaf(expr=AppliedUndef() as wanted), _)),
            Chain(relations=("=",), items=(Leaf(expr=AppliedUndef() as given), _)),
        ) if wanted.func == given.func and _all_names(wanted.args) and _all_names(given.args):
            if wanted == given or len(wanted.args) != len(given.args):
                return answer
            if (_named(answer) - set(given.args)) & set(wanted.args):
                return answer  # f(x) = x + n is not f(n) = 2n
            return _renamed(answer, dict(zip(given.args, wanted.args, strict=True)))
    return answer


def _all_names(arguments: tuple[sympy.Basic, ...]) -> bool:
    return all(argument.is_Symbol for argument in arguments) and len(set(arguments)) == len(arguments)


def _integer(value: Value) -> sympy.Symbol | None:
    """The one variable of a list of two that is said to be an integer."""
    match value:
        case Items(kind="list", items=(_, Chain(relations=("in",), items=(Leaf(expr=expr), NamedSet(name="Z"))))):
            return expr if expr.is_Symbol else None
    return None


def _named(value: Value) -> set[sympy.Symbol]:
    match value:
        case Leaf(expr=expr):
            return set(expr.free_symbols)
        case Items(items=items) | Chain(items=items):
            return set().union(*map(_named, items))
        case SetOperation(left=left, right=right):
            return _named(left) | _named(right)
    return set()


def _renamed(value: Value, names: dict[sympy.Symbol, sympy.Symbol]) -> Value:
    match value:
        case Leaf(expr=expr):
            return Leaf(expr.subs(names, simultaneous=True), value.ulp, value.digits)
        case Items(items=items):
            return Items(value.kind, tuple(_renamed(item, names) for item in items), value.brackets)
        case Chain(items=items):
            return Chain(tuple(_renamed(item, names) for item in items), value.relations)
    return value
