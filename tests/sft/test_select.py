"""Which checkpoint RL begins with: the rule, the entropy of real samples, and what is written."""

import json

import jax
import numpy as np
import pytest

from cabochon.config import PolicyConfig
from cabochon.errors import MachineError, UserError
from cabochon.model import transformer as tf
from cabochon.policy import open_policy
from cabochon.protocols import Weights
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.sft.config import SftConfig
from cabochon.sft.select import Asked, Candidate, choose, rated, sampled_entropy, select, table
from cabochon.sft.train import main
from cabochon.testing import FakeEngine, tiny_config
from cabochon.types import Completion, Request, Sampling, Task, Verdict

MODEL = tiny_config(vocab_size=264, num_layers=1, eos_ids=(260, 258))


def candidate(step, entropy, pass_1=0.1, pass_n=0.2):
    return Candidate(step=step, entropy=entropy, pass_1=pass_1, pass_n=pass_n, truncated=0, tokens=5, unjudged=0)


def test_pass_at_n_decides_inside_the_range_and_nearness_outside():
    low, best, sharp = candidate(1, 0.45), candidate(2, 0.4, pass_n=0.5), candidate(3, 0.2, pass_n=0.9)
    assert choose([low, best, sharp], 0.3, 0.5) == (best, True)
    tied = candidate(4, 0.31, pass_1=0.3, pass_n=0.5)
    assert choose([low, best, tied], 0.3, 0.5) == (tied, True)
    assert choose([candidate(5, 0.4, 0.3, 0.5), tied], 0.3, 0.5)[0] is tied, "the earlier of equals"
    assert choose([candidate(1, 0.9), sharp], 0.3, 0.5) == (sharp, False)
    lines = table([low, best, sharp], best, Asked(samples=4)).splitlines()
    assert lines[0].split() == ["step", "entropy", "pass@1", "pass@4", "cut", "off", "tokens"]
    assert lines[2].startswith("*     2   0.400 ")
    assert " 0.200<" in lines[3]


def test_tasks_with_a_sample_that_the_machine_failed_are_left_out():
    done = Completion(tokens=np.array([1, 2]), logprobs=np.zeros(2), mask=np.array([True, False]), text="",
                      finish="stop", policy_version=np.zeros(2))  # fmt: skip
    good, bad, broken = Verdict(score=1.0, status="ok"), Verdict(score=0.0, status="wrong"), Verdict(
        score=None, status="infra_error")  # fmt: skip
    found = rated(3, 0.4, [done] * 6, [good, bad, bad, bad, good, broken], 2)
    assert (found.pass_1, found.pass_n, found.unjudged, found.tokens) == (0.25, 0.5, 1, 1.0)


def config(place, data, chat=False, **changes):
    return SftConfig.model_validate({
        "model": {"scratch": MODEL.model_dump(mode="json")}, "data": {"train": str(data), "chat": chat}, "steps": 6,
        "step": {"batch_size": 8, "sequence_length": 24}, "optim": {"learning_rate": 2e-2},
        "run": {"dir": str(place), "save_every": 2, "keep_last": 9, "peak_tflops": 1.0}, **changes,
    })  # fmt: skip


def local(model, tokenizer, weights):
    return LocalEngine(model, tokenizer, weights, SlotConfig(slots=4, length=24, chunks=(16,), kernels="xla"))


def judge(tasks, texts):
    return [Verdict(score=float("a" in text), status="ok") for text in texts]


def test_every_checkpoint_is_measured_and_the_chosen_one_written(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}:", "completion": "aa"}) + "\n" for i in range(8)))
    cfg = config(tmp_path / "run", data)
    with pytest.raises(UserError, match="there is no checkpoint to choose from"):
        select(cfg, [], local, judge, Asked())
    main(cfg)
    tasks = [Task(id=str(i), prompt=f"{i}:", verifier="x") for i in range(4)]
    asked = Asked(samples=2, max_tokens=6, low=0.0, high=9.0)
    found, chosen, inside = select(cfg, tasks, local, judge, asked)
    assert inside
    assert [c.step for c in found] == [2, 4, 6]
    assert found[0].entropy > found[1].entropy > found[2].entropy, "it grows sure of the two letters it is taught"
    assert chosen.pass_n == max(c.pass_n for c in found)
    said = json.loads((tmp_path / "run" / "select.json").read_text())
    assert (said["chosen"], said["tasks"], len(said["candidates"])) == (chosen.step, 4, 3)
    policy = open_policy(PolicyConfig(address=str(tmp_path / "run" / "selected")))
    engine = local(policy.config, policy.tokenizer, Weights(version=0, params=policy.params))
    sampling = Sampling(max_tokens=6, n=2)
    seeds = np.random.SeedSequence(asked.seed).generate_state(4, np.uint64)
    drawn = engine.generate([Request(prompt=t.prompt, sampling=sampling, seed=int(s)) for t, s in zip(tasks, seeds)])  # noqa: B905
    again = sampled_entropy(cfg, policy.params, drawn)
    assert again == pytest.approx(chosen.entropy, rel=1e-4), "selected/ is the checkpoint that was measured"
    fine, down = Verdict(score=1.0, status="ok", detail="2"), Verdict(score=None, status="infra_error", detail="down")
    with pytest.raises(MachineError, match="none of 4 tasks could be judged: down"):
        select(cfg, tasks, local, lambda t, x: [fine, down] * (len(x) // 2), asked)


@pytest.mark.parametrize("chat", [False, True])
def test_checkpoints_are_asked_as_the_run_was_trained(tmp_path, chat):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}:", "completion": "aa"}) + "\n" for i in range(8)))
    cfg = config(tmp_path / "run", data, chat, steps=1, step={"batch_size": 8, "sequence_length": 64})
    main(cfg)
    engine = FakeEngine(lambda prompt, seed, sample: "a")
    tasks = [Task(id="t", prompt="3:", verifier="x")]
    select(cfg, tasks, lambda *_: engine, judge, Asked(samples=2, max_tokens=6))
    turn = [{"role": "user", "content": "3:"}]
    assert [r.prompt for r in engine.seen] == [turn if chat else "3:"]


def test_the_entropy_is_that_of_the_full_distribution_at_sampled_tokens(tmp_path):
    params = tf.init(MODEL, jax.random.key(0))
    tokens = np.array([5, 6, 7], np.int32)
    one = Completion(tokens=tokens, logprobs=np.zeros(3), mask=np.array([True, False, True]), text="", finish="stop",
                     policy_version=np.zeros(3), prompt_tokens=np.array([1, 2], np.int32))  # fmt: skip
    hidden = tf.forward(MODEL, params, jax.numpy.array([[1, 2, 5, 6, 7]])).hidden_BTD
    logp = np.asarray(jax.nn.log_softmax(tf.logits(MODEL, params, hidden)))[0]
    entropy = -(np.exp(logp) * logp).sum(-1)
    cfg = config(tmp_path, tmp_path / "x.jsonl")
    assert sampled_entropy(cfg, params, [one]) == pytest.approx((entropy[1] + entropy[3]) / 2, rel=1e-5)
