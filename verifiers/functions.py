"""Reward functions from elsewhere, unchanged: TRL's `f(prompts, completions, **columns)`, verl's `compute_score`, and
those of a verifiers (v0) rubric.

A function is addressed as `module:function`, `path.py:function` or `trl.rewards:name`. It runs in a killable worker
with a clean environment: one that hangs, crashes or eats memory costs its item, and one that raises gives an
`infra_error` (no score) rather than a silent zero. It sees one completion at a time; `task.payload` gives its
columns.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cabochon.errors import UserError
from cabochon.types import Task, Verdict
from cabochon.verifiers.base import infra_error, verdict_of_outcome
from cabochon.verifiers.workers import WorkerConfig, shared_pool

_FIXED = ("cabochon.verifiers.functions_worker",)


@dataclass(frozen=True, kw_only=True)
class _AtAddress:
    """A reward function by its address, called in a killable worker. Rewards in [`low`, `high`] become scores."""

    address: str
    low: float = 0.0
    high: float = 1.0
    deadline: float = 30.0
    memory_mib: int = 8192
    keep_environment: tuple[str, ...] = ()
    """environment variables the function may see"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", checked_address(self.address))
        if not self.low < self.high:
            raise UserError(f"{self.address}: low must be less than high, got {self.low} and {self.high}")

    def _called(self, form: str, arguments: dict[str, Any]) -> Verdict:
        """The verdict on one call of `functions_worker:form`."""
        outcome = shared_pool(_workers(self.address, self.memory_mib, self.keep_environment)).call(
            f"cabochon.verifiers.functions_worker:{form}",
            {"address": self.address, **arguments},
            deadline=self.deadline, on_stall="fail",
        )
        if outcome.status != "done":
            return verdict_of_outcome(outcome)
        return _scaled(self.address, outcome.value, self.low, self.high, outcome.seconds)


@dataclass(frozen=True, kw_only=True)
class FunctionVerifier(_AtAddress):
    """A TRL-style reward function, plain or async.

    Rewards in [`low`, `high`] are mapped to scores in [0, 1]; one outside is an `infra_error`, since a scale that is
    not what was declared would shift the training signal unseen. `None` abstains: no score, status `ok`.
    """

    arguments: tuple[tuple[str, Any], ...] | None = None
    """set: the address is a factory, called with these to get the function (`trl.rewards:get_cosine_scaled_reward`)"""
    chat: bool | None = None
    """give the completion as messages; None: as the prompt is"""

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where the task's payload is not plain data."""
        plain = isinstance(task.prompt, str)
        chat = not plain if self.chat is None else self.chat
        prompt: Any = [{"role": "user", "content": task.prompt}] if plain and chat else task.prompt
        return self._called(
            "trl",
            {
                "factory": None if self.arguments is None else dict(self.arguments),
                "prompt": prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
                "completion": [{"role": "assistant", "content": text}] if chat else text,
                "columns": dict(task.payload),
            },
        )


@dataclass(frozen=True, kw_only=True)
class VerlVerifier(_AtAddress):
    """verl's `compute_score(data_source, solution_str, ground_truth, extra_info)`; the payload has the other three."""

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError without `ground_truth` in the payload."""
        if "ground_truth" not in task.payload:
            raise ValueError(f'task {task.id}: payload needs "ground_truth" for {self.address}')
        return self._called(
            "verl",
            {
                "data_source": str(task.payload.get("data_source", task.domain)), "text": text,
                "ground_truth": task.payload["ground_truth"], "extra_info": task.payload.get("extra_info"),
            },
        )


@dataclass(frozen=True, kw_only=True)
class RubricVerifier(_AtAddress):
    """A function of a verifiers (v0) rubric: one completion a call, by the names it takes of `prompt`, `completion`,
    `answer`, `state`, `task` and `info`; plain or async."""

    def verify(self, task: Task, text: str) -> Verdict:
        """Raises ValueError where the task's payload is not plain data."""
        plain = isinstance(task.prompt, str)
        prompt = [{"role": "user", "content": task.prompt}] if plain else [dict(m) for m in task.prompt]  # type: ignore[arg-type]
        return self._called(
            "rubric",
            {
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": text}],
                "columns": {"answer": "", "info": {}, "task": task.domain, **task.payload},
            },
        )


def checked_address(address: str) -> str:
    """The address with its file made absolute. Raises UserError where it is not one."""
    place, mark, name = address.rpartition(":")
    if not mark or not place or not name.isidentifier():
        raise UserError(f'{address!r}: a reward function is "module:function" or "path.py:function"')
    if not place.endswith(".py"):
        _refuse_file_as_module(place, name)
        return address
    place = os.path.abspath(os.path.expanduser(place))
    if not os.path.isfile(place):
        raise UserError(f"{place}: no such file (reward function {name!r})")
    defined = names_defined(place)
    if defined is not None and name not in defined:
        raise UserError(f"{place}: defines no {name!r}{_nearest(name, defined)}")
    return f"{place}:{name}"


def _refuse_file_as_module(place: str, name: str) -> None:
    """A worker starts elsewhere and with a clean path: a file of the current directory is no module to it."""
    file = place.replace(".", "/") + ".py"
    if os.path.isfile(file) and importlib.util.find_spec(place.partition(".")[0]) is None:
        raise UserError(f'{place}:{name}: no module {place!r} is installed; for the file here write "{file}:{name}"')


def names_defined(file: str) -> list[str] | None:
    """What a Python file binds at its top level, read and not run; None where only running it tells.

    Raises UserError for a file that is no Python.
    """
    try:
        with open(file, "rb") as source:
            body = ast.parse(source.read(), file).body
    except (SyntaxError, ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read as Python: {error}") from None
    names: list[str] = []
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.append(name)
            case ast.Assign(targets=targets) if all(isinstance(t, ast.Name) for t in targets):
                names += [t.id for t in targets if isinstance(t, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.append(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases) if all(a.name != "*" for a in aliases):
                names += [alias.asname or alias.name.partition(".")[0] for alias in aliases]
            case ast.Expr(value=ast.Constant()):
                pass
            case _:  # a call, an `if`, a loop, unpacked or starred: anything may be bound
                return None
    return names


def _nearest(name: str, defined: list[str]) -> str:
    near = difflib.get_close_matches(name, defined, n=1, cutoff=0.0)
    return f"; the nearest name in it is {near[0]!r}" if near else "; it defines nothing"


def _workers(address: str, memory_mib: int, keep_environment: tuple[str, ...]) -> WorkerConfig:
    module = address.rpartition(":")[0]
    preload = _FIXED if module.endswith(".py") else (*_FIXED, module)
    return WorkerConfig(preload=preload, memory_mib=memory_mib, keep_environment=keep_environment)


def _scaled(address: str, value: Mapping[str, Any], low: float, high: float, seconds: float) -> Verdict:
    reward, extra = value["value"], value["extra"]
    if reward is None:
        return Verdict(score=None, status="ok", detail=f"{address} abstains", evidence=extra, seconds=seconds)
    if not low <= reward <= high:
        return infra_error(
            f"{address} returned {reward:g}, outside [{low:g}, {high:g}]: let it return what lies in there", seconds,
            reward=reward, **extra,
        )
    score = (reward - low) / (high - low)
    return Verdict(
        score=score, status="ok" if score == 1.0 else "wrong", detail=f"reward {reward:g}",
        evidence={"reward": reward, **extra}, seconds=seconds,
    )
