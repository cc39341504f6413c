"""What the question says of the answer's form: how it is to be written, in which order, in percent, in which base."""

from __future__ import annotations

import re

from cabochon.verifiers.math_equal import same_words
from cabochon.verifiers.math_forms import NUMBER_WORD, time_of_day
from cabochon.verifiers.math_lex import BASE_NAMES, LENGTH_LIMIT, MathSyntaxError, clean
from cabochon.verifiers.math_units import split_unit

_CLOCK = re.compile(r"0?(\d{1,2}:[0-5]\d)")
_CAPITALS = re.compile(r"[A-Z]{3,}|[IVXLC]{2,}")
_WORD = re.compile(r"[a-z]{3,}")
_IN_DIGITS = re.compile(r"\d{1,4}(?:-\d{1,4}){1,2}|\d{1,2}/\d{1,2}/\d{2,4}")
"""A date, a score, a range of pages, a telephone number."""
_ARROW = re.compile(r"\\(?:vec|overrightarrow)\s?\{\s?([A-Z]{2})\s?\}")
_CONGRUENT = re.compile(r"(?:[a-z]\s?\\equiv\s?)?(-?\d{1,18})\s?\\pmod\s?\{([1-9]\d{0,17})\}")
_OF_NUMBER = r"\b{}\s?(?:\\left)?\(\s?(-?[\d./]+)\s?(?:\\right)?\)"


def as_written(gold: str, answer: str, prompt: str) -> tuple[bool, str] | None:
    """Times, dates, words, names in capitals and arrows are compared as they are written: 2:30 is no ratio here,
    2024-05-01 no difference, SAS no product. And `f(4) = 2` says nothing of an f(3) that the question speaks of.
    """
    ratio = re.search(r"ratio|scale|proportion|odds", prompt.casefold()) is not None
    if not ratio and (moment := time_of_day(gold)) is not None and (said := time_of_day(answer)) is not None:
        return moment == said, "compared as times"
    if not ratio and (time := _CLOCK.fullmatch(gold)):
        given = _CLOCK.fullmatch(answer)
        return given is not None and given.group(1) == time.group(1), "compared as times"
    if _IN_DIGITS.fullmatch(gold):
        one, two = (re.sub(r"\b0+(?=\d)", "", side.replace(" ", "")) for side in (gold, answer))
        return one == two, "compared as it is written"
    if _CAPITALS.fullmatch(name := gold.replace(" ", "")):
        return answer.replace(" ", "") == name or same_words(name, answer), "compared letter by letter"
    word = answer.strip().casefold()
    if _WORD.fullmatch(name) and _WORD.fullmatch(word):  # dog is no product
        return word == name or same_words(name, word), "compared letter by letter"
    if (given := _CONGRUENT.fullmatch(answer)) is not None:
        residue, modulus = int(given[1]), int(given[2])
        if (wanted := _CONGRUENT.fullmatch(gold)) is not None:
            same = modulus == int(wanted[2]) and (residue - int(wanted[1])) % modulus == 0
            return same, "compared as classes"
        if re.fullmatch(r"\d{1,18}", gold) and re.search(rf"(?<!\d){modulus}(?!\d)", prompt):
            return residue == int(gold), "compared as remainders"
    if (arrow := _ARROW.fullmatch(gold)) is not None and (other := _ARROW.fullmatch(answer)) is not None:
        return arrow[1] == other[1], "compared letter by letter"
    if (value := re.match(_OF_NUMBER.format("([A-Za-z])") + r"\s?=", answer)) is not None:
        asked = re.findall(_OF_NUMBER.format(value[1]), prompt)
        if asked and value[2] not in asked:
            return False, f"{value[1]} of another number than the question's"
    return None


def plain(text: str) -> str:
    """Without the commands that set words."""
    return re.sub(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)


_WORK = re.compile(r"(?<=[^\s({])\s*[-+*/^!_|(]|\\(?!pi(?![A-Za-z])|%|text|mathrm|infty|\$|[{}])[A-Za-z]+")
_QUANTITY = re.compile(r"\\?\$?(-?\d+(?:[.:/]\d+)*)")
_ASKS_FORM = re.compile(
    r"\b(?:round(?:ed|ing)?|nearest|convert(?:ed)?|express(?:ed)?|rewrite|simplif(?:y|ied)|reduced?"
    r"|scientific notation|as an? (?:(?:common|mixed|improper) )?(?:fraction|decimal|percent(?:age)?|ratio))\b",
    re.IGNORECASE,
)
"""The value is in the question: how it is written is the answer."""


def restates(gold: str, answer: str, prompt: str) -> bool:
    """Whether an answer is a piece of the question that asks for work, and not how the gold is written."""
    bare = [_unbound(side) for side in (gold, answer)]
    if bare[0] == bare[1] or not prompt:
        return False
    try:
        question = _unbound(clean(prompt[-LENGTH_LIMIT:]))
    except MathSyntaxError:
        return False
    if len(bare[1]) > 1 and _WORK.search(split_unit(answer).core) is not None and bare[1] in question:
        return True
    wanted, said = (_QUANTITY.match(re.sub(r"(\.\d*?)0+(?!\d)|,", r"\1", side).rstrip(".")) for side in bare)
    if said is None or (wanted is not None and wanted[1] == said[1]) or not _ASKS_FORM.search(prompt):
        return False
    zeros = "0*" if "." in said[1] else r"(?:\.0+)?"
    return re.search(rf"(?<![\d.]){re.escape(said[1])}{zeros}(?!\.?\d)", question.replace(",", "")) is not None


def _unbound(text: str) -> str:
    """Without spaces, brackets and the several ways to write a product or a fraction."""
    part = r"\s?(?:\{([^{}]{1,60})\}|(\w))"
    text = re.sub(r"\^\s?\{(\w{1,9})\}", r"^\1", text)
    text = re.sub(rf"\\frac{part}{part}", r"\1\2/\3\4", text)
    return re.sub(r"[\s{}()]", "", re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "*", text))


_ASKED = re.compile(
    r"(?i:\b(?:find|compute|determine|calculate|evaluate|what is|value of))\s(?:the (?:exact )?value of\s)?"
    r"(?:\$([^$]{1,80})\$|\\\((.{1,80}?)\\\)|(\|[^|\n]{1,40}\||[a-z]{1,3})(?=[\s.?,]))"
)


def value_of_asked(answer: str, prompt: str) -> str:
    """What the answer says of the quantity that the question asks for, `5` of `|z| = 5`; else the answer."""
    name, _, value = answer.partition("=")
    asked = {_unbound(next(filter(None, found.groups()))) for found in _ASKED.finditer(prompt[-LENGTH_LIMIT:])}
    return value.strip() if "=" not in value and value.strip() and _unbound(name) in asked else answer


_ASKS_EXACT = re.compile(
    r"\b(?:exact (?:value|answer|form|result|solution|sum|area|volume|length|distance|probability)|exactly\?)",
    re.IGNORECASE,
)


def asks_exact(prompt: str) -> bool:
    """Whether a decimal is not to be rounded."""
    return _ASKS_EXACT.search(prompt) is not None


_ASKS_ORDER = re.compile(
    r"\b(?:increasing|decreasing|ascending|descending|alphabetical|numerical|chronological) order\b|\brespectively\b"
    r"|\b(?:least|smallest|lowest|shortest|youngest|slowest|lightest) to (?:the )?\w{3,8}est\b"
    r"|\b(?:greatest|largest|biggest|highest|longest|oldest|fastest|heaviest) to (?:the )?(?:least|\w{3,8}est)\b"
    r"|\bfirst (?:two|three|four|five|six|\d) terms\b|\bin (?:that|this|the same) order\b",
    re.IGNORECASE,
)


def asks_order(prompt: str) -> bool:
    """Whether the values are to be named in an order."""
    return _ASKS_ORDER.search(prompt) is not None


_ASKS_PERCENT = re.compile(r"(?:^|[^\d.}\s\\])\s*(?:\\?%|percent)", re.IGNORECASE)
"""Percent without a number in front: "what percentage", "as a percent", not "a 20% discount"."""
_NUMBER_BEFORE = re.compile(rf"\b{NUMBER_WORD}$", re.IGNORECASE)


def asks_percent(prompt: str) -> bool:
    """Whether the answer is to be in percent."""
    return any(not _NUMBER_BEFORE.search(prompt, 0, found.start() + 1) for found in _ASKS_PERCENT.finditer(prompt))


def asks_base(base: int, prompt: str) -> bool:
    """Whether a question wants a number in a base: "in base 2", "to base $2$", "in binary"."""
    bases = re.findall(r"\b(?:in|to) (?:base[ -]\$?(\d+|[a-z]+)|(binary))", prompt.casefold())
    names = {BASE_NAMES.get(word, int(word) if word.isdigit() and len(word) < 3 else 0) for word, _ in bases if word}
    return names | {2 for _, binary in bases if binary} == {base}
