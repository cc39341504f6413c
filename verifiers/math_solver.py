"""Answers that can be put back in: a root into its equation, an antiderivative under the derivative.

For problems with many right forms, where comparing with one gold answer would miss most. `task.payload` holds `kind`
("root", "derivative" or "integral"), `given` (an equation or a formula, LaTeX or plain), `variable` (default "x"), and
for roots optionally `count`: how many distinct ones must be named.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from cabochon.types import Task, Verdict
from cabochon.verifiers.base import verdict_of_outcome
from cabochon.verifiers.math import SEND_LIMIT
from cabochon.verifiers.math_extract import Extraction
from cabochon.verifiers.workers import WorkerConfig, shared_pool

SOLVER_WORKERS = WorkerConfig(
    preload=("cabochon.verifiers.math_substitute", "cabochon.verifiers.math_judge:warm"), memory_mib=1024
)


@dataclass(frozen=True, kw_only=True)
class SolverVerifier:
    """Scores 1 when the claimed answer holds, else 0."""

    extraction: Extraction = field(default=Extraction())
    deadline: float = 5.0
    workers: WorkerConfig = field(default=SOLVER_WORKERS)

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where the task does not say what to check."""
        payload = task.payload
        if payload.get("kind") not in ("root", "derivative", "integral") or not isinstance(payload.get("given"), str):
            raise ValueError(
                f'task {task.id}: payload needs "kind" (root, derivative or integral) and "given" (a formula), '
                f"got {sorted(payload)}"
            )
        outcome = shared_pool(self.workers).call(
            "cabochon.verifiers.math_substitute:judge",
            {
                "text": text[-SEND_LIMIT:], "kind": payload["kind"], "given": payload["given"],
                "variable": str(payload.get("variable", "x")), "count": payload.get("count"),
                "rules": asdict(self.extraction),
            },
            deadline=self.deadline,
        )
        if outcome.status == "done" and "unusable" in outcome.value:
            raise ValueError(f"task {task.id}: {outcome.value['unusable']}")
        return verdict_of_outcome(outcome)
