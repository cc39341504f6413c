"""Named functions, symbols and roots as the parser meets them."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING

import sympy
from sympy import Expr, Integer, Rational

from cabochon.verifiers.math_lex import GREEK, MathSyntaxError, Token
from cabochon.verifiers.math_values import DEGREE, PM, Chain, Grid, Items, Leaf, Value, divide, number, power

if TYPE_CHECKING:
    from cabochon.verifiers.math_parse import _Parser

SYMBOL_COMMANDS = GREEK | {"imath", "jmath", "angle", "degree", "begin:vmatrix", "langle", "vec", "bar"}
FACTOR_COMMANDS = SYMBOL_COMMANDS | {
    "frac", "sqrt", "pi", "infty", "binom", "overline", "lfloor", "lceil", "begin:pmatrix", "begin:bmatrix"
}
"""What may stand directly after a factor and multiply it."""

_CALLABLE = frozenset("fghFGHPQ")
"""Letters that are applied when a bracket follows: `f(x)`, not `f` times `x`."""

_SIMPLE = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "asin": sympy.asin, "acos": sympy.acos,
    "atan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh, "tanh": sympy.tanh, "coth": sympy.coth, "ln": sympy.log,
    "exp": sympy.exp, "abs": sympy.Abs, "floor": sympy.floor, "ceil": sympy.ceiling,
}
_INVERSE = {"sin": sympy.asin, "cos": sympy.acos, "tan": sympy.atan, "cot": sympy.acot, "sec": sympy.asec,
            "csc": sympy.acsc, "sinh": sympy.asinh, "cosh": sympy.acosh, "tanh": sympy.atanh}
_WHOLE = {"gcd": math.gcd, "lcm": math.lcm}
_SEVERAL = {"max": sympy.Max, "min": sympy.Min}


def multiply(left: Expr, right: Expr) -> Expr:
    return left * right


def product(left: Value, right: Value) -> Value:
    """Two factors; a number before a matrix multiplies each cell."""
    if isinstance(right, Grid):
        return Grid(tuple(tuple(product(left, cell) for cell in row) for row in right.rows))
    return Leaf(multiply(_expr(left), _expr(right)))


def _expr(value: Value) -> Expr:
    if isinstance(value, Leaf):
        return value.expr
    raise MathSyntaxError("a function of something that is not a number or a formula")


def symbol(parser: _Parser, letter: str) -> Value:
    """A variable with subscript and primes; `e` and `i` are the constants; `f(...)` is a function applied."""
    name = letter
    if parser.token.value == "_":
        parser.next()
        name += "_" + _subscript(parser)
    while parser.accept("'"):
        name += "'"
    inverse = [token.value for token in parser.tokens[parser.at : parser.at + 6]]
    if letter in _CALLABLE and inverse == ["^", "{", "-", "1", "}", "("]:
        parser.at += 5
        name += "^-1"
    if letter == "P" and (event := _event(parser)):
        return Leaf(sympy.Symbol(name + event))
    if letter in _CALLABLE and parser.token.value == "(":
        parser.next()
        arguments = parser.listing()
        parser.expect(")")
        items = arguments.items if isinstance(arguments, Items) else (arguments,)
        return Leaf(sympy.Function(name)(*(_expr(item) for item in items)))
    if name == "e":
        return Leaf(sympy.E)
    if name == "i":
        return Leaf(sympy.I)
    return Leaf(sympy.Symbol(name))


_EVENTS = frozenset([r"\cap", r"\cup", "|", "=", "<", ">", "<=", ">=", r"\le", r"\leq", r"\ge", r"\geq"])


def _event(parser: _Parser) -> str:
    """The bracket after a P where it is a probability, as of `P(A \\cap B)`; nothing where P is a polynomial."""
    tokens = [token.value for token in parser.tokens[parser.at : parser.at + 12]]
    if tokens[:1] != ["("] or ")" not in tokens or "(" in tokens[1 : tokens.index(")")]:
        return ""
    inside = tokens[: tokens.index(")") + 1]
    if not _EVENTS & set(inside):
        return ""
    parser.at += len(inside)
    return "".join(inside)


def _subscript(parser: _Parser) -> str:
    """The subscript's text; braces dropped so that `x_{1}` is `x_1`."""
    if not parser.accept("{"):
        token = parser.next()
        if token.kind not in ("number", "letter", "text", "word"):
            raise MathSyntaxError("cannot read a subscript")
        return token.value
    parts: list[str] = []
    depth = 1
    while True:
        token = parser.next()
        if token.kind == "end":
            raise MathSyntaxError("a subscript is not closed")
        depth += (token.value == "{") - (token.value == "}")
        if depth == 0:
            return "".join(parts)
        parts.append(token.value)


def command_value(parser: _Parser, command: str) -> Value:
    """A symbol or constant named by a command."""
    name = command[1:]
    if name == "pi":
        return Leaf(sympy.pi)
    if name == "infty":
        return Leaf(sympy.oo)
    if name in ("imath",):
        return Leaf(sympy.I)
    if name == "angle":
        letters = []
        while parser.token.kind in ("letter", "word") and parser.token.value.isupper():
            letters.append(parser.next().value)
        if letters:
            return Leaf(sympy.Symbol("angle_" + "".join(letters)))
    if name in ("overline", "bar"):
        return Leaf(sympy.Symbol("overline_" + str(_expr(parser.argument()))))
    if name in GREEK:
        full = name.removeprefix("var")
        if parser.token.value == "_":
            parser.next()
            full += "_" + _subscript(parser)
        return Leaf(sympy.Symbol(full))
    raise MathSyntaxError(f"cannot read {command[:20]!r}")


def root(parser: _Parser) -> Expr:
    """What follows `\\sqrt`: an optional index in brackets, then the radicand."""
    if parser.accept("["):
        index = _expr(parser.sum())
        parser.expect("]")
        return power_of_root(_expr(parser.argument()), index)
    if parser.token.value == "(":
        parser.next()
        inside = _expr(parser.sum())
        parser.expect(")")
        return power_of_root(inside, Integer(2))
    return power_of_root(_expr(parser.argument()), Integer(2))


def power_of_root(radicand: Expr, index: Expr) -> Expr:
    """The real root where there is one: the cube root of -8 is -2."""
    if radicand.is_Rational and radicand < 0 and index.is_Integer and index % 2 == 1:
        return -power(-radicand, divide(Integer(1), index))
    return power(radicand, divide(Integer(1), index))


def named(parser: _Parser, name: str) -> Expr:
    """A function by name, with `\\sin^2 x`, `\\sin^{-1} x`, `\\log_2 x`, and an argument in brackets or not."""
    base: Expr | None = None
    exponent: Expr | None = None
    while parser.token.value in ("_", "^", "**"):
        if parser.next().value == "_":
            base = _expr(parser.argument())
        else:
            exponent = _expr(parser.argument(exponent=True))
    if name == "sqrt":
        return root(parser)
    arguments = _arguments(parser)
    if name in _WHOLE:
        if not all(argument.is_Integer for argument in arguments):
            raise MathSyntaxError(f"{name} of what is no whole number")
        return Integer(_WHOLE[name](*map(int, arguments)))
    if name in _SEVERAL:
        return _SEVERAL[name](*arguments)
    if len(arguments) != 1:
        raise MathSyntaxError(f"{name} takes one argument")
    argument = arguments[0]
    if argument.has(DEGREE):
        argument = argument.subs(DEGREE, sympy.pi / 180)
    if exponent == -1 and name in _INVERSE:
        return _INVERSE[name](argument)
    value = _apply(name, argument, base)
    return value if exponent is None else power(value, exponent)


def _apply(name: str, argument: Expr, base: Expr | None) -> Expr:
    if name in ("log", "lg"):
        base = Integer(10) if base is None else base
        if argument.is_zero or base.is_zero or base == 1:
            raise MathSyntaxError("logarithm of zero")
        return sympy.log(argument) / sympy.log(base)
    if name == "ln" and argument.is_zero:
        raise MathSyntaxError("logarithm of zero")
    if name == "exp":
        return power(sympy.E, argument)
    if name == "cbrt":
        return power_of_root(argument, Integer(3))
    return _SIMPLE[name](argument)


def _arguments(parser: _Parser) -> list[Expr]:
    if parser.accept("("):
        value = parser.listing()
        parser.expect(")")
        items = value.items if isinstance(value, Items) and value.kind == "list" else (value,)
        return [_expr(item) for item in items]
    if parser.token.value == "{":
        return [_expr(parser.argument())]
    return [_bare_argument(parser)]


def _bare_argument(parser: _Parser) -> Expr:
    """`\\sin 2x`: numbers, letters and simple commands up to the next operator, bracket or function."""
    value = _expr(parser.factor())
    while parser.token.kind == "letter" or (parser.token.kind == "command" and (
            parser.token.value in (r"\pi", r"\frac", r"\sqrt") or parser.token.value[1:] in SYMBOL_COMMANDS)):
        value = multiply(value, _expr(parser.factor()))
    if parser.token.value == "/" and parser.tokens[parser.at + 1].kind == "number":
        parser.next()  # \sin \pi/6
        value = divide(value, _expr(parser.factor()))
    return value


_LITERAL = re.compile(
    r"(?:[-+] )?((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
    r"(?: (?:\\times|\\cdot|\*) 10 (?:\^|\*\*) (?:\{ )?([-+]? ?\d+)(?: \})?)?"
)


def as_literal(value: Leaf, written: list[Token]) -> Leaf:
    """The same value, marked as a decimal when it was written as one (`-2.50`, `1.5 \\times 10^{-9}`)."""
    if len(written) > 10 or not value.expr.is_Rational:
        return value
    match = _LITERAL.fullmatch(" ".join(token.value for token in written))
    if match is None:
        return value
    literal = number(match.group(1))
    exponent = int(match.group(2).replace(" ", "")) if match.group(2) else 0
    if literal.ulp is None and not exponent:
        return value
    if abs(exponent) > 5000:
        return value
    ulp = (literal.ulp or Integer(1)) * Rational(10) ** exponent
    return Leaf(value.expr, ulp, literal.digits or len(match.group(1).strip("0")))


def signed(parser: _Parser, sign: str | None, expr: Expr) -> Expr:
    """The expression with the sign that was read before it. Each `\\pm` is free of the others, so that `\\pm 1 \\pm i`
    are four numbers; where there is a `\\mp`, all of them go together.
    """
    if sign not in (r"\pm", r"\mp"):
        return -expr if sign == "-" else expr
    if any(token.value == r"\mp" for token in parser.tokens):
        together = sympy.Symbol(PM)
        return together * expr if sign == r"\pm" else -together * expr
    parser.signs += 1
    return sympy.Symbol(f"{PM}_{parser.signs}") * expr


_SIGNS_LIMIT = 4


def both_signs(value: Value) -> Value:
    """`1 \\pm x` as the list of both, wherever it stands in a value."""
    match value:
        case Leaf(expr=expr) if signs := [symbol for symbol in expr.free_symbols if symbol.name.startswith(PM)]:
            if len(signs) > _SIGNS_LIMIT:
                raise MathSyntaxError("too many signs are left open")
            choices = itertools.product((Integer(1), Integer(-1)), repeat=len(signs))
            return Items("list", tuple(Leaf(expr.subs(dict(zip(signs, one, strict=True)))) for one in choices), ",")
        case Items(kind="list", items=items):
            return Items("list", tuple(part for item in items for part in _parts(both_signs(item))), value.brackets)
        case Items(items=items):
            opened = tuple(both_signs(item) for item in items)
            if value.kind == "set":
                opened = tuple(part for item in opened for part in _parts(item))
            return Items(value.kind, opened, value.brackets)
        case Chain(items=items):
            return Chain(tuple(both_signs(item) for item in items), value.relations)
    return value


def _parts(value: Value) -> tuple[Value, ...]:
    return value.items if isinstance(value, Items) and value.kind == "list" else (value,)
