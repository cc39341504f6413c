"""Answers put back in."""

import time

import pytest

from cabochon.types import Task
from cabochon.verifiers.math_solver import SolverVerifier

VERIFIER = SolverVerifier()


def verdict(kind: str, given: str, answer: str, **payload: object):
    task = Task(id="s/0", prompt="", verifier="solver", payload={"kind": kind, "given": given, **payload})
    return VERIFIER.verify(task, f"so \\boxed{{{answer}}}")


@pytest.mark.parametrize(
    ("kind", "given", "answer", "payload", "score"),
    [
        ("root", "x^2-5x+6=0", "2", {}, 1),
        ("root", "x^2-5x+6=0", "x=2, x=3", {"count": 2}, 1),
        ("root", "x^2-5x+6=0", "2", {"count": 2}, 0),
        ("root", "x^2-5x+6=0", "2, 2", {"count": 2}, 0),
        ("root", "x^2-5x+6=0", "2, 4", {}, 0),
        ("root", "x^2-5x+6=0", "y=2", {}, 0),
        ("root", "x^2=2", "\\pm\\sqrt{2}", {"count": 2}, 1),
        ("root", "x^2=2", "1.41421356", {}, 0),
        ("root", "x^2=2", "x", {}, 0),
        ("root", "x^2=2", "\\sqrt{x}", {}, 0),
        ("root", "x^2+1", "i", {}, 1),
        ("root", "e^x=2", "\\ln 2", {}, 1),
        ("root", "t^2=4", "-2", {"variable": "t"}, 1),
        ("root", "\\frac{1}{x}=0", "\\infty", {}, 0),
        ("derivative", "x^2 \\sin x", "2x\\sin x+x^2\\cos x", {}, 1),
        ("derivative", "x^2", "f'(x)=2x", {}, 1),
        ("derivative", "x^2", "x^2", {}, 0),
        ("derivative", "x^2", "2x+1", {}, 0),
        ("derivative", "e^{2x}", "e^{2x}", {}, 0),
        ("integral", "\\frac1x", "\\ln|x|+C", {}, 1),
        ("integral", "\\frac1x", "\\ln x + x", {}, 0),
        ("integral", "2x", "x^2", {}, 1),
        ("integral", "\\sin x\\cos x", "-\\frac{1}{4}\\cos 2x + C", {}, 1),
        ("integral", "\\sin x\\cos x", "\\frac12\\sin^2 x", {}, 1),
        ("integral", "2x", "x^2+Cx", {}, 0),
        ("integral", "2x", "\\int 2x dx", {}, 0),
        ("integral", "2x", "2", {}, 0),
    ],
)
def test_by_substitution(kind: str, given: str, answer: str, payload: dict, score: float) -> None:
    assert verdict(kind, given, answer, **payload).score == score


@pytest.mark.parametrize("answer", ["9^{9^{9^9}}", "x^{9^{9^9}}", "(" * 1000, "\x00", "((9!)!)!", "", "\\infty"])
def test_hostile_answers(answer: str) -> None:
    for kind, given in (("root", "x^2=2"), ("derivative", "x^2"), ("integral", "2x")):
        start = time.monotonic()
        assert verdict(kind, given, answer).score == 0.0
        assert time.monotonic() - start < VERIFIER.deadline + 1


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({"kind": "limit", "given": "x"}, "kind"),
        ({"kind": "root"}, "given"),
        ({"kind": "root", "given": "y=2"}, "contain x"),
        ({"kind": "root", "given": "x^"}, "cannot read"),
        ({"kind": "derivative", "given": "(1,2)"}, "formula"),
        ({"kind": "root", "given": "x=1", "variable": "2"}, "letter"),
    ],
)
def test_unusable_tasks(payload: dict, says: str) -> None:
    with pytest.raises(ValueError, match="s/0") as raised:
        VERIFIER.verify(Task(id="s/0", prompt="", verifier="solver", payload=payload), "\\boxed{1}")
    assert says in str(raised.value)
