"""Small things every verifier uses: verdicts for the usual cases, and what became of a worker's call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cabochon.types import Task, Verdict
from cabochon.verifiers.workers import Outcome


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A task with completions whose verdicts are known: what a pool proves itself with before a run starts.

    Example: `Probe(task=Task(id="probe", prompt="1+1?", verifier="math", payload={"answer": "2"}),
    gold="\\\\boxed{2}")`.
    """

    task: Task
    gold: str | None
    """None where nobody knows one, as of a user's reward function: it then only has to judge, whatever it says"""
    candidates: tuple[str, ...] = ()
    """without `gold`: answers of which one is probably right; each has to be judged as well"""
    blank: str = ""
    garbage: str = "zq \\boxed{%%% never an answer ~~}"


def infra_error(detail: str, seconds: float = 0.0, **evidence: Any) -> Verdict:
    """The machine failed: no score."""
    return Verdict(score=None, status="infra_error", detail=detail[:300], evidence=evidence, seconds=seconds)


def right(detail: str = "", evidence: Mapping[str, Any] | None = None) -> Verdict:
    return Verdict(score=1.0, status="ok", detail=detail, evidence=evidence or {})


def wrong(detail: str, evidence: Mapping[str, Any] | None = None) -> Verdict:
    return Verdict(score=0.0, status="wrong", detail=detail, evidence=evidence or {})


def verdict_of_outcome(outcome: Outcome) -> Verdict:
    """A worker's outcome as a verdict; a `done` value is the verdict as plain data (score, status, detail, evidence).
    """
    match outcome.status:
        case "done":
            value = outcome.value
            return Verdict(
                score=value["score"], status=value["status"], detail=value["detail"], evidence=value["evidence"],
                seconds=outcome.seconds,
            )
        case "infra_error":
            extra = {"traceback": outcome.value} if outcome.value else {}
            return infra_error(outcome.detail, outcome.seconds, **extra)
        case "recursion":
            return Verdict(score=0.0, status="malformed", detail=outcome.detail, seconds=outcome.seconds)
    return Verdict(score=0.0, status=outcome.status, detail=outcome.detail, seconds=outcome.seconds)
