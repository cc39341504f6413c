"""Thinking budgets: the state machine that runs beside the sampler, on device, and the spellings of a tag.

Legend: B rows, A spellings of a tag, M tokens. BEFORE -> (open tag) -> THINKING -> (close tag sampled, or forced at the
budget) -> ANSWER. A tag is matched on token ids. A tokenizer writes it differently next to other characters (`</think>`
and a line break may share a token), so each tag comes in several spellings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cabochon.errors import UserError
from cabochon.ops import Leaf
from cabochon.tokenizer import Tokenizer
from cabochon.types import Span, Thinking

BEFORE, THINKING, ANSWER = 0, 1, 2
SPELLINGS = 8
TAG_TOKENS = 8
"""the longest tag, in tokens"""
NO_LIMIT = 2**30
ANY, NEVER, NOTHING = -1, -2, -3
"""in a spelling: matches every token (left of a shorter tag), matches none (an empty place); no token yet"""


class Thought(NamedTuple):
    """Where each row is. Rows without a budget rest at BEFORE with spellings that never match."""

    phase_B: Leaf
    count_B: Leaf
    """thinking tokens so far"""
    limit_B: Leaf
    least_B: Leaf
    open_BAM: Leaf
    close_BAM: Leaf
    recent_BM: Leaf
    """the latest tokens, newest last"""
    forced_BM: Leaf
    """what is forced at the budget, from the left, then ANY"""
    forced_i_B: Leaf
    """place of the next forced token; M where none is due"""


def forced_now(state: Thought) -> tuple[Array, Array]:
    """(is the next token forced, the token)."""
    at_B = jnp.minimum(state.forced_i_B, TAG_TOKENS - 1)
    token_B = jnp.take_along_axis(state.forced_BM, at_B[:, None], 1)[:, 0]
    return (state.forced_i_B < TAG_TOKENS) & (token_B >= 0), token_B


def banned(state: Thought, stop_BM: Array, vocab: int) -> Array:
    """Ids that may not come next [B, A + stops]: below the least number of thinking tokens, whatever ends thinking."""
    early_B = (state.phase_B == THINKING) & (state.count_B < state.least_B)
    before_BA = _matches(state.close_BAM[:, :, :-1], state.recent_BM[:, 1:])
    close_BA = jnp.where(before_BA & (state.close_BAM[:, :, -1] >= 0), state.close_BAM[:, :, -1], vocab)
    ban_BM = jnp.concatenate([close_BA, jnp.where(stop_BM >= 0, stop_BM, vocab)], 1)
    return jnp.where(early_B[:, None], ban_BM, vocab)


def after(state: Thought, token_B: Array, forced_B: Array) -> Thought:
    """The state once `token_B` stands."""
    recent_BM = jnp.concatenate([state.recent_BM[:, 1:], token_B[:, None]], 1)
    next_i_B = jnp.where(forced_B, state.forced_i_B + 1, TAG_TOKENS)
    more_B, _ = forced_now(state._replace(forced_i_B=next_i_B))
    opened_B = (state.phase_B == BEFORE) & _matches(state.open_BAM, recent_BM).any(-1)
    was_B = state.phase_B == THINKING
    closed_B = was_B & jnp.where(forced_B, ~more_B, _matches(state.close_BAM, recent_BM).any(-1))
    phase_B = jnp.where(opened_B, THINKING, jnp.where(closed_B, ANSWER, state.phase_B))
    count_B = state.count_B + (was_B & ~closed_B & ~forced_B)
    due_B = (phase_B == THINKING) & (count_B >= state.limit_B) & ~(forced_B & more_B)
    start_B = _overlap(state.forced_BM, recent_BM)
    next_i_B = jnp.where(due_B, start_B, jnp.where(more_B, next_i_B, TAG_TOKENS))
    return state._replace(phase_B=phase_B, count_B=count_B, recent_BM=recent_BM, forced_i_B=next_i_B)


def _matches(tag_BAM: Array, recent_BM: Array) -> Array:
    """[B, A]: does the spelling stand at the end of the latest tokens."""
    return ((tag_BAM == recent_BM[:, None]) | (tag_BAM == ANY)).all(-1)


def _overlap(forced_BM: Array, recent_BM: Array) -> Array:
    """How many tokens of the forced text the row already ends with, so that a tag half written is only completed."""
    best_B = jnp.zeros(forced_BM.shape[0], jnp.int32)
    for j in range(1, TAG_TOKENS):
        same_B = (forced_BM[:, :j] == recent_BM[:, -j:]).all(-1) & (forced_BM[:, j] >= 0)
        best_B = jnp.where(same_B, j, best_B)
    return best_B


# -- host --------------------------------------------------------------------------------------------------------------


class Tags(NamedTuple):
    """The spellings of one request's tags, as tuples of token ids."""

    open: tuple[tuple[int, ...], ...]
    close: tuple[tuple[int, ...], ...]
    forced: tuple[int, ...]


def tags_of(tokenizer: Tokenizer, thinking: Thinking, max_tokens: int) -> Tags:
    """Raises UserError for a budget that does not fit in `max_tokens`, or tags that cannot be matched."""
    if not 0 <= thinking.min_tokens <= thinking.max_tokens:
        raise UserError(
            f"thinking.min_tokens={thinking.min_tokens}: expected 0 to thinking.max_tokens={thinking.max_tokens}"
        )
    for name, tag in (("open", thinking.open), ("close", thinking.close)):
        if not tag.strip():
            raise UserError(f"thinking.{name} is empty; expected a tag such as <think>")
    forced_text = thinking.forced or thinking.close
    if thinking.close not in forced_text:
        raise UserError(f"thinking.forced={thinking.forced!r} must contain the close tag {thinking.close!r}")
    forced = tuple(tokenizer.encode(forced_text))
    opens, closes = spellings(tokenizer, thinking.open), spellings(tokenizer, thinking.close)
    longest = max(len(s) for s in (forced, *opens, *closes))
    if longest > TAG_TOKENS:
        raise UserError(f"thinking tags of {longest} tokens; expected at most {TAG_TOKENS}: choose shorter tags")
    if thinking.max_tokens + len(forced) > max_tokens:
        raise UserError(
            f"thinking.max_tokens={thinking.max_tokens} and {len(forced)} tokens of close tag do not fit in "
            f"max_tokens={max_tokens}; raise max_tokens or lower the budget"
        )
    return Tags(opens, closes, forced)


def spellings(tokenizer: Tokenizer, tag: str) -> tuple[tuple[int, ...], ...]:
    """Token ids that cover the tag beside usual neighbours, shortest first, each once."""
    found = {tuple(tokenizer.encode(tag)): None}
    for left in ("", "\n", " ", "a", ".", ".\n"):
        for right in ("", "\n", "\n\n", " ", "a"):
            ids, offsets = tokenizer.encode_with_offsets(left + tag + right)
            start, end = len(left), len(left) + len(tag)
            found[tuple(i for i, (a, b) in zip(ids, offsets, strict=True) if a < end and b > start)] = None
    usable = [s for s in found if s]
    return tuple(usable[:1] + sorted(usable[1:], key=len))[:SPELLINGS]


def idle() -> Thought:
    """One row without a budget."""
    never = np.full((SPELLINGS, TAG_TOKENS), NEVER, np.int32)
    return Thought(
        phase_B=np.int32(BEFORE),
        count_B=np.int32(0),
        limit_B=np.int32(NO_LIMIT),
        least_B=np.int32(0),
        open_BAM=never,
        close_BAM=never,
        recent_BM=np.full(TAG_TOKENS, NOTHING, np.int32),
        forced_BM=np.full(TAG_TOKENS, ANY, np.int32),
        forced_i_B=np.int32(TAG_TOKENS),
    )


def initial(tokenizer: Tokenizer, thinking: Thinking, tags: Tags, prompt: np.ndarray) -> Thought:
    """One row's state (leaves without B) after its prompt: THINKING where the prompt ends with the open tag."""
    recent = np.full(TAG_TOKENS, NOTHING, np.int32)
    tail = prompt[-TAG_TOKENS:]
    recent[TAG_TOKENS - len(tail) :] = tail
    forced = np.full(TAG_TOKENS, ANY, np.int32)
    forced[: len(tags.forced)] = tags.forced
    text = tokenizer.decode(prompt[-(4 * TAG_TOKENS) :]).rstrip()
    phase = THINKING if text.endswith(thinking.open) else BEFORE
    due = phase == THINKING and thinking.max_tokens == 0
    return idle()._replace(
        phase_B=np.int32(phase),
        limit_B=np.int32(thinking.max_tokens),
        least_B=np.int32(thinking.min_tokens),
        open_BAM=_table(tags.open),
        close_BAM=_table(tags.close),
        recent_BM=recent,
        forced_BM=forced,
        forced_i_B=np.int32(0 if due else TAG_TOKENS),
    )


def _table(tags: Sequence[Sequence[int]]) -> np.ndarray:
    table = np.full((SPELLINGS, TAG_TOKENS), NEVER, np.int32)
    for row, tag in zip(table, tags, strict=False):
        row[: TAG_TOKENS - len(tag)] = ANY
        row[TAG_TOKENS - len(tag) :] = tag
    return table


def spans(tags: Tags | None, first: int, phase_T: np.ndarray, tokens_T: np.ndarray) -> tuple[Span | None, Span | None]:
    """(thinking, answer) of a completion from the phase after each token; `first` is the phase after the prompt."""
    T = len(tokens_T)
    thought = np.flatnonzero(phase_T != BEFORE)
    if tags is None or (first == BEFORE and not thought.size):
        return None, (0, T)
    start = 0 if first == THINKING else int(thought[0]) + 1
    answer = np.flatnonzero(phase_T == ANSWER)
    if not answer.size:
        return (start, T), None
    end = int(answer[0]) + 1
    tail = tokens_T[:end].tolist()
    tag = max((len(s) for s in (*tags.close, tags.forced) if tail[-len(s) :] == list(s)), default=1)
    return (start, max(start, end - tag)), (end, T)
