"""What one run may use."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one run may use. Going over ends the run with a status; it never raises."""

    wall_seconds: float = 10.0
    """From the moment the program is handed over."""
    cpu_seconds: float = 10.0
    """Per process; rounded up to whole seconds by the kernel."""
    memory_bytes: int = 512 << 20
    """Of the whole process tree, its files in the temporary folder included; there is no swap."""
    pids: int = 64
    """Processes and threads together."""
    output_bytes: int = 1 << 20
    """Standard output kept; more ends the run. Of standard error the last part of this size is kept."""
    file_bytes: int = 64 << 20
    """Size of the writable temporary folder, and of any one file."""
    nofile: int = 128
    """Open files per process."""
    cpus: float = 1.0
    """Share of the machine's cores for the whole tree."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"Limits.{name} must be positive, got {value}")

    @property
    def fixed(self) -> tuple[int, int, int, float]:
        """The limits a sandbox is born with; only one born with the same can serve a run."""
        return self.memory_bytes, self.pids, self.file_bytes, self.cpus
