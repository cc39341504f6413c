"""The stage on a tiny model: it learns, it goes on after a kill, transformers gives the same scores."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from products import same

from cabochon.errors import UserError
from cabochon.overrides import load
from cabochon.reward.config import RewardModelConfig
from cabochon.reward.scorer import ModelReward
from cabochon.reward.train import main
from cabochon.types import Completion, Rollout, Task

MODEL = {
    "family": "qwen3_moe", "vocab_size": 264, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 8, "qk_norm": "head", "norm_eps": 1e-6, "moe": {"num_experts": 4, "top_k": 2, "ffn_dim": 16},
    "bos_id": 257, "eos_ids": [260, 258], "pad_id": 256,
}  # fmt: skip


def write_rows(path, n=64, seed=0):
    """The better answer has more a than b."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        word = lambda k: "".join(draw.permutation(list("a" * k + "b" * (5 - k))))  # noqa: E731
        better, worse = sorted(draw.choice(6, 2, replace=False))[::-1]
        rows.append({"prompt": f"{seed}.{i}:", "chosen": word(better), "rejected": word(worse)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def config(tmp_path, name="run", steps=12, **changes):
    base = {
        "stage": "rm",
        "model": {"scratch": MODEL},
        "steps": steps,
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "step": {"batch_size": 8, "sequence_length": 64},
        "optim": {"learning_rate": 1e-2},
        "eval": {"every": 6},
        "run": {"dir": str(tmp_path / name), "save_every": 4, "tensorboard": False},
    }
    return RewardModelConfig.model_validate(base | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("rm")
    write_rows(place / "train.jsonl", 400)
    write_rows(place / "eval.jsonl", 64, seed=1)
    return place, main(config(place, steps=60))


def metrics(place):
    out = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "clock"} for row in out]


def test_it_learns_what_is_preferred_and_says_so(trained):
    place, final = trained
    rows = metrics(place / "run")
    assert rows[-1]["eval_accuracy"] > 0.9
    assert rows[-1]["eval_pairs"] == 64
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)  # a new head scores 0
    assert 0 < rows[-1]["eval_ece"] < 0.3
    assert rows[-1]["eval_by_length"]["same length"]["pairs"] == 64
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    assert manifest["stage"] == "rm"
    assert manifest["results"]["eval_accuracy"] == rows[-1]["eval_accuracy"]
    assert load(RewardModelConfig, [str(place / "run" / "config.yaml")]) == config(place, steps=60)
    assert main(config(place, steps=60)) == final  # finished: nothing is done again
    assert metrics(place / "run") == rows


def test_scores_are_centred_on_the_held_out_answers_and_carry_the_models_id(trained):
    place, final = trained
    rows = [json.loads(line) for line in (place / "eval.jsonl").read_text().splitlines()]
    reward = ModelReward.open(final)
    prompts, answers = [r["prompt"] for r in rows] * 2, [r["chosen"] for r in rows] + [r["rejected"] for r in rows]
    scores = reward.score_texts(prompts, answers)
    values = np.array([score.value for score in scores])
    assert abs(values.mean()) < 1e-4
    assert {score.model_id for score in scores} == {reward.model_id}
    assert len(reward.model_id) == 16
    assert (values[:64] > values[64:]).mean() == metrics(place / "run")[-1]["eval_accuracy"]
    alone = np.array([reward.score_texts([p], [a])[0].value for p, a in zip(prompts[:9], answers[:9], strict=True)])
    assert np.abs(alone - values[:9]).max() < 1e-5
    other = final / "reward.json"
    before = other.read_text()
    other.write_text(before.replace("false", "true"))
    assert ModelReward.open(final).model_id != reward.model_id
    other.write_text(before)


def test_a_learning_rate_of_0_is_told_once(tmp_path):
    write_rows(tmp_path / "train.jsonl")
    write_rows(tmp_path / "eval.jsonl", 8, seed=1)
    main(config(tmp_path, steps=4, optim={"learning_rate": 0.0}))
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    alarms = [e for e in events if e["event"] == "alarm"]
    assert [(e["step"], "the learning rate is 0" in e["message"]) for e in alarms] == [(2, True)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"reward\.json: not JSON at line 1"),
        ("[]", r"reward\.json: expected a JSON object"),
        ('{"offset": "x"}', r"reward\.json: offset: .*, got 'x'"),
        ('{"offset": NaN}', r"reward\.json: offset: .*finite"),
        ('{"length": 0}', r"reward\.json: length: .*greater than or equal to 1, got 0"),
    ],
)
def test_settings_that_cannot_be_name_file_and_key(trained, tmp_path, text, said):
    shutil.copytree(trained[1], tmp_path / "final")
    (tmp_path / "final" / "reward.json").write_text(text)
    with pytest.raises(UserError, match=said):
        ModelReward.open(tmp_path / "final")


def rollout(text, finish="stop", prompt="0.1:"):
    none = np.zeros(0, np.int32)
    completion = Completion(tokens=none, logprobs=none, mask=none, text=text, finish=finish, policy_version=none)
    return Rollout(task=Task(id="t", prompt=prompt, verifier="none"), completion=completion, group=0)


def test_rollouts_one_that_was_cut_off_and_one_that_is_too_long(trained):
    reward = ModelReward.open(trained[1])
    whole, cut, long = reward.score([rollout("aaaab"), rollout("aaaab", "length"), rollout("a" * 64)])
    assert (whole.status, cut.status, long.status) == ("ok", "truncated", "too_long")
    assert same(whole.value, reward.score_texts(["0.1:"], ["aaaab"])[0].value)
    assert cut.value is not None
    assert cut.value != whole.value
    assert long.value is None
    assert "70 tokens, the model reads at most 64" in long.detail or "tokens, the model reads at most 64" in long.detail
    assert reward.score([]) == []


@pytest.mark.slow
def test_transformers_gives_the_same_scores(trained):
    import torch
    import transformers

    final = trained[1]
    reward = ModelReward.open(final)
    texts = ["0.1:aaaab", "0.2:b", "0.3:abababab"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(final, dtype=torch.float32).eval()
    assert model.config.num_labels == 1
    padded = tokenizer([text + "<|im_end|>" for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**padded).logits[:, 0].numpy()
    ours = reward.raw([np.array([*text.encode(), 260], np.int32) for text in texts])
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(ours).max() > 0.1


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(trained, tmp_path):
    import jax

    from cabochon.model import convert
    from cabochon.model import transformer as tf
    from cabochon.model.address import open_model
    from cabochon.model.config import ModelConfig
    from cabochon.reward.open import is_scalar
    from cabochon.tokenizer import ByteTokenizer

    assert is_scalar(str(trained[1]))
    model, params, _ = open_model(str(trained[1]))
    assert params["value"]["w"].shape == (model.dim,)
    policy = ModelConfig.model_validate(MODEL)
    convert.save(tmp_path / "lm", policy, tf.init(policy, jax.random.key(0)), tokenizer=ByteTokenizer())
    assert not is_scalar(str(tmp_path / "lm"))
    with pytest.raises(UserError, match="a language model, not a scalar reward model"):
        ModelReward.open(tmp_path / "lm")


RUN = """
import sys
from cabochon.overrides import load
from cabochon.reward.config import RewardModelConfig
from cabochon.reward.train import main
main(load(RewardModelConfig, [sys.argv[1]]))
"""


def test_killed_at_any_moment_it_ends_with_the_same_numbers(tmp_path):
    from cabochon import overrides

    write_rows(tmp_path / "train.jsonl", 40)
    write_rows(tmp_path / "eval.jsonl", 8, seed=1)
    main(config(tmp_path, "whole"))
    broken = config(tmp_path, "broken")
    (tmp_path / "broken.yaml").write_text(overrides.dump(broken))
    command = [sys.executable, "-c", RUN, str(tmp_path / "broken.yaml")]
    journal, manifest = (tmp_path / "broken" / name for name in ("metrics.jsonl", "manifest.json"))
    for rows in (3, 6, 9):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") >= rows:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait(60)
        assert time.monotonic() < deadline
    if not manifest.exists():
        subprocess.run(command, check=True, timeout=240, stdout=subprocess.DEVNULL)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    for file in ("model.safetensors", "reward.json"):
        assert (tmp_path / "broken" / "final" / file).read_bytes() == (tmp_path / "whole" / "final" / file).read_bytes()


def test_a_family_without_a_sequence_classifier_is_refused_before_the_work(tmp_path):
    write_rows(tmp_path / "train.jsonl", 4)
    write_rows(tmp_path / "eval.jsonl", 4, seed=1)
    scratch = {**MODEL, "family": "olmoe", "qk_norm": "full"}
    with pytest.raises(UserError, match="olmoe has no place for a sequence classifier"):
        main(config(tmp_path, model={"scratch": scratch}))
