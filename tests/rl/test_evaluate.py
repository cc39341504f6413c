import json
from dataclasses import replace

import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.rl import evaluate
from cabochon.rl.evaluate import Answered, Asked
from cabochon.testing import FakeEngine
from cabochon.types import Sampling, Task
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
