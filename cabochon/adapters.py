"""Datasets of other RL systems as our task files: verl's, SkyRL's and those of verifiers (v0).

| form | a row has | `ground truth` is |
| --- | --- | --- |
| verl | data_source, prompt, reward_model.ground_truth, extra_info | reward_model.ground_truth |
| skyrl | data_source, prompt, env_class, reward_spec.ground_truth, extra_info | reward_spec.ground_truth |
| verifiers | question or prompt, answer, info, task | answer |

Without a reward function the maths verifier judges against the ground truth. With one, `compute_score` in verl's form
(verl, SkyRL) or a rubric's function in verifiers' (`f(completion, answer, info, ...)`) is called in a killable worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cabochon.data import Row, read_rows
from cabochon.errors import UserError
from cabochon.files import encodable, write_whole
from cabochon.verifiers.addresses import checked_address

Form = Literal["verl", "skyrl", "verifiers"]


def import_tasks(form: Form, source: Path, out: Path, *, reward: str | None = None, overwrite: bool = False) -> int:
    """Write `out` as `tasks.train` reads it, whole or not at all; returns how many tasks.

    `reward`: `path.py:function` or `module:function`. Raises UserError naming file, row and column.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; add --overwrite to replace it")
    address = None if reward is None else checked_address(reward)
    rows = [_task(form, row, f"{source.stem}/{i}", address) for i, row in enumerate(read_rows(source))]
    write_whole(out, "".join(row + "\n" for row in rows))
    return len(rows)


def _task(form: Form, row: Row, name: str, address: str | None) -> str:
    """One line of a task file."""
    match form:
        case "verl" | "skyrl":
            column = "reward_model" if form == "verl" else "reward_spec"
            truth = _truth(row, _object(row, column), f"{column}.ground_truth", "ground_truth")
            domain = _domain(row, "data_source")
            prompt = _prompt(row, "prompt")
            payload = {"data_source": domain, "ground_truth": truth, "extra_info": row.values.get("extra_info")}
            verifier = f"verl:{address}"
        case "verifiers":
            column = "answer"
            truth = _truth(row, row.values, column, column)
            domain = _domain(row, "task")
            prompt = _prompt(row, "prompt" if "prompt" in row.values else "question")
            payload = {"answer": truth, "info": _info(row), "task": domain}
            verifier = f"rubric:{address}"
    if address is None:
        if not isinstance(truth, str | int | float) or isinstance(truth, bool) or not str(truth).strip():
            where = column if form == "verifiers" else f"{column}.ground_truth"
            raise UserError(
                f"{row.where}: column {where!r}: expected an answer as text or a number for the maths verifier, got "
                f"{_short(truth)}; give --reward for a function that understands it"
            )
        verifier, payload = "math", {"answer": str(truth)}
    task = {"id": name, "prompt": prompt, "verifier": verifier, "payload": payload, "domain": domain}
    try:
        return encodable(json.dumps(task, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"{row.where}: holds something that is not plain data: {error}") from None


def _object(row: Row, column: str) -> Mapping[str, Any]:
    value = row.values.get(column)
    if not isinstance(value, Mapping):
        have = f"got {_short(value)}" if column in row.values else f"the row has {', '.join(sorted(row.values))}"
        raise UserError(f"{row.where}: column {column!r}: expected an object with ground_truth; {have}")
    return value


def _truth(row: Row, holder: Mapping[str, Any], where: str, key: str) -> Any:
    if holder.get(key) is None:
        have = ", ".join(sorted(holder))
        raise UserError(f"{row.where}: column {where!r} is missing or null; there are {have}")
    return holder[key]


def _domain(row: Row, column: str) -> str:
    value = row.values.get(column) or "default"
    if not isinstance(value, str):
        raise UserError(f"{row.where}: column {column!r}: expected text, got {_short(value)}")
    return value


def _prompt(row: Row, column: str) -> Any:
    value = row.values.get(column)
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not value:
        have = "it is empty" if value is not None and not value else f"got {_short(value)}"
        raise UserError(f"{row.where}: column {column!r}: expected text or a list of messages, {have}")
    for i, message in enumerate(value):
        if not (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            expected = "expected a message with a role and a content that is text"
            raise UserError(f"{row.where}: column {column!r}, message {i}: {expected}, got {_short(message)}")
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _info(row: Row) -> Any:
    """As verifiers reads it: an object, or the JSON text of one."""
    value = row.values.get("info")
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{row.where}: column 'info': expected an object or JSON, got {_short(value)}") from None
    return value or {}


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 50 else text[:47] + '...'}"
