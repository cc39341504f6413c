"""What an answer can be, and arithmetic that cannot explode.

Numbers and formulas are sympy expressions built by the guarded functions below: a power, factorial or binomial too
large to write out stays an *opaque* function of its arguments, which equals only itself. So `9^{9^{9}}` costs
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sympy
from sympy import Expr, Rational

from cabochon.verifiers.math_lex import MathSyntaxError

BITS_LIMIT = 20_000
"""Exact integers up to about 6,000 digits are worked out."""

PM = "plus_or_minus"
"""What the names of signs that a value leaves open begin with."""
DEGREE = sympy.Symbol("degree_of_arc")
Relation = Literal["=", "!=", "<", "<=", ">", ">=", "in", "~"]


@dataclass(frozen=True)
class Leaf:
    """A number or formula. `ulp` and `digits` are set when it was written as a decimal: the worth of one unit in its
    last place, and how many significant digits it has."""

    expr: Expr
    ulp: Rational | None = None
    digits: int = 0


@dataclass(frozen=True)
class Items:
    """Several values: `tuple` (order counts), `set` (in braces), `list` (separated by commas, "and", "or").

    `brackets` is how a tuple was enclosed ("()", "[)", ... or "::" for a ratio), and how a list was joined (",", "and",
    "or", "mixed").
    """

    kind: Literal["tuple", "set", "list"]
    items: tuple[Value, ...]
    brackets: str = ""


@dataclass(frozen=True)
class Chain:
    """Values joined by relations: `a < x <= b` is items (a, x, b), relations ("<", "<=")."""

    items: tuple[Value, ...]
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class SetOperation:
    operation: Literal["union", "intersection", "minus"]
    left: Value
    right: Value


@dataclass(frozen=True)
class NamedSet:
    """`R`, `Z`, `N`, `Q`, `C` or `empty`."""

    name: str


@dataclass(frozen=True)
class Grid:
    """A matrix, by rows."""

    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Words:
    """Plain words, folded to lower case with single spaces."""

    text: str


@dataclass(frozen=True)
class Based:
    """A number written in a base: `1011_2`."""

    digits: str
    base: int

    @property
    def value(self) -> int:
        return int(self.digits, self.base)


Value = Leaf | Items | Chain | SetOperation | NamedSet | Grid | Words | Based


def power(base: Expr, exponent: Expr) -> Expr:
    """`base ** exponent`, opaque where the result would be too large to write out."""
    if base.is_Rational and base.is_nonzero and exponent.is_Rational:
        size = max(abs(int(base.p)).bit_length(), int(base.q).bit_length())
        if abs(base) != 1 and size * abs(exponent) > BITS_LIMIT:
            return _opaque("power", base, exponent)
    elif exponent.is_Rational and (abs(exponent.p) > BITS_LIMIT or exponent.q > BITS_LIMIT):
        return _opaque("power", base, exponent)
    if base.is_zero and exponent.is_negative:
        raise MathSyntaxError("division by zero")
    return base**exponent


def divide(left: Expr, right: Expr) -> Expr:
    if right.is_zero:
        raise MathSyntaxError("division by zero")
    return left / right


def factorial(value: Expr, *, twice: bool = False) -> Expr:
    """`n!`, or `n!!`, which steps by two."""
    if value.is_Integer and value > 1000:
        return _opaque("double_factorial" if twice else "factorial", value)
    if value.is_number and (not value.is_Integer or value < 0):
        raise MathSyntaxError("factorial of something that is not a natural number")
    return sympy.factorial2(value) if twice else sympy.factorial(value)


def binomial(top: Expr, bottom: Expr) -> Expr:
    if top.is_Integer and bottom.is_Integer and (not 0 <= bottom <= top or top > 5000):
        return _opaque("binomial", top, bottom)
    return sympy.binomial(top, bottom)


def number(text: str) -> Leaf:
    """A literal; decimals stay exact and remember their last place."""
    mantissa, _, exponent = text.lower().partition("e")
    scale = int(exponent) if exponent else 0
    if abs(scale) > 5000 or len(mantissa) > 3500:
        raise MathSyntaxError("a number with too many digits")
    whole, dot, fraction = mantissa.partition(".")
    value = Rational(int((whole + fraction) or "0")) * Rational(10) ** (scale - len(fraction))
    if (not dot or not fraction) and scale >= 0:
        return Leaf(value)
    digits = len((whole + fraction).strip("0"))  # 10.0 and 2.50 say no more than 10 and 2.5
    return Leaf(value, Rational(10) ** (scale - len(fraction)), max(digits, 1))


def _opaque(name: str, *arguments: Expr) -> Expr:
    return sympy.Function(f"opaque_{name}")(*arguments)


def is_opaque(expr: Expr) -> bool:
    """True where the value contains something too large to work out."""
    return any(str(item.func).startswith("opaque_") for item in expr.atoms(sympy.core.function.AppliedUndef))

