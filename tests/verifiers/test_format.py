"""Thinking tags."""

import pytest

from cabochon.types import Task
from cabochon.verifiers.format import ThinkingFormat

TASK = Task(id="f", prompt="", verifier="thinking")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think>b", 1),
        (" <think>a\n</think>\n\nb", 1),
        ("", 0),
        ("b", 0),
        ("<think>a</think>", 0),
        ("<think> </think>b", 0),
        ("<think>a</think>b</think>", 0),
        ("<think><think>a</think>b", 0),
        ("x<think>a</think>b", 0),
        ("</think>a<think>b", 0),
        ("<think>a", 0),
        ("<THINK>a</THINK>b", 0),
        ("<think>\u200b</think>b", 0),
        ("<think>a</think>\u2060\u2800", 0),
    ],
)
def test_one_thought_then_an_answer(text: str, score: float) -> None:
    assert ThinkingFormat().verify(TASK, text).score == score


def test_opened_by_the_prompt() -> None:
    form = ThinkingFormat(opened_by_prompt=True)
    assert form.verify(TASK, "a</think>b").score == 1
    assert form.verify(TASK, "<think>a</think>b").score == 1
    assert form.verify(TASK, "a b").score == 0


def test_answer_tag() -> None:
    form = ThinkingFormat(answer_tag="answer")
    assert form.verify(TASK, "<think>a</think>\n<answer>5</answer>\n").score == 1
    assert form.verify(TASK, "<think>a</think><answer>5</answer> trailing").score == 0
    assert form.verify(TASK, "<think>a</think><answer>5</answer><answer>6</answer>").score == 0
    assert form.verify(TASK, "<think>a</think><answer> </answer>").score == 0
    found = form.verify(TASK, "<think>a</think>5")
    assert found.detail == "the answer is not one <answer>...</answer>"


def test_tags_are_words() -> None:
    with pytest.raises(ValueError, match="plain word"):
        ThinkingFormat(tag="a b")
