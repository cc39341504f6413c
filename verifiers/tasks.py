"""Tasks out of JSONL files, and a split into training and held-out tasks that cannot leak.

A row has `prompt`, `verifier` and `payload`; without `payload` its other columns are that, as in TRL. Known shapes are
recognised by their columns: GSM8K (`question`, `answer` ending in `#### 72`), MATH (`problem`, `solution` with a box,
or `answer`), MBPP (`text` or `prompt`, `test_list`), HumanEval (`prompt`, `test`, `entry_point`) and LeetCode's in that
shape, which say in `query` what the model is asked. In Python, a `Columns` map reads anything else.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cabochon.errors import UserError
from cabochon.types import Prompt, Task
from cabochon.verifiers.code_tests import plan_of
from cabochon.verifiers.instructions import constraints
from cabochon.verifiers.math import gold_answers
from cabochon.verifiers.math_boxes import last_box
from cabochon.verifiers.text import visible
from cabochon.verifiers.verdict import label_and_choices

LINE_LIMIT = 64 << 20
OWN = frozenset({"id", "prompt", "verifier", "payload", "domain", "completion"})
"""columns of a row that are no payload; `completion` is what supervised training reads"""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a row keeps what a task needs.

    Example: `Columns(prompt="q", verifier="math", payload={"answer": "a"})` reads the gold from column `a`.
    """

    prompt: str
    verifier: str
    payload: Mapping[str, str] = field(default_factory=dict)
    """payload name -> column"""
    id: str | None = None
    domain: str | None = None


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Numbered from 1, none longer than the limit and a byte. Raises UserError where they cannot be read."""
    try:
        with path.open("rb") as lines:
            yield from enumerate(iter(lambda: lines.readline(LINE_LIMIT + 1), b""), start=1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_rows(path: str | pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`FILE:LINE` and object of each line. Raises UserError naming both for one that is not a JSON object."""
    path = pathlib.Path(path)
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long
        raise UserError(f"{path}: {error.strerror}") from None
    if not there:
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; expected a file of JSON lines")
    if path.suffix in (".csv", ".tsv", ".parquet", ".xlsx"):
        raise UserError(f"{path}: expected JSON lines, one object a line; pandas writes them from such a file: "
                        "frame.to_json('tasks.jsonl', orient='records', lines=True)")
    for number, raw in _lines(path):
        where = f"{path}:{number}"
        if not raw.strip():
            continue
        if len(raw) > LINE_LIMIT:
            raise UserError(f"{where}: the line is longer than {LINE_LIMIT} bytes, which is the most that is read")
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            hint = ""
            if raw.strip() in (b"[", b"{", b"[{"):
                hint = "; a line holds one whole object (jq -c '.[]' makes such lines of an array)"
            raise UserError(f"{where}: not JSON: {str(error)[:200]}{hint}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}; each line holds one")
        yield where, row


def read_tasks(
    path: str | pathlib.Path, columns: Columns | None = None, *, domain: str | None = None, verifier: str | None = None
) -> list[Task]:
    """The tasks of a JSONL file. `domain` is by default the file's name; `verifier` judges rows that name none.

    Raises UserError with file and line.
    """
    path = pathlib.Path(path)
    tasks: list[Task] = []
    seen: dict[str, str] = {}
    for where, row in read_rows(path):
        name = f"{path.stem}/{len(tasks)}"
        task = _by_columns(where, row, columns, name) if columns else task_of_row(where, row, name, verifier)
        if task.domain == "default":
            task = Task(id=task.id, prompt=task.prompt, verifier=task.verifier, payload=task.payload,
                        domain=domain or path.stem)
        check_payload(where, task)
        if task.id in seen:
            raise UserError(f"{where}: the id {task.id!r} was used at {seen[task.id]}")
        seen[task.id] = where
        tasks.append(task)
    if not tasks:
        raise UserError(f"{path}: holds no rows")
    return tasks


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: column {column!r} must be a text, got {type(value).__name__} {str(value)[:40]!r}")
    return value


def _by_columns(where: str, row: Mapping[str, Any], columns: Columns, name: str) -> Task:
    wanted = [columns.prompt, *columns.payload.values(), *filter(None, (columns.id, columns.domain))]
    missing = [column for column in wanted if column not in row]
    if missing:
        raise UserError(f"{where}: no column {missing[0]!r}; the row has {sorted(row)}")
    return Task(
        id=_named(row, columns.id, name) if columns.id else name,
        prompt=_prompt(where, row[columns.prompt], columns.prompt),
        verifier=columns.verifier,
        payload={key: row[column] for key, column in columns.payload.items()},
        domain=_named(row, columns.domain, "default") if columns.domain else "default",
    )


def _prompt(where: str, value: Any, column: str) -> Prompt:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: column {column!r} is empty; expected a text or a list of messages")
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        return tuple(value)
    raise UserError(f"{where}: column {column!r} must be a text or a list of messages, got {type(value).__name__}")


def task_of_row(where: str, row: Mapping[str, Any], name: str, verifier: str | None = None) -> Task:
    """The task of a row of one of the known shapes; `verifier` judges one that names none. Raises UserError."""
    row = {column: value for column, value in row.items() if column != "verifier" or value is not None}
    if "prompt" in row and verifier and not {"verifier", "test_list", "entry_point"} & set(row):
        row = {**row, "verifier": verifier}
    if {"prompt", "verifier"} <= set(row):
        payload = row.get("payload", {k: v for k, v in row.items() if k not in OWN})
        if not isinstance(payload, dict):
            raise UserError(f"{where}: column 'payload' must be an object, got {type(payload).__name__}")
        return Task(id=_named(row, "id", name), prompt=_prompt(where, row["prompt"], "prompt"), payload=payload,
                    verifier=_text(where, row, "verifier"), domain=_named(row, "domain", "default"))
    if {"question", "answer"} <= set(row):
        return Task(id=name, prompt=_text(where, row, "question"), verifier="math",
                    payload={"answer": _after_hashes(where, _text(where, row, "answer"))})
    if "problem" in row and {"solution", "answer"} & set(row):
        return _math(where, row, name)
    if "test_list" in row:
        return _mbpp(where, row, name)
    if {"prompt", "test", "entry_point"} <= set(row):
        code, asked = _text(where, row, "prompt"), _text(where, row, "query" if row.get("query") else "prompt")
        solution = row.get("canonical_solution") or row.get("completion") or ""
        payload = {"prompt": code, "test": _text(where, row, "test"), "entry_point": _text(where, row, "entry_point"),
                   "reference": f"{code}{solution}"}
        return Task(id=_named(row, "task_id", name), prompt=asked, verifier="code", payload=payload)
    if "prompt" in row:
        raise UserError(f"{where}: no column 'verifier', which says who judges the answer; the row has {sorted(row)}")
    if "verifier" in row:
        raise UserError(f"{where}: no column 'prompt'; the row has {sorted(row)}")
    raise UserError(
        f"{where}: not a task: expected `prompt`, `verifier` and what that needs in `payload`, or a GSM8K, MATH, MBPP, "
        f"HumanEval or LeetCode row; this one has the columns {sorted(row)}"
    )


def _named(row: Mapping[str, Any], column: str, otherwise: str) -> str:
    """A column's value as text; a null is as none."""
    value = row.get(column)
    return otherwise if value is None else str(value)


def check_payload(where: str, task: Task) -> None:
    """What can be told without judging. Raises UserError."""
    try:
        match task.verifier:
            case "math":
                gold_answers(task)
            case "instructions":
                constraints(task)
            case "verdict":
                label_and_choices(task)
            case "code":
                plan_of(task.payload)
    except ValueError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'task {task.id}: ')}") from None


def _after_hashes(where: str, answer: str) -> str:
    _, mark, gold = answer.rpartition("####")
    if not mark or not gold.strip():
        raise UserError(
            f"{where}: a GSM8K answer ends in '#### NUMBER', this one in {answer[-30:]!r}; for a reward of your own "
            "name the columns `prompt` and `verifier`"
        )
    return gold.strip()


def _math(where: str, row: Mapping[str, Any], name: str) -> Task:
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        gold = str(answer)
    elif isinstance(answer, str) and answer.strip():
        gold = answer.strip()
    else:
        box = last_box(_text(where, row, "solution"))
        if box is None or not box.answer:
            raise UserError(f"{where}: the MATH solution has no \\boxed answer and the row no 'answer'")
        gold = box.answer
    domain = str(row.get("subject") or row.get("type") or "default")
    return Task(id=_named(row, "unique_id", name), prompt=_text(where, row, "problem"), verifier="math",
                payload={"answer": gold}, domain=domain)


def _mbpp(where: str, row: Mapping[str, Any], name: str) -> Task:
    tests = row["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise UserError(f"{where}: column 'test_list' must be a list of assert lines")
    words = _text(where, row, "text" if "text" in row else "prompt")
    imports = row.get("test_imports") or []
    setup = row.get("test_setup_code") or (imports if isinstance(imports, str) else "\n".join(map(str, imports)))
    prompt = f"{words.strip()}\nYour code should pass this test:\n{tests[0]}"
    identity = name if row.get("task_id") is None else f"mbpp/{row['task_id']}"
    return Task(id=identity, prompt=prompt, verifier="code",
                payload={"test_list": tests, "test_setup_code": setup, "reference": str(row.get("code") or "")})


# ---------------------------------------------------------------------------------------------------------- the split


def _words(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(_said(message.get("content", "")) for message in prompt)


def _said(content: Any) -> str:
    """A message's text, which may be in parts."""
    if isinstance(content, list | tuple):
        return "\n".join(str(part.get("text", part)) if isinstance(part, Mapping) else str(part) for part in content)
    return str(content)


_OPERATORS = {"times": "*", "cdot": "*", "div": "/", "dfrac": "\\frac", "tfrac": "\\frac", "left": "", "right": ""}
_SIGNS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "−": "-", "–": "-", "—": "-"})


def normalised(prompt: Prompt) -> str:
    """A prompt's words and numbers without case, spacing, punctuation, invisible letters, Unicode's and LaTeX's ways to
    write an operator, or commas between thousands; without LaTeX's sizes; operators and signs stay."""
    text = visible(_words(prompt)).casefold()
    text = re.sub(r"\\(times|cdot|div|[dt]frac|left|right)(?![a-z])", lambda sign: _OPERATORS[sign[1]], text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.translate(_SIGNS))
    return " ".join(re.findall(r"\w+|[-+*/^=<>%]", text))


def spelled(prompt: Prompt) -> str:
    """A prompt's text without spacing and Unicode variants: what makes two prompts the same whatever they ask, where
    case and brackets may be what they ask about."""
    return " ".join(visible(_words(prompt)).split())


def content_hash(prompt: Prompt) -> int:
    """64 bits of the normalised prompt."""
    digest = hashlib.sha256(normalised(prompt).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def split(tasks: Sequence[Task], held_out: float) -> tuple[list[Task], list[Task]]:
    """(training, held-out). The side depends on the prompt's words alone, so that copies of one problem, in whatever
    file, order or spelling, are on the same side, and a task never changes sides when others are added.

    `held_out` is the expected share. Raises ValueError unless it lies in [0, 1).
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must lie in [0, 1), got {held_out}")
    bound = int(held_out * 2**64)
    training = [task for task in tasks if content_hash(task.prompt) >= bound]
    held = [task for task in tasks if content_hash(task.prompt) < bound]
    return training, held
