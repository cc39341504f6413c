"""The last box, with what stands at it and beside it."""

import pytest

from cabochon.verifiers.math_boxes import last_box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{5}", "5"),
        ("\\fbox{5}", "5"),
        ("\\boxed {5}", "5"),
        ("\\boxed5", "5"),
        ("\\boxed\\pi", "\\pi"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{1} \\boxed{2}", "2"),
        ("$\\boxed{1}$ or $x=\\boxed{2}$", "1 \\text{ or } 2"),
        ("\\boxed{1}, \\boxed{2}, and \\boxed{3}", "1 \\text{ and } 2 \\text{ and } 3"),
        ("not \\boxed{1} or \\boxed{2}", "2"),
        ("$\\boxed{2}$ or $\\frac{4}{2}$", "2 \\text{ or } \\frac{4}{2}"),
        ("\\boxed{2} is too small, \\boxed{3} cannot be right", None),
        ("\\boxed{\\boxed{3}}", "\\boxed{3}"),
        ("8 or \\boxed{9}", "8 \\text{ or } 9"),
        ("$8$ or $\\boxed{9}$", "8 \\text{ or } 9"),
        ("\\boxed{ 5 }", "5"),
        ("\\boxed{\\text{a}b}", "\\text{a}b"),
    ],
)
def test_boxes(text: str, box: str | None) -> None:
    assert last_box(text).answer == (box or "")


def test_no_box_and_an_open_one() -> None:
    assert last_box("no box, only \\boxedness{5}") is None
    assert last_box("\\boxed{1} \\boxed{2").problem == "the last box is never closed"


@pytest.mark.parametrize(
    "text",
    ["(\\boxed{5})!", "x > \\boxed{5}", "twice \\boxed{5}", "\\boxed{5} times 2", "\\sqrt[3]{\\boxed{5}"],
)
def test_a_part_of_an_expression_is_no_answer(text: str) -> None:
    found = last_box(text)
    assert found is not None
    assert found.answer != "5"
