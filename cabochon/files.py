"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cabochon.errors import MachineError, UserError


def encodable(text: str) -> str:
    """Half of a surrogate pair as `?`: UTF-8 has no bytes for it, and a model's program can write one."""
    return text.encode("utf-8", "replace").decode()


@contextmanager
def replaced_directory(directory: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its name at the end, or vanishes on an error.

    Where `directory` is a symbolic link, what it points to is replaced. Raises UserError if something is there already
    and `overwrite` is off; on an error it stays. A kill leaves at most the unfinished one as `.NAME.*.partial`, and in
    the instant between two renames what was there, whole, as `.NAME.*.old`.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())) and not overwrite:
        raise UserError(f"{directory}: exists and is not empty; choose another place or allow overwriting")
    try:
        place = directory.resolve() if directory.is_symlink() else directory
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=place.parent))
    except OSError as error:
        raise UserError(f"{directory}: cannot be made there: {error.strerror or error}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        for inner in (*temporary.rglob("*"), temporary):
            sync(inner)
        old = temporary.with_suffix(".old")
        _put(temporary, place, old)
    except OSError as error:
        left = "what was there before is there still" if place.exists() else "nothing was left there"
        raise UserError(f"{directory}: could not be written: {error.strerror or error}; {left}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        if old.exists():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    except OSError as error:
        raise UserError(
            f"{directory}: is written, but what was there before could not be removed: {old}: {error.strerror or error}"
        ) from None


def _put(new: Path, place: Path, old: Path) -> None:
    """`new` takes the name of `place`, and what was there the name `old`; on an error all is as before."""
    there = place.exists()
    if there:
        place.rename(old)
    try:
        new.rename(place)
        sync(place.parent)
    except BaseException:
        if not new.exists():
            place.rename(new)
        if there:
            old.rename(place)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full or gone becomes a MachineError naming the file."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_whole(path: Path, text: str) -> None:
    """The file with this text, durable, or as it was before; its directory is made. What a link points to is replaced,
    and a device or a pipe written to. Raises MachineError."""
    with writing(path):
        device = path.parent in (Path("/dev"), Path("/dev/fd"))  # /dev/stdout may be a file that others write to
        if device or (path.exists() and not path.is_file() and not path.is_dir()):
            with path.open("a", encoding="utf-8") as out:
                out.write(text)
            return
        place = path.resolve()
        short = len(os.fsencode(place.name)) < 240  # of the 255 that most file systems take
        name = place.name if short else hashlib.sha256(os.fsencode(place.name)).hexdigest()
        temporary = place.with_name(f".{name}.partial")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(place)
            sync(place.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """64 hex digits of a file's content. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file or a directory entry durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
