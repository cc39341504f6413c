"""Mathematical answers: the last box of the final part, else what `<answer>` holds, what follows `####` or "the answer
is", or the last expression; compared by value, in a process that can be killed.

`MathVerifier().verify(task, text)` reads the gold from `task.payload["answer"]` (a string, or a list of strings any
of which will do) and, for multiple choice, the options' texts from `task.payload["choices"]`. What counts as the same
answer is in `math_equal`; the rules are strict, since a wrong answer scored right is the bug to fear.

An answer that still holds an integral, a sum or a limit is refused: it restates the question. math-verify is not asked:
its readings are too generous (several boxes become a tuple, bases are dropped, all tiny numbers are equal).

Nothing the model wrote is evaluated as code. Work that would not end is cut off at the deadline by killing its process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from cabochon.types import Message, Prompt, Task, Verdict
from cabochon.verifiers.base import verdict_of_outcome
from cabochon.verifiers.math_extract import Extraction
from cabochon.verifiers.workers import WorkerConfig, shared_pool

MATH_WORKERS = WorkerConfig(preload=("cabochon.verifiers.math_judge:warm",), memory_mib=1024)

SEND_LIMIT = 400_000
"""The end of a completion that is sent to the worker, in characters."""


@dataclass(frozen=True, kw_only=True)
class MathVerifier:
    """Scores 1 when the final answer equals the gold, else 0."""

    extraction: Extraction = field(default=Extraction())
    deadline: float = 5.0
    """seconds a worker may take over one answer"""
    workers: WorkerConfig = field(default=MATH_WORKERS)

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where the task has no usable gold answer."""
        outcome = shared_pool(self.workers).call(
            "cabochon.verifiers.math_judge:judge",
            {
                "text": text[-SEND_LIMIT:],
                "golds": gold_answers(task),
                "prompt": prompt_text(task.prompt)[-4000:],
                "choices": [str(choice) for choice in task.payload.get("choices", ())],
                "rules": asdict(self.extraction),
            },
            deadline=self.deadline,
        )
        if outcome.status == "done" and "unusable" in outcome.value:
            raise ValueError(f"task {task.id}: {outcome.value['unusable']}")
        return verdict_of_outcome(outcome)


def gold_answers(task: Task) -> list[str]:
    """The golds of a task, as strings. Raises ValueError if there are none."""
    answer: Any = task.payload.get("answer")
    if isinstance(answer, bool) or answer is None or answer == []:
        raise ValueError(f'task {task.id}: payload["answer"] must be a gold answer, got {answer!r}')
    golds = [answer] if isinstance(answer, str | int | float) else answer
    if isinstance(golds, Sequence) and all(isinstance(item, str | int | float) for item in golds):
        if empty := [g for g in golds if not str(g).strip() or (isinstance(g, float) and not isfinite(g))]:
            raise ValueError(f'task {task.id}: payload["answer"] must be a gold answer, got {empty[0]!r}')
        return [str(item) for item in golds]
    raise ValueError(f'task {task.id}: payload["answer"] must be text, a number or a list, got {type(answer).__name__}')


def prompt_text(prompt: Prompt) -> str:
    """The user's words of a prompt."""
    if isinstance(prompt, str):
        return prompt
    messages: Sequence[Message] = prompt
    return "\n".join(str(message.get("content", "")) for message in messages if message.get("role") == "user")


