"""Sandboxes from Docker: a pool of containers that are started before they are needed and used once.

Process 1 of a container is ours and holds the host's connection (see inside.py): when the host is gone, or the time
over, it ends everything and the engine removes the container, so even `kill -9` of the owner leaves nothing. Threads
of this class start containers and look after those that should be gone; a run itself talks to one socket only.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable

import docker
import docker.errors

from cabochon.verifiers.sandbox.base import Limits, Program, RunResult, SandboxError
from cabochon.verifiers.sandbox.container import IDLE_SECONDS, LABEL, owner_label, reap, scripts, start
from cabochon.verifiers.sandbox.engine import FAILURES, connect, engine_errors
from cabochon.verifiers.sandbox.image import PUBLIC
from cabochon.verifiers.sandbox.inside import TRAILER
from cabochon.verifiers.sandbox.running import check_size, retried, run_in
from cabochon.verifiers.sandbox.seccomp import MACHINES, filter_bytes
from cabochon.verifiers.sandbox.session import START_SECONDS, Ended, Lost, Session
from cabochon.verifiers.sandbox.wire import frame

SWEEP_SECONDS = 60.0
_TRAILER_SIZE = len(TRAILER) + 16 + 8


class DockerSession(Session):
    """A container's streams, which the engine sends over one socket in pieces of (stream, length, bytes)."""

    def __init__(
        self, sock: socket.socket, output_bytes: int, container: str, why_gone: Callable[[], Ended | str]
    ) -> None:
        super().__init__(write_fd=sock.fileno(), output_bytes=output_bytes, kill=self._hang_up)
        self.sock = sock
        self.container = container
        self._why_gone = why_gone
        self._raw = bytearray()
        self._words: dict[int, Ended] = {}
        self._trailer = TRAILER + secrets.token_bytes(16)  # else a program could write the last words itself
        self.behind_order = frame(self._trailer[len(TRAILER) :])
        sock.setblocking(False)
        self.readers = {self.write_fd: self._on_pieces}
        self.open_streams = 2
        self.seccomp = {machine: filter_bytes(machine) for machine in MACHINES}

    def _hang_up(self) -> None:
        """Process 1 sees its standard input end and ends everything."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def beat(self) -> None:
        """Tells a waiting container that its owner is there."""
        with contextlib.suppress(OSError):
            self.sock.send(frame(b""))

    def stale(self) -> bool:
        """Whether a waiting container has ended meanwhile."""
        try:
            return self.pump(time.monotonic() + 0.001, lambda: self.over)
        except Lost:
            return True

    def _on_pieces(self, data: bytes) -> None:
        if not data:
            self._at_end()
            return
        self._raw += data
        while len(self._raw) >= 8:
            kind, size = struct.unpack(">B3xI", self._raw[:8])
            if len(self._raw) < 8 + size:
                return
            piece = bytes(self._raw[8 : 8 + size])
            del self._raw[: 8 + size]
            stream = self.stdout if kind == 1 else self.stderr
            (self.on_stdout if kind == 1 else self.on_stderr)(piece)
            if stream[-_TRAILER_SIZE:].startswith(self._trailer):
                code, kills = struct.unpack("<ii", stream[-8:])
                del stream[-_TRAILER_SIZE:]
                self._words[kind] = Ended(code=code, oom=kills > 0)
                if len(self._words) == 2:
                    self.ended = self._words[2]
                    self.open_streams = 0

    def _at_end(self) -> None:
        self.open_streams = 0
        if self.ended is None:
            reason = self._words.get(2) or self._words.get(1) or self._why_gone()
            if isinstance(reason, Ended):
                self.ended = reason
            else:
                self.lost = reason

    def close(self, *, wait: bool = False) -> None:
        try:
            super().close(wait=wait)
        finally:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
            self.sock.close()


class DockerSandbox:
    """`DockerSandbox(image="cabochon-sandbox:host").run(python_program("print(1)"))`.

    `image`: any with a Python 3.11 or newer on its PATH. `limits`: what waiting containers are born with. `warm`: how
    many wait. `starters`: threads that start them. `runtime`: "" is the engine's own, "runsc" is gVisor. `base_url`:
    the engine, else DOCKER_HOST, else the usual socket. Raises UserError at the first use where engine or image are
    missing.
    """

    def __init__(
        self, *, image: str = PUBLIC, limits: Limits | None = None, warm: int = 4, starters: int = 4, runtime: str = "",
        base_url: str | None = None,
    ) -> None:  # fmt: skip
        if warm < 1 or starters < 1:
            raise ValueError(f"warm and starters must be at least 1, got {warm} and {starters}")
        self.image, self.warm, self.starters, self.runtime, self.base_url = image, warm, starters, runtime, base_url
        self.limits = limits or Limits()
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._state = threading.Condition()
        self._waiting: collections.deque[DockerSession] = collections.deque()
        self._starting = 0
        self._failure = ""
        self._open = False
        self._image = ""
        self._scripts = ("", b"")
        self._used: dict[str, float] = {}
        """containers that were handed out, and when each should surely be gone"""
        self._local = threading.local()

    def __reduce__(self) -> tuple[object, ...]:
        return _remake, (self.image, self.limits, self.warm, self.starters, self.runtime, self.base_url)

    def _api(self) -> docker.APIClient:
        """One client per thread. Raises one of FAILURES."""
        api = getattr(self._local, "api", None)
        if api is None:
            api = self._local.api = connect(self.base_url)
        return api

    def _drop_api(self) -> None:
        api = getattr(self._local, "api", None)
        if api is not None:
            self._local.api = None
            with contextlib.suppress(*FAILURES):
                api.close()

    def _ensure(self) -> None:
        """Checks engine and image, reaps what dead owners left, starts the threads; once per process. Raises
        UserError."""
        if self._pid != os.getpid():
            self._reset()
        with self._state:
            if self._open:
                return
            with engine_errors(self.base_url, self.image):
                image = self._api().inspect_image(self.image)
                self._image, self._scripts = image["Id"], scripts(image)  # its name may come to mean another one
                reap(self._api())
            self._open = True
            for _ in range(self.starters):
                threading.Thread(target=self._starter, name="cabochon-docker-start", daemon=True).start()
            threading.Thread(target=self._watcher, name="cabochon-docker-watch", daemon=True).start()
            atexit.register(self.close)

    def _create(self, limits: Limits) -> DockerSession:
        """One started container. Raises one of FAILURES."""
        container, sock = start(self._api(), self._image, self._scripts, limits, self.runtime)
        began = time.time()
        return DockerSession(sock, limits.output_bytes, container, lambda: self._why_gone(container, began))

    def _why_gone(self, container: str, began: float) -> Ended | str:
        """A container's streams ended without its process 1 saying why: an OOM kill of process 1, or the engine's
        doing."""
        try:
            about = {"container": container, "event": "oom"}
            events = self._api().events(int(began) - 1, int(time.time()) + 1, about, decode=True)
            oom = any(True for _ in events)
        except FAILURES as e:
            self._drop_api()
            return f"the docker engine is gone: {type(e).__name__}"
        return Ended(code=-9, oom=True) if oom else "the docker engine ended a container"

    def _starter(self) -> None:
        """Keeps the pool full. After a failure it waits for the next one who asks."""
        state = self._state
        while True:
            with state:
                state.wait_for(
                    lambda: not self._open or (len(self._waiting) + self._starting < self.warm and not self._failure)
                )
                if not self._open:
                    break
                self._starting += 1
            session, failure = None, ""
            try:
                session = self._create(self.limits)
            except FAILURES as e:
                failure = f"{type(e).__name__}: {str(e)[:300]}"
                self._drop_api()
            with state:
                self._starting -= 1
                if session is not None and self._open:
                    self._waiting.append(session)
                elif session is not None:
                    session.close()
                self._failure = failure
                state.notify_all()
        self._drop_api()

    def _take(self, limits: Limits) -> DockerSession:
        self._ensure()
        if limits.fixed != self.limits.fixed:
            try:
                return self._create(limits)
            except FAILURES as e:
                self._drop_api()
                raise Lost(f"docker: {type(e).__name__}: {str(e)[:300]}") from e
        until = time.monotonic() + START_SECONDS
        while True:
            with self._state:
                self._failure = ""
                self._state.notify_all()
                self._state.wait_for(lambda: self._waiting or self._failure or not self._open, until - time.monotonic())
                if not self._waiting:
                    raise Lost(self._failure or "no container was ready in time")
                session = self._waiting.popleft()
                self._used[session.container] = time.monotonic() + max(600.0, limits.wall_seconds + 60.0)
                self._state.notify_all()
            if not session.stale():
                return session
            session.close()

    def _watcher(self) -> None:
        """Tells the waiting containers that their owner is there, and ends used ones that are long over their time."""
        swept = time.monotonic()
        while True:
            with self._state:
                if self._state.wait_for(lambda: not self._open, IDLE_SECONDS / 5):
                    break
                for session in self._waiting:
                    session.beat()
            if time.monotonic() > swept + SWEEP_SECONDS:
                swept = time.monotonic()
                self._sweep()
        self._drop_api()

    def _sweep(self) -> None:
        try:
            api = self._api()
            here = {c["Id"] for c in api.containers(all=True, filters={"label": f"{LABEL}.owner={owner_label()}"})}
            with self._state:
                self._used = {container: end for container, end in self._used.items() if container in here}
                late = [container for container, end in self._used.items() if time.monotonic() > end]
            for container in late:
                with contextlib.suppress(docker.errors.APIError):  # it went by itself meanwhile
                    api.remove_container(container, force=True)
        except FAILURES:
            self._drop_api()

    def open(self, limits: Limits | None = None) -> Session:
        """A fresh container that waits for its order. Raises SandboxError, and UserError where there is no engine or
        image."""
        limits = limits or self.limits
        return retried(lambda: self._take(limits))

    def run(self, program: Program, limits: Limits | None = None) -> RunResult:
        """See Sandbox.run."""
        limits = limits or self.limits
        return check_size(program) or retried(lambda: run_in(self._take(limits), program, limits))

    def alive(self) -> int:
        """Containers in use, and any that outlived its use: what the engine has of this process's less the waiting
        ones."""
        with self._state:
            self._state.wait_for(lambda: self._starting == 0, 30.0)
            here = self._api().containers(all=True, filters={"label": f"{LABEL}.owner={owner_label()}"})
            return len(here) - len(self._waiting) - self._starting

    def fill(self, seconds: float = 60.0) -> None:
        """Waits until the pool is full. Raises SandboxError where it does not fill in time."""
        self._ensure()
        with self._state:
            self._failure = ""
            self._state.notify_all()
            if (
                not self._state.wait_for(lambda: len(self._waiting) >= self.warm or self._failure, seconds)
                or self._failure
            ):
                raise SandboxError(f"the pool did not fill: {self._failure or 'no answer'}")
            waiting = list(self._waiting)
        for session in waiting:
            session.pump(time.monotonic() + seconds, session.has_frame)

    def close(self) -> None:
        """Ends the pool and every container of this process."""
        if self._pid != os.getpid() or not self._open:
            return
        with self._state:
            self._open = False
            waiting, self._waiting = list(self._waiting), collections.deque()
            self._state.notify_all()
        for session in waiting:
            session.close()
        atexit.unregister(self.close)
        with contextlib.suppress(*FAILURES):
            reap(self._api(), owner_label())
        self._drop_api()

    def __enter__(self) -> DockerSandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _remake(image: str, limits: Limits, warm: int, starters: int, runtime: str, base_url: str | None) -> DockerSandbox:
    return DockerSandbox(image=image, limits=limits, warm=warm, starters=starters, runtime=runtime, base_url=base_url)
