"""Whether an answer is the gold answer. The gold's form decides what counts; when in doubt the answer is wrong.

A wrong answer scored right teaches the policy to be wrong, a right one missed only costs a sample: so nothing here is
"close enough" unless a rule below says so.
"""

from __future__ import annotations

import itertools
import re

import sympy
from sympy import Expr
from sympy.core.function import AppliedUndef

from cabochon.verifiers.math_labels import by_name, distributed, same_arguments, same_parameter, unnamed, unnumbered
from cabochon.verifiers.math_numbers import same_formula, same_leaf
from cabochon.verifiers.math_sets import FLIPPED, region, same_region, same_relation
from cabochon.verifiers.math_values import DEGREE, Based, Chain, Grid, Items, Leaf, NamedSet, SetOperation, Value, Words

_ITEMS_LIMIT = 60
_FALSE = Words("an equation that does not hold")
"""What `x = 4 = 5` comes to: equal to nothing."""
_SAME_WORDS = (
    {"dne", "does not exist", "do not exist", "the limit does not exist", "undefined"},
    {"no solution", "no solutions", "none", "no real solutions", "no real solution", "empty set",
     "there is no solution", "there are no solutions"},
    {"true", "t"}, {"false", "f"}, {"yes", "y"}, {"no", "n"},
    {"all real numbers", "all reals", "all real"}, {"infinitely many", "infinitely many solutions", "infinite"},
)
_SETS_IN_WORDS = {"R": ("all real numbers", "all reals"), "Z": ("all integers", "the integers", "integers")}


def equal(gold: Value, answer: Value) -> bool:
    """Whether `answer` is the same value as `gold`."""
    gold = distributed(gold)
    answer = same_arguments(gold, same_parameter(gold, distributed(answer)))
    if not isinstance(gold, Chain | Words) and (said := unnamed(answer)) is not None:
        return equal(gold, said)
    named = isinstance(gold, Items) and any(isinstance(item, Chain) for item in gold.items)
    gold_label, gold_bare = unlabel(gold)
    answer = by_name(answer) if named and gold_label is None else unnumbered(answer)
    single = isinstance(gold_bare, Leaf | Grid) or (isinstance(gold_bare, Items) and gold_bare.kind == "tuple")
    if isinstance(answer, Items) and answer.brackets == "or" and single:
        return all(equal(gold, item) for item in answer.items)  # 1/2 or 0.5
    label, bare = unlabel(answer)
    if gold_bare == _FALSE or bare == _FALSE:
        return False
    if gold_label is None and label is None:
        return _same(gold_bare, bare)
    if gold_label is not None and label is not None:
        return (gold_label == label and _same(gold_bare, bare)) or _same(gold, answer)
    if isinstance(label, sympy.Tuple) and gold_label is None and _swapped(label):
        return False
    if gold_label is None:  # the answer says "x = 5" where 5 was asked for
        return _same(gold, answer) if isinstance(gold, Chain) else not _mentions(gold, label) and _same(gold, bare)
    if isinstance(answer, Chain):
        return _same(gold, answer)
    # the gold says "x = 5": a bare 5 will do; a bare "2x + 1" for the equation "y = 2x + 1" will not
    return (_names_function(gold_label, gold_bare) or not _symbols(gold_bare)) and _same(gold_bare, bare)


def unlabel(value: Value) -> tuple[Expr | None, Value]:
    """`x = 5` as (x, 5), `x = 1 or x = 2` as (x, "1 or 2"), `2 + 3 = 5` as (None, 5); anything else as (None,
    itself).
    """
    if isinstance(value, Items) and value.kind == "list":
        parts = [unlabel(item) for item in value.items]
        labels = {label for label, _ in parts}
        if len(labels) == 1 and None not in labels:
            return labels.pop(), Items("list", tuple(bare for _, bare in parts), value.brackets)
        return None, value
    if not isinstance(value, Chain):
        return None, value
    first, last = value.items[0], value.items[-1]
    label: Expr | None
    if value.relations == ("in",) and isinstance(first, Leaf) and first.expr.is_Symbol:
        return first.expr, last
    if value.relations == ("in",) and isinstance(names := _label(first), sympy.Tuple) and isinstance(last, Items):
        return (names, last) if last.kind == "set" else (None, value)
    if any(relation not in ("=", "~") for relation in value.relations):
        return None, value
    if (name := _label(first)) is not None and not _mentions(last, name):
        label, values = name, value.items[1:]
    elif (name := _label(last)) is not None and not _mentions(first, name):
        label, values = name, value.items[:-1][::-1]
    elif not any(_symbols(item) for item in value.items):
        label, values = None, value.items
    else:
        return None, value
    steps_hold = all(
        _same(two, one) or _same(one, two) for one, two in itertools.pairwise(values)
    )
    if not steps_hold:
        return None, _FALSE
    if value.relations[-1] == "~" and len(values) > 1:
        return label, values[-2]  # 2/3 ~ 0.667 says 2/3
    return label, values[-1]


def contradicts(value: Value) -> bool:
    """Whether it is an equation that does not hold: `1 = 2`."""
    return unlabel(value)[1] == _FALSE


def _swapped(names: sympy.Tuple) -> bool:
    """Whether a bare tuple would be understood in another order: of `(y, x) = (3, 4)`, not of `(m, b) = (3, 4)`."""
    given = "".join(str(name) for name in names)
    return "".join(sorted(given)) in ("xy", "xyz", "ab", "abc") and given != "".join(sorted(given))


def _solved(value: Value) -> bool:
    """Whether a relation says what one variable is, rather than something that has to be solved for it."""
    label, bare = unlabel(value)
    if label is not None and label.is_Symbol:
        return not _symbols(bare)
    leaves = [item.expr for item in value.items if isinstance(item, Leaf)] if isinstance(value, Chain) else []
    inside = [expr.args[0] if isinstance(expr, sympy.Abs) else expr for expr in leaves]  # |x| < 3 says it
    return all(expr.is_Symbol or not expr.free_symbols for expr in inside)


def _unsolved(value: Value) -> bool:
    """Whether a relation in one variable, or a part of it, has still to be solved: `2x + 1 < 7`."""
    match value:
        case Items(items=items):
            return any(_unsolved(item) for item in items)
        case SetOperation(left=left, right=right):
            return _unsolved(left) or _unsolved(right)
        case Chain():
            return len(_symbols(value)) == 1 and not _solved(value)
    return False


def _names_function(label: Expr, bare: Value) -> bool:
    """`f(x) = ...`, `f'(x) = ...` and `a_n = ...` (where n occurs) name what was asked for; `y = ...` is an equation.
    """
    if isinstance(label, AppliedUndef) or str(label).endswith("'"):
        return True
    _, mark, index = str(label).partition("_")
    return bool(mark) and any(symbol.name == index for symbol in _symbols(bare))


def _label(value: Value) -> Expr | None:
    """The name on one side of an equation: a variable, an applied function, a tuple of variables."""
    match value:
        case Leaf(expr=expr) if expr.is_Symbol or isinstance(expr, AppliedUndef):
            return expr
        case Leaf(expr=expr) if expr.is_Mul and all(part.is_Symbol and part.name.isupper() for part in expr.args):
            return expr  # the length AB
        case Items(kind="tuple", brackets="()", items=items):
            names = [item.expr for item in items if isinstance(item, Leaf) and item.expr.is_Symbol]
            return sympy.Tuple(*names) if len(names) == len(items) else None
    return None


def _symbols(value: Value) -> set[sympy.Symbol]:
    match value:
        case Leaf(expr=expr):
            return set(expr.free_symbols) - {DEGREE}
        case Items(items=items):
            return set().union(*(_symbols(item) for item in items)) if items else set()
        case Chain(items=items):
            return set().union(*(_symbols(item) for item in items))
        case Grid(rows=rows):
            return set().union(*(_symbols(cell) for row in rows for cell in row))
        case SetOperation(left=left, right=right):
            return _symbols(left) | _symbols(right)
    return set()


def _mentions(value: Value, label: Expr | None) -> bool:
    if label is None:
        return False
    if isinstance(label, sympy.Tuple):
        return any(_mentions(value, name) for name in label)
    if isinstance(label, AppliedUndef):
        return isinstance(value, Leaf) and value.expr.has(label.func)
    return bool(label.free_symbols & _symbols(value))


def _same(gold: Value, answer: Value) -> bool:
    match gold, answer:
        case Leaf(), Leaf():
            return _same_leaves(gold, answer)
        case Based(), Based():
            return gold.base == answer.base and gold.digits == answer.digits
        case Leaf(), Based():
            return same_formula(gold.expr, sympy.Integer(answer.value))
        case Words(), Words():
            return same_words(gold.text, answer.text)
        case (Words(text=text), (NamedSet(name="empty"))) | (NamedSet(name="empty"), Words(text=text)):
            return text in _SAME_WORDS[1]
        case (Words(text=text), (NamedSet(name=name))) | (NamedSet(name=name), Words(text=text)):
            return text in _SETS_IN_WORDS.get(name, ())
        case Items(kind="tuple", brackets="::"), Items(kind="tuple", brackets="::"):
            return _same_ratio(gold, answer)
        case Items(kind="tuple", brackets="::", items=(Leaf(expr=top), Leaf(expr=bottom))), Leaf(expr=value):
            return not bottom.is_zero and same_formula(top / bottom, value)
        case Items(kind="tuple"), Items(kind="tuple"):
            return _same_tuples(gold, answer)
        case (Items(kind="tuple", items=values), Items(kind="list", items=parts)) | (
            Items(kind="list", items=parts), Items(kind="tuple", items=values)
        ):
            named = None if "or" in (gold.brackets, answer.brackets) else _coordinates(parts)
            if named is not None and "()" in (gold.brackets, answer.brackets):
                pairs = zip(values, named, strict=False) if gold.kind == "tuple" else zip(named, values, strict=False)
                return len(values) == len(named) and all(_same(one, two) for one, two in pairs)
        case Items(), Items() if gold.kind in ("set", "list") and answer.kind in ("set", "list"):
            if _has_inequality(gold) or _has_inequality(answer):
                return _same_regions(gold, answer) or (
                    gold.brackets == answer.brackets != "mixed" and _same_collections(gold, answer)
                )
            return _same_collections(gold, answer) or _same_regions(gold, answer)
        case Grid(), Grid():
            return _same_grids(gold.rows, answer.rows)
        case Grid(), Items(kind="tuple", brackets="[]", items=rows):
            if not all(isinstance(row, Items) and row.kind == "tuple" for row in rows):
                return False
            return _same_grids(gold.rows, tuple(row.items for row in rows if isinstance(row, Items)))
        case Items(kind="tuple", brackets="[]", items=rows), Grid():
            return all(isinstance(row, Items) and row.kind == "tuple" for row in rows) and _same_grids(
                tuple(row.items for row in rows if isinstance(row, Items)), answer.rows
            )
        case (Grid(rows=rows), Items(kind="tuple", brackets="()", items=cells)) | (
            Items(kind="tuple", brackets="()", items=cells), Grid(rows=rows)
        ):  # a vector as a column and as <1, 2>
            return all(len(row) == 1 for row in rows) and _same_grids(rows, tuple((cell,) for cell in cells))
        case NamedSet(), NamedSet():
            return gold.name == answer.name
        case Chain(), Chain():
            if _unsolved(answer) and not _unsolved(gold):
                return False  # the question said back: 2x = 6 for x = 3
            if same_relation(gold, answer) or _same_chains(gold, answer):
                return True
        case Items(kind="set", items=(one,)), Leaf():
            return _same(one, answer)
        case SetOperation(), SetOperation() if gold.operation == answer.operation:
            if _same(gold.left, answer.left) and _same(gold.right, answer.right):
                return True
            if gold.operation != "minus" and _same(gold.left, answer.right) and _same(gold.right, answer.left):
                return True
    return _same_regions(gold, answer)


def _has_inequality(value: Items) -> bool:
    return any(isinstance(item, Chain) and set(item.relations) - {"="} for item in value.items)


def _same_chains(gold: Chain, answer: Chain) -> bool:
    """`a < b < c`, item by item, from either end."""
    turned = tuple(FLIPPED.get(relation, relation) for relation in reversed(answer.relations))
    for items, relations in ((answer.items, answer.relations), (answer.items[::-1], turned)):
        if gold.relations == relations and all(_same(one, two) for one, two in zip(gold.items, items, strict=True)):
            return True
    return False


def _same_regions(gold: Value, answer: Value) -> bool:
    if _unsolved(answer) and not _unsolved(gold):
        return False
    one, two = region(gold), region(answer)
    if one is None or two is None or (one[1] and two[1] and one[1] != two[1]):
        return False
    return same_region(one[0], two[0])


def _same_leaves(gold: Leaf, answer: Leaf) -> bool:
    """Leaves, with an angle's degree sign taken as a unit (dropped) or as pi/180."""
    if not gold.expr.has(DEGREE) and not answer.expr.has(DEGREE):
        return same_leaf(gold, answer)
    if gold.expr.has(DEGREE) and answer.expr.has(DEGREE):
        return same_formula(gold.expr, answer.expr)
    for worth in (sympy.Integer(1), sympy.pi / 180):
        if worth == 1 and any(
            side.expr.has(sympy.pi) or ((side.expr / DEGREE).has(DEGREE) and side.expr.has(DEGREE))
            for side in (gold, answer)
        ):
            continue  # a unit stands behind a whole quantity, not inside it; and with pi the other side is in radians
        if same_formula(gold.expr.subs(DEGREE, worth), answer.expr.subs(DEGREE, worth)):
            return True
    return False


def _same_tuples(gold: Items, answer: Items) -> bool:
    if len(gold.items) != len(answer.items) or "::" in (gold.brackets, answer.brackets):
        return False
    if len(gold.items) == 2 and gold.brackets != answer.brackets:
        return False
    return all(_same(one, two) for one, two in zip(gold.items, answer.items, strict=True))


def _coordinates(parts: tuple[Value, ...]) -> list[Value] | None:
    """The values of `x = 1, y = 2` (any order, both or all three of x, y, z named), in the order of their names."""
    named = {str(label): bare for label, bare in map(unlabel, parts) if label is not None}
    if len(named) != len(parts) or "".join(sorted(named)) not in ("xy", "xyz", "abc"):
        return None
    return [named[name] for name in sorted(named)]


def _same_ratio(gold: Items, answer: Items) -> bool:
    """`3:4` is `6:8`."""
    left = [item.expr for item in gold.items if isinstance(item, Leaf)]
    right = [item.expr for item in answer.items if isinstance(item, Leaf)]
    if len(left) != len(right) or len(left) != len(gold.items) or any(side.is_zero for side in (*left, *right)):
        return False
    return all(same_formula(one / left[0], two / right[0]) for one, two in zip(left, right, strict=True))


def _same_collections(gold: Items, answer: Items) -> bool:
    """Each gold item has its own partner. In a set repetitions do not count, in a list they do."""
    wanted, given = list(gold.items), list(answer.items)
    if max(len(wanted), len(given)) > _ITEMS_LIMIT:
        return False
    labels = {label for label, _ in map(unlabel, wanted) if label is not None}
    names = all(isinstance(item, Leaf) and item.expr.is_Symbol for item in wanted)
    if (names or len(labels) > 1) and (gold.brackets == "or") != (answer.brackets == "or"):
        return False  # x = 1 or y = 2 is not both, A or C neither
    if gold.kind == "set":
        wanted, given = _distinct(wanted), _distinct(given)
    elif answer.kind == "set":
        given = _distinct(given)  # which says less than a list where that has a root twice
    if len(wanted) != len(given):
        return False
    for item in wanted:
        partner = next(
            (place for place, other in enumerate(given) if _is_set(item) == _is_set(other) and _same(item, other)), None
        )
        if partner is None:
            return False
        given.pop(partner)
    return True


def in_order(gold: Value, answer: Value) -> bool:
    """Whether the answer names the gold's values in their order."""
    if not (isinstance(gold, Items) and isinstance(answer, Items) and len(gold.items) == len(answer.items)):
        return True
    return gold.kind == "set" or all(map(equal, gold.items, answer.items))


def _is_set(value: Value) -> bool:
    return isinstance(value, Items) and value.kind == "set"


def _distinct(items: list[Value]) -> list[Value]:
    kept: list[Value] = []
    for item in items:
        if not any(item == other or (isinstance(item, Leaf) and isinstance(other, Leaf)
                                     and same_formula(item.expr, other.expr)) for other in kept):
            kept.append(item)
    return kept


def _same_grids(gold: tuple[tuple[Value, ...], ...], answer: tuple[tuple[Value, ...], ...]) -> bool:
    if len(gold) != len(answer) or any(len(one) != len(two) for one, two in zip(gold, answer, strict=True)):
        return False
    return all(
        _same(one, two)
        for row, other in zip(gold, answer, strict=True) for one, two in zip(row, other, strict=True)
    )


_MARKS = re.compile(r"[.,:;!?\"“”](?!\d)|(?<![\d'])'|(?<=[a-z])-(?=[a-z])")  # not before a digit: 3.5 is not 35
_ARTICLES = re.compile(r"\b(?:the|a|an)\s")


def _spaced(mark: re.Match[str]) -> str:
    return " " if mark.group() == "-" else ""


def same_words(gold: str, answer: str) -> bool:
    """Words without case, punctuation, articles and spacing, or two usual ways to say the same."""
    one, two = (" ".join(_ARTICLES.sub("", _MARKS.sub(_spaced, side.casefold())).split()) for side in (gold, answer))
    return one == two or any(one in group and two in group for group in _SAME_WORDS)
