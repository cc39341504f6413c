"""A run directory for one process at a time."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cabochon.errors import UserError

LEAVING_SECONDS = 60.0
"""for which a process is waited for whose parent is gone: the stage of a job that was killed saves and leaves"""


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """The directory, made where there is none, for this process alone; the lock goes with the process.

    Raises UserError naming the process that has it, or why there can be no such directory.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = (place / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{place}: cannot be a run directory: {error.strerror}; give another run.dir") from None
    with file:
        until, told = time.monotonic() + LEAVING_SECONDS, False
        while not _taken(file):
            file.seek(0)
            pid, _, parent = file.read().strip().partition(" ")
            if not _orphaned(pid, parent) or time.monotonic() > until:
                raise UserError(f"{place}: process {pid or '?'} is running there; wait for it, or give another run.dir")
            if not told:
                print(f"{place}: process {pid} is running there, and its job is gone: waiting for it to leave",
                      file=sys.stderr, flush=True)  # fmt: skip
            told = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"{os.getpid()} {os.getppid()}")
        file.flush()
        yield


def held(place: Path) -> bool:
    """Whether a process has this directory, as far as its lock file tells; the lock itself is left alone."""
    try:
        os.kill(int((place / ".lock").read_text().partition(" ")[0]), 0)
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _orphaned(pid: str, parent: str) -> bool:
    """Has the process another parent than it began with, or ended just now?"""
    try:
        now = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[1]
    except ValueError:
        return False  # nothing is known of it
    except OSError:
        return True
    return now != parent
