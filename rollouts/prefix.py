"""Keys and values of sequences that have ended: kept in their slots until those are needed, found by common prefix.

A second turn begins with the tokens of the first, so all but what was added to the conversation is at hand.
Legend: T tokens, L sparse layers, C experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What a free slot still holds."""

    tokens_T: np.ndarray
    """int32, those whose keys and values stand in the slot: all of the sequence but its last"""
    routes_TLC: np.ndarray | None
    """where they were recorded"""
    since: int
    """a growing number: the smallest is the oldest"""


def common(a_T: np.ndarray, b_T: np.ndarray) -> int:
    """How many tokens two sequences begin with together."""
    n = min(len(a_T), len(b_T))
    differ = np.flatnonzero(a_T[:n] != b_T[:n])
    return int(differ[0]) if differ.size else n


def longest(kept: Mapping[int, Kept], tokens_T: np.ndarray, least: int, routes: bool) -> tuple[int, int] | None:
    """(slot, tokens in common) of the sequence that shares most with these tokens, the latest on a tie.

    None where none shares `least`, or `routes` are wanted and it has none.
    """
    usable = {slot: k for slot, k in kept.items() if k.routes_TLC is not None or not routes}
    found = [(common(k.tokens_T, tokens_T), k.since, slot) for slot, k in usable.items()]
    shared, _, slot = max(found, default=(0, 0, 0))
    return (slot, shared) if shared >= max(1, least) else None
