"""The verifier of programs: extracts one from a completion and runs the task's tests against it in sandboxes.

`Task.payload` says how (all but the tests optional):

- `kind`: "asserts", "calls", "stdio" or "unittest"; guessed from the other keys where it is absent.
- `tests`: a text, or a list of texts of which each is one test. MBPP's `test_list`, HumanEval's `test` are read too.
- `setup`: test source that runs first (MBPP's `test_setup_code`).
- `helpers`: trusted source that both the program and the tests may use; with an `entry_point` it is by default what a
  `prompt` that is code defines beside it (HumanEval, LeetCode). A method's program without any finds the usual imports.
- `entry_point`: the program's function, `Class.method` or `Class().method`. `module`: what a test file imports (default
  `solution`).
- `calls`: `[{"args": [...], "kwargs": {...}, "expected": ...}]`. `cases`: `[{"stdin": "...", "stdout": "..."}]`.
- `mutates`: true where the tests look at arguments a function changed *and* at what it returned; where it returned
  None, changes are always carried back.
- `prefix`: source a completion goes on from (HumanEval's prompt), used where the completion does not define
  `entry_point`.

Trust: see code_judge. Standard output is compared in this process, as text.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

from cabochon.types import Status, Task, Verdict
from cabochon.verifiers.code_extract import MAX_PROGRAM, answer, block, defines, program
from cabochon.verifiers.code_given import behind, code_of, entry_of, given_of
from cabochon.verifiers.code_judge import Outcome, evidence, judge
from cabochon.verifiers.code_tests import CasePlan, FunctionPlan, plan_of
from cabochon.verifiers.sandbox.base import Limits, Sandbox, SandboxError, as_bytes, python_program
from cabochon.verifiers.sandbox.running import retried


class CodeVerifier:
    """`CodeVerifier(BubblewrapSandbox()).verify(task, completion)`.

    `score`: "all" pays 1 where every test passes and 0 otherwise; "fraction" pays the share that passed, which is below
    1 wherever the status is not ok. `limits` hold for the judgement as a whole, except for `stdio`, where each case is
    a run of its own, `case_seconds` bounds it, and the output expected comes on top of the output allowed.
    """

    def __init__(
        self, sandbox: Sandbox, *, score: Literal["all", "fraction"] = "all", limits: Limits | None = None,
        case_seconds: float | None = None, stop_at_first_failure: bool = False,
    ) -> None:  # fmt: skip
        if score not in ("all", "fraction"):
            raise ValueError(f"score must be 'all' or 'fraction', got {score!r}")
        self.sandbox = sandbox
        self.score = score
        self.limits = limits or Limits()
        self.case_limits = replace(self.limits, wall_seconds=case_seconds) if case_seconds else self.limits
        self.stop_at_first_failure = stop_at_first_failure

    def verify(self, task: Task, text: str) -> Verdict:
        """The verdict. Raises ValueError where the task is unusable; a broken machine is an infra_error."""
        started = time.monotonic()
        plan = plan_of(task.payload)
        source = _source(task, text, plan.wanted if isinstance(plan, FunctionPlan) else ())
        if not source.strip():
            return self._verdict(
                Outcome(status="no_answer", detail="no program in the completion"), plan, source, started
            )
        if len(source) > MAX_PROGRAM:
            detail = f"a program of {len(source)} characters, over the limit of {MAX_PROGRAM}"
            return self._verdict(Outcome(status="malformed", detail=detail), plan, source[:1000], started)
        try:
            if isinstance(plan, CasePlan):
                outcome = self._cases(plan, source)
            else:
                function_plan = plan
                outcome = retried(lambda: judge(self.sandbox, function_plan, as_bytes(source), self.limits))
        except SandboxError as e:
            return Verdict(score=None, status="infra_error", detail=str(e)[:500], seconds=time.monotonic() - started)
        return self._verdict(outcome, plan, source, started)

    def _verdict(self, outcome: Outcome, plan: FunctionPlan | CasePlan, source: str, started: float) -> Verdict:
        planned = len(plan.cases) if isinstance(plan, CasePlan) else sum(u.tests for u in plan.units)
        good = outcome.status == "ok"
        # one test at least did not pass, be it the one that never came to its end
        fraction = 1.0 if good else outcome.passed / max(outcome.total, planned, outcome.passed + 1)
        score = fraction if self.score == "fraction" else float(good)
        found: dict[str, Any] = {**evidence(outcome), "fraction": fraction, "all_pass": good, "program": source[:4000]}
        return Verdict(
            score=score,
            status=outcome.status,
            detail=outcome.detail,
            evidence=found,
            seconds=time.monotonic() - started,
        )

    def _cases(self, plan: CasePlan, source: str) -> Outcome:
        outcome = Outcome(status="ok")
        for number, case in enumerate(plan.cases):
            room = self.case_limits.output_bytes + len(case.stdout.encode("utf-8", "surrogatepass"))
            limits = replace(self.case_limits, output_bytes=room)
            result = self.sandbox.run(python_program(source, case.stdin), limits)
            status: Status = result.status
            printed = result.stdout.decode("utf-8", "replace")
            if status == "ok" and not same_output(printed, case.stdout):
                status = "wrong"
            if status == "crash" and re.search(
                rb"^(\w*Syntax|Indentation|Tab)Error: ", result.stderr[-2000:], re.MULTILINE
            ):
                status = "malformed"
            outcome.total += 1
            outcome.passed += status == "ok"
            if status != "ok" and outcome.status == "ok":
                outcome.status = status
                outcome.detail = f"case {number + 1} of {len(plan.cases)}: {result.detail or 'another output'}"
                outcome.first_failure = {
                    "test": f"case {number + 1}", "input": case.stdin[:300], "expected": case.stdout[:300],
                    "got": printed[:300],
                }  # fmt: skip
                outcome.stderr = result.stderr[-2000:].decode("utf-8", "replace")
            if status == "timeout" or (status != "ok" and (self.stop_at_first_failure or status == "malformed")):
                break  # the other cases would take as long again
        if outcome.status == "ok":
            outcome.detail = f"{outcome.passed} of {outcome.total} cases passed"
        return outcome


def _source(task: Task, text: str, wanted: Collection[str]) -> str:
    """The program, with the prompt's own code in front where the completion only goes on from it; `wanted` are the
    names the tests use."""
    found = program(text, wanted)
    entry, _ = entry_of(task.payload)
    code = code_of(task.payload)
    if not found.strip():
        return ""
    if not code or not entry or defines(found, (entry,)):
        return behind(given_of(task.payload), found)
    return f"{code}{'' if code.endswith(chr(10)) else chr(10)}{block(text) or answer(text)}"  # as it is indented


def same_output(got: str, want: str) -> bool:
    """Equal but for trailing spaces, trailing blank lines and line ends; failing that, equal word by word, where a
    word of the expected output with a decimal point may differ by 1e-6, so `0.1` and `0.10` agree; large ones by 1e-6
    of their value, but no more than rounds to the digits they have, and tiny ones by a thousandth of it. Spaces are
    ASCII's: U+00A0 is something a program prints on purpose."""
    if _lines(got) == _lines(want):
        return True
    got_words, want_words = _WORD.findall(got), _WORD.findall(want)
    return len(got_words) == len(want_words) and all(map(_same_word, got_words, want_words))


_WORD = re.compile(r"[^ \t\r\n\f\v]+")


def _lines(text: str) -> list[str]:
    return [line.rstrip(" \t\f\v") for line in re.split(r"\r\n|\r|\n", text.rstrip(" \t\r\n\f\v"))]


_DECIMAL = re.compile(r"[-+]?\d{1,30}\.(\d{1,30})(?:[eE]([-+]?\d{1,3}))?")
_NUMBER = re.compile(r"[-+]?\d{1,30}(?:\.\d{0,30})?(?:[eE][-+]?\d{1,3})?")


def _same_word(got: str, want: str) -> bool:
    if got == want:
        return True
    decimal = _DECIMAL.fullmatch(want)
    if decimal is None or not _NUMBER.fullmatch(got):
        return False
    a, b = float(got), float(want)
    half_unit = float(f"5e{int(decimal[2] or 0) - len(decimal[1]) - 1}")
    noise = 1e-14 * abs(b)  # of a double: it may be more than the last digit is worth
    near = min(1e-6, 1e-3 * abs(b)) if b else 1e-6  # else 0 would do for every tiny number
    return abs(a - b) <= max(near, noise, min(1e-6 * abs(b), half_unit)) < float("inf")
