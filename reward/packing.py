"""Token sequences of many lengths through a forward pass: few shapes, little padding.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cabochon.batch import Batch, best_fit, from_sequences

SHORTEST = 64
"""tokens of the shortest row"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Some of the sequences, in one batch."""

    batch: Batch
    members: list[int]
    """indices of the sequences in it"""
    starts: np.ndarray
    """[members] where each begins in the flattened batch"""
    lengths: np.ndarray
    """[members]"""


def pack(sequences: Sequence[np.ndarray], *, length: int, rows: int) -> Iterator[Packed]:
    """Every sequence in some batch. A row has the next power of two above the longest sequence, at most `length`
    tokens; a batch has 1, 2, 4 ... `rows` of them. So few shapes are compiled."""
    if not sequences:
        return
    lengths = [len(ids) for ids in sequences]
    T = min(length, max(SHORTEST, 1 << (max(lengths) - 1).bit_length()))
    filled = best_fit(lengths, T)
    for at in range(0, len(filled), rows):
        part = filled[at : at + rows]
        B = min(rows, 1 << (len(part) - 1).bit_length())
        members = [i for row in part for i in row]
        places: list[list[int]] = []
        starts: list[int] = []
        for r, row in enumerate(part):
            places.append(list(range(len(starts), len(starts) + len(row))))
            offsets = np.cumsum([0, *(lengths[i] for i in row)])
            starts += (r * T + offsets[:-1]).tolist()
        places += [[]] * (B - len(part))
        used = [sequences[i] for i in members]
        yield Packed(
            batch=from_sequences(used, [np.zeros(len(ids)) for ids in used], T, rows=places),
            members=members,
            starts=np.array(starts, np.int64),
            lengths=np.array([lengths[i] for i in members], np.int64),
        )
