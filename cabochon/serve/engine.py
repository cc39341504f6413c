"""The one thread that owns the sampler: jobs come in from any thread, what happens to them goes out as events.

Every job that waits has a place in the slots or in the queue before them, and the number of places is fixed: what does
not fit is refused at once (`Busy`). A job that is cancelled frees its slots at the next dispatch. A job that cannot
begin fails alone. Where the sampler fails, everybody who waits is told and the thread ends: a model that gives no
numbers will not give any later either.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np

from cabochon.rollouts.prompts import Prepared
from cabochon.rollouts.sampler import Sampler
from cabochon.rollouts.score import Scorer, Scores
from cabochon.types import Completion

IDLE_SECONDS = 0.5
STOP_SECONDS = 60.0
"""a dispatch may take that long"""
STOPPING = "the server is stopping"


class Piece(NamedTuple):
    """All tokens of a sample so far; sent for jobs that stream."""

    sample: int
    tokens: np.ndarray


class Ended(NamedTuple):
    """A sample is done."""

    sample: int
    completion: Completion | None
    """None where nothing was to be drawn"""
    scores: Scores | None
    """of the prompt and what followed it, where they were asked for"""


class Failed(NamedTuple):
    """Nothing more comes of the job."""

    detail: str
    stopping: bool = False
    """nothing is wrong: the server ends"""


Event = Piece | Ended | Failed


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A prompt to continue `work.sampling.n` times."""

    work: Prepared
    emit: Callable[[Event], None]
    """called by the engine's thread, so it hands over and returns"""
    stream: bool = False
    scored: bool = False
    """score prompt and continuation as they stand when a sample has ended"""
    draw: bool = True
    """False: nothing is drawn, only the prompt is scored"""

    @property
    def samples(self) -> int:
        return self.work.sampling.n if self.draw else 1


class Busy(Exception):
    """There is no place left now."""


class Stopped(Exception):
    """The engine takes no work any more; the message says why."""


class Status(NamedTuple):
    """Samples that have a slot or wait for one, by their jobs' number of samples."""

    slots: int
    places: int
    unfinished: int
    failure: str


class ServingEngine:
    """Example: `engine = ServingEngine(sampler, queue=64); engine.start(); ...; engine.stop()`."""

    def __init__(self, sampler: Sampler, *, queue: int, on_failure: Callable[[], None] = lambda: None):
        """`queue`: samples that may wait beside those that have a slot."""
        self.sampler, self.places = sampler, sampler.cfg.slots + queue
        self.on_failure = on_failure
        """called once, by the engine's thread, where the sampler failed"""
        self.failure = ""
        self._scorer = Scorer(sampler)
        self._left: dict[Job, int] = {}
        """samples each unfinished job still owes; under the lock, as are all that want a place"""
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._closed = False
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._jobs: dict[int, Job] = {}
        """by the sampler's ticket"""
        self._texts: deque[_Text] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = STOP_SECONDS) -> bool:
        """End the thread after its dispatch; jobs that are left get `Failed`. False where it did not end in time."""
        self._stopping.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them or none. Raises Busy where there are not places enough now, Stopped where there never will be."""
        with self._lock:
            if self._closed:
                raise Stopped(self.failure or STOPPING)
            wanted = sum(job.samples for job in jobs)
            if sum(self._left.values()) + wanted > self.places:
                raise Busy(f"{sum(self._left.values())} samples are under way or waiting, of {self.places} at most")
            for job in jobs:
                self._left[job] = job.samples
                self._orders.put(partial(self._admit, job))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop what is left of them; nothing happens to those that have ended."""
        self._orders.put(partial(self._drop, tuple(jobs)))

    def status(self) -> Status:
        with self._lock:
            return Status(self.sampler.cfg.slots, self.places, sum(self._left.values()), self.failure)

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._take_orders()
                if self.sampler.busy:
                    for ticket, sample, completion in self.sampler.step(self._watch):
                        self._drawn(self._jobs[ticket], sample, completion)
                if self._texts:
                    self._read_on(self._texts[0])
        except Exception as error:  # whatever it is, those who wait must hear of it
            self.failure = _line(error)
        with self._lock:
            self._closed = True
            left = list(self._left)
            self._left.clear()
        for job in left:
            job.emit(Failed(f"the model cannot go on: {self.failure}") if self.failure else Failed(STOPPING, True))
        if self.failure:
            self.on_failure()

    def _take_orders(self) -> None:
        try:
            if not self.sampler.busy and not self._texts:
                self._orders.get(timeout=IDLE_SECONDS)()
            while True:
                self._orders.get_nowait()()
        except Empty:
            return

    def _admit(self, job: Job) -> None:
        if job.draw:
            try:
                self._jobs[self.sampler.submit(job.work)] = job
            except Exception as error:  # its settings; the others' are none the worse
                self._drop((job,))
                job.emit(Failed(f"the request cannot begin: {_line(error)}"))
        else:
            self._texts.append(_Text(job, 0, None, self._scorer.by_chunks(job.work.tokens)))

    def _drop(self, jobs: Sequence[Job]) -> None:
        tickets = [ticket for ticket, job in self._jobs.items() if job in jobs]
        self.sampler.abort(tickets)
        for ticket in tickets:
            del self._jobs[ticket]
        self._texts = deque(text for text in self._texts if text.job not in jobs)
        with self._lock:
            for job in jobs:
                self._left.pop(job, None)

    def _watch(self, ticket: int, sample: int, tokens: np.ndarray) -> None:
        if (job := self._jobs[ticket]).stream:
            job.emit(Piece(sample, tokens))

    def _drawn(self, job: Job, sample: int, completion: Completion) -> None:
        if job.scored:
            text = np.concatenate([job.work.tokens, completion.tokens])
            self._texts.append(_Text(job, sample, completion, self._scorer.by_chunks(text)))
        else:
            self._ended(job, Ended(sample, completion, None))

    def _read_on(self, text: _Text) -> None:
        scores = next(text.reading)
        if scores is not None:
            self._texts.popleft()
            self._ended(text.job, Ended(text.sample, text.completion, scores))

    def _ended(self, job: Job, event: Ended) -> None:
        with self._lock:
            self._left[job] -= 1
            if over := not self._left[job]:
                del self._left[job]
        if over:
            self._jobs = {ticket: other for ticket, other in self._jobs.items() if other is not job}
        job.emit(event)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class _Text(NamedTuple):
    """A text that is being scored."""

    job: Job
    sample: int
    completion: Completion | None
    reading: Iterator[Scores | None]
