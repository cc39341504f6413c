"""One constraint by name, judged inside a killable worker. Plain data in, plain data out.

Names with IFEval's spelling take IFEval's arguments. Our own kinds: `length:characters`, `length:words`,
`length:sentences`, `length:lines` (each `minimum` and/or `maximum`), `words:required` and `words:forbidden` (`words`),
`format:json`, `format:json_schema` (`schema`), `format:regex` (`pattern`, matched against all of the text),
`format:contains` (`pattern`, found anywhere), `language:is` (`language`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import jsonschema

from cabochon.verifiers import instructions_ifeval as ifeval

IFEVAL_KINDS = (
    "keywords:existence", "keywords:frequency", "keywords:forbidden_words", "keywords:letter_frequency",
    "language:response_language", "length_constraints:number_sentences", "length_constraints:number_paragraphs",
    "length_constraints:number_words", "length_constraints:nth_paragraph_first_word",
    "detectable_content:number_placeholders", "detectable_content:postscript", "detectable_format:number_bullet_lists",
    "detectable_format:constrained_response", "detectable_format:number_highlighted_sections",
    "detectable_format:multiple_sections", "detectable_format:json_format", "detectable_format:title",
    "combination:two_responses", "combination:repeat_prompt", "startend:end_checker", "startend:quotation",
    "change_case:capital_word_frequency", "change_case:english_capital", "change_case:english_lowercase",
    "punctuation:no_comma",
)
OWN_KINDS = (
    "length:characters", "length:words", "length:sentences", "length:lines", "words:required", "words:forbidden",
    "format:json", "format:json_schema", "format:regex", "format:contains", "language:is",
)


def follows(kind: str, arguments: Mapping[str, Any], text: str) -> bool:
    """Whether `text` keeps one constraint. Raises ValueError or KeyError for a constraint that is not usable."""
    given = {name: value for name, value in arguments.items() if value is not None}  # IFEval rows pad with nulls
    return _ifeval(kind, given, text) if kind in IFEVAL_KINDS else _own(kind, given, text)


def _ifeval(kind: str, given: Mapping[str, Any], text: str) -> bool:
    match kind:
        case "keywords:existence":
            return ifeval.all_keywords(text, list(given["keywords"]))
        case "keywords:frequency":
            return ifeval.keyword_frequency(text, given["keyword"], int(given["frequency"]), given["relation"])
        case "keywords:forbidden_words":
            return ifeval.no_forbidden_words(text, list(given["forbidden_words"]))
        case "keywords:letter_frequency":
            return ifeval.letter_frequency(text, given["letter"], int(given["let_frequency"]), given["let_relation"])
        case "language:response_language":
            return ifeval.is_language(text, given["language"])
        case "length_constraints:number_sentences":
            return ifeval.compares(ifeval.count_sentences(text), given["relation"], int(given["num_sentences"]))
        case "length_constraints:number_paragraphs":
            return ifeval.paragraphs(text, int(given["num_paragraphs"]))
        case "length_constraints:number_words":
            return ifeval.compares(len(ifeval.words(text)), given["relation"], int(given["num_words"]))
        case "length_constraints:nth_paragraph_first_word":
            return ifeval.nth_paragraph_first_word(
                text, int(given["num_paragraphs"]), int(given["nth_paragraph"]), given["first_word"]
            )
        case "detectable_content:number_placeholders":
            return ifeval.placeholders(text, int(given["num_placeholders"]))
        case "detectable_content:postscript":
            return ifeval.postscript(text, given["postscript_marker"])
        case "detectable_format:number_bullet_lists":
            return ifeval.bullet_lists(text, int(given["num_bullets"]))
        case "detectable_format:constrained_response":
            return ifeval.constrained_response(text)
        case "detectable_format:number_highlighted_sections":
            return ifeval.highlighted_sections(text, int(given["num_highlights"]))
        case "detectable_format:multiple_sections":
            return ifeval.multiple_sections(text, given["section_spliter"], int(given["num_sections"]))
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
            return ifeval.capital_words(text, int(given["capital_frequency"]), given["capital_relation"])
        case "change_case:english_capital":
            return ifeval.all_capital(text)
        case "change_case:english_lowercase":
            return ifeval.all_lowercase(text)
    return "," not in text  # punctuation:no_comma, the last of IFEVAL_KINDS


def _own(kind: str, given: Mapping[str, Any], text: str) -> bool:
    match kind:
        case "length:characters":
            return _within(len(text), given)
        case "length:words":
            return _within(len(ifeval.words(text)), given)
        case "length:sentences":
            return _within(ifeval.count_sentences(text), given)
        case "length:lines":
            return _within(len(text.splitlines()), given)
        case "words:required":
            return all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in given["words"])
        case "words:forbidden":
            return ifeval.no_forbidden_words(text, list(given["words"]))
        case "format:json":
            return ifeval.json_value(text, strict=True)[0]
        case "format:json_schema":
            parsed, value = ifeval.json_value(text, strict=True)
            return parsed and _fits(value, given["schema"])
        case "format:regex":
            return re.fullmatch(given["pattern"], text.strip(), re.DOTALL) is not None
        case "format:contains":
            return re.search(given["pattern"], text) is not None
        case "language:is":
            return ifeval.is_language(text, given["language"])
    near = difflib.get_close_matches(kind, IFEVAL_KINDS + OWN_KINDS, n=1, cutoff=0.0)
    raise ValueError(f"no constraint is called {kind!r}; the nearest is {near[0]!r}")


def _within(count: int, given: Mapping[str, Any]) -> bool:
    if not {"minimum", "maximum"} & set(given):
        raise ValueError("a length constraint needs `minimum` or `maximum`")
    return int(given.get("minimum", 0)) <= count <= int(given.get("maximum", count))


def _fits(value: Any, schema: Any) -> bool:
    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError:
        return False
    except jsonschema.SchemaError as error:
        raise ValueError(f"the JSON schema is not one: {error.message}") from error
    return True


def variants(text: str) -> list[str]:
    """IFEval's loose readings: without the first line, the last, both; each also without asterisks."""
    lines = text.split("\n")
    cuts = [text, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return cuts + [cut.replace("*", "") for cut in cuts]


def judge(text: str, constraints: list[list[Any]], loose: bool, partial: bool) -> dict[str, Any]:
    """The verdict on `constraints` ([kind, arguments] each); `unusable` where a constraint is not one."""
    readings = variants(text) if loose else [text]
    kept: list[bool] = []
    for kind, arguments in constraints:
        try:
            kept.append(any(bool(reading.strip()) and follows(kind, arguments, reading) for reading in readings))
        except KeyError as error:
            return {"unusable": f"constraint {kind} lacks its argument {error}"}
        except (ValueError, TypeError, re.error) as error:
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
