"""Verifiers by name: each proves itself, and none raises whatever a model writes."""

import pytest

from cabochon.errors import UserError
from cabochon.protocols import Verifier
from cabochon.types import Task
from cabochon.verifiers.build import gold_text, probes_for, verifier_for, verifier_named
from cabochon.verifiers.pool import VerifierPool
from cabochon.verifiers.probe import probe, sample_tasks

NAMES = ("math", "instructions", "thinking", "reasoning")
TEXTS = (
    "",
    " ",
    "\x00",
    "\ud800",
    "(" * 10_000,
    "a" * 2_000_000,
    "\\boxed{" * 1000,
    "<think>" * 1000,
    "</think>" * 1000,
)


@pytest.mark.parametrize("name", NAMES)
def test_the_door(name: str) -> None:
    if name == "reasoning":
        pytest.importorskip("reasoning_gym")
    tasks = sample_tasks(name)
    verifier = verifier_named(name)
    assert isinstance(verifier, Verifier)
    with VerifierPool(verifier=verifier_for(tasks), probes=probes_for(tasks), concurrency=2) as pool:
        for verdict in pool.verify([tasks[0]] * len(TEXTS), TEXTS):
            assert verdict.score == 0.0
            assert verdict.status in ("wrong", "no_answer", "malformed", "timeout")
        assert pool.verify_one(tasks[0], gold_text(tasks[0]) or "").score == 1.0


def test_probing_finds_nothing_wrong_with_the_math_verifier() -> None:
    findings = probe(verifier_named("math"), sample_tasks("math"), repeats=2)
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


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"'maths'.*nearest is 'math'"):
        verifier_named("maths")
