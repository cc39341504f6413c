"""Drawn curves of known shape, and how often chance alone is called learning."""

import numpy as np
import pytest

from cabochon.report.verdict import shares, trend, verdict


def run(score=(), held=(), before=None, events=(), stage="rl", status="finished", tasks=400, **values):
    n = max([len(score), *(len(v) for v in values.values())])
    spread = [None] * n
    for i, value in enumerate(held):
        spread[(i + 1) * n // len(held) - 1] = value
    curves = {"step": list(range(1, n + 1)), "values": {"score": list(score), "held_out": spread, **values}}
    return {
        "stage": stage, "curves": curves, "events": list(events), "steps": n, "planned": 2 * n, "status": status,
        "before": {} if before is None else {"all": before}, "held_out_tasks": tasks,
    }  # fmt: skip


def noise(n, level=0.5, size=0.05, seed=0):
    return (level + np.random.default_rng(seed).normal(0, size, n)).tolist()


def test_a_rise_and_a_fall_and_nothing():
    rising = (np.linspace(0.2, 0.7, 60) + np.array(noise(60, 0))).tolist()
    assert verdict(run(rising))["state"] == "learning"
    assert verdict(run([0.8 - 0.5 * y for y in rising]))["state"] == "worse"
    assert verdict(run(noise(60)))["state"] == "flat"
    assert verdict(run(noise(5)))["state"] == "early"
    assert verdict(run([]))["state"] == "early"


def test_why_a_run_failed_stands_first():
    told = [{"event": "failed", "message": "the first"}, {"event": "failed", "message": "no space"}]
    found = verdict(run(noise(60), status="failed", events=told))
    assert found["title"] == "No clear change; it failed at step 60 of 120"
    assert found["because"][0] == "no space"


def test_held_out_tasks_speak_before_the_training_score():
    """With dynamic sampling the score of training stays where it is while the policy learns."""
    found = verdict(run(noise(60), held=[0.5, 0.7], before=0.4))
    assert found["state"] == "learning"
    assert "held-out score rose: 40.0 % to 70.0 % (+30.0 points" in found["because"][0]
    found = verdict(run(noise(60), held=[0.41], before=0.4))
    assert found["state"] == "flat"
    assert "moved no more than chance would: 40.0 % to 41.0 %" in found["because"][0]


def test_a_collapse_is_named_with_the_alarm_that_explains_it():
    y = noise(40, 0.6) + noise(40, 0.05)
    alarms = [{"event": "alarm", "alarm": "entropy", "step": 45, "message": "m"}]
    found = verdict(run(y, events=alarms, status="stopped"))
    assert found["state"] == "collapsed"
    assert found["title"] == "It collapsed; not finished, step 80 of 160"
    assert "after the alarms entropy" in found["because"][0]


def test_a_loss_that_falls_at_once_and_then_stays_low_was_learnt():
    """As the demo's judge: nearly all of it within the first third, where it makes the third's own spread."""
    fall = 8.0 * np.exp(-np.arange(120) / 6) + 0.02 + np.abs(noise(120, 0, 0.01))
    assert verdict(run(stage="sft", loss=fall.tolist()))["state"] == "learning"
    assert verdict(run(stage="sft", loss=fall[::-1].tolist()))["state"] == "worse"
    rng = np.random.default_rng(3)
    flat = [verdict(run(stage="sft", loss=rng.normal(2, 0.1, 90).tolist()))["state"] for _ in range(200)]
    assert flat.count("flat") > 0.9 * len(flat)


def test_chance_is_called_a_change_about_as_often_as_the_interval_says():
    """5 % in theory; the thirds' error is estimated, and neighbours that resemble each other make it harder."""
    rng = np.random.default_rng(1)
    for r, most in ((0.0, 0.09), (0.6, 0.15)):
        called = 0
        for _ in range(400):
            y = [0.0]
            for e in rng.normal(size=119):
                y.append(r * y[-1] + e)
            found = trend(y)
            called += not found.low <= 0 <= found.high
        assert called / 400 < most, r


def test_the_interval_of_two_shares_is_that_of_two_binomials():
    found = shares(0.5, 0.6, 100)
    half = 1.96 * np.sqrt((0.25 + 0.24) / 100)
    assert (found.low, found.high) == (pytest.approx(0.1 - half), pytest.approx(0.1 + half))


def test_losses_fall_when_they_learn_and_overfitting_is_said():
    falling = (3 * np.exp(-np.linspace(0, 3, 60)) + np.array(noise(60, 0.2))).tolist()
    assert verdict(run(stage="sft", loss=falling))["state"] == "learning"
    held = [None] * 57 + [2.0, 1.0, 1.9]
    found = verdict(run(stage="sft", loss=falling, eval_loss=held))
    assert found["state"] == "worse"
    assert "fits its training data too closely" in found["because"][0]
    rm = verdict(run(stage="rm", ranking=falling, eval_accuracy=[None] * 59 + [0.82]))
    assert rm["because"][-1] == "it prefers the better of two held-out answers in 82.0% of the pairs"
