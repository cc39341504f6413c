"""RayEngine: workers in processes of their own behind the PolicyEngine door, and what happens when one is lost.

    with RayEngine(model, tokenizer, weights, SlotConfig(slots=16), RayConfig(), log_dir=run / "ray") as engine:
        completions = engine.generate(requests)

One loop, `_turn`, asks the workers what they finished, hands them more, and replaces those that died, do not answer,
or stopped. Nothing runs in this process between two calls; the workers go on with what they have.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import ray

from cabochon.config import RayConfig
from cabochon.errors import MachineError
from cabochon.model.config import ModelConfig
from cabochon.protocols import Finished, Weights
from cabochon.rollouts.local import check_tree
from cabochon.rollouts.probe import with_probe
from cabochon.rollouts.prompts import prepare
from cabochon.rollouts.ray_members import EngineCounters, Member, Work, choose, whole
from cabochon.rollouts.ray_session import RaySession, still_missing
from cabochon.rollouts.ray_store import RayStore
from cabochon.rollouts.slots import SlotConfig
from cabochon.rollouts.stream import in_order, named
from cabochon.rollouts.weights import ChunkedStore, WeightsError, host_copy
from cabochon.rollouts.worker import Report, RolloutWorker
from cabochon.tokenizer import Tokenizer
from cabochon.types import Completion, Request

POLL_SECONDS = 1.0
"""a worker with nothing to tell answers after this"""

Event = dict[str, Any]
"""`event` says what happened, `worker` to whom; the rest depends on it"""


class RayEngine:
    """A StreamingEngine over Ray actors; equal, bit for bit, to a LocalEngine of the same SlotConfig."""

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer,
        weights: Weights,
        slots: SlotConfig,
        cfg: RayConfig,
        *,
        log_dir: Path,
        store: ChunkedStore | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ):
        """Returns when every worker serves `weights`. `store` is Ray's own by default.

        Raises UserError where the weights are of another model or the workers can never be placed, MachineError where
        they do not start.
        """
        check_tree(model, weights.params)
        self.counters, self.events = EngineCounters(), deque[Event](maxlen=1000)
        self._model, self._tokenizer, self._slots, self._cfg = model, tokenizer, slots, cfg
        self._on_event = on_event
        self._members: list[Member] = []
        self._waiting: deque[Work] = deque()
        self._outbox: list[Finished] = []
        self._tickets = self._started = self._publications = self._copies = self._losses = 0
        self._session = RaySession(cfg, log_dir)
        try:
            # One version: a load that is under way holds the objects it reads.
            self._store = store or RayStore(keep=1, dtype=None if slots.dtype == "float32" else slots.dtype)
            for _ in range(cfg.workers):
                self._start()  # they import while we publish
            self._publish(weights)
            for m in self._members:
                self._load(m)
            while any(m.serves is None for m in self._members):
                self._turn(POLL_SECONDS)
        except BaseException:
            self.close()
            raise

    # -- the door ------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        return self._weights.version

    @property
    def workers(self) -> dict[str, int | None]:
        """Name and process id of each; None until it serves."""
        return {m.name: m.pid for m in self._members}

    def events_of(self, event: str) -> list[Event]:
        """Those of one kind, oldest first."""
        return [e for e in self.events if e["event"] == event]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All samples of all requests, in order. Raises UserError, before anything is drawn, where one cannot be met;
        MachineError when workers are lost again and again.
        """
        out, others = in_order(self, requests)
        self._outbox = others + self._outbox
        return out

    def load(self, weights: Weights) -> None:
        """Publish them, and return when every worker that serves draws from them; generation goes on meanwhile.

        Raises UserError where they are of another model, MachineError naming worker, version and tensor where a worker
        cannot take them over.
        """
        check_tree(self._model, weights.params)
        self._publish(weights)
        for m in self._members:
            if m.loading is None:
                self._load(m)
        while any(m.serves != self._publications for m in self._members if m.serves is not None) or all(
            m.serves is None for m in self._members
        ):
            self._turn(POLL_SECONDS)

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Queue them, the one with the most expected work first; one ticket each."""
        work = []
        for i, request in enumerate(requests):
            tokens = prepare(self._model, self._tokenizer, self._slots, request, named(request, i)).tokens
            n = request.sampling.n
            self._tickets += 1
            work.append(
                Work(
                    ticket=self._tickets,
                    request=replace(request, prompt=tokens, task=None),
                    prompt_P=tokens,
                    cost=len(tokens) + n * request.sampling.max_tokens,
                    missing=set(range(n)),
                )
            )
        self._waiting += sorted(work, key=lambda w: -w.cost)
        self._feed()
        return [w.ticket for w in work]

    def poll(self, seconds: float) -> list[Finished]:
        """What finished since the last call; waits up to about `seconds` for the first. Raises MachineError."""
        deadline = monotonic() + seconds
        while True:
            self._turn(0.0 if self._outbox else max(0.0, min(POLL_SECONDS, deadline - monotonic())))
            if self._outbox or monotonic() >= deadline:
                out, self._outbox = self._outbox, []
                return out

    def abort(self, tickets: Sequence[int]) -> None:
        """Forget these requests."""
        gone = set(tickets)
        self._waiting = deque(w for w in self._waiting if w.ticket not in gone)
        self._outbox = [f for f in self._outbox if f.ticket not in gone]
        for m in self._members:
            if mine := gone & m.work.keys():
                m.actor.drop.remote(sorted(mine))
                m.work = {t: w for t, w in m.work.items() if t not in gone}

    def close(self) -> None:
        """Stop the workers, and Ray if it is ours."""
        while self._members:
            self._kill(self._members.pop())
        self._session.close()

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _turn(self, seconds: float) -> None:
        """Hand out work, hear what workers have to say, waiting up to `seconds` for the first, and replace the lost."""
        self._feed()
        calls: dict[Any, Member] = {}
        for m in self._members:
            if m.serves is not None and m.polling is None:
                m.polling, m.polling_since = m.actor.poll.remote(POLL_SECONDS), monotonic()
            calls |= {ref: m for ref in (m.loading, m.polling) if ref is not None}
        ray.wait(list(calls), timeout=seconds)
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for ref in ready:
            if calls[ref] in self._members:
                self._hear(calls[ref], ref)
        now = monotonic()
        for m in list(self._members):
            if m.polling is not None and now - m.polling_since > self._cfg.deadline_seconds + POLL_SECONDS:
                self._replace(m, f"no answer for {now - m.polling_since:.0f} s")
            elif m.loading is not None and now - m.loading_since > self._cfg.start_seconds:
                self._late(m)

    def _hear(self, m: Member, ref: Any) -> None:
        failed: Exception | None = None
        try:
            answer = ray.get(ref, timeout=self._cfg.deadline_seconds)
        except Exception as error:  # Ray's, when the process is gone; or a bug in the worker, which is then the reason
            failed = error
        if isinstance(failed, WeightsError):
            self._refused(m, _reason(failed))
        elif failed is not None:
            self._replace(m, _reason(failed))
        elif ref is m.loading:
            m.loading, m.serves, m.pid = None, m.target, answer.pid
            m.node = answer.node
            m.ended.clear()  # what older weights computed is not reused
            if m.serves != self._publications:
                self._load(m)
        else:
            m.polling = None
            self._take(m, answer)

    def _take(self, m: Member, report: Report) -> None:
        self.counters.reused_tokens += report.reused_tokens - m.reused
        m.reused = report.reused_tokens
        for f in report.done:
            work = m.work.get(f.ticket)
            if work is None or f.sample not in work.missing:
                continue  # aborted, or delivered before the worker that had it was lost
            work.missing.remove(f.sample)
            if not work.missing:
                del m.work[f.ticket]
            self._outbox.append(f)
            m.ended.append(whole(f.completion))
            self.counters.delivered += 1
            self._losses = 0
        if report.failure:
            self._replace(m, report.failure)
        elif report.stalled > self._cfg.deadline_seconds:
            self._replace(m, f"one dispatch takes {report.stalled:.0f} s")

    def _feed(self) -> None:
        """Work goes to the worker that `choose` says, until each has twice what fits in its slots; to one that still
        takes over the newest weights, once it has them.
        """
        given: dict[str, list[tuple[int, Request]]] = {}
        serving = [m for m in self._members if m.serves == self._publications]
        while self._waiting and (free := [m for m in serving if m.samples < 2 * self._slots.slots]):
            work = self._waiting.popleft()
            m = choose(free, work.prompt_P, self._slots.reuse)
            m.work[work.ticket] = work
            sampling = replace(work.request.sampling, n=max(work.missing) + 1)
            given.setdefault(m.name, []).append((work.ticket, replace(work.request, sampling=sampling)))
        for m in serving:
            if m.name in given:
                m.actor.give.remote(given[m.name])

    # -- weights -------------------------------------------------------------------------------------------------------

    def _publish(self, weights: Weights) -> None:
        """The host copy stays, to be published again should a worker not get it."""
        self._weights = host_copy(with_probe(self._model, weights))
        self._store.publish(self._weights)
        self._publications += 1
        self._copies = 1

    def _load(self, m: Member) -> None:
        m.target, m.copy, m.loading_since = self._publications, self._copies, monotonic()
        m.loading = m.actor.load.remote(self._store, self.version, self._cfg.deadline_seconds)

    def _refused(self, m: Member, why: str) -> None:
        """A worker could not use the version: it is published again, a bounded number of times."""
        self._say("weights refused", m, why=why)
        if (m.target, m.copy) == (self._publications, self._copies):  # not so where another worker was first to say so
            if self._copies > self._cfg.retries:
                raise MachineError(f"{why}; it was published {self._copies} times")
            self._store.publish(self._weights)
            self._copies += 1
            self.counters.republished += 1
        self._load(m)

    # -- workers -------------------------------------------------------------------------------------------------------

    def _start(self) -> Member:
        """A worker that has no weights yet."""
        name = f"worker {self._started}"
        self._started += 1
        options = {"num_cpus": self._cfg.cpus, "resources": dict(self._cfg.resources) or None}
        actor = ray.remote(RolloutWorker).options(max_concurrency=8, max_restarts=0, **options)
        m = Member(
            name=name,
            actor=actor.remote(name, self._model, self._tokenizer, self._slots, max(1, int(self._cfg.cpus))),
            ended=deque(maxlen=self._slots.slots if self._slots.reuse else 0),
        )
        self._members.append(m)
        return m

    def _late(self, m: Member) -> None:
        """It does not serve yet, and should."""
        if m.serves is None and (short := still_missing(self._cfg)):
            raise MachineError(f"{m.name} was not placed within {self._cfg.start_seconds:g} s for want of {short}")
        self._replace(m, f"weights not loaded within {self._cfg.start_seconds:g} s")

    def _replace(self, m: Member, why: str) -> None:
        """Kill it, start another, and give its unfinished work to whoever is free. Raises MachineError when that
        happens again and again.
        """
        self._members.remove(m)
        self._kill(m)
        left = list(m.work.values())
        samples = sum(len(w.missing) for w in left)
        self._losses += 1
        self.counters.workers_lost += 1
        self.counters.reissued += samples
        self._say("worker lost", m, why=why, requests=len(left), samples=samples)
        for w in left:
            w.losses += 1
            if w.losses > self._cfg.retries:
                raise MachineError(
                    f"a request of {len(w.request.prompt)} prompt tokens was on {w.losses} workers that were lost; "
                    f"the last, {m.name}: {why}; Ray's logs: {self._session.log_dir}"
                )
        if self._losses > self._cfg.retries + self._cfg.workers:
            raise MachineError(
                f"{self._losses} workers were lost without a sample finished in between; the last, {m.name}: {why}; "
                f"Ray's logs: {self._session.log_dir}"
            )
        self._waiting.extendleft(reversed(left))
        fresh = self._start()
        self._load(fresh)
        self._say("worker started", fresh, instead_of=m.name)

    def _kill(self, m: Member) -> None:
        """At once, also when it is stopped and hears nothing."""
        with suppress(Exception):
            ray.kill(m.actor)
        if m.pid is not None and m.node == ray.get_runtime_context().get_node_id():
            with suppress(ProcessLookupError):
                os.kill(m.pid, signal.SIGKILL)

    def _say(self, event: str, m: Member, **more: Any) -> None:
        told = {"event": event, "worker": m.name, **more}
        self.events.append(told)
        self._on_event(told)


def _reason(error: Exception) -> str:
    """One line. Ray's own messages go on for twenty."""
    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
        return "its process is gone"
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    line = (str(cause).splitlines() or [""])[0]
    return line if isinstance(cause, MachineError) else f"{type(cause).__name__}: {line}"
