"""The last number of a text that names no answer: what is said counts, what is asked, supposed or denied does not."""

import json
import pathlib
import re

import gsm8k
import pytest

from cabochon.verifiers.math_judge import judge
from cabochon.verifiers.math_prose import last_expression

HERE = pathlib.Path(__file__).parent
RULES = {"methods": ["last_expression"], "think_close": "</think>", "require_final_part": False}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So Mary has 15 apples left.", "15"),
        ("It costs $1,200 in total.", "$1,200"),
        ("The train travels for 2 hours.", "2 hours"),
        ("The area is 20 square feet.", "20 square feet"),
        ("The volume is 30 cm^3.", "30 cubic cm"),
        ("He walks 3 miles per day.", "3"),
        ("Let's compute: 3 + 4 = 7", "7"),
        ("Thus x = 12. Check: 12 - 7 = 5.", "12"),
        ("Let's check our work: 3 + 4 = 7, so she has 7 apples.", "7"),
        ("Thus x = 12, since 12 mod 7 is 5.", "12"),
        ("It is 68 because 200 - 132 = 68", "68"),
        ("The price fell from $100 to $42.", "$42"),
        ("The number that were not ready is 84-63 = 21", "21"),
        ("If you add the two sides of it up, the perimeter of the triangle becomes 7+5=12", "12"),
        ("Is it 5?", None),
        ("Suppose x = 5", None),
        ("Mary does not have 15 apples.", None),
        ("So we get 5, which is not possible.", None),
        ("So x is 5. But that is impossible.", None),
        ("Now go to Step 5.", None),
        ("Tom is under 12.", None),
        ("They are about 2 to 3 times", None),
        ("She spent 20% of $30.", None),
        ("Next, divide both sides by 5", None),
        ("It could be 3; it could also be 5", None),
    ],
)
def test_what_a_sentence_says(text: str, answer: str | None) -> None:
    found = last_expression(text)
    assert (found.answer if found else None) == answer


def read_right(data: list[dict]) -> int:
    """Of how many of GSM8K's worked solutions, without their last line, the answer is read."""
    right = 0
    for row in data:
        solution, _, gold = row["answer"].rpartition("####")
        said = re.sub(r"<<[^>]*>>", "", solution).strip()
        right += judge(said, [gold.strip()], row["question"], [], RULES)["score"] == 1.0
    return right


def test_how_authors_end_a_solution_is_read() -> None:
    lines = (HERE / "data" / "gsm8k_slice.jsonl").read_text().splitlines()
    assert (read_right([json.loads(line) for line in lines]), len(lines)) == (19, 20)


@pytest.mark.slow
def test_how_authors_end_a_solution_is_read_in_all_of_gsm8k() -> None:
    assert read_right(gsm8k.test_split()) >= 1274  # the other 45 end in another number, or in words
