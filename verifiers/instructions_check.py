"""One constraint by name, judged inside a killable worker. Plain data in, plain data out.

Names with IFEval's spelling take IFEval's arguments. Our own kinds: `length:characters`, `length:words`,
`length:sentences`, `length:lines` (each `minimum` and/or `maximum`), `words:required` and `words:forbidden` (`words`),
`format:json`, `format:json_schema` (`schema`), `format:regex` (`pattern`, matched against all of the text),
`format:contains` (`pattern`, found anywhere), `language:is` (`language`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import jsonschema
from referencing import Registry
from referencing.exceptions import Unresolvable

from cabochon.verifiers import instructions_ifeval as ifeval
from cabochon.verifiers.instructions_arguments import OWN_KINDS
from cabochon.verifiers.text import blank, visible


def follows(kind: str, arguments: Mapping[str, Any], text: str) -> bool:
    """Whether `text` keeps one constraint, with `checked` arguments. Raises ValueError where a schema is not usable."""
    return _own(kind, arguments, text) if kind in OWN_KINDS else _ifeval(kind, arguments, text)


def _ifeval(kind: str, given: Mapping[str, Any], text: str) -> bool:
    match kind:
        case "keywords:existence":
            return ifeval.all_keywords(text, given["keywords"])
        case "keywords:frequency":
            return ifeval.keyword_frequency(text, given["keyword"], given["frequency"], given["relation"])
        case "keywords:forbidden_words":
            return ifeval.no_forbidden_words(text, given["forbidden_words"])
        case "keywords:letter_frequency":
            return ifeval.letter_frequency(text, given["letter"], given["let_frequency"], given["let_relation"])
        case "language:response_language":
            return ifeval.is_language(text, given["language"])
        case "length_constraints:number_sentences":
            return ifeval.compares(ifeval.count_sentences(text), given["relation"], given["num_sentences"])
        case "length_constraints:number_paragraphs":
            return ifeval.paragraphs(text, given["num_paragraphs"])
        case "length_constraints:number_words":
            return ifeval.compares(len(ifeval.words(text)), given["relation"], given["num_words"])
        case "length_constraints:nth_paragraph_first_word":
            return ifeval.nth_paragraph_first_word(
                text, given["num_paragraphs"], given["nth_paragraph"], given["first_word"]
            )
        case "detectable_content:number_placeholders":
            return ifeval.placeholders(text, given["num_placeholders"])
        case "detectable_content:postscript":
            return ifeval.postscript(text, given["postscript_marker"])
        case "detectable_format:number_bullet_lists":
            return ifeval.bullet_lists(text, given["num_bullets"])
        case "detectable_format:constrained_response":
            return ifeval.constrained_response(text)
        case "detectable_format:number_highlighted_sections":
            return ifeval.highlighted_sections(text, given["num_highlights"])
        case "detectable_format:multiple_sections":
            return ifeval.multiple_sections(text, given["section_spliter"], given["num_sections"])
        case "detectable_format:json_format":
            return ifeval.json_value(text)[0]
        case "detectable_format:title":
            return ifeval.has_title(text)
        case "combination:two_responses":
            return ifeval.two_responses(text)
        case "combination:repeat_prompt":
            return ifeval.repeats_prompt(text, given["prompt_to_repeat"])
        case "startend:end_checker":
            return ifeval.ends_with(text, given["end_phrase"])
        case "startend:quotation":
            return ifeval.quoted(text)
        case "change_case:capital_word_frequency":
            return ifeval.capital_words(text, given["capital_frequency"], given["capital_relation"])
        case "change_case:english_capital":
            return ifeval.all_capital(text)
        case "change_case:english_lowercase":
            return ifeval.all_lowercase(text)
        case "punctuation:no_comma":
            return "," not in text
    raise ValueError(kind)


def _own(kind: str, given: Mapping[str, Any], text: str) -> bool:
    match kind:
        case "length:characters":
            return _within(len(visible(text)), given)
        case "length:words":
            return _within(len(ifeval.words(text)), given)
        case "length:sentences":
            return _within(ifeval.count_sentences(text), given)
        case "length:lines":
            return _within(len(text.splitlines()), given)
        case "words:required":
            return all(ifeval.has_word(text, word) for word in given["words"])
        case "words:forbidden":
            return ifeval.no_forbidden_words(text, given["words"])
        case "format:json":
            return ifeval.json_value(text, strict=True)[0]
        case "format:json_schema":
            parsed, value = ifeval.json_value(text, strict=True)
            return parsed and _fits(value, given["schema"])
        case "format:regex":
            return any(re.fullmatch(given["pattern"], whole) is not None for whole in (text, text.strip()))
        case "format:contains":
            return re.search(given["pattern"], text) is not None
        case "language:is":
            return ifeval.is_language(text, given["language"])
    raise ValueError(kind)


def _within(count: int, given: Mapping[str, Any]) -> bool:
    return bool(given.get("minimum", 0) <= count <= given.get("maximum", count))


def _multiple(_: Any, factor: Any, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """Of decimals as they are written: 19.99 is a multiple of 0.01, which it is not in binary."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (not math.isfinite(value) or Fraction(str(value)) % Fraction(str(factor))):
        yield jsonschema.ValidationError(f"{value!r} is not a multiple of {factor}")


def _fits(value: Any, schema: Any) -> bool:
    """Whether a value is one of a schema's, of the `format`s that need no further package too. Nothing is fetched."""
    form = jsonschema.validators.extend(jsonschema.validators.validator_for(schema), {"multipleOf": _multiple})
    try:
        return bool(form(schema, registry=Registry(), format_checker=form.FORMAT_CHECKER).is_valid(value))
    except Unresolvable as error:
        raise ValueError(f"the JSON schema refers to {error.ref!r}, which is not in it") from error


def variants(text: str) -> list[str]:
    """IFEval's loose readings: without the first line, the last, both; each also without asterisks."""
    lines = text.split("\n")
    cuts = [text, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return cuts + [cut.replace("*", "") for cut in cuts]


def judge(text: str, constraints: list[list[Any]], loose: bool, partial: bool) -> dict[str, Any]:
    """The verdict on `constraints` ([kind, `checked` arguments] each); `unusable` where a schema is none."""
    readings = variants(text) if loose else [text]
    kept: list[bool] = []
    for kind, arguments in constraints:
        try:
            kept.append(any(not blank(reading) and follows(kind, arguments, reading) for reading in readings))
        except ValueError as error:
            return {"unusable": f"constraint {kind}: {error}"}
    broken = [kind for (kind, _), fine in zip(constraints, kept, strict=True) if not fine]
    score = sum(kept) / len(kept) if partial else float(not broken)
    status = "ok" if not broken else ("wrong" if text.strip() else "no_answer")
    parts = [{"kind": kind, "followed": fine} for (kind, _), fine in zip(constraints, kept, strict=True)]
    return {
        "score": score, "status": status,
        "detail": "all constraints kept" if not broken else f"not kept: {', '.join(broken)}"[:300],
        "evidence": {"constraints": parts, "reading": "loose" if loose else "strict"},
    }


def warm() -> None:
    """Load langdetect's profiles before the workers are forked."""
    ifeval.language("The profiles of all languages are read at the first call.")
