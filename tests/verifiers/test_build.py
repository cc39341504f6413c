"""Verifiers by name, and what probing one finds."""

import pytest

from cabochon.errors import UserError
from cabochon.types import Task
from cabochon.verifiers.build import verifier_named
from cabochon.verifiers.probe import probe, sample_tasks


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
