"""The program in a completion. Text work only: what a model wrote is never parsed or run outside a sandbox."""

from __future__ import annotations

import re
from collections.abc import Collection

MAX_PROGRAM = 1 << 20
"""characters"""
_FENCE = re.compile(
    r"^(?:([ \t]{0,8})(?:</?[^<>\n`]{1,40}>[ \t]*){0,3}|[^\n]{1,300}?(?=```py(?:thon3?)?[ \t\r]*$))"
    r"(```+|~~~+)[ \t]*([\w+.#-]*)[^\n]*$",
    re.MULTILINE | re.IGNORECASE,
)
"""At the start of a line, behind tags, or at the end of a line of prose where it says that Python follows."""
_DEEPER = 3
"""columns a fence that closes may be right of the one that opened; beyond, it is text, as in a docstring"""
_PYTHON = {"python", "py", "python3", "py3", "python2", "python3.11", "python3.12"}
_THOUGHT_END = "</think>"
_NEAR = 200
"""characters of a line that are looked at on each side of a `</think>`"""


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks as (language, content), in order; a fence that never closes runs to the end, or to where
    another program begins, and a block of Markdown is what it holds."""
    found: list[tuple[str, str]] = []
    opened: tuple[str, str, int] | None = None
    margin = 0
    for match in _FENCE.finditer(text):
        indent, mark, language = len((match[1] or "").expandtabs(4)), match[2], match[3].lower().strip(".-")
        again = opened and {opened[1], language} <= _PYTHON and match[1] is not None and indent <= margin
        if opened is None or again:
            if opened:
                found.append((opened[1], text[opened[2] : match.start()]))
            opened, margin = (mark, language, match.end() + 1), indent
        elif (
            mark[0] == opened[0][0] and len(mark) >= len(opened[0]) and indent <= margin + _DEEPER
            and (not language or _SENTENCE.match(text, match.end(2)))
        ):  # fmt: skip
            found.append((opened[1], text[opened[2] : match.start()]))
            opened = None
    if opened is not None:
        found.append((opened[1], _CLOSED_BEHIND.sub("", text[opened[2] :], count=1)))
    inner = ((language, content, blocks(content) if language in _MARKDOWN else []) for language, content in found)
    return [block for language, content, within in inner for block in within or [(language, content)]]


_SENTENCE = re.compile(r"[ \t]*[A-Z]\w*[ \t]")
"""Behind a fence that closes: no language begins so."""
_CLOSED_BEHIND = re.compile(r"(?<=\S)```[ \t]*$.*", re.MULTILINE | re.DOTALL)
"""A fence at the end of a program's last line."""
_MARKDOWN = ("markdown", "md")


def answer(text: str) -> str:
    """What comes after the last `</think>`, one in a string of the program aside; without a byte order mark."""
    end = len(text)
    while (at := text.rfind(_THOUGHT_END, 0, end)) >= 0:
        after = at + len(_THOUGHT_END)
        left = text[max(at - _NEAR, 0) : at].rpartition("\n")[2]
        right = text[after : after + _NEAR].partition("\n")[0]
        if not any(left.count(quote) % 2 and quote in right for quote in "'\""):
            text = text[after:]
            break
        end = at
    return text.removeprefix("\ufeff")


def block(text: str, wanted: Collection[str] = ()) -> str:
    """The last block marked Python, else the last unmarked one, else the last of any kind, else ""; as it is indented.
    Where that one neither defines a `wanted` name nor goes on inside a function, it is an example of use: then the last
    that does define one, of its kind or else of the next."""
    found = [(language, content) for language, content in blocks(answer(text)) if content.strip()]
    kinds = [[content for language, content in found if language in _PYTHON],
             [content for language, content in found if not language], [content for _, content in found]]  # fmt: skip
    some = next(filter(None, kinds), [""])
    definer = next((c for kind in kinds for c in reversed(kind) if defines(c, wanted)), some[-1])
    return (some[-1] if _BODY.match(some[-1]) else definer).removeprefix("\ufeff")


_BODY = re.compile(r"(?:[ \t]*\r?\n)*(?=([ \t]+)\S)(?:.*\n)*?\1(?:return|yield)\b")
"""An indented text that returns: the body of a function."""


def defines(source: str, names: Collection[str]) -> bool:
    """Whether a text has a line that defines one of these, by its looks."""
    either = "|".join(map(re.escape, names))
    line = rf"^[ \t]*(?:async[ \t]+def|def|class)[ \t]+(?:{either})\b|^(?:{either})[ \t]*(?::[^\n=]+)?=(?!=)"
    return bool(names) and re.search(line, source, re.MULTILINE) is not None


def program(text: str, wanted: Collection[str] = ()) -> str:
    """The program, or "" where there is none: the `block`, else the whole answer where it looks like code."""
    found = block(text, wanted)
    if found:
        return _dedented(found)
    text = answer(text)
    tagged = re.search(r"<answer>\s*?\n((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    text = tagged[1] if tagged else text
    return text if _looks_like_code(text) else ""


def _dedented(content: str) -> str:
    """A block inside a list item is indented as a whole."""
    lines = content.replace("\r\n", "\n").rstrip("\n").split("\n")  # a form feed or U+2028 may be in a string
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
