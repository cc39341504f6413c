"""`cabochon verify` and `cabochon reward test`: plain functions with typer's annotations, registered by the roof."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cabochon.errors import MachineError, UserError
from cabochon.files import write_whole

if TYPE_CHECKING:
    from cabochon.types import Task, Verdict


def verify_command(
    file: Annotated[pathlib.Path, typer.Argument(help="JSONL: a task's columns and the completion in each row")],
    out: Annotated[pathlib.Path | None, typer.Option(help="write a verdict row per line here")] = None,
    column: Annotated[str, typer.Option(help="the column that holds the completion")] = "completion",
    reward: Annotated[str | None, typer.Option(help="judge every row with this verifier or module:function")] = None,
    sandbox: Annotated[str, typer.Option(help="bubblewrap or docker, for code")] = "bubblewrap",
    concurrency: Annotated[int, typer.Option(min=1, help="rows judged at once")] = 2,
) -> None:
    """Judge completions: one verdict per row and a table of what happened.

    Rows are GSM8K, MATH, MBPP or HumanEval rows, or have `prompt`, `verifier` and `payload`; each with `completion`.
    Example: cabochon verify answers.jsonl --out verdicts.jsonl
    """
    from cabochon.verifiers.build import probes_for, verifier_for
    from cabochon.verifiers.pool import VerifierPool

    if reward is not None and not reward.strip():
        raise UserError("--reward is empty; expected a verifier's name or module:function")
    if out is not None:
        _check_out(out, file)
    tasks, texts = _rows(file, column, reward)
    verifier = verifier_for(tasks, sandbox=_sandbox(sandbox))
    probes = [probe for probe in probes_for(tasks) if probe.gold is not None]
    pool = (
        VerifierPool(verifier=verifier, probes=probes, concurrency=concurrency)
        if probes else VerifierPool.unproven(verifier=verifier, concurrency=concurrency)
    )
    with pool:
        verdicts = pool.verify(tasks, texts)
    failure = None
    try:
        if out is not None:
            rows = (_row(task, verdict) for task, verdict in zip(tasks, verdicts, strict=True))
            write_whole(out, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    except MachineError as error:
        failure = error  # a full disk does not take the table away, nor a full terminal the file
    say(_table(tasks, verdicts))
    if failure is not None:
        raise failure
    if any(verdict.status == "infra_error" for verdict in verdicts):
        raise typer.Exit(1)


def reward_test_command(
    reward: Annotated[str, typer.Argument(help="math, instructions, reasoning, thinking, code, or module:function")],
    tasks: Annotated[pathlib.Path | None, typer.Option(help="JSONL of tasks to probe it with")] = None,
    limit: Annotated[int, typer.Option(min=1, help="how many of them")] = 4,
    sandbox: Annotated[str, typer.Option(help="bubblewrap or docker, for code")] = "bubblewrap",
) -> None:
    """Probe a reward with right, blank, wrong, oversized and hostile answers, and say what is suspicious.

    Exit code 1 where something is. Example: cabochon reward test my_rewards.py:score --tasks tasks.jsonl
    """
    from dataclasses import replace

    from cabochon.verifiers.build import verifier_named
    from cabochon.verifiers.probe import enough, probe, sample_tasks
    from cabochon.verifiers.tasks import read_tasks

    verifier = verifier_named(reward, sandbox=_sandbox(sandbox))
    found = read_tasks(tasks, verifier=reward)[:limit] if tasks else sample_tasks(reward)
    print(f"{'task':24} {'probe':26} {'score':>6} {'status':12} {'seconds':>8}  suspicious", flush=True)
    findings = []
    for item in probe(verifier, [task if ":" in reward else replace(task, verifier=reward) for task in found]):
        findings.append(item)
        score = "-" if item.score is None else f"{item.score:g}"
        line = f"{item.task[:24]:24} {item.probe:26} {score:>6} {item.status:12} {item.seconds:8.3f}  {item.suspicious}"
        say(" ".join(line.splitlines()))
    if reason := enough(findings):
        print(f"the other probes were left out: {reason}")
    bad = [item for item in findings if item.suspicious]
    untried = not any(item.probe == "gold" for item in findings)
    sound = "no right answer was tried, give the rows a `gold`" if untried else "the reward looks sound"
    print(f"\n{len(findings)} probes, {len(bad)} suspicious" + ("" if bad else f": {sound}"))
    if bad:
        raise typer.Exit(1)


def say(text: str) -> None:
    """To standard output, at once; what its encoding lacks is escaped. Raises MachineError, BrokenPipeError."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it is tried again at the end
        raise MachineError(f"standard output: cannot be written: {error.strerror or error}") from error


def _sandbox(name: str) -> Literal["bubblewrap", "docker"]:
    match name:
        case "bubblewrap" | "docker":
            return name
    raise UserError(f"--sandbox is bubblewrap or docker, got {name!r}")


def _check_out(out: pathlib.Path, file: pathlib.Path) -> None:
    """Before the work. Raises UserError."""
    try:
        out.resolve()
        if out.is_dir():
            raise UserError(f"--out {out}: is a directory; expected the name of a file, such as {out / 'out.jsonl'}")
        if out.exists() and file.exists() and out.samefile(file):
            raise UserError(f"--out {out}: is the file that is read; choose another name")
        above = next(folder for folder in out.absolute().parents if folder.exists())
    except OSError as error:  # a name that is too long
        raise UserError(f"--out {out}: {error.strerror}") from None
    except RuntimeError as error:  # a loop of links
        raise UserError(f"--out {out}: {error}") from None
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {out}: cannot be written there: {above} is not a directory that may be written to")


def _rows(file: pathlib.Path, column: str, reward: str | None) -> tuple[list[Task], list[str]]:
    from dataclasses import replace

    from cabochon.verifiers.build import check_name
    from cabochon.verifiers.tasks import check_payload, read_rows, task_of_row

    tasks: list[Task] = []
    texts: list[str] = []
    for where, row in read_rows(file):
        if column not in row:
            raise UserError(f"{where}: no column {column!r} with the completion; the row has {sorted(row)}")
        texts.append(_completion(where, column, row.pop(column)))
        task = task_of_row(where, row, f"{file.stem}/{len(tasks)}", reward)
        tasks.append(replace(task, verifier=reward) if reward else task)
        check_payload(where, tasks[-1])
        try:
            check_name(tasks[-1].verifier)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not tasks:
        raise UserError(f"{file}: holds no rows")
    return tasks, texts


def _completion(where: str, column: str, value: Any) -> str:
    """A completion as text, or the one message of an assistant that TRL has in its place. Raises UserError."""
    match value:
        case str() | [{"role": "assistant", "content": str()}]:
            return value if isinstance(value, str) else str(value[0]["content"])
    shown = json.dumps(value)[:60]
    raise UserError(f"{where}: column {column!r} must be a text or a list with one assistant's message, got {shown}")


def _row(task: Task, verdict: Verdict) -> dict[str, object]:
    return {
        "id": task.id, "verifier": task.verifier, "score": verdict.score, "status": verdict.status,
        "detail": verdict.detail, "evidence": _plain(verdict.evidence), "seconds": round(verdict.seconds, 6),
    }


def _plain(value: Any) -> Any:
    """Numbers that are not finite as text: JSON has none."""
    match value:
        case float() if not math.isfinite(value):
            return repr(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case Mapping():
            return {str(name): _plain(item) for name, item in value.items()}
    return value


def _table(tasks: list[Task], verdicts: list[Verdict]) -> str:
    """Per verifier: rows, mean score over those that have one, mean time, statuses."""
    lines = [f"{'verifier':20} {'rows':>7} {'scored':>7} {'mean':>7} {'ms':>8}  statuses"]
    for name in sorted({task.verifier for task in tasks}):
        mine = [verdict for task, verdict in zip(tasks, verdicts, strict=True) if task.verifier == name]
        scores = [verdict.score for verdict in mine if verdict.score is not None]
        mean = f"{sum(scores) / len(scores):.4f}" if scores else "-"
        statuses = sorted({verdict.status for verdict in mine})
        counts = ", ".join(f"{status} {sum(v.status == status for v in mine)}" for status in statuses)
        time_ms = 1000 * sum(verdict.seconds for verdict in mine) / len(mine)
        lines.append(f"{name[:20]:20} {len(mine):7d} {len(scores):7d} {mean:>7} {time_ms:8.2f}  {counts}")
        failures = Counter(verdict.detail for verdict in mine if verdict.status == "infra_error")
        lines += [f"  {count} x {' '.join(detail.split())}" for detail, count in failures.most_common(3)]
    return "\n".join(lines)
