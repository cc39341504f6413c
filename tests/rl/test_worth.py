"""Which groups dynamic sampling keeps: by the rewards they will have, whoever gives them."""

import numpy as np
import pytest

from cabochon.rl.recipe import RlConfig
from cabochon.rl.worth import rewarded, worth_learning
from cabochon.types import Completion, Rollout, Task, Verdict


def config(combine="route", environment=False, models=(), **reward):
    return RlConfig.model_validate({
        "model": {"address": "absent"}, "tasks": {"train": ["absent.jsonl"]}, "steps": 1,
        "update": {"algorithm": {"kind": "dapo"}}, "reward": {"combine": combine, **reward},
        "environment": {"address": "absent.py:World"} if environment else None,
        "models": {name: {"address": "absent"} for name in models}, "step": {"batch_size": 128, "sequence_length": 256},
    })  # fmt: skip


def group(*said):
    """Of (verdict's score, environment's pay); "failed": the machine's failure, None: nothing was said."""
    return [
        Rollout(
            task=Task(id="t", prompt="p", verifier="v"), group=0,
            completion=Completion(
                tokens=np.arange(i + 1), logprobs=np.zeros(i + 1, np.float32), mask=np.ones(i + 1, bool), text="x",
                finish="stop", policy_version=np.zeros(i + 1, np.int32), reward=pay,
            ),
            verdict=Verdict(
                score=None if score == "failed" else score, status="infra_error" if score == "failed" else "ok"
            ),
        )
        for i, (score, pay) in enumerate(said)
    ]  # fmt: skip


MIXED, RIGHT, WRONG = ((1, None), (0, None)), ((1, None), (1, None)), ((0, None), (0, None))
SILENT, FAILED = ((None, None), (None, None)), (("failed", None), ("failed", None))


@pytest.mark.parametrize(
    ("said", "expected"), [(MIXED, True), (RIGHT, False), (WRONG, False), (SILENT, False), (FAILED, False)]
)
def test_by_the_verifier(said, expected):
    assert worth_learning(config(), group(*said)) is expected
    shaped = config(length={"kind": "exact", "slope": 0.1}, format_penalty=0.5)
    assert worth_learning(shaped, group(*said)) is expected, "before any shaping"


@pytest.mark.parametrize(
    ("pays", "expected"), [((0.0, 1.0), True), ((1.0, 1.0), False), ((2.0, 4.0), False), ((1.0, None), False)]
)
def test_by_the_environment_where_the_verifier_abstains(pays, expected):
    said = [(None, pay) for pay in pays]
    assert worth_learning(config(environment=True), group(*said)) is expected, "2 and 4 are clipped to the same"
    assert worth_learning(config(), group(*said)) is False, "nobody asked it"
    weighted = config("weighted", environment=True, weights={"verifier": 0})
    assert worth_learning(weighted, group((1, 0.5), (0, 0.5))) is False, "the verifier weighs nothing"


@pytest.mark.parametrize(
    ("combine", "kept"),
    [
        ("route", {"silent"}),
        ("gated", {"silent"}),
        ("weighted", {"silent", "right", "wrong"}),
        ("normalized", {"silent", "right", "wrong"}),
    ],
)
def test_a_group_is_kept_where_a_reward_model_will_have_a_say(combine, kept):
    cfg = config(combine, models=("judge",))
    groups = {"silent": SILENT, "right": RIGHT, "wrong": WRONG, "failed": FAILED}
    assert {name for name, said in groups.items() if worth_learning(cfg, group(*said))} == kept
    assert worth_learning(cfg, group(*MIXED))
    assert not worth_learning(cfg, group(FAILED[0], SILENT[0])), "one reward differs from nothing"


def test_a_model_that_is_missing_was_not_asked():
    rewards = rewarded(config("weighted", models=("judge",), weights={"judge": 2}), group(*MIXED), {})
    assert rewards.reward_N.tolist() == [1, 0]
    assert np.isnan(rewards.parts["judge"]).all()
