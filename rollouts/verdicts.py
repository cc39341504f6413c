"""Verdicts under way: threads that ask the judge, each with a deadline of its own."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from time import monotonic
from typing import Generic, Protocol, TypeVar, runtime_checkable

from cabochon.types import Task, Verdict

Key = TypeVar("Key")


@runtime_checkable
class Judge(Protocol):
    """What a VerifierPool is to us."""

    def verify_one(self, task: Task, text: str) -> Verdict:
        """Never raises; safe to call from several threads."""
        ...


@dataclass(kw_only=True, eq=False)
class _Asked(Generic[Key]):
    key: Key
    task: Task
    text: str
    began: float | None = None
    """when a thread took it up; None while it waits for one"""


class Verdicts(Generic[Key]):
    """Asked for by a key, and handed over with it. Not thread-safe; the threads of its own only wait for the judge."""

    def __init__(self, judge: Judge, *, threads: int, retries: int, deadline_seconds: float):
        """An infra_error is tried again `retries` times; it then stays the verdict, as it does `deadline_seconds` after
        a thread took the text up, however long it waited for one."""
        self.repeated = self.late = 0
        """asked for again after an infra_error, given up at the deadline"""
        self._judge, self._threads, self._retries, self._deadline = judge, threads, retries, deadline_seconds
        self._waiting: dict[Future[tuple[Verdict, int]], _Asked[Key]] = {}
        self._pool = self._new_pool()

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, key: Key, task: Task, text: str) -> None:
        self._submit(_Asked(key=key, task=task, text=text))

    def wait(self, seconds: float) -> None:
        """For one to come, or that long."""
        wait(self._waiting, timeout=seconds, return_when="FIRST_COMPLETED")

    def take(self) -> list[tuple[Key, Verdict]]:
        """Those that have come, or are given up."""
        taken, late = [], False
        for future, asked in list(self._waiting.items()):
            if future.done():
                verdict, repeated = future.result()
                self.repeated += repeated
            elif asked.began is not None and monotonic() > asked.began + self._deadline:
                verdict, late = failed(f"no verdict within {self._deadline:g} s"), True
                self.late += 1
            else:
                continue
            del self._waiting[future]
            taken.append((asked.key, verdict))
        if late:
            self._renew()
        return taken

    def forget(self) -> None:
        for future in self._waiting:
            future.cancel()
        self._waiting = {}

    def close(self) -> None:
        """Those in hand are not waited for."""
        self.forget()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="collect")

    def _submit(self, asked: _Asked[Key]) -> None:
        self._waiting[self._pool.submit(self._verdict, asked)] = asked

    def _verdict(self, asked: _Asked[Key]) -> tuple[Verdict, int]:
        """And how often it was asked for again."""
        asked.began = monotonic()
        verdict, repeated = self._judge.verify_one(asked.task, asked.text), 0
        while verdict.status == "infra_error" and repeated < self._retries:
            verdict, repeated = self._judge.verify_one(asked.task, asked.text), repeated + 1
        return verdict, repeated

    def _renew(self) -> None:
        """Threads in place of those that hang. What is being judged ends where it is; what waits is taken along."""
        old, self._pool = self._pool, self._new_pool()
        for future in [f for f in self._waiting if f.cancel()]:
            self._submit(self._waiting.pop(future))
        old.shutdown(wait=False)


def failed(detail: str) -> Verdict:
    """The machine's doing: the rollout is masked."""
    return Verdict(score=None, status="infra_error", detail=detail)
