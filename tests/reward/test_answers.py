"""Closed answer sets: the oracles of algorithms.md section 4, and what is no verdict."""

import math

import numpy as np
import pytest

from cabochon.reward.answers import expected, parse, spelled, swap_logit, swap_mean, weighted, worth
from cabochon.types import Task
from cabochon.verifiers.verdict import VerdictVerifier


def softmax(*z):
    e = np.exp(z)
    return (e / e.sum()).tolist()


def test_oracles():
    yes, no, _ = softmax(2, 1, 0)
    assert expected([no, yes], normalise=False) == pytest.approx(0.665241, abs=1e-6)
    assert expected([no, yes]) == pytest.approx(0.731059, abs=1e-6)
    digits = [0.05, 0.10, 0.20, 0.40, 0.25]
    assert expected(digits) == pytest.approx(0.675)
    assert 1 + 4 * expected(digits) == pytest.approx(3.7)
    assert expected([0.8 * p for p in digits]) == pytest.approx(0.675)
    assert swap_mean(0.7, 0.4) == pytest.approx(0.65)
    assert swap_logit(0.7, 0.4) == pytest.approx(0.651669, abs=1e-6)
    assert weighted([1, 0, 1], [3, 2, 1]) == pytest.approx(2 / 3)


def test_choices_are_worth_their_rank():
    assert worth(2) == [0, 1]
    assert worth(3) == [0, 0.5, 1]


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [math.inf, 1], [math.nan, 1]])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="a rubric needs weights"):
        weighted([1, 0], weights)


@pytest.mark.parametrize("text", [".5", "<5", "≤ 5 or so", "-5", "~5", "4.5", "5/5", "1,5"])
def test_another_number_is_no_verdict(text):
    assert parse(f"Verdict: {text}", ("1", "2", "3", "4", "5")) is None
    task = Task(id="t", prompt="", verifier="verdict", payload={"label": "5", "choices": list("12345")})
    assert VerdictVerifier().verify(task, f"Verdict: {text}").status == "no_answer"


@pytest.mark.parametrize("text", ["5", "**5**", "'5'", "5.", "- 5", "(5)"])
def test_a_number_may_be_dressed_up(text):
    assert parse(f"Verdict: {text}", ("1", "2", "3", "4", "5")) == 4


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Verdict: Yes", 1),
        ("so it is.\n\n**Verdict: no**\n", 0),
        ("VERDICT: YES.", 1),
        ("Verdict: Yes\nI hope this helps", None),
        ("Verdict: good", None),
        ("Yes", None),
        ("8 out of 10, so Verdict: Yes", None),
        ("Verdict: Yes, but", None),
        ("", None),
        ("\n", None),
    ],
)
def test_only_a_last_line_in_form_is_a_verdict(text, choice):
    assert parse(text, ("No", "Yes")) == choice


@pytest.mark.parametrize(
    ("text", "choices", "choice"),
    [
        ("Verdict: -1", ("-1", "0", "1"), 0),
        ("**Verdict: -1**", ("-1", "0", "1"), 0),
        ("Verdict: 1.", ("-1", "0", "1"), 2),
        ("Verdict: A+", ("B", "A", "A+"), 2),
        ("**Verdict: a+.**", ("B", "A", "A+"), 2),
        ("Verdict: A", ("B", "A", "A+"), 1),
        ("Verdict: +", ("-", "+"), 1),
    ],
)
def test_marks_that_belong_to_a_choice_are_no_decoration(text, choices, choice):
    assert parse(text, choices) == choice


def test_probability_of_every_spelling_counts_once():
    top = {" Yes": math.log(0.4), "Yes": math.log(0.1), "yes": math.log(0.05), " No": math.log(0.2), "Maybe": -1.0}
    assert spelled(top, ("No", "Yes")) == pytest.approx([0.2, 0.55])
    assert spelled({"N": math.log(0.5), " Y": math.log(0.25), " ": 0.0}, ("No", "Yes")) == pytest.approx([0.5, 0.25])
    assert spelled({"s": 0.0}, ("same", "some")) == [0, 0]  # begins both: says nothing
