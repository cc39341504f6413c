"""Which devices programs are being made for: this process's own, or some that are not here (`cabochon plan`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_COMPILING_FOR: ContextVar[tuple[jax.Device, ...] | None] = ContextVar("compiling_for", default=None)


def devices() -> Sequence[jax.Device]:
    """Those that what is traced now will run on."""
    return _COMPILING_FOR.get() or jax.devices()


def platform() -> str:
    """`cpu`, `tpu` or `gpu`: what a choice between implementations has to ask while a program is traced."""
    given = _COMPILING_FOR.get()
    return given[0].platform if given else jax.default_backend()


@contextmanager
def compiling_for(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Programs traced inside are for `devices`, whatever this process has. What is traced already stays as it is."""
    token = _COMPILING_FOR.set(tuple(devices))
    try:
        yield
    finally:
        _COMPILING_FOR.reset(token)
