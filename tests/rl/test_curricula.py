"""The stage with environments, curricula and phases: what a step trains on, and that a stop changes no number."""

import json

import numpy as np
import pytest
from products import same

from cabochon.errors import UserError
from cabochon.rl.recipe import RlConfig
from cabochon.rl.train import main
from cabochon.testing import tiny_moe

MODEL = tiny_moe(
    family="qwen3_moe", vocab_size=264, num_layers=2, layer_kinds=("moe", "moe"), head_dim=8, eos_ids=(260, 258),
    moe=tiny_moe().moe.model_copy(update={"shared_ffn_dim": 0}),
)  # fmt: skip

WORLD = '''
from cabochon.rollouts.environment import Step

class Halves:
    """Says, after the first turn, of which half of the alphabet the second has to be; pays the share that is."""
    tools = ()

    def reset(self, task):
        self.half, self.turn = task.payload["half"], 0
        return [{"role": "user", "content": task.prompt}]

    def step(self, text):
        self.turn += 1
        if self.turn == 1:
            return Step(observation=({"role": "user", "content": "1111" if self.half else "0000"},))
        wanted = range(110, 123) if self.half else range(97, 110)
        return Step(reward=sum(ord(c) in wanted for c in text) / max(len(text), 1), done=True)

    def close(self):
        pass

def letters(prompts, completions, **columns):
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in completions]
'''
ENDS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 !#$%&()*+,-./:;<=>?@[]^_{|}~"
"""characters that end a turn: a policy that was never trained writes one soon"""


@pytest.fixture
def place(tmp_path):
    """Tasks of both halves share each prompt: only the observation tells them apart."""
    (tmp_path / "world.py").write_text(WORLD)
    rows = [
        {"id": f"t{i}", "prompt": f"{i // 4}:", "verifier": f"{tmp_path}/world.py:letters", "domain": f"d{i % 2}",
         "payload": {"half": i // 2 % 2, "tokens": 4}}
        for i in range(12)
    ]  # fmt: skip
    # of the maths kind, so that the pool has something to prove itself with
    rows.append({"id": "sum", "prompt": "1+1=", "verifier": "math", "domain": "sums",
                 "payload": {"answer": "2", "half": 0, "tokens": 4}})  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps(rows[0] | {"id": "held", "prompt": "another:"}) + "\n")
    return tmp_path


def config(place, run="run", save_every=2, **changes):
    base = {
        "model": {"scratch": MODEL.model_dump(mode="json")},
        "tasks": {"train": [str(place / "train.jsonl")], "shares": {"d0": 1, "d1": 1, "sums": 0}},
        "engine": {"kind": "local", "slots": 16, "length": 128},
        "rollout": {"prompts": 4, "group_size": 4},
        "sampling": {"max_tokens": 8},
        "step": {"batch_size": 16, "sequence_length": 128, "micro_batches": 2},
        "optim": {"learning_rate": 1e-2},
        "update": {"algorithm": {"kind": "grpo"}},
        "run": {"dir": str(place / run), "save_every": save_every, "log_every": 100},
        "samples_every": 0,
        "steps": 4,
    }
    return RlConfig.model_validate(base | changes)


def turns(place, **changes):
    """The recipe of two turns, of which the environment pays the second."""
    some = {
        "environment": {"address": f"{place}/world.py:Halves", "turns": 3},
        "sampling": {"max_tokens": 12, "stop": list(ENDS)},
        "reward": {"combine": "weighted", "weights": {"verifier": 0.0}},
    }
    return config(place, **(some | changes))


def metrics(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "clock"} for row in rows]


def lines(directory, step):
    return [json.loads(x) for x in (directory / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()]


def stopped_and_resumed(monkeypatch, cfg, after):
    """The recipe, interrupted in its `after`-th step and called again."""
    from cabochon.rl import journal

    write = journal.write_rollouts

    def interrupted(folder, step, rows):
        if step == after:
            raise RuntimeError("pulled out")
        write(folder, step, rows)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_rollouts", interrupted)
        with pytest.raises(RuntimeError, match="pulled out"):
            main(cfg)
    main(cfg)


def test_episodes_are_trained_on_where_the_policy_spoke(place, monkeypatch):
    held = {"train": [str(place / "train.jsonl")], "held_out": [str(place / "held.jsonl")], "shares": {"sums": 0}}
    main(turns(place, tasks=held))
    rows = metrics(place / "run")
    some = [x for step in (1, 2, 3, 4) for x in lines(place / "run", step)]
    two = [x for x in some if 0 in x["mask"]]
    assert len(two) > len(some) / 2, "most came to the second turn"
    for x in two:
        gap = np.flatnonzero(np.array(x["mask"]) == 0)
        assert np.array_equal(gap, np.arange(gap[0], gap[-1] + 1)), "one observation"
        told = bytes(t for t in np.array(x["tokens"])[gap] if t < 256)
        assert told.count(b"1111" if x["payload"]["half"] else b"0000") == 1
        assert np.all(np.array(x["logprobs"])[gap] == 0)
    assert all((x["components"]["environment"] is None) == (x["finish"] == "length") for x in some), "no end, no pay"
    assert all(x["reward"] == pytest.approx(x["components"]["environment"] or 0.0) for x in some), "verifier: weight 0"
    groups = {(x["group"], x["reward"]) for x in some}
    assert len(groups) > len({g for g, _ in groups}), "rewards differ within groups, so there is something to learn"
    by_group = {g: [x["advantage"] for x in some if x["group"] == g] for g in {x["group"] for x in some}}
    assert all(abs(sum(a)) < 1e-3 for a in by_group.values())
    trained = sum(sum(x["mask"]) for x in lines(place / "run", 4))
    assert rows[-1]["tokens"] * rows[-1]["completions"] == trained
    assert all(r["w_gap"] < 1e-4 for r in rows), "shared prompts, observations and replayed routes: the same log-probs"
    assert "held_out" in rows[-1]
    stopped_and_resumed(monkeypatch, turns(place, tasks=held, run="stopped"), after=4)
    assert same(metrics(place / "stopped"), rows)  # who is in the sampler with whom hangs on when a turn is answered


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"address": "{place}/world.py:Nothing"}, "there is no class 'Nothing'"),
        ({"address": "{place}/world.py:letters"}, "callable without arguments"),
        ({"address": "{place}/nowhere.py:Halves"}, "FileNotFoundError"),
        ({"address": "Halves"}, "expected path.py:Class"),
    ],
)
def test_environments_that_are_none(place, changes, says):
    env = json.loads(json.dumps(changes).replace("{place}", str(place)))
    with pytest.raises(UserError, match=says):
        main(turns(place, environment=env))


@pytest.mark.slow
def test_it_learns_to_heed_what_the_environment_says(place):
    """Without reading the observation a policy of letters gets 0.5. Between steps 40 and 90 the curve is steep, and
    machines differ by ten steps there."""
    main(turns(place, steps=120, rollout={"prompts": 8, "group_size": 8}, optim={"learning_rate": 5e-3},
               step={"batch_size": 64, "sequence_length": 128, "micro_batches": 4},
               engine={"kind": "local", "slots": 32, "length": 128}))  # fmt: skip
    reward = [r["reward"] for r in metrics(place / "run")]
    assert np.mean(reward[:5]) < 0.2
    assert np.mean(reward[-10:]) > 0.9


@pytest.mark.slow
def test_tools_are_shown_to_the_policy(place):
    """The calculator and Python by name; what the policy reads has their schemas."""
    big = {"kind": "local", "slots": 16, "length": 1536}
    main(turns(place, environment={"tools": ["calculator", "python"], "system": "Be brief."}, engine=big, steps=1,
               reward={}, step={"batch_size": 16, "sequence_length": 1536, "micro_batches": 2}))  # fmt: skip
    some = lines(place / "run", 1)
    assert {x["finish"] for x in some} <= {"stop", "length"}
    assert any(x["finish"] == "stop" for x in some), "a turn without a call is the answer"
    assert all(x["reward"] == pytest.approx(x["components"]["verifier"]) for x in some), "the tools pay nothing"


@pytest.mark.slow
def test_episodes_by_rays_workers(place):
    ray = {"kind": "ray", "slots": 16, "length": 128, "ray": {"workers": 1}}
    main(turns(place, engine=ray, rollout={"prompts": 4, "group_size": 4, "max_lag": 1}))
    rows = metrics(place / "run")
    assert max(r["lag"]["max"] for r in rows) == 1
    assert any(0 in x["mask"] for x in lines(place / "run", 4))


PHASES = [
    {"name": "more", "start": 3, "shares": {"d0": 0, "d1": 1, "sums": 0}, "max_tokens": 5,
     "length": {"kind": "exact", "slope": 0.01}},
]  # fmt: skip


def test_phases_and_the_curriculum_go_on_as_if_nothing_had_happened(place, monkeypatch):
    shares = {"d0": 1, "d1": 0, "sums": 0}
    tasks = {"train": [str(place / "train.jsonl")], "shares": shares, "curriculum": {"by": "half"}}
    some = {"tasks": tasks, "phases": PHASES, "engine": {"kind": "local", "slots": 16, "length": 32},
            "step": {"batch_size": 16, "sequence_length": 32, "micro_batches": 2}}  # fmt: skip
    main(config(place, **some))
    rows = metrics(place / "run")
    assert [r["phase"] for r in rows] == ["first", "first", "more", "more"]
    for step in (1, 2, 3, 4):
        got = lines(place / "run", step)
        assert {x["domain"] for x in got} == {"d0" if step < 3 else "d1"}
        assert max(len(x["tokens"]) for x in got) == (8 if step < 3 else 5)
        shaped = [x["components"].get("length") for x in got]
        expected = [None if step < 3 else -0.01 * abs(4 - sum(x["mask"])) for x in got]
        assert shaped == pytest.approx(expected) if step >= 3 else shaped == expected
    assert rows[0]["curriculum"]["tried"] in (1, 2)
    stopped_and_resumed(monkeypatch, config(place, run="stopped", save_every=1, **some), after=4)  # inside the phase
    assert metrics(place / "stopped") == rows


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"phases": [{"name": "a", "start": 5}, {"name": "b", "start": 5}]}, "each after the one before"),
        ({"phases": [{"name": "a", "start": 5, "max_tokens": 128}]}, r"phases\[0\].max_tokens=128 leaves no room"),
        ({"phases": [{"name": "a", "start": 5, "thinking": {"max_tokens": 8}}]}, "leaves nothing for the answer"),
        ({"environment": {}}, "either tools or an address"),
        ({"models": {"environment": {"address": "x"}}}, "models.environment: that name is not a model's"),
        (
            {"models": {"judge": {"address": "x"}}, "reward": {"combine": "weighted", "weights": {"juge": 0.5}}},
            r"reward\.weights\.juge: no such component; expected some of verifier, judge \[",
        ),
        (
            {"reward": {"combine": "weighted", "weights": {"environment": 0.5}}},
            r"reward\.weights\.environment: no such component; expected some of verifier \[",
        ),
        ({"models": {"quality": {"address": "x"}}}, "models.quality: that name is not a model's"),
        ({"models": {"format": {"address": "x"}}}, "models.format: that name is not a model's"),
    ],
)
def test_recipes_that_cannot_be(place, changes, says):
    with pytest.raises(ValueError, match=says):
        config(place, **changes)


def test_a_budget_that_grows(place):
    cfg = config(place, sampling={"max_tokens": 12, "thinking": {"max_tokens": 0}}, phases=[
        {"name": "longer", "start": 10, "thinking": {"max_tokens": 4}},
        {"name": "longest", "start": 20, "thinking": {"max_tokens": 16}, "max_tokens": 24},
    ])  # fmt: skip
    drawn = [cfg.in_phase(cfg.phase(step)).sampling.drawn(4) for step in (1, 9, 10, 19, 20, 500)]
    assert [(s.thinking.max_tokens, s.max_tokens) for s in drawn] == [(0, 12)] * 2 + [(4, 12)] * 2 + [(16, 24)] * 2
