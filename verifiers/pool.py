"""Many completions at once, in order, with a proof that grading works here before a run may start.

The threads below only wait; what is killed at a deadline are the worker processes and sandboxes behind the verifier.
This is the one place where an exception becomes a verdict: an `infra_error`, which carries no score, so that a broken
grader can never look like a wrong answer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from time import monotonic, sleep

from cabochon.errors import MachineError
from cabochon.protocols import Verifier
from cabochon.types import Status, Task, Verdict
from cabochon.verifiers.base import Probe, infra_error
from cabochon.verifiers.workers import close_shared_pools


class GradingBroken(MachineError):
    """The verifier does not tell a right answer from a blank one in this process: the run must not start."""


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """Counts since the pool was made."""

    items: int = 0
    statuses: dict[Status, int] = field(default_factory=dict)
    retried: int = 0
    seconds: float = 0.0
    """summed over items"""


class VerifierPool:
    """A verifier over many items.

    Example: `VerifierPool(verifier=MathVerifier(), probes=[probe], concurrency=2).verify(tasks, texts)`.
    """

    def __init__(
        self, *, verifier: Verifier, probes: Sequence[Probe], concurrency: int = 2, retries: int = 1
    ) -> None:
        """Proves the verifier in this very process first. Raises GradingBroken if it fails, ValueError without
        probes.
        """
        if not probes:
            raise ValueError("VerifierPool needs at least one probe: a task with an answer known to be right")
        self._start(verifier, concurrency, retries)
        try:
            self.prove(probes)
        except BaseException:
            self.close()
            raise

    @classmethod
    def unproven(cls, *, verifier: Verifier, concurrency: int = 2, retries: int = 1) -> VerifierPool:
        """A pool that has proved nothing: to look at verdicts with, never to train on."""
        pool = cls.__new__(cls)
        pool._start(verifier, concurrency, retries)
        return pool

    def _start(self, verifier: Verifier, concurrency: int, retries: int) -> None:
        if concurrency < 1 or retries < 0:
            raise ValueError(f"VerifierPool needs concurrency >= 1 and retries >= 0, got {concurrency} and {retries}")
        self.verifier = verifier
        self._retries = retries
        self._lock = threading.Lock()
        self._stats = PoolStats()
        self._in_hand = 0
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="verify")

    @property
    def stats(self) -> PoolStats:
        with self._lock:
            return self._stats

    def verify(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Verdict]:
        """One verdict per pair, in their order."""
        if len(tasks) != len(texts):
            raise ValueError(f"{len(tasks)} tasks for {len(texts)} texts")
        return list(self._threads.map(self.verify_one, tasks, texts))

    def verify_one(self, task: Task, text: str) -> Verdict:
        """The verdict on one item; never raises."""
        with self._lock:
            self._in_hand += 1
        try:
            return self._verify_one(task, text)
        finally:
            with self._lock:
                self._in_hand -= 1

    def _verify_one(self, task: Task, text: str) -> Verdict:
        start = monotonic()
        verdict = infra_error("not tried")
        for attempt in range(self._retries + 1):
            try:
                verdict = self.verifier.verify(task, text)
                break
            except ValueError as error:  # by the door's contract: the task itself is unusable; trying again is no use
                verdict = infra_error(f"unusable task: {error}")
                break
            except Exception as error:  # the grader failed, not the model: retried, then reported without a score
                verdict = infra_error(f"{type(error).__name__}: {error}")
                if attempt < self._retries:
                    with self._lock:
                        self._stats = replace(self._stats, retried=self._stats.retried + 1)
        verdict = replace(verdict, seconds=monotonic() - start) if verdict.seconds == 0 else verdict
        with self._lock:
            counts = dict(self._stats.statuses)
            counts[verdict.status] = counts.get(verdict.status, 0) + 1
            self._stats = replace(
                self._stats, items=self._stats.items + 1, statuses=counts, seconds=self._stats.seconds + verdict.seconds
            )
        return verdict

    def prove(self, probes: Sequence[Probe]) -> None:
        """Gold must score 1, blank and garbage 0, through the same threads and workers as the run's items. Where no
        gold is known, both and the candidates must get a verdict that is no failure of the machine."""
        wanted = [
            (probe, what, text, score)
            for probe in probes
            for what, text, score in (
                ("gold", probe.gold, 1.0), ("blank", probe.blank, 0.0), ("garbage", probe.garbage, 0.0),
                *(("right", text, 1.0) for text in probe.candidates),
            )
            if text is not None
        ]
        verdicts = self.verify([probe.task for probe, *_ in wanted], [text for _, _, text, _ in wanted])
        for (probe, what, _, score), verdict in zip(wanted, verdicts, strict=True):
            if probe.gold is None:
                if verdict.status == "infra_error":
                    raise GradingBroken(
                        f"{probe.task.verifier} fails on the {what} answer of task {probe.task.id}: {verdict.detail}"
                    )
            elif verdict.score != score:
                raise GradingBroken(
                    f"grading does not work in this process: the {what} answer of task {probe.task.id} must score "
                    f"{score:g}, got {verdict.score} ({verdict.status}: {verdict.detail})"
                )

    def close(self) -> None:
        """Let the items in hand finish and stop the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After Ctrl-C nobody waits for the items in hand: the workers of this process are killed with them."""
        if kind is KeyboardInterrupt:
            self._threads.shutdown(wait=False, cancel_futures=True)
            while self._in_hand:
                close_shared_pools()  # again: an item that had just begun makes a new one
                sleep(0.05)
        self.close()
