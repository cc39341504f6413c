"""Equality of formulas, decimals, units, regions: the functions under the corpus."""

from fractions import Fraction

import pytest
import sympy
from sympy import Rational

from cabochon.verifiers.math_equal import equal, same_words, unlabel
from cabochon.verifiers.math_judge import chosen
from cabochon.verifiers.math_numbers import proportional, same_formula, same_leaf
from cabochon.verifiers.math_parse import parse
from cabochon.verifiers.math_sets import region, same_region
from cabochon.verifiers.math_units import Split, conversion, parse_unit, split_unit
from cabochon.verifiers.math_values import Leaf

x, y = sympy.symbols("x y")


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        (x**2 + 2 * x + 1, (x + 1) ** 2, True),
        (sympy.sqrt(x**2), x, False),
        (sympy.sqrt(x**2), sympy.Abs(x), True),
        (x + Rational(1, 10**40), x, False),
        (sympy.sqrt(2) * sympy.sqrt(3), sympy.sqrt(6), True),
        (x, y, False),
        (sympy.exp(sympy.pi * sympy.sqrt(163)), sympy.Integer(262537412640768744), False),
        (sympy.oo, sympy.oo, True),
        (sympy.oo, -sympy.oo, False),
        (sympy.sin(x) ** 2 + sympy.cos(x) ** 2, sympy.Integer(1), True),
        (sympy.log(x**2), 2 * sympy.log(x), False),
        (x / x, sympy.Integer(1), True),
        (sympy.sqrt(2), Rational(14142135623730951, 10**16), False),
    ],
)
def test_same_formula(one: sympy.Expr, two: sympy.Expr, same: bool) -> None:
    assert same_formula(one, two) is same
    assert same_formula(two, one) is same


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("3.14", "3.14159", True),
        ("3.14", "3.1", False),
        ("3.14", "3.146", False),
        ("0.33", "\\frac13", True),
        ("0.3", "\\frac13", False),
        ("0.5", "0.5001", False),
        ("0.3", "0.30000000000000004", True),
        ("0.7", "0.69999999", True),
        ("0.33", "\\frac{1}{3}", True),
        ("2.5", "\\frac{127}{50}", False),
        ("12.35", "\\frac{12349}{1000}", True),
        ("0.5", "0.504", False),
        ("100.0", "100.01", False),
        ("10.0", "10.04", False),
        ("\\frac13", "0.333", False),
        ("5", "5.0", True),
        ("1.0", "1", True),
        ("1.0", "2", False),
        ("0.0001", "0", False),
        ("0.0", "0.01", False),
        ("2.5", "\\infty", False),
        ("2.5", "x", False),
        ("2.5", "2.5i", False),
    ],
)
def test_decimals_are_tolerant_only_on_the_golds_side(gold: str, answer: str, same: bool) -> None:
    assert same_leaf(parse(gold), parse(answer)) is same


def test_proportional() -> None:
    assert proportional(2 * x + 4 * y, x + 2 * y) == 2
    assert proportional(2 * x + 4 * y, x + y) is None
    assert proportional(sympy.Integer(0) * x, x) is None


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("5 cm", Split("5", parse_unit("cm"))),
        ("\\$5", Split("5", parse_unit("dollar"))),
        ("5%", Split("5", None, True)),
        ("5 percent", Split("5", None, True)),
        ("5 thousand", Split("5", None, False, 1000)),
        ("5 squared", Split("5 squared")),
        ("5x", Split("5x")),
        ("5 or 6", Split("5 or 6")),
        ("x+5", Split("x+5")),
        ("5 m", Split("5", parse_unit("m"))),
        ("3 fifths", Split("3 fifths")),
        ("no", Split("no")),
        ("\\text{cm}", Split("\\text{cm}")),
    ],
)
def test_units_are_taken_off_numbers_only(text: str, split: Split) -> None:
    assert split_unit(text) == split


@pytest.mark.parametrize(
    ("gold", "answer", "factor"),
    [
        ("cm", "m", 100),
        ("m", "cm", Fraction(1, 100)),
        ("hour", "minutes", Fraction(1, 60)),
        ("km/h", "m/s", Fraction(18, 5)),
        ("cm^2", "square meters", 10_000),
        ("liter", "cubic cm", Fraction(1, 1000)),
        ("m", "kg", None),
        ("m", "m^2", None),
        ("apples", "apple", 1),
        ("apples", "pears", None),
        ("dollars", "cents", Fraction(1, 100)),
    ],
)
def test_conversion(gold: str, answer: str, factor: Fraction | None) -> None:
    assert conversion(parse_unit(gold), parse_unit(answer)) == factor
    assert conversion(None, parse_unit(answer)) == 1


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("(1,3)", "1<x<3", True),
        ("[1,3]", "1<x<3", False),
        ("x<1 or x>2", "(2,\\infty)\\cup(-\\infty,1)", True),
        ("-2x>4", "x<-2", True),
        ("-2x>4", "x>-2", False),
        ("x\\ne 0", "(-\\infty,0)\\cup(0,\\infty)", True),
        ("[0,1]\\cup[1,2]", "[0,2]", True),
        ("[0,1)\\cup(1,2]", "[0,2]", False),
        ("\\{1\\}\\cup(1,2)", "[1,2)", True),
        ("\\mathbb{R}\\setminus\\{1\\}", "x\\ne 1", True),
        ("x>1 and x<3", "(1,3)", True),
    ],
)
def test_regions(one: str, two: str, same: bool) -> None:
    left, right = region(parse(one)), region(parse(two))
    assert same_region(left[0], right[0]) is same
    assert same_region(right[0], left[0]) is same


@pytest.mark.parametrize("text", ["5", "x^2>1", "x>y", "(2,1)", "(1,2,3)", "x=1", "(x,y)", "x>1 and y>2"])
def test_what_is_no_region(text: str) -> None:
    assert region(parse(text)) is None


def test_labels() -> None:
    assert unlabel(parse("x=5")) == (x, Leaf(sympy.Integer(5)))
    assert unlabel(parse("5=x")) == (x, Leaf(sympy.Integer(5)))
    assert unlabel(parse("2+3=5")) == (None, Leaf(sympy.Integer(5)))
    assert unlabel(parse("x=x+1"))[0] is None
    assert not equal(parse("1=2"), parse("3=4"))
    assert not equal(parse("1=2"), parse("1=2"))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("b", None),
        ("\\textbf{(C)}", "C"),
        ("B) 42", "B"),
        ("B 42", None),
        ("A or B", None),
        ("(A) and (B)", None),
        ("Option D", "D"),
        ("AB", None),
        ("42", None),
        ("", None),
        ("K", None),
    ],
)
def test_choices(text: str, letter: str | None) -> None:
    assert chosen(text) == letter


def test_words() -> None:
    assert same_words("The Monday", "monday.")
    assert not same_words("3.5 or so", "35 or so")
    assert not same_words("odd", "even")
    assert not same_words("", "x")
