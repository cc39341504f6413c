"""A judge's verdict against the label."""

import pytest

from cabochon.reward.answers import parse
from cabochon.types import Task
from cabochon.verifiers.build import verifier_named

CHOICES = ["No", "Yes"]


def judged(text, label="Yes", choices=CHOICES):
    task = Task(id="t", prompt="?", verifier="verdict", payload={"label": label, "choices": choices})
    return verifier_named("verdict").verify(task, text)


@pytest.mark.parametrize(
    ("text", "score", "status"),
    [
        ("Verdict: Yes", 1.0, "ok"),
        ("2+2 is 4.\n**verdict: yes**\n", 1.0, "ok"),
        ("Verdict: No", 0.0, "wrong"),
        ("Verdict: Yes\nVerdict: No", 0.0, "wrong"),
        ("Verdict: Yes or No", 0.0, "no_answer"),
        ("Verdict: Yes\nbecause it is so", 0.0, "no_answer"),
        ("yes", 0.0, "no_answer"),
        ("Verdict: ≠Yes", 0.0, "no_answer"),
        ("Verdict: !Yes", 0.0, "no_answer"),
        ("I say Verdict: Yes", 0.0, "no_answer"),
        ("", 0.0, "no_answer"),
        ("<think>Verdict: Yes", 0.0, "no_answer"),
        ("<think>Verdict: Yes</think>", 0.0, "no_answer"),
        ("<think>hm</think>Verdict: Yes", 1.0, "ok"),
    ],
)
def test_only_the_last_line_counts(text, score, status):
    verdict = judged(text)
    assert (verdict.score, verdict.status) == (score, status)


def test_a_task_without_a_usable_label_is_refused():
    with pytest.raises(ValueError, match=r"task t: payload\.label must be one of payload\.choices"):
        judged("Verdict: Yes", label="Maybe")
    with pytest.raises(ValueError, match="must be one of"):
        judged("Verdict: Yes", choices=[])


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        *((text, CHOICES) for text in ("Verdict: Yes", "verdict:no", "a\n*Verdict: No.*", "Verdict: maybe", "No", "",
                                       "x: Verdict: No")),
        *((f"Verdict: {sign}No", CHOICES) for sign in "≠¬!~*_"),
        *((f"*Verdict: {grade}*", ["-1", "0", "1"]) for grade in ("-1", "0", "1")),
        *((f"Verdict: {grade}.", ["B", "A", "A+"]) for grade in ("B", "A", "A+")),
    ],
)  # fmt: skip
def test_judges_and_their_verifier_read_alike(text, choices):
    index = parse(text, choices)
    said = judged(text, label=choices[0], choices=choices).evidence.get("verdict")
    assert said == (None if index is None else choices[index])
