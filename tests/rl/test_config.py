"""The union is chosen by kind; contradictions are errors of one line."""

import pytest
from pydantic import TypeAdapter, ValidationError

from cabochon.errors import UserError
from cabochon.rl.config import Algorithm, C3po, Clip, Gspo, KlConfig, MismatchConfig, Overlong, Ppo, UpdateConfig
from cabochon.rl.recipe import RlConfig
from cabochon.rl.train import slot_config
from cabochon.types import Task


def test_kind_chooses_the_algorithm():
    adapter = TypeAdapter(Algorithm)
    assert adapter.validate_python({"kind": "gspo"}) == Gspo()
    assert UpdateConfig.model_validate({"algorithm": {"kind": "c3po", "budget": 64}}).algorithm == C3po(budget=64)
    with pytest.raises(ValidationError, match="gspo"):
        adapter.validate_python({"kind": "trpo"})
    with pytest.raises(ValidationError, match="ratio_cap"):
        adapter.validate_python({"kind": "gspo", "ratio_cap": 2})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Clip(dual=0.5), "dual=0.5 would clip below ratio 1"),
        (lambda: Overlong(max_tokens=4, buffer=5), "buffer=5 is more than max_tokens=4"),
        (lambda: Ppo(critic="shared"), "set warmup_updates to 0"),
        (lambda: Ppo(critic="shared", warmup_updates=0, critic_learning_rate=1e-5), "critic_learning_rate to null"),
        (lambda: KlConfig(coef=0.1, target=1.0), "set placement to reward, or target to null"),
        (lambda: KlConfig(placement="reward", target=1.0), "target multiplies coef, which is 0"),
        (lambda: MismatchConfig(token_band=(2, 5)), r"token_band=\[2.0, 5.0\]: expected \[low, high\] with"),
        (lambda: MismatchConfig(proximal="sampler"), "w in the ratio already"),
        (lambda: C3po(budget=0), "greater than or equal to 1"),
    ],
)
def test_contradictions_are_refused(make, said):
    with pytest.raises(ValidationError, match=said):
        make()


def recipe(**changes):
    return RlConfig.model_validate(
        {"steps": 9, "update": {"algorithm": {"kind": "grpo"}}, "model": {"address": "m"}, "engine": {"length": 96},
         "tasks": {"train": ["t.jsonl"]}, "run": {"dir": "r"}, "sampling": {"max_tokens": 40},
         "rollout": {"prompts": 1, "group_size": 2}, "step": {"batch_size": 2, "sequence_length": 128}} | changes
    )  # fmt: skip


def algorithm(**said):
    return {"update": {"algorithm": said}}


LONGER = {"phases": [{"name": "longer", "start": 5, "max_tokens": 50}]}
EPISODES = {"environment": {"address": "world.py:World", "turns": 3}}
GATED = {"reward": {"combine": "gated"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (GATED, "reward.combine=gated orders right answers by a model or an environment, and there is none"),
        (GATED | {"environment": {"tools": ["calculator"]}}, "and there is none: name one in models"),
        (algorithm(kind="dapo", overlong={"max_tokens": 41, "buffer": 8}), "overlong.max_tokens=41 punishes nobody in"),
        (algorithm(kind="dapo", overlong={"max_tokens": 51, "buffer": 8}) | LONGER, "is longer than 50 tokens"),
        (algorithm(kind="dr_grpo", max_tokens=39), "set it to 40, since no completion is longer than 40 tokens"),
        (algorithm(kind="dr_grpo", max_tokens=40) | LONGER, "set it to 50"),
        (algorithm(kind="dr_grpo", max_tokens=40) | EPISODES, "set it to 96"),
    ],
)
def test_keys_that_would_do_nothing_or_something_else_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        recipe(**changes)


def test_keys_that_just_fit_are_taken():
    recipe(**GATED, models={"judge": {"address": "j"}})
    recipe(**GATED, **EPISODES)
    recipe(**algorithm(kind="dapo", overlong={"max_tokens": 40, "buffer": 8}))
    recipe(**algorithm(kind="dapo", overlong={"max_tokens": 50, "buffer": 8}), **LONGER)
    recipe(**algorithm(kind="dapo", overlong={"max_tokens": 96, "buffer": 8}), **EPISODES)
    recipe(**algorithm(kind="dr_grpo", max_tokens=50), **LONGER)


def test_tasks_are_asked_for_their_length_before_the_run_where_a_phase_rewards_it():
    short, none = (Task(id=d, prompt="p", verifier="math", domain=d, payload=p) for d, p in
                   (("short", {"tokens": 3}), ("none", {"tokens": "many"})))  # fmt: skip
    recipe().check_tasks([short, none])
    phase = {"name": "terse", "start": 5, "length": {"kind": "max"}}
    with pytest.raises(UserError, match=r"task none: payload\.tokens='many'; reward.length needs a number of tokens"):
        recipe(phases=[phase]).check_tasks([short, none])
    recipe(phases=[phase | {"shares": {"none": 0}}]).check_tasks([short, none])


def test_tasks_under_way_when_a_phase_ends_are_asked_for_what_the_next_one_needs():
    short = Task(id="s", prompt="p", verifier="math", domain="short", payload={"tokens": 5})
    none = Task(id="n", prompt="p", verifier="math", domain="none")
    phase = {"name": "p", "start": 2, "length": {"kind": "max"}, "shares": {"none": 0}}
    recipe(phases=[phase]).check_tasks([short, none])
    for changes in ({"rollout": {"prompts": 1, "group_size": 2, "max_lag": 1}, "engine": {"kind": "ray", "length": 96}},
                    algorithm(kind="dapo")):  # fmt: skip
        with pytest.raises(UserError, match=r"task n: reward\.length needs payload\.tokens"):
            recipe(phases=[phase], **changes).check_tasks([short, none])
        recipe(phases=[phase], tasks={"train": ["t"], "shares": {"none": 0}}, **changes).check_tasks([short, none])
    recipe(phases=[phase | {"start": 10}], **algorithm(kind="dapo")).check_tasks([short, none])  # never reached


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([{"name": "z", "start": 2, "shares": {"a": -1, "b": 1}}], "a=-1.0: expected 0 or more"),
        ([{"name": "z", "start": 2, "shares": {"a": float("nan")}}], "shares.a\n  Input should be a finite number"),
        ([{"name": "z", "start": 2}, {"name": "z", "start": 3}], "two are called 'z'"),
        ([{"name": "first", "start": 2}], "two are called 'first'"),
    ],
)
def test_phases_that_cannot_be(phases, said):
    with pytest.raises(ValidationError, match=said):
        recipe(phases=phases)


def test_the_engines_settings_reach_the_sampler():
    said = {"kind": "local", "slots": 3, "length": 96, "reuse": 16, "tensor": 2}
    cfg = RlConfig.model_validate(
        {"steps": 1, "update": {"algorithm": {"kind": "grpo"}}, "model": {"address": "m"}, "engine": said,
         "tasks": {"train": ["t.jsonl"]}, "run": {"dir": "r"},
         "rollout": {"prompts": 1, "group_size": 2}, "step": {"batch_size": 2, "sequence_length": 128}}
    )  # fmt: skip
    slots = slot_config(cfg)
    assert {key: getattr(slots, key) for key in said if key != "kind"} == {k: v for k, v in said.items() if k != "kind"}
