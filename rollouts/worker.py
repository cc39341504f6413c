"""RolloutWorker: a sampler in a process of its own. A Ray actor in production, an ordinary object in a test.

A thread runs the sampler; the methods leave orders for it and take what it finished, so new work and new weights arrive
between two dispatches and generation goes on while the learner is busy. This module imports no jax: the number of
threads has to be set before jax starts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

import ray

from cabochon.errors import MachineError
from cabochon.heap import give_back, keep_pages
from cabochon.model.config import ModelConfig
from cabochon.protocols import Finished, WeightStore
from cabochon.tokenizer import Tokenizer
from cabochon.types import Request

if TYPE_CHECKING:
    from cabochon.rollouts.sampler import Sampler

FETCHES = 2
"""times a version is fetched before it counts as lost"""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PJRT_NPROC", "NPROC")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a worker has to say."""

    done: list[Finished] = field(default_factory=list)
    failure: str = ""
    """why its sampler has stopped for good; empty while it runs"""
    stalled: float = 0.0
    """seconds since the dispatch in hand began"""
    reused_tokens: int = 0
    """of prompts, whose keys and values it still had; since it began"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a worker runs."""

    pid: int
    node: str
    """Ray's id of it"""


class RolloutWorker:
    """Serves nothing until `load` was called."""

    def __init__(self, name: str, model: ModelConfig, tokenizer: Tokenizer, slots: Any, threads: int):
        """`slots` is a SlotConfig; `threads` at most, for jax and BLAS."""
        os.environ.update({name: str(threads) for name in _THREADS})
        keep_pages()
        import cabochon.rollouts.probe  # noqa: F401  (takes seconds, which the engine uses to publish)

        self.name, self._model, self._tokenizer, self._slots = name, model, tokenizer, slots
        self._changed = threading.Condition()
        self._given: list[tuple[int, Request]] = []
        self._dropped: set[int] = set()
        self._done: list[Finished] = []
        self._tickets: dict[int, tuple[int, int]] = {}
        """of the sampler -> ours, and samples to come"""
        self._incoming: Sampler | None = None
        self._failure = ""
        self._since: float | None = None
        self._sampler: Sampler | None = None

    def load(self, store: WeightStore, version: int, seconds: float) -> Place:
        """Fetch a version, check it and use it from the next dispatch on; generation continues meanwhile.

        Raises WeightsError naming this worker, the version and what is wrong with it,
        MachineError when the running dispatch does not end within `seconds`.
        """
        from cabochon.rollouts.probe import check_probe
        from cabochon.rollouts.sampler import Sampler
        from cabochon.rollouts.weights import WeightsError

        for attempt in range(FETCHES):
            try:
                weights = store.fetch(version)
                trial = Sampler(self._model, weights.params, self._tokenizer, self._slots, version)
                if weights.probe is not None:
                    check_probe(trial, weights.probe)
                break
            except WeightsError as error:
                if attempt == FETCHES - 1:
                    raise WeightsError(f"{self.name}: {error}") from None
        with self._changed:
            if self._sampler is None:
                self._sampler = trial
                threading.Thread(target=self._run, args=(trial,), name="sampler", daemon=True).start()
            else:
                self._incoming = trial
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: self._incoming is None or self._failure, seconds):
                    raise MachineError(f"{self.name}: the dispatch in hand did not end within {seconds:g} s")
        del trial
        give_back(weights.params)
        return Place(pid=os.getpid(), node=ray.get_runtime_context().get_node_id())

    def give(self, work: Sequence[tuple[int, Request]]) -> None:
        """Queue requests under these tickets."""
        with self._changed:
            self._given += work
            self._changed.notify_all()

    def drop(self, tickets: Sequence[int]) -> None:
        """Do not go on with these. What finishes at this very moment may still be reported."""
        with self._changed:
            self._dropped |= set(tickets)
            self._changed.notify_all()

    def poll(self, seconds: float) -> Report:
        """What finished since the last call; waits up to `seconds` for something."""
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._failure, seconds)
            done, self._done = self._done, []
            sampler, since = self._sampler, self._since
            return Report(
                done=done,
                failure=self._failure,
                stalled=monotonic() - since if since is not None else 0.0,
                reused_tokens=sampler.counters.reused_tokens if sampler else 0,
            )

    def _run(self, sampler: Sampler) -> None:
        try:
            while True:
                self._dispatch(sampler)
        except BaseException as error:  # told at the next poll; the engine replaces the worker
            with self._changed:
                self._failure = f"{type(error).__name__}: {error}"
                self._changed.notify_all()

    def _dispatch(self, sampler: Sampler) -> None:
        with self._changed:
            # without a deadline: who has nothing to do waits for work, and ends with the process
            self._changed.wait_for(lambda: self._given or self._dropped or self._incoming is not None or sampler.busy)
            given, self._given = self._given, []
            dropped, self._dropped = self._dropped, set()
            incoming = self._incoming
            self._since = monotonic()
        if incoming is not None:
            sampler.take_over(incoming)
            with self._changed:
                self._incoming = None
                self._changed.notify_all()
        for ticket, request in given:
            self._tickets[sampler.submit(sampler.prepare(request))] = ticket, request.sampling.n
        if dropped:
            gone = [mine for mine, (ticket, _) in self._tickets.items() if ticket in dropped]
            sampler.abort(gone)
            self._tickets = {mine: kept for mine, kept in self._tickets.items() if mine not in gone}
        finished = []
        for mine, sample, completion in sampler.step():
            ticket, left = self._tickets.pop(mine)
            finished.append(Finished(ticket, sample, completion))
            if left > 1:
                self._tickets[mine] = ticket, left - 1
        with self._changed:
            self._done += finished
            self._since = None
            self._changed.notify_all()
