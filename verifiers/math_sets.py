"""Intervals, inequalities in one variable and set expressions as one thing: a region of the real line."""

from __future__ import annotations

import sympy
from sympy import FiniteSet, Interval, S, Union

from cabochon.verifiers.math_numbers import proportional
from cabochon.verifiers.math_values import Chain, Items, Leaf, NamedSet, SetOperation, Value, is_opaque

FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
_PARTS_LIMIT = 12
"""Inequalities or intervals in a list; sympy's unions take their time."""
_NAMED = {"R": S.Reals, "Z": S.Integers, "N": S.Naturals, "Q": S.Rationals, "empty": S.EmptySet}


def region(value: Value, depth: int = 0) -> tuple[sympy.Set, str] | None:
    """The set of reals a value stands for and the variable it names ("" for none); None if it is no such thing."""
    match value:
        case NamedSet(name=name) if name in _NAMED:
            return _NAMED[name], ""
        case Items(kind="tuple", items=(Leaf() as low, Leaf() as high), brackets=brackets) if brackets != "::":
            if not (_real(low) and _real(high)) or (low.expr < high.expr) != sympy.true:
                return None
            if (brackets[0] == "[" and low.expr == -sympy.oo) or (brackets[1] == "]" and high.expr == sympy.oo):
                return None  # infinity is not a number the interval could hold
            return Interval(low.expr, high.expr, brackets[0] == "(", brackets[1] == ")"), ""
        case Items(kind="set", items=items):
            leaves = [item.expr for item in items if isinstance(item, Leaf) and _real(item)]
            return (FiniteSet(*leaves), "") if len(leaves) == len(items) else None
        case SetOperation(operation=operation, left=left, right=right) if depth < 30:
            one, two = region(left, depth + 1), region(right, depth + 1)
            if one is None or two is None:
                return None
            joined = {"union": Union, "intersection": sympy.Intersection, "minus": sympy.Complement}[operation]
            return joined(one[0], two[0]), one[1] or two[1]
        case Items(kind="list", items=items, brackets=joint) if joint in ("or", "and", ",") and depth < 30:
            return _listed(items, joint, depth)
        case Chain():
            return _solved(value, depth)
    return None


def _listed(items: tuple[Value, ...], joint: str, depth: int) -> tuple[sympy.Set, str] | None:
    """Inequalities in one variable, or intervals, joined by "or", "and" or a comma.

    A comma is what it must be: "or" in `x < 1, x > 4`, which no x could be both, "and" in `x > 1, x < 4`, where any x
    would be either.
    """
    if len(items) > _PARTS_LIMIT:
        return None
    parts = [found for item in items if (found := region(item, depth + 1)) is not None]
    names = {name for _, name in parts}
    if len(parts) != len(items) or len(names) != 1:
        return None
    if names == {""} and (joint != "or" or not any(_must_be_interval(item) for item in items)):
        return None  # (1, 2) or (3, 4) are points
    either, both = Union(*(one for one, _ in parts)), sympy.Intersection(*(one for one, _ in parts))
    if joint == ",":
        joint = "or" if both == S.EmptySet else "and" if either == S.Reals else ""
    return (either if joint == "or" else both, names.pop()) if joint else None


def _must_be_interval(value: Value) -> bool:
    if not isinstance(value, Items) or value.kind != "tuple":
        return False
    infinite = any(isinstance(end, Leaf) and abs(end.expr) == sympy.oo for end in value.items)
    return value.brackets in ("(]", "[)") or infinite


def _real(leaf: Leaf) -> bool:
    return bool(leaf.expr.is_extended_real) and leaf.expr.is_number and not is_opaque(leaf.expr)


def _solved(chain: Chain, depth: int) -> tuple[sympy.Set, str] | None:
    """A chain of relations in one variable, linear in it: `-1 < 2x + 3 <= 5`, `x in (0, 1)`, `x != 2`."""
    first = chain.items[0]
    if chain.relations == ("in",) and isinstance(first, Leaf) and first.expr.is_Symbol:
        inner = region(chain.items[1], depth + 1)
        return None if inner is None else (inner[0], first.expr.name)
    leaves = [item.expr for item in chain.items if isinstance(item, Leaf)]
    if len(leaves) != len(chain.items) or any(is_opaque(leaf) for leaf in leaves):
        return None
    if any(relation in ("in", "~") for relation in chain.relations) or len(leaves) > 4:
        return None
    if len(leaves) == 2 and isinstance(leaves[1], sympy.Abs) and not isinstance(leaves[0], sympy.Abs):
        chain, leaves = Chain(chain.items[::-1], (FLIPPED[chain.relations[0]],)), leaves[::-1]  # type: ignore[arg-type]
    if isinstance(leaves[0], sympy.Abs) and chain.relations in (("<",), ("<=",)):
        leaves = [-leaves[1], leaves[0].args[0], leaves[1]]  # |x| < 2 is -2 < x < 2
        chain = Chain(tuple(map(Leaf, leaves)), chain.relations * 2)
    elif isinstance(leaves[0], sympy.Abs) and chain.relations in ((">",), (">=",)):
        inside, bound = leaves[0].args[0], Leaf(leaves[1])  # |x| > 2 is x > 2 or -x > 2
        sides = tuple(Chain((Leaf(side), bound), chain.relations) for side in (inside, -inside))
        return region(Items("list", sides, "or"), depth + 1)
    variables = set().union(*(leaf.free_symbols for leaf in leaves))
    if len(variables) != 1:
        return None
    (variable,) = variables
    answer: sympy.Set = S.Reals
    for left, relation, right in zip(leaves, chain.relations, leaves[1:], strict=False):
        if relation == "=":
            return None
        part = _linear(left, relation, right, variable)
        if part is None:
            return None
        answer = sympy.Intersection(answer, part)
    return answer, variable.name


def _linear(left: sympy.Expr, relation: str, right: sympy.Expr, variable: sympy.Symbol) -> sympy.Set | None:
    if sympy.oo in (left, right) or -sympy.oo in (left, right):
        return S.Reals
    difference = sympy.expand(left - right)
    slope = difference.diff(variable)
    if not slope.is_number or not slope.is_real or slope.is_zero:
        return None
    bound = -difference.subs(variable, 0) / slope
    if not bound.is_real:
        return None
    if slope.is_negative:
        relation = FLIPPED[relation]
    match relation:
        case "<":
            return Interval.open(-sympy.oo, bound)
        case "<=":
            return Interval(-sympy.oo, bound)
        case ">":
            return Interval.open(bound, sympy.oo)
        case ">=":
            return Interval(bound, sympy.oo)
        case "!=":
            return sympy.Complement(S.Reals, FiniteSet(bound))
    return None


def same_region(gold: sympy.Set, answer: sympy.Set) -> bool:
    """Equality of sets of reals: as sympy writes them, else by their difference both ways."""
    if gold == answer:
        return True
    if S.Integers in (gold, answer) or S.Naturals in (gold, answer) or S.Rationals in (gold, answer):
        return False
    return bool((gold - answer) == S.EmptySet and (answer - gold) == S.EmptySet)


def same_relation(gold: Chain, answer: Chain) -> bool:
    """Two equations or inequalities in several variables: the same up to a factor, or item by item."""
    if len(gold.relations) == 1 and len(answer.relations) == 1:
        one, two = _difference(gold), _difference(answer)
        if one is None or two is None or one[1] != two[1]:
            return False
        factor = proportional(one[0], two[0])
        if factor is None and one[1] in ("=", "!="):
            numerators = [sympy.fraction(sympy.together(side[0]))[0] for side in (one, two)]
            factor = proportional(*numerators)
        if factor is None:
            return False
        return one[1] in ("=", "!=") or bool(factor.is_positive)
    return False


def _difference(chain: Chain) -> tuple[sympy.Expr, str] | None:
    """`left - right` and the relation to zero, turned so that it is one of =, !=, <, <=."""
    left, right = chain.items
    if not isinstance(left, Leaf) or not isinstance(right, Leaf) or chain.relations[0] in ("in", "~"):
        return None
    relation = chain.relations[0]
    if relation in (">", ">="):
        return right.expr - left.expr, FLIPPED[relation]
    return left.expr - right.expr, relation
