"""Clients that others wrote, and our own engine for judges, against a real server."""

import asyncio

import numpy as np
import openai
import pytest

from cabochon.rollouts.local import requests_for
from cabochon.rollouts.openai import Endpoint, OpenAIEngine
from cabochon.types import Request, Sampling

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_the_openai_client_chats(client):
    asked = {"model": "tiny", "messages": HI, "seed": 3, "max_completion_tokens": 20, "n": 2}
    whole = client.chat.completions.create(**asked)
    texts = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [c.message.content for c in whole.choices]
    assert chunk.usage == whole.usage
    assert whole.usage.completion_tokens > 0
    scored = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
    assert scored.message.content == texts[0]
    assert [len(t.top_logprobs) for t in scored.logprobs.content] == [2] * len(scored.logprobs.content)


def test_the_openai_client_completes_and_lists(client):
    done = client.completions.create(
        model="tiny", prompt=[[97, 98], [99]], max_tokens=5, logprobs=2, echo=True, extra_body={"top_k": 1}
    )
    assert [c.text[:2] for c in done.choices] == ["ab", "c" + done.choices[1].text[1]]
    assert len(done.choices[0].logprobs.token_logprobs) >= 3
    text = "".join(c.choices[0].text for c in client.completions.create(
        model="tiny", prompt="ab", max_tokens=5, temperature=0, stream=True))  # fmt: skip
    assert "ab" + text == done.choices[0].text
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_the_openai_client_understands_refusals(client):
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context of 256 tokens") as caught:
        client.completions.create(model="tiny", prompt="a" * 400)
    assert caught.value.code == "context_length_exceeded"


def test_it_is_a_judges_endpoint(server, sampler):
    """Our own engine for endpoints draws here what the sampler draws, with the log-probs a verdict is read from."""
    engine = OpenAIEngine(Endpoint(url=server.url, model="tiny"))
    sampling = Sampling(max_tokens=6, temperature=0.8, n=2, min_p=0.01, stop_ids=(66,), logit_bias={70: 2.0})
    answers = engine.ask([Request(prompt=HI, sampling=sampling, seed=11), Request(prompt="a b", sampling=sampling)], 5)
    assert [a.status for a in answers] == ["ok"] * 4
    sampler.submit(sampler.prepare(requests_for([HI], sampling, 11)[0]))
    found = []
    while sampler.busy:
        found += sampler.step()
    for answer, (_, _, completion) in zip(answers, sorted(found, key=lambda f: f.sample), strict=False):
        assert answer.text == completion.text
        assert answer.finish == completion.finish
        np.testing.assert_allclose([t.logprob for t in answer.tokens], completion.raw_logprobs, atol=1e-3)
        assert {len(t.top) for t in answer.tokens} <= {4, 5, 6}
    assert engine.usage.failed == 0
    assert engine.usage.completion_tokens > 0
    refused = engine.ask([Request(prompt="a", sampling=Sampling(max_tokens=500))])
    assert [(a.status, a.attempts) for a in refused] == [("refused", 1)]


async def _visit(client, rng, leave):
    """One client: asks for something, and may leave in the middle of it: "had" the whole answer, or "left"."""
    asked = {"model": "tiny", "max_tokens": int(rng.integers(1, 120)), "n": int(rng.integers(1, 3))}
    asked |= {"logprobs": int(rng.integers(1, 4))} if rng.random() < 0.3 else {}
    stream = bool(rng.random() < 0.6)
    patience = rng.random() * 0.3

    async def ask():
        reply = await client.completions.create(prompt="x" * int(rng.integers(1, 100)), stream=stream, **asked)
        if not stream:
            return len(reply.choices) == asked["n"]
        ends = 0
        async for chunk in reply:
            ends += sum(c.finish_reason is not None for c in chunk.choices)
        return ends == asked["n"]

    for _ in range(200):
        try:
            async with asyncio.timeout(patience if leave else None):
                assert await ask()
            return "had"
        except openai.RateLimitError:
            await asyncio.sleep(0.02 + 0.05 * rng.random())
        except TimeoutError:
            return "left"
    raise AssertionError("never let in")


def soak(server, clients, visits, seed):
    """`clients` at once; in every other visit they are impatient. Returns how each visit ended."""

    async def run():
        client = openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)

        async def one(i):
            rng = np.random.default_rng([seed, i])
            return [await _visit(client, rng, (i + visit) % 2 == 0) for visit in range(visits)]

        async with client, asyncio.timeout(500):
            return [end for ends in await asyncio.gather(*map(one, range(clients))) for end in ends]

    return asyncio.run(run())


def test_clients_that_come_and_go_leave_nothing_behind(server):
    ends = soak(server, clients=24, visits=2, seed=0)
    assert ends.count("had") >= 24
    assert ends.count("left") >= 4
    server.idle()
    assert not server.sampler.busy


@pytest.mark.slow
def test_sixty_four_clients_with_random_disconnects(server):
    """No slot and no place is lost, and memory does not grow once the first rounds have been served."""
    import threading

    import psutil

    process, sizes = psutil.Process(), []
    for round_ in range(6):
        ends = soak(server, clients=64, visits=4, seed=round_ + 1)
        assert ends.count("had") >= 128
        assert ends.count("left") >= 32
        server.idle()
        assert not server.sampler.busy
        assert len(server.engine._jobs) == len(server.engine._texts) == 0
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[1] < 30 << 20, sizes
    assert threading.active_count() < 40
