"""The one train step: micro-batches, LoRA, router losses, non-finite stops, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon import parallel
from cabochon.batch import Batch, best_fit, from_sequences
from cabochon.config import AuxLossConfig, LoraConfig, MeshConfig, OptimConfig, PrecisionConfig, StepConfig
from cabochon.errors import UserError
from cabochon.learner import Learner, LearnerConfig, Loss, NonFiniteError, check, cross_entropy
from cabochon.model import transformer as tf
from cabochon.model.config import MoeConfig
from cabochon.model.value import values, with_head, without_head
from cabochon.ops import Mean, before
from cabochon.testing import tiny_config, tiny_moe

MODEL = tiny_moe(num_layers=2, layer_kinds=("moe", "moe"))
PLAIN = OptimConfig(learning_rate=1.0, clip_norm=0, eps=1.0)  # first update g / (|g| + 1): parameters show the gradient


def sequences(n=8, length=12, vocab=64, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, k).astype(np.int32) for k in rng.integers(3, length + 1, n)]


def batch(n=8, length=12, rows=None):
    tokens = sequences(n, length)
    masks = [(np.arange(len(t)) % 3 > 0).astype(np.float32) for t in tokens]
    return from_sequences(tokens, masks, length, rows=rows)


def config(model=MODEL, micro=1, **changes):
    base = {"optim": PLAIN, "step": StepConfig(batch_size=8, sequence_length=12, micro_batches=micro)}
    return LearnerConfig(model=model, **(base | changes))


def run(cfg, data, loss=cross_entropy, seed=0):
    learner = Learner(cfg, loss)
    state = learner.init_state(tf.init(cfg.model, jax.random.key(seed)))
    return learner.step(state, data)


def assert_same_update(a, b, seed=0, tolerance=1e-6):
    """The two updates from the same start differ by at most `tolerance` of their size (Euclidean, over all tensors)."""
    flat = lambda params: np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(params)])  # noqa: E731
    start = tf.init(a[0], jax.random.key(seed))
    start = flat(with_head(a[0], start) if "value" in a[1].params else start)
    update, other = flat(a[1].params) - start, flat(b[1].params) - start
    assert np.linalg.norm(update) > 0.1
    assert np.linalg.norm(update - other) <= tolerance * np.linalg.norm(update)


@pytest.mark.parametrize(
    "aux",
    [AuxLossConfig(balance=0.5, router_z=0.1, simbal=0.01)],
    ids=["all router losses, balance over the whole batch"],
)
def test_micro_batches_equal_one_big_batch(aux):
    one, want = run(config(aux=aux), batch())
    four, got = run(config(micro=4, aux=aux), batch())
    assert_same_update((MODEL, one), (MODEL, four))
    for name in ("nll", "router_z"):
        np.testing.assert_allclose(got.loss[name].value, want.loss[name].value, rtol=1e-6)
    np.testing.assert_allclose(got.router.natural_E, want.router.natural_E, atol=1e-4)
    micro, _ = run(config(micro=4, aux=aux.model_copy(update={"balance_scope": "micro"})), batch())
    router = lambda s: s.params["blocks"]["0"]["0"]["moe"]["router"]["w"]  # noqa: E731
    assert float(jnp.abs(router(micro) - router(one)).max()) > 1e-5, "balance per micro-batch is another objective"


def test_packed_rows_give_the_loss_and_update_of_padded_ones():
    tokens = sequences(6, 8)
    masks = [np.ones(len(t)) for t in tokens]
    bins = best_fit([len(t) for t in tokens], 24)
    padded = from_sequences(tokens, masks, 24)
    packed = from_sequences(tokens, masks, 24, rows=bins)
    aux = AuxLossConfig(balance=0.5)
    a, ra = run(config(step=StepConfig(batch_size=6, sequence_length=24), aux=aux), padded)
    b, rb = run(config(step=StepConfig(batch_size=len(bins), sequence_length=24), aux=aux), packed)
    np.testing.assert_allclose(ra.loss["nll"].value, rb.loss["nll"].value, rtol=1e-6)
    assert_same_update((MODEL, a), (MODEL, b), tolerance=1e-5)


def test_cross_entropy_is_the_mean_over_masked_tokens_of_the_whole_batch():
    data = batch()
    state = Learner(config(), cross_entropy).init_state(tf.init(MODEL, jax.random.key(0)))
    out = tf.forward(
        MODEL, state.params, *(jnp.asarray(x) for x in (data.tokens_BT, data.position_BT, data.segment_BT))
    )
    logp = jax.nn.log_softmax(tf.logits(MODEL, state.params, out.hidden_BTD))
    picked = np.take_along_axis(np.asarray(logp)[:, :-1], data.tokens_BT[:, 1:, None], -1)[..., 0]
    want = -(picked * data.mask_BT[:, 1:]).sum() / data.mask_BT.sum()
    _, report = run(config(), data)
    np.testing.assert_allclose(report.loss["nll"].value, want, rtol=1e-5)


def test_logit_chunks_change_nothing():
    a, _ = run(config(), batch())
    b, _ = run(config(step=StepConfig(batch_size=8, sequence_length=12, logit_chunk=40)), batch())
    assert_same_update((MODEL, a), (MODEL, b))


def test_lora_trains_its_own_leaves_alone_and_starts_as_the_same_function():
    cfg = config(model=tiny_config(), lora=LoraConfig(rank=2, targets=("qkv", "down")))
    params = tf.init(cfg.model, jax.random.key(0))
    before = jax.tree.map(np.asarray, params)
    state, report = run(cfg, batch())
    plain, plain_report = run(config(model=tiny_config()), batch())
    np.testing.assert_allclose(report.loss["nll"].value, plain_report.loss["nll"].value, rtol=1e-6)
    block = state.params["blocks"]["0"]["0"]
    np.testing.assert_array_equal(block["attn"]["qkv"]["w"], before["blocks"]["0"]["0"]["attn"]["qkv"]["w"])
    np.testing.assert_array_equal(state.params["embed"]["table"], before["embed"]["table"])
    assert float(jnp.abs(block["attn"]["qkv"]["lora_b"]).max()) > 0
    assert "lora_a" not in block["attn"]["out"]
    sizes = [x.size for x in jax.tree.leaves(state.opt_state)]
    assert sum(sizes) < 0.2 * sum(x.size for x in jax.tree.leaves(plain.opt_state))


def test_lora_target_that_is_no_matrix():
    cfg = config(model=tiny_config(), lora=LoraConfig(targets=("q_proj",)))
    with pytest.raises(
        UserError, match="'q_proj' names no matrix of this model; expected some of down, gate_up, out, qkv"
    ):
        Learner(cfg, cross_entropy).init_state(tf.init(cfg.model, jax.random.key(0)))


def test_selection_bias_moves_by_the_rule_and_not_by_gradient():
    model = tiny_moe(
        num_layers=2, layer_kinds=("moe", "moe"), moe=MoeConfig(num_experts=4, top_k=2, ffn_dim=8, aux_free_bias=True)
    )
    state, report = run(config(model=model, aux=AuxLossConfig(bias_update_rate=0.01)), batch())
    natural = np.asarray(report.router.natural_E)
    step = 0.01 * np.sign(natural.mean(-1, keepdims=True) - natural)
    want = step - step.mean(-1, keepdims=True)
    np.testing.assert_allclose(state.params["blocks"]["0"]["0"]["moe"]["router"]["bias"], want, atol=1e-7)
    still, _ = run(config(model=model), batch())
    assert not np.asarray(still.params["blocks"]["0"]["0"]["moe"]["router"]["bias"]).any()


def test_non_finite_stops_with_step_and_tensor_and_keeps_the_state():
    cfg = config(model=tiny_config())
    learner = Learner(cfg, cross_entropy)
    params = tf.init(cfg.model, jax.random.key(0))
    state = learner.init_state(params)
    state, report = learner.step(state, batch())
    check(report, 0)
    params = jax.tree.map(np.asarray, state.params)
    params["blocks"]["0"]["0"]["mlp"]["down"]["w"] = np.full_like(
        params["blocks"]["0"]["0"]["mlp"]["down"]["w"], np.nan
    )
    bad = learner.init_state(params)
    bad, report = learner.step(bad, batch())
    with pytest.raises(
        NonFiniteError, match=r"step 7: loss term 'nll' is not finite; first of \d+ tensors .*: blocks\.0\.0\.attn"
    ):
        check(report, 7)
    assert int(bad.step) == 0
    np.testing.assert_array_equal(bad.params["embed"]["table"], params["embed"]["table"])


def test_a_term_without_tokens_adds_nothing():
    data = batch()
    empty = Batch(**{**vars(data), "mask_BT": np.zeros_like(data.mask_BT)})
    _, report = run(config(model=tiny_config()), empty)
    assert float(report.loss["nll"].value) == 0
    assert float(report.grad_norm) == 0
    check(report, 0)


def test_two_terms_have_counts_of_their_own():
    def two(outputs, data):
        first = data.mask_BT * (data.position_BT < 4)
        return Loss(
            {
                "all": Mean((-outputs.logp_BT * data.mask_BT).sum(), data.mask_BT.sum()),
                "early": Mean(0.5 * (-outputs.logp_BT * first).sum(), first.sum()),
            },
            {"tokens": Mean(data.mask_BT.sum(), jnp.ones(()))},
        )

    model = tiny_config()
    one, want = run(config(model=model), batch(), two)
    four, got = run(config(model=model, micro=4), batch(), two)
    assert_same_update((model, one), (model, four))
    np.testing.assert_allclose(got.loss["early"].value, want.loss["early"].value, rtol=1e-6)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_it_learns_a_repeating_text(compute):
    tokens = [np.tile(np.arange(s, s + 4), 3).astype(np.int32) for s in range(8)]
    data = from_sequences(tokens, [np.ones(12)] * 8, 12)
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=5)
    learner = Learner(config(optim=optim, precision=PrecisionConfig(compute=compute)), cross_entropy)
    state = learner.init_state(tf.init(MODEL, jax.random.key(0)))
    losses = []
    for _ in range(60):
        state, report = learner.step(state, data)
        losses.append(float(report.loss["nll"].value))
    assert losses[0] > 3
    assert losses[-1] < 0.5
    assert state.params["embed"]["table"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("model", "aux", "said"),
    [
        (tiny_config(), AuxLossConfig(balance=0.01), r"aux\.balance=0\.01 needs a sparse model, this one is dense"),
        (
            MODEL,
            AuxLossConfig(bias_update_rate=0.1),
            r"aux\.bias_update_rate=0\.1 needs a model with moe\.aux_free_bias",
        ),
    ],
)
def test_router_keys_with_nothing_to_act_on_are_refused(model, aux, said):
    with pytest.raises(UserError, match=said):
        Learner(config(model=model, aux=aux), cross_entropy)


def test_a_gradient_norm_that_overflows_stops():
    def steep(outputs, data):
        loss = cross_entropy(outputs, data)
        nll = loss.terms["nll"]
        return Loss({"nll": Mean(nll.total * 1e25, nll.count)}, {})

    state, report = run(config(model=tiny_config()), batch(), steep)
    assert int(state.step) == 0
    with pytest.raises(NonFiniteError, match="gradients are finite, their global norm is inf"):
        check(report, 3)


def test_a_batch_of_another_shape_is_refused():
    with pytest.raises(
        UserError, match=r"the batch is \(8, 9\), expected step\.batch_size, step\.sequence_length \(8, 12\)"
    ):
        run(config(model=tiny_config()), from_sequences(sequences(8, 9), [np.ones(len(t)) for t in sequences(8, 9)], 9))


def regress(outputs, data):
    """The value of the state before each token is to be that token's id over 64."""
    error = before(outputs.value_BT, data.segment_BT) - data.tokens_BT / 64.0
    nll = cross_entropy(outputs, data).terms["nll"]
    return Loss({"value": Mean((error**2 * data.mask_BT).sum(), data.mask_BT.sum()), "nll": nll}, {})


def test_a_value_head_starts_at_zero_and_learns():
    cfg = config(value=True, optim=OptimConfig(learning_rate=1e-2))
    learner = Learner(cfg, regress)
    state = learner.init_state(tf.init(MODEL, jax.random.key(0)))
    assert not np.asarray(learner.score(state.params, batch()).tokens.value_BT).any()
    losses = []
    for _ in range(40):
        state, report = learner.step(state, batch())
        losses.append(float(report.loss["value"].value))
    data = batch()
    want = ((data.tokens_BT / 64.0) ** 2 * data.mask_BT).sum() / data.mask_BT.sum()
    assert losses[0] == pytest.approx(want, rel=1e-5)
    assert losses[-1] < 0.2 * losses[0]
    inputs = (jnp.asarray(x) for x in (data.tokens_BT, data.position_BT, data.segment_BT))
    out = tf.forward(MODEL, without_head(state.params), *inputs)
    read = jnp.where(data.segment_BT != 0, values(state.params["value"], out.hidden_BTD), 0.0)
    np.testing.assert_allclose(learner.score(state.params, data).tokens.value_BT, read, atol=1e-5)
    plain = Learner(config(), cross_entropy).init_state(state.params)
    assert jax.tree.structure(plain.params) == jax.tree.structure(without_head(state.params))


@pytest.mark.parametrize("mesh", [None, (1, 2, 2, 2)])
def test_a_value_head_over_micro_batches_and_devices(mesh):
    cfg = config(value=True)
    data, cut = batch(), config(value=True, micro=1 if mesh else 4)
    one, want = run(cfg, data, regress)
    axes = ("data", "fsdp", "expert", "tensor")
    learner = Learner(cut, regress, mesh and parallel.make_mesh(MeshConfig(**dict(zip(axes, mesh, strict=True)))))
    other, got = learner.step(learner.init_state(tf.init(MODEL, jax.random.key(0))), data)
    assert_same_update((MODEL, one), (MODEL, other), tolerance=1e-5)
    np.testing.assert_allclose(got.loss["value"].value, want.loss["value"].value, rtol=1e-5)
    if mesh:
        assert other.params["value"]["w"].sharding == learner.abstract_state().params["value"]["w"].sharding


def test_lora_trains_the_value_head_too():
    model = tiny_config()
    state, _ = run(config(model=model, lora=LoraConfig(rank=2), value=True), batch(), regress)
    assert np.abs(state.params["value"]["b"]) > 0.1
    np.testing.assert_array_equal(state.params["embed"]["table"], tf.init(model, jax.random.key(0))["embed"]["table"])


def test_micro_batches_of_padding_are_skipped_and_change_nothing():
    data = batch(4)
    pad = lambda x: np.concatenate([x, np.zeros_like(x)])[[0, 4, 1, 5, 2, 6, 3, 7]]  # noqa: E731  part 1 of 2 is empty
    padded = Batch(**{k: None if v is None else pad(v) for k, v in vars(data).items()})
    aux = AuxLossConfig(balance=0.5, router_z=0.1, simbal=0.01)
    a, want = run(config(aux=aux, step=StepConfig(batch_size=4, sequence_length=12)), data)
    b, got = run(config(micro=2, aux=aux), padded)
    assert_same_update((MODEL, a), (MODEL, b))
    for name in want.loss:
        np.testing.assert_allclose(got.loss[name].value, want.loss[name].value, rtol=1e-6)


def test_scores_are_the_step_s_own_log_probs_whatever_the_micro_batches():
    def difference(outputs, data):
        gap = jnp.abs(outputs.logp_BT - data.logp_proximal_BT)
        return Loss({"gap": Mean(gap.sum(), jnp.ones(()))}, {})

    learner = Learner(config(micro=2, entropy=True), difference)
    state = learner.init_state(tf.init(MODEL, jax.random.key(0)))
    data = batch()
    tokens, routes, stats = learner.score(state.params, data)
    whole = Learner(config(entropy=True), difference).score(state.params, data)
    np.testing.assert_allclose(tokens.logp_BT, whole.tokens.logp_BT, atol=1e-5)
    np.testing.assert_allclose(tokens.entropy_BT, whole.tokens.entropy_BT, atol=1e-5)
    np.testing.assert_array_equal(np.sort(routes), np.sort(whole.routes_BTLC))
    np.testing.assert_array_equal(stats.natural_E, whole.stats.natural_E)
    known = Batch(**{**vars(data), "logp_proximal_BT": tokens.logp_BT, "routes_BTLC": routes})
    _, report = learner.step(state, known)
    assert float(report.loss["gap"].total) == 0.0, "the ratio of the first update is 1, bit for bit"


def test_what_a_loss_says_of_tokens_comes_back_at_their_places_whatever_the_micro_batches():
    def telling(outputs, data):
        return cross_entropy(outputs, data)._replace(tokens={"logp": outputs.logp_BT})

    data = batch(4)
    _, whole = run(config(step=StepConfig(batch_size=4, sequence_length=12)), data, telling)
    pad = lambda x: np.concatenate([x, np.zeros_like(x)])[[0, 4, 1, 5, 2, 6, 3, 7]]  # noqa: E731  part 1 of 2 is empty
    padded = Batch(**{k: None if v is None else pad(v) for k, v in vars(data).items()})
    want = np.asarray(whole.tokens["logp"])
    assert np.ptp(want) > 0.1
    for micro in (2, 4):
        _, cut = run(config(micro=micro), padded, telling)
        np.testing.assert_allclose(cut.tokens["logp"], pad(want), atol=1e-5)


def test_a_frozen_router_stays_while_the_rest_moves():
    start = jax.tree.map(np.asarray, tf.init(MODEL, jax.random.key(0)))["blocks"]["0"]["0"]["moe"]
    state, _ = run(config(freeze_router=True), batch())
    moe = state.params["blocks"]["0"]["0"]["moe"]
    np.testing.assert_array_equal(moe["router"]["w"], start["router"]["w"])
    assert np.abs(moe["down"] - start["down"]).max() > 1e-3
    with pytest.raises(UserError, match=r"router\.freeze=true needs a sparse model"):
        Learner(config(model=tiny_config(), freeze_router=True), cross_entropy)
