"""Where a reward function is found: `module:function` or `path.py:function`, checked without running any of it."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec

from cabochon.errors import UserError
from cabochon.verifiers.text import nearest


def checked_address(address: str) -> str:
    """The address with its file made absolute. Raises UserError where it is not one."""
    place, mark, name = address.rpartition(":")
    if not mark or not place or not name.isidentifier():
        raise UserError(f'{address!r}: a reward function is "module:function" or "path.py:function"')
    if not place.endswith(".py"):
        _check_module(place, name)
        return address
    place = os.path.abspath(os.path.expanduser(place))
    if not os.path.isfile(place):
        raise UserError(f"{place}: no such file (reward function {name!r})")
    defined = names_defined(place)
    if defined is not None and name not in defined:
        raise UserError(f"{place}: defines no {name!r}{_nearest(name, defined)}")
    return f"{place}:{name}"


def _check_module(place: str, name: str) -> None:
    """Finds the module without running any of it. Raises UserError where it is not installed or defines no `name`.

    A worker starts elsewhere and with a clean path: a file of the current directory is no module to it.
    """
    path: Sequence[str] | None = None
    parts = place.split(".")
    for i in range(len(parts)):
        spec = _spec(".".join(parts[: i + 1]), path)
        if spec is None and i:
            return  # packages may find their parts in places of their own: only running it tells
        if spec is None:
            file = place.replace(".", "/") + ".py"
            here = f'; for the file here write "{file}:{name}"' if os.path.isfile(file) else ""
            raise UserError(f"{place}:{name}: no module {parts[0]!r} is installed{here}")
        if i + 1 < len(parts) and spec.submodule_search_locations is None:
            return  # os.path and the like: only running it tells
        path = spec.submodule_search_locations
    if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        defined = names_defined(spec.origin)
        if defined is not None and name not in defined:
            raise UserError(f"{place}: defines no {name!r}{_nearest(name, defined)}")


def _spec(module: str, path: Sequence[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:  # as an import would, editable installs among them
        if (spec := finder.find_spec(module, path)) is not None:
            return spec
    return None


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
            case ast.FunctionDef(name="__getattr__"):
                return None
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
    return f"; the nearest name in it is {nearest(name, defined)!r}" if defined else "; it defines nothing"
