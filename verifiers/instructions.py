"""Instructions that can be checked: IFEval's constraints and our own, each by name.

`task.payload` holds either IFEval's own columns, `instruction_id_list` and `kwargs` (a list of the same length), or
`constraints`: a list of `{"kind": "length:words", "maximum": 50}`. See `instructions_check` for the kinds. All of it
runs in a killable worker, because a pattern, a schema or a language guess may take for ever on a hostile text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cabochon.types import Task, Verdict
from cabochon.verifiers.base import verdict_of_outcome
from cabochon.verifiers.math_extract import Extraction, final_part
from cabochon.verifiers.workers import WorkerConfig, shared_pool

INSTRUCTION_WORKERS = WorkerConfig(preload=("cabochon.verifiers.instructions_check:warm",), memory_mib=1024)

LENGTH_LIMIT = 1_000_000
"""Characters; a longer response is malformed, whatever it was asked to be."""


@dataclass(frozen=True, kw_only=True)
class InstructionVerifier:
    """Scores 1 when every constraint is kept, else 0; with `partial` the fraction kept."""

    reading: Literal["strict", "loose"] = "strict"
    """loose: IFEval's eight variants of the response, any of which may keep a constraint"""
    partial: bool = False
    think_close: str = "</think>"
    """constraints are about what follows the thinking part; empty for all of the text"""
    deadline: float = 5.0
    """seconds for all constraints of one response"""
    workers: WorkerConfig = field(default=INSTRUCTION_WORKERS)

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where the task's constraints are not usable."""
        wanted = constraints(task)
        if self.think_close:
            text = final_part(text, Extraction(think_close=self.think_close)).strip()
        if len(text) > LENGTH_LIMIT:
            return Verdict(score=0.0, status="malformed", detail=f"the response is {len(text)} characters long")
        outcome = shared_pool(self.workers).call(
            "cabochon.verifiers.instructions_check:judge",
            {"text": text, "constraints": wanted, "loose": self.reading == "loose", "partial": self.partial},
            deadline=self.deadline,
        )
        if outcome.status == "done" and "unusable" in outcome.value:
            raise ValueError(f"task {task.id}: {outcome.value['unusable']}")
        return verdict_of_outcome(outcome)


def constraints(task: Task) -> list[tuple[str, dict[str, Any]]]:
    """Kind and arguments of each constraint of a task. Raises ValueError if there are none or they are not in form."""
    payload = task.payload
    if "instruction_id_list" in payload:
        kinds, given = list(payload["instruction_id_list"]), list(payload.get("kwargs", ()))
        given = given or [{} for _ in kinds]
        if len(kinds) != len(given) or not kinds:
            raise ValueError(f"task {task.id}: {len(kinds)} instruction ids but {len(given)} kwargs")
        return [(str(kind), dict(arguments or {})) for kind, arguments in zip(kinds, given, strict=True)]
    rows = payload.get("constraints")
    if not rows or not all(isinstance(row, Mapping) and "kind" in row for row in rows):
        raise ValueError(
            f'task {task.id}: payload needs "constraints" (a list of objects with a "kind") or IFEval\'s '
            '"instruction_id_list" and "kwargs"'
        )
    return [(str(row["kind"]), {name: value for name, value in row.items() if name != "kind"}) for row in rows]
