"""Reward functions written by others, called inside a killable worker. Plain data in, plain data out."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=64)
def load(address: str) -> Callable[..., Any]:
    """The callable at `module:function` or `path.py:function`. Raises ImportError, AttributeError or
    FileNotFoundError.
    """
    place, _, name = address.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    spec = importlib.util.spec_from_file_location(f"reward_file_{abs(hash(place))}", place)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {place}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """The columns a function takes: all of them with `**kwargs`, else those it names. Raises ValueError where it needs
    one that is not offered."""
    parameters = inspect.signature(function).parameters
    single = (p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    missing = next((p.name for p in single if p.default is p.empty and p.name not in offered), None)
    if missing is not None:
        tokens = " (a reward here is given text, not tokens)" if missing == "completion_ids" else ""
        raise ValueError(f"needs {missing!r}, which the row does not have{tokens}; there are {', '.join(offered)}")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


def _finished(value: Any) -> Any:
    async def wait() -> Any:
        return await value

    return asyncio.run(wait()) if inspect.isawaitable(value) else value


def trl(
    address: str, factory: dict[str, Any] | None, prompt: Any, completion: Any, columns: dict[str, Any]
) -> dict[str, Any]:
    """Call `f(prompts, completions, **columns)` on a batch of one. `value` is its number, None where it abstains."""
    function = load(address) if factory is None else load(address)(**factory)
    offered = {"prompts": [prompt], "completions": [completion], **{name: [value] for name, value in columns.items()}}
    rewards = _finished(function(**_accepted(function, offered)))
    if rewards is None or isinstance(rewards, str | int | float):
        raise ValueError(f"{address} returned {rewards!r}; expected a list with one reward for each completion")
    rewards = list(rewards)
    if len(rewards) != 1:
        raise ValueError(f"{address} returned {len(rewards)} rewards for one completion")
    return {"value": _number(address, rewards[0]), "extra": {}}


def verl(address: str, data_source: str, text: str, ground_truth: Any, extra_info: Any) -> dict[str, Any]:
    """Call verl's `compute_score`; a mapping it returns must have `score`, and the rest is kept as evidence."""
    result = _finished(
        load(address)(data_source=data_source, solution_str=text, ground_truth=ground_truth, extra_info=extra_info)
    )
    extra: dict[str, Any] = {}
    if isinstance(result, dict):
        extra = {str(name): value if isinstance(value, str | int | float | bool) else repr(value)[:500]
                 for name, value in result.items() if name != "score"}
        result = result["score"]
    elif isinstance(result, list | tuple):
        result = result[0]
    return {"value": _number(address, result), "extra": extra}


def rubric(address: str, prompt: Any, completion: Any, columns: dict[str, Any]) -> dict[str, Any]:
    """Call a function of a verifiers (v0) rubric with what it asks for by name; `state` holds all of it."""
    offered = {"prompt": prompt, "completion": completion, **columns}
    function = load(address)
    result = _finished(function(**_accepted(function, {**offered, "state": dict(offered)})))
    return {"value": _number(address, result), "extra": {}}


def _number(address: str, reward: Any) -> float | None:
    if reward is None:
        return None
    number = float(reward)
    if not math.isfinite(number):
        raise ValueError(f"{address} returned {number}")
    return number
