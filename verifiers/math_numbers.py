"""When two formulas are the same, and when a number is close enough to a decimal.

Formulas are compared by value at several real points with many digits rather than by `simplify`, which may run for ever
and may call different things equal; rational results are compared exactly.
"""

from __future__ import annotations

import sympy
from sympy import Expr, Rational

from cabochon.verifiers.math_values import Leaf, is_opaque

_DIGITS = 60
_POINTS = tuple(
    tuple(Rational(p, q) for p, q in row)
    for row in (
        ((17, 13), (29, 11), (7, 19), (41, 23), (5, 3), (31, 7), (11, 17), (37, 29)),
        ((5, 7), (13, 9), (23, 8), (3, 11), (19, 6), (2, 13), (43, 12), (8, 31)),
        ((-11, 13), (-5, 17), (-19, 7), (-7, 5), (-29, 9), (-3, 23), (-13, 4), (-2, 9)),
        ((-23, 10), (31, 8), (-9, 11), (17, 5), (-1, 7), (25, 9), (-6, 13), (3, 17)),
        ((37, 10), (-8, 15), (27, 7), (-3, 8), (14, 3), (-21, 11), (1, 29), (-15, 7)),
        ((3, 29), (4, 7), (6, 35), (1, 9), (2, 11), (5, 41), (7, 43), (3, 53)),
    )
)
"""Real points with no special relation among them; one row gives a value to each variable, in order of name."""


_WHOLE = tuple(tuple(Rational(k + j * (abs(k) + 2)) for j in range(len(_POINTS[0]))) for k in (*range(1, 14), -4))
"""Whole numbers, where floors and ceilings jump."""
_FAR = tuple(tuple(sign * x * size for x in row) for row in _POINTS[:2] for size in (10**3, 10**6) for sign in (1, -1))
"""Where the bounds of a maximum or an absolute value lie behind."""
_COUNTED = frozenset("kmnN")
"""Variables that a formula with a floor uses for whole numbers alone."""


def same_formula(gold: Expr, answer: Expr) -> bool:
    """Whether two expressions are equal wherever both are defined on the real line."""
    if gold == answer:
        return True
    if gold.is_Rational and answer.is_Rational:
        return False
    infinite = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
    if gold in infinite or answer in infinite or is_opaque(gold) or is_opaque(answer):
        return False
    variables = sorted(gold.free_symbols | answer.free_symbols, key=lambda symbol: symbol.name)
    if not variables:
        return _same_number(gold, answer)
    if len(variables) > len(_POINTS[0]):
        return False
    exact = _small_powers(gold) and _small_powers(answer)
    points = _POINTS
    if gold.has(sympy.floor, sympy.ceiling) or answer.has(sympy.floor, sympy.ceiling):
        points = _WHOLE if {symbol.name for symbol in variables} <= _COUNTED else (*_POINTS, *_WHOLE)
    if gold.has(sympy.Max, sympy.Min, sympy.Abs) or answer.has(sympy.Max, sympy.Min, sympy.Abs):
        points = (*points, *_FAR)
    agreed = 0
    for row in points:
        point = dict(zip(variables, row, strict=False))
        left, right = _value(gold, point, exact), _value(answer, point, exact)
        if left is None and right is None:
            continue
        if left is None or right is None or not _same_number(left, right):
            return False
        agreed += 1
    return agreed >= 3


def _value(expr: Expr, point: dict[sympy.Symbol, Rational], exact: bool) -> Expr | None:
    """The value at a point, None where there is none."""
    value = expr.subs(point) if exact else expr.evalf(_DIGITS, subs=point)
    return None if value.has(sympy.nan, sympy.zoo, sympy.oo) else value


def _small_powers(expr: Expr) -> bool:
    """Whether exact substitution stays small."""
    return all(
        not power.exp.is_Rational or abs(power.exp) <= 200 for power in expr.atoms(sympy.Pow)
    ) and all(function.args[0].is_number is not False for function in expr.atoms(sympy.factorial))


def _same_number(left: Expr, right: Expr) -> bool:
    """Two constants, to at least 60 significant digits; exactly where both are rational."""
    if left == right:
        return True
    difference = left - right
    if (left.is_Rational and right.is_Rational) or difference.is_Rational:
        return bool(difference == 0)
    if (left.is_rational and right.is_irrational) or (left.is_irrational and right.is_rational):
        return False
    digits = _DIGITS + len(str(left)) + len(str(right))
    values = [side.evalf(min(digits, 2000)) for side in (left, right)]
    numbers = [value.as_real_imag() for value in values]
    if not all(part.is_Float or part.is_Rational for pair in numbers for part in pair):
        return False
    scale = max([abs(part) for pair in numbers for part in pair] + [Rational(1, 10**30)])
    near = all(
        abs(one - two) <= scale * Rational(1, 10 ** (_DIGITS - 15)) for one, two in zip(*numbers, strict=True)
    )
    return near and not _differs(difference)


def _differs(difference: Expr) -> bool:
    """Whether sides too near to tell apart by themselves differ all the same: `pi` and `pi + e^{-200}`."""
    if difference.has(sympy.Float):
        return False  # at a point, where the last places are noise
    parts = difference.evalf(15, maxn=400).as_real_imag()
    return any(part.is_Float and part._prec > 1 and part != 0 for part in parts)


def same_leaf(gold: Leaf, answer: Leaf) -> bool:
    """Equal, or equal within what a decimal gold leaves open.

    A gold written as a decimal accepts an answer that is *more* precise and rounds to it: another decimal (also one in
    disguise, 127/50) needs three significant digits in the gold, or to be as near as rounding in single precision
    leaves it; an exact form such as 1/3 needs two. A gold that is not a decimal accepts nothing but itself: 0.333 is
    not 1/3.
    """
    if same_formula(gold.expr, answer.expr):
        return True
    if gold.ulp is None or not gold.expr.is_Rational or not answer.expr.is_number or is_opaque(answer.expr):
        return False
    if answer.expr.is_Integer or (answer.ulp is not None and answer.ulp >= gold.ulp):
        return False
    value = answer.expr if answer.expr.is_Rational else answer.expr.evalf(40)
    if not value.is_real or not value.is_finite:
        return False
    distance = abs(value - gold.expr)
    if distance >= gold.ulp / 2:  # a tie may round either way
        return False
    exact_form = answer.ulp is None and not _terminates(answer.expr)
    return gold.digits >= (2 if exact_form else 3) or bool(distance <= abs(gold.expr) / 10**6)


def _terminates(value: Expr) -> bool:
    """Whether a number can be written out as a decimal."""
    return bool(value.is_Rational) and (10 ** int(value.q).bit_length()) % int(value.q) == 0


def proportional(left: Expr, right: Expr) -> Expr | None:
    """The constant c with `left = c * right` (c not zero), or None."""
    variables = sorted(left.free_symbols | right.free_symbols, key=lambda symbol: symbol.name)
    if not variables or len(variables) > len(_POINTS[0]) or is_opaque(left) or is_opaque(right):
        return None
    for row in _POINTS[:4]:
        point = dict(zip(variables, row, strict=False))
        exact = _small_powers(left) and _small_powers(right)
        top, bottom = _value(left, point, exact), _value(right, point, exact)
        if top is None or bottom is None or top.is_zero or bottom.is_zero:
            continue
        factor = sympy.nsimplify(top / bottom) if (top / bottom).is_Rational else top / bottom
        return factor if same_formula(left, factor * right) else None
    return None
