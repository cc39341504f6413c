"""IFEval's 25 constraint kinds, as predicates over a response.

Semantics follow the reference (google-research `instruction_following_eval/instructions.py`, Zhou et al. 2311.07911),
with these differences, each so that a policy is not paid for nothing: keywords are literal text, not regular
expressions; a text whose language cannot be told fails a language constraint (the reference lets it pass); sentences
and words are split by the rules below rather than by NLTK's models, which cannot be shipped.
"""

from __future__ import annotations

import json
import re
from typing import Any

from langdetect import DetectorFactory, LangDetectException, detect

from cabochon.verifiers.text import visible

DetectorFactory.seed = 0  # langdetect samples; without a seed a short text may change language from call to call

_ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|Inc|Ltd|Co|No|Fig|approx|e\.g|i\.e|a\.m|p\.m|U\.S)\.$"
)
_NUMBERED = re.compile(r"\b(?:No|Fig)\.$")
"""An abbreviation only before a number."""
_SENTENCE_END = re.compile(r"[.!?…。！？؟।]+[\"')\]”’]*(?=\s|$)|(?<=[。！？])")


def compares(count: int, relation: str, threshold: int) -> bool:
    """`count` against a threshold the way IFEval words it: "at least", or "less than"."""
    return count >= threshold if relation == "at least" else count < threshold


def words(text: str) -> list[str]:
    """Runs of word characters, as the reference's tokenizer takes them."""
    return re.findall(r"\w+", text)


_BLOCK = re.compile(r"\n\s*\n|(?:\A|(?<=\n))[ \t]*(?:[-*•#>]+|\d{1,3}[.)])[ \t]")


def count_sentences(text: str) -> int:
    """Stretches that end in ., ! or ? before white space, at an empty line or before the next point of a list; a mere
    line break, abbreviations and initials do not end one."""
    count = 0
    for line in (" ".join(block.split()) for block in _BLOCK.split(text)):
        start = 0
        for end in _SENTENCE_END.finditer(line):
            piece = line[start : end.end()]
            before = line[max(0, end.start() - 8) : end.end()]
            word = _NUMBERED.search(before) and not re.match(r"\s*\d", line[end.end() :])
            if _ABBREVIATION.search(before) and not word and end.end() < len(line):
                continue
            if re.search(r"(?:^|\s)[A-Z]\.$", line[max(0, end.start() - 3) : end.end()]) and end.end() < len(line):
                continue
            count += bool(re.search(r"\w", piece))
            start = end.end()
        count += bool(re.search(r"\w", line[start:]))
    return count


def language(text: str) -> str | None:
    """ISO code of the text's language, None where it cannot be told."""
    try:
        return str(detect(text[:20_000]))
    except LangDetectException:
        return None


def is_language(text: str, code: str) -> bool:
    """`zh` is met by what langdetect calls `zh-cn` or `zh-tw`."""
    found = language(text)
    return found is not None and code in (found, found.partition("-")[0])


def all_keywords(text: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compares(len(re.findall(re.escape(keyword), text, re.IGNORECASE)), relation, frequency)


def no_forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(has_word(text, word) for word in forbidden_words)


_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Letters of scripts that put no spaces between words, or endings onto them: Thai to Han, kana, Hangul."""


_MARKS = str.maketrans("\u2018\u2019\u02bc\u2010\u2011", "'''--")


def has_word(text: str, phrase: str) -> bool:
    """Whether a word or phrase stands in a text, however it is spaced, capitalised and encoded, also as `_word_` and
    with invisible characters inside; no part of a longer word."""

    def edge(letter: str, mark: str) -> str:
        return mark if re.match(r"[^\W_]", letter) and not _UNSPACED.match(letter) else ""

    text, phrase = (visible(side).translate(_MARKS).casefold() for side in (text, phrase))
    spaced = r"\s+".join(map(re.escape, phrase.split()))
    pattern = edge(phrase[0], r"(?<![^\W_])") + spaced + edge(phrase[-1], r"(?![^\W_])")
    return re.search(pattern, text) is not None


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compares(text.lower().count(letter.lower()), let_relation, let_frequency)


def paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs separated by `***`; an empty one is allowed only at the ends, and not counted."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > count or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"p\.\s?p\.\s?s.*$", "P.S.": r"p\.\s?s\..*$"}
    pattern = patterns.get(postscript_marker, re.escape(postscript_marker.lower()) + ".*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


def bullet_lists(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^[ \t]*\*[^*\n].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[ \t]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def constrained_response(text: str) -> bool:
    return any(option in text for option in CONSTRAINED)


def highlighted_sections(text: str, num_highlights: int) -> bool:
    single = re.findall(r"\*[^\n*]*\*", text)
    double = re.findall(r"\*\*[^\n*]*\*\*", text)
    count = sum(bool(part.strip("*").strip()) for part in single) + sum(bool(part[2:-2].strip()) for part in double)
    return count >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(r"\s?" + re.escape(section_spliter) + r"\s?\d+\s?", text)) - 1 >= num_sections


def unfenced(text: str) -> str:
    """Without a code fence around it."""
    text = text.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(opening)
    return text.removesuffix("```").strip()


def json_value(text: str, *, strict: bool = False) -> tuple[bool, Any]:
    """Whether the text is one JSON value, and the value. `strict` refuses NaN and Infinity, which JSON does not have,
    and half a code fence."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    if strict and text.strip().startswith("```") != text.strip().endswith("```"):
        return False, None
    try:
        return True, json.loads(unfenced(text), parse_constant=refuse if strict else None)
    except (ValueError, RecursionError):
        return False, None


def has_title(text: str) -> bool:
    return any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", text))


def two_responses(text: str) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    kept = [part.strip() for part in parts if part.strip()]
    return len(kept) == 2 and kept[0] != kept[1]


def repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(word.isupper() for word in re.findall(r"\w+(?:[-'’.]\w+)*", text))
    return compares(count, capital_relation, capital_frequency)


def all_capital(text: str) -> bool:
    return text.isupper() and language(text.lower()) == "en"


def all_lowercase(text: str) -> bool:
    return text.islower() and language(text) == "en"


def quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'
