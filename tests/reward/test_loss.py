"""Bradley-Terry: the oracles of algorithms.md section 3, pairs in packed rows, and TRL's RewardTrainer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon import parallel
from cabochon.batch import Batch
from cabochon.config import MeshConfig, StepConfig
from cabochon.learner import Learner, LearnerConfig
from cabochon.model import transformer as tf
from cabochon.model import value
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.model.hf_names import get_leaf, pieces, written_layout
from cabochon.ops import TokenOutputs
from cabochon.reward.data import Pair, batch_of
from cabochon.reward.loss import bradley_terry
from cabochon.reward.scorer import save_reward
from cabochon.testing import tiny_moe
from cabochon.tokenizer import ByteTokenizer

SMALL = {"vocab_size": 264, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
         "bos_id": 257, "eos_ids": (260, 258), "pad_id": 256}  # fmt: skip
LLAMA = ModelConfig(family="llama", ffn_dim=48, **SMALL)
QWEN3_MOE = ModelConfig(
    family="qwen3_moe", qk_norm="head", moe=MoeConfig(num_experts=4, top_k=2, ffn_dim=24), norm_eps=1e-6, **SMALL
)


def pair(chosen, rejected, margin=0.0, prompt="p"):
    ids = lambda x: np.array(x, np.int32)  # noqa: E731
    return Pair(where="here", prompt=prompt, chosen=ids(chosen), rejected=ids(rejected), margin=margin)


def outputs_of(batch, scores):
    """Scores at the ends, in order, and numbers that must not matter elsewhere."""
    values = np.full(batch.mask_BT.shape, 7.0, np.float32)
    values[np.asarray(batch.mask_BT) != 0] = scores
    zero = jnp.zeros(batch.mask_BT.shape)
    return TokenOutputs(zero, zero, None, jnp.asarray(values))


def on_device(rows, length):
    return jax.tree.map(jnp.asarray, batch_of(rows, length))


def terms(batch, scores, **settings):
    return {k: float(m.value) for k, m in bradley_terry(**settings)(outputs_of(batch, scores), batch).terms.items()}


def test_oracles():
    batch = on_device([[pair([1, 2], [1, 3])]], 6)
    assert terms(batch, [1.2, 0.4]) == pytest.approx({"ranking": 0.371101}, abs=1e-6)
    found = terms(batch, [1.2, 0.4], centre=0.01)
    assert found == pytest.approx({"ranking": 0.371101, "centring": 0.0256}, abs=1e-6)
    assert sum(found.values()) == pytest.approx(0.396701, abs=1e-6)
    margin = on_device([[pair([1, 2], [1, 3], margin=0.5)]], 6)
    assert terms(margin, [1.2, 0.4])["ranking"] == pytest.approx(0.554355, abs=1e-6)
    assert terms(margin, [1.2, 0.4], margin_scale=0.0)["ranking"] == pytest.approx(0.371101, abs=1e-6)

    def of_chosen(s):
        values = outputs_of(batch, [0.0, 0.4]).value_BT.at[0, 1].set(s)
        zero = jnp.zeros(batch.mask_BT.shape)
        return bradley_terry()(TokenOutputs(zero, zero, None, values), batch).terms["ranking"].value

    assert float(jax.grad(of_chosen)(1.2)) == pytest.approx(-0.310026, abs=1e-6)


def test_a_difference_of_thousands_gives_numbers():
    batch = on_device([[pair([1, 2], [1, 3])]], 6)
    assert terms(batch, [-3000.0, 3000.0])["ranking"] == pytest.approx(6000.0)
    assert terms(batch, [3000.0, -3000.0])["ranking"] == 0.0


def test_unpaired_labels_are_cross_entropy_against_the_label():
    batch = on_device([[pair([1, 2], []), pair([], [1, 3])]], 6)
    assert batch.segment_BT[0].tolist() == [1, 1, 4, 4, 0, 0]
    expected = (np.logaddexp(0, -0.7) + np.logaddexp(0, -0.2)) / 2
    assert terms(batch, [0.7, -0.2])["ranking"] == pytest.approx(expected, rel=1e-6)
    squares = (0.7**2 + 0.2**2) / 2
    assert terms(batch, [0.7, -0.2], centre=1.0)["centring"] == pytest.approx(squares, rel=1e-6)


def test_pairs_in_one_row_do_not_mix():
    pairs = [pair([1, 2], [1, 3, 4], margin=1.0), pair([5, 6, 7], [5, 8]), pair([9, 9], [])]
    packed = on_device([pairs], 16)
    apart = on_device([[p] for p in pairs], 16)
    scores = [0.3, -0.2, 1.5, 2.0, 0.1]
    for settings in ({}, {"centre": 0.1}):
        one, other = terms(packed, scores, **settings), terms(apart, scores, **settings)
        assert one == pytest.approx(other, rel=1e-6)
    metrics = bradley_terry()(outputs_of(packed, scores), packed).metrics
    assert float(metrics["accuracy"].value) == pytest.approx(2 / 3)
    assert float(metrics["score"].value) == pytest.approx(np.mean(scores), rel=1e-6)


def test_the_count_depends_on_the_batch_alone():
    batch = on_device([[pair([1, 2], [1, 3]), pair([4, 4], [])], []], 8)
    for scores in (0.0, [1.0, 2.0, 3.0]):
        assert float(bradley_terry()(outputs_of(batch, scores), batch).terms["ranking"].count) == 2


# ------------------------------------------------------------------------------------------------- through the learner


def random_pairs(n, seed=0, longest=9):
    draw = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        chosen, rejected = ([*draw.integers(1, 60, draw.integers(2, longest)), 62] for _ in range(2))
        out.append(pair(chosen, rejected, margin=float(draw.choice([0.0, 0.5]))))
    return out


def learner_of(model, rows, length, *, micro_batches=1, mesh=None, centre=0.01):
    step = StepConfig(batch_size=rows, sequence_length=length, micro_batches=micro_batches)
    return Learner(LearnerConfig(model=model, step=step, value=True), bradley_terry(centre=centre), mesh)


def params_of(model, seed=0):
    params = value.with_head(model, tf.init(model, jax.random.key(seed)))
    head = jax.random.normal(jax.random.key(seed + 1), (model.dim,))
    return {**params, value.KEY: {"w": head, "b": jnp.float32(0.3)}}


def stepped(learner, params, batch):
    """(loss terms, gradient norm, parameters after a step), on the host"""
    if learner.mesh is not None:
        batch = jax.device_put(batch, parallel.rows(learner.mesh))
    state, report = learner.step(learner.init_state(jax.tree.map(jnp.array, params)), batch)
    loss = {k: float(m.value) for k, m in report.loss.items()}
    return loss, float(report.grad_norm), jax.device_get(state.params)


def assert_same(one, other, tolerance=1e-5):
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert one[1] == pytest.approx(other[1], rel=tolerance)


def test_packed_is_unpacked_is_micro_batches_is_eight_devices():
    model = tiny_moe()
    pairs, params = random_pairs(16), params_of(tiny_moe())
    apart = batch_of([[p] for p in pairs], 24)
    packed = batch_of([[pairs[i], pairs[i + 8]] for i in range(8)], 48)
    one = stepped(learner_of(model, 16, 24), params, apart)
    assert one[1] > 0.1
    assert_same(stepped(learner_of(model, 8, 48), params, packed), one)
    assert_same(stepped(learner_of(model, 16, 24, micro_batches=4), params, apart), one)
    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    assert_same(stepped(learner_of(model, 8, 48, mesh=mesh), params, packed), one)


# ------------------------------------------------------------------------------------------------------------------ TRL


@pytest.mark.slow
@pytest.mark.parametrize("model", [LLAMA, QWEN3_MOE], ids=["llama", "qwen3_moe"])
def test_loss_and_gradients_are_those_of_trl(tmp_path, model):
    import datasets
    import torch
    import transformers
    import trl

    pairs, params = random_pairs(6, seed=3), params_of(model)
    params[value.KEY]["b"] = jnp.float32(0.0)  # their classifier has none
    save_reward(tmp_path / "rm", model, params, ByteTokenizer(), offset=0.0, chat=False, length=64)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    rows = [{"chosen_ids": p.chosen.tolist(), "rejected_ids": p.rejected.tolist(), "margin": p.margin} for p in pairs]
    trainer = trl.RewardTrainer(
        model=theirs,
        args=trl.RewardConfig(
            output_dir=str(tmp_path), center_rewards_coefficient=0.01, use_cpu=True, report_to=[], bf16=False,
            gradient_checkpointing=False,
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "rm"),
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    loss = trainer.compute_loss(theirs, trainer.data_collator(rows))
    loss.backward()

    learner = learner_of(model, 2, 64)
    batch = on_device([pairs[:3], pairs[3:]], 64)

    def ours(params):
        found = learner.loss_fn(learner.outputs(params, batch).tokens, batch).terms
        return sum(m.value for m in found.values())

    got, gradients = jax.value_and_grad(ours)(params)
    assert float(got) == pytest.approx(loss.item(), abs=1e-5)
    named = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    head = np.asarray(gradients[value.KEY]["w"])
    assert np.abs(named.pop("score.weight")[0] - head).max() < 1e-5 * max(1.0, np.abs(head).max())
    seen = 0  # gradients are as large as 6, so 1e-5 is relative where they exceed 1
    for piece in pieces(model, replace(written_layout(model), fused=model.moe is not None)):
        leaf = np.asarray(get_leaf(gradients, piece.leaf))[piece.index]
        expected = named.pop(piece.name)
        assert np.abs(piece.to_theirs(leaf) - expected).max() < 1e-5 * max(1.0, np.abs(expected).max()), piece.name
        seen += np.abs(expected).max() > 1e-4
    assert named == {}
    assert seen > 8


def test_a_batch_of_pairs_has_its_mask_and_margin_at_the_ends():
    batch: Batch = batch_of([[pair([1, 2, 3], [1, 4], margin=0.5)]], 8)
    assert batch.tokens_BT[0].tolist() == [1, 2, 3, 1, 4, 0, 0, 0]
    assert batch.segment_BT[0].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert batch.mask_BT[0].tolist() == [0, 0, 1, 0, -1, 0, 0, 0]
    assert batch.margin_BT[0].tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0]
