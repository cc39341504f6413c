"""The doors between rooms; no jax, so a bare worker can import them. Each has a contract suite in tests/contracts."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from cabochon.types import Task, Verdict


@runtime_checkable
class Verifier(Protocol):
    """Scores text that can be checked."""

    def verify(self, task: Task, text: str) -> Verdict:
        """The verdict on `text` as an answer to `task`. Never raises for what a model wrote.

        Raises ValueError where the *task* is unusable (no gold answer, tests that do not parse).
        """
        ...
