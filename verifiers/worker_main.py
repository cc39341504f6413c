"""What runs in the killable processes: a zygote that imports once and forks, and the loop of one worker.

The zygote is started by `workers.WorkerPool` with a clean environment, imports the heavy modules (sympy), and forks a
worker per request of the owner, so that a replacement costs milliseconds instead of seconds. It reaps a worker only
when the owner asks for it: a process id that the owner still holds can therefore never be reused for a stranger.

Requests and replies are length-prefixed JSON: a worker may have been turned by what a model wrote, so the owner never
unpickles anything from it. Standard library only, since this file is imported before anything else.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

HEADER = struct.Struct("!Q")
"""Length of the JSON that follows, in bytes."""

REPLY_LIMIT = 8 << 20
"""No verdict needs more bytes than this; a longer reply is reported as a crash."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def read_exactly(connection: socket.socket, count: int) -> bytes:
    """`count` bytes, or EOFError when the other side is gone."""
    parts = bytearray()
    while len(parts) < count:
        chunk = connection.recv(min(count - len(parts), 1 << 20))
        if not chunk:
            raise EOFError("the other side closed the connection")
        parts += chunk
    return bytes(parts)


def read_until(connection: socket.socket, count: int, until: float) -> bytes:
    """Like `read_exactly`, against one deadline for all of it."""
    parts = bytearray()
    while len(parts) < count:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        chunk = connection.recv(min(count - len(parts), 1 << 20))
        if not chunk:
            raise EOFError
        parts += chunk
    return bytes(parts)


def cpu_seconds(pid: int) -> float:
    """User and system time a process has used; 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def encode(message: Any) -> bytes:
    """JSON in ASCII with its length in front; lone surrogates survive as escapes."""
    body = json.dumps(message).encode("ascii")
    return HEADER.pack(len(body)) + body


def resolve(target: str) -> Callable[..., Any]:
    """`package.module:function` as a callable."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request. What the code under it raises becomes data here, once, for every verifier."""
    try:
        return {"value": resolve(request["target"])(**request["arguments"])}
    except MemoryError:
        return {"error": "oom", "detail": "the worker reached its memory cap"}
    except RecursionError:
        return {"error": "recursion", "detail": "nested too deeply for the judge"}
    except BaseException as error:  # the worker's door: what a grader raises, SystemExit too, is reported to the owner
        where = traceback.format_exc(limit=-4)[-2000:]
        detail = f"{type(error).__name__}: {_said(error)[:200]}{_place(error)}"
        return {"error": "exception", "detail": detail, "traceback": where}


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be had)"


def _place(error: BaseException) -> str:
    """` (file.py:12)`, the innermost line of a file that is neither installed nor ours: there its author can mend it.
    Empty where there is none."""
    others = (sys.prefix, sys.base_prefix, os.path.dirname(os.path.abspath(__file__)), "<")
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(others)]
    return f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""


def _reply(body: bytes) -> bytes:
    """The encoded answer to one encoded request, under the request's id."""
    number = ""
    try:
        request = json.loads(body)
        number = request["id"]
        reply = encode({"id": number, **_answer(request)})
    except MemoryError:
        reply = encode({"id": number, "error": "oom", "detail": "the worker reached its memory cap"})
    except (TypeError, ValueError) as error:
        reply = encode({"id": number, "error": "exception", "detail": f"the reply is not plain data: {error}"[:500]})
    if len(reply) > REPLY_LIMIT:
        reply = encode({"id": number, "error": "exception", "detail": f"the reply is {len(reply)} bytes long"})
    return reply


def _work(connection: socket.socket, prepare: list[str], memory_bytes: int, zygote_pid: int) -> None:
    """Call `prepare`, then serve requests until the owner closes the connection."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote_pid:  # killed before we asked to be killed with it
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)  # what a grader starts dies with it: the owner kills the group
    if prepare:
        resolve(prepare[0])(*prepare[1:])
    worker = os.getpid()
    connection.sendall(encode({"ready": worker}))
    while True:
        try:
            (length,) = HEADER.unpack(read_exactly(connection, HEADER.size))
            body = read_exactly(connection, length)
        except EOFError:
            return
        reply = _reply(body)
        if os.getpid() != worker:
            return  # a child that a grader forked and did not end: it does not answer in our place
        connection.sendall(reply)


def _fork_worker(control: socket.socket, connection: socket.socket, prepare: list[str], memory_bytes: int) -> int:
    zygote_pid = os.getpid()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # as the worker does, whoever comes first
        return pid
    status = 1
    try:
        control.close()
        _work(connection, prepare, memory_bytes, zygote_pid)
        status = 0
    finally:
        os._exit(status)  # never run the zygote's own exit handlers in a worker


def _reap(pid: int, patience: float = 10.0) -> int:
    """The wait status of a worker that has died or is dying; -1 if it will not."""
    until = time.monotonic() + patience
    while True:
        try:
            done, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return -1
        if done:
            return status
        if time.monotonic() > until:
            return -1
        time.sleep(0.0005)


def zygote(control_fd: int, preload: list[str], prepare: list[str], memory_bytes: int) -> None:
    """Import `preload` (and call what has a colon in it), then obey the owner.

    `F` with a socket forks a worker on it, `R` and a pid reaps one. At the end what the workers started ends, too.
    """
    control = socket.socket(fileno=control_fd)
    for target in preload:
        if ":" in target:
            resolve(target)()
        else:
            importlib.import_module(target)
    gc.collect()
    gc.freeze()  # keeps the imported pages shared after a fork
    workers: set[int] = set()
    try:
        control.send(b"K")
        _obey(control, workers, prepare, memory_bytes)
    except OSError:
        pass  # the owner is gone
    finally:
        for pid in workers:  # not reaped, so the numbers are still theirs
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        os._exit(0)  # whatever threads `preload` left; a worker dies with us: it asked the kernel for that


def _obey(control: socket.socket, workers: set[int], prepare: list[str], memory_bytes: int) -> None:
    """Fork and reap as told, until the owner is gone."""
    owner = os.getppid()
    while True:
        ready, _, _ = select.select([control], [], [], 5.0)
        if not ready:
            if os.getppid() != owner:
                return
            continue
        message, fds, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        if message[:1] == b"F":
            with socket.socket(fileno=fds[0]) as connection:
                pid = _fork_worker(control, connection, prepare, memory_bytes)
            workers.add(pid)
            control.send(struct.pack("!q", pid))
        else:
            (pid,) = struct.unpack("!q", message[1:9])
            workers.discard(pid)
            control.send(struct.pack("!q", _reap(pid)))
