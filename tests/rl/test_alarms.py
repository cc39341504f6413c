"""Broken set-ups are named in their first steps, each with a remedy, and a healthy run is left in peace."""

import json
import math
import re

import numpy as np
import pytest

from cabochon.rl.alarms import RULES, AlarmLimits, check

HEALTHY = {
    "reward": 0.4, "completions": 64, "tokens": 30.0, "truncated": 0.05, "empty": 0.0, "infra_errors": 1,
    "status": {"ok": 0.4, "wrong": 0.5, "no_answer": 0.1}, "groups_solved": 0.2, "groups_failed": 0.2,
    "groups_mixed": 0.6, "groups": 16, "groups_dropped": 8, "groups_alike": 0.1, "kept": 32, "unrewarded": 2,
    "unrewarded_by": {"verifier": 1, "judge": 1}, "reward_clipped": 0.05,
    "trained_tokens": 1500, "learning_rate": 1e-5, "grad_norm": 0.3, "weights_change": 1e-4,
    "w_kl": 1e-4, "w_large": 0.0, "w_refused": 0.001, "clip_fraction": 0.02, "entropy": 0.6, "kl_reference": 0.001,
    "lag": {"mean": 0.5, "max": 1}, "groups_stale": 0, "budget_fill": 1.1,
    "moe": {"dead_experts": 0, "max_violation": 0.8, "effective_experts": 3.0},
}  # fmt: skip


def run(rows, **limits):
    """(names by step, everything said) of rows one after the other; the state goes through JSON, as in a checkpoint."""
    state, names, said = {}, [], []
    for step, row in enumerate(rows, 1):
        alarms, state = check(row, step, json.loads(json.dumps(state)), AlarmLimits(**limits))
        names.append([a.name for a in alarms])
        said += [str(a) for a in alarms]
    return names, said


def broken(**changes):
    return {**HEALTHY, **changes}


def test_a_healthy_run_is_quiet():
    assert run([HEALTHY] * 20) == ([[]] * 20, [])
    assert run([{}] * 5) == ([[]] * 5, []), "nothing known is nothing wrong"


def test_a_reading_about_its_limit_alarms_once_and_again_only_after_ten_quiet_steps():
    low, fine = broken(entropy=0.05), HEALTHY
    names, _ = run([*[low] * 3, fine, *[low] * 3, *[fine] * 9, *[low] * 5])
    assert names == [[], [], ["entropy"], *[[]] * 18], "nine quiet steps are too few, and lasting on is no news"
    names, _ = run([*[low] * 3, *[fine] * 10, *[low] * 3])
    assert names == [[], [], ["entropy"], *[[]] * 12, ["entropy"]]


def test_the_reason_why_completions_could_not_be_judged_is_in_the_alarm():
    _, said = run([broken(infra_errors=64, infra_reason="mine.py:score returned 72, outside [0, 1]")])
    assert "100% of the completions could not be judged, most often: mine.py:score returned 72" in said[0]


CASES = [
    ("all_wrong", {"groups_failed": 1.0, "groups_solved": 0.0}, 2),
    ("all_right", {"groups_failed": 0.0, "groups_solved": 1.0}, 2),
    ("flat_groups", {"groups_failed": 0.5, "groups_solved": 0.45}, 3),
    ("dropped", {"groups": 80, "groups_dropped": 79, "groups_failed": 0.95, "groups_solved": 0.04}, 3),
    ("alike", {"groups_failed": 0.0, "groups_solved": 0.0, "groups_alike": 1.0}, 3),
    ("alike", {"groups_failed": 0.5, "groups_solved": 0.2, "groups_alike": 0.95}, 3),
    ("reward_clip", {"reward_clipped": 0.6}, 2),
    ("truncated", {"truncated": 1.0}, 1),
    ("empty", {"empty": 0.9}, 1),
    ("no_answer", {"status": {"no_answer": 0.9, "malformed": 0.05}}, 2),
    ("unjudged", {"infra_errors": 64}, 1),
    ("unjudged", {"unrewarded_by": {"verifier": 4, "judge": 20}}, 1),
    ("nothing_trained", {"trained_tokens": 0, "grad_norm": 0.0, "weights_change": 0.0}, 1),
    ("learning_rate", {"learning_rate": 0.0, "weights_change": 0.0}, 2),
    ("gradient", {"grad_norm": 0.0}, 1),
    ("gradient", {"grad_norm": 0.0, "weights_change": 0.0}, 1),
    ("weights", {"weights_change": 0.0}, 2),
    ("logprobs", {"w_kl": 0.05}, 2),
    ("logprob_outliers", {"w_large": 0.01}, 2),
    ("refused", {"w_refused": 0.5}, 2),
    ("clipped", {"clip_fraction": 0.7}, 3),
    ("entropy", {"entropy": 0.01}, 3),
    ("dead_experts", {"moe": {"dead_experts": 2, "max_violation": 0.8}}, 3),
    ("reference", {"kl_reference": 7.0}, 1),
    ("stale", {"groups_stale": 3}, 2),
    ("budget", {"budget_fill": 0.4}, 3),
]


@pytest.mark.parametrize(("name", "changes", "after"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_each_fault_is_named_once_and_alone(name, changes, after):
    names, said = run([broken(**changes)] * 6)
    assert names == [[]] * (after - 1) + [[name]] + [[]] * (6 - after)
    assert said[0].startswith(f"step {after}: ")
    assert len(said[0].split(". ")[-1]) > 20, "with a remedy"


def test_every_rule_has_a_case():
    assert {r.name for r in RULES} == {c[0] for c in CASES} | {"load", "fall"}


def test_load_is_measured_against_the_first_step():
    worse = broken(moe={"dead_experts": 0, "max_violation": 2.5})
    assert run([HEALTHY, *[worse] * 4])[0] == [[], [], [], ["load"], []]
    assert run([worse] * 5)[0] == [[]] * 5
    assert run([HEALTHY, *[worse] * 4], violation=4.0)[0] == [[]] * 5


def scores(*values, **more):
    return [broken(score=value, **more) for value in values]


def falls(rows, **limits):
    """(steps at which it is said, what is said)"""
    names, said = run(rows, **limits)
    return [step for step, all_ in enumerate(names, 1) if "fall" in all_], [s for s in said if "fallen" in s]


def test_a_score_that_falls_is_measured_against_its_best():
    down = [0.9 - 0.03 * i for i in range(16)]
    steps, said = falls(scores(*[0.86, 0.9, 0.88, 0.9, 0.87, 0.9, 0.89, 0.9] * 2, *down))
    assert len(steps) == 1
    assert 16 + 4 < steps[0] <= 16 + 12, "15 % of it lost, on average of eight steps"
    assert re.search(r"the score has fallen to 0\.7\d, from 0\.89 at its best", said[0])
    assert falls(scores(*[0.9] * 16, *down), fall=0.9) == ([], [])
    assert falls(scores(*[0.9] * 16, *down), fall=0.05)[0][0] < steps[0]
    rows = [{k: v for k, v in row.items() if k != "score"} | {"reward": row["score"]} for row in
            scores(*[0.9] * 16, *down)]  # fmt: skip
    assert "the reward has fallen" in falls(rows)[1][0], "where no verifier says"
    unjudged = [row | {"score": math.nan, "reward": row["score"]} for row in scores(*[0.9] * 16, *down)]
    assert falls(unjudged)[0]


def test_batches_of_hard_tasks_are_no_fall():
    draw = np.random.default_rng(0)
    assert falls(scores(*np.clip(draw.normal(0.3, 0.15, 2000), 0, 1))) == ([], [])
    assert falls(scores(*[0.9] * 12, 0.2, 0.9, 0.9, 0.3, *[0.9] * 10)) == ([], [])
    assert falls(scores(0.9, 0.5, *[0.5] * 20)) == ([], []), "one lucky first step is no best"


def test_harder_tasks_are_no_fall():
    rows = [*scores(*[0.9] * 12, phase="first"), *scores(*[0.4] * 12, phase="second")]
    assert falls(rows) == ([], [])
    chosen = {"tried": 5, "easy": 0.1, "hard": 0.2}
    assert falls(scores(*[0.9] * 12, *[0.4] * 12, curriculum=chosen)) == ([], [])
    assert falls([*rows, *scores(*[0.1] * 12, phase="second")])[0]
    late = {"mean": 1.5, "max": 2}
    rows = [*scores(*[0.9] * 40, phase="first", lag=late), *scores(0.9, 0.9, *[0.3] * 30, phase="second", lag=late)]
    assert falls(rows) == ([], []), "groups that were begun in the phase before"


def test_the_score_and_the_reward_are_two_things():
    rows = scores(*[0.8] * 30) + [row | {"score": math.nan, "reward": 0.3} for row in scores(*[0.3] * 30)]
    assert falls(rows) == ([], [])


def test_a_kl_in_the_reward_betrays_the_reference_too():
    row = {k: v for k, v in HEALTHY.items() if k != "kl_reference"} | {"kl_reward": 9.0}
    assert run([row] * 2)[0] == [["reference"], []]
    assert run([HEALTHY, broken(kl_reference=9.0)])[0] == [[], []], "later it may have moved away"
    warm_up = {k: v for k, v in HEALTHY.items() if k != "kl_reference"}
    assert run([warm_up, warm_up, *[broken(kl_reference=9.0)] * 2])[0] == [[], [], ["reference"], []]


def test_an_alarm_comes_back_after_it_was_gone():
    cut = broken(truncated=1.0)
    assert run([cut, cut, *[HEALTHY] * 10, cut])[0] == [["truncated"], *[[]] * 11, ["truncated"]]


def test_warm_up_s_first_step_is_no_alarm():
    assert run([broken(learning_rate=0.0, weights_change=0.0), HEALTHY])[0] == [[], []]


@pytest.mark.parametrize(
    ("key", "value", "row"),
    [
        ("truncated", 0.01, {}),
        ("flat_groups", 0.3, {}),
        ("flat_groups", 0.45, {}),
        ("no_answer", 0.05, {}),
        ("reward_clipped", 0.02, {}),
        ("infra_errors", 0.01, {}),
        ("logprob_kl", 1e-5, {}),
        ("logprob_large", 1e-9, {"w_large": 1e-8}),
        ("refused", 1e-4, {}),
        ("clipped", 0.01, {}),
        ("entropy", 0.7, {}),
        ("reference_kl", 1e-4, {}),
        ("budget_fill", 1.2, {}),
    ],
)
def test_every_limit_moves_its_rule(key, value, row):
    assert not any(run([broken(**row)] * 3)[0])
    assert any(run([broken(**row)] * 3, **{key: value})[0])


def test_every_key_that_a_remedy_names_is_one():
    from cabochon import overrides
    from cabochon.rl.recipe import RlConfig

    keys = {".".join(map(str, key)) for key in overrides.keys_of(RlConfig)}
    named = {w for rule in RULES for w in re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", rule.remedy)} - {"events.jsonl"}
    assert "update.algorithm.clip.high" in named
    assert named <= keys
