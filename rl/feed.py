"""Which task is started next: the mixture of the phase, within a domain in turn or by how much there is to learn.

The state is a few numbers, which a checkpoint holds: a run that resumes draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from cabochon.config import Frozen
from cabochon.errors import UserError
from cabochon.rl.schedule import Schedule
from cabochon.types import Rollout, Task

UNSEEN = 0.5
"""solve rate of what was not tried yet: as good as it gets, so that it is tried soon"""


class CurriculumConfig(Frozen):
    """Draw a domain's tasks in proportion to p (1 - p), p being a running solve rate: most often what is solved about
    half the time (sampling for learnability, 2408.15099; for language models 2502.12272)."""

    by: str = ""
    """a key of the tasks' payload, such as a level: tasks of a domain with the same value share a rate. Empty: each
    task has its own, which tells little where tasks are too many to come again"""
    floor: float = Field(0.1, gt=0, le=1)
    """weight of a task that is always or never solved, against 1 of one that is solved half the time: none starves"""
    decay: float = Field(0.7, ge=0, lt=1)
    """how much of the old rate stays with each group that is seen"""


class Feed(Iterator[Task]):
    """The tasks to start next: first those a killed run had in flight, then what the phase's schedule says."""

    def __init__(
        self,
        tasks: Sequence[Task],
        shares: Sequence[Mapping[str, float]],
        seed: int,
        *,
        curriculum: CurriculumConfig | None = None,
        places: Sequence[int] = (),
        rates: Mapping[str, float] | None = None,
        unfinished: Sequence[str] = (),
    ):
        """`shares`: of each phase; each has an order of its own. `places` and `rates`: as an earlier feed left them.

        Raises UserError for shares of domains there are none of, and tasks without the curriculum's key.
        """
        self._schedules = [
            Schedule(tasks, s, _derived(seed, i), where=f"phases[{i - 1}].shares" if i else "tasks.shares")
            for i, s in enumerate(shares)
        ]
        self._seed, self._curriculum, self.phase = seed, curriculum, 0
        self.places = [*places, *([0] * (len(shares) - len(places)))]
        """tasks drawn so far, by phase"""
        self.rates = dict(rates or {})
        """running solve rate by bucket, of those that were seen"""
        known = {t.id for t in tasks}
        self.again = [i for i in unfinished if i in known]
        """ids of those that were in flight and have not been handed out again"""
        self.gone = [i for i in unfinished if i not in known]
        """ids of those that were in flight and are no task any more"""
        self._bucket = {t.id: bucket(t, curriculum.by) for t in tasks} if curriculum else {}

    def __next__(self) -> Task:
        schedule, place = self._schedules[self.phase], self.places[self.phase]
        if self.again:
            return schedule.by_id(self.again.pop(0))
        self.places[self.phase] += 1
        if self._curriculum is None:
            return schedule[place]
        tasks = schedule.domain(place)
        weight = np.array([self._weight(self._bucket[t.id], self._curriculum.floor) for t in tasks])
        rng = np.random.default_rng((self._seed, self.phase, place))
        return tasks[int(rng.choice(len(tasks), p=weight / weight.sum()))]

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Take in how often the tasks of these groups, oldest first, were solved; where the verifier abstains, what an
        environment paid, as a share of 1. A group nothing is known of (the
        machine failed) says nothing. Without a curriculum nothing is kept."""
        if self._curriculum is None:
            return
        groups: dict[int, list[Rollout]] = {}
        for r in rollouts:
            groups.setdefault(r.group, []).append(r)
        for _, members in sorted(groups.items()):
            earned = [r.completion.reward if r.verdict.score is None else r.verdict.score for r in members if r.verdict]
            if known := [x for x in earned if x is not None]:
                key, decay = self._bucket[members[0].task.id], self._curriculum.decay
                rate = float(np.clip(np.mean(known), 0.0, 1.0))
                self.rates[key] = decay * self.rates.get(key, UNSEEN) + (1 - decay) * rate

    def row(self) -> dict[str, Any]:
        """For metrics.jsonl: buckets tried so far, and which part of them is nearly always, or never, solved."""
        if self._curriculum is None or not self.rates:
            return {}
        rates = np.array(list(self.rates.values()))
        return {"curriculum": {"tried": len(rates), "easy": float((rates > 0.9).mean()),
                               "hard": float((rates < 0.1).mean())}}  # fmt: skip

    def _weight(self, key: str, floor: float) -> float:
        p = self.rates.get(key, UNSEEN)
        return max(floor, 4 * p * (1 - p))


def bucket(task: Task, by: str) -> str:
    """Whose solve rate a task shares. Raises UserError where its payload has no such key."""
    if not by:
        return task.id
    if by not in task.payload:
        raise UserError(f"task {task.id}: tasks.curriculum.by={by!r}, and its payload has no such key")
    return f"{task.domain}/{task.payload[by]}"


def _derived(seed: int, phase: int) -> int:
    """An order of its own for each phase; a run without phases has the seed's."""
    return int(np.random.SeedSequence((seed, phase)).generate_state(1, np.uint64)[0]) if phase else seed
