"""Rollouts become batches: masks, log-probs and routes beside their tokens, the same loss however they are laid out."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from cabochon import parallel
from cabochon.config import AuxLossConfig, MeshConfig, OptimConfig, StepConfig
from cabochon.errors import UserError
from cabochon.learner import Learner, LearnerConfig
from cabochon.model import transformer as tf
from cabochon.rl.advantages import Advantages
from cabochon.rl.batching import layout, minibatches, samples, to_batch
from cabochon.rl.config import C3po, Clip, Grpo, Gspo, KlConfig, MismatchConfig, Ppo, UpdateConfig
from cabochon.rl.recipe import rows_needed
from cabochon.rl.update import plan_update
from cabochon.testing import tiny_moe
from cabochon.types import Completion, Rollout, Task

MODEL = tiny_moe(num_layers=2, layer_kinds=("moe", "moe"))


def rollout(i, prompt, tokens, mask=None, *, group=0, seed=0, finish="stop", routes=False):
    rng = np.random.default_rng((seed, i))
    t = tokens if isinstance(tokens, int) else len(tokens)
    ids = rng.integers(0, 64, t).astype(np.int32) if isinstance(tokens, int) else np.array(tokens, np.int32)
    mask = np.ones(t, bool) if mask is None else np.array(mask, bool)
    drawn = lambda n: np.argsort(rng.random((n, 2, 4)), -1)[..., :2].astype(np.int8)  # noqa: E731
    completion = Completion(
        tokens=ids, logprobs=np.where(mask, -rng.uniform(0.5, 6, t), 0).astype(np.float32), mask=mask, text="",
        finish=finish, policy_version=np.zeros(t, np.int32), prompt_tokens=np.arange(prompt, dtype=np.int32),
        routes=drawn(t) if routes else None, prompt_routes=drawn(prompt) if routes else None,
    )  # fmt: skip
    return Rollout(task=Task(id=f"t/{i}", prompt="", verifier="math"), completion=completion, group=group)


def step(batch_size=2, length=12, micro=1):
    return StepConfig(batch_size=batch_size, sequence_length=length, micro_batches=micro)


def test_prompt_and_completion_in_a_row():
    """The prompt but for its last token, then that token and the completion, which continue it."""
    data = [rollout(0, 2, [7, 8, 9], [1, 0, 1]), rollout(1, 1, [5])]
    at = layout(data, step(1, 8))
    assert at.rows == [[2, 0, 1]]
    batch = to_batch(data, at)
    np.testing.assert_array_equal(batch.tokens_BT, [[0, 1, 7, 8, 9, 0, 5, 0]])
    np.testing.assert_array_equal(batch.segment_BT, [[1, 2, 2, 2, 2, 3, 3, 0]])
    np.testing.assert_array_equal(batch.prefix_BT, [[0, 1, 1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.position_BT, [[0, 1, 2, 3, 4, 0, 1, 0]])
    np.testing.assert_array_equal(batch.mask_BT, [[0, 0, 1, 0, 1, 0, 1, 0]])
    drawn = np.concatenate([data[0].completion.logprobs, [0], data[1].completion.logprobs])
    np.testing.assert_array_equal(batch.logp_behaviour_BT[0, 2:7], drawn)
    for got, r in zip(at.from_rows(batch.tokens_BT), data, strict=True):
        np.testing.assert_array_equal(got, r.completion.tokens)
    np.testing.assert_array_equal(at.states(batch.tokens_BT)[0], [1, 7, 8, 9])
    np.testing.assert_array_equal(at.states(batch.tokens_BT)[1], [0, 5])


def test_a_prompt_is_read_once_for_all_completions_that_fit_beside_it():
    data = [rollout(i, 5, n) for i, n in enumerate([3, 2, 4, 1])]
    at = layout(data, step(2, 12))
    assert at.rows == [[4, 0, 1], [5, 2, 3]]
    batch = to_batch(data, at)
    np.testing.assert_array_equal(batch.position_BT[0], [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 0])
    np.testing.assert_array_equal(batch.prefix_BT[0], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0])
    routed = [rollout(i, 5, n, routes=True) for i, n in enumerate([3, 2])]
    assert layout(routed, step(2, 12)).rows == [[2, 0], [3, 1]], "read through other experts, so not the same"


def test_routes_of_prompt_and_completion_lie_beside_their_tokens():
    data = [rollout(0, 2, 3, routes=True)]
    batch = to_batch(data, layout(data, step(1, 8)), routes=True)
    c = data[0].completion
    np.testing.assert_array_equal(batch.routes_BTLC[0, :5], np.concatenate([c.prompt_routes, c.routes]))
    assert (batch.routes_BTLC[0, 5:] == -1).all()
    plain = [rollout(0, 2, 3)]
    with pytest.raises(UserError, match=r"task t/0: no routes were recorded; router\.replay=r3 needs them"):
        to_batch(plain, layout(plain, step(1, 8)), routes=True)


def test_the_worst_case_of_rows_is_never_exceeded():
    rng = np.random.default_rng(0)
    for _ in range(200):
        length, longest = 24, int(rng.integers(3, 25))
        groups, size = (int(n) for n in rng.integers(1, 7, 2))
        prompts = rng.integers(1, longest, groups)
        data = [
            rollout(g, int(p), int(rng.integers(1, longest - p + 1)), group=g)
            for g, p in enumerate(prompts)
            for _ in range(size)
        ]
        layout(data, step(rows_needed(groups, size, longest, length), length))
    assert rows_needed(2, 5, 12, 24) == 6
    with pytest.raises(ValueError, match=r"25 tokens do not fit step\.sequence_length=24"):
        rows_needed(1, 1, 25, 24)


def test_too_many_rows_are_refused_with_a_remedy():
    data = [rollout(i, 2, 8) for i in range(3)]
    with pytest.raises(UserError, match=r"3 completions need 3 rows of 12 tokens; expected at most step\.batch_size=2"):
        layout(data, step())


def test_rows_fill_one_micro_batch_after_the_other():
    data = [rollout(i, 2, 8) for i in range(3)]
    at = layout(data, step(8, 12, micro=4))
    assert at.completions == [[0], [2], [], [], [1], [], [], []]  # part m has the rows that are m modulo 4


def plan(algorithm, **changes):
    return plan_update(UpdateConfig(algorithm=algorithm, **changes), sparse=False)


def constant(data, value=1.0, keep=None):
    tokens = [value * r.completion.mask.astype(np.float32) for r in data]
    return Advantages(tokens=tokens, keep_N=np.ones(len(data), bool) if keep is None else np.array(keep, bool))


def test_what_is_not_kept_is_in_no_batch_and_groups_stay_whole():
    data = [rollout(i, 1, 3, group=i // 2) for i in range(8)]
    keep = [1, 1, 1, 0, 1, 1, 0, 0]
    made = minibatches(data, constant(data, keep=keep), plan(Grpo()), step(4, 12), 2, np.random.default_rng(0))
    members = [sorted(m.members) for m in made]
    assert sorted(i for m in members for i in m) == [0, 1, 2, 4, 5]
    assert not any({0, 1} & set(m) and not {0, 1} <= set(m) for m in members)
    assert [m.trained_tokens for m in made] == [3 * len(m) for m in members]
    nothing = minibatches(data, constant(data, keep=[0] * 8), plan(Grpo()), step(), 2, np.random.default_rng(0))
    assert nothing == []
    again = minibatches(data, constant(data, keep=keep), plan(Grpo()), step(4, 12), 2, np.random.default_rng(0))
    assert [m.members for m in again] == [m.members for m in made]
    firsts = [minibatches(data, constant(data), plan(Grpo()), step(4, 12), 2, np.random.default_rng(seed))[0].members
              for seed in range(20)]  # fmt: skip
    assert len({frozenset(members) for members in firsts}) == 6, "any two of the four groups"


def test_a_budget_cuts_the_last_response_and_drops_what_follows():
    data = [rollout(i, 1, 4, group=i) for i in range(4)]
    update = plan(C3po(budget=10))
    (made,) = minibatches(data, constant(data), update, step(4, 12), 1, np.random.default_rng(3))
    assert made.trained_tokens == 10
    assert made.fill == 1.6
    assert made.at.lengths == [4, 4, 2], "what lies behind the last trained token is not computed"
    assert made.batch.divisor_B.sum() == pytest.approx(10)
    assert (made.batch.mask_BT > 0).sum() == 10
    under = minibatches(data, constant(data), plan(C3po(budget=32)), step(4, 12), 1, np.random.default_rng(3))[0]
    assert under.fill == 0.5
    assert under.batch.divisor_B.sum() == pytest.approx(32)


def test_tokens_behind_the_last_sampled_one_are_left_out():
    data = [rollout(0, 1, 6, [1, 0, 1, 1, 0, 0]), rollout(1, 1, 2)]
    (made,) = minibatches(data, constant(data), plan(Grpo()), step(2, 12), 1, np.random.default_rng(0))
    assert dict(zip(made.members, made.at.lengths, strict=True)) == {0: 4, 1: 2}
    row = made.batch.mask_BT[made.batch.mask_BT > 0]
    np.testing.assert_allclose(sorted(row), [1 / 3] * 3 + [1 / 2] * 2)
    assert made.batch.divisor_B.sum() == 2


def test_truncation_and_domains_reach_the_estimator():
    data = [rollout(0, 1, 2, finish="length"), rollout(1, 1, 2, group=3)]
    got = samples(data, np.array([1.0, np.nan]))
    np.testing.assert_array_equal(got.truncated_N, [True, False])
    np.testing.assert_array_equal(got.group_N, [0, 3])
    assert got.domains == ["default", "default"]


# -- through the learner -----------------------------------------------------------------------------------------------

PLAIN = OptimConfig(learning_rate=1.0, clip_norm=0, eps=1.0)  # first update g / (|g| + 1): parameters show the gradient
EVERYTHING = UpdateConfig(
    algorithm=Ppo(critic="shared", warmup_updates=0, value_coef=0.5, aggregation="prompt_mean"),
    kl=KlConfig(coef=0.3),
    entropy_coef=0.1,
    mismatch=MismatchConfig(weight="sequence", token_band=None, sequence_band=(0.2, 5.0), veto=0),
    minibatches=2,
)
DATA = [rollout(i, 2 + i % 3, 3 + (5 * i) % 7, group=i // 2, routes=True) for i in range(8)]


def one_step(cfg, shape, mesh=None, value=False, seed=0, data=DATA, balance=0.01):
    """(updated parameters, report) from fixed advantages, proximal, reference and value arrays per completion."""
    update = plan_update(cfg, sparse=True)
    rng = np.random.default_rng(seed)
    per = lambda low, high, extra=0: [rng.uniform(low, high, len(r.completion.tokens) + extra) for r in data]  # noqa: E731
    advantages = Advantages(tokens=per(-1, 1), keep_N=np.ones(8, bool), returns=per(-1, 1))
    reference, values, proximal = per(-5, -3), per(-1, 1, 1), per(-4.5, -4)
    learner = Learner(
        LearnerConfig(
            model=MODEL, step=shape, optim=PLAIN, entropy=True, value=value, aux=AuxLossConfig(balance=balance)
        ),
        update.loss,
        mesh,
    )
    (made,) = minibatches(
        data, advantages, update, shape, 1, np.random.default_rng(0), reference=reference, values=values
    )
    batch = replace(made.batch, logp_proximal_BT=made.at.to_rows([proximal[i] for i in made.members]))
    placed = batch if mesh is None else jax.device_put(batch, parallel.rows(mesh))
    state, report = learner.step(learner.init_state(tf.init(MODEL, jax.random.key(0))), placed)
    return jax.device_get(state.params), jax.device_get(report), made


def assert_same(a, b):
    for name, want in a[1].loss.items():
        np.testing.assert_allclose(b[1].loss[name].value, want.value, rtol=2e-5, err_msg=name)
    for name, want in a[1].metrics.items():
        np.testing.assert_allclose(b[1].metrics[name].value, want.value, rtol=1e-4, atol=1e-6, err_msg=name)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a[0], b[0])


def test_packing_micro_batches_and_devices_change_nothing():
    alone = one_step(EVERYTHING, step(8, 12), value=True)
    packed = one_step(EVERYTHING, step(8, 24, micro=4), value=True)
    assert sum(bool(r) for r in packed[2].at.rows) < 8, "rows are shared, and some are empty"
    assert set(alone[1].loss) == {"policy", "kl", "entropy", "value", "balance"}
    assert_same(alone, packed)
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    assert_same(alone, one_step(EVERYTHING, step(8, 12), mesh, value=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [Grpo(clip=Clip(dual=3)), Gspo(clip=Clip(low=0.05, high=0.05)), C3po(budget=30)],
    ids=lambda a: a.kind,
)
def test_packing_changes_no_algorithm(algorithm):
    cfg = UpdateConfig(algorithm=algorithm, minibatches=2)
    alone = one_step(cfg, step(8, 12))
    assert_same(alone, one_step(cfg, step(8, 24, micro=2)))
    assert_same(alone, one_step(cfg, step(8, 12), parallel.make_mesh(MeshConfig(fsdp=8))))


def test_a_shared_prompt_changes_nothing():
    """All but the balance of the experts, which counts a prompt as often as it is read."""
    data = [rollout(i, 6 + i // 4, 3 + (5 * i) % 7, group=i // 4) for i in range(8)]
    cfg = EVERYTHING.model_copy(update={"router": EVERYTHING.router.model_copy(update={"replay": "none"})})
    alone = one_step(cfg, step(8, 16), value=True, data=data, balance=0)
    shared = one_step(cfg, step(4, 40, micro=2), value=True, data=data, balance=0)
    assert [len(made[2].at.prompts) for made in (alone, shared)] == [7, 2], "times that a prompt is read"
    assert_same(alone, shared)
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    assert_same(alone, one_step(cfg, step(4, 40), mesh, value=True, data=data, balance=0))


def test_replayed_routes_are_used_and_still_train_the_router():
    cfg = UpdateConfig(algorithm=Grpo())
    params, report, _ = one_step(cfg, step(8, 12))
    natural, _, _ = one_step(cfg.model_copy(update={"router": cfg.router.model_copy(update={"replay": "none"})}),
                             step(8, 12))  # fmt: skip
    router = lambda p: p["blocks"]["0"]["0"]["moe"]["router"]["w"]  # noqa: E731
    start = jax.device_get(tf.init(MODEL, jax.random.key(0)))
    assert np.abs(router(params) - router(start)).max() > 1e-4
    assert np.abs(router(params) - router(natural)).max() > 1e-4
    agreement = report.router.agree / report.router.tokens
    assert (agreement < 0.6).all(), "random routes are seldom the natural ones"
