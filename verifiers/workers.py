"""Killable worker processes: one function call, one deadline, and a verdict on what happened to it.

Why not threads or SIGALRM: a thread cannot be killed inside `9**9**9`, and a signal works on the main thread only,
which is not where a Ray actor runs. Why not multiprocessing: its children inherit the environment (secrets) and
import the caller's `__main__`, and forking a process in which JAX has started threads can deadlock. Here a fresh
interpreter with a clean environment (the *zygote*, see `worker_main`) imports once and forks; nothing of the owner is
in it but its `sys.path`. A pool can be used from any thread of the process that made it.

A deadline starts when a worker starts on the item: waiting for a free worker costs nothing. What is killed is replaced.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cabochon.verifiers.worker_main import HEADER, REPLY_LIMIT, cpu_seconds, encode, read_exactly, read_until
from cabochon.verifiers.zygote import MachineFailure, NotReady, Zygote

STALLED_SHARE = 0.05
"""A deadline missed with less than this share of it spent computing is put down to the machine."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one call.

    `done` carries the function's value. `timeout`, `oom`, `crash` (a fault such as a segmentation fault) and
    `recursion` are put down to the input. `infra_error` is the machine: the worker was killed from outside, was
    starved of CPU, could not be started, or the function itself raised.
    """

    status: Literal["done", "timeout", "oom", "crash", "recursion", "infra_error"]
    value: Any = None
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class WorkerStats:
    """Counts since the pool was made."""

    calls: int = 0
    timeouts: int = 0
    ooms: int = 0
    crashes: int = 0
    killed: int = 0
    """workers killed by somebody else"""
    stalled: int = 0
    """deadlines missed without using the CPU: the machine's doing"""
    raised: int = 0
    """calls in which the function itself raised"""
    replaced: int = 0
    infra_errors: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How workers are made. Pools are shared by equal configs (see `shared_pool`)."""

    size: int = field(default_factory=lambda: max(1, len(os.sched_getaffinity(0))))
    """most workers alive at once; they are made when needed"""
    memory_mib: int = 2048
    """cap on the address space of one worker"""
    preload: tuple[str, ...] = ()
    """modules the zygote imports before it forks, and functions ("module:function") it calls to warm them up"""
    prepare: tuple[str, ...] = ()
    """a function that each worker calls before its first item, and texts for it: what may start threads or processes,
    or take memory, has to do so there"""
    keep_environment: tuple[str, ...] = ()
    """names passed on from the environment; everything else is withheld, so that no secret is in reach"""
    start_seconds: float = 120.0
    """how long the interpreter may take to import `preload`, and a worker over `prepare`"""
    retries: int = 2
    """further tries after a machine failure"""

    def __post_init__(self) -> None:
        if self.size < 1 or self.memory_mib < 64 or self.retries < 0:
            raise ValueError(f"WorkerConfig needs size >= 1, memory_mib >= 64, retries >= 0, got {self}")


@dataclass(kw_only=True)
class _Worker:
    pid: int
    connection: socket.socket
    zygote_pid: int
    items: int = 0
    reaped: bool = False


class WorkerPool:
    """Workers behind one method, `call`."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self._lock = threading.Lock()  # guards _idle, _alive and _stats
        self._free = threading.Condition(self._lock)
        self._idle: list[_Worker] = []
        self._alive = 0
        self._stats = WorkerStats()
        self._zygote = Zygote(
            preload=config.preload, prepare=config.prepare, memory_mib=config.memory_mib,
            keep_environment=config.keep_environment, start_seconds=config.start_seconds,
        )
        self._ready = False  # once a worker was, a later one that takes too long is an accident
        self._not_ready = ""
        self._closed = False

    @property
    def stats(self) -> WorkerStats:
        with self._lock:
            return self._stats

    def call(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        deadline: float,
        single_use: bool = False,
        on_stall: Literal["retry", "fail", "timeout"] = "retry",
    ) -> Outcome:
        """Run `target` ("package.module:function") with JSON-able keyword arguments in a worker.

        `single_use` gives the item a worker of its own that dies afterwards. `on_stall`: a deadline missed without
        using the CPU is the machine's doing and tried again, or not (where the item would wait again), or it is the
        item's own (where it can sleep). Never raises for what the function does; blocks while all workers are busy.
        """
        try:
            number = secrets.token_hex(8)  # the reply must carry it: one left over from another item is never taken
            request = encode({"id": number, "target": target, "arguments": dict(arguments)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{target}: arguments must be plain data: {error}") from error
        failed = Outcome(status="infra_error")
        for _ in range(self.config.retries + 1):
            worker = None
            start = time.monotonic()
            try:
                worker = self._take()
                start = time.monotonic()
                before = worker.items
                outcome = self._converse(worker, number, request, deadline, on_stall)
            except (MachineFailure, OSError) as error:
                failed = Outcome(status="infra_error", detail=str(error))
                if worker is not None:
                    self._discard(worker)
                if isinstance(error, NotReady):
                    break
                continue
            except BaseException:
                if worker is not None:
                    self._discard(worker)
                raise
            if outcome.status in ("done", "recursion") or (outcome.status == "infra_error" and worker.items > before):
                self._give_back(worker, discard=single_use)
            else:
                self._discard(worker)
                if outcome.status == "oom" and before:  # memory left over from earlier items may be to blame
                    failed = outcome
                    continue
            failed = outcome
            break
        self._count(failed)
        return replace(failed, seconds=time.monotonic() - start)

    def close(self) -> None:
        """Kill every worker and the zygote. Calls in flight come back as `infra_error`."""
        with self._free:
            self._closed = True
            idle, self._idle = self._idle, []
            self._free.notify_all()
        for worker in idle:
            worker.connection.close()
        self._zygote.close()

    # ------------------------------------------------------------------------------------------ one conversation

    def _converse(self, worker: _Worker, number: str, request: bytes, deadline: float, on_stall: str) -> Outcome:
        until = time.monotonic() + deadline
        cpu = cpu_seconds(worker.pid)
        try:
            worker.connection.settimeout(deadline)
            worker.connection.sendall(request)
            header = read_until(worker.connection, HEADER.size, until)
            (length,) = HEADER.unpack(header)
            if length > REPLY_LIMIT:
                return Outcome(status="crash", detail="the worker sent an oversized reply")
            reply = json.loads(read_until(worker.connection, length, until))
        except TimeoutError:
            used = cpu_seconds(worker.pid) - cpu
            if used < STALLED_SHARE * deadline and on_stall != "timeout":
                self._add(stalled=1)
                detail = f"the worker got {used:.1f} s of CPU in {deadline:g} s: starved, or waiting for something"
                if on_stall == "fail":
                    return Outcome(status="infra_error", detail=detail)
                raise MachineFailure(detail) from None
            return Outcome(status="timeout", detail=f"no verdict within {deadline:g} s")
        except (EOFError, ConnectionError):
            return self._post_mortem(worker)
        except (ValueError, RecursionError) as error:
            return Outcome(status="crash", detail=f"the worker sent garbage: {error}"[:300])
        if not isinstance(reply, dict) or reply.get("id") != number:
            raise MachineFailure("the worker answered out of turn")
        worker.items += 1
        match reply:
            case {"value": value}:
                return Outcome(status="done", value=value)
            case {"error": "oom", "detail": str(detail)}:
                return Outcome(status="oom", detail=detail)
            case {"error": "recursion", "detail": str(detail)}:
                return Outcome(status="recursion", detail=detail)
            case {"error": "exception", "detail": str(detail)}:
                self._add(raised=1)
                return Outcome(status="infra_error", detail=detail, value=reply.get("traceback"))
        return Outcome(status="crash", detail="the worker sent a reply of no known form")

    def _post_mortem(self, worker: _Worker) -> Outcome:
        """Why a worker is gone: a fault is the item's doing, a kill from outside is not."""
        status = self._reap(worker)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) not in (signal.SIGKILL, signal.SIGTERM):
            number = os.WTERMSIG(status)  # of the real-time ones only two have names
            name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
            return Outcome(status="crash", detail=f"the worker died of {name}")
        self._add(killed=1)
        raise MachineFailure(f"the worker was killed mid-item (wait status {status})")

    def _count(self, outcome: Outcome) -> None:
        name = {"timeout": "timeouts", "oom": "ooms", "crash": "crashes", "infra_error": "infra_errors"}
        self._add(calls=1, **({name[outcome.status]: 1} if outcome.status in name else {}))

    def _add(self, **counts: int) -> None:
        with self._lock:
            self._stats = replace(
                self._stats, **{name: getattr(self._stats, name) + more for name, more in counts.items()}
            )

    # ------------------------------------------------------------------------------------------ taking and giving

    def _take(self) -> _Worker:
        """An idle worker, or a new one while there is room, else wait."""
        with self._free:
            while not self._idle and self._alive >= self.config.size and not self._closed:
                self._free.wait()
            if self._closed:
                raise MachineFailure("the worker pool is closed")
            if self._idle:
                return self._idle.pop()
            self._alive += 1
        try:
            return self._fork()
        except BaseException:
            with self._free:
                self._alive -= 1
                self._free.notify()
            raise

    def _give_back(self, worker: _Worker, *, discard: bool) -> None:
        if discard or self._closed:
            self._discard(worker, counted=False)
            return
        with self._free:
            self._idle.append(worker)
            self._free.notify()

    def _discard(self, worker: _Worker, *, counted: bool = True) -> None:
        """Kill and reap; the next `_take` makes another."""
        self._reap(worker)
        with self._free:
            self._alive -= 1
            if counted:
                self._stats = replace(self._stats, replaced=self._stats.replaced + 1)
            self._free.notify()

    def _fork(self) -> _Worker:
        if self._not_ready:
            raise NotReady(self._not_ready)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                pid, zygote_pid = self._zygote.fork(theirs)
            worker = _Worker(pid=pid, connection=ours, zygote_pid=zygote_pid)
            try:
                ours.settimeout(self.config.start_seconds)
                (length,) = HEADER.unpack(read_exactly(ours, HEADER.size))
                read_exactly(ours, length)
            except (EOFError, OSError) as error:
                self._reap(worker)
                if isinstance(error, TimeoutError):
                    what = " ".join(self.config.prepare)
                    raise NotReady(f"a worker was not done with {what} in {self.config.start_seconds:g} s") from error
                raise MachineFailure(f"cannot make a worker: {error}") from error
        except BaseException as error:
            ours.close()
            if isinstance(error, NotReady) and not self._ready:
                self._not_ready = str(error)
            raise
        self._ready = True
        return worker

    def _reap(self, worker: _Worker) -> int:
        """Kill the worker's process group, close its connection, collect its wait status (0 if it is not to be had)."""
        worker.connection.close()
        if worker.reaped:
            return 0
        worker.reaped = True
        return self._zygote.reap(worker.pid, worker.zygote_pid)


_SHARED: dict[tuple[int, WorkerConfig], WorkerPool] = {}
_SHARED_LOCK = threading.Lock()


def shared_pool(config: WorkerConfig) -> WorkerPool:
    """The pool of this process for `config`, made on first use. A forked process gets its own."""
    with _SHARED_LOCK:
        key = (os.getpid(), config)
        if key not in _SHARED:
            _SHARED[key] = WorkerPool(config)
        return _SHARED[key]


def close_shared_pools() -> None:
    """Close the pools this process made; a later `shared_pool` makes new ones."""
    with _SHARED_LOCK:
        for key in [key for key in _SHARED if key[0] == os.getpid()]:
            _SHARED.pop(key).close()


atexit.register(close_shared_pools)
