"""The API over a real socket: what it answers is what the sampler draws, and what it refuses is said in one shape."""

import asyncio
import json
import socket
import time

import numpy as np
import pytest

from cabochon.rollouts.local import requests_for
from cabochon.rollouts.prompts import encode_prompt
from cabochon.rollouts.score import Scorer
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Sampling, Thinking

HI = [{"role": "user", "content": "hi"}]


def drawn(sampler, prompt, sampling, seed):
    """What a sampler by itself draws for a prompt."""
    ids = encode_prompt(sampler.tokenizer, prompt)
    sampler.submit(sampler.prepare(requests_for([ids], sampling, seed)[0]))
    found = []
    while sampler.busy:
        found += sampler.step()
    return [f.completion for f in sorted(found, key=lambda f: f.sample)]


def test_a_chat_is_what_the_sampler_draws(server, sampler):
    asked = {"n": 2, "seed": 5, "max_tokens": 12, "temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.001}
    reply = server.post("/chat/completions", messages=HI, **asked).json()
    sampling = Sampling(n=2, max_tokens=12, temperature=0.9, top_p=0.95, top_k=50, min_p=0.001)
    expected = drawn(sampler, HI, sampling, 5)
    assert [c["message"]["content"] for c in reply["choices"]] == [c.text for c in expected]
    assert [c["index"] for c in reply["choices"]] == [0, 1]
    assert [c["finish_reason"] for c in reply["choices"]] == [c.finish for c in expected]
    tokens = sum(len(c.tokens) for c in expected)
    prompt = len(expected[0].prompt_tokens)
    assert reply["usage"] == {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
    assert reply["model"] == "tiny"
    assert reply["object"] == "chat.completion"
    unnamed = server.client.post("/chat/completions", json={"messages": HI, **asked}).json()
    assert (unnamed["model"], unnamed["choices"]) == ("tiny", reply["choices"]), "the one there is"


def test_a_stream_says_the_same_as_one_answer(server):
    for path, prompt in (("/chat/completions", {"messages": HI}), ("/completions", {"prompt": "Once"})):
        asked = prompt | {"n": 3, "seed": 1, "max_tokens": 40, "stop": ["q", "é"]}
        whole = server.post(path, **asked).json()
        chunks, ended = server.stream(path, **asked, stream_options={"include_usage": True})
        assert ended
        assert chunks.pop()["usage"] == whole["usage"]
        for choice in whole["choices"]:
            mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
            texts = [c.get("text") or c.get("delta", {}).get("content", "") for c in mine]
            assert "".join(texts) == choice.get("text", choice.get("message", {}).get("content"))
            assert sum(map(bool, texts)) > 1 or len(choice.get("text", "abc")) < 5  # it came in pieces
            assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]


def test_a_stream_leaves_the_token_it_stops_at_out(server):
    """Half of the tokens are that one, so many a dispatch ends with it."""
    asked = {"prompt": "Hi", "max_tokens": 20, "logit_bias": {"65": 60, "46": 60}, "stop_token_ids": [46]}
    for seed in range(6):
        whole = server.post("/completions", **asked, seed=seed).json()["choices"][0]
        chunks, _ = server.stream("/completions", **asked, seed=seed)
        assert whole["finish_reason"] == "stop"
        assert "".join(c["choices"][0]["text"] for c in chunks) == whole["text"] == "A" * len(whole["text"])


def test_the_same_seed_gives_the_same_text_and_none_gives_others(server):
    ask = lambda **more: server.post("/completions", prompt="a", max_tokens=16, **more).json()["choices"][0]["text"]  # noqa: E731
    assert ask(seed=3) == ask(seed=3)
    assert len({ask() for _ in range(4)}) > 1
    assert ask(temperature=0) == ask(temperature=0, seed=9)


def test_stops_bias_and_end_of_text_are_honoured(server):
    biased = server.post("/completions", prompt="a", max_tokens=8, logit_bias={"65": 100, "66": -100}).json()
    assert biased["choices"][0]["text"] == "A" * 8
    stopped = server.post("/completions", prompt="a", max_tokens=8, logit_bias={"65": 100}, stop="AAA").json()
    assert (stopped["choices"][0]["text"], stopped["choices"][0]["finish_reason"]) == ("", "stop")
    ended = {"prompt": "a", "max_tokens": 8, "logit_bias": {"258": 100}}
    assert server.post("/completions", **ended).json()["choices"][0]["finish_reason"] == "stop"
    assert server.post("/completions", **ended, ignore_eos=True).json()["usage"]["completion_tokens"] == 8
    by_id = server.post("/completions", prompt="a", max_tokens=8, logit_bias={"65": 100}, stop_token_ids=[65]).json()
    assert by_id["usage"]["completion_tokens"] == 1


def test_several_prompts_as_text_and_as_ids(server):
    asked = {"max_tokens": 6, "n": 2, "seed": 4}
    texts = server.post("/completions", prompt=["one", "two"], **asked).json()
    ids = server.post("/completions", prompt=[[*b"one"], [*b"two"]], **asked).json()
    assert [c["text"] for c in texts["choices"]] == [c["text"] for c in ids["choices"]]
    assert [c["index"] for c in texts["choices"]] == [0, 1, 2, 3]
    assert texts["usage"]["prompt_tokens"] == 6


def test_echo_scores_the_prompt_as_the_engine_does(server, sampler):
    """What lm-evaluation-harness reads: every token but the first, and which was the likeliest."""
    prompt = [*b"The quick brown fox jumps over it"]
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    choice = server.post("/completions", **asked).json()["choices"][0]
    found = choice["logprobs"]
    token = drawn(sampler, np.array(prompt), Sampling(max_tokens=1, temperature=0), 0)[0].tokens
    expected = Scorer(sampler).score(np.append(prompt, token).astype(np.int32))
    assert len(found["tokens"]) == len(prompt) + 1
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1:], expected.logprobs[1:], atol=1e-5)
    greedy = [max(top.values()) == own for top, own in
              zip(found["top_logprobs"][1:], found["token_logprobs"][1:], strict=True)]  # fmt: skip
    assert greedy == (expected.top_ids[1:, 0] == np.append(prompt, token)[1:]).tolist()
    assert greedy[-1]
    assert choice["text"].startswith("The quick brown fox jumps over it")
    assert found["text_offset"][:3] == [0, 1, 2]
    only = server.post("/completions", **asked | {"max_tokens": 0}).json()
    assert only["choices"][0]["logprobs"]["token_logprobs"] == found["token_logprobs"][:-1]
    assert only["choices"][0]["finish_reason"] == "length"
    assert only["usage"]["completion_tokens"] == 0


def test_a_prompt_that_fills_the_context_is_scored(server, sampler):
    prompt = np.random.default_rng(0).integers(97, 123, 256)
    asked = {"prompt": prompt.tolist(), "max_tokens": 0, "echo": True, "logprobs": 1}
    found = server.post("/completions", **asked).json()["choices"][0]["logprobs"]["token_logprobs"]
    expected = Scorer(sampler).score(prompt.astype(np.int32)).logprobs
    np.testing.assert_allclose(found[1:], expected[1:], atol=1e-5)


def test_an_echo_shows_special_tokens_where_they_are_written(server):
    asked = {"prompt": "<|im_start|>hi", "max_tokens": 0, "echo": True, "logprobs": 1}
    choice = server.post("/completions", **asked).json()["choices"][0]
    assert choice["text"] == "<|im_start|>hi"
    assert choice["logprobs"]["text_offset"] == [0, 12, 13]


def test_log_probs_of_a_completion(server, sampler):
    expected = drawn(sampler, "abc", Sampling(max_tokens=10, temperature=0.5, ignore_eos=True), 7)[0]
    asked = {"prompt": "abc", "max_tokens": 10, "temperature": 0.5, "seed": 7, "ignore_eos": True}
    for logprobs in (0, 3):
        choice = server.post("/completions", **asked, logprobs=logprobs).json()["choices"][0]
        found = choice["logprobs"]
        np.testing.assert_allclose(found["token_logprobs"], expected.raw_logprobs, atol=1e-4)
        assert [len(top) for top in found["top_logprobs"]] == [
            logprobs + (own not in list(top.values())[:logprobs])
            for top, own in zip(found["top_logprobs"], found["token_logprobs"], strict=True)
        ]
    chunks, _ = server.stream("/completions", **asked, logprobs=3)
    assert [c["choices"][0] for c in chunks] == [choice]
    assert server.post("/completions", **asked).json()["choices"][0]["logprobs"] is None


def test_log_probs_of_a_chat(server):
    asked = {"messages": HI, "max_tokens": 6, "seed": 2, "logprobs": True, "ignore_eos": True}
    plain = server.post("/chat/completions", **asked).json()["choices"][0]["logprobs"]["content"]
    tops = server.post("/chat/completions", **asked, top_logprobs=4).json()["choices"][0]["logprobs"]["content"]
    assert [t["token"] for t in plain] == [t["token"] for t in tops]
    np.testing.assert_allclose([t["logprob"] for t in plain], [t["logprob"] for t in tops], atol=1e-4)
    for token in tops:
        likely = [t["logprob"] for t in token["top_logprobs"]]
        assert likely == sorted(likely, reverse=True)
        assert len(likely) == 4
    assert all(bytes(t["bytes"]).decode(errors="replace") in (t["token"], "\ufffd") for t in tops)


def test_thinking_is_held_to_its_budget_and_told_apart(server, sampler):
    """Every letter is an A until the tag is forced; the answer follows it."""
    asked = {"messages": HI, "max_tokens": 24, "logit_bias": {"65": 60}, "thinking_budget": 3}
    opened = {**asked, "messages": [{"role": "user", "content": "hi"}]}
    reply = server.post("/chat/completions", **opened).json()["choices"][0]["message"]
    assert reply["content"] == "A" * 24  # it never began to think
    assert "reasoning_content" not in reply
    began = {"prompt": "<think>", "max_tokens": 24, "logit_bias": {"65": 60}, "thinking_budget": 3}
    text = server.post("/completions", **began).json()["choices"][0]["text"]
    assert text == "AAA</think>" + "A" * 20
    sampling = Sampling(max_tokens=24, logit_bias={65: 60.0}, thinking=Thinking(max_tokens=3))
    assert drawn(sampler, "<think>", sampling, 0)[0].text == text
    open_id = sampler.tokenizer.encode("<think>")[0]
    first = server.post("/chat/completions", **asked | {"logit_bias": {str(open_id): 60}}).json()["choices"][0]
    tag = f"{sampler.tokenizer.decode([open_id])}"
    assert first["message"]["reasoning_content"].startswith(tag)
    chunks, _ = server.stream("/chat/completions", **asked | {"logit_bias": {str(open_id): 60}})
    deltas = [c["choices"][0]["delta"] for c in chunks]
    for name in ("reasoning_content", "content"):
        assert "".join(d.get(name, "") for d in deltas) == first["message"][name]


def test_a_character_is_never_sent_by_halves(server):
    """A bias towards the bytes of a letter of two bytes makes halves at the end of every dispatch."""
    bias = {"195": 30, "169": 30}  # é
    chunks, _ = server.stream("/completions", prompt="é", max_tokens=60, logit_bias=bias, seed=1, top_k=2)
    texts = [c["choices"][0]["text"] for c in chunks]
    whole = server.post("/completions", prompt="é", max_tokens=60, logit_bias=bias, seed=1, top_k=2).json()
    assert "".join(texts) == whole["choices"][0]["text"]
    assert "é" in "".join(texts)
    for i, text in enumerate(texts[:-2]):
        assert not text.endswith("\ufffd"), (i, texts)


def test_requests_are_drawn_together(server):
    """Eight samples on four slots: a decode step has tokens of more than one request."""
    before = server.sampler.counters.steps
    server.post("/completions", prompt=["a", "b", "c", "d"], n=2, max_tokens=20, ignore_eos=True)
    assert server.sampler.counters.steps - before < 8 * 20 / 2


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/completions", {"prompt": "a", "model": "gpt"}, 404, "'gpt' is not served here; this is 'tiny'"),
        ("/completions", {"prompt": "a", "temprature": 1}, 400, "unknown key temprature; did you mean temperature?"),
        ("/completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature: expected a valid number, got 'hot'"),
        ("/completions", {"prompt": "a", "temperature": -1}, 400, "temperature=-1"),
        ("/completions", {"prompt": "a", "temperature": 1e-10}, 400, "temperature=1e-10; expected 0 (greedy) or 1e-06"),
        ("/completions", {"prompt": "a", "top_p": 1e-38}, 400, "top_p=1e-38; expected 1e-06 to 1"),
        ("/completions", {"prompt": "a", "top_k": 1 << 31}, 400, "top_k=2147483648; expected 0 (off) or more"),
        ("/completions", {"prompt": "a", "logit_bias": {"65": 1e300}}, 400, "logit_bias[65]=1e+300; expected -1e+09"),
        ("/completions", {"prompt": "a", "logit_bias": {"65": 3e38}}, 400, "logit_bias[65]=3e+38; expected -1e+09"),
        ("/completions", {"prompt": "a", "logit_bias": {"9" * 5000: 1}}, 400, "99… is not a token id"),
        ("/completions", {"prompt": "a", "logit_bias": {"65": 1, "065": 2}}, 400, "'065' is not a token id"),
        ("/completions", {"prompt": ["a"] * 9, "n": 1 << 40}, 400, "n: expected less than 2147483648"),
        ("/completions", {"prompt": "a", "stop": ["", "x" * 9999]}, 400, "expected strings that are not empty"),
        ("/completions", {"prompt": "a", "te\nmp\x1b[2J": 1}, 400, r"unknown key te\nmp\x1b[2J"),
        ("/completions", {"prompt": "a", "k" * 99999: 1}, 400, "unknown key kkk"),
        ("/completions", {"prompt": "a", "model": "m" * 99999}, 404, "mm… is not served here"),
        ("/completions", {"prompt": "a", "stream_options": {"include_obfuscation": True}}, 400, "obfuscation: expect"),
        ("/completions", {"prompt": "a", "n": 0}, 400, "n: expected greater than or equal to 1"),
        ("/completions", {"prompt": "a", "n": 99}, 400, "asks for 99 samples; this server holds 32 at most"),
        ("/completions", {"prompt": [[1]] * 33}, 400, "asks for 33 samples; this server holds 32 at most"),
        ("/chat/completions", {"messages": HI, "n": 33}, 400, "asks for 33 samples; this server holds 32 at most"),
        ("/completions", {"prompt": "a", "stop": ["x"] * 17}, 400, "stop: 17 texts; this server takes 16 at most"),
        ("/completions", {"prompt": ""}, 400, "the prompt is empty"),
        ("/completions", {"prompt": []}, 400, "prompt is an empty list"),
        ("/completions", {"prompt": [7, 1 << 20]}, 400, "is not in the vocabulary"),
        ("/completions", {"prompt": [7, 1 << 40]}, 400, "prompt"),
        ("/completions", {}, 400, "prompt: Field required"),
        ("/completions", {"prompt": "a" * 300}, 400, "the prompt has 300 tokens and max_tokens is 16"),
        ("/completions", {"prompt": "a" * 3073}, 400, "the prompt has 3,073 bytes; this model's context of 256 tokens"),
        ("/chat/completions", {"messages": [{"role": "user", "content": "é" * 1600}]}, 400, "holds at most 3,072"),
        ("/completions", {"prompt": [7] * 257, "max_tokens": 0, "echo": True}, 400, "and max_tokens is 0"),
        ("/completions", {"prompt": "a", "max_tokens": 201}, 400, "at most 200 tokens a sample"),
        ("/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens=0 draws nothing"),
        ("/completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs: expected less than or equal to 20"),
        ("/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias: 'x' is not a token id"),
        ("/completions", {"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
        ("/completions", {"prompt": "a", "thinking_budget": 16}, 400, "do not fit in max_tokens=16"),
        ("/chat/completions", {"messages": []}, 400, "messages"),
        ("/chat/completions", {"messages": [{"content": "x"}]}, 400, "a list of messages with a role"),
        ("/chat/completions", {"messages": HI, "top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
        ("/chat/completions", {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ("/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text only"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why(server, path, body, status, said):
    response = server.post(path, **body)
    error = response.json()["error"]
    assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert said in error["message"]
    assert error["message"].isprintable()
    assert len(response.content) < 500


def test_keys_that_change_nothing_are_taken(server):
    asked = {"user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"},
             "stop": None, "seed": None, "tools": None, "metadata": {}, "max_completion_tokens": 4, "top_k": -1,
             "prompt_cache_retention": "24h",
             "stream_options": {"include_obfuscation": False, "include_usage": None}}  # fmt: skip
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    reply = server.post("/chat/completions", messages=parts, **asked | {"seed": 1}).json()
    assert reply["choices"] == server.post("/chat/completions", messages=HI, max_tokens=4, seed=1).json()["choices"]
    assert reply["usage"]["completion_tokens"] <= 4


def test_raw_bodies_that_are_refused(server):
    def send(**how):
        response = server.client.post("/completions", **how)
        return response.status_code, response.json()["error"]["message"]

    assert send(content=b"{", headers={"Content-Type": "application/json"})[0] == 400
    assert send(content=b"[" * 100_000, headers={"Content-Type": "application/json"})[0] == 400
    assert send(content=b"\xff\xfe", headers={"Content-Type": "application/json"})[0] == 400
    assert send(content=b"[1]", headers={"Content-Type": "application/json"})[0] == 400
    assert send(content=b"{}", headers={"Content-Type": "text/plain"})[0] == 415
    assert "prompt" in send(content=b"{}", headers={"Content-Type": "Application/JSON; charset=utf-8"})[1]
    half = send(content=rb'{"prompt": "\ud800"}', headers={"Content-Type": "application/json"})
    assert half[0] == 400
    assert r"of a pair such as \ud83d\ude00 both halves must be there" in half[1]
    long = json.dumps({"model": "tiny", "prompt": "a" * (9 << 20)}).encode()
    assert send(content=long, headers={"Content-Type": "application/json"})[0] == 413
    wrong = server.client.get("/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "Method Not Allowed"
    assert server.client.get("/nothing").json()["error"]["message"] == "Not Found"


def test_more_prompts_than_places_are_refused_before_any_is_made_ready(server, monkeypatch):
    asked = []
    monkeypatch.setattr(server.sampler, "prepare", lambda *words: asked.append(words))
    assert server.post("/completions", prompt=[[1]] * 33).status_code == 400
    assert not asked


@pytest.mark.parametrize(
    ("path", "body"),
    [("/completions", {"prompt": ["a", "ab cd " * 600]}),
     ("/chat/completions", {"messages": [{"role": "user", "content": "ab cd " * 600}]})],
)  # fmt: skip
def test_a_text_of_too_many_bytes_never_becomes_tokens(server, monkeypatch, path, body):
    """Millions of them would hold the interpreter, and with it every other client, for seconds."""
    asked = []
    monkeypatch.setattr(ByteTokenizer, "encode", lambda *words, **more: asked.append(words))
    refused = server.post(path, **body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert not asked


def test_more_connections_than_there_may_be(server, monkeypatch):
    monkeypatch.setattr("cabochon.serve.server.CONNECTIONS", 0)
    refused = server.post("/completions", prompt="a")
    assert (refused.status_code, refused.headers["connection"]) == (503, "close")
    assert refused.json()["error"]["message"] == "too many connections; try again later"


def test_a_client_that_leaves_while_it_sends_is_no_fault(server):
    """uvicorn would log a traceback for what the app raises."""
    told = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    sent = []

    async def receive():
        return next(told)

    async def send(message):
        sent.append(message)

    asyncio.run(server.server._server.config.app(scope, receive, send))
    assert sent[0]["status"] == 499


def test_models_health_and_hosts(server):
    models = server.client.get("/models").json()["data"]
    assert [(m["id"], m["max_model_len"]) for m in models] == [("tiny", 256)]
    assert server.client.get("/models/tiny").json() == models[0]
    assert server.client.get("/models/other").status_code == 404
    health = server.client.get(server.url.removesuffix("/v1") + "/health")
    assert health.json() == {"status": "ok", "slots": 4, "places": 32, "unfinished": 0, "failure": ""}
    other = server.client.get("/models", headers={"Host": "evil.example"})
    assert other.status_code == 400
    assert "does not go by the name in the header Host" in other.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(server, stream):
    long = {"model": "tiny", "prompt": "a", "max_tokens": 200, "n": 32, "ignore_eos": True}
    body = json.dumps(long | {"stream": stream}).encode()
    host, port = server.url.split("/")[2].split(":")
    before = server.sampler.counters.new_tokens
    with socket.create_connection((host, int(port))) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        end = time.monotonic() + 20
        while server.sampler.counters.new_tokens == before:
            assert time.monotonic() < end
            time.sleep(0.002)
    server.idle()
    assert server.sampler.counters.new_tokens - before < 32 * 200
