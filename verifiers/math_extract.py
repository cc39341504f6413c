"""Finding the final answer in a completion. Linear in the text, standard library only, and it never raises.

Order matters more than cleverness: the *last* box of the final part wins, and text inside the thinking part does not
count when something follows it, so that a model cannot score by listing candidates on the way. Boxes that are joined
(`\\boxed{2} or \\boxed{3}`) are one answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cabochon.verifiers.math_boxes import BEHIND, Found, last_box
from cabochon.verifiers.math_lex import signs

Method = Literal["boxed", "answer_tag", "hashes", "answer_is", "last_expression"]

TEXT_LIMIT = 400_000
"""Only this many characters at the end of a completion are searched; an answer stands at the end."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Where answers are looked for: each method in turn, the first that finds one decides."""

    methods: tuple[Method, ...] = ("boxed", "answer_tag", "hashes", "answer_is", "last_expression")
    think_close: str = "</think>"
    """end of the thinking part; empty if there is none"""
    require_final_part: bool = False
    """True: text that ends inside the thinking part has no answer; False: then all of it is searched"""


def final_part(text: str, rules: Extraction) -> str:
    """What follows the thinking part, or all of the text when nothing does."""
    if not rules.think_close:
        return text
    _, mark, after = text.rpartition(rules.think_close)
    open_tag = rules.think_close.replace("/", "", 1)
    if mark and after.strip():
        said, again, _ = after.partition(open_tag)
        return said if again and said.strip() else after  # thoughts that begin anew after the answer
    if text.count(rules.think_close) > 1:  # and that end where the text does
        said, *more = text.split(rules.think_close)[1:]
        said = "\n".join(part.partition(open_tag)[0] for part in (said, *more))
        if said.strip():
            return said
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
                found = _corrected(part, last_box(part))
            case "answer_tag":
                found = _in_tag(part)
            case "hashes":
                found = _after_hashes(part)
            case "answer_is":
                found = _after_phrase(part)
            case "last_expression":
                found = _last_expression(part)
        if found is not None:
            return found
    return None


# ---------------------------------------------------------------------------------------------------------- phrases

_HASHES = re.compile(r"^[ \t]*####(?!#)[ \t]*(.*)$", re.MULTILINE)
_PHRASE = re.compile(
    r"\b(?:answers?|result|solutions?|(?:correct|right|best)\s(?:option|choice))\b"
    r"(?:\s+(?:to|for)\s+[^.:\n]{1,80}?)?\s{0,3}(?:\*\*)?\s{0,3}(?:is|are|:|=)"
    r"(?:\s{1,3}(?:therefore|then|thus|hence|simply|exactly|just|indeed|clearly|equal to|given by)\b)?"
    r"\s{0,3}(?:\*\*)?[:=]?[ \t]{0,3}"
    r"|(?:答案|正解|答え)(?:是|为|為|は|：|:)[:：]?\s{0,3}|\b(?:[Оо]твет|답)\s?[:：]\s{0,3}",
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
_SENTENCE_END = re.compile(r"\n|。|[.!?](?=\s|$)|(?<=\S)\s+\(?(?:because|since|so|which|as)\b")


def _in_tag(text: str) -> Found | None:
    """What the last `<answer>` holds, whether it is closed or generation was stopped at its end."""
    _, opening, rest = text.rpartition("<answer>")
    inside = rest.partition("</answer>")[0].strip()
    if not opening or not inside:
        return None
    return _after_hashes(inside) or _after_phrase(inside) or _last_expression(inside)


def _after_hashes(text: str) -> Found | None:
    """GSM8K's own form: the rest of the last line that begins with four hashes."""
    lines = _HASHES.findall(text)
    if not lines or not lines[-1].strip():
        return None
    return Found(answer=_trim(lines[-1]), method="hashes")


def _after_phrase(text: str) -> Found | None:
    """What stands between the last "the answer is" and the end of its sentence."""
    tail = text[-20_000:]
    last, named = _last_said(tail), _last(_NAMED_OPTION, tail)
    if named is not None and (last is None or named.start() >= last.start()):
        return Found(answer=next(filter(None, named.groups())), method="answer_is")
    if last is None:
        denied = any(_DENIED.search(tail, max(0, m.start() - 40), m.start()) for m in _PHRASE.finditer(tail))
        return Found(method="answer_is", problem="the text says what the answer is not") if denied else None
    rest = tail[last.end() :].lstrip()[:2000]
    rest = rest[2:].lstrip() if rest.startswith("- ") and tail[last.end() :].lstrip(" \t:*").startswith("\n") else rest
    delimited = _delimited_at_start(rest)
    if delimited is not None:
        return Found(answer=delimited, method="answer_is")
    end = _SENTENCE_END.search(rest)
    if end and end.group() == "?":
        return None  # it was only asked
    answer = _trim(_NOT_ANOTHER.sub("", rest[: end.start()] if end else rest))
    return Found(answer=answer, method="answer_is") if answer else None


_NOT_ANOTHER = re.compile(r"(?<=\S)(?:(?:,|\s+and|\s*\()\s*not|[\s,(]\s*(?:rather than|instead of))\b.*\Z", re.DOTALL)
"""`42, not 41` says 42."""


_DENIED = re.compile(r"\b(?:wrong|incorrect|false|no way|not|doubt)\s(?:that\s)?(?:the\s)?$", re.IGNORECASE)
_UNSAID = re.compile(
    rf"{_DENIED.pattern}|\b(?:(?:might|may|could|would) think|if)\s(?:that\s)?(?:the\s)?$", re.IGNORECASE
)
"""What stands before an answer that is not given: `the wrong answer is`, `if the answer is`."""
_PLAIN = re.compile(
    r"(?:\*\*)?(?:\\?\$|\\\()?\s?(-?\d(?:[\d,]*\d)?(?:\.\d+)?)(?=(?:\$|\\\)|\*\*)?(?:[.!,]?\s|[.!]?\Z))"
)


def _corrected(text: str, found: Found | None) -> Found | None:
    """A box with another number that is said to be the answer behind it: two answers."""
    if found is None or not re.fullmatch(r"-?\d[\d,.]*", found.answer):
        return found
    behind = text[text.rfind("boxed") :][:20_000]
    said = _last_said(behind)
    other = _PLAIN.match(behind, said.end()) if said else None
    if other is None or other.group(1).replace(",", "") == found.answer.replace(",", ""):
        return found
    return Found(answer=rf"{found.answer} \text{{ or }} {other.group(1)}", method="boxed")


def _last_said(text: str) -> re.Match[str] | None:
    last = None
    for match in _PHRASE.finditer(text):
        if not _UNSAID.search(text, max(0, match.start() - 40), match.start()):
            last = match
    return last


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for match in pattern.finditer(text):
        last = match
    return last


_DELIMITERS = (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"))
_GOES_ON = re.compile(
    r"\s*(?:\*\*)?\s*(?:[,;]?\s*(?:or|and|to)\b|[-–—,;/|&(]?\s*(?:(?:or|maybe|perhaps)\s+)?(?:\$|\\\(|\\\[)"
    r"|[-+*/^=<>,;]\s*[-+]?[\d.]|\\?%|(?:percent|hundred|thousand|million|billion|trillion|dozen|times|maybe|perhaps|alternatively|unless|vs|versus"
    r"|squared|cubed|factorial|if|(?:less|more|fewer|greater)\sthan|short of|pi|over"
    r"|divided|multiplied|mod|modulo|plus|minus|in base|(?:third|fourth|fifth|sixth"
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


_PROSE = re.compile(
    r"(?<![\\A-Za-z])(?!(?:or|and|in|pi|sin|cos|tan|ln|log|sqrt|exp)\b)[A-Za-z]{2,}|[\u0400-\u1fff\u3040-\ud7ff]"
)
"""A word, in whatever script: what has none is an answer as a whole."""


_DASH = re.compile(r"(?<![\w)}\]])–(?=\$?\d)")
"""A dash that can only be a minus."""
_ASIDE = re.compile(r"\s\((?!(?:in )?base|mod)([^()]{1,200})\)(?=[\s.!;*]{0,9}\Z)")
"""`6 (not 5).`, `8 apples (3 red and 5 green)`: what is said besides, at the end."""


def _last_expression(text: str) -> Found | None:
    """All of it where it is nothing but an expression; else the last formula or number, whichever stands later."""
    whole = text.strip()
    if len(whole) <= 120 and "\n" not in whole and not _PROSE.search(whole):
        return Found(answer=_trim(whole), method="last_expression") if _trim(whole) else None
    tail = _ASIDE.sub(lambda aside: "" if _PROSE.search(aside[1]) else aside[0], text[-5_000:].rstrip())
    tail = _DASH.sub("-", signs(tail, alone=False))
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
    r"(?:\b(?:or|than|at least|at most|or equal to|instead of|except(?: for)?|excluding|nor|without|never|negative"
    r"|minus|plus|over|times|twice|thrice|double|through|differs from"
    r"|divided by|divisible by|(?:multiple|factor) of|mod(?:ulo)?|in base|(?:all|anything) but|to the(?: power)?)"
    r"|[\d$)}]\s(?:and|out of)"
    r"|\b(?:ratio|odds|scale|score)\b[^.\n]{0,20}\d\sto|\d\s?(?:hours?|hrs?|minutes?|feet|foot|ft|yards?|dollars?|pounds?"
    r"|lbs?|weeks?|days?|years?|meters?|miles?|km)(?:,?\sand)?"
    r"|\b(?:root|half|third|quarter|log) of"
    r"|(?:\b(?:not|cannot|never)|n't)(?:\s(?:be|equal(?:\sto)?|think (?:it|that) is))?"
    r"|!=|[<>]=|[≠≤≥±]|\\(?:neq?|pm|mp)\s?\$?|\\(?:cdot|times)\s?\$|\$\s?[-+*/])\s?\$?$|[\d$],\s?$|[\d}]\$$",
    re.IGNORECASE,
)
"""What stands before the last of several, before what the answer is not, and before a part of it."""
_MORE = re.compile(
    r"\s?[-+*/^]\s?(?:\d?[B-HJ-Zb-z](?![A-Za-z])|\\|\()|\s(?:times\s(?=[\d$\\(])|squared|cubed|factorial|pi|sqrt|over"
    r"|divided|multiplied|mod|modulo|plus|minus|(?:third|quarter|fourth|fifth|sixth|eighth|tenth)s|halves"
    r"|and (?:a|one) (?:half|third|quarter)|to the"
    r"|is (?:wrong|incorrect|not|impossible|extraneous|rejected|invalid|too)|(?:does|can|is)(?:n't|not| not))\b"
)
"""What stands behind a part of it."""


def _one_of_several(before: str) -> bool:
    line = before.rpartition("\n")[2]
    inside = sum(line.count(mark) for mark in "([{") > sum(line.count(mark) for mark in ")]}")
    return not inside and _ONE_OF_SEVERAL.search(before) is not None


_BINDS = re.compile(
    r"[\^_({\[/+<>|\\,-]\s*$|(?<=\S):$|[\w)}]\*$|\s\*\s+$|\d\s*[x×]\s*$|\d\s+$"
    r"|\\[A-Za-z]+\s*$|log_\{\d+\}\s*$|\d\s?[–—]\s?$"
)
_RUN = re.compile(
    r"(?:\\[A-Za-z]+|(?<![A-Za-z])(?:log|ln|sin|cos|tan|sqrt|exp|pi)(?![A-Za-z])|(?<![A-Za-z])[A-Za-z](?![A-Za-z])"
    r"|[\d.,+\-–—*/^_<>()\[\]{}|:!×\s])+\Z"
)
_TAG = re.compile(r"<[^<>]{0,40}>\s*$")
_RUNS_ON = re.compile(
    r"(?:[\^_]\{?[\w+-]{1,20}\}?|!|\\(?:pi|sqrt|cdot|times|circ|theta)(?![A-Za-z])(?:\{[^{}]{0,40}\})?|[)\]}])+"
)


def _whole_run(text: str, number: re.Match[str]) -> str:
    """The number with what belongs to it: of `2\\sqrt{3}` not the 3, of `(2, 5)` not the 5, of `2^10` not the 10."""
    more = _RUNS_ON.match(text, number.end()) or BEHIND.match(text, number.end())
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
    answer = answer[1:-1].strip() if len(answer) > 2 and answer[0] + answer[-1] in ('""', "“”") else answer
    while answer and answer[-1] in ".,;:。" and not answer.endswith("\\,"):
        answer = answer[:-1].rstrip("*` ")
    return answer
