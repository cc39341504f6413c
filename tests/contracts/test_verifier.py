"""The Verifier door: each verifier pays its own gold and nothing else, and never raises for what a model wrote."""

import pytest

from cabochon.protocols import Verifier
from cabochon.verifiers.build import gold_texts, probes_for, verifier_for, verifier_named
from cabochon.verifiers.pool import VerifierPool
from cabochon.verifiers.probe import sample_tasks

NAMES = ("math", "instructions", "thinking", "verdict", "reasoning", pytest.param("code", marks=pytest.mark.bubblewrap))
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
            assert verdict.status in ("wrong", "no_answer", "malformed", "timeout", "crash")
        assert pool.verify_one(tasks[0], gold_texts(tasks[0])[0]).score == 1.0
