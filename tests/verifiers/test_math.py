"""The maths verifier through its door: corpus, GSM8K, hostile text, and what counts as an answer."""

import json
import pathlib
import re
import time
from collections.abc import Iterator

import gsm8k
import pytest
from clock import shortest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cabochon.types import Task, Verdict
from cabochon.verifiers.math import MathVerifier, gold_answers, prompt_text
from cabochon.verifiers.math_extract import Extraction

HERE = pathlib.Path(__file__).parent
VERIFIER = MathVerifier()


def task(gold: object, prompt: str = "", **payload: object) -> Task:
    return Task(id="t/0", prompt=prompt, verifier="math", payload={"answer": gold, **payload})


def verdict(gold: object, text: str, prompt: str = "", **payload: object) -> Verdict:
    return VERIFIER.verify(task(gold, prompt, **payload), text)


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


PAIRS = rows(HERE / "data" / "math_pairs.jsonl")


def test_the_corpus_is_what_it_says() -> None:
    assert len(PAIRS) >= 300
    assert sum(not pair["equal"] for pair in PAIRS) >= len(PAIRS) / 2
    assert {pair["kind"] for pair in PAIRS} >= {
        "number",
        "thousands",
        "fraction",
        "decimal",
        "percent",
        "units",
        "interval",
        "set",
        "tuple",
        "matrix",
        "equation",
        "inequality",
        "symbolic",
        "choice",
        "base",
        "words",
    }


@pytest.mark.parametrize("kind", sorted({pair["kind"] for pair in PAIRS}))
def test_every_pair_of_the_corpus_is_judged_as_marked(kind: str) -> None:
    wrong = []
    for pair in (pair for pair in PAIRS if pair["kind"] == kind):
        found = verdict(pair["gold"], f"So it is $\\boxed{{{pair['answer']}}}$.", pair.get("prompt", ""))
        if (found.score == 1.0) != pair["equal"] or found.status == "infra_error":
            wrong.append((pair, found.status, found.detail))
    assert wrong == []


@pytest.mark.parametrize("kind", sorted({pair["kind"] for pair in PAIRS}))
def test_every_gold_of_the_corpus_equals_itself(kind: str) -> None:
    for gold in {pair["gold"] for pair in PAIRS if pair["kind"] == kind}:
        assert verdict(gold, f"\\boxed{{{gold}}}").score == 1.0, gold


@pytest.mark.parametrize("row", rows(HERE / "data" / "math_texts.jsonl"), ids=lambda row: row["text"][:40])
def test_answers_are_found_in_whole_completions(row: dict) -> None:
    assert verdict(row["gold"], row["text"]).score == row["score"]


@pytest.mark.parametrize("row", rows(HERE / "data" / "math_answers.jsonl"), ids=lambda row: row["text"][-40:])
def test_answers_to_questions_as_models_write_them(row: dict) -> None:
    found = verdict(row["gold"], row["text"], row["prompt"], choices=row.get("choices", []))
    assert found.score == row["score"], found


# ------------------------------------------------------------------------------------------------------------ GSM8K


def right_forms(gold: str, question: str) -> Iterator[str]:
    number = int(gold.replace(",", ""))
    sign, money = ("", "cents") if re.search("(?:how many|in) cents", question.lower()) else ("\\$", "dollars")
    yield f"Thus she has \\boxed{{{gold}}}."
    yield f"<think>\\boxed{{{number + 7}}}, no.</think>The answer is {number:,}."
    yield f"work\n#### {number}"
    yield f"Therefore \\(\\boxed{{{sign}{number}.00}}\\)"
    yield f"**The final answer is: {number} {money}.**"
    yield f"First {number + 1}, so it is $\\frac{{{2 * number}}}{{2}}$"


def wrong_numbers(gold: str) -> list[str]:
    number = int(gold.replace(",", ""))
    return [
        str(number + 1),
        str(number * 10 if number else 10),
        str(-number if number else 1),
        f"{number}.5",
        f"{number + 1} or {number}",
        f"\\frac{{{number}}}{{3}}" if number else "3",
    ]


def check_gsm8k(data: list[dict]) -> None:
    for row in data:
        gold = row["answer"].rpartition("####")[2].strip()
        for text in right_forms(gold, row["question"]):
            found = verdict(gold, text, row["question"])
            assert found.score == 1.0, (gold, text, found)
        for number in wrong_numbers(gold):
            for text in (f"so \\boxed{{{number}}}", f"The answer is ${number}$."):
                found = verdict(gold, text, row["question"])
                assert found.score == 0.0, (gold, text, found)


def test_a_slice_of_gsm8k_in_six_forms_and_six_wrong_ones() -> None:
    check_gsm8k(rows(HERE / "data" / "gsm8k_slice.jsonl"))


@pytest.mark.slow
def test_all_of_gsm8k_in_six_forms_and_six_wrong_ones() -> None:
    check_gsm8k(gsm8k.test_split())


# ------------------------------------------------------------------------------------------------------------ hostile

HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "power": "2^{10000000000}",
    "factorials": "((((9!)!)!)!)!",
    "factorial": "100000!",
    "binomial": "\\binom{10^9}{10^8}",
    "long LaTeX": "\\frac{1}{x}+" * 9000,
    "digits": "9" * 100_000,
    "brackets": "(" * 10_000 + ")" * 10_000,
    "braces": "{" * 10_000 + "}" * 10_000,
    "roots": "\\sqrt{" * 500 + "2" + "}" * 500,
    "NUL": "\x005",
    "surrogate": "\ud8005",
    "exponent": "1e99999999",
    "huge argument": "\\sin(10^{4000})",
    "log tower": "\\ln(9^{9^{9}})",
    "many terms": "+".join(f"x^{{{n}}}" for n in range(300)),
    "polynomial": "(x+1)^{100000}",
    "spaces": "5" + " " * 100_000 + "a" + " " * 1000 + "!",
    "slashes": "5 a" + " / " * 900 + "!",
    "text tails": "5" + "\\text{a}/" * 300 + "!",
    "code": "__import__('os').system('touch /tmp/owned')",
    "minus": "-" * 3000 + "5",
    "percent": "5" + "%" * 3000,
    "primes": "x" + "'" * 3000,
    "commas": "1," * 1900 + "1",
    "determinant": "\\begin{vmatrix}"
    + "\\\\".join("&".join(f"a_{{{r}{c}}}" for c in range(9)) for r in range(9))
    + "\\end{vmatrix}",
    "nested power": "^{2".join("2" for _ in range(40)) + "}" * 39,
    "fractions": "\\frac{1}{1+" * 55 + "x" + "}" * 55,
    "infinite": "\\infty-\\infty",
    "many inequalities": ",".join(f"x\\ne {n}" for n in range(300)),
    "many intervals": " or ".join(f"[{n},{n}.5)" for n in range(200)),
    "zero power": "0^{-1}",
    "gcd": "\\gcd(2^{19999}, 3^{9999})",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_come_back_in_time_with_a_status_of_the_models(name: str) -> None:
    for gold in ("5", "x^2+1", "\\sqrt{2}", "(1,2)"):
        start = time.monotonic()
        found = verdict(gold, f"\\boxed{{{HOSTILE[name]}}}")
        assert found.score == 0.0, found
        assert found.status in ("wrong", "malformed", "timeout", "oom"), found
        assert time.monotonic() - start < VERIFIER.deadline + 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "\x00" * 1000,
        "\ud800\udfff" * 1000,
        "a" * 10_000_000,
        "\\boxed{" * 50_000,
        "<think>" * 50_000,
        "{" * 1_000_000,
        "$" * 1_000_000,
        "answer is " * 40_000,
        "#### " * 40_000,
        "\\boxed{}",
        "[" * 10_000,
        "\\boxed{6}" + " " * 300_000,
    ],
    ids=lambda text: f"{text[:8]!r}x{len(text)}",
)
def test_hostile_completions_score_nothing(text: str) -> None:
    start = time.monotonic()
    found = verdict("5", text)
    assert found.score == 0.0
    assert found.status in ("no_answer", "malformed", "wrong")
    assert time.monotonic() - start < VERIFIER.deadline + 1


def test_an_answer_that_takes_for_ever_is_a_timeout() -> None:
    quick = MathVerifier(deadline=0.1)
    slow = "\\boxed{\\max(" + ",".join(f"x^{{{n}}}+\\sin({n}x)" for n in range(60)) + ")}"

    def verify() -> None:
        found = quick.verify(task("x+y"), slow)
        assert (found.score, found.status) == (0.0, "timeout")

    assert shortest(1.1, verify) < 1.1
    assert quick.verify(task("x+y"), "\\boxed{y+x}").score == 1.0


ALPHABET = st.sampled_from(
    [
        "\\",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "$",
        "^",
        "_",
        "\\frac",
        "\\sqrt",
        "\\boxed{",
        "\\begin{pmatrix}",
        "\\text{",
        "&",
        "\\\\",
        "1",
        "23",
        "0.5",
        "x",
        "y",
        "!",
        "%",
        ",",
        "=",
        "<",
        "|",
        "\\pi",
        "\\infty",
        "\\pm",
        "\\cup",
        " ",
        "e",
        "i",
        "\x00",
        "\ud800",
        "or",
        "-",
        "+",
        "/",
        "'",
        "\\sin",
        "\\log",
        ":",
        "cm",
        "\\circ",
        "\\le",
        "\\{",
        "\\}",
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(answer=st.lists(ALPHABET, max_size=25).map("".join), gold=st.sampled_from(["5", "\\frac{1}{2}", "x+1", "(1,2)"]))
def test_no_string_of_pieces_raises_or_misses_its_deadline(answer: str, gold: str) -> None:
    start = time.monotonic()
    found = verdict(gold, f"\\boxed{{{answer}}}")
    assert found.status != "infra_error", found
    assert time.monotonic() - start < VERIFIER.deadline + 1


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(max_size=400))
def test_no_text_raises(text: str) -> None:
    assert verdict("5", text).status != "infra_error"


# ------------------------------------------------------------------------------------------------------------ the door


def test_a_box_in_the_thinking_part_does_not_count_when_there_is_a_final_part() -> None:
    assert verdict("5", "<think>\\boxed{5}</think> It is \\boxed{6}.").score == 0.0
    assert verdict("5", "<think>\\boxed{5}</think> I do not know.").score == 0.0
    assert verdict("5", "<think>\\boxed{6}</think> It is 5.").score == 1.0
    assert verdict("5", "<think>so \\boxed{5}</think>").score == 1.0  # no final part
    strict = MathVerifier(extraction=Extraction(require_final_part=True))
    assert strict.verify(task("5"), "<think>so \\boxed{5}").status == "no_answer"


def test_the_last_box_wins() -> None:
    assert verdict("5", "\\boxed{5} or rather \\boxed{6}").score == 0.0
    assert verdict("5", "\\boxed{6} or rather \\boxed{5}").score == 1.0
    assert verdict("5", "\\boxed{5} \\boxed{6").status == "malformed"


def test_evidence_shows_answer_gold_and_method() -> None:
    found = verdict("\\frac{1}{2}", "So \\boxed{0.25}.")
    assert found.evidence == {"gold": "\\frac{1}{2}", "answer": "0.25", "method": "boxed", "value": "1/4"}
    assert found.status == "wrong"
    assert verdict("5", "I do not know").status == "no_answer"


def test_several_golds_any_of_which_will_do() -> None:
    assert verdict(["1/2", "2"], "\\boxed{2}").score == 1.0
    assert verdict(["1/2", "2"], "\\boxed{0.5}").score == 1.0
    assert verdict(["1/2", "2"], "\\boxed{3}").score == 0.0


def test_choices_by_letter_or_by_text() -> None:
    options = ["\\frac{1}{2}", "7", "x+1"]
    assert verdict("C", "\\boxed{C}", choices=options).score == 1.0
    assert verdict("C", "\\boxed{1+x}", choices=options).score == 1.0
    assert verdict("7", "\\boxed{B}", choices=options).score == 1.0
    assert verdict("C", "\\boxed{7}", choices=options).score == 0.0
    assert verdict("7", "\\boxed{A}", choices=options).score == 0.0
    assert verdict("B", "\\boxed{b}", choices=options).score == 1.0
    assert verdict("B", "\\boxed{a}", choices=options).score == 0.0
    assert verdict("B", "\\boxed{b}", choices=["b", "a", "c"]).score == 0.0


def test_a_gold_out_of_a_solution() -> None:
    assert verdict("We find \\boxed{12}.", "\\boxed{12}").score == 1.0
    assert verdict("3*4=12\n#### 12", "\\boxed{12}").score == 1.0


@pytest.mark.parametrize("gold", ["", None, [], True, {"a": 1}])
def test_a_task_without_a_gold_is_the_tasks_fault(gold: object) -> None:
    with pytest.raises(ValueError, match="t/0"):
        verdict(gold, "\\boxed{5}")


def test_a_gold_that_does_not_equal_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"t/0.*gold"):
        verdict("1=2", "\\boxed{5}")


def test_numbers_as_golds_and_messages_as_prompts() -> None:
    assert gold_answers(task(72)) == ["72"]
    assert gold_answers(task([1, "2"])) == ["1", "2"]
    assert prompt_text([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "u"
