"""Budgets: the oracle's mask, tags in several tokens, the least number of tokens, and the spans that are recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.model import transformer as tf
from cabochon.protocols import Weights
from cabochon.rollouts import thinking as th
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Request, Sampling, Thinking

TOK = ByteTokenizer()
OPEN, CLOSE = TOK.id("<think>"), TOK.id("</think>")
assert OPEN is not None
assert CLOSE is not None


@pytest.fixture(scope="module")
def engine():
    model = tiny_config(vocab_size=TOK.vocab_size)
    params = tf.init(model, jax.random.key(0))
    cfg = SlotConfig(slots=2, length=64, block=32, chunks=(16,))
    return LocalEngine(model, TOK, Weights(version=0, params=params), cfg)


def one(engine, prompt, **sampling):
    settings = {"max_tokens": 8, "ignore_eos": True} | sampling
    return engine.generate([Request(prompt=prompt, sampling=Sampling(**settings), seed=3)])[0]


NO_TAGS = {OPEN: -1e9, CLOSE: -1e9, 10: -1e9}
"""nor line breaks, which would count as the beginning of a close tag that starts with one"""


def test_the_oracle_mask(engine):
    """algorithms.md section 16: a cap of 4, two injected tokens, two of answer."""
    got = one(engine, "2+2?<think>", logit_bias=NO_TAGS, thinking=Thinking(max_tokens=4, forced="\n</think>"))
    assert got.mask.tolist() == [True] * 4 + [False] * 2 + [True] * 2
    assert got.tokens[4:6].tolist() == [*TOK.encode("\n"), CLOSE]
    assert (got.logprobs[4:6] == 0).all()
    assert (got.logprobs[[0, 1, 2, 3, 6, 7]] < 0).all()
    assert (got.thinking, got.answer, got.finish) == ((0, 4), (6, 8), "length")


def test_a_budget_of_zero_closes_at_once(engine):
    got = one(engine, "2+2?<think>\n", logit_bias=NO_TAGS, thinking=Thinking(max_tokens=0))
    assert got.tokens[0] == CLOSE
    assert got.mask.tolist() == [False] + [True] * 7
    assert (got.thinking, got.answer) == ((0, 0), (1, 8))


def test_thinking_that_the_policy_opens_and_closes_itself(engine):
    opens = one(engine, "2+2?", logit_bias={OPEN: 100.0}, thinking=Thinking(max_tokens=3))
    assert opens.tokens[0] == OPEN
    assert opens.mask.tolist() == [True] * 4 + [False] + [True] * 3  # open tag, three thoughts, forced close
    assert (opens.thinking, opens.answer) == ((1, 4), (5, 8))
    closes = one(engine, "2+2?<think>", logit_bias={CLOSE: 100.0}, thinking=Thinking(max_tokens=3))
    assert closes.tokens[0] == CLOSE
    assert closes.mask.all()
    assert (closes.thinking, closes.answer) == ((0, 0), (1, 8))


def test_the_least_number_of_tokens(engine):
    eos = TOK.eos_ids[0]
    got = one(engine, "2+2?<think>", logit_bias={CLOSE: 80.0, eos: 50.0}, ignore_eos=False,
              thinking=Thinking(max_tokens=5, min_tokens=3))  # fmt: skip
    assert got.mask.all()
    assert CLOSE not in got.tokens[:3]
    assert eos not in got.tokens[:3]
    assert got.tokens[3] == CLOSE
    # the log-prob is that of what was left: without the two banned ids, of near-uniform weights
    assert (got.logprobs[:3] > np.log(1 / TOK.vocab_size) - 1).all()
    assert (got.raw_logprobs[:3] < -4).all()


def test_no_thinking_and_thinking_without_end(engine):
    plain = one(engine, "2+2?", logit_bias=NO_TAGS, thinking=Thinking(max_tokens=3))
    assert (plain.thinking, plain.answer) == (None, (0, 8))
    assert plain.mask.all()
    without = one(engine, "2+2?<think>", logit_bias=NO_TAGS)
    assert (without.thinking, without.answer) == (None, (0, 8))
    late = one(engine, "2+2?<think>", logit_bias=NO_TAGS, max_tokens=3, thinking=Thinking(max_tokens=2))
    assert (late.thinking, late.answer) == ((0, 2), (3, 3))


def run(state, tokens):
    """The machine over given sampled tokens; forced ones go in between. Returns (tokens, forced, phases)."""
    tokens, out = list(tokens), []
    while tokens:
        forced, token = th.forced_now(state)
        used = int(token[0]) if bool(forced[0]) else tokens.pop(0)
        state = th.after(state, jnp.array([used], jnp.int32), forced)
        out.append((used, bool(forced[0]), int(state.phase_B[0])))
    return [list(x) for x in zip(*out, strict=True)]


def state_for(tags, prompt="", **budget):
    tok_prompt = np.array(TOK.encode(prompt), np.int32)
    row = th.initial(TOK, Thinking(**budget), tags, tok_prompt)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], row)


def test_tags_of_several_tokens():
    """Open 1 2, close 3 4 5 (or with a merged end, 3 4 9); the budget falls in the middle of a close tag."""
    tags = th.Tags(open=((1, 2),), close=((3, 4, 5), (3, 4, 9)), forced=(3, 4, 5))
    budget = {"max_tokens": 4}
    tokens, forced, phases = run(state_for(tags, **budget), [1, 1, 2, 7, 3, 4, 9, 8])
    assert not any(forced)
    assert phases == [0, 0, 1, 1, 1, 1, 2, 2]
    assert th.spans(tags, 0, np.array(phases), np.array(tokens)) == ((3, 4), (7, 8))
    tokens, forced, phases = run(state_for(tags, **budget), [1, 2, 7, 7, 3, 4, 8, 8])
    assert tokens == [1, 2, 7, 7, 3, 4, 5, 8, 8]  # only what was missing of the tag is forced
    assert forced == [False] * 6 + [True] + [False] * 2
    assert th.spans(tags, 0, np.array(phases), np.array(tokens)) == ((2, 4), (7, 9))
    tokens, forced, phases = run(state_for(tags, **budget), [1, 2, 7, 7, 7, 7, 8])
    assert tokens == [1, 2, 7, 7, 7, 7, 3, 4, 5, 8]
    assert phases == [0, 1, 1, 1, 1, 1, 1, 1, 2, 2]


def test_bans_only_what_would_complete_the_tag():
    tags = th.Tags(open=((1, 2),), close=((3, 4, 5), (3, 4, 9), (6,)), forced=(3, 4, 5))
    state = state_for(tags, "<think>", max_tokens=9, min_tokens=5)
    stop = jnp.array([[0, -1]], jnp.int32)
    assert set(np.asarray(th.banned(state, stop, 50))[0].tolist()) == {6, 0, 50}
    for token in (3, 4):
        state = th.after(state, jnp.array([token], jnp.int32), jnp.array([False]))
    assert set(np.asarray(th.banned(state, stop, 50))[0].tolist()) == {5, 9, 6, 0, 50}
    for token in (7, 7, 7):
        state = th.after(state, jnp.array([token], jnp.int32), jnp.array([False]))
    assert set(np.asarray(th.banned(state, stop, 50))[0].tolist()) == {50}


@pytest.mark.smollm2
def test_a_tag_that_shares_tokens_with_its_neighbours():
    """SmolLM2 has no thinking tokens; whatever stands beside the tag, one of its spellings is found in the ids."""
    from cabochon.model.address import resolve
    from cabochon.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(resolve("smollm2-135m-instruct").path)
    tags = th.tags_of(tokenizer, Thinking(max_tokens=10), 100)
    assert len(tags.close) > 1
    for text in ("so it is 4</think>The", "so</think>\n\nThe answer", "so.\n</think>\nThe", "so \n</think> The"):
        ids = tokenizer.encode(text)
        at = [i for s in tags.close for i in range(len(ids)) if tuple(ids[i : i + len(s)]) == s]
        assert at, text
