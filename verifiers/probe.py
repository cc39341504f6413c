"""Probing a reward: what it pays for a right answer, nothing, a wrong answer, far too much, and hostile text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cabochon.protocols import Verifier
from cabochon.types import Task, Verdict
from cabochon.verifiers.build import gold_texts

SLOW_SECONDS = 1.0
"""Slower than this over an ordinary answer is worth a word."""

HANG_SECONDS = 30.0
"""No answer may take longer, whatever it is."""

HANGS = 2
"""After so many probes that took that long the others are left out: each would cost as much."""

PARTIAL = 0.5
"""A text that says something wrong may be paid a part, but not so much."""

ALIKE = 4
"""Where so many at the start fail with the same error, so would the others."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one probe of one task gave; `suspicious` says what is wrong with it, empty if nothing is."""

    task: str
    probe: str
    score: float | None
    status: str
    seconds: float
    suspicious: str = ""


def _texts(task: Task, gold: str | None, others: Sequence[str | None]) -> list[tuple[str, str, bool]]:
    """(name, completion, whether it must score 1) of each probe; those that need not must score 0, or little."""
    found = [("gold", gold, True)] if gold else []
    prompt = task.prompt if isinstance(task.prompt, str) else "\n".join(str(m.get("content", "")) for m in task.prompt)
    answer = task.payload.get("answer")
    wrong = next((other for other in others if other is not None and other != gold), None)
    zero = [
        ("blank", ""), ("spaces", " \n\t "), ("prompt echoed", prompt), ("another task's gold", wrong),
        ("wrong", "The answer is \\boxed{-987654321}."),
        ("gold while thinking only", f"<think>{gold}</think>I do not know." if gold else None),
        ("gold or another", f"\\boxed{{{answer} or -987654321}}" if isinstance(answer, str) else None),
        ("oversized", "a" * 2_000_000), ("NUL and surrogates", "\x00\ud800\udfff\\boxed{\x00}"),
        ("tower", "\\boxed{9^{9^{9^{9}}}}"), ("factorials", "\\boxed{((((9!)!)!)!)!}"),
        ("10,000 brackets", "\\boxed{" + "(" * 10_000 + ")" * 10_000 + "}"), ("open box", "\\boxed{" * 2000),
        ("open thought", "<think>" * 1000),
    ]
    return found + [(name, text, False) for name, text in zero if text is not None]


def probe(verifier: Verifier, tasks: Sequence[Task], *, repeats: int = 3) -> Iterator[Finding]:
    """Every probe on every task, each `repeats` times, as they are done, until they are `enough`."""
    form = _form(verifier, tasks)
    golds = [texts[min(form, len(texts) - 1)] if texts else None for texts in map(gold_texts, tasks)]
    found: list[Finding] = []
    for task, gold in zip(tasks, golds, strict=True):
        for name, text, full in _texts(task, gold, golds):
            found.append(_one(verifier, task, name, text, full, repeats))
            yield found[-1]
            if enough(found):
                return


def enough(found: Sequence[Finding]) -> str:
    """Why the other probes are left out; empty where they are not."""
    if sum(finding.seconds >= HANG_SECONDS for finding in found) >= HANGS:
        return f"{HANGS} that hang say enough"
    begun = found[:ALIKE]
    broken = len(begun) == ALIKE and all(finding.status in ("infra_error", "raised") for finding in begun)
    return f"the first {ALIKE} failed alike" if broken and len({finding.suspicious for finding in begun}) == 1 else ""


def _form(verifier: Verifier, tasks: Sequence[Task]) -> int:
    """Which of the forms of a right answer is paid for, by the first task that has several; the first if none is."""
    task = next((task for task in tasks if len(gold_texts(task)) > 1), None)
    if task is None:
        return 0
    for i, text in enumerate(gold_texts(task)):
        found = _one(verifier, task, "gold", text, True, 1)
        if found.score == 1.0:
            return i
        if found.seconds >= HANG_SECONDS:
            break
    return 0


def _one(verifier: Verifier, task: Task, name: str, text: str, full: bool, repeats: int) -> Finding:
    verdicts: list[Verdict] = []
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.monotonic()
        try:
            verdicts.append(verifier.verify(task, text))
        except Exception as error:  # a verifier may not raise for a completion: that is what is looked for
            return Finding(task=task.id, probe=name, score=None, status="raised", seconds=time.monotonic() - start,
                           suspicious=f"raised {type(error).__name__}: {error}"[:200])
        seconds.append(time.monotonic() - start)
        if seconds[-1] >= HANG_SECONDS:
            break
    return Finding(task=task.id, probe=name, score=verdicts[0].score, status=verdicts[0].status, seconds=max(seconds),
                   suspicious=_suspicion(name, text, verdicts, full, seconds))


def _suspicion(name: str, text: str, verdicts: Sequence[Verdict], full: bool, seconds: Sequence[float]) -> str:
    scores = {verdict.score for verdict in verdicts}
    if max(seconds) >= HANG_SECONDS:
        return f"hangs: {verdicts[-1].detail or 'no verdict'} ({max(seconds):.0f} s)"
    if any(verdict.status == "infra_error" for verdict in verdicts):
        return f"infra_error: {next(v.detail for v in verdicts if v.status == 'infra_error')}"
    if len(scores) > 1:
        return f"not deterministic: {sorted(scores, key=str)}"
    (score,) = scores
    if full and score != 1.0:
        return f"the right answer scores {score}: {verdicts[0].detail}; it was {text[:60]!r}"
    if not full and (score is None or score >= (PARTIAL if text.strip() else 1e-9)):
        return f"{name} scores {score}"
    usual = min(seconds)  # the first call of all starts a worker
    if full and usual > SLOW_SECONDS:
        return f"slow: {max(seconds):.1f} s"
    return ""


def sample_tasks(name: str) -> list[Task]:
    """Tasks to probe a built-in verifier with when none are given."""
    match name:
        case "instructions":
            row = {"constraints": [{"kind": "words:required", "words": ["blue", "sky"]}], "gold": "The sky is blue."}
            return [Task(id="sample/0", prompt="Say something.", verifier=name, payload=row)]
        case "code":
            row = {"tests": ["assert add(1, 2) == 3"], "reference": "def add(a, b):\n    return a + b"}
            return [Task(id="sample/0", prompt="Write add(a, b).", verifier=name, payload=row)]
        case "thinking":
            return [Task(id="sample/0", prompt="One and one?", verifier=name)]
        case "verdict":
            payload = {"label": "Yes", "choices": ["No", "Yes"]}
            return [Task(id="sample/0", prompt="Is two the answer?", verifier=name, payload=payload)]
        case "reasoning":
            from cabochon.verifiers.reasoning import Puzzles, puzzle_tasks

            return [*puzzle_tasks(Puzzles(name="countdown", size=1)), *puzzle_tasks(Puzzles(name="chain_sum", size=1))]
    golds = ("72", r"\frac{3}{4}", r"x^2+2x+1", r"(-\infty,2)\cup(3,\infty)")
    return [
        Task(id=f"sample/{number}", prompt="A question.", verifier=name,
             payload={"answer": gold, "solution": f"${gold}$"})
        for number, gold in enumerate(golds)
    ]
