"""Reward functions from elsewhere, unchanged: TRL's `f(prompts, completions, **columns)`, verl's `compute_score`, and
those of a verifiers (v0) rubric.

A function is addressed as `module:function`, `path.py:function` or `trl.rewards:name`. It runs in a killable worker
with a clean environment: one that hangs, crashes, eats memory or raises costs its item, which then has no score
(`infra_error`), since nobody can tell whether the model or the function is to blame. It sees one completion at a time;
`task.payload` gives its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cabochon.errors import UserError
from cabochon.types import Task, Verdict
from cabochon.verifiers.addresses import checked_address
from cabochon.verifiers.base import infra_error, verdict_of_outcome
from cabochon.verifiers.workers import WorkerConfig, shared_pool

TRL_NAMES = frozenset(["prompts", "completions", "log_extra", "log_metric"])
"""What TRL's functions are given besides a row's columns."""
RUBRIC_NAMES = frozenset(["prompt", "completion", "state"])
"""The same of a rubric's."""

_WORKER = "cabochon.verifiers.functions_worker"


@dataclass(frozen=True, kw_only=True)
class _AtAddress:
    """A reward function by its address, called in a killable worker. Rewards in [`low`, `high`] become scores."""

    address: str
    low: float = 0.0
    high: float = 1.0
    deadline: float = 30.0
    memory_mib: int = 8192
    keep_environment: tuple[str, ...] = ()
    """environment variables the function may see"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", checked_address(self.address))
        if not self.low < self.high:
            raise UserError(f"{self.address}: low must be less than high, got {self.low} and {self.high}")

    def _called(self, form: str, arguments: dict[str, Any]) -> Verdict:
        """The verdict on one call of `functions_worker:form`."""
        outcome = shared_pool(_workers(self.address, self.memory_mib, self.keep_environment)).call(
            f"{_WORKER}:{form}",
            {"address": self.address, **arguments},
            deadline=self.deadline, on_stall="fail",
        )
        if outcome.status == "done":
            return _scaled(self.address, outcome.value, self.low, self.high, outcome.seconds)
        if outcome.status == "infra_error":
            return verdict_of_outcome(outcome)
        return infra_error(f"{self.address} ended in {outcome.status}: {outcome.detail}", outcome.seconds)


@dataclass(frozen=True, kw_only=True)
class FunctionVerifier(_AtAddress):
    """A TRL-style reward function, plain or async.

    Rewards in [`low`, `high`] are mapped to scores in [0, 1]; one outside is an `infra_error`, since a scale that is
    not what was declared would shift the training signal unseen. `None` abstains: no score, status `ok`.
    """

    arguments: tuple[tuple[str, Any], ...] | None = None
    """set: the address is a factory, called with these to get the function (`trl.rewards:get_cosine_scaled_reward`)"""
    chat: bool | None = None
    """give the completion as messages; None: as the prompt is"""

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where the task's payload is not plain data."""
        plain = isinstance(task.prompt, str)
        chat = not plain if self.chat is None else self.chat
        prompt: Any = [{"role": "user", "content": task.prompt}] if plain and chat else task.prompt
        verdict = self._called(
            "trl",
            {
                "factory": None if self.arguments is None else dict(self.arguments),
                "prompt": prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
                "completion": [{"role": "assistant", "content": text}] if chat else text,
                "columns": {"id": task.id, "domain": task.domain, **_unlike(task, TRL_NAMES)},
            },
        )
        if not chat and verdict.detail.startswith("TypeError: string ind"):
            hint = f"{verdict.detail}; does it read messages? It gets them where `prompt` is a list of messages"
            return replace(verdict, detail=hint)
        return verdict


@dataclass(frozen=True, kw_only=True)
class VerlVerifier(_AtAddress):
    """verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`; the payload has the other three."""

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError without `ground_truth` in the payload."""
        if "ground_truth" not in task.payload:
            raise ValueError(f'task {task.id}: payload needs "ground_truth" for {self.address}')
        return self._called(
            "verl",
            {
                "data_source": str(task.payload.get("data_source", task.domain)), "text": text,
                "ground_truth": task.payload["ground_truth"], "extra_info": task.payload.get("extra_info"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class RubricVerifier(_AtAddress):
    """A function of a verifiers (v0) rubric: one completion a call, by the names it takes of `prompt`, `completion`,
    `answer`, `state`, `task` and `info`; plain or async."""

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where the task's payload is not plain data."""
        plain = isinstance(task.prompt, str)
        prompt = [{"role": "user", "content": task.prompt}] if plain else [dict(m) for m in task.prompt]  # type: ignore[arg-type]
        return self._called(
            "rubric",
            {
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": text}],
                "columns": {"answer": "", "info": {}, "task": task.domain, **_unlike(task, RUBRIC_NAMES)},
            },
        )


def _unlike(task: Task, taken: frozenset[str]) -> dict[str, Any]:
    """The payload. Raises ValueError where one of its columns would stand in for what the model wrote."""
    if clash := sorted(taken & set(task.payload)):
        raise ValueError(f"task {task.id}: a column may not be called {clash[0]!r}: functions are given that by us")
    return dict(task.payload)


def _workers(address: str, memory_mib: int, keep_environment: tuple[str, ...]) -> WorkerConfig:
    """Workers that have the function's module or file imported: that takes none of an item's time."""
    place = address.rpartition(":")[0]
    return WorkerConfig(
        preload=(_WORKER,) if place.endswith(".py") else (_WORKER, place),
        prepare=(f"{_WORKER}:warm_file", place) if place.endswith(".py") else (),
        memory_mib=memory_mib, keep_environment=keep_environment,
    )


def _scaled(address: str, value: Mapping[str, Any], low: float, high: float, seconds: float) -> Verdict:
    reward, extra = value["value"], value["extra"]
    if reward is None:
        return Verdict(score=None, status="ok", detail=f"{address} abstains", evidence=extra, seconds=seconds)
    slack = 1e-6 * (high - low)  # what float32 makes of an end of the range
    if not low - slack <= reward <= high + slack:
        detail = f"{address} returned {reward:.9g}, outside [{low:g}, {high:g}]: let it return what lies in there"
        return replace(infra_error(detail, seconds), evidence={**extra, "reward": reward})
    score = min(max((reward - low) / (high - low), 0.0), 1.0)
    return Verdict(
        score=score, status="ok" if score == 1.0 else "wrong", detail=f"reward {reward:g}",
        evidence={**extra, "reward": reward}, seconds=seconds,
    )
