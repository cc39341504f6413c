"""Instructions that can be checked: IFEval's constraints and our own, each by name.

`task.payload` holds either IFEval's own columns, `instruction_id_list` and `kwargs` (a list of the same length), or
`constraints`: a list of `{"kind": "length:words", "maximum": 50}`. See `instructions_arguments` for the kinds and
what each takes. The checks run in a killable worker, because a pattern, a schema or a language guess may take for ever
on a hostile text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cabochon.types import Task, Verdict
from cabochon.verifiers.base import verdict_of_outcome
from cabochon.verifiers.instructions_arguments import checked
from cabochon.verifiers.math_extract import Extraction, final_part
from cabochon.verifiers.text import blank
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
    """constraints are about what follows the thinking part, and a response that has nothing behind it is none; empty
    for all of the text"""
    deadline: float = 5.0
    """seconds for all constraints of one response"""
    workers: WorkerConfig = field(default=INSTRUCTION_WORKERS)

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where the task's constraints are not usable."""
        wanted = constraints(task)
        if self.think_close:
            thinks = self.think_close in text or text.lstrip().startswith(self.think_close.replace("/", "", 1))
            text = final_part(text, Extraction(think_close=self.think_close, require_final_part=thinks)).strip()
        if blank(text):
            return Verdict(score=0.0, status="no_answer", detail="an empty response")
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
    """Kind and `checked` arguments of each constraint of a task. Raises ValueError if there are none, or one is not in
    form."""
    payload = task.payload
    rows = payload.get("constraints")
    if "instruction_id_list" in payload:
        if rows is not None:
            raise ValueError(f'task {task.id}: payload has "constraints" and "instruction_id_list": give one')
        kinds, given = _listed(task, "instruction_id_list"), _listed(task, "kwargs")
        given = given or [{} for _ in kinds]
        if len(kinds) != len(given):
            raise ValueError(f"task {task.id}: {len(kinds)} instruction ids but {len(given)} kwargs")
        if odd := [row for row in given if row is not None and not isinstance(row, Mapping)]:
            raise ValueError(f"task {task.id}: each of kwargs must be an object, got {str(odd[0])[:60]!r}")
        rows = [{**(arguments or {}), "kind": kind} for kind, arguments in zip(kinds, given, strict=True)]
    if not rows or not isinstance(rows, list) or not all(isinstance(row, Mapping) and "kind" in row for row in rows):
        raise ValueError(
            f'task {task.id}: payload needs "constraints" (a list of objects with a "kind") or IFEval\'s '
            '"instruction_id_list" and "kwargs"'
        )
    try:
        return [
            (str(row["kind"]), checked(str(row["kind"]), {name: row[name] for name in row if name != "kind"}))
            for row in rows
        ]
    except ValueError as error:
        raise ValueError(f"task {task.id}: {error}") from None


def _listed(task: Task, column: str) -> list[Any]:
    value = task.payload.get(column)
    if not isinstance(value, list | None):
        raise ValueError(f"task {task.id}: payload[{column!r}] must be a list, got {type(value).__name__}")
    return value or []
