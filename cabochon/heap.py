"""Keep the heap's pages: on Linux a step's buffers then stop being returned to the kernel and faulted in anew."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # malloc.h of glibc


def keep_pages() -> bool:
    """Tell glibc to serve large buffers from one heap and never to shrink it; True where it took effect.

    XLA on CPU allocates its temporaries anew for every execution. By default glibc maps and unmaps each large one, so
    every step pays a page fault and a zeroed page for all memory it touches: a third of a training step's time
    (docs/log.md). One heap for all threads: those of other threads are small, and unmapped whenever they are empty. The
    price: a process keeps the most memory it ever needed. Call it once, before threads are started.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 256 << 20), (_ARENA_MAX, 1))
    return all([mallopt(option, value) == 1 for option, value in settings])
