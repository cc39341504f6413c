"""Boxes: the last one, what stands at it and changes its value, and what was offered beside it. Linear in the text,
standard library only, and it never raises.

A wrong answer that counts is worse than a right one that is missed: a box that is a part of an expression, or that the
text takes back, is no answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cabochon.verifiers.math_forms import NUMBER_WORD, spelled


@dataclass(frozen=True, kw_only=True)
class Found:
    """An answer and how it was come by; `problem` is set instead where it cannot be read (a box that never closes)."""

    answer: str = ""
    method: str = ""
    problem: str = ""


_BOX = re.compile(r"\\(?:[bB]oxed|fbox|framebox)(?![A-Za-z])\s*")
_BARE = re.compile(
    r"\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)|\\sqrt\s*(?:\{[^{}]*\}|\d)|\\[A-Za-z]+|\d[\d.,]*"
    r"|[^\s{}\\$]"
)
"""What a box without braces holds."""
_ESCAPED = re.compile(r"\\.|[{}]", re.DOTALL)
_MINUS = re.compile(r"(?:^|[\s=:$(\[])[-−–]$|[=$(\[]\s?[-−–]\s$")
_OPENING = re.compile(r"(?:\\[,;:!]|\$|\\\(|\{|\\(?:mathbf|mathrm|bm|bf|text|textbf)\s?\{)+$")
"""What may stand between a sign and its box."""
_POWER = re.compile(r"\^(?:\{[^{}]{1,40}\}|\d)")
_SCALE = r"(?:hundred|thousand|million|billion|trillion|dozen|percent)\b"
BEHIND = re.compile(
    rf"\s{{0,3}}\\?%|(?:(?:\s|\\[,;: ]){{0,3}}(?:\$|\\\)|\\text\{{))?\s{{0,3}}(?P<word>(?<=[\s{{]){_SCALE})"
)
_GAP = r"(?:[ \t]|\\[,;:! ]|~){0,5}"
_PART = re.compile(
    rf"{_GAP}(?:\\(?:times|cdot|div|pi|sqrt|d?frac|pm|mp|theta|log|ln|sin|cos|tan|binom|p?mod|bmod)(?![A-Za-z])|\*\s?\d"
    r"|[-+/]\s?[\d\\]|[-+/]\s?[b-z](?![A-Za-z.])|[eiknxyz](?![A-Za-z.'’])"
    r"|[<>](?=[\s\d\\])|[≤≥]|\\(?:[lg](?:eq?|t)|[lg]eqslant)(?![a-z])"
    r"|(?:\\left\s?)?\((?:[\d.]{1,9}|[a-z])\s?[-+*/^])"
    r"|_\{?\d|\.?\d|(?:,|\{,\}|\\,)\d{3}(?!\d)|[a-z](?![a-z])|!+(?=\$|\\\))"
    r"|,\s?[-+]?(?:\d{1,9}|\\infty)\s?(?:\\right)?\\?[)\]}]|(?:\\right\s?)?\)\s?[\^!]|\\(?:mathrm|text)\{i\}"
    r"|\\text\{\s?(?:k|mil|bil)\s?\}|\s?(?:\$|\\\))?\s?(?:×|\\times(?![a-z])|[/:]\s?\d|\^\{?\\circ\}?\s?[CF]\s(?:below|under))"
    r"|\s?(?:\$|\\\))?\s{1,3}(?:squared|cubed|factorial"
    r"|and (?:a|one|two|three) (?:half|third|quarter|fourth)s?\b"
    r"|(?:times|plus|minus|over|divided by|multiplied by|(?:more|less|fewer|greater|larger|smaller) than)\s\$?-?\d)"
)
_PART_BEFORE = re.compile(
    r"(?:\\(?:pm|mp|ne|neq|times|cdot|div|sqrt|log|ln|sin|cos|tan|pi)|[≠±×]|\\sqrt\s*\{|[\w)}][_^]\{?"
    r"|\\(?:[dtc]?frac|[dt]?binom)\s*(?:\S{1,20})?\{|\\sqrt\s?\[[^\]]{1,9}\]\s?\{|(?<![A-Za-z\\])[ek-z]\s*[-+*/]"
    r"|\}\s*[+*/]|(?:[(\[]|\\\{)\s*-?\d+\s*,|(?<=\s)[<>]|[≤≥]"
    r"|\\(?:[lg](?:eq?|t)|[lg]eqslant)|(?<![A-Za-z\\])[a-z](?=\Z)"
    r"|\$-?\d[\d.]*,|\d\$\sand\s\$"
    r"|(?<![\w.])\d+(?:\s*[-+*/^])?)\s*$|(?:(?<!\w)0\.|\d,)$"
    r"|(?i:\b(?:half|twice|double|triple|negative|minus"
    r"|(?:root|square|cube|negative|reciprocal|inverse|half) of))\s(?:\$|\\\()?$"
)
"""What stands at a box, outside of it, and changes its value: `-\\boxed{5}`, `\\boxed{5}^2`, `\\boxed{5}\\%`."""
_DENIED = re.compile(
    r"(?:\b(?:not|than|instead of|never|cannot be|anything but|unlikely to be"
    r"|(?:mistake|wrong answer|incorrect answer) is|doubt (?:that )?(?:the answer|it|this) is)|n't(?: be)?)"
    r"(?: equal to)?\s*(?:\$|\\\(|\*\*|\s){0,4}$",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\s?(?:\$|\\\))?[.!]?\s{1,3}(?:(?:[Ww]ait|[Hh]owever|[Bb]ut|[Aa]ctually|[Hh]mm|[Oo]ops|[Ss]orry)[,.!]?\s)?"
    r"(?:[Tt]hat|[Tt]his|[Ii]t)(?:(?:'s|\s(?:is|was|seems))\s(?:wrong|incorrect|impossible|extraneous"
    r"|not (?:right|correct|possible|the answer))"
    r"|\s(?:does not|doesn't|cannot|can't)\s(?:satisfy|work|hold|fit|make sense|be (?:right|correct)))\b|"
    r"\s?(?:\$|\\\))?\s{1,3}(?:(?:is|was|would be|seems)\s(?:(?:an? )?(?:[a-z]{3,9} )?(?:wrong|incorrect|false"
    r"|extraneous)|not (?:right|correct|the answer)|too (?:big|small|large|little|high|low|many|few|much))"
    r"|(?:cannot|can't|can not) be (?:right|correct|true|it)"
    r"|(?:is|was)n't\s(?:right|correct|true|it|the answer)|(?:does not|doesn't|won't|fails to) (?:work|hold|fit))\b"
    r"|\s?(?:\$|\\\))?\s?\?\s{1,3}(?:No|Not|Wrong|That (?:can't|cannot|isn't))\b"
)
"""What says that a box is not the answer, before it and behind it."""
_BETWEEN = re.compile(r"\\(?:text\s?\{|q?quad|[()\[\],;:! ])|[\s${}*()\\]")
_JOINTS = re.compile(
    r"(?P<or>,?(?:and/)?or(?:maybe|perhaps|possibly|even)?(?:[a-z](?:_\d)?=)?"
    r"|,?(?:maybe|perhaps|possibly|alternatively)|/|\||lor|vee|vs\.?|versus"
    r"|[.,;]?(?:option|candidate|guess|possibility)[\da-z][.:]?"
    r"|[.,;]?(?:alternatively|or),?(?:the|my)?(?:final|other)?answeris)|,?and|[,;]"
    r"|[.,;]?(?:(?:case|part|answer)?(?:[\da-h]|i{1,3})[.:]?|[-•])"
)
_OR_BEFORE = re.compile(
    r"(?:\$([^$\n]{1,60})\$|\\\(([^\n]{1,60}?)\\\)|(?<![\w.])(-?\d(?:[\d.,]{0,20}\d)?))"
    r"\s(?:or|vs\.?|versus)\s(?:\$|\\\()?$"
)
_OR_ELSE = re.compile(
    r"(?:\^\{?\\circ\}?\s?[CFK]?)?(?:[\s$,;.(*]|\\\)){0,6}"
    r"(?i:or(?:\s(?:maybe|perhaps|possibly|even))?|maybe|perhaps|possibly|alternatively|vs\.?|versus)[\s:,]{1,3}"
    r"(?:\$([^$\n]{1,60})\$|\\\(([^\n]{1,60}?)\\\)|(-?\d(?:[\d.,]{0,20}\d)?(?:\\?%)?)"
    r"(?=\s{0,3}(?:[.,;?!)](?!\d)|[A-Za-z]|\n|\Z))"
    rf"|((?i:(?!one\s){NUMBER_WORD}))(?=[\s.,;?!)]|\Z))"
    r"|[\s$]{1,3}to\s\$?(-?\d{1,20})\$?(?=\s{0,3}(?:[.;?!)](?!\d)|\n|\Z))"
)
"""What stands between the boxes of one answer, `\\boxed{2} or \\boxed{3}`, and a second one behind, `\\boxed{2} or 3`.
"""
_BESIDE_LIMIT = 20
_UNFILLED = re.compile(r"(?:[\s.…]|\\(?:[lc]?dots|text\{\s?\}))*")


_HIDDEN = re.compile(
    r"<!--.{0,500}?-->|~~[^~\n]{1,300}~~|\\iffalse(?![A-Za-z]).{0,500}?\\fi(?![A-Za-z])"
    r"|(?<![\\\d])(?<!\d\s)%(?=[^\n]{0,40}boxed)[^\n]*"
    r"|\\(?:[hv]?phantom|footnote|label|sout|[bx]?cancel|textcolor\{white\})\s?\{(?:[^{}\n]|\{[^{}\n]{0,200}\}){0,300}\}",
    re.DOTALL,
)
"""What a reader does not see, or sees struck out."""


def last_box(text: str) -> Found | None:
    """The content of the last outermost `\\boxed{...}`; without braces, the token that follows (of `\\boxed 56` all
    digits: TeX would box the 5, but nobody means that)."""
    text = _HIDDEN.sub(" ", text)
    boxes: list[tuple[int, int, int]] = []
    position = 0
    while (start := _BOX.search(text, position)) is not None:
        position = start.end()
        if position < len(text) and text[position] == "{":
            close = _closing_brace(text, position)
            if close < 0:
                return Found(method="boxed", problem="the last box is never closed")
            boxes.append((start.start(), position, close))
            position = close + 1
        elif _BARE.match(text, position):
            boxes.append((start.start(), position, -1))
    while len(boxes) > 1 and _UNFILLED.fullmatch(text, boxes[-1][1] + 1, boxes[-1][2]):
        boxes.pop()  # "I put my answer in \\boxed{}"
    denied = None
    while boxes:
        found = _content(text, *boxes[-1])
        if found is not None:
            return _with_others(text, boxes, found)
        boxes.pop()
        denied = Found(method="boxed", problem="the box is what the answer is not")
    return denied


def _with_others(text: str, boxes: list[tuple[int, int, int]], found: Found) -> Found:
    """The last box with what was offered beside it: two answers are not the one that happens to be right."""
    if found.problem or boxes[-1][2] < 0 or not found.answer:
        return found
    answer = found.answer
    if other := _OR_ELSE.match(text, boxes[-1][2] + 1):
        answer += rf" \text{{ or }} {spelled(next(filter(None, other.groups())))}"
    if other := _OR_BEFORE.search(text, max(0, boxes[-1][0] - 90), boxes[-1][0]):
        answer = rf"{next(filter(None, other.groups()))} \text{{ or }} {answer}"
    boxes = boxes[-_BESIDE_LIMIT:]
    for (start, _, _), before in zip(boxes[:0:-1], boxes[-2::-1], strict=True):
        if before[2] < 0 or start - before[2] > 40:
            break
        joint = _JOINTS.fullmatch(_BETWEEN.sub("", text[before[2] + 1 : start]).casefold())
        other_box = _content(text, *before)
        if joint is None or other_box is None or not other_box.answer:
            break
        if other_box.answer != found.answer:
            answer = rf"{other_box.answer} \text{{ {'or' if joint['or'] else 'and'} }} {answer}"
    return Found(answer=answer, method="boxed")


def _content(text: str, start: int, inside: int, close: int) -> Found | None:
    """What a box says, with what stands at it; None where the text says that it is not the answer."""
    if close < 0:
        token = _BARE.match(text, inside)
        return Found(answer=token.group().rstrip(".,"), method="boxed") if token else None
    content, before = text[inside + 1 : close].strip(), text[max(0, start - 40) : start]
    if _DENIED.search(before) or _TAKEN_BACK.match(text, close + 1):
        return None
    behind = close + 1
    if power := _POWER.match(text, behind):
        content = f"({content}){power.group()}"
    elif scale := BEHIND.match(text, behind):
        content += " " + (scale["word"] or scale.group().strip())
    said_twice = content.isdigit() and before.endswith(f" {content} ")  # = 42 \\boxed{42}
    if content and (_PART.match(text, behind) or (not said_twice and _PART_BEFORE.search(before))):
        return Found(method="boxed", problem="the box is a part of an expression")
    sign = _OPENING.sub("", before)
    return Found(answer=f"-({content})" if _MINUS.search(sign[-4:]) else content, method="boxed")


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
