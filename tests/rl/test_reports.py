from dataclasses import replace

import numpy as np
import pytest

from cabochon.errors import MachineError, UserError
from cabochon.rl import reports
from cabochon.rl.alarms import check
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
    assert (row["completions"], row["kept"], row["unrewarded"], row["unrewarded_by"]) == (4, 4, 1, {"verifier": 1})


def test_what_was_given_up_is_not_empty():
    some = [rollout(0, 1.0), rollout(0, 0.0, n=0), rollout(1, None, finish="abort", n=0), rollout(1, 1.0)]
    assert reports.rollout_row(some, compose(some, verified(some), {}, RewardConfig()), step=4)["empty"] == 0.25


def test_what_was_drawn_is_told_with_what_was_dropped_and_what_is_trained_on_apart():
    kept = [rollout(0, 1.0), rollout(0, 0.0), rollout(1, None), rollout(1, 1.0)]
    dropped = [rollout(g, 0.0, "b", finish="length", n=n) for g in range(2, 20) for n in (0, 7)]
    dropped += [rollout(20, None), rollout(20, 0.0)]
    rewards = compose(kept, verified(kept), {}, RewardConfig())
    alone, row = reports.rollout_row(kept, rewards, 4), reports.rollout_row(kept, rewards, 4, dropped)
    drawn = {"completions": 42, "infra_errors": 2, "score": 2 / 40, "truncated": 36 / 42, "empty": 18 / 42}
    drawn |= {"tokens": (6 * 3 + 18 * 7) / 42, "longest": 7}
    drawn |= {"status": {"infra_error": 2 / 42, "ok": 2 / 42, "wrong": 38 / 42}}
    drawn |= {"domains": {"a": {"score": 2 / 4, "reward": 2 / 3}, "b": {"score": 0.0, "reward": None}}}
    assert row == alone | drawn
    groups = reports.group_row(kept, rewards, dropped)
    assert groups == {
        "groups": 21, "groups_solved": 1 / 21, "groups_failed": 19 / 21, "groups_mixed": 1 / 21, "groups_equal": 0.0,
        "groups_alike": 0.0,
    }  # fmt: skip
    told = row | groups | {"groups_dropped": 19}
    steps, state = [], {}
    for step in (1, 2, 3):
        alarms, state = check(told, step, state)
        steps.append([a.name for a in alarms])
    assert steps == [["truncated"], [], ["dropped"]]


@pytest.mark.parametrize("combine", ["gated", "weighted", "normalized"])
def test_a_reward_model_that_fails_is_named(combine):
    some = [rollout(g, float(i < 3)) for g in range(4) for i in range(4)]
    value = np.array([0.7, np.nan, np.nan, np.nan] * 4)
    judge = Component(value_N=value, asked_N=np.ones(16, bool))
    rewards = compose(some, verified(some), {"judge": judge}, RewardConfig(combine=combine))
    row = reports.rollout_row(some, rewards, 1)
    cost = 8 if combine == "gated" else 12
    assert (row["unrewarded"], row["unrewarded_by"], row["infra_errors"]) == (cost, {"judge": cost}, 0)
    (alarm,), _ = check(row, 1, {})
    assert alarm.name == "unjudged"
    assert f"{cost / 16:.0%} of the completions have no reward, most often because 'judge' gave none" in alarm.said
    compared = compose(some, verified(some), {"judge": judge}, RewardConfig())
    row = reports.rollout_row(some, compared, 1)
    assert row["unrewarded"] == 0
    assert "unrewarded_by" not in row, "what is only compared cost nothing"


def test_rewards_that_are_cut_off_or_all_the_same_are_counted():
    some = [rollout(g, None) for g in range(3) for _ in range(2)]
    silent = Component(value_N=np.full(6, np.nan), asked_N=np.zeros(6, bool))

    def paid(*values, **cfg):
        given = {"environment": Component(value_N=np.array(values, float), asked_N=~np.isnan(values))}
        rewards = compose(some, silent, given, RewardConfig(**cfg))
        return reports.rollout_row(some, rewards, 1) | reports.group_row(some, rewards)

    row = paid(2, 4, 1, 1.2, np.nan, 6)
    assert (row["reward_clipped"], row["groups_alike"], row["unrewarded"]) == (3 / 5, 1 / 2, 1)
    row = paid(2, 4, 1, 1.2, 3, 6, clip=(0, 10))
    assert (row["reward_clipped"], row["groups_alike"]) == (0, 0)
    assert paid(*[0.5] * 6)["groups_alike"] == 1
    assert "groups_alike" not in paid(*[np.nan] * 6), "nothing to compare"
    assert paid(2, 4, 1, 1.2, 3, 6, combine="normalized")["reward_clipped"] == 0


def test_that_nothing_is_left_is_put_down_to_the_grader_where_it_failed():
    failed, wrong = rollout(0, None), rollout(0, 0.0)
    failed = replace(failed, verdict=replace(failed.verdict, detail="the sandbox is gone"))
    error = reports.nothing_to_learn(3, [failed, failed, wrong, wrong], 1)
    assert isinstance(error, MachineError)
    assert "step 3: 2 of 4 completions could not be judged, so nothing can be learnt: the sandbox is gone" in str(error)
    error = reports.nothing_to_learn(3, [failed, wrong, wrong, wrong], 1)
    assert isinstance(error, UserError)
    assert "all 1 groups were alike" in str(error)


@pytest.mark.parametrize(
    ("scores", "finish", "says"),
    [
        ((1, 1), "stop", "all 2 groups were alike, so nothing can be learnt (every completion was right): choose hard"),
        ((0, 0), "stop", "(every completion was wrong): choose easier tasks, or more samples (rollout.group_size)"),
        ((0, 0), "length", "(0 all right and 2 all wrong, with 4 of 4 completions cut off): raise sampling.max_tokens"),
        ((1, 0), "stop", "(1 all right, 1 all wrong, 0 with the same reward throughout): choose other tasks"),
        ((0.5, None), "stop", "(0 all right, 0 all wrong, 2 with the same reward throughout): choose other tasks"),
    ],
)
def test_that_nothing_is_left_says_what_the_groups_were(scores, finish, says):
    some = [rollout(g, score, finish=finish) for g, score in enumerate(scores) for _ in range(2)]
    some = [replace(r, verdict=replace(r.verdict, status="ok")) for r in some]
    assert says in str(reports.nothing_to_learn(3, some, 0))
    assert reports.all_solved(some) is (scores == (1, 1))


def test_that_every_group_was_too_old_is_not_put_down_to_the_tasks():
    error = reports.nothing_to_learn(7, [], 5)
    assert str(error).startswith("step 7: all 5 groups were drawn by weights too old to learn from: raise rollout.max_")


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
    some += [rollout(4, 0.5), rollout(4, 0.5)]
    row = reports.group_row(some, compose(some, verified(some), {}, RewardConfig()))
    assert row == {
        "groups": 5, "groups_solved": 0.2, "groups_failed": 0.4, "groups_mixed": 0.2, "groups_equal": 0.2,
        "groups_alike": 0.8,
    }  # fmt: skip


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
