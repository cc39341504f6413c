"""Finding the final answer in a completion. Linear in the text, standard library only, and it never raises.

Order matters more than cleverness: the *last* box of the final part wins, and text inside the thinking part does not
count when something follows it, so that a model cannot score by listing candidates on the way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Method = Literal["boxed", "hashes", "answer_is", "last_expression"]

TEXT_LIMIT = 400_000
"""Only this many characters at the end of a completion are searched; an answer stands at the end."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Where answers are looked for: each method in turn, the first that finds one decides."""

    methods: tuple[Method, ...] = ("boxed", "hashes", "answer_is", "last_expression")
    think_close: str = "</think>"
    """end of the thinking part; empty if there is none"""
    require_final_part: bool = False
    """True: text that ends inside the thinking part has no answer; False: then all of it is searched"""


@dataclass(frozen=True, kw_only=True)
class Found:
    """An answer and how it was come by; `problem` is set instead where it cannot be read (a box that never closes)."""

    answer: str = ""
    method: str = ""
    problem: str = ""


def final_part(text: str, rules: Extraction) -> str:
    """What follows the thinking part, or all of the text when nothing does."""
    if not rules.think_close:
        return text
    _, mark, after = text.rpartition(rules.think_close)
    if mark and after.strip():
        return after
    open_tag = rules.think_close.replace("/", "", 1)
    if rules.require_final_part and (mark or open_tag in text):
        return ""
    return text


def extract(text: str, rules: Extraction = Extraction()) -> Found | None:
    """The final answer in `text`, or None."""
    part = final_part(text[-TEXT_LIMIT:], rules)
    for method in rules.methods:
        match method:
            case "boxed":
                found = last_box(part)
            case "hashes":
                found = _after_hashes(part)
            case "answer_is":
                found = _after_phrase(part)
            case "last_expression":
                found = _last_expression(part)
        if found is not None:
            return found
    return None


# ---------------------------------------------------------------------------------------------------------- boxes

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_ESCAPED = re.compile(r"\\.|[{}]", re.DOTALL)
_MINUS = re.compile(r"(?:^|[\s=:$(\[])-$")
_POWER = re.compile(r"\^(?:\{[^{}]{1,40}\}|\d)")
"""What stands at a box, outside of it, and changes its value: `-\\boxed{5}`, `\\boxed{5}^2`."""


def last_box(text: str) -> Found | None:
    """The content of the last outermost `\\boxed{...}`; without braces, the token that follows (of `\\boxed 56` all
    digits: TeX would box the 5, but nobody means that)."""
    last: Found | None = None
    position = 0
    while (start := _BOX.search(text, position)) is not None:
        position = start.end()
        if position < len(text) and text[position] == "{":
            close = _closing_brace(text, position)
            if close < 0:
                return Found(method="boxed", problem="the last box is never closed")
            content, before = text[position + 1 : close].strip(), text[max(0, start.start() - 2) : start.start()]
            position = close + 1
            if power := _POWER.match(text, position):
                content = f"({content}){power.group()}"
            last = Found(answer=f"-({content})" if _MINUS.search(before) else content, method="boxed")
        elif token := re.compile(r"\\[A-Za-z]+|\d[\d.,]*|[^\s{}\\$]").match(text, position):
            last = Found(answer=token.group().rstrip(".,"), method="boxed")
    return last


def _closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes the one at `start`, -1 if there is none."""
    depth = 0
    for brace in _ESCAPED.finditer(text, start):
        mark = brace.group()
        if mark == "{":
            depth += 1
        elif mark == "}":
            depth -= 1
            if depth == 0:
                return brace.start()
    return -1


# ---------------------------------------------------------------------------------------------------------- phrases

_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(.*)$", re.MULTILINE)
_PHRASE = re.compile(
    r"\b(?:answer|result|solution)\b(?:\s+(?:to|for)\s+[^.:\n]{1,80}?)?\s{0,3}(?:\*\*)?\s{0,3}(?:is|are|:|=)"
    r"\s{0,3}(?:\*\*)?[:=]?[ \t]{0,3}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)|(?<=\S)\s+(?:because|since|so|which|as)\b")


def _after_hashes(text: str) -> Found | None:
    """GSM8K's own form: the rest of the last line that begins with four hashes."""
    lines = _HASHES.findall(text)
    if not lines or not lines[-1].strip():
        return None
    return Found(answer=_trim(lines[-1]), method="hashes")


def _after_phrase(text: str) -> Found | None:
    """What stands between the last "the answer is" and the end of its sentence."""
    tail = text[-20_000:]
    last = _last(_PHRASE, tail)
    if last is None:
        return None
    rest = tail[last.end() :].lstrip()[:2000]
    delimited = _delimited_at_start(rest)
    if delimited is not None:
        return Found(answer=delimited, method="answer_is")
    end = _SENTENCE_END.search(rest)
    answer = _trim(rest[: end.start()] if end else rest)
    return Found(answer=answer, method="answer_is") if answer else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for match in pattern.finditer(text):
        last = match
    return last


_DELIMITERS = (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"))
_GOES_ON = re.compile(
    r"\s*(?:\*\*)?\s*(?:[,;]?\s*(?:or|and|to)\b|[,;/]?\s*(?:\$|\\\(|\\\[)|[-+*/^=<>,;]\s*[-+]?[\d.]|\\?%"
    r"|(?:percent|hundred|thousand|million|billion|trillion|dozen|times)\b)"
)
"""What follows a `$...$` and changes its value."""


def _delimited_at_start(rest: str) -> str | None:
    """The content of a `$...$` that the sentence opens with; all of the sentence where the value goes on behind it
    (`$5$ or $6$`, `$5$ million`, `$25$%`)."""
    for opening, closing in _DELIMITERS:
        if rest.startswith(opening) and not re.match(r"\$\d[\d,.]*(?![\d,.]*[^\n$]*\$)", rest):
            end = rest.find(closing, len(opening))
            if end > 0 and _GOES_ON.match(rest, end + len(closing)):
                stop = _SENTENCE_END.search(rest, end)
                sentence = rest[: stop.start()] if stop else rest
                return _trim(re.sub(r"\$|\\[()\[\]]|\*\*", " ", sentence)) or None
            if end > 0:
                return rest[len(opening) : end].strip() or None
    return None


_MATH = re.compile(r"\$\$([^$]{1,2000})\$\$|\\\[(.{1,2000}?)\\\]|\\\((.{1,2000}?)\\\)|\$([^$\n]{1,500})\$", re.DOTALL)
_NUMBER = re.compile(
    r"(?<![\w.])-?(?:\$\s?)?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?(?:/\d+)?\s?%?(?!\w)|(?<![\w.])-?\.\d+"
)


_PROSE = re.compile(r"(?<![\\A-Za-z])(?!(?:or|and|in|pi|sin|cos|tan|ln|log|sqrt|exp)\b)[A-Za-z]{2,}")
"""A word: what has none is an answer as a whole."""


def _last_expression(text: str) -> Found | None:
    """All of it where it is nothing but an expression; else the last formula or number, whichever stands later."""
    whole = text.strip()
    if len(whole) <= 120 and "\n" not in whole and not _PROSE.search(whole):
        return Found(answer=_trim(whole), method="last_expression") if _trim(whole) else None
    tail = text[-5_000:]
    formula, number = _last(_MATH, tail), _last(_NUMBER, tail)
    if formula is not None and (number is None or number.start() < formula.end()):
        answer = next(group for group in formula.groups() if group is not None).strip()
    elif number is not None:
        answer = number.group().strip()
    else:
        return None
    return Found(answer=answer, method="last_expression") if answer else None


def _trim(answer: str) -> str:
    """Without surrounding markup and closing punctuation."""
    answer = answer.strip().strip("*`").strip()
    while answer and answer[-1] in ".,;:" and not answer.endswith("\\,"):
        answer = answer[:-1].rstrip("*` ")
    return answer
