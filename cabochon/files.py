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

    Raises UserError if something is there already and `overwrite` is off. A kill leaves at most the temporary one,
    whose name begins with a dot.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())) and not overwrite:
        raise UserError(f"{directory}: exists and is not empty; choose another place or allow overwriting")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    except OSError as error:
        raise UserError(f"{directory}: cannot be made there: {error.strerror or error}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        for inner in (*temporary.rglob("*"), temporary):
            sync(inner)
        if directory.exists():
            old = temporary.with_suffix(".old")
            directory.rename(old)
            temporary.rename(directory)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            temporary.rename(directory)
        sync(directory.parent)
    except OSError as error:
        raise UserError(
            f"{directory}: could not be written: {error.strerror or error}; nothing was left there"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full or gone becomes a MachineError naming the file."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_whole(path: Path, text: str) -> None:
    """The file with this text, durable, or as it was before; its directory is made. Raises MachineError."""
    temporary = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
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
