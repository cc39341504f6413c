"""Asking for speed in a test: the shortest of several tries, since a busy machine slows some and a mistake all."""

import time
from collections.abc import Callable


def shortest(seconds: float, act: Callable[[], object], *, tries: int = 8) -> float:
    """Seconds `act` took at its quickest; no further try after one below `seconds`."""
    best = float("inf")
    for _ in range(tries):
        start = time.monotonic()
        act()
        best = min(best, time.monotonic() - start)
        if best < seconds:
            break
    return best
