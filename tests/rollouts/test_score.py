"""Scores of given text: the learner's forward pass, and the sampler's own log-probs of what it drew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.model import transformer as tf
from cabochon.protocols import Weights
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.score import TOP, Scorer
from cabochon.rollouts.slots import SlotConfig
from cabochon.testing import tiny_moe
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Request, Sampling

TOK = ByteTokenizer()
MODEL = tiny_moe(vocab_size=TOK.vocab_size)
SLOTS = SlotConfig(slots=2, length=64, block=16, chunks=(8, 32), steps=4)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 3, tf.init(MODEL, jax.random.key(1)))


@pytest.fixture(scope="module", params=["auto", "xla"])
def engine(request, params):
    cfg = dataclasses.replace(SLOTS, kernels=request.param)
    return LocalEngine(MODEL, TOK, Weights(version=0, params=params), cfg)


@jax.jit
def log_probs(params, tokens_T):
    """[T, V] by the learner's forward pass; what follows a token does not change it."""
    out = tf.forward(MODEL, params, tokens_T[None])
    return jax.nn.log_softmax(tf.logits(MODEL, params, out.hidden_BTD)[0], -1)


def test_scores_are_the_learners(engine, params):
    """Of texts of one token, one chunk, several; the buffer holds what an earlier text left."""
    scorer = Scorer(engine.sampler)
    for length in (50, 33, 8, 1):
        tokens = np.random.default_rng(length).integers(0, 256, length).astype(np.int32)
        logp = np.asarray(log_probs(params, jnp.asarray(np.resize(tokens, 50))))[: length - 1]
        got = scorer.score(tokens)
        np.testing.assert_allclose(got.logprobs[1:], logp[np.arange(length - 1), tokens[1:]], atol=2e-4)
        np.testing.assert_allclose(got.top_logprobs[1:], -np.sort(-logp, -1)[:, :TOP], atol=2e-4)
        np.testing.assert_allclose(np.take_along_axis(logp, got.top_ids[1:], -1), got.top_logprobs[1:], atol=2e-4)
        assert np.isnan(got.logprobs[0])
        assert (got.top_ids[0] == -1).all()


def test_scores_of_a_completion_are_the_samplers_while_others_are_decoded(engine):
    """A text is read chunk by chunk between dispatches, and neither side changes the other's numbers."""
    request = Request(prompt="The quick brown fox", sampling=Sampling(max_tokens=20, ignore_eos=True), seed=3)
    alone = engine.generate([request])[0]
    text = np.concatenate([alone.prompt_tokens, alone.tokens])
    expected = Scorer(engine.sampler).score(text)
    np.testing.assert_allclose(expected.logprobs[len(alone.prompt_tokens) :], alone.raw_logprobs, atol=1e-4)

    sampler = engine.sampler
    sampler.submit(sampler.prepare(request))
    reading, found, completions = Scorer(sampler).by_chunks(text), None, []
    while sampler.busy or found is None:
        found = found or next(reading)
        completions += sampler.step()
    np.testing.assert_array_equal(found.logprobs, expected.logprobs)
    np.testing.assert_array_equal(completions[0].completion.tokens, alone.tokens)
