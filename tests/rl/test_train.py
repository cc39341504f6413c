"""The stage: it learns, a kill changes no number, a recipe that cannot work says so before anything is sampled."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from cabochon.config import PrecisionConfig
from cabochon.errors import MachineError, UserError
from cabochon.learner import Learner, LearnerConfig, TrainState, cross_entropy
from cabochon.model import transformer as tf
from cabochon.overrides import dump
from cabochon.policy import open_policy
from cabochon.rl import journal
from cabochon.rl.evaluate import answer
from cabochon.rl.learning import States
from cabochon.rl.recipe import RlConfig
from cabochon.rl.train import formats, main, published_by, tasks_of
from cabochon.rl.worth import rewarded
from cabochon.rollouts.sampler import Sampler
from cabochon.testing import tiny_config, tiny_moe
from cabochon.types import Completion, Rollout, Task, Verdict

MODEL = tiny_moe(
    family="qwen3_moe", vocab_size=264, num_layers=2, layer_kinds=("moe", "moe"), head_dim=8, eos_ids=(260, 258),
    moe=tiny_moe().moe.model_copy(update={"shared_ffn_dim": 0}),
)  # fmt: skip

REWARD = '''
def letters(prompts, completions, **columns):
    """The share of bytes that are lower-case letters."""
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in completions]
'''


@pytest.fixture
def place(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    for name, n in (("train", 12), ("held", 4)):
        rows = [
            {
                "id": f"{name}/{i}",
                "prompt": f"{name} {i}:",
                "verifier": f"{tmp_path}/reward.py:letters",
                "domain": f"d{i % 2}",
            }
            for i in range(n)
        ]
        # one task of the maths kind, so that the pool has something to prove itself with
        rows.append(
            {
                "id": f"{name}/sum",
                "prompt": f"{name} 1+1=",
                "verifier": "math",
                "payload": {"answer": "2"},
                "domain": "d0",
            }
        )
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def config(place, run="run", **changes):
    base = {
        "model": {"scratch": MODEL.model_dump(mode="json")},
        "tasks": {
            "train": [str(place / "train.jsonl")],
            "held_out": [str(place / "held.jsonl")],
            "shares": {"d0": 1, "d1": 1},
        },
        "engine": {"kind": "local", "slots": 16, "length": 32},
        "rollout": {"prompts": 4, "group_size": 4},
        "sampling": {"max_tokens": 8},
        "step": {"batch_size": 16, "sequence_length": 32, "micro_batches": 2},
        "optim": {"learning_rate": 1e-2},
        "update": {"algorithm": {"kind": "grpo"}},
        "run": {"dir": str(place / run), "save_every": 2, "log_every": 100},
        "samples_every": 0,
        "steps": 4,
    }
    return RlConfig.model_validate(base | changes)


def test_the_weights_it_began_from_are_not_kept(place, monkeypatch):
    """Of a large model they are gigabytes, beside those that are trained."""
    begun, alive, write = [], [], journal.write_rollouts

    def opened(*args):
        policy = open_policy(*args)
        begun.extend(weakref.ref(x) for x in jax.tree.leaves(policy.params))
        return policy

    def written(*args):
        gc.collect()
        alive.append(sum(x() is not None for x in begun))
        write(*args)

    monkeypatch.setattr("cabochon.rl.train.open_policy", opened)
    monkeypatch.setattr(journal, "write_rollouts", written)
    main(config(place, steps=2))
    assert len(begun) > 10
    assert alive == [0, 0]


def metrics(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "clock"} for row in rows]


def test_the_policy_that_learns_has_the_temperature_it_is_sampled_at(place):
    cfg = config(place, steps=2, sampling={"max_tokens": 8, "temperature": 0.6})
    main(cfg)
    rows = metrics(place / "run")
    assert all(r["w_gap"] < 1e-4 and r["entropy"] > 0 for r in rows)


def test_it_learns_and_writes_what_was_decided(place):
    cfg = config(place, steps=25)
    final = main(cfg)
    rows = metrics(place / "run")
    first, last = (np.mean([r["score"] for r in part]) for part in (rows[:4], rows[-4:]))
    assert last > first + 0.3, f"{first:.2f} -> {last:.2f}"
    events = [json.loads(line) for line in (place / "run" / "events.jsonl").read_text().splitlines()]
    before = next(e["held_out"]["all"] for e in events if e["event"] == "held out")
    assert rows[-1]["held_out"] > before + 0.2, "on prompts it never saw"
    assert all(r["w_gap"] < 1e-4 for r in rows), "sampler and learner agree, routes replayed"
    assert all(r["off_ratio"] == 0 for r in rows), "one update: the ratio is 1 bit for bit"
    lines = [json.loads(x) for x in (place / "run/rollouts/step_000025.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert {x["verdict"]["status"] for x in lines} <= {"ok", "wrong", "no_answer", "malformed"}
    by_group = {g: [x["advantage"] for x in lines if x["group"] == g] for g in {x["group"] for x in lines}}
    assert all(abs(sum(a)) < 1e-3 for a in by_group.values()), "advantages are relative to the group"
    own = lambda name: [v for x in lines for v, drawn in zip(x[name], x["mask"], strict=True) if drawn]  # noqa: E731
    trained = [v for v in own("entropy") if v is not None]  # groups that are all alike are in no update
    assert rows[-1]["trained_tokens"] == len(trained) > 0
    assert abs(np.mean(trained) - rows[-1]["entropy"]) < 2e-3, "what the update saw, at its tokens"
    assert set(own("clipped")) <= {0.0, None}, "nothing is clipped in a first update"
    policy = open_policy(cfg.model.model_copy(update={"scratch": None, "address": str(final)}))
    assert policy.config.moe is not None
    assert json.loads((place / "run" / "manifest.json").read_text())["results"]["held_out"] == rows[-1]["held_out"]


@pytest.mark.parametrize("chat", [False, True])
def test_text_is_asked_through_the_chat_template_where_the_recipe_says_so(place, monkeypatch, chat):
    """In training and in the held-out evaluations; verifiers and the journal see the text that the row has."""
    seen, prepare = [], Sampler.prepare
    monkeypatch.setattr(Sampler, "prepare", lambda self, r, *where: seen.append(r.prompt) or prepare(self, r, *where))
    cfg = config(place, steps=1, engine={"kind": "local", "slots": 16, "length": 96},
                 step={"batch_size": 16, "sequence_length": 96})  # fmt: skip
    main(cfg.model_copy(update={"tasks": cfg.tasks.model_copy(update={"chat": chat})}))
    said = [prompt if isinstance(prompt, str) else prompt[0]["content"] for prompt in seen]
    assert {words.split()[0] for words in said} == {"train", "held"}
    assert seen == ([[{"role": "user", "content": words}] for words in said] if chat else said)
    lines = [json.loads(x) for x in (place / "run/rollouts/step_000001.jsonl").read_text().splitlines()]
    assert {x["prompt"] for x in lines} <= set(said)
    assert "infra_error" not in {x["verdict"]["status"] for x in lines}


def test_a_kill_changes_no_number(place):
    main(config(place, "whole", steps=6))
    file = place / "killed.yaml"
    file.write_text(dump(config(place, "killed", steps=6)))
    command = [sys.executable, "-P", "-m", "cabochon", "rl", str(file)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, deadline = place / "killed" / "metrics.jsonl", time.monotonic() + 120
    while not journal.exists() or journal.read_text().count("\n") < 3:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    main(config(place, "killed", steps=6))
    assert metrics(place / "killed") == metrics(place / "whole")
    weights = [(place / run / "final" / "model.safetensors").read_bytes() for run in ("killed", "whole")]
    assert weights[0] == weights[1]


def test_with_ray_and_a_lag_no_token_is_older_than_allowed(place):
    ray = {"kind": "ray", "slots": 16, "length": 32, "ray": {"workers": 1}}
    main(config(place, engine=ray, rollout={"prompts": 4, "group_size": 4, "max_lag": 1}, steps=5))
    rows = metrics(place / "run")
    assert max(r["lag"]["max"] for r in rows) == 1
    groups = [
        sorted({json.loads(x)["group"] for x in file.read_text().splitlines()})
        for file in sorted((place / "run" / "rollouts").iterdir())
    ]
    assert groups == [list(range(4 * i, 4 * i + 4)) for i in range(5)], "every group is learnt from once, in order"
    names = os.popen("ps -eo args").read()
    assert str(place) not in names, "nothing of Ray's is left"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout": {"prompts": 4, "group_size": 1}}, "rollout.group_size=1: update.algorithm.kind=grpo"),
        ({"step": {"batch_size": 4, "sequence_length": 32}}, "set step.batch_size to 16"),
    ],
)
def test_shapes_that_cannot_work_are_refused_with_the_recipe(place, changes, says):
    with pytest.raises(ValidationError, match=says):
        config(place, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"tasks": {"train": ["{place}/train.jsonl"], "held_out": ["{place}/train.jsonl"]}},
            "has the prompt of the training task",
        ),
        ({"tasks": {"train": ["{place}/train.jsonl", "{place}/train.jsonl"]}}, "is in two of the files"),
        (
            {"tasks": {"train": ["{place}/train.jsonl"], "held_out": ["{place}/held.jsonl", "{place}/held.jsonl"]}},
            "tasks.held_out: the id 'held/0' is in two of the files",
        ),
        ({"tasks": {"train": ["{place}/train.jsonl"], "shares": {"nothing": 1}}}, "domains d0, d1 only"),
    ],
)
def test_recipes_that_cannot_work(place, changes, says):
    text = json.loads(json.dumps(changes).replace("{place}", str(place)))
    with pytest.raises(UserError, match=says):
        main(config(place, **text))
    assert not (place / "run" / "metrics.jsonl").read_text() if (place / "run" / "metrics.jsonl").exists() else True


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim": {"learning_rate": 0.0}}, "the learning rate is 0"),
        ({"tasks": {"train": ["{place}/impossible.jsonl"]}}, "the gradient is 0. Every advantage is 0"),
    ],
)
def test_runs_that_learn_nothing_are_stopped_in_their_first_steps(place, changes, says):
    row = {"id": "x", "prompt": "1+1=", "verifier": "math", "payload": {"answer": "123456789012"}}
    (place / "impossible.jsonl").write_text(json.dumps(row) + "\n")
    text = json.loads(json.dumps(changes).replace("{place}", str(place)))
    with pytest.raises(MachineError, match=says):
        main(
            config(
                place, fail_on_alarm=True, alarms={"truncated": 1.0, "no_answer": 1.0, "entropy": 0}, steps=9, **text
            )
        )
    assert len(metrics(place / "run")) <= 3


LONGER = {"sampling": {"max_tokens": 4}, "phases": [{"name": "b", "start": 2, "max_tokens": 7}]}


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("train", {}, "tasks.train: task 'long': the prompt's 26 tokens and max_tokens=8 do not fit in engine.len"),
        ("held", {}, "tasks.held_out: task 'long': the prompt's 26 tokens and max_tokens=8 do not fit"),
        ("train", {"sampling": {"max_tokens": 4}}, ""),
        ("train", LONGER, "max_tokens=7"),
        ("held", LONGER, "max_tokens=7"),
        ("held", {"sampling": {"max_tokens": 8}, "phases": [{"name": "b", "start": 2, "max_tokens": 4}]}, ""),
        (
            "train",
            {"sampling": {"max_tokens": 4},
             "phases": [{"name": "b", "start": 2, "max_tokens": 7, "shares": {"long": 0}}]},
            "",
        ),
        ("train", {"environment": {"tools": ["calculator"]}}, ""),
    ],
)  # fmt: skip
def test_a_prompt_that_leaves_no_room_is_named_before_anything_begins(place, file, changes, says):
    long = {"id": "long", "prompt": "x" * 26, "verifier": "math", "payload": {"answer": "2"}, "domain": "long"}
    with (place / f"{file}.jsonl").open("a") as tasks:
        tasks.write(json.dumps(long) + "\n")
    cfg = config(place, **changes)
    if says:
        with pytest.raises(UserError) as refused:
            tasks_of(cfg)
        assert says in str(refused.value)
    else:
        tasks_of(cfg)


def test_the_tags_are_asked_of_whom_thinking_is_asked_of(place):
    def values(prompt="1+1=", **changes):
        c = Completion(
            tokens=np.zeros(1, np.int32), logprobs=np.zeros(1, np.float32), mask=np.ones(1, bool), text="2",
            finish="stop", policy_version=np.zeros(1, np.int32),
        )  # fmt: skip
        task = Task(id="t", prompt=prompt, verifier="math", payload={"answer": "2"})
        cfg = config(place, reward={"format_penalty": 0.3, **changes.pop("reward", {})}, **changes)
        one = [Rollout(task=task, completion=c, group=0, verdict=Verdict(score=1.0, status="ok"))]
        return rewarded(cfg, one, {}, format_=formats(cfg, one)).reward_N.tolist()

    assert values() == [1.0], "a plain completion loses nothing"
    assert values(sampling={"max_tokens": 8, "thinking": {"max_tokens": 2}}) == [0.7]
    assert values("Put your thoughts between <think> and </think>. 1+1=") == [0.7]
    assert values([{"role": "system", "content": "Begin with <think>."}, {"role": "user", "content": "1+1="}]) == [0.7]


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_changed(place):
    (place / "run/checkpoints/0003-step-45").mkdir(parents=True)
    (place / "run/config.yaml").write_text(dump(config(place, steps=60)))
    with pytest.raises(UserError, match="45 steps are done there, steps=20 has fewer: give steps=45 or more"):
        main(config(place, steps=20), resume_anyway=True)
    assert "steps: 60" in (place / "run/config.yaml").read_text()
    assert sorted(p.name for p in (place / "run").iterdir()) == ["checkpoints", "config.yaml"]


def test_evaluations_of_one_run_draw_alike_whatever_the_phase(place, monkeypatch):
    drawn = []

    def asked(engine, verifiers, tasks, sampling, seed, **more):
        drawn.append((sampling.max_tokens, sampling.thinking))
        return answer(engine, verifiers, tasks, sampling, seed, **more)

    monkeypatch.setattr("cabochon.rl.train.answer", asked)
    main(config(place, steps=2, eval={"every": 1}, phases=[{"name": "short", "start": 2, "max_tokens": 3}]))
    assert drawn == [(3, None)] * 3, "before, in the first phase, in the last"


def test_that_nothing_is_held_out_is_said_where_evaluations_are_asked_for(place):
    main(config(place, steps=0, eval={"every": 1}, tasks={"train": [str(place / "train.jsonl")]}))
    events = [json.loads(line) for line in (place / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["message"].split(":")[0] for e in events if e["event"] == "held out"] == ["tasks.held_out names no file"]


GRADED = '''
from pathlib import Path

def graded(prompts, completions, **columns):
    """As the file beside says, else half and half."""
    level = Path(__file__).with_name("level")
    given = float(level.read_text()) if level.exists() else None
    return [len(set(text)) % 2 if given is None else given for text in completions]
'''


@pytest.fixture
def graded(place, monkeypatch):
    """`graded(level)`: a DAPO recipe all whose completions have this score from step 3 on."""
    (place / "graded.py").write_text(GRADED)
    rows = [
        {"id": f"g{i}", "prompt": f"graded {i}:", "verifier": f"{place}/graded.py:graded", "domain": "g"}
        for i in range(9)
    ]
    sums = {"id": "sum", "prompt": "1+1=", "verifier": "math", "payload": {"answer": "2"}, "domain": "sums"}
    (place / "graded.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, sums]))
    write = journal.write_rollouts

    def recipe(level):
        def written(folder, step, rows):
            write(folder, step, rows)
            if step == 2:
                (place / "level").write_text(str(level))

        monkeypatch.setattr(journal, "write_rollouts", written)
        return config(
            place, steps=5, update={"algorithm": {"kind": "dapo"}},
            tasks={"train": [str(place / "graded.jsonl")], "held_out": [str(place / "held.jsonl")],
                   "shares": {"sums": 0}},
            rollout={"prompts": 2, "group_size": 4, "refills": 1},
        )  # fmt: skip

    return recipe


def test_a_run_that_has_nothing_left_to_learn_ends_well(place, graded):
    cfg = graded(1.0)
    final = main(cfg)
    assert open_policy(cfg.model.model_copy(update={"scratch": None, "address": str(final)})).config.moe is not None
    events = [json.loads(line) for line in (place / "run" / "events.jsonl").read_text().splitlines()]
    said = [e["message"] for e in events if e["event"] == "solved"]
    assert said == ["every group is solved at step 3: nothing left to learn"]
    rows = metrics(place / "run")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert (rows[-1]["score"], rows[-1]["groups_solved"], rows[-1]["kept"], rows[-1]["groups_dropped"]) == (1, 1, 0, 4)
    manifest = json.loads((place / "run" / "manifest.json").read_text())
    assert (manifest["steps"], manifest["results"]["held_out"]) == (3, rows[-1]["held_out"])
    assert main(cfg) == final, "it is finished"


def test_a_run_whose_groups_are_all_wrong_stops_with_a_checkpoint_and_goes_on(place, graded):
    cfg = graded(0.0)
    with pytest.raises(UserError, match=r"step 3: all 4 groups .*0 all right and 4 all wrong.*sampling.max_tokens"):
        main(cfg)
    lines = [json.loads(x) for x in (place / "run/rollouts/step_000003.jsonl").read_text().splitlines()]
    assert [x["reward"] for x in lines] == [0.0] * 16, "what was drawn can be looked at"
    assert not (place / "run" / "final").exists()
    (place / "level").unlink()
    main(cfg)
    assert [r["step"] for r in metrics(place / "run")] == [1, 2, 3, 4, 5]


def test_a_last_step_that_is_all_wrong_is_evaluated_before_it_says_so(place, graded):
    cfg = graded(0.0).model_copy(update={"steps": 3})
    with pytest.raises(UserError, match="step 3: all 4 groups"):
        main(cfg)
    main(cfg)  # no step is left, and the result is whole
    results = json.loads((place / "run" / "manifest.json").read_text())["results"]
    assert results["held_out"] == metrics(place / "run")[-1]["held_out"]


def test_a_recipe_that_learnt_nothing_yet_can_be_mended_in_its_place(place, graded):
    (place / "level").write_text("1.0")
    cfg = graded(1.0)
    with pytest.raises(UserError, match=r"step 1: all 4 groups .*every completion was right.*: choose harder tasks"):
        main(cfg)
    assert (place / "run/rollouts/step_000001.jsonl").exists()
    (place / "level").unlink()
    main(cfg.model_copy(update={"seed": 1, "steps": 1}))


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"lora": {"rank": 2}, "update": {"algorithm": {"kind": "grpo"}, "kl": {"coef": 0.1}}}, "kl_reference"),
        (
            {
                "update": {
                    "algorithm": {"kind": "ppo", "critic": "shared", "warmup_updates": 0},
                    "kl": {"coef": 0.1, "placement": "reward"},
                }
            },
            "kl_reward",
        ),
    ],
    ids=["lora", "shared critic"],
)
def test_the_reference_is_the_policy_before_it_learnt_whatever_the_learner_adds_to_it(place, more, key):
    main(config(place, steps=3, **more))
    first, *_, last = (r[key] for r in metrics(place / "run"))
    assert abs(first) < 1e-6
    assert abs(last) > 1e-4


ENVIRONMENT = '''
from cabochon.errors import MachineError
from cabochon.rollouts.environment import Step

class Flaky:
    tools = ()

    def reset(self, task):
        if task.id in ("train/3", "train/7"):
            raise MachineError("no server")
        return [{"role": "user", "content": task.prompt}]

    def step(self, text):
        return Step(done=True)

    def close(self):
        pass
'''


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_an_environment_that_fails_at_once_costs_its_episodes_and_not_the_run(place, critic):
    (place / "flaky.py").write_text(ENVIRONMENT)
    algorithm = {"kind": "ppo", "critic": critic, "warmup_updates": 3 if critic == "own" else 0}
    if critic == "own":
        algorithm["critic_learning_rate"] = 5e-3
    cfg = config(
        place, steps=3, environment={"address": f"{place / 'flaky.py'}:Flaky", "turns": 1},
        engine={"kind": "local", "slots": 16, "length": 96}, step={"batch_size": 16, "sequence_length": 96},
        update={"algorithm": algorithm, "minibatches": 2, "kl": {"coef": 0.01, "placement": "reward"}},
    )  # fmt: skip
    main(cfg)
    rows = metrics(place / "run")
    assert sum(r["infra_errors"] for r in rows) in (4, 8), "groups of one or both of the two tasks"
    assert all(r["trained_tokens"] for r in rows)
    if critic == "own":
        assert ["weights_change" in r for r in rows] == [False, False, True], "3 updates of the critic, 2 a step"
        assert [r["critic_learning_rate"] for r in rows] == pytest.approx([5e-3] * 3)
        assert rows[-1]["learning_rate"] == pytest.approx(1e-2)


def test_a_change_too_small_for_the_engine_s_numbers_is_none():
    params = jax.tree.map(jnp.ones_like, tf.init(tiny_config(), jax.random.key(0)))
    more = jax.tree.map(lambda x: x * (1 + 1e-5), params)
    for compute, changed in (("float32", 1.0), ("bfloat16", 0.0)):
        shape = LearnerConfig(model=tiny_config(), precision=PrecisionConfig(compute=compute))
        learner = Learner(shape, cross_entropy)
        a, b = (
            published_by(learner, States(TrainState(step=0, params=p, opt_state=None), None)) for p in (params, more)
        )
        assert (a != b).mean() == changed


class Yes(BaseHTTPRequestHandler):
    """An endpoint's judge that likes everything."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "message": {"content": "Verdict: Yes"}, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 4}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_judge_behind_an_endpoint_and_what_a_run_does_without_it(place):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Yes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (place / "far.yaml").write_text(
        "stage: judge\njudge: {reason: false}\ntop_logprobs: 0\n"
        "endpoint: {attempts: 1, concurrency: 4, prompt_price: 1000000}\n"
    )
    changes = {
        "models": {"far": {"address": f"http://127.0.0.1:{server.server_port}/v1#m", "judge": str(place / "far.yaml")}},
        "reward": {"combine": "weighted", "weights": {"verifier": 0.5, "far": 0.5}},
    }

    def lines(run, file="metrics"):
        return [json.loads(line) for line in (place / run / f"{file}.jsonl").read_text().splitlines()]

    main(config(place, steps=2, **changes))
    asked = [row["clock"]["endpoint_far"]["requests"] for row in lines("run")]
    for row in lines("run"):
        assert row["parts"]["far"] == 1.0
        assert row["unrewarded"] == 0
        assert row["clock"]["endpoint_far"]["cost"] == 10.0 * row["clock"]["endpoint_far"]["requests"]
    assert 0 < asked[0] < asked[1] <= 32
    server.shutdown()
    server.server_close()
    main(config(place, "alone", steps=2, **changes))
    for row in lines("alone"):
        assert row["unrewarded"] == row["kept"] == 16, "a judge that is down is never a reward of 0"
        assert row["unrewarded_by"]["far"] == 16
        assert row["trained_tokens"] == 0
        assert row["clock"]["endpoint_far"]["attempts"] <= 8 * row["step"], "the rest is not sent"
    assert "unjudged" in [e.get("alarm") for e in lines("alone", "events")]


@pytest.mark.parametrize("part", ["policy", "judge"])
def test_a_run_knows_the_models_it_began_with_from_others_at_the_same_place(place, part):
    model = {"address": str(main(config(place, "first", steps=1)))}
    changes = {"model": model} if part == "policy" else {"models": {"judge": model | {"judge": "judge-terse"}}}
    cfg = config(place, steps=1, **changes)
    main(cfg)
    main(config(place, "first", steps=2, seed=1), resume_anyway=True)
    with pytest.raises(UserError, match="first/final was changed since"):
        main(cfg)


@pytest.mark.parametrize(
    "update",
    [
        {"algorithm": {"kind": "ppo", "warmup_updates": 1}},
        {"algorithm": {"kind": "c3po", "budget": 64}, "minibatches": 2},
        {"algorithm": {"kind": "dapo"}, "epochs": 2, "kl": {"coef": 0.01}},
        {
            "algorithm": {"kind": "reinforce_pp"},
            "kl": {"coef": 0.01, "placement": "reward", "target": 0.1},
            "router": {"replay": "r2"},
        },
    ],
    ids=lambda u: u["algorithm"]["kind"],
)
@pytest.mark.slow
def test_every_kind_of_update_learns(place, update):
    main(config(place, update=update, steps=25, optim={"learning_rate": 5e-3}))
    rows = metrics(place / "run")
    first, last = (np.mean([r["score"] for r in part]) for part in (rows[:4], rows[-4:]))
    assert last > first + 0.2, f"{first:.2f} -> {last:.2f}"
    if update.get("epochs", 1) > 1:
        lines = [json.loads(x) for p in (place / "run/rollouts").iterdir() for x in p.read_text().splitlines()]
        assert 1.0 in {v for x in lines for v in x["clipped"]}, "the second pass over a batch clips"
