"""`kill -9` at any moment, a save and a start included: in the end every number is that of the run nobody killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import pytest

from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.overrides import dump
from cabochon.sft.config import DistillConfig, SftConfig
from cabochon.testing import tiny_config, tiny_moe
from cabochon.tokenizer import ByteTokenizer

MODEL = tiny_moe(
    family="qwen3_moe", vocab_size=264, num_layers=1, layer_kinds=("moe",), head_dim=8, eos_ids=(260, 258),
    moe=tiny_moe().moe.model_copy(update={"shared_ffn_dim": 0}),
)  # fmt: skip
STEPS = 90
SAVE_EVERY = 3


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """stage -> (recipe, rows of the run that nobody killed), each run once, when it is asked for"""
    place = tmp_path_factory.mktemp("kill")
    draw = random.Random(0)
    pairs = [(draw.randrange(10), draw.randrange(10)) for _ in range(120)]
    data = place / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n" for a, b in pairs))
    base = {
        "model": {"scratch": MODEL.model_dump(mode="json")}, "data": {"train": str(data), "eval_fraction": 0.2},
        "eval": {"every": 4}, "step": {"batch_size": 8, "sequence_length": 24}, "steps": STEPS,
        "optim": {"learning_rate": 3e-3, "schedule": "cosine", "total_steps": STEPS, "warmup_steps": 2},
        "aux": {"balance": 1e-2, "router_z": 1e-3}, "run": {"save_every": SAVE_EVERY, "peak_tflops": 1.0},
    }  # fmt: skip
    made = {}

    def of(stage):
        if stage in made:
            return made[stage]
        cfg = SftConfig.model_validate(base)
        if stage == "distill":
            model = tiny_config(vocab_size=264, eos_ids=(260, 258))
            convert.save(place / "teacher", model, tf.init(model, jax.random.key(1)), tokenizer=ByteTokenizer())
            teacher = {"address": str(place / "teacher"), "top_k": 8, "cache": str(place / "cache")}
            own = {"fraction": 0.3, "max_tokens": 5, "slots": 4}
            # fewer steps: each start compiles the sampler too
            short = {"steps": 24, "teacher": teacher, "on_policy": own}
            cfg = DistillConfig.model_validate(base | short)
        recipe = place / f"{stage}.yaml"
        recipe.write_text(dump(cfg))
        finish(place / stage, recipe, stage)
        made[stage] = recipe, rows(place / stage)
        return made[stage]

    return of


def start(place, recipe, stage):
    """The command, on one device; what it compiles is kept, however quick it was."""
    keep = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_COMPILATION_CACHE_DIR": str(recipe.parent / "jax")}  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | keep
    words = [sys.executable, "-P", "-m", "cabochon", stage, str(recipe), f"run.dir={place}"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finish(place, recipe, stage):
    child = start(place, recipe, stage)
    said, _ = child.communicate(timeout=300)
    assert child.returncode == 0, said
    return said


def rows(place):
    out = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    for row in out:
        row.pop("clock")
    return out


def count(place):
    file = place / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def at_once(place):
    return lambda: True


def stepping(place):
    """A row was added: a start drops those after the checkpoint first."""
    low = [count(place)]

    def condition():
        now = count(place)
        low[0] = min(low[0], now)
        return now > low[0]

    return condition


def saving(place):
    return lambda: any((place / "checkpoints").glob(".*.partial/state"))


def kill_when(child, condition, after=0.0, deadline=240):
    """SIGKILL `after` seconds past the condition; False where the run ended before."""
    end = time.monotonic() + deadline
    while child.poll() is None and time.monotonic() < end:
        if condition():
            time.sleep(after)
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    child.communicate(timeout=60)
    return child.returncode == -signal.SIGKILL


def test_kill_9_between_steps_and_during_a_save(tmp_path, recipes):
    recipe, wanted = recipes("sft")
    place = tmp_path / "run"
    assert kill_when(start(place, recipe, "sft"), stepping(place), after=0.05)
    assert kill_when(start(place, recipe, "sft"), saving(place)), "killed in the middle of a checkpoint"
    said = finish(place, recipe, "sft")
    assert rows(place) == wanted, "every number of every step"
    assert "this run is finished; its result is" in finish(place, recipe, "sft")
    assert "resumed: " in said or count(place) == STEPS


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments(tmp_path, recipes):
    """Four while it starts, six while it saves, ten while it trains, in random order."""
    recipe, wanted = recipes("sft")
    draw, place = random.Random(0), tmp_path / "run"
    moments = [(at_once, 6.0)] * 4 + [(saving, 0.03)] * 6 + [(stepping, 0.4)] * 10
    draw.shuffle(moments)
    kills = []
    for moment, most in moments:
        kills.append(kill_when(start(place, recipe, "sft"), moment(place), after=draw.uniform(0, most)))
    assert sum(kills) >= 18, "the others came after its end"
    finish(place, recipe, "sft")
    assert rows(place) == wanted


@pytest.mark.slow
def test_kill_9_of_a_distillation(tmp_path, recipes):
    """From the cache and on the student's own samples, in turn."""
    recipe, wanted = recipes("distill")
    assert {row["on_policy"] for row in wanted} == {True, False}
    draw, place = random.Random(1), tmp_path / "run"
    kills = [
        kill_when(start(place, recipe, "distill"), moment(place), after=draw.uniform(0, most))
        for moment, most in ((stepping, 0.3), (saving, 0.03), (at_once, 8.0), (stepping, 0.3))
    ]
    assert sum(kills) >= 3
    finish(place, recipe, "distill")
    assert rows(place) == wanted
