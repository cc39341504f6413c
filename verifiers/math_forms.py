r"""Rarer ways to write an answer, turned into the usual ones before it is read. Standard library only.

`]1, 2]` for `(1, 2]`, `(101)_2` for `101_{2}`, `0.1666...` for `\frac{1}{6}`. Each rule knows the whole of what it
rewrites and leaves the rest alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_TEXT = r"\\(?:text|mathrm|textrm|mbox)"
_UNIT = rf"\s?\{{\s?{_TEXT}\s?\{{([A-Za-z ]{{1,20}})\}}\s?\}}"


def usual(text: str) -> str:
    """Cleaned text with the rarer forms replaced."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def _periodic(match: re.Match[str]) -> str:
    """`1.333...` with its period overlined; as it was where no period is plain: at least three times, no 0s or 9s."""
    whole, places = match.groups()
    for length in range(1, 7):
        for start in range(min(len(places) - 3 * length, 6) + 1):
            period, rest = places[start : start + length], places[start:]
            if not period.strip(period[0]) and (length > 1 or period in "09"):
                continue
            if rest == (period * len(rest))[: len(rest)] and len(rest) % length == 0:
                return rf"{whole}.{places[:start]}\overline{{{period}}}"
    return match.group()


def _plain_cases(match: re.Match[str]) -> str:
    """`x, & \\text{if } x > 0` as `x & x > 0`."""
    return re.sub(rf",?\s?&\s?(?:{_TEXT}\s?\{{\s?(?:if|for|when)\s?\}}|(?:if|for|when)\b)?,?", " & ", match.group())


_RULES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\\(?:nicefrac|sfrac)(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\left\s?<"), r"\\langle "),
    (re.compile(r"\\right\s?>"), r"\\rangle "),
    (re.compile(r"(\\\\)\s?\[\d{1,3}(?:\.\d{1,3})?\s?(?:pt|ex|em|mm|cm)\]"), r"\1 "),
    (re.compile(r"(?<!\d)(\d{1,20})\.(\d{3,40})\s?(?:\.\.\.|…|\\[lc]?dots(?![A-Za-z]))"), _periodic),
    (re.compile(r"(\\mathbb\s?\{?\s?R\s?\}?|\\R(?![A-Za-z])|ℝ)\s?[-\\]\s?(?=\\\{)"), r"\1 \\setminus "),
    (re.compile(r"^(?:=|\\(?:Rightarrow|implies|therefore)(?![A-Za-z])|[⇒∴]|\\to(?![A-Za-z]))\s?"), ""),
    (re.compile(
        rf"^{_TEXT}\s?\{{\s?(?:(?:[Ff]inal )?[Aa]ns(?:wer)?|[Tt]otal|[Rr]esult)\s?[:=]?\s?\}}\s?(?=[-\\$\d])"
    ), ""),
    (re.compile(r"\\sqrt\s?(\d{2,20})(?![\d.])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<=\d)\s?[xX]\s?(?=10\s?\^)"), r" \\times "),
    (re.compile(r"(?<![\d.])(\d{1,20})\.(\d{0,20})\((\d{1,20})\)$"), r"\1.\2\\overline{\3}"),
    (re.compile(r"^(-?\d[\d,.]{0,30})\s?\\?\$$"), r"\\$\1"),
    (re.compile(rf"^(-?)(?:{_TEXT}\s?\{{)?\s?(?:positive )?(?:plus )?infinity\s?\}}?$", re.IGNORECASE), r"\1\\infty"),
    (re.compile(rf"^(?:{_TEXT}\s?\{{)?\s?(?:negative|minus) infinity\s?\}}?$", re.IGNORECASE), r"-\\infty"),
    (re.compile(rf"^(\d{{1,9}})\s?(?:{_TEXT}\s?\{{\s?to\s?\}}|\bto\b)\s?(\d{{1,9}})$"), r"\1:\2"),
    # bases
    (re.compile(r"\(((?=[A-F]{0,40}\d)[0-9A-F]{1,40})\)_(\d(?!\d)|\{\d{1,2}\})"), r"\1_\2"),
    (re.compile(rf"(?<=\w)\s?{_TEXT}\s?\{{\s?\(?\s?((?:in )?base[ -]\w{{1,9}})\s?\)?\s?\}}$"), r" \1"),
    (re.compile(rf"(?<=\w)\s?{_TEXT}\s?\{{\s?((?:in )?base)\s?\}}\s?(\d{{1,2}})$"), r" \1 \2"),
    (re.compile(r"(?<=\d)_\s?\{\s?(two|three|four|five|six|seven|eight|nine|twelve|sixteen)\s?\}$"),
     r"_{\\text{\1}}"),
    (re.compile(r"(?<![\w.])(\d{1,20}[a-f]{1,20}\d[0-9a-f]{0,20})(_\{?16(?!\d))"),
     lambda found: found.group(1).upper() + found.group(2)),
    # units
    (re.compile(r"(?<=\d)\s?(?:¢|\\textcent|\\cent)$"), " cents"),
    (re.compile(rf"({_TEXT})\s?\{{([^{{}}]{{1,40}})\^\{{(\d)\}}\s?\}}"), r"\1{\2}^{\3}"),
    (re.compile(rf"\\[dt]?frac{_UNIT}{_UNIT}$"), r"\\text{ \1 per \2}"),
    # `f(x) = x \text{ for all } x`: an identity holds for all of its variable as it stands
    (re.compile(
        rf"^([^=]{{1,40}}=[^=]{{1,200}}?(?<=[\w)}}]))[,\s]{{0,3}}(?:{_TEXT}\s?\{{\s?)?"
        r"(?:for (?:all|every|any)|\\forall)(?:\sreal|\sinteger)?s?(?:\snumbers?)?\s?\}?\s?\$?\s?[a-z]"
        r"(?:\s?\\in\s?(?:\\mathbb\s?\{?\s?)?\\?[RZNQ]\s?\}?)?\s?\$?$"
    ), r"\1"),
    (re.compile(r"\\begin\s?\{cases\}.*?\\end\s?\{cases\}", re.DOTALL), _plain_cases),
)

_DIGIT = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEEN = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORTH = {word: place for place, word in enumerate(_DIGIT + _TEEN, start=1)}
_WORTH |= {word: 10 * place for place, word in enumerate(_TENS, start=2)}
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?: (?:{'|'.join(_DIGIT)}))?|{'|'.join(_TEEN + _DIGIT)})"
_BELOW_1000 = rf"(?:(?:{'|'.join(_DIGIT)}) hundred(?: (?:and )?{_BELOW_100})?|{_BELOW_100})"
_SPELLED = re.compile(
    rf"zero|(?=\w)(?:({_BELOW_1000}) million)?(?:(?:^| )({_BELOW_1000}) thousand)?(?:(?:^| (?:and )?)({_BELOW_1000}))?"
)
NUMBER_WORD = rf"(?:zero|(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_DIGIT)}))?|{'|'.join(_TEEN + _DIGIT)})"
"""A number below a hundred in words."""
_AS_WORDS = re.compile(rf"(?:{_TEXT}\s?\{{)?\s?([A-Za-z][A-Za-z -]{{2,99}}?)\s?\}}?")


def spelled(text: str) -> str:
    """`twenty-one` as `21` where nothing else is said, and a number is said as it is in English: not `one two`."""
    words = _AS_WORDS.fullmatch(text)
    said = _SPELLED.fullmatch(" ".join(words.group(1).casefold().replace("-", " ").split())) if words else None
    if said is None:
        return text
    total = 0
    for part, scale in zip(said.groups(), (10**6, 1000, 1), strict=True):
        value = 0
        for word in (part or "").split():
            value = value * 100 if word == "hundred" else value + _WORTH.get(word, 0)
        total += value * scale
    return str(total)


_TIME = re.compile(r"(0?[1-9]|1[0-2])(?::([0-5]\d))? ?([ap])\.? ?m\.?|(1[3-9]|2[0-3]):([0-5]\d)", re.IGNORECASE)


def time_of_day(text: str) -> tuple[int, int] | None:
    """Hour and minute of `2:30 \\text{ PM}`, `10 a.m.` and `14:30`; None where the half of the day is left open."""
    bare = " ".join(re.sub(rf"{_TEXT}\s?\{{([^{{}}]{{0,20}})\}}", r"\1", text.replace("{:}", ":")).split())
    if (said := _TIME.fullmatch(bare)) is None:
        return None
    hour, minute, half, late, past = said.groups()
    if late:
        return int(late), int(past)
    return int(hour) % 12 + (12 if half in "pP" else 0), int(minute or 0)


_FRENCH = re.compile(r"([\[\]])([^][(),;]{1,80})[,;]([^][(),;]{1,80})([\[\]])")


def turned_brackets(text: str) -> str:
    """`]1, 2]` as `(1, 2]`, and unions of such, where the answer is nothing else."""
    if "[" not in text and "]" not in text:
        return text
    label, mark, said = text.rpartition(r"\in ")
    parts = [_FRENCH.fullmatch(part.strip()) for part in said.split(r"\cup")]
    if any(part is None for part in parts):
        return text
    ends = [part.groups() for part in parts if part]
    if all(first == "[" and last == "]" for first, _, _, last in ends):
        return text
    turned = (
        f"{'[' if first == '[' else '('}{low},{high}{']' if last == ']' else ')'}" for first, low, high, last in ends
    )
    return label + mark + r" \cup ".join(turned)
