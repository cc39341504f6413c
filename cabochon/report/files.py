"""Reading what a run appends, while it appends: each whole line once, from where the last look ended."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

CHUNK = 1 << 20
MARK = 64
"""bytes before the offset that must still be there, or the file was cut and has grown again"""


class Tail:
    """An append-only file of JSON objects, a line each.

    The half of a line that a writer is in the middle of waits for its end. A file that shrank, was replaced, or was cut
    and grew again is read from its beginning; one that is missing has no rows. Lines that are no JSON object are
    counted in `bad` and passed over. The file is only ever opened for reading. `version` rises with every whole line
    and every new beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad = self.version = 0
        self._offset, self._mark, self._inode = 0, b"", 0

    def restarted(self) -> bool:
        """Whether what was read so far no longer stands there; the next `rows` then begins anew."""
        if self._offset == 0 or self._stands():
            return False
        self._offset, self._mark, self.bad = 0, b"", 0
        self.version += 1
        return True

    def rows(self) -> Iterator[Row]:
        """The rows that came since the last call."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            self._inode = os.fstat(file.fileno()).st_ino
            file.seek(self._offset)
            rest = b""
            while chunk := file.read(CHUNK):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._offset += len(line) + 1
                    self.version += 1
                    self._mark = (self._mark + line + b"\n")[-MARK:]
                    if (row := object_of(line)) is not None:
                        yield row
                    elif line.strip():
                        self.bad += 1

    def _stands(self) -> bool:
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                file.seek(self._offset - len(self._mark))
                return status.st_ino == self._inode and file.read(len(self._mark)) == self._mark
        except OSError:
            return False


def read_object(path: Path) -> Row | None:
    """A JSON file that holds an object; None where it is missing, half-written or something else."""
    try:
        return object_of(path.read_bytes())
    except (OSError, ValueError):  # a name that no file can have
        return None


def object_of(data: bytes) -> Row | None:
    """A JSON object; None where it is half-written or something else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number_of(value: Any) -> float | None:
    """A finite number; None for anything else, integers beyond floats and true and false among it."""
    try:
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if known else None
    except OverflowError:
        return None


def count_of(value: Any) -> int | None:
    """A step or a number of things; None for what no run can count up to."""
    return value if isinstance(value, int) and 0 < value < 10**12 else None


OF_A_RUN = ("metrics.jsonl", "moe.jsonl", "events.jsonl", "manifest.json", "rollouts", "config.yaml")
OF_A_JOB = ("pipeline.json", "eval.json")


def stamp(place: Path, names: Sequence[str] = OF_A_RUN) -> dict[str, tuple[int, int]]:
    """Sizes and times of the files a page shows, by name: equal stamps, equal page."""
    out = {}
    for name in names:
        try:
            status = (place / name).stat()
        except OSError:
            continue
        out[name] = (status.st_size, status.st_mtime_ns)
    return out
