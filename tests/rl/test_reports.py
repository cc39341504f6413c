from dataclasses import replace

import numpy as np
import pytest

from cabochon.errors import MachineError, UserError
from cabochon.rl import reports
from cabochon.rl.rewards import Component, RewardConfig, compose, verified
from cabochon.types import Completion, Rollout, Task, Verdict


def rollout(group, score, domain="a", version=2, finish="stop", n=3):
    completion = Completion(
        tokens=np.arange(n, dtype=np.int32), logprobs=np.zeros(n, np.float32), mask=np.ones(n, bool), text="x",
        finish=finish, policy_version=np.full(n, version, np.int32),
    )  # fmt: skip
    verdict = Verdict(score=score, status="infra_error" if score is None else "ok" if score == 1 else "wrong")
    task = Task(id="t", prompt="p", verifier="math", domain=domain)
    return Rollout(task=task, completion=completion, group=group, verdict=verdict)


def test_a_failure_of_the_machine_is_counted_and_is_in_no_mean():
    some = [
        rollout(0, 1.0),
        rollout(0, 0.0),
        rollout(1, None, "b", version=1, finish="length"),
        rollout(1, 1.0, "b", n=9),
    ]
    rewards = compose(some, verified(some), {}, RewardConfig())
    row = reports.rollout_row(some, rewards, step=4)
    assert row["score"] == pytest.approx(2 / 3)
    assert row["infra_errors"] == 1
    assert row["infra_reason"] == some[2].verdict.detail
    assert row["truncated"] == 0.25
    assert row["longest"] == 9
    assert row["lag"]["max"] == 2
    assert row["lag"]["mean"] == pytest.approx((15 * 1 + 3 * 2) / 18)
    assert row["domains"]["b"] == {"score": 1.0, "reward": 1.0}
    dropped = [rollout(2, None), rollout(2, 0.0)]
    assert reports.rollout_row(some, rewards, 4, dropped) == row | {"completions": 6, "infra_errors": 2}


def test_that_nothing_is_left_is_put_down_to_the_grader_where_it_failed():
    failed, wrong = rollout(0, None), rollout(0, 0.0)
    failed = replace(failed, verdict=replace(failed.verdict, detail="the sandbox is gone"))
    error = reports.nothing_to_learn(3, [failed, failed, wrong, wrong], 1)
    assert isinstance(error, MachineError)
    assert "step 3: 2 of 4 completions could not be judged, so nothing can be learnt: the sandbox is gone" in str(error)
    error = reports.nothing_to_learn(3, [failed, wrong, wrong, wrong], 1)
    assert isinstance(error, UserError)
    assert "all 1 groups were alike" in str(error)


def test_a_verdict_that_samples_share_took_its_time_once():
    one = rollout(0, 1.0)
    one = replace(one, verdict=replace(one.verdict, seconds=2.0))
    another, none = replace(one, verdict=replace(one.verdict)), replace(one, verdict=None)
    assert reports.verify_seconds([one, one, another, none]) == 4


def test_agreement_is_of_pairs_of_one_prompt_as_the_verifier_orders_them():
    some = [rollout(0, 1.0), rollout(0, 0.0), rollout(0, 0.0), rollout(1, 1.0), rollout(1, 1.0), rollout(1, None)]
    said = {
        "judge": [0.5, 0.5, 0.9, 0.1, 0.2, 0.3],  # against the first of group 0: one tie, one lost; group 1 has no pair
        "scalar": [2.0, -1.0, None, 0.0, 0.0, 0.0],
        "silent": [None] * 6,
    }
    models = {n: Component(value_N=np.array(v, float), asked_N=np.ones(6, bool)) for n, v in said.items()}
    row = reports.rollout_row(some, compose(some, verified(some), models, RewardConfig()), step=3)
    assert row["agreement"] == {"judge": 0.25, "scalar": 1.0}


def test_groups_by_what_they_teach():
    some = [rollout(g, s) for g, scores in enumerate([(1, 1), (0, 0), (1, 0), (0, 0)]) for s in map(float, scores)]
    row = reports.group_row(some, np.array([r.verdict.score for r in some]))
    assert row == {"groups_solved": 0.25, "groups_failed": 0.5, "groups_mixed": 0.25}


def test_nothing_known_has_no_mean():
    assert reports.mean(np.array([np.nan, np.nan])) is None


def test_the_stopwatch_adds_up_and_begins_anew():
    watch = reports.Stopwatch()
    for _ in range(2):
        with watch("a"):
            pass
    with pytest.raises(KeyError), watch("b"):
        raise KeyError
    first = watch.take()
    assert set(first) == {"a_seconds", "b_seconds"}, "a part that failed took its time too"
    assert watch.take() == {}
