"""Verifiers made of verifiers. Each part's verdict stays in the evidence; a part the machine failed fails the whole.

An `infra_error` of a part is never counted as 0: the composition has no score then either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from cabochon.protocols import Verifier
from cabochon.types import Status, Task, Verdict
from cabochon.verifiers.text import nearest


@dataclass(frozen=True, kw_only=True)
class Part:
    """One named verifier of a composition."""

    name: str
    verifier: Verifier
    weight: float = 1.0
    """read by WeightedSum only"""


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """The weighted mean of the parts' scores. A part that abstains is left out of sum and weight."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        _distinct(self.parts)
        if any(not part.weight > 0 for part in self.parts) or not isfinite(sum(part.weight for part in self.parts)):
            raise ValueError("WeightedSum needs finite weights > 0; leave a part out instead of giving it none")

    def verify(self, task: Task, text: str) -> Verdict:
        """Every part is judged."""
        verdicts = {part.name: part.verifier.verify(task, text) for part in self.parts}
        scored = [(part.weight, verdict.score) for part in self.parts
                  if (verdict := verdicts[part.name]).score is not None]
        if not scored:
            return _combined(verdicts, None)
        total = sum(weight for weight, _ in scored)
        return _combined(verdicts, sum(weight * score for weight, score in scored if score) / total)


@dataclass(frozen=True, kw_only=True)
class AllOf:
    """1 when every part scores 1, else 0. Every part is judged, so that the evidence is complete."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        _distinct(self.parts)

    def verify(self, task: Task, text: str) -> Verdict:
        verdicts = {part.name: part.verifier.verify(task, text) for part in self.parts}
        scores = [verdict.score for verdict in verdicts.values() if verdict.score is not None]
        return _combined(verdicts, float(all(score == 1.0 for score in scores)) if scores else None)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The content's score where the gate scores at least `threshold`, else 0 without looking at the content."""

    gate: Part
    content: Part
    threshold: float = 1.0

    def __post_init__(self) -> None:
        _distinct((self.gate, self.content))
        if not 0 < self.threshold <= 1:
            raise ValueError(f"Gate.threshold must lie in (0, 1], got {self.threshold}")

    def verify(self, task: Task, text: str) -> Verdict:
        first = self.gate.verifier.verify(task, text)
        if first.score is None:
            return _combined({self.gate.name: first}, None)
        if first.score < self.threshold:
            return _combined({self.gate.name: first}, 0.0)
        second = self.content.verifier.verify(task, text)
        return _combined({self.gate.name: first, self.content.name: second}, second.score)


@dataclass(frozen=True, kw_only=True)
class ByTask:
    """The first verifier whose `routes` hold the task's `verifier` name."""

    routes: tuple[tuple[str, Verifier], ...]
    """(name as in `Task.verifier`, its verifier)"""

    def __post_init__(self) -> None:
        if not self.routes:
            raise ValueError("ByTask needs at least one route")

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where no route is for the task."""
        for name, verifier in self.routes:
            if name == task.verifier:
                return verifier.verify(task, text)
        names = [name for name, _ in self.routes]
        near = nearest(task.verifier, names)
        raise ValueError(f"task {task.id} asks for verifier {task.verifier!r} of {names}; the nearest is {near!r}")


def _distinct(parts: tuple[Part, ...]) -> None:
    names = [part.name for part in parts]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"the parts of a composition need names of their own, got {names}")


def _combined(verdicts: Mapping[str, Verdict], score: float | None) -> Verdict:
    """One verdict of several: the first part that is not `ok` gives status and detail."""
    evidence: dict[str, Any] = {
        "parts": {
            name: {"score": verdict.score, "status": verdict.status, "detail": verdict.detail,
                   "evidence": dict(verdict.evidence)}
            for name, verdict in verdicts.items()
        }
    }
    seconds = sum(verdict.seconds for verdict in verdicts.values())
    for name, verdict in verdicts.items():
        if verdict.status == "infra_error":
            detail = f"{name}: {verdict.detail}"[:300]
            return Verdict(score=None, status="infra_error", detail=detail, evidence=evidence, seconds=seconds)
    status: Status = "ok"
    detail = "all parts ok"
    for name, verdict in verdicts.items():
        if verdict.status != "ok":
            status, detail = verdict.status, f"{name}: {verdict.detail}"[:300]
            break
    if status == "ok" and score is not None and score < 1.0:
        detail = "not all parts score 1"
    return Verdict(score=score, status=status, detail=detail, evidence=evidence, seconds=seconds)
