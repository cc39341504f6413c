"""reasoning-gym puzzles as tasks, and their verifier.

Where the payload has the answer and comparing texts settles the matter, nothing else is run.

A task's payload names dataset, size, seed, config and index; the worker makes the item again from these (the library is
deterministic in them) and judges the answer by the rules of `reasoning_worker`. Needs the extra `cabochon[tasks]`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from time import monotonic
from typing import Any

from cabochon.errors import UserError
from cabochon.types import Task, Verdict
from cabochon.verifiers.base import verdict_of_outcome
from cabochon.verifiers.reasoning_worker import at_once, rule_of
from cabochon.verifiers.workers import WorkerConfig, shared_pool

REASONING_WORKERS = WorkerConfig(
    preload=("cabochon.verifiers.reasoning_worker", "reasoning_gym", "cabochon.verifiers.math_judge:warm"),
    memory_mib=4096,
)

_SHORT = 20_000
"""characters of a completion that are looked at in this process"""

PROMPT_ENDING = "\n\nGive the final answer between <answer> and </answer>."


@dataclass(frozen=True, kw_only=True)
class Puzzles:
    """Which items of one dataset. Example: `Puzzles(name="countdown", size=100, seed=1, config={"max_numbers": 4})`."""

    name: str
    size: int = 100
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    """the dataset's own difficulty settings"""


def puzzle_tasks(puzzles: Puzzles) -> list[Task]:
    """The items as tasks, without those whose oracle is an integral that was left undone. Raises UserError for an
    unknown dataset or setting, or one that cannot be judged soundly."""
    if find_spec("reasoning_gym") is None:
        raise UserError("reasoning-gym tasks need the package reasoning-gym: pip install 'cabochon[tasks]'")
    config = [[key, value] for key, value in sorted(puzzles.config.items())]
    outcome = shared_pool(REASONING_WORKERS).call(
        "cabochon.verifiers.reasoning_worker:items",
        {"name": puzzles.name, "size": puzzles.size, "seed": puzzles.seed, "config": config}, deadline=600.0,
    )
    if outcome.status != "done":
        why = f"{outcome.status}: {outcome.detail}"
        raise UserError(f"{puzzles.size} items of {puzzles.name} cannot be made with {dict(puzzles.config)}: {why}")
    if "unusable" in outcome.value:
        raise UserError(outcome.value["unusable"])
    tasks = []
    settings = f"-{zlib.crc32(repr(config).encode()):08x}" if config else ""
    for index, (question, answer) in enumerate(outcome.value["items"]):
        if answer is not None and "Integral(" in answer:
            continue  # sympy could not do it: the oracle is the question
        if answer is None and rule_of(puzzles.name) == "exact":
            raise UserError(
                f"reasoning-gym dataset {puzzles.name!r} has no answers to compare with, and its own scorer pays for "
                "wrong ones: choose another"
            )
        payload = {
            "dataset": puzzles.name, "size": puzzles.size, "seed": puzzles.seed, "index": index,
            "config": config, "answer": answer, "question": fingerprint(question),
        }
        tasks.append(Task(
            id=f"{puzzles.name}{settings}/{puzzles.seed}/{index}", prompt=question + PROMPT_ENDING,
            verifier="reasoning", payload=payload, domain=puzzles.name,
        ))
    return tasks


def fingerprint(question: str) -> list[int]:
    """Length and checksum: a task whose prompt does not begin with its question is not judged by its payload alone."""
    return [len(question), zlib.crc32(question.encode("utf-8", "surrogatepass"))]


def _is_asked(task: Task) -> bool:
    mark = task.payload.get("question") or [0, 0]
    return isinstance(task.prompt, str) and mark[0] > 0 and fingerprint(task.prompt[: mark[0]]) == list(mark)


@dataclass(frozen=True, kw_only=True)
class ReasoningVerifier:
    """Scores 1 for a full solution, else 0; what a rule has to look into goes to a worker of its own."""

    deadline: float = 10.0
    workers: WorkerConfig = field(default=REASONING_WORKERS)

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where the payload does not name an item."""
        wanted = ("dataset", "size", "seed", "config", "index")
        missing = [name for name in wanted if name not in task.payload]
        if missing:
            raise ValueError(f"task {task.id}: payload lacks {', '.join(missing)}")
        gold = task.payload.get("answer")
        if isinstance(gold, str) and len(text) <= _SHORT and _is_asked(task):
            begin = monotonic()
            if (found := at_once(text, task.payload["dataset"], gold)) is not None:
                return Verdict(**found, seconds=monotonic() - begin)
        outcome = shared_pool(self.workers).call(
            "cabochon.verifiers.reasoning_worker:judge",
            {"text": text[-400_000:], "prompt": task.prompt, "name": task.payload["dataset"],
             **{name: task.payload[name] for name in wanted[1:]}},
            deadline=self.deadline, single_use=True, on_stall="timeout",
        )
        return verdict_of_outcome(outcome)
