"""reasoning-gym puzzles: the oracle's answer is paid, what the library pays besides is not."""

import json
import time

import pytest

from cabochon.errors import UserError
from cabochon.verifiers.reasoning import Puzzles, ReasoningVerifier, puzzle_tasks
from cabochon.verifiers.reasoning_worker import answer_of, arithmetic, rule_of, same_text, worked_out

pytest.importorskip("reasoning_gym")
VERIFIER = ReasoningVerifier()
NAMES = (
    "chain_sum",
    "countdown",
    "puzzle24",
    "game_of_life_halting",
    "coin_flip",
    "n_queens",
    "shortest_path",
    "word_sorting",
    "spiral_matrix",
    "string_insertion",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_is_paid_and_cheap_tricks_are_not(name: str) -> None:
    task, other = puzzle_tasks(Puzzles(name=name, size=2, seed=5))
    gold = str(task.payload["answer"])
    assert VERIFIER.verify(task, f"<think>hm</think>\n<answer>{gold}</answer>").score == 1.0
    tricks = ["", "zzz", f"{gold} zzz", f"zzz {gold}", f"{gold}\n{gold}", "[]", f"'{gold}' if True else 0"]
    if other.payload["answer"] != gold:
        tricks.append(str(other.payload["answer"]))
    for trick in tricks:
        found = VERIFIER.verify(task, f"<answer>{trick}</answer>")
        assert found.score == 0.0, (trick, found)
        assert found.status in ("wrong", "no_answer", "malformed")


@pytest.mark.slow
def test_every_dataset_pays_its_oracle_and_no_cheap_trick() -> None:
    from reasoning_gym.factory import DATASETS

    refused = set()
    for name in sorted(set(DATASETS) - {"composite"}):
        try:
            task, other = puzzle_tasks(Puzzles(name=name, size=2, seed=3))
        except UserError:
            refused.add(name)
            continue
        gold = task.payload["answer"]
        if gold is not None:
            assert VERIFIER.verify(task, f"<answer>{gold}</answer>").score == 1.0, name
        for trick in (
            "",
            "zzz",
            "[]",
            "0 1 2 3 4 5 6 7 8 9",
            f"{gold} zzz",
            f"zzz {gold}",
            str(other.payload["answer"]),
        ):
            found = VERIFIER.verify(task, f"<answer>{trick}</answer>")
            assert found.score == 0.0 or trick == gold, (name, trick, gold, found)
    assert refused == {"boxnet", "propositional_logic"}


def test_tasks_are_the_same_every_time_and_differ_by_seed_and_difficulty() -> None:
    one = puzzle_tasks(Puzzles(name="chain_sum", size=3, seed=1))
    assert one == puzzle_tasks(Puzzles(name="chain_sum", size=3, seed=1))
    assert one != puzzle_tasks(Puzzles(name="chain_sum", size=3, seed=2))
    hard = puzzle_tasks(Puzzles(name="chain_sum", size=3, seed=1, config={"min_terms": 9, "max_terms": 9}))
    assert all(str(task.prompt).count("+") + str(task.prompt).count("-") >= 8 for task in hard)
    assert VERIFIER.verify(hard[2], f"<answer>{hard[2].payload['answer']}</answer>").score == 1.0


def test_several_right_answers() -> None:
    (task,) = puzzle_tasks(Puzzles(name="puzzle24", size=1, seed=3))
    gold = str(task.payload["answer"])
    assert VERIFIER.verify(task, f"<answer>({gold}) = 24</answer>").score == 1.0
    assert VERIFIER.verify(task, "<answer>12+12</answer>").score == 0.0
    assert VERIFIER.verify(task, f"<answer>{gold} + 0</answer>").score == 0.0


def test_code_in_an_answer_is_not_run(tmp_path) -> None:
    marker = tmp_path / "owned"
    for name in ("spiral_matrix", "n_queens", "string_insertion", "countdown", "polynomial_multiplication"):
        (task,) = puzzle_tasks(Puzzles(name=name, size=1))
        code = f"__import__('pathlib').Path({str(marker)!r}).write_text('x')"
        assert VERIFIER.verify(task, f"<answer>{code}</answer>").score == 0.0
    assert not marker.exists()


def test_hostile_answers_end_in_time() -> None:
    for name in ("countdown", "chain_sum", "word_ladder", "rubiks_cube"):
        (task,) = puzzle_tasks(Puzzles(name=name, size=1))
        for text in ("9**9**9**9", "(" * 10_000, "\x00\ud800", "R" * 19_000, "1+" * 9_000 + "1", "a" * 3_000_000):
            start = time.monotonic()
            assert VERIFIER.verify(task, f"<answer>{text}</answer>").score == 0.0
            assert time.monotonic() - start < VERIFIER.deadline + 1


def test_an_item_that_is_not_the_one_asked_has_no_score() -> None:
    from dataclasses import replace

    (task,) = puzzle_tasks(Puzzles(name="chain_sum", size=1))
    found = VERIFIER.verify(replace(task, prompt="Another question"), "<answer>1</answer>")
    assert (found.score, found.status) == (None, "infra_error")


def test_unknown_names_settings_and_unsound_puzzles_are_refused() -> None:
    with pytest.raises(UserError, match="'countdwn'; the nearest is 'countdown'"):
        puzzle_tasks(Puzzles(name="countdwn"))
    with pytest.raises(UserError, match="max_numers"):
        puzzle_tasks(Puzzles(name="countdown", config={"max_numers": 3}))
    with pytest.raises(UserError, match="no answers to compare with"):
        puzzle_tasks(Puzzles(name="propositional_logic", size=1))


def test_where_the_answer_stands() -> None:
    assert answer_of("<think><answer>1</answer></think><answer>2</answer> or <answer> 3 </answer>") == "3"
    assert answer_of("so \\boxed{4}") == "4"
    assert answer_of("<think>a</think> 5 ") == "5"
    assert same_text("1 2\n3", " 1  2 \n3\n")
    assert not same_text("1 2\n3", "1 2 3")
    assert rule_of("gcd") == "value"
    assert rule_of("sudoku") == "exact"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("(1+2)*3", True),
        ("1*3+2*3", False),
        ("3*(2+1)", True),
        ("3*2+1", False),
        ("3\\times(2+1)=9", True),
        ("3\\times(2+1)=12", False),
        ("9 = 3*(2+1)", True),
        ("$[1+2]\u00b73$.", True),
        ("(1+2)*3\u00b2", False),
        ("(\u0661+2)*3", False),
        ("9", False),
        ("-(-3)*(1+2)", True),
        ("(1+2)*3)", False),
        ("3/(1-1)", False),
        ("", False),
        ("3*(2+1", False),
        ("1 2 3", False),
    ],
)
def test_arithmetic_over_given_numbers(text: str, right: bool) -> None:
    assert arithmetic(text, [1, 2, 3], 9)[0] is right


@pytest.mark.parametrize(
    ("oracle", "paid", "unpaid"),
    [
        ("-4", ["-4", "− 4", "-4.0", "5 - 9 = -4", "x = -4"], ["5 - 9", "-8/2", "-\\sqrt{16}", "-2^2", "-4 + 0"]),
        ("3037", ["3,037", "$3037", "3037^\\circ"], ["3036+1", "30,37", "1000\\cdot3 + 37", "\\frac{6074}{2}"]),
        ("-127.2111", ["-127.2111", "-127.21110"], ["-127.21111", "-127.211", "205.2089 - 838.12 + 505.7"]),
        ("35/99", ["35/99", "\\frac{35}{99}"], ["1/99 + 34/99", "1 - 64/99", "70/198", "\\frac{36-1}{99}", "3.5/9.9"]),
        ("-2.0 - 4.0i", ["-2-4i", "-4i - 2", "(-2-4i)"], ["(-7.0 + 2.0i) + (5.0 - 6.0i)", "-7 + 5 - 4i"]),
        ("x**2 - x - 2", ["x^2 - x - 2", "-x + x^2 - 2"], ["(x + 1)*(x - 2)", "[x-2][x+1]", "x^2 - 2x + x - 2"]),
        ("30*x**2 + 2*x", ["30x^2 + 2x", "2x+30x^{2}"], ["6*5x^2 + 2x", "{15x + 1}{2x}", "2(15x^2+x)"]),
        ("x**3", ["x^3"], ["x^3 + x - x", "x*x*x"]),
        ("0.5", ["0.5", ".5", "0.50"], ["1/2", "0.51"]),
    ],
)
def test_what_is_still_to_be_worked_out_is_no_answer(oracle: str, paid: list[str], unpaid: list[str]) -> None:
    from cabochon.verifiers.math_judge import matches, read

    def is_paid(answer: str) -> bool:
        return worked_out(oracle, read(answer.rpartition("=")[2]).split.core) and matches(oracle, answer)[0]

    assert [answer for answer in paid if not is_paid(answer)] == []
    assert [answer for answer in unpaid if is_paid(answer)] == []


@pytest.mark.parametrize("name", ["chain_sum", "decimal_chain_sum", "products", "complex_arithmetic", "dice"])
def test_the_question_said_back_is_not_paid(name: str) -> None:
    import re

    for task in puzzle_tasks(Puzzles(name=name, size=3, seed=4)):
        question = str(task.prompt).partition("\n\nGive the final")[0]
        asked = re.sub(r"^.*?: |=\s*$|\. Give only.*", "", question.strip())
        gold = str(task.payload["answer"])
        assert VERIFIER.verify(task, f"<answer>{gold}</answer>").score == 1.0
        for echo in (question, asked, f"{asked} = ", f"{gold} + 0", f"1 * {gold}", f"{gold}1" if "." in gold else ""):
            assert VERIFIER.verify(task, f"<answer>{echo}</answer>").score == 0.0, echo


def test_an_answer_in_other_dress_is_paid_where_the_library_says_so_too() -> None:
    from cabochon.verifiers.reasoning_worker import bare

    assert bare("F=4, J=9.") == bare("f=4,J=9") != bare("f=4,j=8")
    for name, dress in (("zebra_puzzles", str.title), ("word_sorting", lambda t: t.replace(", ", ","))):
        task, other = puzzle_tasks(Puzzles(name=name, size=2, seed=3))
        gold = dress(str(task.payload["answer"]))
        assert VERIFIER.verify(task, f"<answer>```text\n{gold}\n```</answer>").score == 1.0, name
        assert VERIFIER.verify(task, f"<answer>{dress(str(other.payload['answer']))}x</answer>").score == 0.0


@pytest.mark.parametrize(
    ("name", "dress"),
    [("caesar_cipher", str.lower), ("spiral_matrix", lambda t: t.replace(" ", "")), ("string_manipulation", str.upper)],
)
def test_dress_that_the_library_minds_is_not_paid(name, dress) -> None:
    (task,) = puzzle_tasks(Puzzles(name=name, size=1, seed=3))
    gold = str(task.payload["answer"])
    assert dress(gold) != gold
    assert VERIFIER.verify(task, f"<answer>{gold}</answer>").score == 1.0
    assert VERIFIER.verify(task, f"<answer>{dress(gold)}</answer>").score == 0.0


@pytest.mark.parametrize("name", ["group_anagrams", "palindrome_partitioning"])
def test_lists_without_an_order_are_paid_in_any(name) -> None:
    for task in puzzle_tasks(Puzzles(name=name, size=3, seed=3)):
        gold = json.loads(str(task.payload["answer"]))
        turned = json.dumps(gold[::-1])
        assert VERIFIER.verify(task, f"<answer>{turned}</answer>").score == 1.0
        if name == "group_anagrams":
            assert VERIFIER.verify(task, f"<answer>{json.dumps([g[::-1] for g in gold])}</answer>").score == 1.0
        moved = [[*gold[0], gold[-1][0]], *gold[1:-1], gold[-1][1:]]
        for wrong in (gold[1:], [*gold, ["not", "there"]], moved, [w for group in gold for w in group], gold[0], []):
            assert VERIFIER.verify(task, f"<answer>{json.dumps(wrong)}</answer>").score == 0.0
        for hostile in (f"{turned} + []", f"[{turned}]", f"json.loads('{turned}')", "[" * 9000):
            assert VERIFIER.verify(task, f"<answer>{hostile}</answer>").score == 0.0


def test_a_palindrome_may_be_written_in_capitals() -> None:
    (task,) = puzzle_tasks(Puzzles(name="palindrome_generation", size=1, seed=3))
    gold = str(task.payload["answer"])
    assert VERIFIER.verify(task, f"<answer>{gold.upper()}</answer>").score == 1.0
    assert VERIFIER.verify(task, f"<answer>{gold.upper()}A</answer>").score == 0.0


def test_three_figures_are_what_power_function_asks_for() -> None:
    for task in puzzle_tasks(Puzzles(name="power_function", size=6, seed=5)):
        gold = f"{float(task.payload['answer']):.2e}"
        assert VERIFIER.verify(task, f"<answer>{gold}</answer>").score == 1.0
        power = gold.replace("e", "\\times 10^{") + "}"
        assert VERIFIER.verify(task, f"<answer>${power}$</answer>".replace("$", "")).score == 1.0
        mantissa, _, exponent = gold.partition("e")
        near = f"{float(mantissa) + 0.01:.2f}e{exponent}"
        for wrong in (f"{mantissa}e{int(exponent) + 1}", near, mantissa, f"-{gold}"):
            assert VERIFIER.verify(task, f"<answer>{wrong}</answer>").score == 0.0


def test_integrals_that_nobody_could_do_are_no_tasks() -> None:
    tasks = puzzle_tasks(Puzzles(name="intermediate_integration", size=40, seed=5))
    assert 20 < len(tasks) < 40
    assert not [task for task in tasks if "Integral" in str(task.payload["answer"])]


def test_moves_without_end_are_no_solution() -> None:
    (task,) = puzzle_tasks(Puzzles(name="rush_hour", size=1, seed=7))
    found = VERIFIER.verify(task, f"<answer>{'A+1 ' * 4000}</answer>")
    assert (found.score, found.detail) == (0.0, "more moves than a solution has")


def test_comparing_texts_settles_most_answers_without_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    tasks = [t for name in ("spell_backward", "chain_sum") for t in puzzle_tasks(Puzzles(name=name, size=3))]
    by_worker = [replace(t, payload={k: v for k, v in t.payload.items() if k != "question"}) for t in tasks]
    texts = ["<answer>{}</answer>", "{}", "<answer>x{}</answer>", "", "<think>{}</think>", "{}7"]
    pairs = [(t, w, text.format(t.payload["answer"])) for t, w in zip(tasks, by_worker, strict=True) for text in texts]
    slow = [VERIFIER.verify(w, text) for _, w, text in pairs]

    def no_worker(*_: object) -> None:
        raise AssertionError("a worker was asked")

    monkeypatch.setattr("cabochon.verifiers.reasoning.shared_pool", no_worker)
    settled = 0
    for (task, _, text), want in zip(pairs, slow, strict=True):
        try:
            got = VERIFIER.verify(task, text)
        except AssertionError:
            continue
        assert replace(got, seconds=0) == replace(want, seconds=0)
        settled += 1
    assert settled >= 30, f"{settled} of {len(pairs)}"
