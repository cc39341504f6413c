"""The door every isolation stands behind: `Sandbox.run(program, limits) -> RunResult`, and `open` for a dialogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from cabochon.errors import MachineError
from cabochon.verifiers.sandbox.limits import Limits
from cabochon.verifiers.sandbox.session import Session

RunStatus = Literal["ok", "timeout", "crash", "oom"]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A Python program: `files` by relative path, the first word of `argv` names the one to run."""

    files: Mapping[str, bytes]
    argv: tuple[str, ...] = ("main.py",)
    stdin: bytes = b""

    def __post_init__(self) -> None:
        if not self.argv or self.argv[0] not in self.files:
            raise ValueError(f"Program.argv[0] must name one of the files {sorted(self.files)}, got {self.argv}")
        for name in self.files:
            if name.startswith("/") or ".." in name.split("/") or "\x00" in name:
                raise ValueError(f"Program.files: {name!r} must be a relative path without '..'")


def python_program(source: str | bytes, stdin: str | bytes = b"") -> Program:
    """One file, one input. Lone surrogates in `source` stay what they are and will not compile."""
    return Program(files={"main.py": as_bytes(source)}, stdin=as_bytes(stdin))


def as_bytes(text: str | bytes) -> bytes:
    """UTF-8, lone surrogates passed through."""
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended. A status other than ok is the program's doing; the machine's doing is a SandboxError."""

    status: RunStatus
    exit_code: int | None
    """None where it was killed; minus the signal number where a signal ended it."""
    stdout: bytes
    stderr: bytes
    """The last part only."""
    seconds: float
    detail: str = ""
    truncated: bool = False
    """Standard output went over its limit and the run was ended for it."""


class SandboxError(MachineError):
    """The machine failed, not the program: engine gone, no sandbox could be started. Worth another try."""


@runtime_checkable
class Sandbox(Protocol):
    """Runs programs nobody trusts."""

    def run(self, program: Program, limits: Limits | None = None) -> RunResult:
        """Runs `program` to its end or its limits; nothing of it is left afterwards. Raises SandboxError only."""
        ...

    def open(self, limits: Limits | None = None) -> Session:
        """A fresh sandbox that waits for its order, for a dialogue in frames. Close it. Raises SandboxError only."""
        ...

    def close(self) -> None:
        """Ends every sandbox this one started. It can be used again afterwards."""
        ...


__all__ = ["Limits", "Program", "RunResult", "RunStatus", "Sandbox", "SandboxError", "Session", "as_bytes",
           "python_program"]  # fmt: skip
