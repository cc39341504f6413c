"""Verifiers by name, each with a probe that proves it works where it runs.

Names are those of `Task.verifier`: `math`, `instructions`, `reasoning`, `thinking`, `verdict`, `code`; anything with a
colon is the address of a reward function (see `functions`), in TRL's form, or behind `verl:` or `rubric:` in theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from cabochon.errors import UserError
from cabochon.protocols import Verifier
from cabochon.types import Task
from cabochon.verifiers.base import Probe
from cabochon.verifiers.compose import ByTask
from cabochon.verifiers.sandbox.base import Limits, RunResult, Sandbox, python_program
from cabochon.verifiers.text import nearest

NAMES = ("math", "instructions", "reasoning", "thinking", "verdict", "code")

SandboxName = Literal["bubblewrap", "docker"]


def verifier_named(name: str, *, sandbox: SandboxName = "bubblewrap") -> Verifier:
    """The verifier a task asks for. Raises UserError for an unknown name. `sandbox` is read by `code` only."""
    check_name(name)
    match name:
        case "math":
            from cabochon.verifiers.math import MathVerifier

            return MathVerifier()
        case "instructions":
            from cabochon.verifiers.instructions import InstructionVerifier

            return InstructionVerifier()
        case "reasoning":
            from cabochon.verifiers.reasoning import ReasoningVerifier

            return ReasoningVerifier()
        case "thinking":
            from cabochon.verifiers.format import ThinkingFormat

            return ThinkingFormat()
        case "verdict":
            from cabochon.verifiers.verdict import VerdictVerifier

            return VerdictVerifier()
        case "code":
            return _code(sandbox)
    from cabochon.verifiers.functions import FunctionVerifier, RubricVerifier, VerlVerifier

    form, _, rest = name.partition(":")
    if form in ("verl", "rubric") and ":" in rest:
        return VerlVerifier(address=rest) if form == "verl" else RubricVerifier(address=rest)
    return FunctionVerifier(address=name)


def check_name(name: str) -> None:
    """Raises UserError for what is neither a verifier's name nor has the form of an address."""
    if name in NAMES or ":" in name:
        return
    if name.endswith(".py"):
        raise UserError(f"{name!r} is a file: add the reward function in it, {name}:function")
    known = f"{', '.join(NAMES)}, 'module:function' and 'path.py:function'"
    raise UserError(f"no verifier is called {name!r}: there are {known}; the nearest is {nearest(name, NAMES)!r}")


def _code(sandbox: SandboxName) -> Verifier:
    from cabochon.verifiers.code import CodeVerifier

    return CodeVerifier(sandbox_named(sandbox))


def sandbox_named(name: SandboxName) -> Sandbox:
    """The isolation of that name; what it starts, `close` ends."""
    if name == "docker":
        from cabochon.verifiers.sandbox.docker import DockerSandbox

        return DockerSandbox()
    from cabochon.verifiers.sandbox.bubblewrap import BubblewrapSandbox

    return BubblewrapSandbox()


def python_runner(sandbox: Sandbox, limits: Limits | None = None) -> Callable[[str], RunResult]:
    """`run(source)`: a program in the sandbox, for a policy's Python tool. Raises SandboxError only."""
    return lambda source: sandbox.run(python_program(source), limits)


def verifier_for(tasks: Iterable[Task], *, sandbox: SandboxName = "bubblewrap") -> ByTask:
    """One verifier for all the names these tasks ask for. Raises UserError naming a task whose verifier is none."""
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.verifier, task)
    routes = []
    for name in sorted(first):
        try:
            routes.append((name, verifier_named(name, sandbox=sandbox)))
        except UserError as error:
            raise UserError(f"task {first[name].id}: {error}") from None
    return ByTask(routes=tuple(routes))


def probes_for(tasks: Iterable[Task]) -> list[Probe]:
    """A probe for each name these tasks ask for. Of a reward function nobody knows the gold here: of what the row gives
    as its answer, plain and boxed, it only has to make something."""
    first: dict[str, Task] = {}
    for task in tasks:
        if task.verifier not in first and (task.verifier != "reasoning" or task.payload.get("answer")):
            first[task.verifier] = task
    return [
        _probe(name, task) if name in NAMES else Probe(task=task, gold=None, candidates=gold_texts(task))
        for name, task in sorted(first.items())
    ]


def _probe(name: str, task: Task) -> Probe:
    payload: dict[str, Any]
    match name:
        case "math":
            payload, gold = {"answer": r"\frac{3}{4}"}, r"The answer is \boxed{\frac{6}{8}}."
        case "instructions":
            payload, gold = {"constraints": [{"kind": "words:required", "words": ["blue"]}]}, "The sky is blue."
        case "thinking":
            payload, gold = {}, "<think>one and one</think>two"
        case "verdict":
            payload, gold = {"label": "No", "choices": ["No", "Yes"]}, "One and one is two.\nVerdict: No"
        case "code":
            payload = {"tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]}
            gold = "```python\ndef add(a, b):\n    return a + b\n```"
        case _:
            return Probe(task=task, gold=next(iter(gold_texts(task)), ""))
    return Probe(task=Task(id=f"probe/{name}", prompt="A probe.", verifier=name, payload=payload), gold=gold)


def gold_texts(task: Task) -> tuple[str, ...]:
    """Completions of which one must score 1, made of the task's payload; none where the payload does not tell.

    A reward function (`module:name`) wants the answer plain or boxed, which nobody knows here.
    """
    answer = task.payload.get("answer")
    match task.verifier:
        case "reasoning":
            return () if answer is None else (f"<answer>{answer}</answer>",)
        case "code":
            reference = task.payload.get("reference")
            return (f"```python\n{reference}\n```",) if reference else ()
        case "thinking":
            return ("<think>because</think>the answer",)
        case "verdict":
            return (f"Verdict: {task.payload.get('label')}",)
        case "instructions":
            gold = task.payload.get("gold")
            return (str(gold),) if gold else ()
    gold = task.payload.get("gold", answer[0] if isinstance(answer, list) and answer else answer)
    if gold is None:
        return ()
    boxed = f"The answer is \\boxed{{{gold}}}."
    return (str(gold), boxed) if ":" in task.verifier else (boxed,)
