"""The judge of one mathematical answer, as it runs inside a killable worker: plain data in, plain data out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sympy import Rational, pi

from cabochon.verifiers.math_asked import (
    as_written,
    asks_base,
    asks_exact,
    asks_order,
    asks_percent,
    plain,
    restates,
    value_of_asked,
)
from cabochon.verifiers.math_boxes import last_box
from cabochon.verifiers.math_equal import contradicts, equal, in_order, same_words
from cabochon.verifiers.math_extract import Extraction, extract
from cabochon.verifiers.math_forms import spelled
from cabochon.verifiers.math_lex import MathSyntaxError, clean
from cabochon.verifiers.math_parse import parse
from cabochon.verifiers.math_units import (
    Split,
    asked_unit,
    compound,
    conversion,
    foreign,
    not_asked,
    parse_unit,
    split_unit,
)
from cabochon.verifiers.math_values import DEGREE, Based, Chain, Items, Leaf, Value, Words


class UnusableGold(ValueError):
    """The task's own answer does not equal itself."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One answer, read: its text cleaned, its unit apart, its value (None where only the text can be compared)."""

    text: str
    split: Split
    value: Value | None
    problem: str = ""


_SPACED = re.compile(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d.,]|\s*\d)")
_UNGROUPED = re.compile(r"\d,(?:\d{1,2}|\d{4,})(?!\d)")
_GROUPED_INSIDE = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
_GROUPED = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+)((?:\.\d+)?)")


def read(answer: str) -> Reading:
    """Clean, take the unit off, parse. Never raises; what cannot be parsed keeps its text."""
    try:
        text = clean(answer)
    except MathSyntaxError as error:
        return Reading(text="", split=Split(""), value=None, problem=str(error))
    if "\x00" in text:
        return Reading(text=text, split=Split(text), value=None, problem="a NUL byte")
    split = compound(text) or split_unit(text)
    core = _SPACED.sub(lambda found: found.group().replace(" ", ""), spelled(split.core))
    if _GROUPED.fullmatch(core):
        core = core.replace(",", "")
    elif not _UNGROUPED.search(core) and not core.startswith(("(", "[", r"\{")):
        core = _GROUPED_INSIDE.sub(lambda found: found.group().replace(",", ""), core)
    try:
        value = parse(core)
    except MathSyntaxError as error:
        if split.unit is None and not split.percent and split.scale == 1:
            return Reading(text=text, split=split, value=None, problem=str(error))
        return _whole(text, split)
    if split.percent and not isinstance(value, Leaf):
        return _whole(text, split)  # the percent sign belongs to a part of it: x = 4%
    if isinstance(value, Leaf) and split.scale != 1:
        value = Leaf(value.expr * split.scale, None if value.ulp is None else value.ulp * split.scale, value.digits)
    return Reading(text=text, split=split, value=value)


def _whole(text: str, split: Split) -> Reading:
    """The answer read with what looked like its unit."""
    try:
        return Reading(text=text, split=Split(text), value=parse(text))
    except MathSyntaxError as error:
        return Reading(text=text, split=split, value=None, problem=str(error))


_CHOICE = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*(?:[Oo]ption\s+|[Cc]hoice\s+)?"
    r"(\(?)\s*([A-Ja-j])\s*(\)?)\s*\}?([.:)]?)(\s*)(.*)",
    re.DOTALL,
)
_UNDECIDED = re.compile(
    r"\b(?:or|and|not|wrong|incorrect|(?:reject|discard|exclud|eliminat)ed|ruled out|impossible|cannot|(?:can|is)n?'t"
    r"|reject|vs|maybe|then|except|fail(?:s|ed)?|never|contradict\w*|invalid|too|Not|(?:does|do|did|wo)n'?t)\b|\b(?:no|false)\W*$|[,/&]\s*\(?[A-J]\b|\([A-Ja-j]\)|\b[A-J][.:)]|;\s*[a-j]\)"
    r"|(?<![A-Za-z\\])(?:[B-HJ](?![A-Za-z])|A is\b)"
)
"""What follows a chosen option names another one, or takes the choice back."""
_LETTERS = re.compile(r"\W*(?:[A-Ja-j](?:\W+|\Z))+")
"""Nothing but options."""


_OPTION_AND_TEXT = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf)\s?\{\(([A-E])\)\s?\}(?:\\[ ,;:!]|\\q?quad(?![A-Za-z])|[\s~])*(\S.*)", re.DOTALL
)
"""A gold of AMC's: `\\textbf{(C)}\\ 14`."""
_BEHIND_LETTER = re.compile(r"(?:\\[ ,;:!]|\\q?quad(?![A-Za-z])|[\s~}).:])+")
_NUMERAL = re.compile(r"\$?-?\d[\d.,/]*\$?")


def _choice(text: str) -> tuple[str, str, bool] | None:
    """Letter of an option, what follows it, and whether that is set apart from the letter; None where there is none."""
    text = re.sub(r"^\(\\(?:text|textbf|mathrm|mathbf)\s?\{([A-J])\}\)", r"(\1)", text.strip().strip("$*").strip())
    match = _CHOICE.fullmatch(text)
    if match is None:
        return None
    opening, letter, closing, delimiter, spaced, rest = match.groups()
    if letter.islower() and not (opening and closing):
        return None
    text = _BEHIND_LETTER.sub("", rest, count=1) if _BEHIND_LETTER.match(rest) else rest
    surplus = text.count("}") > text.count("{")
    apart = bool(closing or delimiter) and not (delimiter == "." and not spaced)
    return letter, (text.rstrip().removesuffix("}") if surplus else text).strip(), apart


def chosen(text: str, *, alone: bool = False) -> str | None:
    """The letter of a multiple-choice answer: `B`, `(B)`, `\\text{(B)}`, `B) 42`. None where there is none or several.

    `alone`: nothing may follow the letter.
    """
    if (choice := _choice(text)) is None:
        return None
    letter, rest, apart = choice
    if rest and (alone or not apart or _UNDECIDED.search(rest)):
        return None
    if _LETTERS.fullmatch(rest) and set(re.findall("[a-j]", rest.casefold())) - {letter.casefold()}:
        return None  # (B), C
    return letter.upper()


def _option_with_text(letter: str, text: str, answer: str, prompt: str) -> tuple[bool, str]:
    """An answer against a gold such as `\\textbf{(C)}\\ 14`: by its letter, its text, or both."""
    given, behind = chosen(answer), _choice(answer)
    if given is None or behind is None:
        return matches(text, answer, prompt=prompt)
    if behind[1] and not matches(text, behind[1], prompt=prompt)[0]:
        return False, f"option {given}, with another text"
    return given == letter, f"option {given}"


def matches(gold: str, answer: str, *, prompt: str = "", choices: Sequence[str] = ()) -> tuple[bool, str]:
    """Whether `answer` is `gold`, and why (not). `choices` are the texts of options A, B, ..."""
    letter = chosen(gold, alone=True)
    if letter is not None and ((letter != "E" and letter != "I") or choices):
        given = chosen(answer)
        place = ord(letter) - ord("A")
        if given is None and re.fullmatch("[a-j]", answer) and choices and answer not in choices:
            given = answer.upper()
        if given is not None:
            said = (_choice(answer) or ("", "", False))[1]
            others = [text for other, text in enumerate(choices) if other != place and said and same_text(text, said)]
            if _NUMERAL.fullmatch(said) and place < len(choices) and not matches(choices[place], said)[0]:
                others.append(said)
            return given == letter and not others, f"option {given}" + (", with the text of another" if others else "")
        if place < len(choices):
            return matches(choices[place], answer, prompt=prompt)
        return False, "not an option"
    if letter is not None and (given := chosen(answer)) is not None and re.search(rf"\({given}\)", answer):
        return given == letter, f"option {given}"  # E and I, which are also numbers
    if choices and (given := chosen(answer, alone=True)) is not None and ord(given) - ord("A") < len(choices):
        answer = choices[ord(given) - ord("A")]
    if (both := _OPTION_AND_TEXT.fullmatch(gold)) is not None:
        return _option_with_text(both[1], both[2], answer, prompt)
    left, right = _read_gold(gold), read(answer)
    if same_text(left.text, right.text) and (left.value is None or not contradicts(left.value)):
        return True, "the same text"
    if (apart := as_written(plain(left.text), plain(right.text), prompt)) is not None:
        return apart
    if restates(left.text, right.text, prompt):
        return False, "the question's own expression, not worked out"
    if left.value is None or right.value is None:
        if left.value is None or isinstance(left.value, Words):
            words = re.search(r"[^\w\s.,:'-]", plain(left.text)) is None
            return words and same_words(plain(left.text), plain(right.text)), "compared as words"
        return False, f"the answer cannot be read: {right.problem}"
    if not isinstance(left.value, Chain) and (said := value_of_asked(right.text, prompt)) != right.text:
        right = read(said)
    if right.value is None:
        return False, f"the answer cannot be read: {right.problem}"
    right_one, why = _same_quantities(left, right, prompt)
    if right_one and asks_order(prompt) and not in_order(left.value, right.value):
        return False, "in another order"
    if not right_one and isinstance(left.value, Items) and _GROUPED.fullmatch(right.split.core):
        pieces = _whole(right.split.core, right.split)  # 100,200 where the gold is a list
        return _same_quantities(left, pieces, prompt) if pieces.value is not None else (False, why)
    return right_one, why


def same_text(one: str, two: str) -> bool:
    """The same but for spaces that no reading depends on; of nothing, False."""
    return bool(one) and _tight(one) == _tight(two)


def _tight(text: str) -> str:
    """Without the spaces that no reading depends on."""
    text = re.sub(r"\\(?:[lc]?dots|dotsc)(?![A-Za-z])|…", "...", " ".join(text.split()))
    return re.sub(r"\s+(?=\\[A-Za-z])|\s*([^\w\s\\])\s*|(?<=\\)([A-Za-z]+)\s+(?![A-Za-z])", r"\1\2", text)


_CENTS = re.compile(r"\bcents?\b|¢")


def _same_quantities(gold: Reading, answer: Reading, prompt: str) -> tuple[bool, str]:
    assert gold.value is not None
    assert answer.value is not None
    factor = conversion(gold.split.unit, answer.split.unit)
    asked = asked_unit(prompt)
    habit = answer.split.unit == parse_unit("dollar") and asked != parse_unit("cents")  # a $ is a mere habit
    if gold.split.unit is None and answer.split.unit is not None and not habit:
        cents = answer.split.unit == parse_unit("cents") and _CENTS.search(prompt) is None
        radians = asked == parse_unit("degrees") and _in_radians(answer)
        degrees = answer.split.unit == parse_unit("degrees") and "in radians" in prompt
        other = foreign(prompt, answer.split.unit) if asked is None else not_asked(asked, answer.split.unit)
        if cents or radians or degrees or other:
            return False, "not the unit asked for"  # 5 cents where the question speaks of dollars
    if factor is None or (_in_degrees(gold) and not _angle(answer)) or (_in_degrees(answer) and not _angle(gold)):
        return False, "a different unit"
    ask_percent = asks_percent(prompt)
    if "base" in prompt.casefold() and isinstance(gold.value, Based) and answer.text == gold.value.digits:
        return True, "the same digits, base understood"
    if isinstance(answer.value, Based) and gold.text == answer.value.digits and asks_base(answer.value.base, prompt):
        return True, "the same digits, in the base asked for"
    one, two = gold.value, answer.value
    if isinstance(one, Leaf) and one.ulp is not None and asks_exact(prompt):
        one = Leaf(one.expr, None, one.digits)
    if gold.split.percent != answer.split.percent and not ask_percent:
        one, two = (_percent(value, side.split.percent) for value, side in ((one, gold), (two, answer)))
    elif gold.split.percent != answer.split.percent:
        part = re.search(r"frac|/", gold.text) is not None
        decimal = re.search(r"\b(?:decimal|fraction)\b", prompt) is not None and not gold.split.percent
        if not part and not decimal and equal(one, two):
            return True, "the same number of percent"
        number = isinstance(one, Leaf) and one.expr.is_Rational and not part and not decimal
        if not gold.split.percent and number:
            return False, "a different number of percent"  # 5000% is 50, but 50 was to be percent
        one, two = (_percent(value, side.split.percent) for value, side in ((one, gold), (two, answer)))
    if _in_degrees(gold) != _in_degrees(answer) and (_in_radians(gold) or _in_radians(answer)):
        one, two = (  # radians were said, so the other side's degree is no mere unit: 90 radians are not 90 degrees
            Leaf(side.expr.subs(DEGREE, pi / 180), side.ulp, side.digits) if isinstance(side, Leaf) else side
            for side in (one, two)
        )
    if factor != 1:
        if not isinstance(two, Leaf):
            return False, "a different unit"
        two = Leaf(two.expr * Rational(factor.numerator, factor.denominator))
    right = equal(one, two)
    return right, "the same value" if right else "a different value"


def _in_degrees(reading: Reading) -> bool:
    return isinstance(reading.value, Leaf) and reading.value.expr.has(DEGREE)


def _angle(reading: Reading) -> bool:
    """Whether a quantity may be an angle: no unit, or one of angle."""
    unit = reading.split.unit
    return unit is None or unit.dimension[:1] == (("angle", 1),) or _in_radians(reading)


def _in_radians(reading: Reading) -> bool:
    return reading.split.unit is not None and reading.split.unit.dimension[:1] == (("word:radian", 1),)


def _percent(value: Value, percent: bool) -> Value:
    if percent and isinstance(value, Leaf):
        return Leaf(value.expr / 100, None if value.ulp is None else value.ulp / 100, value.digits)
    return value


@lru_cache(maxsize=4096)
def _read_gold(gold: str) -> Reading:
    return read(gold)


def gold_answer(gold: str) -> str:
    """The gold itself, out of a box or from behind `####` where the data keeps it there."""
    box = last_box(gold)
    if box is not None and box.answer:
        return box.answer
    if "####" in gold:
        return gold.rpartition("####")[2].strip()
    return gold.strip()


@lru_cache(maxsize=4096)
def check_gold(gold: str) -> str:
    """Empty if the gold equals itself, else what is wrong with it."""
    if not gold.strip():
        return "the gold answer is empty"
    return "" if matches(gold, gold)[0] else f"the gold answer {gold[:80]!r} cannot be compared with itself"


_PLAIN = re.compile(r"[-+]?(?:\\?\$\s?)?(\d{1,15}|\d{1,3}(?:,\d{3}){1,4})")


def _plain_integer(text: str) -> int | None:
    """A whole number as GSM8K writes it; the quick path for nearly all of its answers."""
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    return int(match.group(1).replace(",", "")) * (-1 if text[0] == "-" else 1)


def judge(
    text: str, golds: list[str], prompt: str, choices: list[str], rules: dict[str, Any]
) -> dict[str, Any]:
    """The verdict on a completion as plain data: score, status, detail, evidence.

    Whatever fails while an answer is read or compared, after the gold has been found equal to itself, is the answer's
    doing and makes it `malformed`; a MemoryError is left to the worker.
    """
    golds = [gold_answer(gold) for gold in golds]
    found = extract(text, Extraction(**(rules | {"methods": tuple(rules["methods"])})))
    evidence: dict[str, Any] = {"gold": golds[0] if len(golds) == 1 else golds}
    if found is None:
        return _verdict("no_answer", "no answer found", evidence)
    evidence |= {"answer": found.answer[:500], "method": found.method}
    if found.problem:
        return _verdict("malformed", found.problem, evidence)
    if not found.answer:
        return _verdict("no_answer", f"an empty answer ({found.method})", evidence)
    number = None if "$" in found.answer and _CENTS.search(prompt) else _plain_integer(found.answer)
    for gold in golds:
        wanted = _plain_integer(gold)
        if wanted is not None and wanted == number:
            return _verdict("ok", "the same whole number", evidence)
        problem = "" if wanted is not None else check_gold(gold)
        if problem:
            return {"unusable": problem}
    detail = "a different whole number"
    for gold in golds:
        if number is not None and _plain_integer(gold) is not None:
            continue
        try:
            right, detail = matches(gold, found.answer, prompt=prompt, choices=choices)
        except MemoryError:
            raise
        except Exception as error:  # the gold compares with itself, so this is what the model wrote
            return _verdict("malformed", f"cannot be compared: {type(error).__name__}", evidence)
        if right:
            return _verdict("ok", detail, evidence)
    if detail.startswith("the answer cannot be read"):
        return _verdict("malformed", detail, evidence)
    return _verdict("wrong", detail, evidence | _number(found.answer))


def _number(answer: str) -> dict[str, str]:
    """`value` of an answer that is a rational number and nothing else: wrong answers are the same one by it (maj@k)."""
    try:
        reading = read(answer)
        bare, value = reading.split == Split(reading.split.core), reading.value
        return {"value": str(value.expr)[:80]} if bare and isinstance(value, Leaf) and value.expr.is_Rational else {}
    except MemoryError:
        raise
    except Exception:  # too many digits, say: then it goes by what was written
        return {}


def _verdict(status: str, detail: str, evidence: dict[str, Any]) -> dict[str, Any]:
    return {"score": 1.0 if status == "ok" else 0.0, "status": status, "detail": detail[:300], "evidence": evidence}


def warm() -> None:
    """Judge a few answers before the workers are forked: sympy's first evaluation of each kind takes 0.1 s."""
    for gold, answer in (
        ("x^2+2x+1", "(x+1)^2"), (r"\sin 2x", r"2\sin x\cos x"), ("y=2x+1", "2y=4x+2"), ("(1,3)", "1<x<3"),
        (r"\sqrt{8}", "5"), (r"\ln 8", r"3\ln 2"), ("3.14", r"\pi"), ("5 cm", "50 mm"), (r"\frac{x}{2}", "x^2"),
        ("e^{2x}", r"\tan x"),
    ):
        matches(gold, answer)
