"""Rarer forms become the usual ones, and what only looks like them is left alone."""

import pytest

from cabochon.verifiers.math_forms import turned_brackets, usual


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1.333...", r"1.\overline{3}"),
        (r"0.1666\ldots", r"0.1\overline{6}"),
        ("0.363636...", r"0.\overline{36}"),
        ("(1101)_2", "1101_2"),
        (r"\nicefrac{1}{2}", r"\frac{1}{2}"),
        ("75¢", "75 cents"),
    ],
)
def test_a_rarer_form_is_replaced(written: str, read: str) -> None:
    assert usual(written) == read


@pytest.mark.parametrize("text", ["1.33...", "0.123123...", "5.000...", "0.999...", "3.14159...", "(a)_2", "x_2"])
def test_what_only_looks_like_one_is_left_alone(text: str) -> None:
    assert usual(text) == text


def test_intervals_with_turned_brackets() -> None:
    assert turned_brackets(r"]1,2]\cup[3;4[") == r"(1,2] \cup [3,4)"
    assert turned_brackets("[1,2]") == "[1,2]"
    assert turned_brackets("[1,2[ x") == "[1,2[ x"
