"""Sandboxes for tests: each kind once, by name. On CI one that is missing is a failure, elsewhere a skip."""

from __future__ import annotations

import os

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


def judged(verifier: CodeVerifier, source: str, tests: list[str] | str, **payload: object) -> Verdict:
    """On a program and its tests: statements, a file of test functions, or HumanEval's `check`."""
    tests = tests if "def test_" in tests or "def check(candidate" in tests or isinstance(tests, list) else [tests]
    task = Task(id="t", prompt="", verifier="code", payload={"tests": tests, **payload})
    return verifier.verify(task, f"```python\n{source}\n```")
