"""What every PolicyEngine promises, and every StreamingEngine more, run on each of them."""

import time

import jax
import numpy as np
import pytest

from cabochon.config import RayConfig
from cabochon.errors import UserError
from cabochon.model import transformer as tf
from cabochon.protocols import PolicyEngine, StreamingEngine, Weights
from cabochon.rollouts.local import LocalEngine, requests_for
from cabochon.rollouts.ray_engine import RayEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.rollouts.stream import LocalStream, RequestStream
from cabochon.testing import FakeEngine, tiny_config
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Request, Sampling

TOK = ByteTokenizer()
MODEL = tiny_config(vocab_size=TOK.vocab_size)
CONTEXT = 64


def new_weights(version):
    return Weights(version=version, params=tf.init(MODEL, jax.random.key(version)))


SLOTS = SlotConfig(slots=3, length=CONTEXT, block=32, chunks=(16,))
RAY = RayConfig(workers=2, cpus=0.5)


def local():
    return LocalEngine(MODEL, TOK, new_weights(0), SLOTS)


def fake():
    return FakeEngine(lambda prompt, seed, sample: f"{sample} {seed} {prompt[:3]}", context=CONTEXT)


@pytest.fixture(scope="module")
def over_ray(tmp_path_factory):
    with RayEngine(MODEL, TOK, new_weights(0), SLOTS, RAY, log_dir=tmp_path_factory.mktemp("ray")) as engine:
        yield engine


@pytest.fixture(scope="module")
def stream(request):
    match request.param:
        case "ray":
            return request.getfixturevalue("over_ray")
        case "local stream":
            return LocalStream(local())
    return RequestStream(fake())


@pytest.fixture(scope="module", params=["local", "fake", "ray", "local stream"])
def engine(request):
    match request.param:
        case "local":
            return local()
        case "fake":
            return fake()
        case "ray":
            return request.getfixturevalue("over_ray")
    return LocalStream(local())


SEVERAL = requests_for(["one", "two two", [{"role": "user", "content": "three"}]], Sampling(max_tokens=9, n=2), seed=3)


def key(completion):
    return completion.tokens.tolist(), completion.logprobs.tolist(), completion.text, completion.finish


def test_is_an_engine(engine):
    assert isinstance(engine, PolicyEngine)


def test_samples_come_in_the_order_of_the_requests(engine):
    out = engine.generate(SEVERAL)
    assert len(out) == 6
    expected = [TOK.encode("one"), TOK.encode("two two")]
    for i, c in enumerate(out[:4]):
        assert c.prompt_tokens.tolist()[-len(expected[i // 2]) :] == expected[i // 2]
    assert TOK.decode(out[4].prompt_tokens).endswith("three<|im_end|>\n<|im_start|>assistant\n")


def test_what_a_completion_holds(engine):
    for c in engine.generate(SEVERAL):
        T = len(c.tokens)
        assert 1 <= T <= 9
        kinds = ((c.tokens, np.int32), (c.logprobs, np.float32), (c.mask, bool), (c.policy_version, np.int32))
        for array, dtype in kinds:
            assert array.shape == (T,)
            assert array.dtype == dtype
        assert (c.logprobs <= 0).all()
        assert (c.logprobs[~c.mask] == 0).all()
        assert (c.policy_version == engine.version).all()
        ended = c.tokens[-1] in TOK.eos_ids
        assert c.finish == ("stop" if ended else "length")
        assert T == 9 or ended
        assert c.text == TOK.decode(c.tokens[: T - ended], skip_special=True)
        assert c.answer == (0, T)


def test_the_seed_decides_not_the_company(engine):
    together = [key(c) for c in engine.generate(SEVERAL)]
    assert [key(c) for c in engine.generate(SEVERAL)] == together
    assert [key(c) for request in reversed(SEVERAL) for c in engine.generate([request])] == [
        k for i in (2, 1, 0) for k in together[2 * i : 2 * i + 2]
    ]
    other = engine.generate(requests_for(["one"], Sampling(max_tokens=9, n=2), seed=4))
    assert len({tuple(c.tokens.tolist()) for c in other} | {tuple(k[0]) for k in together[:2]}) == 4


def test_a_request_that_cannot_be_met_stops_all_before_any(engine):
    good = Request(prompt="good", sampling=Sampling(max_tokens=4))
    for bad, words in (
        (Request(prompt=np.array([], np.int32)), "request 1: the prompt is empty"),
        (Request(prompt="long", sampling=Sampling(max_tokens=CONTEXT)), "request 1: .*context of 64"),
    ):
        with pytest.raises(UserError, match=words):
            engine.generate([good, bad])
    assert len(engine.generate([good])) == 1
    assert engine.generate([]) == []


def test_weights_are_taken_by_version(engine):
    engine.load(new_weights(5))
    assert engine.version == 5
    assert (engine.generate(SEVERAL)[0].policy_version == 5).all()
    with pytest.raises(UserError, match="weights: "):
        engine.load(Weights(version=6, params={}))
    assert engine.version == 5


# -- streaming ---------------------------------------------------------------------------------------------------------

streams = pytest.mark.parametrize("stream", ["ray", "local stream", "request stream"], indirect=True)


def all_of(stream, samples):
    """Poll until that many samples came."""
    found: dict = {}
    deadline = time.monotonic() + 120
    while len(found) < samples:
        for f in stream.poll(0.2):
            assert (f.ticket, f.sample) not in found
            found[f.ticket, f.sample] = f.completion
        assert time.monotonic() < deadline
    return found


@streams
def test_what_is_submitted_comes_out_once_whatever_came_between(stream):
    assert isinstance(stream, StreamingEngine)
    together = [key(c) for c in stream.generate(SEVERAL)]
    first = stream.submit(SEVERAL[:2])
    later = stream.submit(SEVERAL[2:])
    found = all_of(stream, 6)
    assert [key(found[t, sample]) for t in (*first, *later) for sample in (0, 1)] == together
    assert stream.poll(0.0) == []
    assert stream.submit([]) == []


@streams
def test_an_aborted_request_delivers_nothing(stream):
    gone, kept = stream.submit(SEVERAL[:2])
    stream.abort([gone])
    assert {ticket for ticket, _ in all_of(stream, 2)} == {kept}
    assert stream.poll(0.2) == []
