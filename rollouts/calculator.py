"""Arithmetic for a policy: Python's grammar, a short list of what may stand in it, and a bound on every number.

Nothing here is `eval`: the syntax tree is walked and anything not listed is refused. Integers stay exact up to
`MAX_BITS`, checked before the operation, so `9**9**9` costs nothing.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

MAX_LENGTH = 1000
"""characters of an expression"""
MAX_BITS = 4096
"""of an integer"""

Number = int | float


class CalculatorError(ValueError):
    """The expression has no value here; the message says why, for the policy to read."""


def evaluate(expression: str) -> str:
    """The value as text: integers exact, other numbers to 12 digits. `^` is a power, as on a calculator.

    Raises CalculatorError.
    """
    if len(expression) > MAX_LENGTH:
        raise CalculatorError(f"the expression has {len(expression)} characters; at most {MAX_LENGTH}")
    try:
        value = _value(ast.parse(expression.strip().replace("^", "**"), mode="eval").body)
        return str(value) if isinstance(value, int) else _text(value)
    except SyntaxError as error:
        raise CalculatorError(f"not an expression: {error.msg}") from None
    except (ZeroDivisionError, OverflowError) as error:
        raise CalculatorError(str(error)) from None
    except (RecursionError, MemoryError):
        raise CalculatorError("the expression is nested too deeply") from None
    except CalculatorError:
        raise
    except (ValueError, TypeError) as error:  # of a function's arguments: sqrt(-1), round(1, 2.5), a null byte
        raise CalculatorError(str(error)) from None


def _text(value: float) -> str:
    if not math.isfinite(value):
        raise CalculatorError("the result is not a finite number")
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=bool()):
            raise CalculatorError("True and False are not numbers")
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return _bounded(FUNCTIONS[name](*(_value(arg) for arg in args)))
        case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name):
            raise CalculatorError(f"{name!r} is unknown; there are {', '.join([*FUNCTIONS, *CONSTANTS])}")
    raise CalculatorError(f"{type(node).__name__} is not arithmetic; use numbers, + - * / // % ** and functions")


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise CalculatorError(f"a number of more than {MAX_BITS} bits")
    return value


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1
    if whole and (int(base).bit_length() - 1) * exponent >= MAX_BITS:  # at least as many bits, and less than twice
        raise CalculatorError(f"a number of more than {MAX_BITS} bits")
    value = base**exponent
    if isinstance(value, complex):
        raise CalculatorError("the result is not a real number")
    return value


def _divided(a: Number, b: Number) -> Number:
    """Exact where it comes out even."""
    return a // b if isinstance(a, int) and isinstance(b, int) and b and a % b == 0 else a / b


def _rounded(x: Number, digits: Number = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > 300:
        raise CalculatorError("round takes a whole number of digits, at most 300")
    return round(x, digits) if digits else round(x)


def _counted(function: Callable[..., int], at_most: int) -> Callable[..., int]:
    """A function of whole numbers whose value, or work, grows quickly."""

    def bounded(*args: Number) -> int:
        whole = [int(x) if float(x).is_integer() else x for x in args]
        if any(not isinstance(x, int) or not 0 <= x <= at_most for x in whole):
            raise CalculatorError(f"{function.__name__} takes whole numbers from 0 to {at_most}")
        return function(*whole)

    return bounded


OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divided,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
FUNCTIONS: dict[str, Callable[..., Number]] = {
    "abs": abs,
    "round": _rounded,
    "min": min,
    "max": max,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "floor": math.floor,
    "ceil": math.ceil,
    "gcd": math.gcd,
    "lcm": math.lcm,
    "factorial": _counted(math.factorial, 500),
    "comb": _counted(math.comb, 1000),
    "perm": _counted(math.perm, 300),
}
CONSTANTS: dict[str, Number] = {"pi": math.pi, "e": math.e}
