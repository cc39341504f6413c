"""The last formula or number of a text that names no answer: only where it is what the text comes to.

Most of this says what a last number is not: one of several, a label, a bound, a supposition, a part of something else.
"""

from __future__ import annotations

import re

from cabochon.verifiers.math_boxes import BEHIND, Found
from cabochon.verifiers.math_lex import signs
from cabochon.verifiers.math_units import measured, parse_unit

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


def last_expression(text: str) -> Found | None:
    """All of it where it is nothing but an expression; else the last formula or number, whichever stands later."""
    whole = text.strip()
    if len(whole) <= 120 and "\n" not in whole and not _PROSE.search(whole):
        return Found(answer=trim(whole), method="last_expression") if trim(whole) else None
    tail = _ASIDE.sub(lambda aside: "" if _PROSE.search(aside[1]) else aside[0], _before_check(text[-5_000:].rstrip()))
    tail = _UNIT_POWER.sub(_in_words, _DASH.sub("-", signs(tail, alone=False)))
    formula, number = last_match(_MATH, tail), last_match(_NUMBER, tail)
    found = formula if formula is not None and (number is None or number.end() <= formula.end()) else number
    if found is None or _one_of_several(tail[max(0, found.start() - 60) : found.start()]):
        return None
    if _MORE.match(tail, found.end()) or not _asserted(tail, found):
        return None
    if found is formula:
        answer = next(group for group in found.groups() if group is not None).strip()
    else:
        answer = _whole_run(tail, found)
    unit = _UNIT_BEHIND.match(tail, found.end())
    if answer and unit is not None and unit[1].casefold() not in _NO_UNITS and measured(parse_unit(unit[1])):
        answer += f" {unit[1]}"
    return Found(answer=answer, method="last_expression") if answer else None


_CHECK = re.compile(
    r"(?:\n\s{0,9}|(?<=[.!])\s)(?:\*\*)?(?:(?:Let'?s|Let us|We can|To)\s)?"
    r"(?:[Dd]ouble[- ])?(?:[Cc]heck|[Vv]erif(?:y|ication))\b"
)
_CONCLUDES = re.compile(r"\b(?:so|thus|therefore|hence|final|answer)\b", re.IGNORECASE)


_REASON = re.compile(r"(?<=\d)(?:\$|\\\))?,?\s(?:because|since)\s[^.!?\n]{1,200}[.!?]?\Z")


def _before_check(text: str) -> str:
    """Without a check of the answer, or a reason for it, that ends the text with another number."""
    if (reason := _REASON.search(text)) is not None:
        before = _SENTENCE.split(text[: reason.start()])[-1]
        other = last_match(_NUMBER, reason[0])
        if other is not None and other[0] not in _NUMBER.findall(before):
            text = text[: reason.start()]
    check = last_match(_CHECK, text)
    if check is None or _CONCLUDES.search(text, check.end()) or not re.search(r"\d", text[: check.start()]):
        return text
    return text[: check.start()]


_UNIT_POWER = re.compile(r"(?<=[\d$)}])(\s?)([A-Za-z]{1,10})(?:\^|\*\*)\{?([23])\}?(?!\d)")
_UNIT_BEHIND = re.compile(
    r"(?:\$|\\\)|\*\*)?\s?([A-Za-z]{1,3}/[A-Za-z]{1,3}|(?:square |cubic )?[A-Za-z]{1,12})"
    r"(?=[.,;!?)*$]|\s(?!per\b|square|/)|\Z)"
)
"""A plain one: how a rate is said in prose (`5 pounds per year`) tells little."""
_NO_UNITS = frozenset(["in", "a", "as", "are", "second"])
"""Words of the sentence, as in `5 in total`."""


def _in_words(power: re.Match[str]) -> str:
    """`30 cm^3` as `30 cubic cm`: its last number is the 30."""
    if not measured(parse_unit(power[2])):
        return power[0]
    return f"{power[1]}{'square' if power[3] == '2' else 'cubic'} {power[2]}"


_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")
_SUPPOSED = re.compile(
    r"\W*(?:suppose|assume|assuming|imagine|let(?!['’]s| us)|if|unless|perhaps|maybe|is|are|does|do|did|can|could"
    r"|we (?:can )?(?:reject|discard|ignore)|reject|discard|ignore|guess|try)\b"
    r"(?![^,]*(?:,|\b(?:then|gets?|gives?|has|have|obtain)\b))",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"\b(?:not|never|cannot|neither|nor|reject(?:s|ed)?|discard(?:s|ed)?|(?:is|are|was|were|do|does|did|has|have|had|ca|wo"
    r"|could|would|should)n['’]t)\b(?:(?!\b(?:is|are|was|were|equals?)\b)[^,;=]){0,60}\Z",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"\b(?:step|theorem|lemma|corollary|equation|eq|case|part|question|problem|exercise|section|chapter|figure|table|line"
    r"|page|rule|method|example|item|confidence|level|grade|version|since|from|under|below|above|after|before|until"
    r"|between|beyond|base|choose|of which|(?:compared|relative) to|(?:has|have|numbers?) up to)[:.]?\s?\(?#?\$?\Z"
    r"|(?:[%\d]|half|third|quarter)\sof(?:\sthe)?\s\$?\Z|\b(?:options|choices|candidates)\b[^.]*\Z"
    r"|\b(?:could|might|may)(?:\salso)?\sbe\s\$?\Z"
    r"|\b(?:multipl(?:y|ying)|subtract(?:ing)?|divid(?:e|ing)|add(?:ing)?)\b"
    r"(?:(?!\b(?:gives?|is|are|gets?|yields?|equals?|makes?|we|into|to find)\b)[^,;=]){0,40}\Z"
    r"|(?<!from\s)(?<!from\s\$)\b\d[\d.,]*\$?\s(?:to|through)\s\$?\Z",
    re.IGNORECASE,
)
_UNSAID_BEHIND = re.compile(
    r"[^.!?\n]{0,80}\?|[^.!?\n,]{0,30},?\s(?:which|but (?:this|that|it))\s(?:is|was|does|can)"
    r"(?:n['’]t|\snot|not|\s(?:impossible|wrong|incorrect|extraneous|absurd|too))\b"
    r"|[^.!?\n]{0,30}[.!]\s(?:(?:But|However|Wait)[,.]?\s)?(?:[Tt]hat|[Tt]his|[Ii]t)(?:'s|\sis)\s"
    r"(?:impossible|wrong|incorrect|not)\b"
)


def _asserted(text: str, found: re.Match[str]) -> bool:
    """Whether a sentence says the number: none that asks, supposes or denies it, or where it is a label or a bound."""
    sentence = _SENTENCE.split(text[max(0, found.start() - 300) : found.start()])[-1]
    supposed = len(sentence) < 45 and _SUPPOSED.match(sentence)  # a longer one goes on to what follows
    if supposed or _NEGATED.search(sentence) or _LABEL.search(sentence):
        return False
    return _UNSAID_BEHIND.match(text, found.end()) is None


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last place of a pattern in a text."""
    last = None
    for match in pattern.finditer(text):
        last = match
    return last


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


def trim(answer: str) -> str:
    """Without surrounding markup and closing punctuation."""
    answer = answer.strip().strip("*`").strip().removeprefix("### ").strip()
    answer = answer[1:-1].strip() if len(answer) > 2 and answer[0] + answer[-1] in ('""', "“”") else answer
    while answer and answer[-1] in ".,;:。" and not answer.endswith("\\,"):
        answer = answer[:-1].rstrip("*` ")
    return answer
