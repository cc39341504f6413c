"""The parser: values by hand, arithmetic that cannot explode, and what is refused."""

import pytest
import sympy

from cabochon.verifiers.math_lex import MathSyntaxError, clean, tokenise
from cabochon.verifiers.math_parse import parse
from cabochon.verifiers.math_values import Based, Chain, Grid, Items, Leaf, NamedSet, Words, is_opaque, number

x, y = sympy.symbols("x y")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14),
        ("2^3^2", 512),
        ("-2^2", -4),
        ("2*-3", -6),
        ("6/2/3", 1),
        ("\\frac12", sympy.Rational(1, 2)),
        ("\\frac1{23}", sympy.Rational(1, 23)),
        ("1\\frac{1}{2}", sympy.Rational(3, 2)),
        ("x\\frac{1}{2}", x / 2),
        ("2x y", 2 * x * y),
        ("2(x+1)", 2 * x + 2),
        ("\\sqrt2", sympy.sqrt(2)),
        ("\\sqrt[3]{-8}", -2),
        ("sqrt(x)/2", sympy.sqrt(x) / 2),
        ("\\sin^2 x", sympy.sin(x) ** 2),
        ("\\sin 2x", sympy.sin(2 * x)),
        ("\\sin(x)y", sympy.sin(x) * y),
        ("\\log_2 8", 3),
        ("\\ln e", 1),
        ("|x-1|", sympy.Abs(x - 1)),
        ("||x|-1|", sympy.Abs(sympy.Abs(x) - 1)),
        ("e^{i\\pi}", -1),
        ("3!", 6),
        ("\\binom{5}{2}", 10),
        ("50\\%", sympy.Rational(1, 2)),
        ("0.1\\overline{6}", sympy.Rational(1, 6)),
        ("1.5e3", 1500),
        ("x_{1}", sympy.Symbol("x_1")),
        ("\\frac{dy}{dx}", sympy.Symbol("y'")),
        ("2^{-1}", sympy.Rational(1, 2)),
        ("\\pi r^2", sympy.pi * sympy.Symbol("r") ** 2),
        ("1,234", None),
        ("\\cos 60^\\circ", sympy.Rational(1, 2)),
    ],
)
def test_numbers_and_formulas(text: str, value: object) -> None:
    found = parse(text)
    if value is None:
        assert found == Items("list", (Leaf(sympy.Integer(1)), Leaf(sympy.Integer(234))), ",")
    else:
        assert sympy.expand(found.expr - value) == 0


def test_kinds() -> None:
    assert isinstance(parse("x=1"), Chain)
    assert parse("1<x\\le 2").relations == ("<", "<=")
    assert parse("(1,2]").brackets == "(]"
    assert parse("\\{1,2\\}").kind == "set"
    assert parse("1 \\text{ or } 2") == Items("list", (Leaf(sympy.Integer(1)), Leaf(sympy.Integer(2))), "or")
    assert parse("\\mathbb{R}") == NamedSet("R")
    assert parse("\\{\\}") == NamedSet("empty")
    assert isinstance(parse("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"), Grid)
    assert parse("\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}").expr == -2
    assert parse("no solution") == Words("no solution")
    assert parse("101_2") == Based("101", 2)
    assert parse("FF_{16}").value == 255
    assert parse("3:4").brackets == "::"
    assert [leaf.expr for leaf in parse("2\\pm 1").items] == [3, 1]


def test_decimals_remember_their_last_place() -> None:
    assert (number("3.140").ulp, number("3.140").digits) == (sympy.Rational(1, 1000), 3)
    assert number("10.0").digits == 1
    assert number("72").ulp is None
    assert parse("-2.5").ulp == sympy.Rational(1, 10)
    assert parse("1.5 \\times 10^{-9}").ulp == sympy.Rational(1, 10**10)
    assert parse("2.5+0").ulp is None


@pytest.mark.parametrize(
    "text", ["9^{9^{9}}", "2^{10^{10}}", "(10^6)!", "((9!)!)!", "\\binom{10^9}{5}", "10^{-10^{9}}"]
)
def test_what_is_too_large_stays_unevaluated_and_equals_itself(text: str) -> None:
    found = parse(text)
    assert is_opaque(found.expr)
    assert found == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        ")",
        "(1",
        "1)",
        "{1",
        "\\frac{1}",
        "\\frac{1}{0}",
        "1/0",
        "\\sqrt",
        "2+",
        "^2",
        "x^",
        "1 2",
        "(1,2",
        "[1)",
        "\\int x dx",
        "\\sum_{k=1}^n k",
        "\\foo",
        "\\{1",
        "|1",
        "102_2",
        "5_1",
        "1;;2",
        "=",
        "x=",
        "\\begin{pmatrix}1",
        "\x00",
        "\ud800",
        "#",
        "(1,2)+3",
        "\\log 0",
        "0^{-1}",
        "(-3)!",
        "f(x).__class__",
        "x.y",
        "\\begin{foo}1\\end{foo}",
        "(" * 200 + "1" + ")" * 200,
        "\\sqrt{" * 100 + "2" + "}" * 100,
        "1" * 3600,
        "9" * 10 + "e" + "9" * 9,
    ],
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(MathSyntaxError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("$5$", "5"),
        ("\\(5\\)", "5"),
        ("**5**", "5"),
        ("\\boxed{5}", "5"),
        ("5.", "5"),
        ("5\\%", "5%"),
        ("1{,}234", "1,234"),
        ("\\left( 1 \\right)", "( 1 )"),
        ("\\dfrac12", "\\frac12"),
        ("5\\,\\text{cm}", "5 \\text{cm}"),
        ("−5", "-5"),
        ("1 \\\\ 2", "1 \\\\ 2"),
        ("$5$ and $6$", "$5$ and $6$"),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_too_long_an_answer_is_refused_before_it_is_read() -> None:
    with pytest.raises(MathSyntaxError, match="5000 characters"):
        clean("1" * 5000)


def test_letters_are_variables_words_or_functions() -> None:
    kinds = [
        [token.kind for token in tokenise(text)[:-1]] for text in ("xy", "Sam", "even", "sin", "no", "pi", "alpha")
    ]
    assert kinds == [["letter", "letter"], ["word"], ["word"], ["function"], ["word"], ["command"], ["command"]]
