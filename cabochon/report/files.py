"""Reading what a run appends, while it appends: each whole line once, from where the last look ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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
    counted in `bad` and passed over. The file is only ever opened for reading.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad = 0
        self._offset, self._mark, self._inode = 0, b"", 0

    def restarted(self) -> bool:
        """Whether what was read so far no longer stands there; the next `rows` then begins anew."""
        if self._offset == 0 or self._stands():
            return False
        self._offset, self._mark, self.bad = 0, b"", 0
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
                    self._mark = (self._mark + line + b"\n")[-MARK:]
                    if (row := _object(line)) is not None:
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
        return _object(path.read_bytes())
    except OSError:
        return None


def _object(data: bytes) -> Row | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def stamp(place: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files a page shows: equal stamps, equal page."""
    out = []
    for name in ("metrics.jsonl", "moe.jsonl", "events.jsonl", "manifest.json", "rollouts", "config.yaml"):
        try:
            status = (place / name).stat()
        except OSError:
            continue
        out.append((name, status.st_size, status.st_mtime_ns))
    return tuple(out)
