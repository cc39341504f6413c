"""The demo's own small parts quickly, and the whole of it as a slow test."""

import subprocess
import sys

import pytest

from cabochon import demo
from cabochon.config import TrainConfig
from cabochon.overrides import load
from cabochon.policy import Policy, open_policy


def test_greedy_takes_the_most_likely_token_of_the_full_forward_pass(monkeypatch):
    monkeypatch.setattr(demo, "NEW_TOKENS", 6)
    policy = open_policy(load(TrainConfig, ["tiny-moe"]).model, seed=5)
    prompt = policy.tokenizer.encode("hello")
    wanted: list[int] = []
    for _ in range(6):
        ids = [*prompt, *wanted, *[0] * (6 - len(wanted))]  # what follows cannot reach back
        wanted.append(int(demo._logits(policy, ids)[len(prompt) + len(wanted) - 1].argmax()))
    assert demo.greedy(policy, prompt) == wanted
    stopping = policy.config.model_copy(update={"eos_ids": (wanted[3],)})
    stop = wanted.index(wanted[3])
    stopping_policy = Policy(config=stopping, params=policy.params, tokenizer=policy.tokenizer)
    assert demo.greedy(stopping_policy, prompt) == wanted[:stop]


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.bubblewrap
def test_the_demo_ends_well_and_says_what_it_found(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cabochon.demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("373,462,848", "214,210,368", "4 experts against dense", "This machine is ready."):
        assert said in done.stdout
    assert done.stdout.count("The capital of France is Paris.") == 2
    verdicts = done.stdout.split("== verdicts\n")[1].splitlines()
    assert [line.split("score ")[1].split()[1] for line in verdicts] == [
        "ok", "wrong", "wrong", "ok", "wrong", "crash", "crash",
    ]  # fmt: skip
    assert (tmp_path / "runs/demo/smollm2-moe/model.safetensors").stat().st_size > 1_400_000_000
