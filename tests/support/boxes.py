"""Sandboxes for tests: each kind once, by name. On CI one that is missing is a failure, elsewhere a skip."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cabochon.errors import UserError
from cabochon.types import Task, Verdict
from cabochon.verifiers.code import CodeVerifier
from cabochon.verifiers.sandbox.base import Limits
from cabochon.verifiers.sandbox.testing import AnySandbox, sandbox

ISOLATED = [pytest.param("bubblewrap", marks=pytest.mark.bubblewrap), pytest.param("docker", marks=pytest.mark.docker)]


def opened(kind: str, limits: Limits | None = None, warm: int = 2) -> AnySandbox:
    """To be used in a `with`."""
    try:
        return sandbox(kind, limits, warm=warm)
    except UserError as e:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no {kind} here: {e}")


def verifiers(limits: Limits, warm: int = 2) -> tuple[object, object]:
    """The fixtures of a module: one on either sandbox in turn, and one on bubblewrap."""

    def on(kind: str) -> Iterator[CodeVerifier]:
        with opened(kind, limits, warm) as box:
            yield CodeVerifier(box, limits=limits)

    @pytest.fixture(scope="module", params=ISOLATED)
    def both(request: pytest.FixtureRequest) -> Iterator[CodeVerifier]:
        yield from on(request.param)

    @pytest.fixture(scope="module")
    def verifier() -> Iterator[CodeVerifier]:
        yield from on("bubblewrap")

    return both, verifier


def judged(verifier: CodeVerifier, source: str, tests: list[str] | str, **payload: object) -> Verdict:
    """On a program and its tests: statements, a file of test functions, or HumanEval's `check`."""
    tests = tests if "def test_" in tests or "def check(candidate" in tests or isinstance(tests, list) else [tests]
    task = Task(id="t", prompt="", verifier="code", payload={"tests": tests, **payload})
    return verifier.verify(task, f"```python\n{source}\n```")


def check(verifier: CodeVerifier, tests: str, right: str, wrong: str) -> None:
    """As in one process, the right program is paid and the wrong one is not."""
    verdict = judged(verifier, right, tests)
    assert verdict.status == "ok", verdict
    verdict = judged(verifier, wrong, tests)
    assert (verdict.status, verdict.score) == ("wrong", 0.0), verdict
