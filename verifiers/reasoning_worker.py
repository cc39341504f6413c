"""Answers to reasoning-gym puzzles, judged inside a killable worker that serves one item and dies.

The library's own scorers are not used as they are: the default pays for any answer that contains the right one,
`game_of_life_halting` and a coin flip can be won by any word, `puzzle24` takes numbers that were not given, and
several `eval` or `parse_expr` what the model wrote. So each puzzle is judged by one of five rules, and 1 is paid for
a full solution only:

* *exact*: the answer is the oracle's, white space at line ends and runs of blanks aside; or it differs from it in
  case, blanks and dress alone and the library's scorer gives it full marks. Sound for every puzzle; the default.
* *value*: the oracle is a number or a polynomial, compared as `math_judge` does, digit by digit where it is a numeral.
  What is still to be worked out (`5 - 9`, the question's own product) is no answer.
* *figures*: power_function, whose question asks for three figures of what the oracle has more of.
* *arithmetic*: countdown and puzzle24; our own exact evaluation, with just the given numbers, each once.
* *scorer*: puzzles with many right answers whose scorers simulate the solution and do not evaluate text. Only their
  full mark counts, and only for text made of the characters such an answer needs.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import Any

from cabochon.verifiers.math_extract import Extraction, extract, final_part
from cabochon.verifiers.text import nearest

VALUE = frozenset(
    ["chain_sum", "products", "basic_arithmetic", "decimal_arithmetic", "decimal_chain_sum", "gsm_symbolic",
     "leg_counting", "gcd", "lcm", "simple_equations", "count_primes", "dice", "number_sequence", "letter_counting",
     "largest_island", "rectangle_count", "complex_arithmetic", "simple_geometry", "polynomial_multiplication"]
)
ARITHMETIC = frozenset(["countdown", "puzzle24"])
SCORER = {
    "jugs": r"[\w\s\[\]\",>()-]*", "graph_color": r"[\d\s{}:,\"]*", "tower_of_hanoi": r"[\w\s.:,>-]*",
    "word_ladder": r"[A-Za-z,\s]*", "shortest_path": r"(?:up|down|left|right|infeasible|\s)*", "sokoban": r"[UDLR]*",
    "rush_hour": r"(?:[A-Z][+-]\d+\s*)*", "rubiks_cube": r"(?:[UDLRFBMESxyz][w]?['2]?\s*)*",
    "palindrome_generation": r"[A-Za-z]*", "knight_swap": r"[\w\s\[\]\",]*",
    "group_anagrams": r"[a-z\s\[\]\",]*", "palindrome_partitioning": r"[a-z\s\[\]\",]*",
}
"""Puzzle and the whole of what its answers are made of."""

ANSWER_LIMIT = 20_000
MOVES_LIMIT = 2_000


@lru_cache(maxsize=16)
def dataset(name: str, size: int, seed: int, config: tuple[tuple[str, Any], ...]) -> Any:
    """A reasoning-gym dataset; items depend on seed and index only. Raises ValueError for an unknown name or config."""
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **dict(config))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym dataset {name!r}: {error}") from error


_FENCE = re.compile(r"```[a-z]{0,10}[ \t]*\n(.*?)\n?```", re.DOTALL)


def answer_of(text: str) -> str:
    """What stands in the last `<answer>` of the final part, else its last box, else all of it; out of a code fence."""
    part = final_part(text, Extraction())
    tagged = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", part[-100_000:], re.DOTALL)
    if tagged:
        answer = str(tagged[-1]).strip()
    else:
        found = extract(part, Extraction(methods=("boxed",)))
        answer = (found.answer if found is not None else part).strip()
    fenced = _FENCE.fullmatch(answer)
    return fenced[1].strip() if fenced else answer


def bare(text: str) -> str:
    """Letters, digits and signs of an answer without case, blanks, dollars, degree signs and a final stop."""
    return re.sub(r"\s|\$|\^?\\circ|°", "", text.casefold()).removesuffix(".")


def same_text(oracle: str, answer: str) -> bool:
    """Line by line, with runs of blanks as one."""

    def lines(text: str) -> list[str]:
        return [" ".join(line.split()) for line in text.strip().splitlines()]

    return lines(oracle) == lines(answer)


def items(name: str, size: int, seed: int, config: list[list[Any]]) -> dict[str, Any]:
    """Question and answer of every item; made here because several datasets depend on Python's hash seed, which is
    fixed in a worker and random elsewhere. `unusable` says what is wrong with the name or the settings."""
    import reasoning_gym.factory

    if name not in reasoning_gym.factory.DATASETS:
        near = nearest(name, reasoning_gym.factory.DATASETS)
        return {"unusable": f"reasoning-gym has no dataset {name!r}; the nearest is {near!r}"}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            source = dataset(name, size, seed, tuple((key, _frozen(value)) for key, value in config))
        except ValueError as error:
            return {"unusable": str(error)}
        entries = [source[index] for index in range(size)]
    return {"items": [[str(e["question"]), None if e["answer"] is None else str(e["answer"])] for e in entries]}


def judge(
    text: str, prompt: str, name: str, size: int, seed: int, config: list[list[Any]], index: int
) -> dict[str, Any]:
    """The verdict on a completion for item `index` of a dataset.

    Raises RuntimeError where the item made again is not the one that was asked (another version of the library).
    """
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = dataset(name, size, seed, tuple((key, _frozen(value)) for key, value in config))
        entry = source[index]
        if not prompt.startswith(str(entry["question"])):
            raise RuntimeError(f"item {index} of {name} is not what was asked: is reasoning-gym another version?")
        oracle = None if entry["answer"] is None else str(entry["answer"])
        if (verdict := at_once(text, name, oracle)) is not None:
            return verdict
        answer = answer_of(text)
        right, detail = _by_rule(name, source, entry, oracle, answer)
    return _verdict("ok" if right else "wrong", detail, _evidence(name, answer, oracle))


def at_once(text: str, name: str, oracle: str | None) -> dict[str, Any] | None:
    """The verdict where comparing texts, or two whole numbers, is enough; None where a rule has to look further.

    In time linear in the text, so it may run outside a worker.
    """
    answer = answer_of(text)
    evidence = _evidence(name, answer, oracle)
    if not answer:
        return _verdict("no_answer", "no answer", evidence)
    if len(answer) > ANSWER_LIMIT:
        return _verdict("malformed", f"the answer is {len(answer)} characters long", evidence)
    if oracle is None:
        return None
    if same_text(oracle, answer):
        return _verdict("ok", "the oracle's answer", evidence)
    whole = all(re.fullmatch(r"-?[0-9]{1,15}", x.strip()) for x in (oracle, answer))
    rule = rule_of(name)
    letters = rule == "exact" and bare(oracle) != bare(answer)
    if letters or (rule == "value" and whole and int(oracle) != int(answer)):
        return _verdict("wrong", "not the oracle's answer", evidence)
    return None


def _evidence(name: str, answer: str, oracle: str | None) -> dict[str, Any]:
    return {"answer": answer[:500], "gold": (oracle or "")[:500], "rule": rule_of(name)}


def rule_of(name: str) -> str:
    """Which of the five rules judges a puzzle."""
    if name in ARITHMETIC:
        return "arithmetic"
    if name == "power_function":
        return "figures"
    return "value" if name in VALUE else "scorer" if name in SCORER else "exact"


def _by_rule(name: str, source: Any, entry: dict[str, Any], oracle: str | None, answer: str) -> tuple[bool, str]:
    match rule_of(name):
        case "value":
            from cabochon.verifiers.math_judge import matches, read

            unit = read(answer).split.unit
            if oracle is None or (unit is not None and unit.dimension[0][0].startswith("word:")):
                return False, "words after the number"
            if not worked_out(oracle, read(answer.rpartition("=")[2]).split.core):
                return False, "not as far worked out as the oracle, or with other digits"
            return matches(oracle, answer, prompt=str(entry["question"]))
        case "figures":
            figures = [re.fullmatch(_FIGURES, side.replace(" ", "")) for side in (oracle or "", answer)]
            values = [float(f"{found[1]}e{found[2] or 0}") for found in figures if found is not None]
            same = len(values) == 2 and f"{values[0]:.2e}" == f"{values[1]:.2e}"
            return same, "the same three figures" if same else "not the oracle's three figures"
        case "arithmetic":
            target = 24 if name == "puzzle24" else entry["metadata"]["target"]
            return arithmetic(answer, entry["metadata"]["numbers"], target)
        case "scorer":
            if re.fullmatch(SCORER[name], answer.strip()) is None:
                return False, "has characters that no answer to this puzzle has"
            if len(answer) > max(MOVES_LIMIT, 4 * len(oracle or "")):
                return False, "more moves than a solution has"  # some scorers pass over those that cannot be made
            right = float(source.score_answer(answer.strip(), entry)) == 1.0
            return right, "a full solution" if right else "not a full solution"
    full = oracle is not None and bare(oracle) == bare(answer) and float(source.score_answer(answer, entry)) == 1.0
    return full, "the oracle's answer in other dress" if full else "not the oracle's answer"


_NUMERAL = re.compile(r"-?\d+(?:\.\d+)?")
_FRACTION = re.compile(r"(?:\\[dt]?frac\{(-?\d+)\}\{(\d+)\}|(-?\d+)/(\d+))")
_FIGURES = (
    r"([-+]?\d{1,400}(?:\.\d{1,400})?)"
    r"(?:(?:e|E|(?:\*|\\times|\\cdot|×)10(?:\^|\*\*))\{?\(?([-+]?\d{1,3})\)?\}?)?"
)
_UNMULTIPLIED = re.compile(r"\d(?:\*(?!\*)|\\cdot|\\times)\d")
_OPERATOR = re.compile(r"\*\*|[-+*/^]|\\(?:cdot|times|div|d?frac)(?![A-Za-z])")
_BRACKET = re.compile(r"(?<![\^_])[(\[]|(?<![\^_}A-Za-z])\{")


def worked_out(oracle: str, answer: str) -> bool:
    """Whether an answer is as far worked out as the oracle: a numeral of the same value where that is one, the same
    fraction where that is one, else a sum of no more terms, without brackets or products of sums."""
    answer = answer.replace(" ", "").removeprefix("+")
    if answer.startswith("(") and answer.find(")") == len(answer) - 1:
        answer = answer[1:-1]
    if _NUMERAL.fullmatch(oracle):
        answer = re.sub(r"^(-?)\.", r"\g<1>0.", answer)
        answer = re.sub(r",(?=\d{3}(?!\d))", "", answer).removesuffix("^\\circ")
        return _NUMERAL.fullmatch(answer) is not None and Fraction(answer) == Fraction(oracle)
    if (wanted := _FRACTION.fullmatch(oracle.replace(" ", ""))) is not None:
        given = _FRACTION.fullmatch(answer)
        return given is not None and [part for part in given.groups() if part] == [p for p in wanted.groups() if p]
    if (_BRACKET.search(answer) or _UNMULTIPLIED.search(answer)) and not _BRACKET.search(oracle):
        return False
    operators = [Counter(_OPERATOR.findall(side.replace(" ", "").lstrip("-"))) for side in (oracle, answer)]
    terms = [count["+"] + count["-"] for count in operators]
    return terms[1] <= terms[0] and operators[1].total() <= operators[0].total()


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _verdict(status: str, detail: str, evidence: dict[str, Any]) -> dict[str, Any]:
    return {"score": float(status == "ok"), "status": status, "detail": detail[:300], "evidence": evidence}


def arithmetic(text: str, numbers: list[int], target: int | float) -> tuple[bool, str]:
    """Whether `text` is +, -, *, / over exactly `numbers` with the value `target`; exact fractions, no `eval`."""
    text = text.strip().removesuffix(".").strip("$")
    for sign, plain in _WRITTEN:
        text = text.replace(sign, plain)
    text, equals, stated = text.partition("=")
    if equals and text.strip() == str(target):
        text, stated = stated, text
    if equals and stated.strip() != str(target):
        return False, f"says {stated.strip()[:40]!r} of it"
    tokens = re.findall(r"[0-9]+|[-+*/()]|\S", text)
    if len(tokens) > 400:
        return False, "too long an expression"
    used = [int(token) for token in tokens if _DIGITS.fullmatch(token)]
    if Counter(used) != Counter(int(number) for number in numbers):
        return False, f"uses {sorted(used)}, not the numbers given"
    try:
        value, end = _sum(tokens, 0, 0)
    except (IndexError, ValueError, ZeroDivisionError):
        return False, "not an arithmetic expression"
    if end != len(tokens):
        return False, "not an arithmetic expression"
    return value == Fraction(target), f"the value is {value}"


_DIGITS = re.compile(r"[0-9]{1,400}")
_WRITTEN = (
    ("\u00d7", "*"), ("\u00b7", "*"), ("\\times", "*"), ("\\cdot", "*"), ("\u00f7", "/"), ("\\div", "/"),
    ("\u2212", "-"), ("[", "("), ("]", ")"),
)


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        sign = tokens[at]
        more, at = _product(tokens, at + 1, depth)
        value = value + more if sign == "+" else value - more
    return value, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _atom(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        sign = tokens[at]
        more, at = _atom(tokens, at + 1, depth)
        value = value * more if sign == "*" else value / more
    return value, at


def _atom(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if depth > 50:
        raise ValueError("nested too deeply")
    if tokens[at] == "-":
        value, at = _atom(tokens, at + 1, depth + 1)
        return -value, at
    if tokens[at] == "(":
        value, at = _sum(tokens, at + 1, depth + 1)
        if tokens[at] != ")":
            raise ValueError("a bracket is not closed")
        return value, at + 1
    if not _DIGITS.fullmatch(tokens[at]):
        raise ValueError(tokens[at])
    return Fraction(int(tokens[at])), at + 1
