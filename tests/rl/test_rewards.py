"""Composition against hand-worked numbers; what has no value leaves its group (algorithms.md sections 5, 8, 16)."""

import numpy as np
import pytest
from pydantic import ValidationError

from cabochon.errors import UserError
from cabochon.rl.advantages import group_advantage, informative
from cabochon.rl.config import GroupBaseline, Overlong
from cabochon.rl.rewards import (
    Component,
    LengthReward,
    RewardConfig,
    compose,
    length_reward,
    normalized,
    scored,
    verified,
)
from cabochon.types import Completion, Rollout, Score, Task, Verdict

V, Q = [1.0, 1, 0, 0], [0.9, 0.1, 0.8, 0.2]
nan = np.nan


def rollouts(n=4, tokens=3, verdicts=None, group=None, payload=None):
    def one(i):
        t = tokens[i] if isinstance(tokens, list) else tokens
        completion = Completion(
            tokens=np.zeros(t, np.int32), logprobs=np.zeros(t, np.float32), mask=np.ones(t, bool), text="",
            finish="stop", policy_version=np.zeros(t, np.int32),
        )  # fmt: skip
        task = Task(id=f"t/{i}", prompt="p", verifier="math", payload=payload or {})
        group_i = 0 if group is None else group[i]
        return Rollout(task=task, completion=completion, group=group_i, verdict=verdicts[i] if verdicts else None)

    return [one(i) for i in range(n)]


def component(values, asked=None, logit=False):
    asked = [True] * len(values) if asked is None else asked
    return Component(value_N=np.array(values, float), asked_N=np.array(asked, bool), logit=logit)


def reward(v=V, q=Q, asked=None, judged=None, **cfg):
    data = rollouts(len(v))
    return compose(data, component(v, asked), {"judge": component(q, judged)}, RewardConfig(**cfg)).reward_N


def test_combinations_by_hand():
    np.testing.assert_allclose(reward(combine="weighted", weights={"judge": 0.2}), [1.18, 1.02, 0.16, 0.04])
    np.testing.assert_allclose(reward(combine="gated", quality=0.2), [1.08, 0.92, 0, 0])
    np.testing.assert_allclose(reward(combine="route"), V)
    both = reward(combine="normalized", weights={"judge": 0.2})
    np.testing.assert_allclose(both, [1.061985, 0.670066, -0.719056, -1.012995], atol=1e-6)
    batch, _ = group_advantage(both, np.zeros(4, int), ["d"] * 4, GroupBaseline(scale="batch"))
    np.testing.assert_allclose(batch, both / both.std(ddof=1))


def test_a_judge_cannot_overturn_the_verifier():
    q = np.random.default_rng(0).random(200)
    v = (np.arange(200) % 2).astype(float)
    got = reward(list(v), list(q), combine="gated", quality=1.99, clip=(-3, 3))
    assert got[v == 1].min() > got[v == 0].max()
    assert (np.diff(got[v == 1][np.argsort(q[v == 1])]) > 0).all()


def test_neither_a_scalar_model_nor_an_environment_can_overturn_the_verifier():
    logits, right = [-40.0, -1.0, 0.0, 1.0, 40.0, 9.0], [1.0, 1, 1, 1, 1, 0]
    scalar = component(logits, logit=True)
    cfg = RewardConfig(combine="gated", quality=1.9, clip=(-3, 3))
    got = compose(rollouts(6), component(right), {"scalar": scalar}, cfg)
    expected = [1 + 1.9 * (1 / (1 + np.exp(-q)) - 0.5) for q in logits[:5]]
    np.testing.assert_allclose(got.reward_N, [*expected, 0])
    assert got.reward_N[:5].min() > got.reward_N[5]
    np.testing.assert_array_equal(got.parts["scalar"], logits)  # what is shown is what it said

    def paid(*values, asked=None):
        given = {"environment": component(values, asked), "judge": component([0.5] * 4)}
        return compose(rollouts(), component(V), given, cfg).reward_N

    np.testing.assert_allclose(paid(0, 1, 0, 1), [0.05, 1.95, 0, 0])
    with pytest.raises(UserError, match=r"gated takes qualities in \[0, 1\], and environment gave -3: scale it"):
        paid(-3, 1, 0, 1)
    np.testing.assert_allclose(paid(0, 1, 9, 9), [0.05, 1.95, 0, 0])  # of a wrong answer it does not matter
    np.testing.assert_allclose(paid(9, 1, 0, 1, asked=[False, True, True, True]), [1, 1.95, 0, 0])


def test_only_what_the_reward_depends_on_can_cost_it():
    def given(judge, second=(0.5,) * 4, v=V, **cfg):
        models = {"judge": component(judge), "second": component(second)}
        return compose(rollouts(), component(v), models, RewardConfig(**cfg)).reward_N

    silent = [nan] * 4
    np.testing.assert_allclose(given(Q, silent, combine="gated", quality=0.2), [1.08, 0.92, 0, 0])
    np.testing.assert_array_equal(given(silent, combine="gated"), [nan, nan, 0, 0])
    np.testing.assert_array_equal(given(silent, combine="gated", quality=0), V)
    np.testing.assert_array_equal(given(Q, v=[nan, 1, 0, 0], combine="gated", quality=0), [nan, 1, 0, 0])
    off = {"judge": 0.0, "second": 0.0}
    np.testing.assert_array_equal(given(silent, combine="weighted", weights=off), V)
    np.testing.assert_allclose(
        given(silent, combine="normalized", weights={"judge": 0.0}), np.array([1, 1, -1, -1]) * 0.75**0.5
    )
    np.testing.assert_array_equal(given(silent, combine="weighted", weights={"second": 0.0}), silent)
    np.testing.assert_array_equal(
        given([nan, 1, 1, 1], silent, [nan, 0, 0, 0], combine="weighted", weights={"verifier": 0.0, "second": 0.0}),
        [nan, 1, 1, 1],
    )
    nothing = given(silent, silent, silent, combine="weighted", weights={"verifier": 0.0, **off})
    np.testing.assert_array_equal(nothing, silent)  # what nobody could judge is not worth 0


def test_tasks_are_routed_by_what_they_have():
    verified_first, then_judge, nobody = True, False, False
    v, asked = [1.0, nan, nan], [verified_first, then_judge, nobody]
    got = reward(v, [0.3, 0.3, nan], asked, [True, True, False])
    np.testing.assert_array_equal(got, [1, 0.3, nan])
    np.testing.assert_allclose(reward(v, [0.5, 0.3, nan], asked, [True, True, False], combine="gated")[:2], [1, 0.3])
    np.testing.assert_allclose(reward(v, [0.5, 0.3, nan], asked, [True, True, False], combine="weighted"),
                               [1.2, 0.3, nan])  # fmt: skip


@pytest.mark.parametrize("combine", ["gated", "weighted", "normalized"])
def test_a_judge_that_fails_costs_the_completion_its_reward_not_its_score(combine):
    got = reward(V, [0.9, nan, 0.8, 0.2], combine=combine)
    np.testing.assert_array_equal(np.isnan(got), [False, True, False, False])
    routed = reward(V, [0.9, nan, 0.8, 0.2], combine="route")
    assert not np.isnan(routed).any(), "where the verifier decides, nobody asked the judge's opinion"


def test_verdicts_and_scores_become_components():
    verdicts = [
        Verdict(score=1.0, status="ok"),
        Verdict(score=0.0, status="timeout"),
        Verdict(score=None, status="infra_error"),
        Verdict(score=None, status="ok", detail="abstains"),
        None,
    ]
    got = verified(rollouts(5, verdicts=verdicts))
    np.testing.assert_array_equal(got.value_N, [1, 0, nan, nan, nan])
    np.testing.assert_array_equal(got.asked_N, [1, 1, 1, 0, 0])
    judge = scored([Score(value=0.5, model_id="j"), Score(value=None, status="unparsed", model_id="j"), None])
    np.testing.assert_array_equal(judge.value_N, [0.5, nan, nan])
    np.testing.assert_array_equal(judge.asked_N, [1, 1, 0])
    data = rollouts(5, verdicts=verdicts)
    reward_N = compose(data, verified(data), {}, RewardConfig()).reward_N
    np.testing.assert_array_equal(reward_N, [1, 0, nan, nan, nan])
    _, keep = group_advantage(reward_N, np.zeros(5, int), ["d"] * 5, GroupBaseline())
    np.testing.assert_array_equal(keep, [1, 1, 0, 0, 0])


def test_length_rewards_by_hand():
    r, n, asked = np.array([1.0, 0.0]), np.array([600, 600]), np.array([500.0, 500])
    np.testing.assert_allclose(length_reward(r, n, asked, LengthReward(kind="exact")), [0.97, -0.03])
    np.testing.assert_allclose(length_reward(r, n, asked, LengthReward(kind="max")), [0.47, 0.0])


def test_length_makes_no_bad_answer_better():
    r, n, asked = np.array([-0.5, -0.5, nan]), np.array([50, 150, 50]), np.array([50.0, 50, 50])
    np.testing.assert_array_equal(length_reward(r, n, asked, LengthReward(kind="max", slope=0.01)), [-0.5, -0.5, nan])


def test_every_part_stays_visible_and_adds_up():
    data = rollouts(2, tokens=[10, 30], payload={"tokens": 20})
    cfg = RewardConfig(length=LengthReward(kind="exact", slope=0.01), format_penalty=0.2, clip=(-2, 2))
    got = compose(
        data, component([1.0, 0.0]), {}, cfg, format_=component([1.0, 0.5]), overlong=Overlong(max_tokens=40, buffer=20)
    )
    np.testing.assert_allclose(got.parts["length"], [-0.1, -0.1])
    np.testing.assert_allclose(got.parts["format"], [0, -0.1])
    np.testing.assert_allclose(got.parts["overlong"], [0, -0.5])
    total = sum(got.parts[k] for k in ("quality", "length", "format", "overlong"))
    np.testing.assert_allclose(got.reward_N, total)
    assert informative(list(got.parts["verifier"])), "dynamic sampling looks at the verifier, before shaping"
    clipped = compose(data, component([1.0, 0.0]), {}, RewardConfig(clip=(0.25, 0.5)))
    np.testing.assert_allclose(clipped.reward_N, [0.5, 0.25])
    np.testing.assert_allclose(clipped.parts["quality"], [1, 0])


def test_a_flat_component_adds_nothing_when_normalised():
    x = np.array([0.5, 0.5 + 1e-8, 1.0, 0.0, nan])
    np.testing.assert_allclose(normalized(x, np.array([0, 0, 1, 1, 1])), [0, 0, 2**-0.5, -(2**-0.5), 0])


def test_bad_configs_and_tasks():
    with pytest.raises(ValidationError, match="weights are not used by combine=route"):
        RewardConfig(weights={"judge": 1.0})
    with pytest.raises(ValidationError, match="expected \\[low, high\\] with low < high"):
        RewardConfig(clip=(1, 1))
    data = rollouts(2)
    with pytest.raises(UserError, match=r"reward\.weights\.juge: no such component; expected some of verifier, judge"):
        compose(data, component([1, 0]), {"judge": component([1, 0])}, RewardConfig(combine="weighted",
                weights={"juge": 1.0}))  # fmt: skip
    with pytest.raises(UserError, match=r"task t/0: reward\.length needs payload\.tokens"):
        compose(data, component([1, 0]), {}, RewardConfig(length=LengthReward()))
    with pytest.raises(ValidationError, match=r"quality=0\.2 is not used by combine=weighted: set it to gated"):
        RewardConfig(combine="weighted", quality=0.2)
    assert RewardConfig.model_validate(RewardConfig().model_dump()) == RewardConfig(), "a resolved recipe runs again"


@pytest.mark.parametrize("tokens", ["many", "", None, [3], -1, float("nan"), float("inf")])
def test_a_length_that_is_no_number_names_the_task_and_the_key(tokens):
    data = rollouts(2, payload={"tokens": tokens})
    with pytest.raises(UserError, match=r"task t/0: payload\.tokens=.*; reward\.length needs a number of tokens"):
        compose(data, component([1, 0]), {}, RewardConfig(length=LengthReward()))
