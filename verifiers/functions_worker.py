"""Reward functions written by others, called inside a killable worker. Plain data in, plain data out."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Set
from functools import lru_cache
from types import ModuleType
from typing import Any

from cabochon.verifiers.text import nearest


def load(address: str) -> Callable[..., Any]:
    """The callable at `module:function` or `path.py:function`. Raises ImportError, AttributeError or
    FileNotFoundError.
    """
    place, _, name = address.rpartition(":")
    module = _file(place) if place.endswith(".py") else importlib.import_module(place)
    try:
        return getattr(module, name)
    except AttributeError:
        near = nearest(name, (n for n in vars(module) if not n.startswith("__")))
        said = f"; the nearest name in it is {near!r}" if near else ""
        raise AttributeError(f"{place} defines no {name!r}{said}") from None


@lru_cache(maxsize=64)
def _file(place: str) -> ModuleType:
    folder = os.path.dirname(place)
    if folder not in sys.path:
        sys.path.append(folder)  # its neighbours, behind all that is installed
    spec = importlib.util.spec_from_file_location(f"reward_file_{abs(hash(place))}", place)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {place}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def warm_file(place: str) -> None:
    """Import a file before the first item. What it raises is told at its first call."""
    with contextlib.suppress(Exception, SystemExit, KeyboardInterrupt):
        _file(place)


_NOT_HERE = {
    "completion_ids": "a reward here is given text, not tokens",
    "trainer_state": "a reward here is judged apart from the trainer",
}


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """The columns a function takes: all of them with `**kwargs`, else those it names. Raises ValueError where it needs
    one that is not offered."""
    parameters = inspect.signature(function).parameters
    single = (p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    missing = next((p.name for p in single if p.default is p.empty and p.name not in offered), None)
    if missing is not None:
        why = f" ({_NOT_HERE[missing]})" if missing in _NOT_HERE else ""
        raise ValueError(f"needs {missing!r}, which the row does not have{why}; there are {', '.join(offered)}")
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
    """Call `f(prompts, completions, **columns)` on a batch of one. `value` is its number, None where it abstains;
    `extra` is what it gave TRL's `log_extra` and `log_metric`."""
    function = load(address) if factory is None else load(address)(**factory)
    extra: dict[str, Any] = {}
    offered = {
        "prompts": [prompt], "completions": [completion], **{name: [value] for name, value in columns.items()},
        "log_extra": lambda column, values: extra.update({str(column): _plain(next(iter(values), None))}),
        "log_metric": lambda name, value: extra.update({str(name): _plain(value)}),
    }
    rewards = _finished(function(**_accepted(function, offered)))
    if rewards is None or isinstance(rewards, str | bytes | int | float | Mapping | Set):
        raise ValueError(f"{address} returned {rewards!r}; expected a list with one reward for each completion")
    rewards = list(rewards)
    if len(rewards) != 1:
        raise ValueError(f"{address} returned {len(rewards)} rewards for one completion")
    return {"value": _number(address, rewards[0]), "extra": extra}


def verl(address: str, data_source: str, text: str, ground_truth: Any, extra_info: Any) -> dict[str, Any]:
    """Call verl's `compute_score`; a mapping it returns must have `score`, and the rest is kept as evidence."""
    result = _finished(
        load(address)(data_source=data_source, solution_str=text, ground_truth=ground_truth, extra_info=extra_info)
    )
    extra: dict[str, Any] = {}
    if isinstance(result, dict):
        if "score" not in result:
            raise ValueError(f"{address} returned a dict without 'score'; it has {', '.join(map(str, result))[:200]}")
        extra = {str(name): _plain(value) for name, value in result.items() if name != "score"}
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


def _plain(value: Any) -> str | int | float:
    """What JSON has a form for; of anything else, how Python shows it."""
    plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else repr(value)[:500]


def _number(address: str, reward: Any) -> float | None:
    if reward is None:
        return None
    number = float(reward)
    if not math.isfinite(number):
        raise ValueError(f"{address} returned {number}")
    return number
