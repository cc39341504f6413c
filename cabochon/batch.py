"""Batch: the one device carrier, filled by every stage, and how sequences become one.

Legend: B rows, T tokens, L sparse layers, C experts per token, K candidates for a token's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from cabochon.errors import UserError
from cabochon.ops import Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed or padded sequences. Optional fields are None, never absent.

    Example, two sequences in one row of six: tokens [5 6 7 8 9 0], segment [1 1 1 2 2 0], position [0 1 2 0 1 0],
    mask [0 0 1 0 1 0] trains the last token of each.
    """

    tokens_BT: Leaf
    """int32"""
    segment_BT: Leaf
    """int32, from 1 within a row; 0 is padding"""
    position_BT: Leaf
    """int32, restarts at 0 in each segment, or goes on from the segment it continues"""
    mask_BT: Leaf
    """f32, weight of the token *at* t in the loss; 0 at the first token of a segment, which has no log-prob"""
    prefix_BT: Leaf | None = None
    """int32, the segment of the same row that the token's segment continues and sees; 0 for none"""
    divisor_B: Leaf | None = None
    """f32, each row's part of what the weighted sum is divided by, so that parts of a batch add up; None: its mask"""
    routes_BTLC: Leaf | None = None
    """int, recorded routes to replay; -1 where none was recorded"""
    logp_behaviour_BT: Leaf | None = None
    """f32 nats, as the sampler reported it: of the distribution really drawn from"""
    logp_proximal_BT: Leaf | None = None
    """f32 nats, by the learner, before the first update on these tokens; None where there is just one update"""
    logp_reference_BT: Leaf | None = None
    """f32 nats, by the reference policy"""
    advantage_BT: Leaf | None = None
    """f32"""
    return_BT: Leaf | None = None
    """f32, what the critic's value of the state before token t should be"""
    value_BT: Leaf | None = None
    """f32, that value before the first update on these tokens"""
    candidates_BTK: Leaf | None = None
    """int32, of distillation: the tokens that the teacher finds likeliest in that place; -1 for none"""
    teacher_BTK: Leaf | None = None
    """f32 nats, the teacher's log-probs of the candidates; 0 where there is none"""
    margin_BT: Leaf | None = None
    """f32, of preference pairs, at the last token of one of the two: how far their scores should be apart"""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of sequences per row of `capacity` tokens: best-fit decreasing, at most 11/9 of the optimum + 1 rows.

    Rows keep their members in index order; deterministic. Raises UserError for a sequence that is too long or empty.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not 0 < lengths[i] <= capacity:
            raise UserError(f"sequence {i} has {lengths[i]} tokens; expected 1 to {capacity} (the row length)")
        fits = [r for r, left in enumerate(room) if left >= lengths[i]]
        if not fits:
            rows.append([])
            room.append(capacity)
            fits = [len(rows) - 1]
        r = min(fits, key=lambda r: room[r])
        rows[r].append(i)
        room[r] -= lengths[i]
    return [sorted(row) for row in rows]


def to_rows(values: Sequence[np.ndarray], rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """[B, T] f32 with one value per token of each sequence in its place of `rows`, 0 elsewhere."""
    out = np.zeros((len(rows), length), np.float32)
    for r, members in enumerate(rows):
        start = 0
        for i in members:
            out[r, start : start + len(values[i])] = values[i]
            start += len(values[i])
    return out


def from_rows(x: np.ndarray, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[np.ndarray]:
    """Per sequence, in index order, its part [t, ...] of x [B, T, ...]: the inverse of `to_rows`."""
    out: dict[int, np.ndarray] = {}
    for r, members in enumerate(rows):
        start = 0
        for i in members:
            out[i] = x[r, start : start + lengths[i]]
            start += lengths[i]
    return [out[i] for i in range(len(lengths))]


def _sound(i: int, routes_TLC: np.ndarray) -> np.ndarray:
    """The routes, none of which names an expert twice: it would be counted twice. -1, not recorded, may repeat."""
    ordered = np.sort(np.asarray(routes_TLC, np.int32), axis=-1)
    if twice := np.argwhere((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).tolist():
        t, layer = twice[0][:2]
        raise UserError(f"sequence {i}: the routes of token {t}, sparse layer {layer} name an expert twice")
    return routes_TLC


def from_sequences(
    tokens: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    length: int,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    routes: Sequence[np.ndarray] | None = None,
    prefixes: Sequence[int | None] | None = None,
    pad_id: int = 0,
) -> Batch:
    """A host (numpy) batch of `length` tokens a row.

    `rows` lists the sequences of each row (`best_fit` makes one); None gives each sequence a row of its own. The first
    token of each sequence gets mask 0. `routes`: per sequence [t, L, C]. `prefixes`: the sequence that each one
    continues, which stands before it in the same row, or None. Raises UserError where a row overflows or a route
    repeats.
    """
    rows = [[i] for i in range(len(tokens))] if rows is None else rows
    out = np.full((len(rows), length), pad_id, np.int32)
    segment, position = np.zeros_like(out), np.zeros_like(out)
    mask = np.zeros(out.shape, np.float32)
    prefix = np.zeros_like(out) if prefixes is not None else None
    routed = np.full((*out.shape, *routes[0].shape[1:]), -1, np.int32) if routes else None
    for r, members in enumerate(rows):
        start = 0
        number = {i: s for s, i in enumerate(members, 1)}
        for s, i in enumerate(members, 1):
            end = start + len(tokens[i])
            if end > length:
                raise UserError(
                    f"row {r}: sequences {list(members)} need {end} tokens or more; expected at most {length}"
                )
            out[r, start:end], segment[r, start:end] = tokens[i], s
            position[r, start:end] = np.arange(end - start)
            if prefix is not None and prefixes is not None and (before := prefixes[i]) is not None:
                prefix[r, start:end] = number[before]
                position[r, start:end] += len(tokens[before])
            mask[r, start + 1 : end] = masks[i][1:]
            if routed is not None and routes:
                routed[r, start:end] = _sound(i, routes[i])
            start = end
    return Batch(
        tokens_BT=out, segment_BT=segment, position_BT=position, mask_BT=mask, prefix_BT=prefix, routes_BTLC=routed
    )  # fmt: skip
