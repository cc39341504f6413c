"""Rarer forms become the usual ones, and what only looks like them is left alone."""

import pytest

from cabochon.verifiers.math_forms import spelled, time_of_day, turned_brackets, usual


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1.333...", r"1.\overline{3}"),
        (r"0.1666\ldots", r"0.1\overline{6}"),
        ("0.363636...", r"0.\overline{36}"),
        ("(1101)_2", "1101_2"),
        (r"\nicefrac{1}{2}", r"\frac{1}{2}"),
        ("75¢", "75 cents"),
        (r"f(x)=x\text{ for all real }x", "f(x)=x"),
        (r"f(n)=n, \forall n\in\mathbb{Z}", "f(n)=n"),
    ],
)
def test_a_rarer_form_is_replaced(written: str, read: str) -> None:
    assert usual(written) == read


@pytest.mark.parametrize(
    "text",
    ["1.33...", "0.123123...", "5.000...", "0.999...", "3.14159...", "(a)_2", "x_2", "f(x)=x for all x>0"],
)
def test_what_only_looks_like_one_is_left_alone(text: str) -> None:
    assert usual(text) == text


def test_intervals_with_turned_brackets() -> None:
    assert turned_brackets(r"]1,2]\cup[3;4[") == r"(1,2] \cup [3,4)"
    assert turned_brackets("[1,2]") == "[1,2]"
    assert turned_brackets("[1,2[ x") == "[1,2[ x"


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (r"\text{Twenty-one}", "21"),
        ("one hundred and five", "105"),
        ("two million three thousand forty", "2003040"),
        ("zero", "0"),
        *((left, left) for left in ("one two", "twenty eleven", "hundred", "and five", "third", "", "two or three")),
    ],
)
def test_a_number_in_words(words: str, number: str) -> None:
    assert spelled(words) == number


def test_times_of_day() -> None:
    assert time_of_day(r"2{:}30\text{ PM}") == time_of_day("2:30 p.m.") == time_of_day("14:30") == (14, 30)
    assert time_of_day("12 AM") == (0, 0)
    assert time_of_day("12:05 pm") == (12, 5)
    assert [time_of_day(text) for text in ("2:30", "13 pm", "2:75 pm", "5 m")] == [None] * 4
