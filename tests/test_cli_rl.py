"""`cabochon rl` as a person meets it."""

import json
import sys

import jax
import pytest

from cabochon import cli
from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.overrides import load
from cabochon.rl.recipe import RlConfig
from cabochon.rollouts.slots import SlotConfig, empty_slots
from cabochon.testing import tiny_moe
from cabochon.tokenizer import ByteTokenizer


@pytest.mark.parametrize(("recipe", "ray"), [("tiny-rl", False), ("demo-rl", True)])
def test_a_dry_run_prints_what_would_run_and_leaves_nothing(tmp_path, monkeypatch, capfd, recipe, ray):
    model = tiny_moe(
        family="qwen3_moe", vocab_size=264, num_layers=2, layer_kinds=("moe", "moe"), head_dim=8,
        moe=tiny_moe().moe.model_copy(update={"shared_ffn_dim": 0}),
    )  # fmt: skip
    convert.save(tmp_path / "model", model, tf.init(model, jax.random.key(0)), tokenizer=ByteTokenizer())
    task = {"id": "a", "prompt": "1+1=", "verifier": "math", "payload": {"answer": "2"}}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task) + "\n")
    settings = [
        f"model.address={tmp_path / 'model'}", f"tasks.train=[{tmp_path / 'tasks.jsonl'}]", "tasks.held_out=[]",
        "step.micro_batches=2", f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["cabochon", "rl", recipe, *settings, "--dry-run"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capfd.readouterr()
    assert not left.value.code, err
    assert "stage: rl" in out
    assert "1 tasks to learn from, 0 held out" in err
    during = next(line for line in err.splitlines() if line.startswith("gradients, activations"))
    assert float(during.split()[-2]) > 0
    cfg = load(RlConfig, [recipe], settings)
    slots = empty_slots(model, SlotConfig(slots=cfg.engine.slots, length=cfg.engine.length))
    weights = sum(x.nbytes for x in jax.tree.leaves(tf.init(model, jax.random.key(0))))
    there = 2 * weights + sum(x.nbytes for x in (*slots.k, *slots.v))
    assert f"besides, the engine{there / 1e9:22.3f} GB" in err
    on_the_way = [line for line in err.splitlines() if line.startswith("weights on their way to it")]
    assert on_the_way == ([f"weights on their way to it{3 * weights / 1e9:15.3f} GB"] if ray else [])
    assert not (tmp_path / "run").exists()
