"""Evaluation by samples: the number of `cabochon eval`, in every row that is evaluated, and what is decided by it."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from cabochon import cli, cli_stages
from cabochon.config import PolicyConfig
from cabochon.errors import UserError
from cabochon.overrides import dump
from cabochon.policy import open_policy
from cabochon.protocols import Weights
from cabochon.rollouts.prompts import encode_prompt
from cabochon.sft.config import SampledConfig, SftConfig
from cabochon.sft.train import Exam, main
from cabochon.testing import FakeEngine, tiny_config
from cabochon.tokenizer import ByteTokenizer
from cabochon.verifiers import build

MODEL = tiny_config(vocab_size=264, num_layers=1, eos_ids=(260, 258))
REWARD = '''
def letters(prompts, completions, **columns):
    """The share of bytes that are lower-case letters."""
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in completions]
'''


@pytest.fixture
def place(tmp_path):
    """Rows to train on, other tasks in two domains."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"{i}:", "completion": "abcde"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"{tmp_path}/reward.py:letters"
    tasks = [{"id": f"t/{i}", "prompt": f"x{i}:", "verifier": name, "domain": f"d{i % 2}"} for i in range(6)]
    tasks.append({"id": "sum", "prompt": "1+1=", "verifier": "math", "payload": {"answer": "2"}, "domain": "d1"})
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return tmp_path


def config(place, name="run", **changes):
    base = {
        "model": {"scratch": MODEL.model_dump(mode="json")},
        "data": {"train": str(place / "rows.jsonl")},
        "eval": {"every": 3, "sampled": {"tasks": [str(place / "tasks.jsonl")], "samples": 2, "max_tokens": 6}},
        "step": {"batch_size": 8, "sequence_length": 24},
        "optim": {"learning_rate": 2e-2},
        "run": {"dir": str(place / name), "save_every": 3, "peak_tflops": 1.0, "tensorboard": False},
        "steps": 9,
    }
    return SftConfig.model_validate(base | changes)


def rows(directory):
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "clock"} for row in found]


def events(directory, kind):
    found = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [e for e in found if e["event"] == kind]


def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["cabochon", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_the_number_is_what_eval_says_of_the_same_weights(place, monkeypatch, chat):
    """With data.chat the exam goes through the chat template, as `--chat` asks it."""
    recipe = place / "recipe.yaml"
    data = {"train": str(place / "rows.jsonl"), "chat": chat}
    recipe.write_text(dump(config(place, seed=5, data=data, step={"batch_size": 8, "sequence_length": 96})))
    called(monkeypatch, "sft", recipe)
    found = rows(place / "run")
    assert [row["step"] for row in found if "held_out" in row] == [3, 6, 9]
    assert not any("eval_loss" in row for row in found), "no row is held out"
    (before,) = events(place / "run", "held out")
    assert before["tasks"] == 7
    last = found[-1]
    assert last["held_out"] > before["held_out"]["all"] + 0.1, "it learns to write letters"
    assert set(last["held_out_domains"]) == {"all", "d0", "d1"}

    out = place / "eval.json"
    asked = ["--tasks", place / "tasks.jsonl", "--samples", 2, "--max-tokens", 6, "--seed", 5, "--out", out]
    called(monkeypatch, "eval", place / "run" / "final", *asked, *(["--chat"] if chat else []))
    domains = json.loads(out.read_text())["evaluations"][0]["domains"]
    for name, accuracy in last["held_out_domains"].items():
        assert accuracy == pytest.approx(domains[name]["mean"]["mean"], abs=1e-12), name
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    assert manifest["results"]["held_out"] == last["held_out"]
    assert [Path(each["path"]).name for each in manifest["data"]] == ["rows.jsonl", "tasks.jsonl"]


def scripted(accuracy, seen=None):
    """An exam that nobody has to sit: `accuracy` of the weights."""

    @contextmanager
    def opened(cfg, chat, seed, model, tokenizer):
        def of(weights):
            if seen is not None:
                seen[weights.version] = weights.params
            return {"all": accuracy(weights)}

        yield Exam(tasks=3, accuracy=of)

    return opened


def test_the_best_by_accuracy_is_kept_and_decides_the_stop(place):
    """The loss goes on falling; accuracy is at its best in the second of five evaluations. The third is as good, and
    its checkpoint is due: it does not take the place of the best."""
    said = {0: 0.1, 2: 0.5, 4: 0.9, 6: 0.9, 8: 0.4, 10: 0.3}
    sampled = {"tasks": [str(place / "tasks.jsonl")]}
    evaluation = {"every": 2, "keep": "best", "by": "accuracy", "patience": 3, "sampled": sampled}
    data = {"train": str(place / "rows.jsonl"), "eval": [str(place / "rows.jsonl")]}
    cfg = config(place, eval=evaluation, data=data, steps=20)
    seen = {}
    final = main(cfg, exam=scripted(lambda weights: said[weights.version], seen))
    found = {row["step"]: row for row in rows(place / "run")}
    assert max(found) == 10, "three evaluations without a better one; a tie is none"
    assert found[10]["eval_loss"] < found[4]["eval_loss"]
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    assert (manifest["results"]["step"], manifest["results"]["held_out"]) == (4, 0.9)
    policy = open_policy(PolicyConfig(address=str(final)))
    assert jax.tree.all(jax.tree.map(np.array_equal, policy.params, seen[4])), "the weights that were asked, unchanged"
    assert "no better accuracy in the last 3" in events(place / "run", "early stop")[0]["message"]
    (alarm,) = events(place / "run", "alarm")
    assert alarm["message"].startswith("40 held-out examples have prompts that are trained on")


def test_a_stop_changes_no_accuracy(place):
    def of_weights(weights):
        return float(np.abs(np.asarray(jax.tree.leaves(weights.params)[0])).mean() % 1)

    def breaks(weights):
        if weights.version == 6:
            raise RuntimeError
        return of_weights(weights)

    main(config(place, "whole"), exam=scripted(of_weights))
    with pytest.raises(RuntimeError):
        main(config(place, "broken"), exam=scripted(breaks))
    main(config(place, "broken"), exam=scripted(of_weights))
    assert rows(place / "broken") == rows(place / "whole")
    assert len({row["held_out"] for row in rows(place / "whole") if "held_out" in row}) == 3


def test_every_key_of_the_exam_is_asked(place, monkeypatch):
    opened, sandboxes = [], []
    engine = FakeEngine(lambda prompt, seed, sample: "ab1" if sample else "abc")
    real = build.verifier_for

    def verifier_for(tasks, *, sandbox):
        sandboxes.append(sandbox)
        return real(tasks, sandbox=sandbox)

    monkeypatch.setattr(cli_stages, "local_engine", lambda *words: opened.append(words[3:]) or engine)
    monkeypatch.setattr(build, "verifier_for", verifier_for)
    asked = {"most": 4, "samples": 3, "max_tokens": 5, "temperature": 0.7, "slots": 2, "sandbox": "docker"}
    cfg = SampledConfig(tasks=(str(place / "tasks.jsonl"),), **asked)
    weights = Weights(version=1, params={"x": np.zeros(1)})
    with cli_stages.open_exam(cfg, False, 3, MODEL, ByteTokenizer()) as exam:
        assert exam.tasks == 4
        found = exam.accuracy(weights)
        assert exam.accuracy(weights) == found
    assert found["all"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert opened == [(2, 3 + 5)], "one engine for all evaluations"
    assert sandboxes == ["docker"]
    first, again = engine.seen[:4], engine.seen[4:]
    assert {(r.sampling.n, r.sampling.max_tokens, r.sampling.temperature) for r in first} == {(3, 5, 0.7)}
    assert [r.seed for r in first] == [r.seed for r in again]
    with cli_stages.open_exam(cfg, True, 4, MODEL, ByteTokenizer()) as exam:
        exam.accuracy(weights)
    assert [r.seed for r in engine.seen[8:]] != [r.seed for r in first]
    assert [r.prompt for r in engine.seen[8:]] == [[{"role": "user", "content": r.prompt}] for r in first]
    longest = max(len(encode_prompt(ByteTokenizer(), r.prompt)) for r in engine.seen[8:])
    assert opened[1:] == [(2, longest + 5)], "there is room for what the template writes"


def test_a_recipe_that_asks_needs_somebody_to_answer(place):
    with pytest.raises(ValueError, match=r"the recipe has eval\.sampled, so `main` needs `exam`"):
        main(config(place))


def test_tasks_that_cannot_be_read_are_one_line(place):
    (place / "tasks.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match=r"tasks\.jsonl:1: "):
        main(config(place), exam=cli_stages.open_exam)
