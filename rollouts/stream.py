"""Engines that were made to answer a batch, behind the StreamingEngine door: work in, samples out as they finish."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count
from time import monotonic

from cabochon.protocols import Finished, PolicyEngine, StreamingEngine, Weights
from cabochon.rollouts.local import LocalEngine
from cabochon.types import Completion, Request

POLL_SECONDS = 1.0


def in_order(engine: StreamingEngine, requests: Sequence[Request]) -> tuple[list[Completion], list[Finished]]:
    """All samples of all requests, in order; and what of other requests finished meanwhile."""
    tickets = {ticket: i for i, ticket in enumerate(engine.submit(requests))}
    found: dict[tuple[int, int], Completion] = {}
    others: list[Finished] = []
    while len(found) < sum(r.sampling.n for r in requests):
        for f in engine.poll(POLL_SECONDS):
            if f.ticket in tickets:
                found[tickets[f.ticket], f.sample] = f.completion
            else:
                others.append(f)
    return [found[key] for key in sorted(found)], others


def named(request: Request, index: int) -> str:
    """Which one it is, in messages."""
    return f"request {index}" if request.task is None else f"task {request.task.id!r}"


class LocalStream:
    """A LocalEngine; it draws while somebody polls."""

    def __init__(self, engine: LocalEngine):
        self._engine = engine
        self._outbox: list[Finished] = []

    @property
    def version(self) -> int:
        return self._engine.version

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        out, others = in_order(self, requests)
        self._outbox = others + self._outbox
        return out

    def load(self, weights: Weights) -> None:
        self._engine.load(weights)

    def submit(self, requests: Sequence[Request]) -> list[int]:
        sampler = self._engine.sampler
        work = [sampler.prepare(request, named(request, i)) for i, request in enumerate(requests)]
        return [sampler.submit(w) for w in work]

    def poll(self, seconds: float) -> list[Finished]:
        deadline = monotonic() + seconds
        while self._engine.sampler.busy and not self._outbox:
            self._outbox += [Finished(*f) for f in self._engine.sampler.step()]
            if monotonic() >= deadline:
                break
        out, self._outbox = self._outbox, []
        return out

    def abort(self, tickets: Sequence[int]) -> None:
        self._engine.sampler.abort(tickets)
        self._outbox = [f for f in self._outbox if f.ticket not in set(tickets)]


class RequestStream:
    """Any PolicyEngine, one request at a time."""

    def __init__(self, engine: PolicyEngine):
        self._engine = engine
        self._count = count(1)
        self._waiting: deque[tuple[int, Request]] = deque()

    @property
    def version(self) -> int:
        return self._engine.version

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return self._engine.generate(requests)

    def load(self, weights: Weights) -> None:
        self._engine.load(weights)

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """A request that cannot be met is refused by `poll`."""
        given = [(next(self._count), request) for request in requests]
        self._waiting += given
        return [ticket for ticket, _ in given]

    def poll(self, seconds: float) -> list[Finished]:
        if not self._waiting:
            return []
        ticket, request = self._waiting.popleft()
        return [Finished(ticket, i, c) for i, c in enumerate(self._engine.generate([request]))]

    def abort(self, tickets: Sequence[int]) -> None:
        self._waiting = deque(w for w in self._waiting if w[0] not in set(tickets))
