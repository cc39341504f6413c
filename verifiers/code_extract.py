"""The program in a completion. Text work only: what a model wrote is never parsed or run outside a sandbox."""

from __future__ import annotations

import re

MAX_PROGRAM = 1 << 20
"""characters"""
_FENCE = re.compile(r"^[ \t]{0,8}(```+|~~~+)[ \t]*([\w+.#-]*)[^\n]*$", re.MULTILINE)
_PYTHON = {"python", "py", "python3", "py3", "python2", "pycon", "python3.11", "python3.12"}
_THOUGHT_END = "</think>"


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks as (language, content), in order; a fence that never closes runs to the end."""
    found: list[tuple[str, str]] = []
    opened: tuple[str, str, int] | None = None
    for match in _FENCE.finditer(text):
        mark, language = match[1], match[2].lower()
        if opened is None:
            opened = (mark, language, match.end() + 1)
        elif mark[0] == opened[0][0] and len(mark) >= len(opened[0]) and not language:
            found.append((opened[1], text[opened[2] : match.start()]))
            opened = None
    if opened is not None:
        found.append((opened[1], text[opened[2] :]))
    return found


def program(text: str) -> str:
    """The program, or "" where there is none.

    After the last `</think>` if there is one: the last block marked Python, else the last unmarked block, else the last
    block of any kind, else the whole text where it looks like code.
    """
    text = text.rpartition(_THOUGHT_END)[2] if _THOUGHT_END in text else text
    found = [(language, content) for language, content in blocks(text) if content.strip()]
    for wanted in (lambda tag: tag in _PYTHON, lambda tag: not tag, lambda tag: True):
        for language, content in reversed(found):
            if wanted(language):
                return _dedented(content)
    return text if _looks_like_code(text) else ""


def _dedented(content: str) -> str:
    """A block inside a list item is indented as a whole."""
    lines = content.splitlines()
    margins = [len(line) - len(line.lstrip(" ")) for line in lines if line.strip()]
    margin = min(margins, default=0)
    return "\n".join(line[margin:] for line in lines) + "\n" if margin else content


def _looks_like_code(text: str) -> bool:
    starts = (
        "def ",
        "class ",
        "import ",
        "from ",
        "async def ",
        "@",
        "print(",
        "for ",
        "while ",
        "if ",
        "return ",
        "    ",
    )
    return any(
        line.startswith(starts) or re.match(r"\w[\w, ]* ?[-+*/]?= ?\S", line) or re.match(r"[\w.]+\(.*\)\s*$", line)
        for line in text[:MAX_PROGRAM].splitlines()
    )
