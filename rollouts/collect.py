"""From tasks to judged groups of rollouts, with generation and verification side by side.

    with Collector(Completions(engine, sampling), pool, seed=0) as collector:
        batch = collector.collect(tasks)                      # draw, then learn
    ...
        collector.start(tasks)                                # or keep groups in flight while the learner learns
        batch = collector.take(n, max_lag=1)

A group is the samples of one task. Groups are numbered as they are started and handed over in that order, never as they
finish: the first to finish are the short ones, and a batch of those is another distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from math import ceil, sqrt
from typing import Protocol, runtime_checkable

import numpy as np

from cabochon.chat import as_turns
from cabochon.protocols import Finished, StreamingEngine
from cabochon.rollouts.verdicts import Judge, Verdicts, failed
from cabochon.types import Completion, Request, Rollout, Sampling, Task, Verdict

POLL_SECONDS = 1.0
GLANCE_SECONDS = 0.05
"""how long a look at the engine takes while verdicts are due as well"""
SHARE_GROUPS, LEAST_SHARE = 32, 0.01
"""groups over which the share that is kept is averaged, and what it is taken for at least"""


@runtime_checkable
class Source(Protocol):
    """Who draws completions of tasks."""

    @property
    def version(self) -> int:
        """Of the weights the next token will be drawn with."""
        ...

    @property
    def samples(self) -> int:
        """Completions of each task."""
        ...

    def start(self, tasks: Sequence[Task], seeds: Sequence[int]) -> list[int]:
        """One ticket per task. Raises UserError, before anything is started, where one cannot be drawn."""
        ...

    def poll(self, seconds: float) -> list[Finished]: ...

    def abort(self, tickets: Sequence[int]) -> None: ...


class Completions:
    """By an engine: single turns, or multi-turn episodes where it is an EpisodeEngine."""

    def __init__(self, engine: StreamingEngine, sampling: Sampling, *, chat: bool = False):
        """`sampling.n` is the size of a group. `sampling` may be changed between calls, except for that size. `chat`: a
        prompt that is text goes through the chat template."""
        self._engine, self.sampling, self._chat = engine, sampling, chat

    @property
    def version(self) -> int:
        return self._engine.version

    @property
    def samples(self) -> int:
        return self.sampling.n

    def start(self, tasks: Sequence[Task], seeds: Sequence[int]) -> list[int]:
        requests = [
            Request(prompt=as_turns(t.prompt, self._chat), sampling=self.sampling, seed=s, task=t)
            for t, s in zip(tasks, seeds, strict=True)
        ]
        return self._engine.submit(requests)

    def poll(self, seconds: float) -> list[Finished]:
        return self._engine.poll(seconds)

    def abort(self, tickets: Sequence[int]) -> None:
        self._engine.abort(tickets)


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """All samples of one task, judged."""

    id: int
    task: Task
    rollouts: tuple[Rollout, ...]
    """in the order of their samples"""

    @property
    def oldest(self) -> int | None:
        """Version that drew the oldest sampled token; None where none was sampled."""
        versions = [r.completion.policy_version[r.completion.mask] for r in self.rollouts]
        return min((int(v.min()) for v in versions if v.size), default=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Collected:
    """A batch, and what it took."""

    groups: list[Group]
    """in the order they were started"""
    dropped: list[Group]
    """which `keep` refused"""
    stale: list[Group]
    """drawn by weights too old to learn from"""

    @property
    def rollouts(self) -> list[Rollout]:
        return [r for g in self.groups for r in g.rollouts]


@dataclass(kw_only=True, eq=False)
class _Asked:
    """A verdict under way."""

    ticket: int
    samples: list[int] = field(default_factory=list)
    """which said this"""


@dataclass(kw_only=True, eq=False)
class _Pending:
    """A group under way."""

    id: int
    task: Task
    drawn: dict[int, Completion] = field(default_factory=dict)
    judged: dict[int, Verdict] = field(default_factory=dict)
    asked: dict[str, _Asked] = field(default_factory=dict)
    """by text: what several samples say is judged once"""


@dataclass(frozen=True, kw_only=True)
class CollectCounters:
    """Since the collector began."""

    groups: int
    """finished"""
    verdicts_repeated: int
    """after an infra_error"""
    verdicts_late: int
    """given up at the deadline, an infra_error"""


class Collector:
    """Keeps groups in flight. Not thread-safe; the threads of its own only wait for verdicts."""

    def __init__(
        self,
        source: Source,
        judge: Judge,
        *,
        seed: int = 0,
        first_group: int = 0,
        threads: int = 2,
        retries: int = 1,
        deadline_seconds: float = 600.0,
    ):
        """A group's draws depend on `seed` and its number alone; a run that resumes gives the next number as
        `first_group`. `threads`: verdicts worked on at a time. An infra_error is tried again `retries` times; it then
        stays the verdict, as it does `deadline_seconds` after work on it began, and the trainer masks the rollout.
        """
        self._source, self._seed, self._next = source, seed, first_group
        self._pending: dict[int, _Pending] = {}
        """by ticket"""
        self._verdicts: Verdicts[_Asked] = Verdicts(
            judge, threads=threads, retries=retries, deadline_seconds=deadline_seconds
        )
        self._finished: dict[int, Group] = {}
        self._share = 1.0
        """of the groups judged lately that `keep` accepted"""
        self._done = 0
        self._told = self.counters

    @property
    def counters(self) -> CollectCounters:
        return CollectCounters(
            groups=self._done, verdicts_repeated=self._verdicts.repeated, verdicts_late=self._verdicts.late
        )

    def row(self) -> dict[str, int]:
        """For metrics.jsonl: of the verdicts since it was last asked for."""
        before, self._told = self._told, self.counters
        return {
            "verdicts_repeated": self._told.verdicts_repeated - before.verdicts_repeated,
            "verdicts_late": self._told.verdicts_late - before.verdicts_late,
        }

    @property
    def next_group(self) -> int:
        """Number of the group that is started next."""
        return self._next

    @property
    def unfinished(self) -> list[str]:
        """Ids of the tasks whose groups were started and not taken, the oldest first."""
        open_ = {p.id: p.task.id for p in self._pending.values()} | {i: g.task.id for i, g in self._finished.items()}
        return [open_[i] for i in sorted(open_)]

    @property
    def in_flight(self) -> int:
        """Groups started and not finished."""
        return len(self._pending)

    @property
    def waiting(self) -> int:
        """Groups finished and not taken."""
        return len(self._finished)

    def start(self, tasks: Sequence[Task]) -> list[int]:
        """Begin a group of each; returns their numbers. Raises UserError, before any begins, for a bad prompt."""
        ids = list(range(self._next, self._next + len(tasks)))
        tickets = self._source.start(tasks, [group_seed(self._seed, i) for i in ids])
        self._next += len(tasks)
        for ticket, i, task in zip(tickets, ids, tasks, strict=True):
            self._pending[ticket] = _Pending(id=i, task=task)
        return ids

    def take(
        self,
        wanted: int,
        *,
        keep: Callable[[Group], bool] = lambda group: True,
        more: Iterator[Task] = iter(()),
        refills: int = 0,
        max_lag: int | None = None,
    ) -> Collected:
        """The `wanted` oldest groups that `keep` accepts, waiting for them.

        In place of what it refuses, up to `refills` tasks of `more` are started where what is in flight would not be
        enough. A group older than `max_lag` versions is not learned from; in its place its own task is started again,
        under the same two conditions. Fewer than `wanted` come back when nothing is in flight any more.

        With `max_lag` of 1 or more, how many will be refused is expected from those before, so that what is missing is
        drawn at once and not in ever smaller rounds, and what is drawn while the learner learns is enough: see `ahead`.
        """
        kept: dict[int, Group] = {}
        dropped: list[Group] = []
        stale: list[Group] = []
        first = self._next

        def start(enough: int, tasks: Iterator[Task]) -> None:
            count = min(enough - self.in_flight - self.waiting, first + refills - self._next)
            if count > 0:
                self.start([*islice(tasks, count)])

        while True:
            for i in sorted(self._finished):
                if len(kept) == wanted or any(p.id < i for p in self._pending.values()):
                    break
                group = self._finished.pop(i)
                if max_lag is not None and group.oldest is not None and self._source.version - group.oldest > max_lag:
                    stale.append(group)
                    again: Iterator[Task] = chain([group.task], more)
                elif not keep(group):
                    dropped.append(group)
                    again = more
                    self._share = max(self._share * (1 - 1 / SHARE_GROUPS), LEAST_SHARE)
                else:
                    kept[i] = group
                    self._share += (1 - self._share) / SHARE_GROUPS
                    continue
                start(ceil((wanted - len(kept)) / (self._share if max_lag else 1)), again)
            if len(kept) == wanted or not (self._pending or self._finished):
                if max_lag:
                    start(ahead(max_lag * wanted, self._share), more)
                return Collected(groups=list(kept.values()), dropped=dropped, stale=stale)
            if self._pending:
                self.advance(POLL_SECONDS)

    def collect(
        self,
        tasks: Sequence[Task],
        *,
        keep: Callable[[Group], bool] = lambda group: True,
        more: Iterator[Task] = iter(()),
        refills: int = 0,
        max_lag: int | None = None,
    ) -> Collected:
        """Start these tasks and take as many groups: all of theirs, in their order, where none is refused."""
        self.start(tasks)
        return self.take(len(tasks), keep=keep, more=more, refills=refills, max_lag=max_lag)

    def advance(self, seconds: float) -> None:
        """Send what was drawn to be judged and take in verdicts; waits up to about `seconds` for something."""
        drawing = any(len(p.drawn) < self._source.samples for p in self._pending.values())
        if drawing:
            for f in self._source.poll(GLANCE_SECONDS if self._verdicts else seconds):
                self._drawn(f)
        elif self._verdicts:
            self._verdicts.wait(seconds)
        for asked, verdict in self._verdicts.take():
            for sample in asked.samples:
                self._judged(asked.ticket, sample, verdict)

    def abort(self) -> None:
        """Forget what is in flight and what was not taken."""
        self._source.abort(list(self._pending))
        self._verdicts.forget()
        self._pending, self._finished = {}, {}

    def close(self) -> None:
        """Abort; verdicts in hand are not waited for."""
        self.abort()
        self._verdicts.close()

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _drawn(self, f: Finished) -> None:
        pending = self._pending.get(f.ticket)
        if pending is None:
            return
        pending.drawn[f.sample] = f.completion
        if f.completion.finish == "abort":
            self._judged(f.ticket, f.sample, failed(f.completion.detail or "the engine gave the completion up"))
            return
        text = f.completion.text
        if (asked := pending.asked.get(text)) is None:
            asked = pending.asked[text] = _Asked(ticket=f.ticket)
            self._verdicts.ask(asked, pending.task, text)
        elif asked.samples and asked.samples[0] in pending.judged:
            self._judged(f.ticket, f.sample, pending.judged[asked.samples[0]])
            return
        asked.samples.append(f.sample)

    def _judged(self, ticket: int, sample: int, verdict: Verdict) -> None:
        p = self._pending[ticket]
        p.judged[sample] = verdict
        if len(p.judged) < self._source.samples:
            return
        rollouts = tuple(
            Rollout(task=p.task, completion=p.drawn[i], group=p.id, verdict=p.judged[i]) for i in sorted(p.judged)
        )
        self._finished[p.id] = Group(id=p.id, task=p.task, rollouts=rollouts)
        self._done += 1
        del self._pending[ticket]


def group_seed(seed: int, group: int) -> int:
    """Of the draws of one group."""
    return int(np.random.SeedSequence((seed, group)).generate_state(1, np.uint64)[0])


def room(*, max_lag: int, batch: int, waiting: int, running: int, most: int) -> int:
    """Groups that may be started now so that none is more than `max_lag` batches old when it is learned from
    (algorithms.md section 11, admission): `waiting` are finished and not taken, `running` at most `most` at a time.
    """
    return max(0, min(most - running, (max_lag + 1) * batch - waiting - running))


def ahead(wanted: int, share: float) -> int:
    """Groups to have under way while the learner learns, of which `share` will be kept: so many that there are `wanted`
    at most, one time in forty left aside (two standard deviations of a binomial), since those beyond grow too old."""
    lost = 1 - share
    return int((sqrt(wanted + lost) - sqrt(lost)) ** 2 / share)
