"""`cabochon rm`: from labelled completions to rows, a model, a table; one clear line for what is wrong."""

import json

import jax
import pytest
from typer.testing import CliRunner

from cabochon.cli import app
from cabochon.errors import UserError
from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.overrides import load
from cabochon.reward.config import RewardModelConfig
from cabochon.reward.judge import COT
from cabochon.reward.open import JudgeRun
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Task
from cabochon.verifiers.build import verifier_named

TOK = ByteTokenizer()
TINY = [
    "model.scratch.dim=16", "model.scratch.num_layers=2", "model.scratch.num_heads=2", "model.scratch.num_kv_heads=1",
    "model.scratch.head_dim=8", "model.scratch.moe={num_experts: 4, top_k: 2, ffn_dim: 16}",
    "step.sequence_length=64", "steps=3", "eval.every=0", "optim.total_steps=100", "run.tensorboard=false",
]  # fmt: skip


def cabochon(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def labelled(tmp_path):
    rows = [
        {"prompt": f"{i}+1=", "completion": str(i + 1 + (0 if good else 1)), "label": good}
        for i in range(20, 60)
        for good in (True, False)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_for_each_stage(tmp_path, labelled):
    cabochon("rm", "rows", labelled, tmp_path / "sft.jsonl", "judge-terse")
    cabochon("rm", "rows", labelled, tmp_path / "rl.jsonl", "judge-terse", "--for", "rl")
    cabochon("rm", "rows", labelled, tmp_path / "rm.jsonl", "--for", "rm")
    sft, rl, rm = (lines(tmp_path / f"{name}.jsonl") for name in ("sft", "rl", "rm"))
    assert (len(sft), len(rl), len(rm)) == (80, 80, 40)
    assert {row["completion"][0]["content"] for row in sft} == {"Verdict: Yes", "Verdict: No"}
    assert "<response>21</response>" in sft[0]["prompt"][0]["content"]
    task = Task(**rl[0])
    assert verifier_named(task.verifier).verify(task, f"Verdict: {task.payload['label']}").score == 1.0
    assert set(rm[0]) == {"prompt", "chosen", "rejected"}
    with pytest.raises(UserError, match=r"sft\.jsonl: exists"):
        cabochon("rm", "rows", labelled, tmp_path / "sft.jsonl", "judge-terse")


def test_a_policy_s_own_answers_are_labelled_by_their_verifiers_of_each_domain_alike(tmp_path):
    config = tiny_config(vocab_size=TOK.vocab_size, max_positions=64, eos_ids=TOK.eos_ids)
    convert.save(tmp_path / "model", config, tf.init(config, jax.random.key(0)), tokenizer=TOK)
    kinds = {"a": 6, "b": 2}
    verifier = {"verifier": f"{__file__}:even", "payload": {"by": 2}}
    some = [(domain, f"{domain}{i}") for domain, n in kinds.items() for i in range(n)]
    tasks = [{"id": name, "prompt": name, "domain": domain, **verifier} for domain, name in some]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    small = ["--n", 3, "--limit", 4, "--max-tokens", 8, "--slots", 4, "--length", 32]
    said = cabochon("rm", "sample", tmp_path / "model", tmp_path / "tasks.jsonl", tmp_path / "out.jsonl", *small)
    rows = lines(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows[::3]] == ["a0", "a1", "b0", "b1"]
    assert [row["label"] for row in rows] == [sum(map(ord, row["completion"])) % 2 == 0 for row in rows]
    assert len({row["label"] for row in rows}) == 2
    assert "12 completions" in said


def even(completions, by, **_):
    """A reward function as a user would write one: nothing to know, so an untrained model is right half the time."""
    return [float(sum(map(ord, text)) % n == 0) for text, n in zip(completions, by, strict=True)]


def test_train_and_evaluate_a_scalar_model(tmp_path, labelled):
    cabochon("rm", "rows", labelled, tmp_path / "pairs.jsonl", "--for", "rm")
    settings = [*TINY, f"data.train={tmp_path / 'pairs.jsonl'}", f"run.dir={tmp_path / 'run'}"]
    shown = cabochon("rm", "tiny-rm", *settings, "--dry-run")
    assert "stage: rm" in shown
    assert not (tmp_path / "run").exists()
    assert str(tmp_path / "run" / "final") in cabochon("rm", "tiny-rm", *settings)
    table = cabochon("rm", "eval", tmp_path / "run" / "final", labelled)
    assert "attacks" in table
    report = json.loads((tmp_path / "run" / "eval-labelled.json").read_text())
    assert report["completions"] == 80
    assert report["statuses"] == {"ok": 80}
    assert set(report["attacks"]) >= {"padding", "verdict", "leave the tags"}
    assert 0 <= report["auc"] <= 1


def test_recipes_of_judges_and_reward_models_are_read_by_their_stage():
    assert isinstance(load(JudgeRun, ["judge-terse"]), JudgeRun)
    assert load(JudgeRun, ["judge"]).judge.votes == 3
    assert load(JudgeRun, ["judge-cot"]).judge == COT
    assert load(RewardModelConfig, ["tiny-rm"]).stage == "rm"
    assert "stage: judge" in cabochon("config", "judge")
    assert "stage: rm" in cabochon("config", "tiny-rm")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rm", "tiny-rm", "data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["rm", "tiny-rm", "loss.center=0.1"], "unknown key loss.center; did you mean loss.centre\?"),
        (["rm", "eval", "nowhere", "rows.jsonl"], "nowhere: no such model|rows.jsonl: no such file"),
        (["rm", "eval", "http://localhost:1/v1", "LABELLED"], "which model of the endpoint"),
        (["rm", "rows", "LABELLED", "out.jsonl", "judge.template=nope"], "nope: no such judge template"),
        (["rm", "rows", "LABELLED", "out.jsonl", "judge.reason=true"], "no 'rationale' for a judge that reasons"),
    ],
)
def test_bad_input_is_one_line(tmp_path, labelled, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        cabochon(*[str(labelled) if word == "LABELLED" else word for word in words])
    assert "\n" not in str(caught.value)
