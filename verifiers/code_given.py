"""What a coding task gives: the name that its program defines, and trusted source that the program and its tests both
find. Task text only; nothing a model wrote comes near this file.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What the parser raises for a text that is no program."""
_ENTRY = re.compile(r"([^\W\d]\w*)(?:(?:\(\))?\.([^\W\d]\w*))?")
_FUTURE = re.compile(r"^from __future__ import (?:\([^)]*\)|[^(\n]*)[^\n]*(?:\n|\Z)", re.MULTILINE)
_MODULES = ("bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "math", "operator",
            "random", "string", "typing")  # fmt: skip


def _names(module: str) -> list[str]:
    held = importlib.import_module(module)
    return [name for name in getattr(held, "__all__", dir(held)) if name[0] != "_"]


def _imports() -> str:
    """Names, not stars: so that it is known which they are; builtins stay what they are (math's `pow` takes no
    modulus), and of a module and a function of its name the module is meant."""
    lines = []
    for module in _MODULES:
        names = [name for name in _names(module) if name not in dir(builtins)]
        lines.append(f"from {module} import {', '.join(names)}")
    return "\n".join([*lines, "import bisect, collections, copy, functools, heapq, itertools, math, operator, random",
                      "import re, string, sys", ""])  # fmt: skip


LEETCODE = _imports()
"""What a method of a class may use without importing it, as on the site where such tasks come from."""


def entry_of(payload: Mapping[str, Any]) -> tuple[str, str]:
    """The name a program has to define, and what tests call: `Solution` and `Solution().twoSum` for the entry points
    `Solution.twoSum` and `Solution().twoSum`; empty where the task names none. Raises ValueError."""
    entry = str(payload.get("entry_point") or "").strip()
    found = _ENTRY.fullmatch(entry)
    if entry and not found:
        raise ValueError(f"payload['entry_point'] must be a function's name or Class.method, got {entry[:80]!r}")
    if not found:
        return "", ""
    return found[1], f"{found[1]}().{found[2]}" if found[2] else found[1]


def given_of(payload: Mapping[str, Any]) -> str:
    """The source that both sides find: what a prompt that is code defines beside the program's own name, then
    `helpers`; LeetCode's imports where there is neither and a method is asked for. Raises ValueError."""
    entry, called = entry_of(payload)
    helpers = str(payload.get("helpers") or "")
    try:
        bound = bound_by(ast.parse(helpers).body)
    except UNPARSABLE as e:
        raise ValueError(f"the task's helpers do not parse: {e}") from e
    if entry in bound:
        raise ValueError(f"payload['helpers'] define {entry}, which is asked of the program")
    if "*" in bound and not entry:
        raise ValueError("payload['helpers'] import all names of a module: then payload['entry_point'] has to say "
                         "which name is the program's")  # fmt: skip
    given = "\n".join(filter(None, (_helpers_of(code_of(payload), entry), helpers)))
    return given or (LEETCODE if "." in called else "")


def code_of(payload: Mapping[str, Any]) -> str:
    """The code that a completion may go on from: `prefix`, or the prompt where it is a program or begins one."""
    if not payload.get("entry_point"):
        return str(payload.get("prefix") or "")
    prompt = str(payload.get("prompt") or "")
    return str(payload.get("prefix") or (prompt if _begun(prompt) is not None else ""))


def _begun(prompt: str) -> ast.Module | None:
    """A program, or one that ends where a body has to follow."""
    for body in ("", "pass", " pass", "\n    pass", "\n        pass"):
        try:
            return ast.parse(prompt + body)
        except UNPARSABLE:
            continue
    return None


def _helpers_of(code: str, entry: str) -> str:
    """What a prompt defines beside what is asked for: the program may use it, the tests may too, and must not take the
    program's. Nothing where no function is named."""
    tree = _begun(code) if entry else None
    if tree is None:
        return ""
    keep: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            node.names = [a for a in node.names if (a.asname or a.name) != entry]
            keep += [node] if node.names else []
        elif entry not in bound_by([node]) and not isinstance(node, ast.Expr):
            keep.append(node)
    return ast.unparse(ast.Module(body=keep, type_ignores=[]))


def bound_by(body: Iterable[ast.stmt]) -> set[str]:
    """The names that statements bind at the top of a module; `*` stands for all of one that is not well known."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= imported(node)
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    return names


def imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The names that an import binds; see `bound_by`."""
    if any(a.name == "*" for a in node.names) and isinstance(node, ast.ImportFrom):
        return set(_names(node.module)) if node.module in _MODULES else {"*"}
    return {(a.asname or a.name).partition(".")[0] for a in node.names}


def behind(given: str, source: str) -> str:
    """`source` after what it was given; its own `from __future__` lines stay first."""
    if not given:
        return source
    at = max((found.end() for found in _FUTURE.finditer(source)), default=0)
    return f"{source[:at]}{given}\n{source[at:]}"
