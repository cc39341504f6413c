"""IFEval's 25 kinds (each kept and broken), our own kinds, strict and loose, and tasks that are not usable."""

import http.server
import threading
import time

import pytest
from clock import shortest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.types import Task, Verdict
from cabochon.verifiers.instructions import InstructionVerifier, constraints
from cabochon.verifiers.instructions_arguments import IFEVAL_KINDS, LANGUAGES, OWN_KINDS, checked
from cabochon.verifiers.instructions_check import follows, variants
from cabochon.verifiers.instructions_ifeval import count_sentences, words

# kind, arguments as IFEval rows write them, a text that keeps it, a text that breaks it
IFEVAL = [
    ("keywords:existence", {"keywords": ["blue", "Sky"]}, "The sky is blue.", "The sky is red."),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "at least"}, "Go, go!", "Go!"),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "less than"}, "Go!", "Go, go!"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "Concatenate.", "A Cat."),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 3, "let_relation": "at least"}, "Zzz", "zz"),
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter.",
        "This is a perfectly ordinary English sentence about the weather.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "A b. C d! E f?",
        "A b. C d!",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "Dr. Lee left. So did I.",
        "A b. C d! E f?",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One.\n\nTwo."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First this.\n\nThen, that.",
        "First this.\n\nSo that.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name] of [place]", "Dear [name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Call me.", "Bye. Call me."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S. Call me.", "Bye.\nP.S. Call me."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one\n* two\n- three"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", "*one* and two"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 a SECTION 2 b",
        "SECTION 1 a",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, 2]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<A title>>\nText.", "A title\n<< >>"),
    ("combination:two_responses", {}, "One.\n******\nAnother.", "One.\n******\nOne."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hello."}, "say hello. Hello!", "Hello!"),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, 'So it is. any questions?"', "Any questions? No."),
    ("startend:quotation", {}, '"All of it."', '"Some" of it'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NOT NOW, please",
        "NOT now",
    ),
    (
        "change_case:english_capital",
        {},
        "THIS IS AN ENGLISH SENTENCE ABOUT THE WEATHER.",
        "This is an English sentence.",
    ),
    (
        "change_case:english_lowercase",
        {},
        "this is an english sentence about the weather.",
        "This is an English sentence.",
    ),
    ("punctuation:no_comma", {}, "No comma here.", "One, two."),
]

OWN = [
    ("length:characters", {"maximum": 5}, "12345", "123456"),
    ("length:words", {"minimum": 2, "maximum": 3}, "one two", "one"),
    ("length:sentences", {"maximum": 1}, "One sentence.", "One. Two."),
    ("length:lines", {"minimum": 2}, "a\nb", "a"),
    ("words:required", {"words": ["cat"]}, "A cat.", "Concatenate."),
    ("words:forbidden", {"words": ["C++", "cat"]}, "Concatenate in C.", "I like c++ much"),
    ("words:forbidden", {"words": ["very good"]}, "It is good. Very, very goodish.", "very\n good"),
    ("format:json", {}, '{"a": 1}', '{"a": NaN}'),
    (
        "format:json_schema",
        {"schema": {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}},
        '{"a": 1}',
        '{"a": "1"}',
    ),
    ("format:regex", {"pattern": r"\d+-\d+"}, "12-34", "12-34x"),
    ("format:regex", {"pattern": r"Answer: .*"}, " Answer: 4\n", "Answer: 4\nand more"),
    ("format:regex", {"pattern": r"(?s)Answer: .*"}, "Answer: 4\nand more", "4\nAnswer: 4"),
    ("format:regex", {"pattern": r"  - item"}, "  - item", "- item"),
    ("format:json_schema", {"schema": {"multipleOf": 0.01}}, "19.99", "19.995"),
    ("format:json_schema", {"schema": {"multipleOf": 0.01}}, "0.07", "1e-3"),
    ("format:json_schema", {"schema": {"items": {"multipleOf": 3}}}, "[6, 9]", "[6, 7]"),
    ("words:required", {"words": ["don't"]}, "I don\u2019t.", "I do not."),
    ("words:forbidden", {"words": ["don\u2019t", "e-mail"]}, "I do not mail.", "I don't."),
    ("words:forbidden", {"words": ["e-mail"]}, "Mail.", "An e\u2011mail"),
    ("length:characters", {"minimum": 3}, "abc", "a\u200b\u200b\u200b"),
    ("length:sentences", {"maximum": 1}, "यह एक है।", "यह एक है। यह दो है।"),
    ("length:sentences", {"minimum": 2}, "هل هذا؟ نعم هذا.", "نعم هذا."),
    ("format:contains", {"pattern": r"\bID-\d+"}, "see ID-7.", "see ID."),
    (
        "language:is",
        {"language": "fr"},
        "Ceci est une phrase tout à fait ordinaire en français.",
        "This is a perfectly ordinary sentence.",
    ),
    ("language:is", {"language": "zh"}, "这是一个非常普通的句子，没有什么特别的地方。", "An ordinary sentence."),
]

VERIFIER = InstructionVerifier()


def task(*wanted: tuple[str, dict], **payload: object) -> Task:
    return Task(
        id="i/0",
        prompt="",
        verifier="instructions",
        payload={
            "instruction_id_list": [kind for kind, _ in wanted],
            "kwargs": [arguments for _, arguments in wanted],
            **payload,
        },
    )


UNSEEN = ["\u200b", "\ufeff", "\x00", "\u3164", "\u2800", "\u00ad \u200e", "<think>a</think>\u2060"]


@pytest.mark.parametrize("unseen", UNSEEN)
def test_what_nobody_sees_is_no_response(unseen: str) -> None:
    for reading in ("strict", "loose"):
        found = InstructionVerifier(reading=reading).verify(task(("punctuation:no_comma", {})), unseen)
        assert (found.score, found.status) == (0.0, "no_answer")
    assert VERIFIER.verify(task(("punctuation:no_comma", {})), unseen + "a").score == 1.0


def test_the_lists_are_complete() -> None:
    assert len(IFEVAL_KINDS) == 25
    assert {kind for kind, *_ in IFEVAL} == set(IFEVAL_KINDS)
    assert {kind for kind, *_ in OWN} == set(OWN_KINDS)


@pytest.mark.parametrize(("kind", "arguments", "kept", "broken"), IFEVAL + OWN)
def test_each_kind_kept_and_broken(kind: str, arguments: dict, kept: str, broken: str) -> None:
    assert follows(kind, checked(kind, arguments), kept)
    assert not follows(kind, checked(kind, arguments), broken)
    padded = {**arguments, "num_words": arguments.get("num_words"), "forbidden_words": arguments.get("forbidden_words")}
    assert follows(kind, checked(kind, padded), kept)  # IFEval rows carry every argument, most of them null


def test_a_whole_task_strict_and_loose() -> None:
    wanted = task(("punctuation:no_comma", {}), ("startend:end_checker", {"end_phrase": "Done."}))
    assert VERIFIER.verify(wanted, "All is well. Done.").score == 1.0
    found = VERIFIER.verify(wanted, "Well, all is well. Done.")
    assert (found.score, found.status) == (0.0, "wrong")
    assert found.detail == "not kept: punctuation:no_comma"
    assert found.evidence["constraints"][1] == {"kind": "startend:end_checker", "followed": True}
    chatty = "Sure, here it is:\nAll is well. *Done.*"
    assert VERIFIER.verify(wanted, chatty).score == 0.0
    assert InstructionVerifier(reading="loose").verify(wanted, chatty).score == 1.0


def test_partial_credit_only_when_asked_for() -> None:
    wanted = task(("punctuation:no_comma", {}), ("startend:quotation", {}))
    assert VERIFIER.verify(wanted, "Plain.").score == 0.0
    assert InstructionVerifier(partial=True).verify(wanted, "Plain.").score == 0.5


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("punctuation:no_comma", {}),
        ("keywords:forbidden_words", {"forbidden_words": ["x"]}),
        ("length:words", {"maximum": 3}),
    ],
)
def test_silence_keeps_no_constraint(kind: str, arguments: dict) -> None:
    for text in ("", "  \n"):
        found = VERIFIER.verify(task((kind, arguments)), text)
        assert (found.score, found.status) == (0.0, "no_answer")


def test_thinking_is_not_part_of_the_response() -> None:
    assert VERIFIER.verify(task(("punctuation:no_comma", {})), "<think>a, b, c</think>Plain.").score == 1.0


@pytest.mark.parametrize("text", ["<think>blue sky</think>", "<think>blue sky", "<think>a</think> \n "])
def test_thoughts_alone_are_no_response(text: str) -> None:
    found = VERIFIER.verify(task(("words:required", {"words": ["blue"]})), text)
    assert (found.score, found.status) == (0.0, "no_answer")


@pytest.mark.parametrize(
    ("word", "stands", "is_part"),
    [
        ("!", "Stop!Now", "Stop."),
        ("50%", "It is 50%of it", "It is 150 %"),
        ("50%", "at 50%.", "at 150%."),
        ("C++", "c++11", "C+ +"),
        ("你好", "我说你好吗", "你不好"),
        ("すし", "おすしです", "さし"),
        ("고양이", "고양이가 잔다", "고등어"),
        ("very good", "Very\n good!", "very goodish"),
        ("cat", "the cat's", "concatenate"),
        (" cat\n", "A cat.", "cats"),
        ("blue", "I think _blue_ is good", "bluegreen"),
        ("blue", "b\u200blu\u00ade ｂｌｕｅ", "b lue"),
        ("café", "cafe\u0301!", "cafe"),
        ("cat", "a ca\ufe0ft", "ca t"),
        ("cat", "a ca\u034f\u3164t.", "caat"),
        ("straße", "DIE STRASSE", "straßen"),
    ],
)
def test_a_word_stands_or_is_part_of_another(word: str, stands: str, is_part: str) -> None:
    for kind, with_it in (("words:required", True), ("words:forbidden", False)):
        given = checked(kind, {"words": [word]})
        assert follows(kind, given, stands) is with_it
        assert follows(kind, given, is_part) is not with_it


def test_languages_are_those_that_can_be_told() -> None:
    import os

    from langdetect.detector_factory import PROFILES_DIRECTORY

    assert {*os.listdir(PROFILES_DIRECTORY), "zh"} == LANGUAGES
    for said, code in (("en-US", "en"), ("EN", "en"), ("zh_TW", "zh-tw"), ("zh-Hans", "zh"), ("pt-BR", "pt")):
        assert checked("language:is", {"language": said}) == {"language": code}


def test_a_schema_s_formats_are_checked_and_nothing_is_fetched() -> None:
    day = {"type": "string", "format": "date"}
    assert follows("format:json_schema", {"schema": day}, '"2024-02-29"')
    assert not follows("format:json_schema", {"schema": day}, '"2023-02-29"')
    asked = []

    class Schemas(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"type": "integer"}')

    with http.server.HTTPServer(("127.0.0.1", 0), Schemas) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/x"
        with pytest.raises(ValueError, match=f"refers to '{address}', which is not in it"):
            follows("format:json_schema", {"schema": {"$ref": address}}, "1")
        server.shutdown()
    assert not asked
    inside = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}
    assert follows("format:json_schema", {"schema": inside}, "1")


def test_half_a_fence_is_no_json() -> None:
    assert follows("format:json", {}, "```json\n[1]\n```")
    assert not follows("format:json", {}, "```json\n[1]")
    assert not follows("format:json", {}, "[1]\n```")


def test_a_response_that_speaks_of_thinking_is_one() -> None:
    wanted = task(("words:required", {"words": ["prompts"]}))
    assert VERIFIER.verify(wanted, "Use `<think>` in prompts.").score == 1.0
    assert VERIFIER.verify(wanted, " <think>in prompts").status == "no_answer"


def test_loose_variants() -> None:
    assert variants("a\nb\n*c*") == ["a\nb\n*c*", "b\n*c*", "a\nb", "b", "a\nb\nc", "b\nc", "a\nb", "b"]


def test_words_and_sentences() -> None:
    assert words("It's 3.5 well-known") == ["It", "s", "3", "5", "well", "known"]
    assert count_sentences("Mr. A. Smith paid 3.5 dollars, e.g. on Monday. Then he left!\nAnd so on") == 3
    assert count_sentences("") == 0
    assert count_sentences("Is it so? No. That is a lie. No. It is not.") == 5
    assert count_sentences("See No. 5 and Fig. 2. Then stop.") == 2
    assert count_sentences("It is a long\nsentence over\nlines. And one more.") == 2
    assert count_sentences("A title\n\nOne sentence\n- a point\n- another. With two\n1. and three\n2.5 of it") == 6


def test_a_pattern_that_backtracks_for_ever_is_cut_off() -> None:
    wanted = Task(
        id="i/1",
        prompt="",
        verifier="instructions",
        payload={"constraints": [{"kind": "format:regex", "pattern": r"(a+)+b"}]},
    )

    def verify() -> None:
        found = InstructionVerifier(deadline=0.5).verify(wanted, "a" * 60)
        assert (found.score, found.status) == (0.0, "timeout")

    assert shortest(1.5, verify) < 1.5


@pytest.mark.parametrize("text", ["\x00", "\ud800" * 100, "[" * 100_000, "{" * 100_000, "*" * 100_000, " " * 200_000])
def test_hostile_responses_have_a_verdict(text: str) -> None:
    wanted = task(*[(kind, arguments) for kind, arguments, *_ in IFEVAL + OWN])
    start = time.monotonic()
    found: Verdict = VERIFIER.verify(wanted, text)
    assert found.score == 0.0
    assert found.status in ("wrong", "no_answer", "timeout")
    assert time.monotonic() - start < VERIFIER.deadline + 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(max_size=300))
def test_no_text_raises(text: str) -> None:
    wanted = task(*[(kind, arguments) for kind, arguments, *_ in IFEVAL + OWN])
    assert VERIFIER.verify(wanted, text).status in ("wrong", "no_answer")


def test_ten_megabytes_are_malformed() -> None:
    assert VERIFIER.verify(task(("punctuation:no_comma", {})), "a" * 10_000_000).status == "malformed"


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ({"constraints": [{"kind": "lenght:words", "maximum": 3}]}, "nearest is 'length:words'"),
        ({"constraints": [{"kind": "length:words"}]}, "`minimum` or `maximum`"),
        ({"constraints": [{"kind": "length:words", "max": 3}]}, "takes no 'max'; the nearest is 'maximum'"),
        ({"constraints": [{"kind": "format:json", "strict": True}]}, "takes no 'strict'; it takes none"),
        ({"constraints": [{"kind": "length:words", "minimum": 4, "maximum": 3}]}, "minimum 4 is more than maximum 3"),
        ({"constraints": [{"kind": "length:words", "maximum": 0}]}, "must be a whole number of at least 1, got '0'"),
        ({"constraints": [{"kind": "length:words", "minimum": "3"}]}, "a whole number of at least 0, got '3'"),
        ({"constraints": [{"kind": "length:words", "minimum": 2.5}]}, "a whole number of at least 0, got '2.5'"),
        ({"constraints": [{"kind": "length:words", "minimum": True}]}, "a whole number of at least 0, got 'True'"),
        ({"constraints": [{"kind": "words:required", "words": "blue"}]}, "words must be a list of texts, got 'blue'"),
        ({"constraints": [{"kind": "words:required", "words": []}]}, "words must be a list of texts, got '[]'"),
        ({"constraints": [{"kind": "words:required", "words": ["a", " "]}]}, "words must be a list of texts"),
        ({"constraints": [{"kind": "startend:end_checker", "end_phrase": " "}]}, "end_phrase must be a text"),
        ({"constraints": [{"kind": "language:is", "language": "english"}]}, "the nearest is"),
        ({"constraints": {"kind": "format:json"}}, '"constraints"'),
        ({"constraints": [{"kind": "words:forbidden", "words": ["\u200b"]}]}, "words must be a list of texts"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]}, "of kwargs must be an object, got 'x'"),
        ({"constraints": [{"kind": "format:json"}], "instruction_id_list": ["format:json"]}, "give one"),
        ({"constraints": [{"kind": "format:regex", "pattern": "a{99999999999999}"}]}, "is no regular expression"),
        ({"constraints": [{"kind": "format:json_schema", "schema": False}]}, "schema must be a JSON schema"),
        ({"constraints": [{"kind": "format:json_schema", "schema": {"$schema": 5}}]}, "is no JSON schema"),
        ({"instruction_id_list": "format:json"}, "'instruction_id_list'] must be a list, got str"),
        ({"constraints": [{"kind": "keywords:existence"}]}, "lacks its argument 'keywords'"),
        ({"constraints": [{"kind": "format:json_schema", "schema": {"type": "nonsense"}}]}, "JSON schema"),
        ({"constraints": [{"kind": "format:regex", "pattern": "("}]}, "format:regex"),
        ({}, '"constraints"'),
        ({"instruction_id_list": ["a", "b"], "kwargs": [{}]}, "2 instruction ids but 1 kwargs"),
        (
            {"constraints": [{"kind": "keywords:frequency", "keyword": "a", "frequency": 1, "relation": "around"}]},
            "at least",
        ),
    ],
)
def test_unusable_constraints_name_the_task_and_the_fault(payload: dict, says: str) -> None:
    with pytest.raises(ValueError, match="i/2") as raised:
        VERIFIER.verify(Task(id="i/2", prompt="", verifier="instructions", payload=payload), '{"a": 1}')
    assert says in str(raised.value)


def test_rows_of_ifeval_as_tables_write_them() -> None:
    rows = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": None}
    assert constraints(Task(id="a", prompt="", verifier="i", payload=rows)) == [("punctuation:no_comma", {})]
    rows = {"instruction_id_list": ["length_constraints:number_paragraphs"], "kwargs": [{"num_paragraphs": 3.0}]}
    assert constraints(Task(id="a", prompt="", verifier="i", payload=rows))[0][1] == {"num_paragraphs": 3}
    marker = checked("detectable_content:postscript", {"postscript_marker": "P.P.S "})
    assert follows("detectable_content:postscript", marker, "Bye.\nP. P. S. Call me.")


def test_constraints_in_both_forms() -> None:
    own = Task(id="a", prompt="", verifier="i", payload={"constraints": [{"kind": "length:words", "maximum": 3}]})
    assert constraints(own) == [("length:words", {"maximum": 3})]
    assert constraints(task(("punctuation:no_comma", {}))) == [("punctuation:no_comma", {})]
