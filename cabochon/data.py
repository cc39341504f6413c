"""Rows of text out of files, what kind of example each is, and the order they are trained in. No jax, no tokenizer.

An example is a `Chat` (messages) or a `Plain` (prompt and completion as text, or text alone). The order is a function
of (seed, epoch), so a run that goes on needs no more than two numbers.

A reader of another kind of row (preference pairs, say) is a function from `Row` to its own example, beside
`example_of`; files, columns, mixing and order are shared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cabochon.config import ColumnsConfig, SourceConfig
from cabochon.errors import UserError
from cabochon.types import Message

FILES = (".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record of a file."""

    where: str
    """`FILE:LINE` of JSON lines, `FILE[INDEX]` of anything else"""
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation. Assistant messages from `context` on are what is learnt."""

    where: str
    messages: tuple[Message, ...]
    context: int = 0
    """messages that are given: the prompt's"""
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Text that follows a text; `prompt` is empty where all of it is learnt."""

    where: str
    prompt: str
    completion: str


Example = Chat | Plain

# --------------------------------------------------------------------------------------------------------------- files


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSON lines, JSON or parquet file, or of a Hugging Face dataset directory (`save_to_disk`).

    Raises UserError naming the file, and the line where one is not a JSON object; also for a file without rows.
    """
    path = Path(path)
    if path.is_dir():
        rows = _dataset_rows(path)
    elif not path.exists():
        raise UserError(f"{path}: no such file")
    elif path.suffix in (".jsonl", ".ndjson"):
        rows = list(_json_lines(path))
    elif path.suffix == ".json":
        rows = _json_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        raise UserError(f"{path}: expected a file ending in {', '.join(FILES)} or a dataset directory")
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _json_lines(path: Path) -> Iterator[Row]:
    for number, raw in enumerate(_bytes_of(path).split(b"\n"), 1):  # not splitlines: U+2028 may stand in JSON text
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {str(error)[:200]}") from None
        yield Row(where=where, values=_object(where, value))


def _json_rows(path: Path) -> list[Row]:
    try:
        value = json.loads(_bytes_of(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {str(error)[:200]}") from None
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of objects, got {type(value).__name__}; one object a line is .jsonl")
    return [Row(where=f"{path}[{i}]", values=_object(f"{path}[{i}]", each)) for i, each in enumerate(value)]


def _object(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _parquet_rows(path: Path) -> list[Row]:
    _need("pyarrow", path)
    import pyarrow
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a parquet file: {' '.join(str(error).split())[:200]}") from None
    return [Row(where=f"{path}[{i}]", values=without_nulls(each)) for i, each in enumerate(found)]


def _dataset_rows(path: Path) -> list[Row]:
    _need("datasets", path)
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a dataset written by save_to_disk: {said}") from None
    if isinstance(found, datasets.DatasetDict):
        one = path / next(iter(found))
        raise UserError(f"{path}: holds the splits {', '.join(found)}; name one of them, such as {one}")
    return [Row(where=f"{path}[{i}]", values=without_nulls(each)) for i, each in enumerate(found)]


def without_nulls(value: Any) -> Any:
    """Without the keys of mappings, at any depth, that hold nothing. Arrow gives every row of a column the keys of all,
    and a chat template that asks whether a message has `tool_calls` would find them in each."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _need(package: str, path: Path) -> None:
    if find_spec(package) is None:
        raise UserError(f"{path}: reading it needs {package}: pip install 'cabochon[data]'")


# ------------------------------------------------------------------------------------------------------------ examples


def example_of(row: Row, columns: ColumnsConfig = ColumnsConfig(), *, chat: bool = False) -> Example:
    """What a row is, by the columns it has: messages, else prompt and completion, else text.

    `chat` makes a conversation of a prompt and a completion that are text. Raises UserError naming the row and column.
    """
    has = row.values.keys()
    if columns.messages in has:
        messages = _messages(row, columns.messages)
        return Chat(where=row.where, messages=messages, tools=_tools(row, columns.tools))
    if columns.prompt in has and columns.completion in has:
        prompt, completion = row.values[columns.prompt], row.values[columns.completion]
        if isinstance(prompt, list) or isinstance(completion, list):
            given = _messages(row, columns.prompt)
            messages = (*given, *_messages(row, columns.completion))
            return Chat(where=row.where, messages=messages, context=len(given), tools=_tools(row, columns.tools))
        prompt, completion = _text(row, columns.prompt), _text(row, columns.completion)
        if not chat:
            return Plain(where=row.where, prompt=prompt, completion=completion)
        turns: tuple[Message, ...] = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
        return Chat(where=row.where, messages=turns, context=1, tools=_tools(row, columns.tools))
    if columns.text in has:
        return Plain(where=row.where, prompt="", completion=_text(row, columns.text))
    wanted = f"{columns.messages!r}, or {columns.prompt!r} and {columns.completion!r}, or {columns.text!r}"
    raise UserError(f"{row.where}: expected a column {wanted}; the row has {', '.join(sorted(has)) or 'none'}")


def _text(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str) or not value:
        have = "it is empty" if value == "" else f"got {_short(value)}"
        raise UserError(f"{row.where}: column {column!r}: expected text, {have}")
    return value


def _messages(row: Row, column: str) -> tuple[Message, ...]:
    value = row.values[column]
    if not isinstance(value, list) or not value:
        raise UserError(f"{row.where}: column {column!r}: expected a list of messages, got {_short(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{row.where}: {column}[{i}]: expected a message with a role, got {_short(message)}")
        if not isinstance(message.get("content"), str | None) or (
            message.get("content") is None and not message.get("tool_calls")
        ):
            raise UserError(f"{row.where}: {column}[{i}].content: expected text, got {_short(message.get('content'))}")
    return tuple(value)


def _tools(row: Row, column: str) -> tuple[Mapping[str, Any], ...] | None:
    """Schemas as a list, or as the JSON text of one, which is how parquet files keep what differs from row to row."""
    value = row.values.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{row.where}: column {column!r}: expected JSON, got {_short(value)}") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(f"{row.where}: column {column!r}: expected a list of tool schemas, got {_short(value)}")
    return tuple(value)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 50 else text[:47] + '...'}"


def prompt_key(example: Example) -> str:
    """16 hex digits that are equal for equal prompts, whatever their spacing and case: what may not leak into the
    held-out rows. Of a text without a prompt, the whole of it."""
    match example:
        case Chat():
            turns = [i for i, m in enumerate(example.messages) if m["role"] == "assistant" and i >= example.context]
            given = example.messages[: turns[0]] if turns else example.messages
            text = "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in given if m["role"] != "system")
        case Plain():
            text = example.prompt or example.completion
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def split_held_out(examples: Sequence[Example], fraction: float) -> tuple[list[int], list[int]]:
    """Indices (trained, held out). The side follows from the prompt alone: copies stay together, and a row never
    changes sides when others are added."""
    held = [int(prompt_key(example), 16) < fraction * 2**64 for example in examples]
    return [i for i, h in enumerate(held) if not h], [i for i, h in enumerate(held) if h]


# --------------------------------------------------------------------------------------------------------------- order


def read_examples(
    sources: Sequence[SourceConfig], columns: ColumnsConfig = ColumnsConfig(), *, chat: bool = False
) -> list[list[Example]]:
    """The examples of each source."""
    return [[example_of(row, columns, chat=chat) for row in read_rows(source.path)] for source in sources]


def epoch_order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """[n] indices into the concatenated sources, in the order of this epoch; a pure function of its arguments.

    In each epoch a row of source s comes up weights[s] times on average. Every source is gone through whole, in an
    order of its own, before any of its rows comes up again, also across epochs.
    """
    picks, start = [], 0
    for s, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        first, last = (int(np.floor(e * weight * size)) for e in (epoch, epoch + 1))
        if last > first:
            passes = range(first // size, (last - 1) // size + 1)
            stream = np.concatenate([np.random.default_rng([seed, 0, s, k]).permutation(size) for k in passes])
            picks.append(start + stream[first - passes[0] * size : last - passes[0] * size])
        start += size
    if not picks:
        return np.zeros(0, np.int64)
    return np.random.default_rng([seed, 1, epoch]).permutation(np.concatenate(picks))
