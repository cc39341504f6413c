"""Every algorithm is planned from its config, and each key changes what is computed."""

import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.batch import Batch
from cabochon.errors import UserError
from cabochon.ops import TokenOutputs
from cabochon.rl.advantages import Samples
from cabochon.rl.config import (
    C3po,
    Cispo,
    Clip,
    Dapo,
    DrGrpo,
    GroupBaseline,
    Grpo,
    Gspo,
    KlConfig,
    MismatchConfig,
    Overlong,
    Ppo,
    ReinforcePP,
    Rloo,
    RouterConfig,
    UpdateConfig,
)
from cabochon.rl.update import plan_update

RNG = np.random.default_rng(0)
LOGP, PROXIMAL, BEHAVIOUR, REFERENCE = (-RNG.uniform(0.1, 1.2, (2, 6)).astype(np.float32) for _ in range(4))
ALGORITHMS = [
    Grpo(), DrGrpo(max_tokens=6), Rloo(), Rloo(clip=Clip()), ReinforcePP(), Dapo(), Gspo(), Cispo(), C3po(budget=9),
    Ppo(), Ppo(critic="shared", warmup_updates=0),
]  # fmt: skip


def batch(**changes):
    whole = np.ones((2, 6), np.float32)
    fields = {
        "tokens_BT": np.zeros((2, 6), np.int32), "position_BT": np.zeros((2, 6), np.int32),
        "segment_BT": np.array([[1, 1, 1, 2, 2, 2], [1] * 6]), "mask_BT": whole, "logp_proximal_BT": PROXIMAL,
        "logp_behaviour_BT": BEHAVIOUR, "logp_reference_BT": REFERENCE,
        "advantage_BT": np.array([[1.0] * 3 + [-1.5] * 3, [0.5] * 6], np.float32), "return_BT": whole,
        "value_BT": 0.3 * whole,
    }  # fmt: skip
    return Batch(**{k: jnp.asarray(v) for k, v in (fields | changes).items()})


def loss_of(algorithm, **changes):
    """The sum of all terms, a number that every key of the loss moves."""
    update = plan_update(UpdateConfig(algorithm=algorithm, **changes), sparse=True)
    out = TokenOutputs(jnp.asarray(LOGP), jnp.zeros((2, 6)), jnp.full((2, 6), 0.7), jnp.full((2, 6), 0.9))
    terms = {**update.loss(out, batch()).terms}
    if update.critic_loss is not None:
        terms |= update.critic_loss(out, batch()).terms
    return float(sum(m.value for m in terms.values()))


def advantages_of(algorithm, **changes):
    values = [np.array([0.1, 0.2, 0.4, 0.5])] * 6
    reward = np.array([1.0, 0, 1, 1, 0.3, 0.35])
    samples = Samples(
        reward_N=reward, group_N=np.array([0, 0, 1, 1, 2, 2]), domains=["d"] * 6, masks=[np.ones(3, bool)] * 6,
        values=values, truncated_N=np.array([False, True] * 3), penalties=changes.pop("penalties", None),
    )  # fmt: skip
    got = plan_update(UpdateConfig(algorithm=algorithm, **changes), sparse=True).advantages(samples)
    return np.concatenate([*got.tokens, *(got.returns or []), got.keep_N])


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.kind)
def test_every_algorithm_has_a_finite_loss_and_advantages(algorithm):
    assert np.isfinite(loss_of(algorithm))
    assert np.isfinite(advantages_of(algorithm)).all()
    assert np.abs(advantages_of(algorithm)[:6]).max() > 0


TIGHT = Clip(low=0.01, high=0.01)
BASE = GroupBaseline(zero_variance="keep")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Grpo(), Grpo(clip=TIGHT)),
        (Grpo(), Grpo(clip=Clip(low=0.2, high=0.01))),
        (Grpo(), Grpo(clip=Clip(dual=1.05))),
        (DrGrpo(max_tokens=6), DrGrpo(max_tokens=6, clip=TIGHT)),
        (Rloo(), Rloo(clip=Clip())),
        (Rloo(clip=TIGHT), Rloo(clip=Clip())),
        (ReinforcePP(), ReinforcePP(clip=TIGHT)),
        (Dapo(), Dapo(clip=TIGHT)),
        (Gspo(), Gspo(clip=Clip())),
        (Cispo(), Cispo(ratio_cap=1.0)),
        (C3po(budget=9), C3po(budget=9, clip=TIGHT)),
        (Ppo(), Ppo(clip=TIGHT)),
        (Ppo(), Ppo(value_clip=0.0)),
        (Ppo(critic="shared", warmup_updates=0), Ppo(critic="shared", warmup_updates=0, value_coef=0.5)),
    ],
    ids=str,
)
def test_keys_of_the_loss(a, b):
    free = {"mismatch": MismatchConfig(weight="none", token_band=None, veto=0)}
    assert loss_of(a, **free) != pytest.approx(loss_of(b, **free), abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Grpo(), Grpo(baseline=GroupBaseline(zero_variance="mask"))),
        (Grpo(), Grpo(baseline=GroupBaseline(zero_variance="keep", scale="batch"))),
        (Grpo(baseline=BASE), Grpo(baseline=GroupBaseline(zero_variance="keep", std_floor=0.01))),
        (Grpo(baseline=BASE), Grpo(baseline=GroupBaseline(zero_variance="keep", tolerance=0.1))),
        (Dapo(), Dapo(baseline=BASE)),
        (Gspo(), Gspo(baseline=GroupBaseline(scale="none"))),
        (Cispo(), Cispo(baseline=GroupBaseline(scale="none"))),
        (C3po(budget=9), C3po(budget=9, baseline=GroupBaseline(scale="mean"))),
        (ReinforcePP(), ReinforcePP(group_baseline=True)),
        (Ppo(), Ppo(gamma=0.9)),
        (Ppo(), Ppo(lam=0.5)),
        (Ppo(), Ppo(length_adaptive=0.5)),
        (Ppo(), Ppo(bootstrap=True)),
    ],
    ids=str,
)
def test_keys_of_the_advantage(a, b):
    assert np.abs(advantages_of(a) - advantages_of(b)).max() > 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"kl": KlConfig(coef=0.1)},
        {"kl": KlConfig(coef=0.1, estimator="k2")},
        {"kl": KlConfig(coef=0.2)},
        {"entropy_coef": 0.1},
        {"mismatch": MismatchConfig(weight="none")},
        {"mismatch": MismatchConfig(weight="sequence")},
        {"mismatch": MismatchConfig(cap=1.1)},
        {"mismatch": MismatchConfig(token_band=(0.9, 1.1))},
        {"mismatch": MismatchConfig(sequence_band=(0.99, 1.01))},
        {"mismatch": MismatchConfig(veto=0.9)},
        {"mismatch": MismatchConfig(proximal="sampler", weight="none", token_band=None, veto=0)},
    ],
    ids=str,
)
def test_keys_that_all_algorithms_share(changes):
    assert loss_of(Grpo(), **changes) != pytest.approx(loss_of(Grpo()), abs=1e-6)


def test_plans():
    def plan(algorithm=Grpo(), sparse=True, **changes):
        return plan_update(UpdateConfig(algorithm=algorithm, **changes), sparse=sparse)

    assert not plan().needs_proximal
    assert plan(minibatches=2).needs_proximal
    assert plan(epochs=2).needs_proximal
    bypass = MismatchConfig(proximal="sampler", weight="none", token_band=None, veto=0)
    assert not plan(epochs=2, mismatch=bypass).needs_proximal
    assert plan().replays_sampler
    assert not plan(sparse=False).replays_sampler
    assert not plan(router=RouterConfig(replay="none")).replays_sampler
    r2 = plan(router=RouterConfig(replay="r2"), minibatches=2)
    assert r2.needs_routes
    assert not r2.replays_sampler
    assert not plan(router=RouterConfig(replay="r2")).needs_routes
    assert plan(kl=KlConfig(coef=0.1, placement="reward")).needs_reference
    assert not plan().needs_reference
    assert plan(C3po(budget=9)).budget == 9
    assert plan(DrGrpo(max_tokens=7)).constant == 7
    assert plan(DrGrpo(max_tokens=7)).budget is None
    assert plan(Dapo(overlong=Overlong(max_tokens=9, buffer=3))).overlong == Overlong(max_tokens=9, buffer=3)
    assert plan(Dapo()).dynamic_sampling
    assert not plan(Dapo(dynamic_sampling=False)).dynamic_sampling
    kinds = (Grpo(), ReinforcePP(), ReinforcePP(group_baseline=True), Ppo())
    assert [UpdateConfig(algorithm=a).compares_samples for a in kinds] == [True, False, True, False]
    assert plan(Ppo()).critic == "own"
    assert plan(Ppo(warmup_updates=3)).warmup_updates == 3
    assert [plan(a).aggregation for a in (Grpo(aggregation="prompt_mean"), Cispo(aggregation="prompt_mean"),
            Ppo(aggregation="prompt_mean"), ReinforcePP(aggregation="prompt_mean"))] == ["prompt_mean"] * 4  # fmt: skip
    with pytest.raises(UserError, match=r"plain REINFORCE, which takes one update per rollout batch, not .* = 4"):
        plan(Rloo(), minibatches=2, epochs=2)


def test_kl_in_the_reward_reaches_group_advantages():
    penalties = [np.full(3, -0.1 * i) for i in range(6)]
    assert np.abs(advantages_of(Grpo(), penalties=penalties) - advantages_of(Grpo())).max() > 0.1
    assert np.abs(advantages_of(Rloo(), penalties=penalties) - advantages_of(Rloo())).max() > 0.1
