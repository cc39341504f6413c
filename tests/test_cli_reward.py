"""`cabochon rm`: from labelled completions to rows, a model, a table; one clear line for what is wrong."""

import json

import jax
import pytest
from typer.testing import CliRunner

from cabochon import cli_reward
from cabochon.cli import app
from cabochon.errors import UserError
from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.overrides import load
from cabochon.reward.asking import Reading
from cabochon.reward.config import RewardModelConfig
from cabochon.reward.judge import COT, PAIRWISE, Judge
from cabochon.reward.open import JudgeRun, local_asker
from cabochon.testing import FakeEngine, tiny_config
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
    cabochon("rm", "rows", labelled, tmp_path / "more.jsonl", "judge-terse", "--attack", "0.5")
    more = lines(tmp_path / "more.jsonl")
    assert (more[:80], len(more)) == (sft, 120)
    cabochon("rm", "rows", labelled, tmp_path / "more-rm.jsonl", "--for", "rm", "--attack", "1")
    assert len(lines(tmp_path / "more-rm.jsonl")) == 80
    pairwise = ("judge-terse", "pairwise=true", "judge.template=terse-pair")
    cabochon("rm", "rows", labelled, tmp_path / "both.jsonl", *pairwise)
    both = lines(tmp_path / "both.jsonl")
    assert [row["completion"][0]["content"] for row in both] == ["Verdict: A", "Verdict: B"] * 40
    assert "<first>21</first>\n<second>22</second>" in both[0]["prompt"][0]["content"]
    with pytest.raises(UserError, match="--no-match: a judge of pairs"):
        cabochon("rm", "rows", labelled, tmp_path / "x.jsonl", "pairwise=true", "--no-match")
    task = Task(**rl[0])
    assert verifier_named(task.verifier).verify(task, f"Verdict: {task.payload['label']}").score == 1.0
    assert set(rm[0]) == {"prompt", "chosen", "rejected"}
    with pytest.raises(UserError, match=r"sft\.jsonl: exists"):
        cabochon("rm", "rows", labelled, tmp_path / "sft.jsonl", "judge-terse")


def test_a_row_may_hold_half_of_a_surrogate_pair(tmp_path):
    rows = [{"prompt": "say \ud83d", "completion": f"{i} \ud83d", "label": i > 1} for i in range(4)]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cabochon("rm", "rows", tmp_path / "labelled.jsonl", tmp_path / "rm.jsonl", "--for", "rm")
    assert {row["prompt"] for row in lines(tmp_path / "rm.jsonl")} == {"say ?"}


@pytest.fixture
def model(tmp_path):
    """The directory of a language model that nobody trained."""
    config = tiny_config(vocab_size=TOK.vocab_size, max_positions=64, eos_ids=TOK.eos_ids)
    convert.save(tmp_path / "model", config, tf.init(config, jax.random.key(0)), tokenizer=TOK)
    return tmp_path / "model"


@pytest.fixture
def tasks(tmp_path):
    kinds = {"a": 6, "b": 2}
    verifier = {"verifier": f"{__file__}:even", "payload": {"by": 2}}
    some = [(domain, f"{domain}{i}") for domain, n in kinds.items() for i in range(n)]
    tasks = [{"id": name, "prompt": name, "domain": domain, **verifier} for domain, name in some]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return tmp_path / "tasks.jsonl"


def sampled(monkeypatch, reply, *words):
    """What `rm sample` says and what it asked, of a model that answers `reply(prompt, seed, sample)`."""
    engine = FakeEngine(reply)
    monkeypatch.setattr(cli_reward, "make_engine", lambda *_, **__: engine)
    return cabochon("rm", "sample", *words, "--n", 3, "--limit", 4, "--max-tokens", 8), engine.seen


def test_a_policy_s_own_answers_are_labelled_by_their_verifiers_of_each_domain_alike(
    tmp_path, monkeypatch, model, tasks
):
    """Every third one is cut off before it ends: it is no row, and counted."""
    reply = lambda prompt, seed, sample: prompt + "xy"[sample % 2] + "z" * 9 * (sample == 2)  # noqa: E731
    said, seen = sampled(monkeypatch, reply, model, tasks, tmp_path / "out.jsonl")
    rows = lines(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows[::2]] == ["a0", "a1", "b0", "b1"]
    assert [row["completion"] for row in rows[:2]] == ["a0x", "a0y"]
    assert [row["label"] for row in rows] == [sum(map(ord, row["completion"])) % 2 == 0 for row in rows]
    assert len({row["label"] for row in rows}) == 2
    assert "8 completions, 50% right; 4 were cut off, 0 could not be judged" in said
    assert [r.prompt for r in seen] == ["a0", "a1", "b0", "b1"]


def test_a_policy_is_sampled_in_the_chat_template_where_asked(tmp_path, monkeypatch, model, tasks):
    _, seen = sampled(monkeypatch, lambda *_: "x", model, tasks, tmp_path / "out.jsonl", "--chat")
    assert seen[0].prompt == [{"role": "user", "content": "a0"}]
    assert lines(tmp_path / "out.jsonl")[0]["prompt"] == "a0"


def test_a_policy_whose_answers_are_all_cut_off_gives_no_rows(tmp_path, monkeypatch, model, tasks):
    with pytest.raises(UserError, match=r"none of 12 completions can be used: 12 were cut off, .* raise --max-tokens"):
        sampled(monkeypatch, lambda *_: "x" * 20, model, tasks, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_is_there_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, model, tasks):
    drawn = []
    reply = lambda *asked: drawn.append(asked) or "x"  # noqa: E731
    with pytest.raises(UserError, match=r"tasks\.jsonl: exists; choose another name"):
        sampled(monkeypatch, reply, model, tasks, tasks)
    assert drawn == []


def test_rows_show_a_judge_what_it_will_see(tmp_path, model):
    """The tags of thinking are tokens of its own tokenizer, so they are taken out when it is asked."""
    rows = [{"prompt": "1+1=", "completion": f"<think>hm</think>{n}", "label": n == 2} for n in (2, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []
    for name, more in (("any", []), ("own", ["--model", model])):
        out = tmp_path / f"{name}.jsonl"
        cabochon("rm", "rows", tmp_path / "rows.jsonl", out, "judge-terse", "judge.show_thinking=true", *more)
        made.append(lines(out)[0]["prompt"][0]["content"])
    task = Task(id="t", prompt="1+1=", verifier="none")
    run = load(JudgeRun, ["judge-terse"], ["judge.show_thinking=true"])
    judge = Judge(local_asker(str(model), run, lambda *_: None), run.judge)
    shown = judge.prompt(task, "<think>hm</think>2", run.judge.criteria[0])
    assert "hm2" in shown
    assert [text == shown for text in made] == [False, True]


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
    with pytest.raises(UserError, match=r"a scalar reward model; judge\.vots=3 is for judges, leave it out"):
        cabochon("rm", "eval", tmp_path / "run" / "final", labelled, "judge.vots=3")
    with pytest.raises(UserError, match="final: a scalar reward model, which writes no text"):
        cabochon("generate", tmp_path / "run" / "final", "--prompt", "hi")


def test_a_judge_of_pairs_by_one_setting(tmp_path, monkeypatch, labelled, model):
    """Its template and question are those of pairs. The report of a model that is no directory is written here."""
    monkeypatch.setattr(cli_reward, "open_asker", lambda *_: Even())
    monkeypatch.setattr(cli_reward, "_scalar", lambda *_: False)
    monkeypatch.chdir(tmp_path)
    cabochon("rm", "eval", "hf:owner/name", labelled, "pairwise=true")
    assert json.loads((tmp_path / "eval-labelled.json").read_text())["model"] == "hf:owner/name"
    assert not (tmp_path / "hf:owner").exists()
    run = load(JudgeRun, [], ["pairwise=true", "judge.reason=false"])
    assert (run.judge.template, run.judge.criteria, run.judge.reason) == ("pairwise", PAIRWISE.criteria, False)
    assert load(JudgeRun, [], ["pairwise=true", "judge.template=terse-pair"]).judge.template == "terse-pair"
    with pytest.raises(UserError, match=r"no \{\{ first \}\}.*; for pairs set judge\.template=pairwise or terse-pair"):
        cabochon("rm", "eval", "m", labelled, "judge-terse", "pairwise=true")
    with pytest.raises(UserError, match=r"--own me: is of answers judged one by one"):
        cabochon("rm", "eval", "m", labelled, "pairwise=true", "--own", "me")
    with pytest.raises(UserError, match=r"judge\.calibration is of single verdicts"):
        load(JudgeRun, [], ["pairwise=true", "judge.calibration.slope=2.0"])


class Three:
    """Votes yes, yes and no on whatever it is asked."""

    model_id, specials = "three", ()

    def ask(self, prompts, choices, **_):
        said = [Reading(status="ok", probabilities=(1 - yes, yes)) for yes in (0.9, 0.8, 0.1)]
        return [said for _ in prompts]


def test_eval_asks_a_judge_of_the_reasoning_behind_right_answers(tmp_path, monkeypatch, model, tasks):
    asked = []
    monkeypatch.setattr(cli_reward, "open_asker", lambda address, run: asked.append((address, run.judge)) or Three())
    words = ("eval", model, "--tasks", tasks, "--samples", "2", "--max-tokens", "4", "--out", tmp_path / "e.json")
    assert "CoT" not in cabochon(*words)
    assert "CoT-Pass@2" in cabochon(*words, "--judge", "j")
    assert asked == [("j", COT)]
    report = json.loads((tmp_path / "e.json").read_text())
    found = report["evaluations"][0]["domains"]["all"]
    assert 0 < found["pass@1"] < 1, "some are right, some are not"
    assert found["CoT-Pass@1"] == found["reasoning"]["any"]["1"] == found["pass@1"], "two of three votes are a majority"
    assert found["reasoning"]["all"]["1"] == 0.0
    assert (found["reasoning"]["sound"], report["asked"]["judge"]) == (1.0, "j")
    (tmp_path / "pairs.yaml").write_text("stage: judge\npairwise: true\n")
    with pytest.raises(UserError, match=r"--judge-recipe .*pairs\.yaml: compares two"):
        cabochon(*words, "--judge", "j", "--judge-recipe", tmp_path / "pairs.yaml")


class Even:
    """Judges of any two that neither is better."""

    model_id, specials = "even", ()

    def ask(self, prompts, choices, **_):
        return [[Reading(status="ok", probabilities=(0.5, 0.5))] for _ in prompts]


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
        (["rm", "eval", "http:/host#m", "LABELLED"], "http:/host#m: .*expected an address such as http://localhost"),
        (["rm", "eval", "broken", "LABELLED"], r"broken/config.json: not JSON at line 1"),
        (["rm", "eval", "http://localhost:1/v1#m", "one.jsonl", "pairwise=true"], "one.jsonl: no prompt has a right"),
        (["rm", "rows", "LABELLED", "out.jsonl", "judge.template=nope"], "nope: no such judge template"),
        (["rm", "rows", "LABELLED", "out.jsonl", "judge.reason=true"], "no 'rationale' for a judge that reasons"),
    ],
)
def test_bad_input_is_one_line(tmp_path, labelled, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "one.jsonl").write_text('{"prompt": "q", "completion": "a", "label": true}\n')
    with pytest.raises(UserError, match=said) as caught:
        cabochon(*[str(labelled) if word == "LABELLED" else word for word in words])
    assert "\n" not in str(caught.value)
