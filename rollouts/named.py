"""Environments by what a recipe says: tools that are here, or a class of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from cabochon.errors import UserError
from cabochon.rollouts.environment import Environment
from cabochon.types import Task


def environment_at(address: str) -> Callable[[Task], Environment]:
    """Makes the environment of an episode: `path.py:Class` or `module:Class`, called without arguments.

    The code runs in this process, with its rights. Raises UserError where there is no such class, or what it makes is
    not an environment.
    """
    place, _, name = address.rpartition(":")
    if not place or not name:
        raise UserError(f"environment {address!r}: expected path.py:Class or module:Class")
    made = getattr(_module(place), name, None)
    if not callable(made):
        raise UserError(f"environment {address!r}: there is no class {name!r} in {place}")
    try:
        first = made()
    except TypeError as error:  # most often arguments it wants
        raise UserError(f"environment {address!r}: it must be callable without arguments: {error}") from None
    if not isinstance(first, Environment):
        raise UserError(f"environment {address!r}: expected the members tools, reset, step and close")
    first.close()
    return lambda task: made()


def _module(place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"environment_file_{Path(place).stem}", place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (ImportError, OSError, SyntaxError) as error:
        raise UserError(f"environment {place}: {type(error).__name__}: {error}") from None
