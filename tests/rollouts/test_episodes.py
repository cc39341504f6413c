"""Episodes through the engine's door: those of `run_episodes`, each without waiting for the others."""

import time
from contextlib import closing

import jax
import numpy as np
import pytest

from cabochon.errors import MachineError, UserError
from cabochon.model import transformer as tf
from cabochon.protocols import StreamingEngine, Weights
from cabochon.rollouts.environment import EpisodeLimits, Step, run_episodes
from cabochon.rollouts.episodes import EpisodeEngine
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.rollouts.stream import LocalStream
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Request, Sampling, Task

TOK = ByteTokenizer()
MODEL = tiny_config(vocab_size=TOK.vocab_size)
SLOTS = SlotConfig(slots=4, length=256, block=64, chunks=(64,), steps=4)
LIMITS = EpisodeLimits(tokens=SLOTS.length, turns=4, parallel=4)
SHORT = Sampling(max_tokens=40, n=2, logit_bias={TOK.eos_ids[0]: 3.0})


@pytest.fixture(scope="module")
def inner():
    return LocalStream(LocalEngine(MODEL, TOK, Weights(version=2, params=tf.init(MODEL, jax.random.key(0))), SLOTS))


class Chat:
    """Goes on for three turns; `act(task, turn)` runs at each."""

    tools = ()
    made: list["Chat"] = []

    def __init__(self, task, act=lambda task, turn: None):
        self.task, self.act, self.turn, self.closed = task, act, 0, 0
        Chat.made.append(self)

    def reset(self, task):
        return [{"role": "user", "content": task.prompt}]

    def step(self, text):
        self.turn += 1
        self.act(self.task, self.turn)
        said = ({"role": "user", "content": f"and {self.turn}?"},)
        return Step(observation=said, reward=0.5, done=self.turn == 3)

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def all_closed_once():
    Chat.made.clear()
    yield
    assert [chat.closed for chat in Chat.made] == [1] * len(Chat.made)


def tasks(*names):
    return [Task(id=name, prompt=f"say {name}", verifier="math") for name in names]


def requests(*names, sampling=SHORT):
    return [Request(prompt=t.prompt, task=t, sampling=sampling, seed=i) for i, t in enumerate(tasks(*names))]


def opened(inner, act=lambda task, turn: None, limits=LIMITS):
    return closing(EpisodeEngine(inner, TOK, lambda task: Chat(task, act), limits))


def test_the_episodes_are_those_of_run_episodes(inner):
    names = ["one", "two", "three", "four", "five"]
    wanted = run_episodes(inner, TOK, Chat, tasks(*names), SHORT, range(5), LIMITS)
    with opened(inner, act=lambda task, turn: time.sleep(0.01 * len(task.id))) as engine:
        assert isinstance(engine, StreamingEngine)
        assert engine.version == 2
        got = engine.generate(requests(*names))
    assert len(got) == 10
    assert sum(len(e.turns) for e in wanted) > 20
    for c, episode in zip(got, wanted, strict=True):
        for name in ("tokens", "logprobs", "mask", "prompt_tokens", "policy_version"):
            np.testing.assert_array_equal(getattr(c, name), getattr(episode.completion, name))
        assert (c.text, c.finish, c.reward) == (
            episode.completion.text, episode.completion.finish, episode.completion.reward,
        )  # fmt: skip
    assert {c.reward for c in got} & {1.5}


def test_a_slow_environment_holds_up_nobody_else(inner):
    def act(task, turn):
        if task.id == "slow":
            time.sleep(1.0)

    with opened(inner, act) as engine:
        slow, quick = engine.submit(requests("slow", "quick"))
        order = []
        while len(order) < 4:
            order += [f.ticket for f in engine.poll(5.0)]
    assert order == [quick, quick, slow, slow]


def test_work_can_be_added_and_forgotten_at_any_time(inner):
    with opened(inner, act=lambda task, turn: time.sleep(0.02)) as engine:
        first, gone = engine.submit(requests("a", "b"))
        engine.poll(0.0)
        engine.abort([gone])
        (third,) = engine.submit(requests("c", sampling=Sampling(max_tokens=30)))
        found = []
        deadline = time.monotonic() + 60
        while len(found) < 3 and time.monotonic() < deadline:
            found += engine.poll(0.5)
        assert sorted((f.ticket, f.sample) for f in found) == [(first, 0), (first, 1), (third, 0)]
        assert engine.poll(0.0) == []
        engine.submit(requests("d"))
        engine.poll(0.0)  # closed in the middle


def test_others_results_are_kept_for_poll(inner):
    with opened(inner) as engine:
        (ticket,) = engine.submit(requests("a"))
        assert len(engine.generate(requests("b", sampling=Sampling(max_tokens=100, n=1)))) == 1
        found = []
        while len(found) < 2:
            found += engine.poll(1.0)
    assert {f.ticket for f in found} == {ticket}


def test_failures(inner):
    def act(task, turn):
        if task.id == "lost" and turn == 2:
            raise MachineError("the sandbox is gone")
        if task.id == "late" and turn == 1:
            time.sleep(5)

    limits = EpisodeLimits(tokens=256, turns=4, seconds=0.5)
    plain = Sampling(max_tokens=40, logit_bias={TOK.eos_ids[0]: 30.0})
    with opened(inner, act, limits) as engine:
        out = engine.generate(requests("fine", "lost", "late", sampling=plain))
    assert [c.finish for c in out] == ["stop", "abort", "length"]
    assert [c.mask.sum() for c in out] == [3, 2, 1]  # turns of one token, the end


def test_a_bug_is_raised(inner):
    def act(task, turn):
        raise ZeroDivisionError("a bug")

    with opened(inner, act) as engine, pytest.raises(ZeroDivisionError, match="a bug"):
        engine.generate(requests("a", "b", sampling=Sampling(max_tokens=40, logit_bias={TOK.eos_ids[0]: 30.0})))


def test_what_cannot_be_met_is_refused_first(inner):
    with opened(inner) as engine:
        with pytest.raises(UserError, match="request 1: no task; an episode needs one"):
            engine.submit([*requests("ok"), Request(prompt="hi")])
        with pytest.raises(UserError, match=r"task x+: the prompt has \d+ tokens"):
            engine.submit(requests("ok", "x" * 300))
        assert engine.poll(0.0) == []
        assert engine.generate([]) == []


@pytest.mark.slow
def test_over_ray(inner, tmp_path):
    """Turns drawn by two processes: the same episodes, bit for bit."""
    from cabochon.config import RayConfig
    from cabochon.rollouts.ray_engine import RayEngine

    names = ["one", "two", "three"]
    weights = Weights(version=2, params=tf.init(MODEL, jax.random.key(0)))
    wanted = run_episodes(LocalEngine(MODEL, TOK, weights, SLOTS), TOK, Chat, tasks(*names), SHORT, range(3), LIMITS)
    config = RayConfig(workers=2, cpus=0.5, start_seconds=240, deadline_seconds=120)
    with RayEngine(MODEL, TOK, weights, SLOTS, config, log_dir=tmp_path) as ray, opened(ray) as engine:
        got = engine.generate(requests(*names))
    for c, episode in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(c.tokens, episode.completion.tokens)
        np.testing.assert_array_equal(c.logprobs, episode.completion.logprobs)
    assert max(len(e.turns) for e in wanted) == 3


def test_weights_are_the_inner_engines(inner):
    with opened(inner) as engine:
        engine.load(Weights(version=5, params=tf.init(MODEL, jax.random.key(5))))
        assert engine.version == inner.version == 5
        (c, _) = engine.generate(requests("a"))
        assert (c.policy_version == 5).all()
