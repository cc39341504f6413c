"""What every sandbox shares: hand over a program, wait, say how it ended; and the bounded retry of machine failures."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import TypeVar

from cabochon.verifiers.sandbox.base import Limits, Program, RunResult, RunStatus, SandboxError
from cabochon.verifiers.sandbox.session import Lost, Session
from cabochon.verifiers.sandbox.wire import MAX_FRAME

T = TypeVar("T")
ATTEMPTS = 3
PAUSE_SECONDS = 0.5


def retried(work: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """`work()`, tried again after a machine failure. Raises SandboxError after the last one."""
    for attempt in range(1, attempts + 1):
        try:
            return work()
        except (Lost, SandboxError) as e:
            if attempt == attempts:
                raise SandboxError(f"after {attempts} attempts: {e}") from e
            time.sleep(PAUSE_SECONDS * attempt)
    raise AssertionError("unreachable")


def run_in(session: Session, program: Program, limits: Limits) -> RunResult:
    """Runs `program` in `session` and closes it. Raises Lost."""
    with session:
        session.begin("run", limits, files=dict(program.files), argv=list(program.argv), stdin=program.stdin)
        finished = session.drain()
        seconds = session.seconds
        stdout = bytes(session.stdout[: limits.output_bytes])
        flooded = len(session.stdout) > limits.output_bytes
        if not finished:
            session.kill()
        status, detail = _status(session, limits, finished=finished, flooded=flooded)
        stderr = bytes(session.stderr[-limits.output_bytes :])
        code = session.ended.code if session.ended and finished else None
    return RunResult(
        status=status, exit_code=code, stdout=stdout, stderr=stderr, seconds=seconds, detail=detail, truncated=flooded
    )


def _status(session: Session, limits: Limits, *, finished: bool, flooded: bool) -> tuple[RunStatus, str]:
    if flooded:
        return "crash", f"over {limits.output_bytes} bytes of output"
    if not finished:
        return "timeout", f"over {limits.wall_seconds:g} s"
    return ending(session, limits)


def ending(session: Session, limits: Limits) -> tuple[RunStatus, str]:
    """What the end of a session's process says, for one that ended by itself."""
    ended = session.ended
    if ended is None or ended.code == 0:
        return "ok", ""
    if ended.oom or session.error_tail(200).splitlines()[-1:] == ["MemoryError"]:
        return "oom", f"over {limits.memory_bytes >> 20} MiB"
    if ended.code == -signal.SIGXCPU:
        return "timeout", f"over {limits.cpu_seconds:g} CPU seconds"
    if ended.code < 0:
        return "crash", f"ended by signal {-ended.code}"
    return "crash", f"exit code {ended.code}"


def check_size(program: Program) -> RunResult | None:
    """A verdict without a run for a program too large to hand over."""
    size = len(program.stdin) + sum(map(len, program.files.values()))
    if size <= MAX_FRAME - (1 << 16):
        return None
    detail = f"the program and its input are {size} bytes, over the limit of {MAX_FRAME - (1 << 16)}"
    return RunResult(status="crash", exit_code=None, stdout=b"", stderr=b"", seconds=0.0, detail=detail)
