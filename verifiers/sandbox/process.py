"""Programs in plain child processes with resource limits. This is NOT a security boundary.

A program run here can read the user's files, reach the network, signal the user's other processes and leave processes
behind. It exists to debug a task or a verifier where no isolation can be installed, on programs you would run yourself.
Nothing chooses it by default.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

from cabochon.verifiers.sandbox.base import Limits, Program, RunResult
from cabochon.verifiers.sandbox.running import check_size, retried, run_in
from cabochon.verifiers.sandbox.session import Ended, Lost, Session


class ProcessSession(Session):
    """One child process in a folder of its own."""

    def __init__(self, limits: Limits) -> None:
        top = str(pathlib.Path(sys.modules["cabochon"].__path__[0]).parent)
        code = f"import sys; sys.path[:0] = [{top!r}]; from cabochon.verifiers.sandbox.inside import main; main()"
        folder = tempfile.mkdtemp(prefix="cabochon-process-")
        executable = getattr(sys, "_base_executable", sys.executable)
        try:
            self.process = subprocess.Popen(
                [executable, "-I", "-S", "-X", "utf8", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, cwd=folder, env={"PATH": "/usr/bin", "HOME": folder, "LANG": "C.UTF-8"},
                start_new_session=True, bufsize=0,
            )  # fmt: skip
        except OSError as e:
            shutil.rmtree(folder, ignore_errors=True)
            raise Lost(f"no child process could be started: {e}") from e
        child = self.process
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        super().__init__(write_fd=child.stdin.fileno(), output_bytes=limits.output_bytes, kill=self._kill_group)
        self.home = folder
        self.data_bytes = 2 * limits.memory_bytes
        ended = os.pidfd_open(child.pid)
        self._owned = [ended]
        self.readers = {
            child.stdout.fileno(): self.on_stdout,
            child.stderr.fileno(): self.on_stderr,
            ended: self._on_end,
        }
        self._stdout_fd = child.stdout.fileno()
        self.open_streams = 2
        for fd in (self.write_fd, child.stdout.fileno(), child.stderr.fileno()):
            os.set_blocking(fd, False)

    def _on_end(self, data: bytes) -> None:
        """The process is gone; so are, by force, those of its group that would keep the streams open."""
        code = self.process.wait()
        self._kill_group()
        self.ended = Ended(code=code, oom=False)

    def _kill_group(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return

    def close(self, *, wait: bool = False) -> None:
        if self.closed:
            return
        try:
            super().close(wait=wait)
        finally:
            self._kill_group()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()
            shutil.rmtree(self.home, ignore_errors=True)


class ProcessSandbox:
    """For debugging, on programs you trust. Not a security boundary: see the module."""

    def __init__(self, *, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def open(self, limits: Limits | None = None) -> Session:
        """A child process that waits for its order. Raises SandboxError where none can be started."""
        return retried(lambda: ProcessSession(limits or self.limits))

    def run(self, program: Program, limits: Limits | None = None) -> RunResult:
        """See Sandbox.run; limits of memory are per process, those of processes and CPU share are not enforced."""
        limits = limits or self.limits
        return check_size(program) or retried(lambda: run_in(ProcessSession(limits), program, limits))

    def close(self) -> None:
        """Nothing is kept between runs."""

    def __enter__(self) -> ProcessSandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
