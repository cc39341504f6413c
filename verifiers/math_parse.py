"""A recursive-descent parser from tokens to values. Model text meets this parser only, never `eval` or `parse_expr`.

It reads what final answers look like (LaTeX or plain text) and refuses the rest with MathSyntaxError; there is no
"best effort", since a half-read wrong answer may equal the right one.
"""

from __future__ import annotations

import re

import sympy
from sympy import Expr, Rational

from cabochon.verifiers import math_functions as functions
from cabochon.verifiers.math_lex import MathSyntaxError, Token, clean, tokenise
from cabochon.verifiers.math_values import (
    DEGREE,
    Based,
    Chain,
    Grid,
    Items,
    Leaf,
    NamedSet,
    Relation,
    SetOperation,
    Value,
    Words,
    binomial,
    divide,
    factorial,
    number,
    power,
)

DEPTH_LIMIT = 60

_RELATIONS: dict[str, Relation] = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", r"\ne": "!=", r"\neq": "!=",
    r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=", r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=", r"\lt": "<",
    r"\gt": ">", r"\in": "in", r"\approx": "~", r"\equiv": "=",
}
_SET_OPERATIONS = {r"\cup": "union", r"\bigcup": "union", r"\cap": "intersection", r"\setminus": "minus",
                   r"\backslash": "minus"}
_NAMED_SETS = {r"\R": "R", r"\Z": "Z", r"\N": "N", r"\Q": "Q", r"\C": "C", r"\emptyset": "empty",
               r"\varnothing": "empty", r"\reals": "R"}
_CLOSERS = {"(": (")", "]"), "[": ("]", ")"), r"\{": (r"\}",), r"\langle": (r"\rangle",)}
_JOINTS = {",": ",", ";": ",", "and": "and", "or": "or", r"\lor": "or", r"\vee": "or", r"\land": "and",
           r"\wedge": "and"}


def parse(text: str) -> Value:
    """The value of an answer. Raises MathSyntaxError."""
    parser = _Parser(tokenise(clean(text)))
    try:
        return parser.everything()
    except RecursionError as error:
        raise MathSyntaxError("nested too deeply") from error
    except (TypeError, AttributeError, OverflowError, ZeroDivisionError, NotImplementedError) as error:
        raise MathSyntaxError(f"cannot be worked out: {type(error).__name__}") from error


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0
        self.signs = 0

    # -------------------------------------------------------------------------------------------- token helpers

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def next(self) -> Token:
        token = self.tokens[self.at]
        if token.kind != "end":
            self.at += 1
        return token

    def accept(self, *values: str) -> str | None:
        if self.token.kind in ("op", "command") and self.token.value in values:
            return self.next().value
        return None

    def expect(self, *values: str) -> None:
        if self.accept(*values) is None:
            raise MathSyntaxError(f"expected {values[0]!r} before {self.token.value[:20]!r}")

    # -------------------------------------------------------------------------------------------- lists, relations

    def everything(self) -> Value:
        if all(token.kind in ("word", "text", "letter", "end") for token in self.tokens) and any(
            token.kind in ("word", "text") for token in self.tokens
        ):
            return Words(" ".join(token.value for token in self.tokens[:-1]).casefold())
        value = self.listing()
        if self.token.kind != "end":
            raise MathSyntaxError(f"cannot read from {self.token.value[:20]!r} on")
        return functions.both_signs(value)

    def listing(self) -> Value:
        """Values separated by commas, semicolons, "and", "or"."""
        items, joints = [self.relation()], set()
        while (joint := self.accept(*_JOINTS)) is not None:
            joints.add(_JOINTS[joint])
            while (joint := self.accept("and", "or")) is not None:
                joints.add(joint)
            items.append(self.relation())
        if len(items) == 1:
            return items[0]
        joints -= {","} if len(joints) == 2 else set()
        return Items("list", tuple(items), joints.pop() if len(joints) == 1 else "mixed")

    def relation(self) -> Value:
        items, relations = [self.set_expression()], []
        while self.token.kind in ("op", "command") and self.token.value in _RELATIONS:
            relations.append(_RELATIONS[self.next().value])
            items.append(self.set_expression())
        if not relations:
            return items[0]
        return Chain(tuple(items), tuple(relations))

    def set_expression(self) -> Value:
        left = self.operand()
        while (operator := self.accept(*_SET_OPERATIONS)) is not None:
            left = SetOperation(_SET_OPERATIONS[operator], left, self.operand())  # type: ignore[arg-type]
        return left

    def operand(self) -> Value:
        """One arithmetic value; notes whether it was written as a decimal or in a number base."""
        self.depth += 1
        if self.depth > DEPTH_LIMIT:
            raise MathSyntaxError("nested too deeply")
        start = self.at
        value = self.sum()
        if self.token.value == ":":
            parts = [Leaf(_expr(value))]
            while self.accept(":"):
                parts.append(Leaf(_expr(self.sum())))
            value = Items("tuple", tuple(parts), "::")
        self.depth -= 1
        if isinstance(value, Leaf):
            return functions.as_literal(value, self.tokens[start : self.at])
        return value

    # -------------------------------------------------------------------------------------------- arithmetic

    def sum(self) -> Value:
        sign = self.accept("+", "-", r"\pm", r"\mp")
        first = self.term()
        more = self.token.kind in ("op", "command") and self.token.value in ("+", "-", r"\pm", r"\mp")
        if not more and (sign is None or (sign == "+" and not isinstance(first, Leaf))):
            return first
        if sign == "-" and isinstance(first, Grid) and not more:
            return functions.product(Leaf(sympy.Integer(-1)), first)
        total = functions.signed(self, sign, _expr(first))
        while (sign := self.accept("+", "-", r"\pm", r"\mp")) is not None:
            total = total + functions.signed(self, sign, _expr(self.term()))
        return Leaf(total)

    def term(self) -> Value:
        mixed = self.mixed_number()
        value: Value = mixed if mixed is not None else self.factor()
        while True:
            if self.accept("*", r"\times", r"\cdot", r"\ast"):
                value = functions.product(value, self.signed_factor())
            elif self.accept("/", r"\div"):
                value = Leaf(divide(_expr(value), _expr(self.signed_factor())))
            elif self.starts_factor():
                value = functions.product(value, self.factor())
            else:
                return value

    def signed_factor(self) -> Value:
        sign = self.accept("+", "-")
        value = self.factor()
        return Leaf(-_expr(value)) if sign == "-" else value

    def starts_factor(self) -> bool:
        """Whether a further factor follows without an operator between."""
        token = self.token
        if token.kind in ("letter", "function"):
            return True
        if token.kind == "number":
            return self.at > 0 and self.tokens[self.at - 1].value in (")", "}", "]", "!", r"\pi")
        if token.kind == "op":
            return token.value in ("(", "{", "[") or (token.value == "|" and not self.bars)
        return token.kind == "command" and token.value[1:] in functions.FACTOR_COMMANDS

    def mixed_number(self) -> Leaf | None:
        """`1\\frac{2}{3}` and `1 2/3`: an integer followed directly by a proper fraction of integers."""
        if self.token.kind != "number" or not self.token.value.isdigit() or self.at + 1 >= len(self.tokens):
            return None
        whole, mark, after = int(self.token.value), self.at, self.tokens[self.at + 1]
        self.next()
        if after.value == r"\frac":
            fraction = self.factor()
            if isinstance(fraction, Leaf) and fraction.expr.is_Rational and 0 < fraction.expr < 1:
                return Leaf(whole + fraction.expr)
        elif after.kind == "number" and after.value.isdigit():
            top = int(self.next().value)
            if self.accept("/") and self.token.kind == "number" and self.token.value.isdigit():
                bottom = int(self.next().value)
                if 0 < top < bottom and not (self.token.kind == "op" and self.token.value in ("^", "!", "_", "/")):
                    return Leaf(whole + Rational(top, bottom))
            raise MathSyntaxError("two numbers side by side")
        self.at = mark
        return None

    def factor(self) -> Value:
        """A primary with its postfixes and its exponent."""
        self.depth += 1
        if self.depth > DEPTH_LIMIT:
            raise MathSyntaxError("nested too deeply")
        value = self.postfixes(self.primary())
        self.depth -= 1
        return value

    def postfixes(self, value: Value) -> Value:
        while True:
            if self.accept("^", "**"):
                if self.accept(r"\circ"):
                    value = Leaf(_expr(value) * DEGREE)
                elif self.token.value == "{" and self.tokens[self.at + 1].value == r"\circ":
                    self.at += 2
                    self.expect("}")
                    value = Leaf(_expr(value) * DEGREE)
                else:
                    value = Leaf(power(_expr(value), _expr(self.argument(exponent=True))))
            elif self.accept("!"):
                value = Leaf(factorial(_expr(value), twice=self.accept("!") is not None))
            elif self.accept("%"):
                value = Leaf(_expr(value) / 100)
            elif self.accept(r"\degree"):
                value = Leaf(_expr(value) * DEGREE)
            elif self.token.value == "_" and isinstance(value, Leaf) and self.was_number(value):
                value = self.based(self.tokens[self.at - 1].value)
            else:
                return value

    def was_number(self, value: Leaf) -> bool:
        """Whether `value` is the number just read, and no power or root that ends in it."""
        last = self.tokens[self.at - 1]
        return last.kind == "number" and value.expr == number(last.value).expr

    def based(self, digits: str) -> Based:
        self.expect("_")
        base = _expr(self.argument())
        if not (base.is_Integer and 2 <= base <= 36 and re.fullmatch(r"[0-9]+", digits)
                and all(int(digit) < base for digit in digits)):
            raise MathSyntaxError("not a number in that base")
        return Based(digits.lstrip("0") or "0", int(base))

    def argument(self, *, exponent: bool = False) -> Value:
        """What follows `^`, `_` or a command: a brace group, or one token (one *digit* after a command, as in LaTeX).
        """
        if self.accept("{"):
            value = self.sum()
            self.expect("}")
            return value
        if exponent:
            sign = self.accept("-", "+")
            value = self.primary()
            if self.accept("^", "**"):
                value = Leaf(power(_expr(value), _expr(self.argument(exponent=True))))
            return Leaf(-_expr(value)) if sign == "-" else value
        token = self.token
        if token.kind == "number" and len(token.value) > 1 and token.value.isdigit():
            self.tokens[self.at : self.at + 1] = [Token("number", digit) for digit in token.value]
        return self.primary()

    # -------------------------------------------------------------------------------------------- primaries

    def primary(self) -> Value:
        token = self.next()
        match token.kind:
            case "number":
                return Leaf(number(token.value).expr)
            case "letter":
                return functions.symbol(self, token.value)
            case "based":
                digits, _, base = token.value.replace("{", "").replace("}", "").partition("_")
                if any(int(digit, 36) >= int(base) for digit in digits):
                    raise MathSyntaxError("not a number in that base")
                return Based(digits.lstrip("0") or "0", int(base))
            case "word" | "text":
                return Words(token.value.casefold())
            case "function":
                return Leaf(functions.named(self, token.value))
            case "op" if token.value in _CLOSERS or token.value == "{":
                return self.group(token.value)
            case "op" if token.value == "|":
                self.bars += 1
                inside = _expr(self.sum())
                self.expect("|")
                self.bars -= 1
                return Leaf(sympy.Abs(inside))
            case "command":
                return self.command(token.value)
        raise MathSyntaxError(f"cannot read {token.value[:20]!r}" if token.value else "the answer ends too early")

    def group(self, opening: str) -> Value:
        bars, self.bars = self.bars, 0
        if opening == "{":
            value = self.listing()
            self.expect("}")
        elif opening == r"\{" and self.accept(r"\}"):
            value = NamedSet("empty")
        elif opening == r"\{" and self.set_builder():
            value = self.listing()
            self.expect(r"\}")
        else:
            value = self.listing()
            closing = self.next().value
            if closing not in _CLOSERS[opening]:
                raise MathSyntaxError(f"{opening!r} is closed by {closing[:20]!r}")
            items = value.items if isinstance(value, Items) and value.kind == "list" else (value,)
            if opening == r"\{":
                value = Items("set", items)
            elif len(items) > 1 or opening == r"\langle":
                value = Items("tuple", items, "()" if opening == r"\langle" else opening + closing)
                if len(items) > 2 and value.brackets in ("[)", "(]"):
                    raise MathSyntaxError("an interval with more than two ends")
            elif opening + closing not in ("()", "[]"):
                raise MathSyntaxError("an interval with one end")
        self.bars = bars
        return value

    def set_builder(self) -> bool:
        """Pass over `x |`, `x :` or `x \\in \\mathbb{R} :` at the start of a set; the condition on x follows."""
        ahead = [token.value for token in self.tokens[self.at : self.at + 4]]
        if self.token.kind != "letter" or len(ahead) < 4:
            return False
        marks = (":", "|")
        length = 1 if ahead[1] in marks else 3 if ahead[1:3] == [r"\in", r"\R"] and ahead[3] in marks else 0
        self.at += length + 1 if length else 0
        return bool(length)

    def command(self, name: str) -> Value:
        if name == r"\frac":
            top, bottom = _expr(self.argument()), _expr(self.argument())
            return Leaf(divide(top, bottom))
        if name in (r"\binom", r"\dbinom", r"\tbinom"):
            return Leaf(binomial(_expr(self.argument()), _expr(self.argument())))
        if name == r"\sqrt":
            return Leaf(functions.root(self))
        if name in (r"\lfloor", r"\lceil"):
            inside = _expr(self.sum())
            self.expect(r"\rfloor" if name == r"\lfloor" else r"\rceil")
            return Leaf(sympy.floor(inside) if name == r"\lfloor" else sympy.ceiling(inside))
        if name in _NAMED_SETS:
            return NamedSet(_NAMED_SETS[name])
        if name == r"\langle":
            return self.group(name)
        if name.startswith(r"\begin:"):
            return self.environment(name.partition(":")[2])
        if name in (r"\vec", r"\hat", r"\mathbf", r"\boldsymbol") and self.token.kind in ("op", "letter"):
            return self.argument()
        return functions.command_value(self, name)

    def environment(self, name: str) -> Value:
        if name not in ("pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix", "array",
                        "cases"):
            raise MathSyntaxError(f"cannot read the environment {name!r}")
        rows: list[tuple[Value, ...]] = []
        row = [self.relation()]
        while not self.accept(rf"\end:{name}"):
            if self.accept("&"):
                row.append(self.relation())
            elif self.token.value == "\\\\":
                self.next()
                rows.append(tuple(row))
                if self.accept(rf"\end:{name}"):
                    row = []
                    break
                row = [self.relation()]
            else:
                raise MathSyntaxError(f"cannot read {self.token.value[:20]!r} in a matrix")
        if row:
            rows.append(tuple(row))
        if len({len(cells) for cells in rows}) != 1:
            raise MathSyntaxError("a matrix with rows of different lengths")
        if name == "vmatrix":
            if len(rows) != len(rows[0]) or len(rows) > 6:
                raise MathSyntaxError("a determinant that is not square, or too large")
            return Leaf(sympy.Matrix([[_expr(cell) for cell in cells] for cells in rows]).det())
        if name == "cases" and all(len(cells) == 1 for cells in rows):
            return Items("list", tuple(cells[0] for cells in rows), ",")
        return Grid(tuple(rows))


def _expr(value: Value) -> Expr:
    if isinstance(value, Leaf):
        return value.expr
    raise MathSyntaxError("arithmetic with something that is not a number or a formula")
