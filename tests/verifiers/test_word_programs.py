import pytest

from cabochon.types import Task
from cabochon.verifiers.build import verifier_for
from cabochon.verifiers.word_programs import word_programs


def test_references_pass_their_own_tests_and_say_what_the_words_say():
    tasks = word_programs(300, seed=1)
    assert len({task.prompt for task in tasks}) == 300
    for task in tasks:
        space: dict = {}
        exec(task.payload["reference"] + "\n" + "\n".join(task.payload["test_list"]), space)
    assert word_programs(300, seed=1) == tasks
    assert word_programs(300, seed=2) != tasks


def test_the_words_decide():
    (task,) = [t for t in word_programs(500, seed=0) if t.prompt.endswith(": double, then negate.")][:1]
    assert task.payload["test_list"][2] == "assert f(2) == -4"


def test_there_are_no_more_than_there_are():
    assert len(word_programs(1000, most_steps=1, largest=3)) == 8  # three with a 2 or a 3, double, negate


@pytest.mark.parametrize(
    ("change", "score"), [(lambda s: s, 1.0), (lambda s: s + " + 1", 0.0), (lambda s: "I cannot.", 0.0)]
)
def test_the_code_verifier_judges_them(change, score):
    task: Task = word_programs(1, seed=3)[0]
    verdict = verifier_for([task]).verify(task, change(task.payload["reference"]))
    assert verdict.score == score
