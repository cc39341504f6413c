"""How this process gets its memory: pages that are kept, and huge ones. Linux with glibc; elsewhere nothing is done."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8  # malloc.h of glibc

LARGE = 256 << 20
"""bytes of parameters from which on large buffers are mapped again"""
_TUNABLE, _HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask_for_huge_pages() -> None:
    """Start this process anew with an allocator that asks for 2 MB pages, where the kernel gives them to who asks.

    glibc reads this before the program begins, so there is no later. Weights and temporaries are gigabytes that every
    step walks through: with pages of 4 KB a fifth of SmolLM2's training time goes in finding them (docs/log.md). Costs
    20 ms. A setting of the user's own is left as it is; processes started from here inherit it.
    """
    said = os.environ.get(_TUNABLE, "")
    if (
        not sys.platform.startswith("linux")
        or _HUGE in said
        or not _THP.exists()
        or "[madvise]" not in _THP.read_text()
    ):
        return
    settings = f"{said}:{_HUGE}=1" if said else f"{_HUGE}=1"
    os.execve(sys.executable, sys.orig_argv, {**os.environ, _TUNABLE: settings})


def keep_pages() -> bool:
    """Tell glibc to serve large buffers from one heap and never to shrink it; True where it took effect.

    XLA on CPU allocates its temporaries anew for every execution. By default glibc maps and unmaps each large one, so
    every step pays a page fault and a zeroed page for all memory it touches: a third of a training step's time
    (docs/log.md). One heap for all threads: those of other threads are small, and unmapped whenever they are empty. The
    price: a process keeps the most memory it ever needed. Call it once, before threads are started.
    """
    return _set((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 256 << 20), (_ARENA_MAX, 1))


def fit(params: Any) -> None:
    """For parameters (arrays or their shapes) of `LARGE` and more, have buffers of 32 MB and more mapped again.

    A step's temporaries are then a few buffers of gigabytes, and one that lies between others leaves a hole which the
    next, a little larger, does not fit: the one heap grew by a whole step's memory every few steps (docs/log.md).
    """
    if _is_large(params):
        _set((_MMAP_THRESHOLD, 32 << 20), (_MMAP_MAX, 1 << 16))  # 32 MB is the most glibc takes


def give_back(params: Any) -> None:
    """For parameters of `LARGE` and more, give the system what is free: after other parameters took their place.

    Their matrices are smaller than what `fit` has mapped, and are freed in holes that the next ones do not fill: an
    engine's process grew by as much as they are with each new version (docs/log.md).
    """
    if _is_large(params):
        trim()


def trim() -> None:
    """Give the system what is free in the heap, holes between what is in use as well."""
    if sys.platform.startswith("linux") and (trimmed := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trimmed(0)


def _is_large(params: Any) -> bool:
    import jax  # not with the module: it is read before the number of threads is set

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)) >= LARGE


def _set(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all([mallopt(option, value) == 1 for option, value in settings])
