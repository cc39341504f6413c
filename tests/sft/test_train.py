"""The stage: what it writes opens again, and what it measures is right."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from cabochon import parallel
from cabochon.config import PolicyConfig
from cabochon.errors import UserError
from cabochon.learner import Learner, NonFiniteError, cross_entropy
from cabochon.model import transformer as tf
from cabochon.policy import learner_config, open_policy
from cabochon.sft.config import SftConfig
from cabochon.sft.data import Feed, Position, Split, read_splits
from cabochon.sft.train import evaluate, feed_of, main
from cabochon.testing import tiny_moe
from cabochon.tokenizer import ByteTokenizer

TOK = ByteTokenizer()
MODEL = tiny_moe(
    family="qwen3_moe", vocab_size=264, num_layers=2, layer_kinds=("moe", "moe"), head_dim=8, eos_ids=(260, 258),
    moe=tiny_moe().moe.model_copy(update={"shared_ffn_dim": 0}),
)  # fmt: skip


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """120 sums of one digit."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    draw = random.Random(0)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(120)]
    file.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n" for a, b in pairs))
    return file


def config(place, sums, **changes):
    base = {
        "model": {"scratch": MODEL.model_dump(mode="json")},
        "data": {"train": str(sums), "eval_fraction": 0.2},
        "eval": {"every": 4},
        "step": {"batch_size": 8, "sequence_length": 24},
        "optim": {"learning_rate": 3e-3, "schedule": "cosine", "total_steps": 40, "warmup_steps": 2},
        "aux": {"balance": 1e-2, "router_z": 1e-3},
        "run": {"dir": str(place), "save_every": 3, "peak_tflops": 1.0},
        "steps": 10,
    }
    return SftConfig.model_validate(base | changes)


def rows(place):
    out = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    for row in out:
        row.pop("clock")
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sums):
    """(config, rows) of a finished run on all devices of the test machine"""
    cfg = config(tmp_path_factory.mktemp("run") / "sft", sums)
    final = main(cfg)
    assert str(final) == f"{cfg.run.dir}/final"
    return cfg, rows(final.parent)


def test_it_learns_and_measures(trained):
    _, found = trained
    assert [row["step"] for row in found] == list(range(1, 11))
    assert found[-1]["loss"] < found[0]["loss"] - 1
    assert [row["step"] for row in found if "eval_loss" in row] == [4, 8, 10]
    for row in found:
        assert 0 < row["trained_tokens"] < row["tokens"] <= 8 * 24
        assert row["fill"] == pytest.approx(row["tokens"] / (8 * 24))
        assert set(row["moe"]) == {"balance", "router_z", "max_violation", "effective_experts", "router_entropy",
                                   "dead_experts"}  # fmt: skip
        assert 0.9 < row["moe"]["balance"] < 4
        assert 1 <= row["moe"]["effective_experts"] <= 4
    assert found[2]["learning_rate"] == pytest.approx(3e-3, rel=1e-6)


def test_the_load_of_every_expert_is_in_the_run(trained):
    cfg, found = trained
    loads = [json.loads(line) for line in (Path(cfg.run.dir) / "moe.jsonl").read_text().splitlines()]
    assert [load["step"] for load in loads] == [row["step"] for row in found]
    for load, row in zip(loads, found, strict=True):
        assert np.shape(load["used"]) == (2, 4)
        assert np.sum(load["used"], axis=1).tolist() == [2 * row["tokens"]] * 2, "two experts a token, in each layer"


def test_the_result_opens_and_is_the_model_that_was_evaluated(trained):
    cfg, found = trained
    policy = open_policy(PolicyConfig(address=f"{cfg.run.dir}/final"))
    assert policy.tokenizer.fingerprint() == TOK.fingerprint()
    assert policy.config.moe == MODEL.moe
    learner = Learner(learner_config(cfg), cross_entropy)
    _, held = read_splits(cfg.data, TOK, 24)
    loss = evaluate(learner, policy.params, feed_of(cfg, held, TOK).all_once())
    assert loss == pytest.approx(found[-1]["eval_loss"], rel=1e-5)
    place = Path(cfg.run.dir)
    events = [json.loads(line) for line in (place / "events.jsonl").read_text().splitlines()]
    before = next(e["eval_loss"] for e in events if e["event"] == "evaluation")
    assert before == pytest.approx(np.log(264), abs=0.6)
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["results"] == {"step": 10, "loss": found[-1]["loss"], "eval_loss": found[-1]["eval_loss"]}
    assert manifest["data"][0]["path"] == cfg.data.train[0].path


def first_update(cfg, batch, mesh=None):
    learner = Learner(learner_config(cfg), cross_entropy, mesh)
    params = tf.init(learner.cfg.model, jax.random.key(0))
    state, report = learner.step(learner.init_state(params), batch)
    flat = np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(state.params)])
    start = np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(params)])
    return float(report.loss["nll"].value), flat - start


def test_packed_padded_micro_batched_and_on_eight_devices_it_is_the_same_step(sums):
    """algorithms.md sections 1 and 2: the loss is the mean over the batch's trained tokens, however they lie."""
    plain = {"optim": {"learning_rate": 1.0, "clip_norm": 0.0, "eps": 1.0}, "data": {"train": str(sums)}}
    cfg = config("unused", sums, **plain, eval={})
    split, _ = read_splits(cfg.data, TOK, 24)
    feed = feed_of(cfg, split, TOK)
    packed, examples, _ = feed.take(Position())
    n = len(examples) + -len(examples) % 8
    padded_feed = Feed(split=Split(examples=examples, sizes=(len(examples),), weights=(1.0,),
                       counts=split.counts), batch_size=n, length=24, packing=False, seed=0)  # fmt: skip
    (padded,) = padded_feed.all_once()
    padded_cfg = cfg.model_copy(update={"step": cfg.step.model_copy(update={"batch_size": n})})
    micro_cfg = cfg.model_copy(update={"step": cfg.step.model_copy(update={"micro_batches": 4})})
    loss, update = first_update(cfg, packed)
    assert np.linalg.norm(update) > 0.1
    mesh = parallel.make_mesh(cfg.mesh.model_copy(update={"fsdp": 2, "data": 2, "expert": 2}))
    for name, other in {
        "padded": first_update(padded_cfg, padded),
        "micro-batched": first_update(micro_cfg, packed),
        "on 8 devices": first_update(cfg, packed, mesh),
    }.items():
        assert other[0] == pytest.approx(loss, rel=1e-6), name
        assert np.linalg.norm(other[1] - update) < 1e-5 * np.linalg.norm(update), name


def test_a_mesh_of_one_device_is_none(sums):
    cfg = config("unused", sums)
    assert parallel.mesh_of(cfg.mesh).size == 8
    with pytest.raises(UserError, match="does not use exactly this machine's 8 devices"):
        parallel.mesh_of(config("unused", sums, mesh={"fsdp": 3}).mesh)


def test_early_stop_and_the_best_step_is_kept(tmp_path, sums):
    """A learning rate that ruins what it learnt: the evaluation rises, the run stops, the best weights are exported."""
    cfg = config(
        tmp_path / "run", sums, steps=40, eval={"every": 2, "keep": "best", "patience": 2},
        optim={"learning_rate": 0.03, "clip_norm": 0.0}, aux={},
    )  # fmt: skip
    final = main(cfg)
    found = rows(tmp_path / "run")
    losses = {row["step"]: row["eval_loss"] for row in found if "eval_loss" in row}
    best = min(losses, key=losses.get)
    assert len(found) == best + 4, losses
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["steps"], manifest["results"]["step"]) == (best + 4, best)
    learner = Learner(learner_config(cfg), cross_entropy)
    _, held = read_splits(cfg.data, TOK, 24)
    policy = open_policy(PolicyConfig(address=str(final)))
    loss = evaluate(learner, policy.params, feed_of(cfg, held, TOK).all_once())
    assert loss == pytest.approx(losses[best], rel=1e-4)
    assert main(cfg) == final
    assert len(rows(tmp_path / "run")) == best + 4, "a run that stopped early stays stopped"


def test_low_rank_additions_are_in_the_result(tmp_path, sums, trained):
    base = f"{trained[0].run.dir}/final"
    cfg = config(tmp_path / "run", sums, model={"address": base}, lora={"rank": 2}, steps=3)
    main(cfg)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["parents"][0]["manifest"]["stage"] == "sft"
    policy = open_policy(PolicyConfig(address=str(tmp_path / "run" / "final")))
    assert jax.tree.structure(policy.params) == jax.tree.structure(tf.abstract(policy.config))
    learner = Learner(learner_config(cfg.model_copy(update={"lora": None})), cross_entropy)
    _, held = read_splits(cfg.data, TOK, 24)
    batches = feed_of(cfg, held, TOK).all_once()
    assert evaluate(learner, policy.params, batches) == pytest.approx(rows(tmp_path / "run")[-1]["eval_loss"], rel=1e-5)
    before = evaluate(learner, open_policy(PolicyConfig(address=base)).params, batches)
    assert rows(tmp_path / "run")[-1]["eval_loss"] < before


def test_more_steps_go_on_from_the_end(tmp_path, sums, trained):
    place = tmp_path / "run"
    shutil.copytree(trained[0].run.dir, place)
    longer = config(place, sums, steps=12)
    with pytest.raises(UserError, match="steps: 10 -> 12"):
        main(longer)
    main(longer, resume_anyway=True)
    found = rows(place)
    assert [row["step"] for row in found] == list(range(1, 13))
    assert found[:10] == trained[1]


def test_a_learning_rate_of_0_is_told_once(tmp_path, sums):
    main(config(tmp_path / "run", sums, optim={"learning_rate": 0.0}, eval={"every": 0}, steps=4))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    alarms = [e for e in events if e["event"] == "alarm"]
    assert [(e["step"], "the learning rate is 0" in e["message"]) for e in alarms] == [(2, True)]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, sums):
    cfg = config(tmp_path / "run", sums, optim={"learning_rate": 1e38, "clip_norm": 0.0}, aux={})
    with pytest.raises(NonFiniteError, match=r"step \d+: .* not finite"):
        main(cfg)
    assert json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])["event"] == "failed"
    assert not (tmp_path / "run" / "final").exists()
