"""What each constraint takes, and whether it was given that: a limit that is misspelt would bind nobody and pay all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from cabochon.verifiers.text import nearest, visible

Shape = Literal["text", "texts", "count", "from zero", "relation", "language", "pattern", "schema"]

ARGUMENTS: dict[str, dict[str, Shape]] = {
    "keywords:existence": {"keywords": "texts"},
    "keywords:frequency": {"keyword": "text", "frequency": "count", "relation": "relation"},
    "keywords:forbidden_words": {"forbidden_words": "texts"},
    "keywords:letter_frequency": {"letter": "text", "let_frequency": "count", "let_relation": "relation"},
    "language:response_language": {"language": "language"},
    "length_constraints:number_sentences": {"num_sentences": "count", "relation": "relation"},
    "length_constraints:number_paragraphs": {"num_paragraphs": "count"},
    "length_constraints:number_words": {"num_words": "count", "relation": "relation"},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": "count", "nth_paragraph": "count", "first_word": "text",
    },
    "detectable_content:number_placeholders": {"num_placeholders": "count"},
    "detectable_content:postscript": {"postscript_marker": "text"},
    "detectable_format:number_bullet_lists": {"num_bullets": "from zero"},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": "count"},
    "detectable_format:multiple_sections": {"section_spliter": "text", "num_sections": "count"},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "text"},
    "startend:end_checker": {"end_phrase": "text"},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {"capital_frequency": "count", "capital_relation": "relation"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
    "length:characters": {"minimum": "from zero", "maximum": "count"},
    "length:words": {"minimum": "from zero", "maximum": "count"},
    "length:sentences": {"minimum": "from zero", "maximum": "count"},
    "length:lines": {"minimum": "from zero", "maximum": "count"},
    "words:required": {"words": "texts"},
    "words:forbidden": {"words": "texts"},
    "format:json": {},
    "format:json_schema": {"schema": "schema"},
    "format:regex": {"pattern": "pattern"},
    "format:contains": {"pattern": "pattern"},
    "language:is": {"language": "language"},
}
"""kind -> its arguments: IFEval's 25 kinds, then our own"""

OWN_KINDS = tuple(kind for kind in ARGUMENTS if kind.startswith(("length:", "words:", "format:", "language:is")))
IFEVAL_KINDS = tuple(kind for kind in ARGUMENTS if kind not in OWN_KINDS)

LANGUAGES = frozenset([
    "af", "ar", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "gu", "he", "hi",
    "hr", "hu", "id", "it", "ja", "kn", "ko", "lt", "lv", "mk", "ml", "mr", "ne", "nl", "no", "pa", "pl", "pt", "ro",
    "ru", "sk", "sl", "so", "sq", "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "vi", "zh", "zh-cn", "zh-tw"
])
"""what langdetect tells apart, and `zh` for both of its Chinese"""


def checked(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the checks take them: nulls, with which IFEval rows are padded, left out, counts as int.

    Raises ValueError for an unknown kind or argument (with the nearest there is), one that is missing or of another
    form, and limits that no text can keep.
    """
    if kind not in ARGUMENTS:
        raise ValueError(f"no constraint is called {kind!r}; the nearest is {nearest(kind, ARGUMENTS)!r}")
    shapes = ARGUMENTS[kind]
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in given:
        if name not in shapes:
            near = f"the nearest is {nearest(name, shapes)!r}" if shapes else "it takes none"
            raise ValueError(f"constraint {kind} takes no {name!r}; {near}")
    if "minimum" in shapes:
        if not given:
            raise ValueError(f"constraint {kind} needs `minimum` or `maximum`")
    elif missing := [name for name in shapes if name not in given]:
        raise ValueError(f"constraint {kind} lacks its argument {missing[0]!r}")
    found: dict[str, Any] = {}
    for name, value in given.items():
        try:
            found[name] = _formed(shapes[name], value)
        except ValueError as error:
            raise ValueError(f"constraint {kind}: {name} {error}, got {str(value)[:60]!r}") from None
    for low, high in (("minimum", "maximum"), ("nth_paragraph", "num_paragraphs")):
        if low in found and high in found and found[low] > found[high]:
            raise ValueError(f"constraint {kind}: {low} {found[low]} is more than {high} {found[high]}")
    return found


def _formed(shape: Shape, value: Any) -> Any:
    """`value` in its form. Raises ValueError saying what it must be."""
    match shape:
        case "text" if isinstance(value, str) and visible(value).strip():
            return value.strip()
        case "texts" if isinstance(value, list | tuple) and value:
            if all(isinstance(item, str) and visible(item).strip() for item in value):
                return [item.strip() for item in value]
        case "count" | "from zero" if isinstance(value, int | float) and not isinstance(value, bool):
            if (isinstance(value, int) or value.is_integer()) and value >= (shape == "count"):
                return int(value)  # 3.0 is what a table with gaps makes of 3
        case "relation" if value in ("at least", "less than"):
            return value
        case "language" if isinstance(value, str):
            code = value.strip().lower().replace("_", "-")
            known = [c for c in (code, code.partition("-")[0]) if c in LANGUAGES]
            if not known:
                raise ValueError(f"must be a language's code; the nearest is {nearest(code, LANGUAGES)!r}")
            return known[0]
        case "pattern" if isinstance(value, str):
            try:
                re.compile(value)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"is no regular expression ({error})") from None
            return value
        case "schema" if isinstance(value, dict) or value is True:
            return _schema(value)
    raise ValueError(f"must be {_WANTED[shape]}")


def _schema(value: Any) -> Any:
    import jsonschema  # only here: most rows have none

    try:
        jsonschema.validators.validator_for(value).check_schema(value)
    except jsonschema.SchemaError as error:
        raise ValueError(f"is no JSON schema ({error.message})") from None
    except (AttributeError, TypeError, ValueError, RecursionError) as error:  # a `$schema` that is none, no end of it
        raise ValueError(f"is no JSON schema ({error})") from None
    return value


_WANTED: dict[Shape, str] = {
    "text": "a text", "texts": "a list of texts", "count": "a whole number of at least 1",
    "from zero": "a whole number of at least 0", "relation": '"at least" or "less than"',
    "language": "a language's code", "pattern": "a regular expression", "schema": "a JSON schema",
}
