"""The host's end of one single-use sandbox: bytes in, bytes out, one deadline, no threads.

Every wait is one poll over all descriptors, so a sandbox that floods one stream, fills another or reads nothing can
delay the host no longer than the deadline. What arrives is bounded: a stream that is not consumed is not read.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cabochon.verifiers.sandbox.limits import Limits
from cabochon.verifiers.sandbox.wire import MAX_FRAME, frame, pack

START_SECONDS = 30.0
"""How long a sandbox may take until it says it is ready; the machine's time, not the program's."""
END_SECONDS = 15.0
"""How long a killed sandbox may take to be gone: longer than docker's process 1 needs to end a usual run by itself."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the sandbox's first process ended: exit code, or minus a signal number; whether its cgroup saw an OOM
    kill."""

    code: int
    oom: bool


class Stopped(Exception):
    """A dialogue cannot go on, and it is the program's doing."""

    def __init__(self, reason: Literal["timeout", "ended", "malformed"], detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Lost(Exception):
    """A dialogue cannot go on, and it is the machine's doing. Sandboxes turn it into a SandboxError."""


class Session:
    """One fresh sandbox. `begin` hands over the order and starts the clock; then `send` and `receive`, or `drain`."""

    def __init__(self, *, write_fd: int, output_bytes: int, kill: Callable[[], None]) -> None:
        self.write_fd = write_fd
        self.output_bytes = output_bytes
        self.readers: dict[int, Callable[[bytes], None]] = {}
        """descriptor -> what to do with its bytes; b"" is its end"""
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.open_streams = 0
        self.ended: Ended | None = None
        self.lost = ""
        self.deadline = float("inf")
        self.began = 0.0
        self.closed = False
        self.nproc = 0
        self.data_bytes = 0
        """rlimits for where no control group holds the tree; 0 sets none"""
        self.seccomp: dict[str, bytes] = {}
        """By machine, the filter the program puts on itself where nothing outside does."""
        self.home = ""
        """The writable folder, where it is not the usual one."""
        self.behind_order = b""
        """What follows the order and is not the program's to read."""
        self._kill = kill
        self._stdout_fd = -1
        self._owned: list[int] = []

    def attach_pipes(self, *, stdout: int, stderr: int, status: int) -> None:
        """Three pipes; on `status` the launcher writes b"code oom" when the tree is gone, code as a shell gives it."""
        record = bytearray()

        def on_status(data: bytes) -> None:
            record.extend(data)
            if data:
                return
            try:
                code, oom = record.split()
                self.ended = Ended(code=shell_code(int(code)), oom=bool(int(oom)))
            except ValueError:
                self.lost = "the launcher of the sandbox died"

        self.readers = {stdout: self.on_stdout, stderr: self.on_stderr, status: on_status}
        self.open_streams = 2
        self._stdout_fd = stdout
        self._owned = [self.write_fd, stdout, stderr, status]
        for fd in self._owned:
            os.set_blocking(fd, False)

    def on_stdout(self, data: bytes) -> None:
        self.stdout += data
        self.open_streams -= not data

    def on_stderr(self, data: bytes) -> None:
        """Keeps the tail."""
        self.stderr += data
        if len(self.stderr) > 2 * self.output_bytes:
            del self.stderr[: -self.output_bytes]
        self.open_streams -= not data

    def pump(self, deadline: float, done: Callable[[], bool], outgoing: bytes = b"") -> bool:
        """Writes all of `outgoing` and reads until `done`; False where the deadline came first. Raises Lost."""
        view = memoryview(outgoing)
        keep = max(self.output_bytes, MAX_FRAME) + (1 << 16)
        while view or not done():
            if self.lost:
                raise Lost(self.lost)
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if not self.readers and not view:
                return True
            poller = select.poll()
            for fd in self.readers:
                if fd != self._stdout_fd or len(self.stdout) < keep:
                    poller.register(fd, select.POLLIN | (select.POLLOUT if view and fd == self.write_fd else 0))
            if view and self.write_fd not in self.readers:
                poller.register(self.write_fd, select.POLLOUT)
            for fd, events in poller.poll(min(left, 3600.0) * 1000 + 1):
                if view and fd == self.write_fd and events & (select.POLLOUT | select.POLLERR):
                    view = self._write(view)
                if fd in self.readers and events & ~select.POLLOUT:
                    self._read(fd)
        return True

    def _write(self, view: memoryview) -> memoryview:
        try:
            return view[os.write(self.write_fd, view[: 1 << 16]) :]
        except BlockingIOError:
            return view
        except OSError:  # nobody reads any more; why will show on the other streams
            return view[:0]

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        handler = self.readers[fd]
        if not data:
            del self.readers[fd]
        handler(data)

    @property
    def over(self) -> bool:
        """The tree is gone and everything it said is read."""
        return self.ended is not None and self.open_streams <= 0

    def begin(self, mode: str, limits: Limits, **fields: Any) -> None:
        """Waits until the sandbox is ready, sends its order (see inside.py) and starts the clock. Raises Lost."""
        if not self.pump(time.monotonic() + START_SECONDS, lambda: self.has_frame() or self.over):
            raise Lost(f"no sandbox was ready within {START_SECONDS:g} s")
        if not self.has_frame():
            raise Lost(f"the sandbox ended before it was ready: {self.error_tail(300) or self.ended}")
        self._take_frame()
        self.output_bytes = limits.output_bytes
        inner = {"cpu_seconds": limits.cpu_seconds, "wall_seconds": limits.wall_seconds, "nofile": limits.nofile,
                 "file_bytes": limits.file_bytes, "nproc": self.nproc, "data_bytes": self.data_bytes}  # fmt: skip
        order = {"mode": mode, "limits": inner, "home": self.home, "seccomp": self.seccomp, "files": {}, **fields}
        self.began = time.monotonic()
        self.deadline = self.began + limits.wall_seconds
        self.pump(self.deadline, lambda: True, frame(pack(order)) + self.behind_order)

    def has_frame(self) -> bool:
        if len(self.stdout) < 4:
            return False
        (n,) = struct.unpack("<I", self.stdout[:4])
        return n > MAX_FRAME or len(self.stdout) >= 4 + n

    def _take_frame(self) -> bytes:
        (n,) = struct.unpack("<I", self.stdout[:4])
        if n > MAX_FRAME:
            raise Stopped("malformed", f"a message of {n} bytes, over the limit of {MAX_FRAME}")
        payload = bytes(self.stdout[4 : 4 + n])
        del self.stdout[: 4 + n]
        return payload

    def send(self, payload: bytes) -> None:
        """Raises Stopped('timeout') where the sandbox does not take it before the deadline."""
        if not self.pump(self.deadline, lambda: True, frame(payload)):
            raise Stopped("timeout", "the time was over")

    def receive(self) -> bytes:
        """The next frame. Raises Stopped where none can come in time."""
        if not self.pump(self.deadline, lambda: self.has_frame() or self.over):
            raise Stopped("timeout", "the time was over")
        if not self.has_frame():
            raise Stopped("ended", "the process ended without an answer")
        return self._take_frame()

    def drain(self) -> bool:
        """Reads until the program has ended, its output is over the limit, or its time is; True where it ended."""
        full = self.output_bytes
        self.pump(self.deadline, lambda: self.over or len(self.stdout) > full)
        return self.over

    def error_tail(self, n: int = 2000) -> str:
        return bytes(self.stderr[-n:]).decode("utf-8", "replace").replace("\x00", "").strip()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began if self.began else 0.0

    def kill(self) -> None:
        """Ends the tree and waits until it is gone. Raises Lost where it will not go."""
        if self.ended is None and not self.lost:
            self._kill()
            self._stdout_fd = -1
            self.output_bytes = min(self.output_bytes, 1 << 16)

            def gone() -> bool:
                self.stdout.clear()
                return self.ended is not None

            if not self.pump(time.monotonic() + END_SECONDS, gone):
                raise Lost("a sandbox did not end when it was killed")

    def close(self, *, wait: bool = False) -> None:
        """Kills what is left and frees the descriptors; twice is once. `wait`: return only when the tree is gone."""
        if self.closed:
            return
        self.closed = True
        try:
            if wait:
                self.kill()
            elif self.ended is None:
                self._kill()
        finally:
            for fd in self._owned:
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._owned = []
            self.readers = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def shell_code(code: int) -> int:
    """An exit code as shells and bubblewrap give it (128 + signal) turned into minus the signal."""
    return -(code - 128) if 128 < code <= 128 + signal.NSIG else code
