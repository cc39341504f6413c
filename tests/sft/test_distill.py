"""Distillation: closer to its teacher, from the cache as from the teacher itself; no stop changes a number."""

import json
import os
import random
import signal

import jax
import numpy as np
import pytest

from cabochon.config import PolicyConfig
from cabochon.errors import UserError
from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.policy import open_policy
from cabochon.sft.config import DistillConfig
from cabochon.sft.distill import main, prompt_of
from cabochon.testing import FakeEngine, tiny_config
from cabochon.tokenizer import ByteTokenizer

MODEL = tiny_config(vocab_size=264, num_layers=1, eos_ids=(260, 258))


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    draw = random.Random(0)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(60)]
    file.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n" for a, b in pairs))
    return file


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model that is sure of something, whatever it is."""
    place = tmp_path_factory.mktemp("teacher") / "final"
    model = tiny_config(vocab_size=264, num_layers=2, num_kv_heads=4, eos_ids=(260, 258))
    params = jax.tree.map(lambda x: x * 4, tf.init(model, jax.random.key(7)))
    convert.save(place, model, params, tokenizer=ByteTokenizer())
    return place


def config(place, sums, source, **changes):
    base = {
        "model": {"scratch": MODEL.model_dump(mode="json")},
        "teacher": {"address": str(source), "top_k": 16, "cache": str(place.parent / "cache")},
        "data": {"train": str(sums), "eval_fraction": 0.2},
        "eval": {"every": 4},
        "step": {"batch_size": 8, "sequence_length": 24},
        "optim": {"learning_rate": 1e-2},
        "run": {"dir": str(place), "save_every": 3, "peak_tflops": 1.0},
        "steps": 8,
    }
    return DistillConfig.model_validate(base | changes)


def rows(place):
    out = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    for row in out:
        row.pop("clock")
    return out


def events(place, kind):
    found = [json.loads(line) for line in (place / "events.jsonl").read_text().splitlines()]
    return [e for e in found if e["event"] == kind]


def no_engine(*_):
    raise AssertionError("nothing is sampled")


def test_it_comes_closer_from_the_cache_as_from_the_teacher(tmp_path, sums, teacher):
    cached = config(tmp_path / "cached", sums, teacher)
    final = main(cached, engine=no_engine)
    found = rows(tmp_path / "cached")
    assert found[-1]["divergence"] < 0.7 * found[0]["divergence"]
    assert found[-1]["loss"] == found[-1]["divergence"], "no label is mixed in"
    assert all(0 < row["student_mass"] < 1 and 0.3 < row["teacher_mass"] <= 1 for row in found)
    assert [row["step"] for row in found if "eval_loss" in row] == [4, 8]
    (told,) = events(tmp_path / "cached", "teacher")
    assert told["bytes"] == sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*.shard"))
    manifest = json.loads((tmp_path / "cached" / "manifest.json").read_text())
    assert manifest["stage"] == "distill"
    assert manifest["parents"][0]["address"] == str(teacher)
    assert manifest["data"][-1]["path"] == str(teacher)
    assert len(manifest["data"][-1]["sha256"]) == 64
    policy = open_policy(PolicyConfig(address=str(final)))
    assert policy.config.num_layers == 1
    assert policy.tokenizer.fingerprint() == ByteTokenizer().fingerprint()

    live = config(tmp_path / "live", sums, teacher, teacher={"address": str(teacher), "top_k": 16})
    main(live, engine=no_engine)
    for a, b in zip(rows(tmp_path / "live"), found, strict=True):
        assert a["divergence"] == pytest.approx(b["divergence"], rel=5e-3), "f16 apart"


def digits(prompt, seed, sample):
    return str(seed % 100)


def test_on_the_students_own_samples_and_a_stop_changes_no_number(tmp_path, sums, teacher):
    stop = []

    class Engine(FakeEngine):
        def generate(self, requests):
            if stop and len(self.seen) > 10:
                stop.clear()
                os.kill(os.getpid(), signal.SIGINT)
            return super().generate(requests)

    engines, opened = [], []

    def engine(model, tokenizer, weights, slots, length):
        engines.append(Engine(digits, context=length))
        opened.append((model.num_layers, slots, length))
        engines[-1].load(weights)
        return engines[-1]

    def run(name):
        cfg = config(
            tmp_path / name, sums, teacher, seed=1,
            on_policy={"fraction": 0.6, "max_tokens": 5, "temperature": 0.7, "slots": 3}, divergence={"labels": 0.5},
        )  # fmt: skip
        return main(cfg, engine=engine)

    run("whole")
    found = rows(tmp_path / "whole")
    own = [row for row in found if row["on_policy"]]
    assert 0 < len(own) < len(found)
    for row in found:
        mixed = row["divergence"] if row["on_policy"] else (row["divergence"] + row["nll"]) / 2
        assert row["loss"] == pytest.approx(mixed, rel=1e-5), "its own samples are no labels"
    assert opened == [(1, 3, 9)], "prompts of 4 tokens, samples of 5"
    asked = engines[0].seen
    assert len(asked) == len(own) * 8 * (24 // 9)
    assert {(r.sampling.max_tokens, r.sampling.temperature) for r in asked} == {(5, 0.7)}
    assert len({r.seed for r in asked}) == len(asked)
    assert all(len(r.prompt) == 4 for r in asked)

    stop.append(True)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    assert 0 < len(rows(tmp_path / "stopped")) < 8
    run("stopped")
    assert rows(tmp_path / "stopped") == found


def test_what_does_not_go_together_is_refused(tmp_path, sums, teacher):
    other = tmp_path / "other"
    convert.save(other, MODEL, tf.init(MODEL, jax.random.key(0)), tokenizer=ByteTokenizer())
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"B"', '"\\u4e00"'))
    with pytest.raises(UserError, match=r"token 66 is 'B' there, '一' in .*other; distillation needs one vocabulary"):
        main(config(tmp_path / "a", sums, teacher, model={"address": str(other)}), engine=no_engine)
    small = MODEL.model_copy(update={"vocab_size": 200, "eos_ids": ()})
    with pytest.raises(UserError, match=r"model.scratch.vocab_size=200: the teacher's tokenizer needs 263 or more"):
        main(config(tmp_path / "b", sums, teacher, model={"scratch": small.model_dump(mode="json")}), engine=no_engine)
    with pytest.raises(UserError, match=r"sums.jsonl:1: 4 prompt tokens and on_policy.max_tokens=30 do not fit"):
        main(config(tmp_path / "c", sums, teacher, on_policy={"fraction": 1, "max_tokens": 30}), engine=no_engine)
    for name in "abc":
        assert not (tmp_path / name / "final").exists()


def test_a_teacher_that_changed_is_a_changed_config(tmp_path, sums, teacher):
    cfg = config(tmp_path / "run", sums, teacher, steps=1)
    main(cfg, engine=no_engine)
    note = teacher / "note.txt"
    note.write_text("x")
    try:
        with pytest.raises(UserError, match=r"final was changed since"):
            main(cfg, engine=no_engine)
    finally:
        note.unlink()


def test_the_prompt_is_what_stands_before_the_first_trained_token():
    from cabochon.sft.data import Encoded

    e = Encoded(where="", ids=np.arange(5, dtype=np.int32), mask=np.array([0, 0, 1, 0, 1], bool))
    assert prompt_of(e).tolist() == [0, 1]
