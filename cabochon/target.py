"""Which kind of device programs are being made for: this process's own, or one that is not here (`cabochon plan`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_COMPILING_FOR: ContextVar[str | None] = ContextVar("compiling_for", default=None)


def platform() -> str:
    """`cpu`, `tpu` or `gpu`: what a choice between implementations has to ask while a program is traced."""
    return _COMPILING_FOR.get() or jax.default_backend()


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Programs traced inside are for `name`, whatever this process runs on. What is traced already stays as it is."""
    token = _COMPILING_FOR.set(name)
    try:
        yield
    finally:
        _COMPILING_FOR.reset(token)
