"""From examples to batches: tokens and loss masks, what is too long or empty, packing, and the place in the data.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from cabochon.batch import Batch, best_fit, from_sequences
from cabochon.chat import encode_chat, encode_chat_with_mask
from cabochon.data import Chat, Example, Plain, epoch_order, prompt_key, read_examples, split_held_out
from cabochon.errors import UserError
from cabochon.sft.config import DataConfig
from cabochon.tokenizer import Tokenizer

WINDOW = 1024
"""examples that are packed together: best-fit over more of them gains next to nothing and takes quadratic time"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """An example as tokens."""

    where: str
    ids: np.ndarray
    """[t] int32"""
    mask: np.ndarray
    """[t] bool: tokens the loss sees; the first has no log-prob and never counts"""
    lost: int = 0
    """tokens cut off"""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What happened to the examples of one split."""

    examples: int = 0
    """that are used"""
    truncated: int = 0
    dropped_long: int = 0
    dropped_empty: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    leaked: int = 0
    """held-out examples with a prompt that is trained on"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Examples ready to be batched."""

    examples: list[Encoded]
    sizes: tuple[int, ...]
    """of each source"""
    weights: tuple[float, ...]
    counts: Counts


class Position(NamedTuple):
    """The next row to be trained on. All that a resumed run needs of the data."""

    epoch: int = 0
    row: int = 0


def encode(example: Example, tokenizer: Tokenizer, *, train_on: str = "assistant") -> Encoded:
    """Tokens and mask. A `Plain` gets the end-of-text token, and the beginning-of-text one where the tokenizer adds it.

    Raises UserError naming the row: no end-of-text token, or a template that cannot tell the turns apart.
    """
    try:
        ids, mask = _chat(example, tokenizer) if isinstance(example, Chat) else _plain(example, tokenizer)
    except UserError as error:
        raise UserError(f"{example.where}: {error}") from error
    if train_on == "all":
        mask = np.ones(len(ids), bool)
    mask[:1] = False
    return Encoded(where=example.where, ids=ids, mask=mask)


def _chat(chat: Chat, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    masked = encode_chat_with_mask(tokenizer, chat.messages, tools=chat.tools)
    ids, mask = masked.ids, masked.mask.copy()
    if any(message["role"] == "assistant" for message in chat.messages[: chat.context]):
        given = encode_chat(tokenizer, chat.messages[: chat.context], tools=chat.tools)
        if ids[: len(given)].tolist() != given:
            raise UserError("the chat template writes the prompt's messages otherwise when a completion follows; "
                            "use a column of messages")  # fmt: skip
        mask[: len(given)] = False
    return ids, mask


def _plain(plain: Plain, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    if not tokenizer.eos_ids:
        raise UserError(f"{tokenizer.source}: has no end-of-text token, so a text would have no end")
    bos = tokenizer.bos_id
    start = [bos] if bos is not None and bos in tokenizer.encode("", add_special=True) else []
    # Each part by itself, as a sampler will see them: the prompt's last token never depends on the completion.
    prompt, completion = (tokenizer.encode(text) for text in (plain.prompt, plain.completion))
    ids = np.array([*start, *prompt, *completion, tokenizer.eos_ids[0]], np.int32)
    return ids, np.arange(len(ids)) >= len(start) + len(prompt)


def fit(encoded: Encoded, length: int, policy: str) -> Encoded | None:
    """At most `length` tokens, None where it is left out. Raises UserError where the policy is `error`."""
    over = len(encoded.ids) - length
    if over <= 0:
        return encoded
    match policy:
        case "drop":
            return None
        case "left":
            kept = slice(over, None)
        case "right":
            kept = slice(0, length)
        case _:
            raise UserError(
                f"{encoded.where}: {len(encoded.ids)} tokens, step.sequence_length is {length}; "
                "raise it, or set data.too_long to drop, left or right"
            )
    mask = encoded.mask[kept].copy()
    mask[0] = False
    return replace(encoded, ids=encoded.ids[kept], mask=mask, lost=over)


def encode_split(
    sources: Sequence[Sequence[Example]], weights: Sequence[float], tokenizer: Tokenizer, cfg: DataConfig, length: int
) -> Split:
    """Every example of every source, encoded and counted. Raises UserError where nothing is left to use."""
    used: list[Encoded] = []
    sizes, long, empty = [], 0, 0
    for source in sources:
        before = len(used)
        for example in source:
            encoded = encode(example, tokenizer, train_on=cfg.train_on)
            if not encoded.mask.any():
                if cfg.empty == "error":
                    raise UserError(
                        f"{example.where}: no token to learn: there is no assistant turn or completion in it; "
                        "fix the row, or set data.empty=drop"
                    )
                empty += 1
                continue
            fitted = fit(encoded, length, cfg.too_long)
            if fitted is None:
                long += 1
            elif not fitted.mask.any():
                empty += 1
            else:
                used.append(fitted)
        sizes.append(len(used) - before)
    counts = Counts(
        examples=len(used),
        truncated=sum(e.lost > 0 for e in used),
        dropped_long=long,
        dropped_empty=empty,
        tokens=sum(len(e.ids) for e in used),
        trained_tokens=sum(int(e.mask.sum()) for e in used),
    )
    return Split(examples=used, sizes=tuple(sizes), weights=tuple(weights), counts=counts)


def read_splits(cfg: DataConfig, tokenizer: Tokenizer, length: int) -> tuple[Split, Split]:
    """(training, held-out). Raises UserError for whatever is wrong with a row, and where no training row is left."""
    sources = read_examples(cfg.train, cfg.columns, chat=cfg.chat)
    held: list[Sequence[Example]] = list(read_examples(cfg.eval, cfg.columns, chat=cfg.chat))
    if cfg.eval_fraction:
        sides = [split_held_out(source, cfg.eval_fraction) for source in sources]
        held += [[source[i] for i in side[1]] for source, side in zip(sources, sides, strict=True)]
        sources = [[source[i] for i in side[0]] for source, side in zip(sources, sides, strict=True)]
    weights = [source.weight for source in cfg.train]
    train = encode_split(sources, weights, tokenizer, cfg, length)
    evaluation = encode_split(held, [1.0] * len(held), tokenizer, cfg, length)
    for split, rows, keys in ((train, sources, "data.train"), (evaluation, held, "data.eval and data.eval_fraction")):
        if not split.examples and (split is train or held):
            c = split.counts
            why = f"{c.dropped_long} were too long, {c.dropped_empty} had no token to learn within {length} tokens"
            if cfg.eval_fraction and not any(rows):
                why = f"no prompt fell on this side of data.eval_fraction={cfg.eval_fraction:g}; set another share"
            raise UserError(f"{keys}: no usable row ({why})")
    if not len(epoch_order(train.sizes, train.weights, 0, 0)):
        each = ", ".join(f"{weight:g} x {size}" for size, weight in zip(train.sizes, weights, strict=True))
        raise UserError(f"data.train: its weights leave an epoch without a row ({each}); raise them")
    trained = {prompt_key(example) for source in sources for example in source}
    leaked = sum(prompt_key(example) in trained for source in held for example in source)
    return train, replace(evaluation, counts=replace(evaluation.counts, leaked=leaked))


@dataclass(frozen=True, kw_only=True, eq=False)
class Feed:
    """Batches of one shape out of a split, in an order that (seed, position) decides alone."""

    split: Split
    batch_size: int
    length: int
    packing: bool
    seed: int
    pad_id: int = 0
    _plan: dict[int, list[list[int]]] = field(default_factory=dict)
    """the rows of the epochs in use, as lists of examples"""

    def take(self, position: Position) -> tuple[Batch, list[Encoded], Position]:
        """The batch that begins there, the examples as they lie in it (row by row), and where the next one begins.

        Epochs follow seamlessly.
        """
        rows: list[list[int]] = []
        while len(rows) < self.batch_size:
            plan = self.rows(position.epoch)
            new = plan[position.row : position.row + self.batch_size - len(rows)]
            rows += new
            position = Position(position.epoch, position.row + len(new))
            if position.row >= len(plan):
                position = Position(position.epoch + 1, 0)
        return *self._batch(rows), position

    def rows(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch: windows of its order, packed, then shuffled so that full rows are everywhere."""
        if epoch not in self._plan:
            order = epoch_order(self.split.sizes, self.split.weights, self.seed, epoch)
            rows = pack(self.split, order, self.length, self.packing)
            shuffled = np.random.default_rng([self.seed, 2, epoch]).permutation(len(rows))
            self._plan.pop(epoch - 2, None)
            self._plan[epoch] = [rows[i] for i in shuffled]
        return self._plan[epoch]

    def all_once(self) -> list[Batch]:
        """Every example once, the last batch filled up with empty rows: for evaluation."""
        return [batch for batch, _ in self.all_with_examples()]

    def all_with_examples(self) -> list[tuple[Batch, list[Encoded]]]:
        """The same, with the examples as they lie in each batch."""
        rows = pack(self.split, np.arange(len(self.split.examples)), self.length, self.packing)
        rows += [[]] * (-len(rows) % self.batch_size)
        return [self._batch(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]

    def _batch(self, rows: Sequence[Sequence[int]]) -> tuple[Batch, list[Encoded]]:
        used = [self.split.examples[i] for row in rows for i in row]
        places, start = [], 0
        for row in rows:
            places.append(list(range(start, start + len(row))))
            start += len(row)
        masks = [e.mask for e in used]
        return from_sequences([e.ids for e in used], masks, self.length, rows=places, pad_id=self.pad_id), used


def pack(split: Split, order: np.ndarray, length: int, packing: bool) -> list[list[int]]:
    """Rows of at most `length` tokens, as examples of the split; one example a row without packing."""
    if not packing:
        return [[int(i)] for i in order]
    rows = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        lengths = [len(split.examples[i].ids) for i in window]
        rows += [[int(window[i]) for i in row] for row in best_fit(lengths, length)]
    return rows
