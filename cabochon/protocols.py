"""The doors between rooms; no jax, so a bare worker can import them. Each has a contract suite in tests/contracts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from cabochon.types import Completion, Request, Task, Verdict


@runtime_checkable
class Verifier(Protocol):
    """Scores text that can be checked."""

    def verify(self, task: Task, text: str) -> Verdict:
        """The verdict on `text` as an answer to `task`. Never raises for what a model wrote.

        Raises ValueError where the *task* is unusable (no gold answer, tests that do not parse).
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A policy's parameters at one learner step, on their way to an engine."""

    version: int
    """the learner step that made them"""
    params: Mapping[str, Any]
    """the policy's whole tree of arrays, device or host; low-rank additions already merged in"""


@runtime_checkable
class PolicyEngine(Protocol):
    """Continues prompts."""

    @property
    def version(self) -> int:
        """Of the weights that the next token will be drawn with."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All samples of the first request, then all of the second, and so on, whatever order they finish in.

        Raises UserError, before anything is drawn, where a request cannot be met.
        """
        ...

    def load(self, weights: Weights) -> None:
        """Draw from these weights from now on. Raises UserError where they are of another model."""
        ...
