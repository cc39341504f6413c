"""Preference rows to pairs of token sequences, and batches in which a pair is never apart.

A `Prompted` text (a prompt and what answers it) is encoded in one way, by `encode`: for training rows here, for
rollouts in `scorer`. Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from cabochon.batch import Batch, from_sequences, to_rows
from cabochon.chat import encode_chat
from cabochon.data import Row, epoch_order, read_rows
from cabochon.errors import UserError
from cabochon.reward.config import PreferenceColumns, PreferenceData
from cabochon.tokenizer import Tokenizer
from cabochon.types import Message, Prompt

Messages = tuple[Message, ...]
LARGEST = float(np.finfo(np.float32).max)
"""margin"""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A row: two answers to a prompt, the better first, or one alone (good: as `chosen`, bad: as `rejected`)."""

    where: str
    prompt: str | Messages
    chosen: str | Messages | None
    rejected: str | Messages | None
    margin: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A row as tokens. An answer that is not there has no tokens."""

    where: str
    prompt: str
    """hash of the prompt"""
    chosen: np.ndarray
    """[t] int32, prompt included"""
    rejected: np.ndarray
    margin: float

    @property
    def length(self) -> int:
        return len(self.chosen) + len(self.rejected)


# ---------------------------------------------------------------------------------------------------------------- rows


def preference_of(row: Row, columns: PreferenceColumns = PreferenceColumns()) -> Preference:
    """What a row says. Raises UserError naming row and column: missing, of the wrong kind, or two equal answers."""
    has = row.values.keys()
    if columns.label in has and columns.completion in has and columns.prompt in has:
        prompt, completion = _part(row, columns.prompt), _part(row, columns.completion)
        _follows(row, columns.prompt, prompt, columns.completion, completion)
        good = row.values[columns.label]
        if good not in (True, False):
            raise UserError(f"{row.where}: column {columns.label!r}: expected true or false, got {good!r}")
        both = (completion, None) if good else (None, completion)
        return Preference(where=row.where, prompt=prompt, chosen=both[0], rejected=both[1])
    for column in (columns.chosen, columns.rejected):
        if column not in has:
            raise UserError(
                f"{row.where}: no column {column!r}: expected {columns.chosen!r} and {columns.rejected!r}, or "
                f"{columns.prompt!r}, {columns.completion!r} and {columns.label!r}; "
                f"the row has {', '.join(sorted(has)) or 'none'}"
            )
    chosen, rejected = _part(row, columns.chosen), _part(row, columns.rejected)
    _same_kind(row, columns.chosen, chosen, columns.rejected, rejected)
    if chosen == rejected:
        raise UserError(f"{row.where}: columns {columns.chosen!r} and {columns.rejected!r} are equal")
    if columns.prompt in has:
        prompt = _part(row, columns.prompt)
        _follows(row, columns.prompt, prompt, columns.chosen, chosen)
    else:
        prompt, chosen, rejected = _implicit(row, columns.prompt, chosen, rejected)
    margin = row.values.get(columns.margin)
    if not isinstance(margin, int | float | None) or isinstance(margin, bool) or not abs(margin or 0.0) <= LARGEST:
        said = repr(margin)[:50]
        raise UserError(f"{row.where}: column {columns.margin!r}: expected a number, got {said}")
    return Preference(where=row.where, prompt=prompt, chosen=chosen, rejected=rejected, margin=float(margin or 0.0))


def _part(row: Row, column: str) -> str | Messages:
    value = row.values[column]
    if isinstance(value, str):
        return value
    good = isinstance(value, list) and value and all(is_message(m) for m in value)
    if not good:
        said = " ".join(repr(value).split())[:50]
        raise UserError(f"{row.where}: column {column!r}: expected text or a list of messages, got {said}")
    return tuple(value)


def is_message(value: Any) -> bool:
    """A role and a content, both text."""
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _same_kind(row: Row, first: str, a: str | Messages, second: str, b: str | Messages) -> None:
    if isinstance(a, str) != isinstance(b, str):
        kinds = ["text" if isinstance(x, str) else "messages" for x in (a, b)]
        raise UserError(f"{row.where}: column {first!r} is {kinds[0]} and {second!r} is {kinds[1]}; make them the same")


def _follows(row: Row, first: str, prompt: str | Messages, second: str, answer: str | Messages) -> None:
    """Text after messages is what the assistant says; messages after text would be half a conversation."""
    if isinstance(prompt, str):
        _same_kind(row, first, prompt, second, answer)


def _implicit(
    row: Row, column: str, chosen: str | Messages, rejected: str | Messages
) -> tuple[str | Messages, str | Messages, str | Messages]:
    """(prompt, chosen, rejected) where the prompt is what both begin with; of text, whole words of it."""
    apart = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    at = next(apart, min(len(chosen), len(rejected)))
    if isinstance(chosen, str) and isinstance(rejected, str):
        at = max(chosen.rfind(" ", 0, at), chosen.rfind("\n", 0, at), 0)
    if not at or at in (len(chosen), len(rejected)):
        raise UserError(f"{row.where}: no column {column!r}, and the two answers do not begin with the same prompt")
    return chosen[:at], chosen[at:], rejected[at:]


# -------------------------------------------------------------------------------------------------------------- tokens


def encode(
    prompt: Prompt, answer: str | Sequence[Message], tokenizer: Tokenizer, *, chat: bool = False, ended: bool = True
) -> np.ndarray:
    """[t] int32: a prompt with its answer as the scalar model reads them.

    Messages go through the chat template; so does text with `chat`. Other text is prompt, answer and the end-of-text
    token, each part encoded by itself, as a sampler sees them. `ended=False`: an answer that was cut off, so without
    the tokens that end one.
    """
    if isinstance(prompt, str) and not chat:
        if not tokenizer.eos_ids:
            raise UserError(f"{tokenizer.source}: has no end-of-text token, so a text would have no end")
        assert isinstance(answer, str)
        bos = tokenizer.bos_id
        start = [bos] if bos is not None and bos in tokenizer.encode("", add_special=True) else []
        end = [tokenizer.eos_ids[0]] if ended else []
        return np.array([*start, *tokenizer.encode(prompt), *tokenizer.encode(answer), *end], np.int32)
    given: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    turns: list[Message] = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    if not ended:
        assert isinstance(answer, str)
        ids = [*encode_chat(tokenizer, given, add_generation_prompt=True), *tokenizer.encode(answer)]
        return np.array(ids, np.int32)
    return np.array(encode_chat(tokenizer, [*given, *turns]), np.int32)


def pair_of(row: Preference, tokenizer: Tokenizer, *, chat: bool = False) -> Pair:
    """Raises UserError naming the row where its tokens cannot be had, or are equal though its texts are not."""
    none = np.zeros(0, np.int32)
    try:
        both = [none if a is None else encode(row.prompt, a, tokenizer, chat=chat) for a in (row.chosen, row.rejected)]
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    if short := [ids for ids in both if len(ids) == 1]:
        raise UserError(f"{row.where}: prompt and answer are one token ({short[0][0]}): there is nothing to tell apart")
    if np.array_equal(both[0], both[1]):
        raise UserError(f"{row.where}: chosen and rejected are the same tokens: nothing to prefer")
    words = row.prompt if isinstance(row.prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in row.prompt)
    key = hashlib.sha256(" ".join(words.casefold().split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Pair(where=row.where, prompt=key, chosen=both[0], rejected=both[1], margin=row.margin)


# ------------------------------------------------------------------------------------------------------------- batches


class Position(NamedTuple):
    """The next group of pairs to be trained on: all that a resumed run needs of the data."""

    epoch: int = 0
    group: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Pairs by prompt: those of one prompt are learnt in one step, once an epoch, since apart they over-fit."""

    groups: list[list[Pair]]
    sizes: tuple[int, ...]
    """groups of each source"""
    weights: tuple[float, ...]
    dropped: int
    """pairs left out: too long, or more of one prompt than asked for"""

    @property
    def pairs(self) -> list[Pair]:
        return [pair for group in self.groups for pair in group]


def read_splits(cfg: PreferenceData, tokenizer: Tokenizer, length: int, rows: int) -> tuple[Split, Split]:
    """(training, held-out), for batches of `rows` rows of `length` tokens. Raises UserError for a row that is wrong and
    where nothing is left."""

    def pairs(path: str) -> list[Pair]:
        found = (preference_of(row, cfg.columns) for row in read_rows(path))
        return [pair_of(row, tokenizer, chat=cfg.chat) for row in found]

    def split(sources: list[list[Pair]], weights: list[float], key: str) -> Split:
        made = [_groups(source, cfg, length, rows) for source in sources]
        groups = [group for source in made for group in source]
        dropped = sum(len(source) for source in sources) - sum(len(group) for group in groups)
        if sources and not groups:
            why = f"{dropped} were longer than {length} tokens"
            if cfg.eval_fraction and not any(sources):
                why = f"no prompt fell on this side of data.eval_fraction={cfg.eval_fraction:g}; set another share"
            raise UserError(f"{key}: no usable pair ({why})")
        return Split(groups=groups, sizes=tuple(map(len, made)), weights=tuple(weights), dropped=dropped)

    sources, held = [pairs(s.path) for s in cfg.train], [pairs(s.path) for s in cfg.eval]
    if cfg.eval_fraction:
        bound = cfg.eval_fraction * 2**64
        held += [[pair for pair in source if int(pair.prompt, 16) < bound] for source in sources]
        sources = [[pair for pair in source if int(pair.prompt, 16) >= bound] for source in sources]
    seen = {pair.prompt for source in held for pair in source}
    if leaked := next((pair for source in sources for pair in source if pair.prompt in seen), None):
        raise UserError(f"{leaked.where}: its prompt is among the held-out rows too; take it out of one of them")
    train = split(sources, [source.weight for source in cfg.train], "data.train")
    if not len(epoch_order(train.sizes, train.weights, 0, 0)):
        each = ", ".join(f"{weight:g} x {size}" for size, weight in zip(train.sizes, train.weights, strict=True))
        raise UserError(f"data.train: its weights leave an epoch without a prompt ({each}); raise them")
    return train, split(held, [1.0] * len(held), "data.eval and data.eval_fraction")


def _groups(pairs: Sequence[Pair], cfg: PreferenceData, length: int, rows: int) -> list[list[Pair]]:
    """The pairs by prompt, in order of appearance, those that fit; more than fill a batch make several groups."""
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.length > length:
            if cfg.too_long == "error":
                raise UserError(
                    f"{pair.where}: the two answers with their prompts have {pair.length} tokens, "
                    f"step.sequence_length is {length}; raise it, or set data.too_long=drop"
                )
            continue
        by_prompt.setdefault(pair.prompt, []).append(pair)
    out = []
    for group in by_prompt.values():
        group = group[: cfg.max_prompt_pairs or None]
        while group:
            n = _fitting(group, [[] for _ in range(rows)], [length] * rows, cfg.packing)
            out.append(group[:n])
            group = group[n:]
    return out


def _fitting(group: Sequence[Pair], rows: list[list[Pair]], room: list[int], packing: bool) -> int:
    """Puts pairs into the fullest row that takes them, in order, until one has no place; how many were put."""
    for n, pair in enumerate(group):
        fits = [r for r, left in enumerate(room) if left >= pair.length and (packing or not rows[r])]
        if not fits:
            return n
        r = min(fits, key=lambda r: room[r])
        rows[r].append(pair)
        room[r] -= pair.length
    return len(group)


@dataclass(frozen=True, kw_only=True, eq=False)
class Feed:
    """Batches of one shape, in an order that (seed, position) decides alone."""

    split: Split
    batch_size: int
    length: int
    packing: bool
    seed: int
    pad_id: int = 0
    _orders: dict[int, np.ndarray] = field(default_factory=dict)

    def take(self, position: Position) -> tuple[Batch, list[list[Pair]], Position]:
        """The batch that begins there, its pairs row by row, and where the next begins. Epochs follow seamlessly."""
        rows: list[list[Pair]] = [[] for _ in range(self.batch_size)]
        room = [self.length] * self.batch_size
        taken: set[int] = set()
        while True:
            order = self._order(position.epoch)
            group = int(order[position.group])
            trial, left = [list(row) for row in rows], list(room)
            members = self.split.groups[group]
            if group in taken or _fitting(members, trial, left, self.packing) < len(members):
                return batch_of(rows, self.length, self.pad_id), rows, position
            rows, room = trial, left
            taken.add(group)
            last = position.group + 1 >= len(order)
            position = Position(position.epoch + 1, 0) if last else position._replace(group=position.group + 1)

    def all_once(self) -> list[tuple[Batch, list[list[Pair]]]]:
        """Every pair once, in order: for evaluation."""
        out, pairs = [], self.split.pairs
        while pairs:
            rows: list[list[Pair]] = [[] for _ in range(self.batch_size)]
            n = _fitting(pairs, rows, [self.length] * self.batch_size, self.packing)
            out.append((batch_of(rows, self.length, self.pad_id), rows))
            pairs = pairs[n:]
        return out

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders.pop(epoch - 2, None)
            self._orders[epoch] = epoch_order(self.split.sizes, self.split.weights, self.seed, epoch)
        return self._orders[epoch]


def batch_of(rows: Sequence[Sequence[Pair]], length: int, pad_id: int = 0) -> Batch:
    """Pair i of a row is its segments 2i - 1 (chosen) and 2i (rejected); see `loss` for mask and margin."""
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    places: list[list[int]] = []
    for row in rows:
        places.append(list(range(len(tokens), len(tokens) + 2 * len(row))))
        for pair in row:
            held_by_chosen = len(pair.chosen) > 0
            for ids, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
                end = (np.arange(len(ids)) == len(ids) - 1).astype(np.float32)
                tokens.append(ids)
                masks.append(sign * end)
                margins.append(pair.margin * end * float((sign > 0) == held_by_chosen))
    batch = from_sequences(tokens, masks, length, rows=places, pad_id=pad_id)
    return replace(batch, margin_BT=to_rows(margins, places, length))
