import json
from dataclasses import replace

import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.rl import evaluate
from cabochon.rl.evaluate import Answered, Asked
from cabochon.testing import FakeEngine
from cabochon.types import Sampling, Score, Task, Verdict
from cabochon.verifiers.build import probes_for, verifier_for
from cabochon.verifiers.pool import VerifierPool


def answered(name, scores, domain="a", answers=None):
    n = len(scores)
    return Answered(
        task=Task(id=name, prompt=name, verifier="math", domain=domain), score_n=np.array(scores, float),
        tokens_n=np.full(n, 5), truncated_n=np.zeros(n, bool), texts=["t"] * n, answers=answers or ["1"] * n,
    )  # fmt: skip


def test_means_count_tasks_alike_and_leave_out_what_the_machine_failed():
    some = [answered("x", [1, 1, 0, 0]), answered("y", [1, np.nan, np.nan, np.nan]), answered("z", [np.nan] * 4)]
    found = evaluate.summary(some)
    assert found["mean"]["mean"] == pytest.approx(0.75)
    assert (found["tasks"], found["unjudged"]) == (3, 1)
    assert found["pass@2"] == pytest.approx(1 - 1 / 6), "of the one task that was judged whole"


def test_wrong_numbers_are_one_answer_whatever_their_form():
    tasks = [Task(id="t", prompt="p", verifier="math", payload={"answer": "3"})]
    said = iter(["1/2", "so 0.5", "\\boxed{\\frac12}", "3"])
    with VerifierPool(verifier=verifier_for(tasks), probes=probes_for(tasks)) as verifiers:
        engine = FakeEngine(lambda *_: next(said))
        found = evaluate.answer(engine, verifiers, tasks, Sampling(max_tokens=40, n=4), seed=0)
    assert found[0].answers == ["1/2", "1/2", "1/2", "3"]
    assert evaluate.summary(found)["maj@4"] == 0.0


def test_samples_that_were_lost_take_no_task_from_pass_at_1():
    some = [answered("x", [1, 1]), answered("y", [0, np.nan]), answered("z", [np.nan, np.nan])]
    found = evaluate.summary(some)
    assert (found["mean"]["mean"], found["pass@1"], found["pass@2"], found["lost"]) == (0.5, 0.5, 1.0, 3)
    report = {"evaluations": [{"model": "m", "thinking": None, "domains": {"all": found}}]}
    assert "m: 3 answers could not be judged and are left out" in evaluate.as_table(report)


def test_wrong_answers_that_nobody_names_are_told_apart_by_their_text():
    wrong = replace(answered("x", [1, 1, 0, 0]), answers=[None] * 4, texts=["a", "b", "c", "d"])
    assert evaluate.summary([wrong])["maj@4"] == 1.0
    alike = replace(wrong, texts=["a", "b", "c", "c "])
    assert evaluate.summary([alike])["maj@4"] == pytest.approx(0.5)


def test_a_domain_called_all_is_not_all_of_them():
    some = [answered("x", [1], "x"), answered("y", [0], "all"), answered("z", [0], "x")]
    assert {d: len(group) for d, group in evaluate.by_domain(some).items()} == {"all": 3, "x": 2, "all (the domain)": 1}
    assert {d: len(group) for d, group in evaluate.by_domain(some[1:2]).items()} == {"all": 1}
    problems = [{"task": name, "domain": "all", "mean": 0.5} for name in "ab"]
    one = {"problems": problems}
    assert list(evaluate.against(one, one)) == ["all", "all (the domain)"]


def test_parts_of_a_score_are_in_the_mean_and_no_right_answer():
    found = evaluate.summary([answered("x", [0.5, 0.5, 1, 0])])
    assert (found["mean"]["mean"], found["pass@1"]) == (0.5, 0.25)


def test_a_majority_of_different_right_forms_is_one_class():
    found = evaluate.summary([answered("x", [1, 1, 0, 0], answers=["1/2", "0.5", "3", "3"])])
    assert found["maj@4"] == pytest.approx(0.5), "two against two: a tie"
    assert evaluate.summary([answered("x", [1, 1, 0, 0], answers=["1/2", "0.5", "3", "4"])])["maj@4"] == 1.0


def test_an_episode_that_the_machine_broke_is_no_wrong_answer():
    class Engine(FakeEngine):
        def generate(self, requests):
            first, *rest = super().generate(requests)
            return [replace(first, finish="abort"), *rest]

    tasks = [Task(id=f"t{i}", prompt="1+1=", verifier="math", payload={"answer": "2"}) for i in range(2)]
    with VerifierPool(verifier=verifier_for(tasks), probes=probes_for(tasks)) as verifiers:
        found = evaluate.answer(Engine(lambda *_: "3"), verifiers, tasks, Sampling(max_tokens=8, n=2), seed=0)
    np.testing.assert_array_equal([a.score_n for a in found], [[np.nan, 0], [0, 0]])


class Abstains:
    """A verifier that leaves the score to the environment, or breaks."""

    def verify(self, task, text):
        if text == "broken":
            raise RuntimeError("the grader is gone")
        return Verdict(score=None, status="ok")


@pytest.mark.parametrize(("text", "paid", "score"), [("3", 0.75, 0.75), ("3", None, np.nan), ("broken", 1.0, np.nan)])
def test_what_only_the_environment_pays_is_its_score(text, paid, score):
    class Engine(FakeEngine):
        def generate(self, requests):
            return [replace(c, reward=paid) for c in super().generate(requests)]

    tasks = [Task(id="t", prompt="1+1=", verifier="x")]
    with VerifierPool.unproven(verifier=Abstains(), retries=0) as verifiers:
        found = evaluate.answer(Engine(lambda *_: text), verifiers, tasks, Sampling(max_tokens=8, n=1), seed=0)
    np.testing.assert_array_equal(found[0].score_n, [score])


def judge(*votes_of_each):
    """Gives these votes, one answer after the other, and remembers what it was shown."""
    shown = []

    def score(tasks, texts):
        shown.extend(zip([t.id for t in tasks], texts, strict=True))
        return [
            Score(value=None, status="unparsed", model_id="j") if votes is None
            else Score(value=0.5, model_id="j", evidence={"votes": votes})
            for votes in votes_of_each
        ]  # fmt: skip

    return score, shown


def test_cot_pass_at_k_counts_answers_whose_reasoning_is_right_too():
    """n = 5, c = 2, d = 1: pass@1, 2 = 0.4, 0.7 and CoT-Pass@1, 2 = 0.2, 0.4 (algorithms.md section 17)."""
    some = [replace(answered("x", [1, 0, 1, 0, 0]), texts=list("abcde"))]
    score, shown = judge([0.9, 0.8, 0.1], [0.9, 0.2, None])
    found = evaluate.summary(evaluate.reasoned(some, score))
    assert shown == [("x", "a"), ("x", "c")], "a wrong answer needs no judging"
    assert [found[f"pass@{k}"] for k in (1, 2)] == pytest.approx([0.4, 0.7])
    assert [found[f"CoT-Pass@{k}"] for k in (1, 2)] == pytest.approx([0.2, 0.4])
    assert found["reasoning"]["any"][1] == pytest.approx(0.4)
    assert found["reasoning"]["all"][1] == pytest.approx(0.0)
    assert (found["reasoning"]["sound"], found["reasoning"]["unread"]) == (0.5, 0)


def test_a_task_on_which_the_judge_cannot_be_read_is_left_out_and_counted():
    some = [answered("x", [1, 0]), answered("y", [1, 1])]
    found = evaluate.summary(evaluate.reasoned(some, judge([0.9], None, [0.9])[0]))
    assert (found["CoT-Pass@1"], found["pass@1"]) == (0.5, 0.75)
    assert found["reasoning"]["unread"] == 1
    nothing = evaluate.summary(evaluate.reasoned(some[1:], judge(None, None)[0]))
    assert nothing["reasoning"] == {"unread": 1}
    assert "CoT-Pass@1" not in nothing
    assert not [key for key in evaluate.summary(some) if "CoT" in key], "nobody was asked"


def test_the_table_shows_both():
    entry = {"model": "m", "thinking": None, "seconds": 1.0, "problems": []}
    some = evaluate.reasoned([answered("x", [1, 0])], judge([0.9])[0])
    text = evaluate.as_table({"evaluations": [entry | {"domains": {"all": evaluate.summary(some)}}]})
    head, row = text.splitlines()[1:3]
    assert head.split()[4:9] == ["pass@1", "pass@2", "maj@2", "CoT-Pass@1", "CoT-Pass@2"]
    assert row.split()[5:10] == ["50.0%", "100.0%", "50.0%", "50.0%", "100.0%"]
    some = evaluate.reasoned([answered("x", [1, 0]), answered("y", [1, 1])], judge([0.9], None, [0.9])[0])
    text = evaluate.as_table({"evaluations": [entry | {"domains": {"all": evaluate.summary(some)}}]})
    assert "m: the judge could not be read on 1 of the tasks" in text.splitlines()[-1]


def test_an_id_in_two_files_is_refused(tmp_path):
    row = {"id": "x", "prompt": "1+1=", "verifier": "math", "payload": {"answer": "2"}}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="--tasks: the id 'x' is in two of the files"):
        evaluate.compare(["nowhere"], Asked(tasks=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))), told=print)


def test_the_first_of_each_domain_alike():
    tasks = [
        Task(id=f"{d}{i}", prompt="p", verifier="math", domain=d) for d, n in (("a", 5), ("b", 2)) for i in range(n)
    ]
    assert [t.id for t in evaluate.first_of_each(tasks, 4)] == ["a0", "a1", "b0", "b1"]
    assert [t.id for t in evaluate.first_of_each(tasks, 6)] == ["a0", "a1", "a2", "a3", "b0", "b1"]


def entry(name, means):
    problems = [{"task": str(i), "domain": "ab"[i % 2], "mean": m} for i, m in enumerate(means)]
    return {"model": name, "thinking": None, "problems": problems}


def test_two_models_are_compared_on_the_tasks_both_were_judged_on():
    found = evaluate.against(entry("x", [0, 0, 0, None, 0, 0]), entry("y", [1, 1, 1, 1, 1, None]))
    assert found["all"]["difference"] == 1.0
    assert set(found) == {"all", "a", "b"}
    assert found["b"]["p"] == 1.0, "one task proves nothing"


def test_greedy_samples_are_refused():
    with pytest.raises(UserError, match="all alike"):
        evaluate.compare(["nowhere"], Asked(tasks=(), temperature=0.0, samples=4), told=print)


def test_the_table_and_the_file(tmp_path):
    domains = {"all": evaluate.summary([answered("x", [1, 0]), answered("y", [0, 0])])}
    first, second = ({"model": m, "thinking": None, "domains": domains} for m in ("one", "two"))
    second["against_first"] = {"all": {"difference": 0.25, "low": 0.1, "high": 0.4, "p": 0.01}}
    report = {"asked": {}, "evaluations": [first, second]}
    table = evaluate.as_table(report)
    assert " 25.0%" in table
    assert "+25.0 points [+10.0, +40.0], p 0.01" in table
    first["problems"] = [{"task": "x", "texts": ["\ud83d half"]}]
    evaluate.write(report, tmp_path / "new" / "e.json")
    (found, _) = json.loads((tmp_path / "new" / "e.json").read_text(encoding="utf-8"))["evaluations"]
    assert (found["model"], found["problems"][0]["texts"]) == ("one", ["? half"]), "what a model wrote ends nothing"
