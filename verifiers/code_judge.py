"""One judgement: the program in one sandbox, its tests in another, and this host carrying plain data between them.

The host reads one letter of each message and its length, no more. The verdict is a message of the tests' side with a
number only that side was given; everything the program's side says is an answer to a call.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from cabochon.types import Status
from cabochon.verifiers.code_tests import FunctionPlan
from cabochon.verifiers.sandbox.base import Limits, Sandbox
from cabochon.verifiers.sandbox.running import ending
from cabochon.verifiers.sandbox.session import Lost, Session, Stopped
from cabochon.verifiers.sandbox.wire import WireError, unpack

MAX_UNITS = 100_000


@dataclass(kw_only=True)
class Outcome:
    """What a judgement found."""

    status: Status = "wrong"
    detail: str = ""
    passed: int = 0
    total: int = 0
    """Tests that were run to an end; the plan may have had more."""
    complete: bool = False
    """The tests' side ran to its end and said so."""
    first_failure: dict[str, Any] = field(default_factory=dict)
    stderr: str = ""


def judge(sandbox: Sandbox, plan: FunctionPlan, source: bytes, limits: Limits) -> Outcome:
    """Raises Lost or SandboxError for the machine's failures only, ValueError where the task is unusable."""
    nonce = secrets.token_hex(16)
    outcome = Outcome()
    with sandbox.open(limits) as program, sandbox.open(limits) as tests:
        program.begin(
            "candidate", limits, source=source, wanted=list(plan.wanted), classes=list(plan.kept),
            mutates=plan.mutates,
        )  # fmt: skip
        tests.begin(
            "tests", limits, nonce=nonce, wanted=list(plan.wanted), classes=list(plan.classes), mutates=plan.mutates,
            module=plan.module, bare_names=plan.bare_names, collect=plan.collect,
            units=[(u.label, u.source, u.whole) for u in plan.units],
        )  # fmt: skip
        tests.deadline = program.deadline
        try:
            if _load(program, tests, outcome):
                _converse(program, tests, nonce, outcome)
        except Stopped as e:
            _stopped(program, e, outcome, limits)
        outcome.stderr = program.error_tail()
    return outcome


def _load(program: Session, tests: Session, outcome: Outcome) -> bool:
    """Waits for the program to be loaded and tells the tests; False where it did not load."""
    message = program.receive()
    if message[:1] == b"L":
        tests.send(message)
        return True
    why = _plain(message[1:])
    if message[:1] != b"E" or type(why) is not tuple or len(why) != 3 or not all(type(w) is str for w in why):
        raise Stopped("malformed", "the program's side sent something else than an answer")
    outcome.status = "malformed" if why[0] == "malformed" else "oom" if why[1] == "MemoryError" else "crash"
    outcome.detail = f"the program does not {'compile' if why[0] == 'malformed' else 'load'}: {why[1]}: {why[2][:300]}"
    return False


def _converse(program: Session, tests: Session, nonce: str, outcome: Outcome) -> None:
    given = False  # something of the program's is in the tests' process, which it may not survive
    raised = ""
    while True:
        try:
            message = tests.receive()
        except Stopped as e:
            if e.reason == "ended" and not given and program.ended is None:
                raise Lost(
                    f"the tests' process ended before the program had said anything: {tests.error_tail(300)}"
                ) from e
            detail = "the time was over while the tests worked" if e.reason == "timeout" else (
                "the tests' process did not survive the program's values")  # fmt: skip
            outcome.status = "timeout" if e.reason == "timeout" else "malformed"
            outcome.detail = detail
            return
        letter = message[:1]
        if letter == b"U":
            raised = _unit(message, outcome) or raised
        elif letter == b"V":
            _verdict(message, nonce, outcome, raised)
            return
        elif letter in (b"C", b"A"):
            program.send(message)
            answer = program.receive()
            if answer[:1] not in (b"R", b"K"):
                raise Stopped("malformed", "the program's side sent something else than an answer")
            tests.send(answer)
            given = True
        elif letter in (b"G", b"P"):
            given = letter == b"G"
        else:
            raise Lost("the tests' side sent an unknown message")


def _unit(message: bytes, outcome: Outcome) -> str:
    """Counts one test; the program's exception behind the first failure, if there was one."""
    label, good, about = _plain(message[1:])
    outcome.total += 1
    outcome.passed += good is True
    if good is not True and not outcome.first_failure:
        outcome.first_failure = {"test": label, **about}
        return str(about.get("raised", ""))
    if outcome.total > MAX_UNITS:
        raise Stopped("malformed", f"over {MAX_UNITS} tests and subtests were reported")
    return ""


def _verdict(message: bytes, nonce: str, outcome: Outcome, raised: str) -> None:
    said = _plain(message[1:])
    if type(said) is not tuple or len(said) != 6 or not secrets.compare_digest(str(said[0]), nonce):
        raise Lost("the verdict does not carry its number")
    _, how, why, passed, total, missing = said
    if how == "unusable":
        raise ValueError(str(why))
    if how != "done":
        outcome.status, outcome.detail = "malformed", str(why)[:300]
        return
    outcome.complete = True
    outcome.passed, outcome.total = passed, total
    if total > 0 and passed == total:
        outcome.status, outcome.detail = "ok", f"{passed} of {total} tests passed"
        return
    outcome.status = "oom" if raised == "MemoryError" else "wrong"
    outcome.detail = f"{passed} of {total} tests passed"
    if missing:
        outcome.detail += f"; the program does not define {', '.join(map(str, missing[:5]))}"


def _stopped(program: Session, why: Stopped, outcome: Outcome, limits: Limits) -> None:
    """Why the program's side fell silent."""
    outcome.detail = why.detail
    if why.reason == "timeout":
        outcome.status, outcome.detail = "timeout", f"over {limits.wall_seconds:g} s"
        return
    if why.reason == "malformed":
        outcome.status = "malformed"
        return
    program.pump(time.monotonic() + 5.0, lambda: program.ended is not None)
    status, detail = ending(program, limits)
    outcome.status = "crash" if status == "ok" else status
    outcome.detail = detail or "the program ended its own process before the tests were over"


def _plain(data: bytes) -> Any:
    try:
        return unpack(data)
    except WireError as e:
        raise Stopped("malformed", f"a message that is not plain data: {e}") from e


def evidence(outcome: Outcome) -> dict[str, Any]:
    """The evidence of an outcome as plain data."""
    return {
        "passed": outcome.passed,
        "total": outcome.total,
        "first_failure": outcome.first_failure,
        "stderr": outcome.stderr,
    }
