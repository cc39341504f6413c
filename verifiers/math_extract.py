"""Finding the final answer in a completion. Linear in the text, standard library only, and it never raises.

Order matters more than cleverness: the *last* box of the final part wins, and text inside the thinking part does not
count when something follows it, so that a model cannot score by listing candidates on the way. Boxes that are joined
(`\\boxed{2} or \\boxed{3}`) are one answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cabochon.verifiers.math_forms import NUMBER_WORD, spelled

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
    open_tag = rules.think_close.replace("/", "", 1)
    if mark and after.strip():
        said, again, _ = after.partition(open_tag)
        return said if again and said.strip() else after  # thoughts that begin anew after the answer
    if rules.require_final_part and (mark or open_tag in text):
        return ""
    return text


_END_MARKS = re.compile(r"(?:(?:</s>|<\|[a-z_]{1,30}\|>)\s{0,9})+\Z")
"""Special tokens that a completion was decoded with."""


def extract(text: str, rules: Extraction = Extraction()) -> Found | None:
    """The final answer in `text`, or None."""
    part = final_part(text[-TEXT_LIMIT:], rules)
    part = part[:-200] + _END_MARKS.sub("", part[-200:])
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

_BOX = re.compile(r"\\(?:[bB]oxed|fbox|framebox)(?![A-Za-z])\s*")
_BARE = re.compile(
    r"\\[dt]?frac\s*(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d)|\\sqrt\s*(?:\{[^{}]*\}|\d)|\\[A-Za-z]+|\d[\d.,]*"
    r"|[^\s{}\\$]"
)
"""What a box without braces holds."""
_ESCAPED = re.compile(r"\\.|[{}]", re.DOTALL)
_MINUS = re.compile(r"(?:^|[\s=:$(\[])[-−]$|[=$(\[]\s?[-−]\s$")
_POWER = re.compile(r"\^(?:\{[^{}]{1,40}\}|\d)")
_SCALE = r"(?:hundred|thousand|million|billion|trillion|dozen|percent)\b"
_BEHIND = re.compile(rf"\s{{0,3}}\\?%|(?:\s?(?:\$|\\\)|\\text\{{))?\s{{0,3}}(?P<word>(?<=[\s{{]){_SCALE})")
_GAP = r"(?:[ \t]|\\[,;:! ]|~){0,5}"
_PART = re.compile(
    rf"{_GAP}(?:\\(?:times|cdot|div|pi|sqrt|d?frac|pm|mp|theta|log|ln|sin|cos|tan|binom|p?mod|bmod)(?![A-Za-z])|\*\s?\d"
    r"|[-+/]\s?[\d\\]|[-+/]\s?[b-z](?![A-Za-z.])|[eiknxyz](?![A-Za-z.'’])"
    r"|(?:\\left\s?)?\((?:[\d.]{1,9}|[a-z])\s?[-+*/^])"
    r"|_\{?\d|\.?\d|(?:,|\{,\}|\\,)\d{3}(?!\d)|[a-z](?![a-z])|!+(?=\$|\\\))"
    r"|,\s?-?\d{1,9}\s?[)\]]|\)\s?\^|\\(?:mathrm|text)\{i\}"
)
_PART_BEFORE = re.compile(
    r"(?:\\(?:pm|mp|ne|neq|times|cdot|div|sqrt|log|ln|sin|cos|tan|pi)|[≠±×]|\\sqrt\s*\{|[\w)}][_^]\{?"
    r"|\\[dtc]?frac\s*(?:\S{1,20})?\{|(?<![A-Za-z\\])[ek-z]\s*[-+*/]|\}\s*[+*/]|[(\[]\s*-?\d+\s*,"
    r"|(?<![\w.])\d+(?:\s*[-+*/^])?)\s*$|(?:(?<!\w)0\.|\d,)$"
)
"""What stands at a box, outside of it, and changes its value: `-\\boxed{5}`, `\\boxed{5}^2`, `\\boxed{5}\\%`."""
_DENIED = re.compile(
    r"(?:\b(?:not|than|instead of|never|cannot be)|n't(?: be)?)\s*(?:\$|\\\(|\*\*|\s){0,4}$", re.IGNORECASE
)
_TAKEN_BACK = re.compile(
    r"\s?(?:\$|\\\))?\s{1,3}(?:(?:is|was)\s(?:wrong|incorrect|false|not (?:right|correct|the answer)"
    r"|too (?:big|small|large|little|high|low|many|few|much))|(?:cannot|can't|can not) be (?:right|correct|true|it))\b"
    r"|\s?(?:\$|\\\))?\s?\?\s{1,3}No\b"
)
"""What says that a box is not the answer, before it and behind it."""
_BETWEEN = re.compile(r"\\(?:text\s?\{|q?quad|[()\[\],;:! ])|[\s${}*()\\]")
_JOINTS = re.compile(
    r"(?P<or>,?(?:and/)?or(?:maybe|perhaps|possibly|even)?(?:[a-z](?:_\d)?=)?"
    r"|,?(?:maybe|perhaps|possibly|alternatively)|/|\||lor|vee|vs\.?|versus"
    r"|[.,;]?(?:option|candidate|guess|possibility)[\da-z][.:]?)|,?and|[,;]"
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


def last_box(text: str) -> Found | None:
    """The content of the last outermost `\\boxed{...}`; without braces, the token that follows (of `\\boxed 56` all
    digits: TeX would box the 5, but nobody means that)."""
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
    elif scale := _BEHIND.match(text, behind):
        content += " " + (scale["word"] or scale.group().strip())
    said_twice = content.isdigit() and before.endswith(f" {content} ")  # = 42 \\boxed{42}
    if content and (_PART.match(text, behind) or (not said_twice and _PART_BEFORE.search(before))):
        return Found(method="boxed", problem="the box is a part of an expression")
    return Found(answer=f"-({content})" if _MINUS.search(before[-4:]) else content, method="boxed")


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
    r"\b(?:answers?|result|solutions?|(?:correct|right|best)\s(?:option|choice))\b"
    r"(?:\s+(?:to|for)\s+[^.:\n]{1,80}?)?\s{0,3}(?:\*\*)?\s{0,3}(?:is|are|:|=)"
    r"(?:\s{1,3}(?:therefore|then|thus|hence|simply)\b)?\s{0,3}(?:\*\*)?[:=]?[ \t]{0,3}",
    re.IGNORECASE,
)
_NAMED_OPTION = re.compile(
    r"(?:^|[.:\n]\s{0,3}|\b(?:[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore|[Tt]hat),?\s{1,3})(?:\*\*)?(?:(?:[Tt]he\s)?"
    r"(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s{1,3}(?:\*\*)?\(?([A-J])\)?|\((?=[A-J]\))"
    r"|([A-J])(?=(?:\*\*)?\sis\sthe\s(?:correct|right|best)\s(?:answer|option|choice)\b))(?:(?<=\()([A-J])\))?"
    r"(?:\*\*)?\sis\s(?:the\s)?(?:correct|right|best|answer)(?:\s(?:answer|option|choice|one))?(?:\*\*)?"
    r"(?=[.!]?\s{0,3}(?:\n|$|because|since))"
)
"""`Option B is correct`, `(B) is the answer`, where a sentence says no more."""
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)|(?<=\S)\s+\(?(?:because|since|so|which|as)\b")


def _after_hashes(text: str) -> Found | None:
    """GSM8K's own form: the rest of the last line that begins with four hashes."""
    lines = _HASHES.findall(text)
    if not lines or not lines[-1].strip():
        return None
    return Found(answer=_trim(lines[-1]), method="hashes")


def _after_phrase(text: str) -> Found | None:
    """What stands between the last "the answer is" and the end of its sentence."""
    tail = text[-20_000:]
    last, named = _last(_PHRASE, tail), _last(_NAMED_OPTION, tail)
    if named is not None and (last is None or named.start() >= last.start()):
        return Found(answer=next(filter(None, named.groups())), method="answer_is")
    if last is None:
        return None
    rest = tail[last.end() :].lstrip()[:2000]
    rest = rest[2:].lstrip() if rest.startswith("- ") and tail[last.end() :].lstrip(" \t:*").startswith("\n") else rest
    delimited = _delimited_at_start(rest)
    if delimited is not None:
        return Found(answer=delimited, method="answer_is")
    end = _SENTENCE_END.search(rest)
    answer = _trim(_NOT_ANOTHER.sub("", rest[: end.start()] if end else rest))
    return Found(answer=answer, method="answer_is") if answer else None


_NOT_ANOTHER = re.compile(r"(?<=\S)(?:(?:,|\s+and|\s*\()\s*not|[\s,(]\s*(?:rather than|instead of))\b.*\Z", re.DOTALL)
"""`42, not 41` says 42."""


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for match in pattern.finditer(text):
        last = match
    return last


_DELIMITERS = (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"))
_GOES_ON = re.compile(
    r"\s*(?:\*\*)?\s*(?:[,;]?\s*(?:or|and|to)\b|[-–—,;/|&(]?\s*(?:(?:or|maybe|perhaps)\s+)?(?:\$|\\\(|\\\[)"
    r"|[-+*/^=<>,;]\s*[-+]?[\d.]|\\?%|(?:percent|hundred|thousand|million|billion|trillion|dozen|times|maybe|perhaps|alternatively|unless|vs|versus"
    r"|squared|cubed|factorial|pi|over|divided|multiplied|mod|modulo|plus|minus|in base|(?:third|fourth|fifth|sixth"
    r"|seventh|eighth|ninth|tenth|hundredth|thousandth|quarter)s?|halves)\b)|[A-Za-z](?![A-Za-z])"
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
    found = formula if formula is not None and (number is None or number.end() <= formula.end()) else number
    if found is None or _one_of_several(tail[max(0, found.start() - 60) : found.start()]):
        return None
    if _MORE.match(tail, found.end()):
        return None
    if found is formula:
        answer = next(group for group in found.groups() if group is not None).strip()
    else:
        answer = _whole_run(tail, found)
    return Found(answer=answer, method="last_expression") if answer else None


_ONE_OF_SEVERAL = re.compile(
    r"(?:\b(?:or|than|never|negative|minus|plus|over|times|twice|thrice|double|through|differs from)|[\d$)}]\sand"
    r"|\b(?:root|half|third|quarter|log) of"
    r"|(?:\b(?:not|cannot|never)|n't)(?:\s(?:be|equal(?:\sto)?|think (?:it|that) is))?"
    r"|!=|[<>]=|[≠≤≥±]|\\(?:neq?|pm|mp)\s?\$?|\\(?:cdot|times)\s?\$|\$\s?[-+*/])\s?\$?$|[\d$],\s?$|[\d}]\$$",
    re.IGNORECASE,
)
"""What stands before the last of several, before what the answer is not, and before a part of it."""
_MORE = re.compile(
    r"\s?[-+*/^]\s?(?:\d?[B-HJ-Zb-z](?![A-Za-z])|\\|\()|\s(?:times\s(?=[\d$\\(])|squared|cubed|factorial|pi|sqrt|over|divided"
    r"|multiplied|mod|modulo|plus|minus|halves|to the|is (?:wrong|incorrect|not))\b"
)
"""What stands behind a part of it."""


def _one_of_several(before: str) -> bool:
    line = before.rpartition("\n")[2]
    inside = sum(line.count(mark) for mark in "([{") > sum(line.count(mark) for mark in ")]}")
    return not inside and _ONE_OF_SEVERAL.search(before) is not None


_BINDS = re.compile(r"[\^_({\[/+<>|\\,-]\s*$|(?<=\S):$|[\w)}]\*$|\s\*\s+$|\d\s*[x×]\s*$|\d\s+$")
_RUN = re.compile(
    r"(?:\\[A-Za-z]+|(?<![A-Za-z])(?:log|ln|sin|cos|tan|sqrt|exp|pi)(?![A-Za-z])|(?<![A-Za-z])[A-Za-z](?![A-Za-z])"
    r"|[\d.,+\-*/^_<>()\[\]{}|:!×\s])+\Z"
)
_TAG = re.compile(r"<[^<>]{0,40}>\s*$")
_RUNS_ON = re.compile(
    r"(?:[\^_]\{?[\w+-]{1,20}\}?|!|\\(?:pi|sqrt|cdot|times|circ|theta)(?![A-Za-z])(?:\{[^{}]{0,40}\})?|[)\]}])+"
)


def _whole_run(text: str, number: re.Match[str]) -> str:
    """The number with what belongs to it: of `2\\sqrt{3}` not the 3, of `(2, 5)` not the 5, of `2^10` not the 10."""
    more = _RUNS_ON.match(text, number.end()) or _BEHIND.match(text, number.end())
    end = more.end() if more else number.end()
    before = re.split(r"\n|[.:;?]\s", text[max(0, number.start() - 200) : number.start()])[-1]
    run = _RUN.search(before) if _BINDS.search(before) and not _TAG.search(before) else None
    left = run.group().lstrip(" ,:;") if run else ""
    whole = left + text[number.start() : end].strip()
    if not before[: run.start() if run else None].rstrip().endswith("="):
        whole = re.sub(r"^[-*]\s+", "", whole)  # of a list; behind `=` it is a sign
    surplus = sum(whole.count(mark) for mark in ")]}") - sum(whole.count(mark) for mark in "([{")
    return whole[: len(whole) - surplus] if surplus > 0 and set(whole[-surplus:]) <= set(")]}") else whole


def _trim(answer: str) -> str:
    """Without surrounding markup and closing punctuation."""
    answer = answer.strip().strip("*`").strip().removeprefix("### ").strip()
    while answer and answer[-1] in ".,;:" and not answer.endswith("\\,"):
        answer = answer[:-1].rstrip("*` ")
    return answer
