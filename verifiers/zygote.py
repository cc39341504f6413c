"""The owner's side of a zygote: the clean interpreter that imports once and forks workers (see `worker_main`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading

_BOOT = (
    "import json,sys; fd,path,preload,prepare,memory=json.loads(sys.argv[1]); sys.path[:]=path; "
    "from cabochon.verifiers.worker_main import zygote; zygote(fd, preload, prepare, memory)"
)

STOP_SECONDS = 2.0
"""A zygote gets so long to kill what its workers started; then it is killed itself, and its workers with it."""


class MachineFailure(Exception):
    """The machine, not the item, kept a call from finishing."""


class NotReady(MachineFailure):
    """An interpreter that was still importing at its deadline: the next one may take as long."""


class Zygote:
    """One interpreter, started on first use and again if it was killed. Safe to use from several threads."""

    def __init__(
        self, *, preload: tuple[str, ...], prepare: tuple[str, ...], memory_mib: int,
        keep_environment: tuple[str, ...], start_seconds: float,
    ) -> None:  # fmt: skip
        self._preload = preload
        self._prepare = prepare
        self._memory_mib = memory_mib
        self._keep_environment = keep_environment
        self._start_seconds = start_seconds
        self._lock = threading.Lock()  # one question at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """None where none runs."""
        return self._process.pid if self._process is not None else None

    def fork(self, connection: socket.socket) -> tuple[int, int]:
        """Process ids of a new worker that serves `connection`, and of its zygote. Raises MachineFailure."""
        with self._lock:
            if self._closed:
                raise MachineFailure("the worker pool is closed")
            control, zygote_pid = self._running()
            try:
                socket.send_fds(control, [b"F"], [connection.fileno()])
                (pid,) = struct.unpack("!q", control.recv(8))
                return pid, zygote_pid
            except (OSError, struct.error) as error:
                self._stop()
                raise MachineFailure(f"cannot make a worker: {error}") from error

    def reap(self, pid: int, zygote_pid: int) -> int:
        """Kill a worker's process group and collect its wait status; 0 if it is not to be had."""
        with self._lock:
            if self._control is None or self._process is None or self._process.pid != zygote_pid:
                return 0  # gone with its zygote: the process id may be somebody else's by now
            for kill in (os.killpg, os.kill):
                try:
                    kill(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue
            try:
                self._control.send(b"R" + struct.pack("!q", pid))
                return int(struct.unpack("!q", self._control.recv(8))[0])
            except (OSError, struct.error):
                self._stop()
                return 0

    def close(self) -> None:
        """End it for good, with all its workers and what they started, but for what left their process groups."""
        self._closed = True
        process = self._process
        if process is not None and self._control is None:
            process.kill()  # still importing, with the lock held
        with self._lock:
            self._stop()

    def _running(self) -> tuple[socket.socket, int]:
        """The control connection and the process id. Needs `_lock`."""
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control, self._process.pid
        self._stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = [os.path.abspath(entry or os.curdir) for entry in sys.path]
        argument = json.dumps(
            [theirs.fileno(), path, list(self._preload), list(self._prepare), self._memory_mib << 20]
        )
        with theirs, tempfile.TemporaryFile() as errors:
            process = self._process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-c", _BOOT, argument],
                env=_clean_environment(self._keep_environment),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                pass_fds=[theirs.fileno()], start_new_session=True,
            )
            theirs.close()
            ours.settimeout(self._start_seconds)
            failure = MachineFailure("the worker interpreter did not start: no message")
            try:
                if ours.recv(1) == b"K":
                    self._control = ours
                    return ours, process.pid
            except TimeoutError:
                what = ", ".join(self._preload) or "nothing"
                failure = NotReady(f"the worker interpreter was not done importing {what} in {self._start_seconds:g} s")
            except OSError:
                pass  # what it wrote says more
            ours.close()
            process.kill()
            process.wait()
            self._process = None
            errors.seek(0)
            tail = errors.read()[-1500:].decode("utf-8", "replace").strip().splitlines()
        if tail and not isinstance(failure, NotReady):
            failure = MachineFailure(f"the worker interpreter did not start: {tail[-1]}")
        raise failure

    def _stop(self) -> None:
        """Needs `_lock`."""
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)  # closing says nothing while a fork of this process holds it
            self._control.close()  # at which it kills the groups of its workers and ends
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()  # its workers die with it
                self._process.wait()
            self._process = None


def _clean_environment(keep: tuple[str, ...]) -> dict[str, str]:
    """What a worker sees of the environment: the fixed names, and those asked for."""
    fixed = {
        "PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }
    return fixed | {name: os.environ[name] for name in keep if name in os.environ}
