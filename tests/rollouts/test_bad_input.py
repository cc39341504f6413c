"""What users get wrong: one clear line before anything is drawn, or an observation on record."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.model import transformer as tf
from cabochon.protocols import Weights
from cabochon.rollouts.environment import EpisodeLimits, Step, run_episodes
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.rollouts.stream import LocalStream
from cabochon.rollouts.tools import Tool, ToolEnvironment
from cabochon.testing import FakeEngine, tiny_config
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Request, Sampling, Task, Thinking

TOK = ByteTokenizer()
CONTEXT = 128


@pytest.fixture(scope="module")
def engine():
    model = tiny_config(vocab_size=TOK.vocab_size)
    weights = Weights(version=0, params=tf.init(model, jax.random.key(0)))
    return LocalEngine(model, TOK, weights, SlotConfig(slots=2, length=CONTEXT, block=64, chunks=(32,)))


def asked(prompt="fine", **sampling):
    return Request(prompt=prompt, sampling=Sampling(**({"max_tokens": 8} | sampling)))


BAD = {
    "prompt longer than the context": (
        asked("x" * 500),
        r"request 1: the prompt has 500 tokens; expected fewer than the context of 128: shorten it",
    ),
    "prompt that leaves too little room": (
        asked("x" * 100, max_tokens=50),
        r"request 1: 100 prompt tokens and max_tokens=50 do not fit in the context of 128; max_tokens can be 28",
    ),
    "empty text": (asked(""), r"request 1: the prompt is empty; give at least one token"),
    "empty ids": (asked(np.zeros(0, np.int32)), r"request 1: the prompt is empty; give at least one token"),
    "no messages": (asked([]), r"a conversation is a list of messages with a role, got \[\]"),
    "unknown stop id": (
        asked(stop_ids=(5, 9999)),
        r"request 1: sampling.stop_ids has id 9999, unknown to the model; expected 0 to 262",
    ),
    "negative stop id": (asked(stop_ids=(-1,)), r"request 1: sampling.stop_ids has id -1"),
    "budget larger than max_tokens": (
        asked(max_tokens=20, thinking=Thinking(max_tokens=64)),
        r"thinking.max_tokens=64 and 1 tokens of close tag do not fit in max_tokens=20; raise max_tokens or lower",
    ),
    "no new tokens": (asked(max_tokens=0), r"request 1: sampling.max_tokens=0; expected 1 or more"),
    "a token that is none": (asked(np.array([3, 70000])), r"request 1: prompt token 70000 is not in the vocabulary"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_line_and_the_engine_goes_on(engine, case):
    bad, words = BAD[case]
    before = engine.sampler.counters.new_tokens
    with pytest.raises(UserError, match=words) as raised:
        engine.generate([asked(), bad])
    assert "\n" not in str(raised.value)
    assert engine.sampler.counters.new_tokens == before  # nothing was drawn, for the good one neither
    assert not engine.sampler.busy
    assert len(engine.generate([asked()])) == 1


def test_a_task_is_named_by_its_id(engine):
    task = Task(id="sums/7", prompt="x" * 500, verifier="math")
    with pytest.raises(UserError, match="task 'sums/7': the prompt has 500 tokens"):
        LocalStream(engine).submit([asked(), replace(asked(task.prompt), task=task)])


class Says:
    """An environment that answers the first turn with a text and ends after the second."""

    tools = ()

    def __init__(self, text):
        self.text, self.turns = text, 0

    def reset(self, task):
        return [{"role": "user", "content": task.prompt}]

    def step(self, text):
        self.turns += 1
        return Step(observation=({"role": "user", "content": self.text},), done=self.turns == 2)

    def close(self):
        pass


def test_a_task_longer_than_the_context(engine):
    tasks = [Task(id="gsm8k/1", prompt="fine", verifier="math"), Task(id="gsm8k/7", prompt="x" * 300, verifier="math")]
    before = engine.sampler.counters.new_tokens
    with pytest.raises(UserError, match=r"task gsm8k/7: the prompt has \d+ tokens.* limits.tokens=128"):
        run_episodes(engine, TOK, lambda t: Says("hm"), tasks, asked().sampling, [0, 1], EpisodeLimits(tokens=CONTEXT))
    assert engine.sampler.counters.new_tokens == before


MEGABYTES = "start " + "x" * 10_000_000 + " end"


def test_a_tool_that_returns_10_mb_is_an_observation():
    call = f"<tool_call>{json.dumps({'name': 'dump', 'arguments': {}})}</tool_call>"
    engine = FakeEngine(lambda prompt, seed, sample: "I see." if "<|im_start|>tool\n" in prompt else call, context=4096)
    dump = Tool(name="dump", description="", parameters={"type": "object"}, run=lambda: MEGABYTES)
    (episode,) = run_episodes(
        engine, TOK, lambda t: ToolEnvironment([dump]), [Task(id="t", prompt="dump it", verifier="math")],
        Sampling(max_tokens=100), [0], EpisodeLimits(tokens=2048, observation_chars=200),
    )  # fmt: skip
    (seen,) = (m["content"] for m in episode.messages if m["role"] == "tool")
    assert seen.startswith("start xxx")
    assert seen.endswith("xxx end")
    assert f"[{len(MEGABYTES) - 200} characters left out]" in seen
    assert len(seen) < 250
    c = episode.completion
    assert seen in TOK.decode(c.tokens[~c.mask])
    assert (c.text, c.finish) == ("I see.", "stop")


def test_an_observation_of_10_mb_with_a_real_engine(engine):
    """Too long for the context even when clipped: the episode ends there; clipped shorter, it goes on."""
    sampling = Sampling(max_tokens=20, logit_bias={260: 12.0})  # short turns
    task = [Task(id="t", prompt="go", verifier="math")]
    for chars, ended, turns in ((4000, "tokens", 1), (20, "done", 2)):
        limits = EpisodeLimits(tokens=CONTEXT, observation_chars=chars)
        (episode,) = run_episodes(engine, TOK, lambda t: Says("y" * 10_000_000), task, sampling, [3], limits)
        assert (episode.ended, len(episode.turns)) == (ended, turns)
        assert len(episode.completion.prompt_tokens) + len(episode.completion.tokens) <= CONTEXT
