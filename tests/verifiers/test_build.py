"""Verifiers by name, and what probing one finds."""

import time

import pytest

from cabochon.errors import UserError
from cabochon.types import Task, Verdict
from cabochon.verifiers import probe as probing
from cabochon.verifiers.build import verifier_named
from cabochon.verifiers.probe import probe, sample_tasks


def test_probing_finds_nothing_wrong_with_the_math_verifier() -> None:
    findings = list(probe(verifier_named("math"), sample_tasks("math"), repeats=2))
    assert {finding.probe for finding in findings} >= {
        "gold",
        "blank",
        "wrong",
        "oversized",
        "tower",
        "10,000 brackets",
    }
    assert [finding for finding in findings if finding.suspicious] == []


def test_a_verifier_that_raises_for_a_completion_is_found_out() -> None:
    class Raises:
        def verify(self, task: Task, text: str):
            raise KeyError(text[:3])

    assert all(finding.suspicious.startswith("raised KeyError") for finding in probe(Raises(), sample_tasks("math")))


def test_a_verifier_that_is_always_slow_is_found_out_and_one_that_has_to_start_is_not(monkeypatch) -> None:
    class Slow:
        def __init__(self, calls: int) -> None:
            self.calls = calls

        def verify(self, task: Task, text: str) -> Verdict:
            self.calls -= 1
            if self.calls >= 0:
                time.sleep(0.3)
            right = "4" in text
            return Verdict(score=float(right), status="ok" if right else "wrong")

    monkeypatch.setattr(probing, "SLOW_SECONDS", 0.2)
    task = Task(id="t", prompt="2 + 2?", verifier="math", payload={"answer": "4"})

    def found(calls: int) -> str:
        return next(x.suspicious for x in probe(Slow(calls), [task]) if x.probe == "gold")

    assert found(1) == "", "the worker started"
    assert found(3) == "slow: 0.3 s"


def test_after_two_hangs_the_other_probes_are_left_out(monkeypatch) -> None:
    class Hangs:
        calls = 0

        def verify(self, task: Task, text: str) -> Verdict:
            self.calls += 1
            if text.startswith("<think>"):
                return Verdict(score=0.0, status="wrong")
            time.sleep(0.1)
            return Verdict(score=0.0, status="timeout", detail="no verdict within 0.1 s")

    monkeypatch.setattr(probing, "HANG_SECONDS", 0.1)
    task = Task(id="t", prompt="2 + 2?", verifier="my:reward", payload={"answer": "4"})
    verifier = Hangs()
    findings = list(probe(verifier, [task, task]))
    assert [f.probe for f in findings] == ["gold", "blank"]
    assert all(f.suspicious.startswith("hangs: no verdict within 0.1 s") for f in findings)
    assert verifier.calls == 3, "one to find the form of right answers, one for each finding"


def test_a_file_without_its_function_is_told_what_to_add() -> None:
    with pytest.raises(UserError, match=r"'mine\.py' is a file: add the reward function in it, mine\.py:function"):
        verifier_named("mine.py")


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"'maths'.*nearest is 'math'"):
        verifier_named("maths")
