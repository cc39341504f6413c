"""Against a real HTTP server that answers, stalls, fails, breaks off and talks nonsense."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from clock import shortest
from pydantic import ValidationError

from cabochon.config import PatienceConfig
from cabochon.errors import UserError
from cabochon.protocols import PolicyEngine, Weights
from cabochon.rollouts.openai import Endpoint, OpenAIEngine, open_endpoint
from cabochon.types import Request, Sampling, Thinking


class Server:
    """Serves on a free port. What it does with a request is named by the first words of its prompt, `500 500 ok`: one
    word an attempt."""

    def __init__(self):
        self.bodies, self.headers, self.paths = [], [], []
        self.busy = self.most = 0
        self.tries, self.lock, self.over = {}, threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                try:
                    server.act(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with server.lock:
                        server.busy -= 1

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    def act(self, handler, body):
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        words = text.split() if isinstance(text, str) else ["ok"]
        with self.lock:
            attempt = self.tries[text if isinstance(text, str) else 0] = self.tries.get(str(text), -1) + 1
        word = words[min(attempt, len(words) - 1)]
        good = json.dumps(self.reply(body)).encode()
        match word:
            case "stall":
                self.over.wait(30)
            case "drip":
                handler.send_response(200)
                handler.send_header("Content-Length", "1000000")
                handler.end_headers()
                while not self.over.wait(0.02):
                    handler.wfile.write(b" ")
            case "half":
                send(handler, 200, good[: len(good) // 2], length=len(good))
                handler.close_connection = True
            case "half-chunk":
                handler.send_response(200)
                handler.send_header("Transfer-Encoding", "chunked")
                handler.end_headers()
                handler.wfile.write(b"40\r\n" + good[:64] + b"\r\n")
                handler.close_connection = True
            case "drop":
                handler.close_connection = True
                handler.connection.close()
            case "garbage":
                send(handler, 200, b"\xff\xfe<html>busy</html>")
            case "list":
                send(handler, 200, b"[1, 2]")
            case "gzip":
                send(handler, 200, b"not compressed", {"Content-Encoding": "gzip"})
            case "few":
                send(handler, 200, json.dumps(self.reply(body | {"n": 1})).encode())
            case "cut" | "filtered":
                reply = self.reply(body)
                reply["choices"][0]["finish_reason"] = "content_filter" if word == "filtered" else None
                send(handler, 200, json.dumps(reply).encode())
            case "plain":
                send(handler, 200, json.dumps(self.reply(body | {"logprobs": None})).encode())
            case "later":
                send(handler, 429, b"slow down", {"Retry-After": "0.3"})
            case "much-later":
                send(handler, 429, b"slow down", {"Retry-After": "3600"})
            case "wait" | "slow":
                time.sleep(0.05 if word == "wait" else 0.3)
                send(handler, 200, good)
            case code if code.isdigit():
                send(handler, int(code), b'{"error": {"message": "said\\nno"}}')
            case _:
                send(handler, 200, good)

    @staticmethod
    def reply(body):
        choices = []
        for i in range(body["n"]):
            text = f"answer {i}"
            choice = {"index": i, "finish_reason": "stop" if i == 0 else "length"}
            if "messages" in body:
                choice["message"] = {"role": "assistant", "content": text}
                if body.get("logprobs"):
                    top = [{"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -2.5}][: body["top_logprobs"]]
                    choice["logprobs"] = {"content": [{"token": "a", "logprob": -0.1, "top_logprobs": top}]}
            else:
                choice["text"] = text
                if body.get("logprobs"):
                    choice["logprobs"] = {
                        "tokens": ["x", "y"], "token_logprobs": [-0.5, -1], "top_logprobs": [{"x": -0.5}, None]
                    }  # fmt: skip
            choices.append(choice)
        return {"choices": choices[::-1], "usage": {"prompt_tokens": 10, "completion_tokens": 3 * body["n"]}}


def send(handler, code, body, headers=None, length=None):
    handler.send_response(code)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with contextlib.closing(Server()) as server:
        yield server


def engine_for(server, **changes):
    quick = {"attempts": 3, "attempt_seconds": 0.5, "deadline_seconds": 5, "backoff_seconds": 0.01}
    return OpenAIEngine(Endpoint(url=server.url, model="judge", **(quick | changes)))


def chat(text):
    return [{"role": "user", "content": text}]


def test_what_is_sent(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    engine = engine_for(server, key_env="JUDGE_KEY")
    sampling = Sampling(
        max_tokens=7, temperature=0.5, top_p=0.9, n=2, stop=("\n",), stop_ids=(5,), top_k=3, min_p=0.1,
        logit_bias={9: -100.0}, ignore_eos=True,
    )  # fmt: skip
    engine.ask([Request(prompt=chat("ok"), sampling=sampling, seed=2**64 - 1)], top_logprobs=2)
    assert server.bodies == [
        {"model": "judge", "messages": [{"role": "user", "content": "ok"}], "max_tokens": 7, "temperature": 0.5,
         "top_p": 0.9, "n": 2, "seed": 2**63 - 1, "stop": ["\n"], "stop_token_ids": [5], "top_k": 3, "min_p": 0.1,
         "logit_bias": {"9": -100.0}, "ignore_eos": True, "logprobs": True, "top_logprobs": 2}
    ]  # fmt: skip
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    engine_for(server).ask([Request(prompt=np.array([1, 2])), Request(prompt="ok")])
    default = {"model": "judge", "max_tokens": 256, "temperature": 1.0, "top_p": 1.0, "n": 1, "seed": 0}
    sent = sorted(server.bodies[1:], key=lambda b: str(b["prompt"]))
    assert sent == [default | {"prompt": [1, 2]}, default | {"prompt": "ok"}]  # nothing OpenAI's own API does not know
    assert server.paths[1:] == ["/v1/completions"] * 2
    assert "Authorization" not in server.headers[1]


def test_what_comes_back(server):
    engine = engine_for(server, prompt_price=2.0, completion_price=10.0)
    requests = [Request(prompt=chat("ok"), sampling=Sampling(n=2)), Request(prompt="ok", sampling=Sampling(n=3))]
    answers = engine.ask(requests, top_logprobs=2)
    assert [a.text for a in answers] == ["answer 0", "answer 1", "answer 0", "answer 1", "answer 2"]
    assert [a.finish for a in answers] == ["stop", "length", "stop", "length", "length"]
    assert {a.status for a in answers} == {"ok"}
    assert answers[0].tokens == (("a", -0.1, {"a": -0.1, "b": -2.5}),)
    assert answers[2].tokens == (("x", -0.5, {"x": -0.5}), ("y", -1.0, {}))
    u = engine.usage
    assert (u.requests, u.attempts, u.failed, u.prompt_tokens, u.completion_tokens) == (2, 2, 0, 20, 15)
    assert u.cost == pytest.approx((20 * 2 + 15 * 10) / 1e6)
    assert engine.ask([Request(prompt="ok")])[0].tokens == ()


TROUBLES = [
    "500", "503", "429", "later", "stall", "drip", "half", "half-chunk", "drop", "garbage", "list", "gzip", "cut",
]  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_that_passes_is_waited_out(server, trouble):
    engine = engine_for(server)
    start = time.monotonic()
    (answer,) = engine.ask([Request(prompt=f"{trouble} {trouble} ok")])
    assert (answer.status, answer.text, answer.attempts) == ("ok", "answer 0", 3)
    assert len(server.bodies) == engine.usage.attempts == 3
    if trouble == "later":
        assert time.monotonic() - start > 0.6  # as long as the server asked, both times
    assert engine.usage.failed == 0


@pytest.mark.parametrize(
    ("trouble", "status", "detail", "attempts"),
    [
        ("500", "unavailable", 'HTTP 500: {"error": {"message": "said\\nno"}}', 3),
        ("drop", "unavailable", "RemoteProtocolError", 3),
        ("half", "unavailable", "RemoteProtocolError", 3),
        ("garbage", "malformed", "not a reply of this API", 3),
        ("few", "malformed", "1 choices where 2 were asked for", 3),
        ("cut", "malformed", "finish_reason None", 3),
        ("stall", "timeout", "no reply within 0.5 s", 3),
        ("drip", "timeout", "no reply within 0.5 s", 3),
        ("much-later", "unavailable", "HTTP 429: slow down", 1),  # longer than the deadline: not worth waiting
        ("400", "refused", "HTTP 400", 1),
        ("401", "refused", "HTTP 401", 1),
        ("404", "refused", "HTTP 404", 1),
    ],
)
def test_trouble_that_stays_is_a_status(server, trouble, status, detail, attempts):
    engine = engine_for(server)
    answers = engine.ask([Request(prompt=trouble, sampling=Sampling(n=2))])
    assert [(a.status, a.text, a.finish, a.attempts) for a in answers] == [(status, "", "abort", attempts)] * 2
    assert detail in answers[0].detail
    assert "\n" not in answers[0].detail
    assert (engine.usage.failed, len(server.bodies)) == (1, attempts)


def test_refused_by_the_content_alone(server):
    first, second = engine_for(server).ask([Request(prompt="filtered", sampling=Sampling(n=2))])
    assert {first.status, second.status} == {"ok", "refused"}
    (answer,) = engine_for(server).ask([Request(prompt="plain")], top_logprobs=5)
    assert (answer.status, answer.detail) == ("refused", "no log-probs in the reply; top_logprobs=0 asks for none")


def test_one_bad_answer_does_not_spoil_a_batch(server):
    words = ["ok", "stall", "500", "ok", "400", "garbage", "half ok", "ok"]
    requests = [Request(prompt=word, seed=i) for i, word in enumerate(words)]
    answers = engine_for(server).ask(requests)
    assert [a.status for a in answers] == [
        "ok", "timeout", "unavailable", "ok", "refused", "malformed", "ok", "ok",
    ]  # fmt: skip
    completions = engine_for(server).generate(requests[:1] + requests[4:5])
    assert [(c.text, c.finish) for c in completions] == [("answer 0", "stop"), ("", "abort")]


def test_text_that_is_no_unicode_is_sent_all_the_same(server):
    assert engine_for(server).ask([Request(prompt=chat("ok \ud800"))])[0].status == "ok"
    assert server.bodies[0]["messages"][0]["content"] == "ok \ud800"
    assert server.headers[0]["Content-Type"] == "application/json"


def test_the_deadline_covers_all_attempts(server):
    engine = engine_for(server, attempts=100, deadline_seconds=1.2)

    def ask():
        (answer,) = engine.ask([Request(prompt="stall")])
        assert answer.status == "timeout"
        assert 2 <= answer.attempts <= 3

    assert shortest(2.5, ask) < 2.5


def test_no_more_at_a_time_than_allowed(server):
    engine = engine_for(server, concurrency=3, attempt_seconds=5)
    answers = engine.ask([Request(prompt=f"wait {i}") for i in range(12)])
    assert {a.status for a in answers} == {"ok"}
    assert 2 <= server.most <= 3


def test_nobody_there():
    engine = OpenAIEngine(Endpoint(url="http://127.0.0.1:9/v1", model="m", attempts=2, backoff_seconds=0.01))
    (answer,) = engine.ask([Request(prompt="hi")])
    assert (answer.status, answer.attempts) == ("unavailable", 2)
    assert "ConnectError" in answer.detail


def test_an_endpoint_that_is_silent_is_not_waited_for_a_gateful_at_a_time(server):
    engine = engine_for(server, concurrency=2, attempts=1, attempt_seconds=0.3)
    answers = engine.ask([Request(prompt="stall", seed=i) for i in range(30)])
    sent = len(server.bodies)
    assert 2 <= sent <= 3  # one of the two places may be taken again before the other is free
    assert [a.status for a in answers] == ["timeout"] * sent + ["unavailable"] * (30 - sent)
    assert "not sent" in answers[-1].detail
    assert engine.usage.failed == 30


def test_an_endpoint_that_answers_others_is_there(server):
    """Of two that are silent at once and end together, the first began before the last reply: no outage, though the
    reply that is under way then is late."""
    engine = engine_for(server, concurrency=2, attempts=1, attempt_seconds=1.0)
    words = ["stall", "ok", "stall", "slow", "stall", "ok"]
    answers = engine.ask([Request(prompt=word, seed=i) for i, word in enumerate(words)])
    assert [a.status for a in answers] == ["timeout" if word == "stall" else "ok" for word in words]


def test_an_address_with_a_name(server):
    engine = open_endpoint(f"{server.url}#judge", PatienceConfig(attempts=2, backoff_seconds=0.01))
    (answer,) = engine.ask([Request(prompt="500")])
    assert (answer.status, answer.attempts) == ("unavailable", 2)
    assert server.bodies[0]["model"] == "judge"
    with pytest.raises(UserError, match=r"which model of the endpoint\? write http://h/v1#NAME"):
        open_endpoint("http://h/v1")
    with pytest.raises(UserError, match=r"http:h#m: .*expected an address such as"):
        open_endpoint("http:h#m")


def test_the_engine_door(server):
    engine = engine_for(server)
    assert isinstance(engine, PolicyEngine)
    (c,) = engine.generate([Request(prompt="ok")])
    assert c.tokens.tolist() == list(b"answer 0")
    assert not c.mask.any()  # nothing of it may be trained on
    assert (c.policy_version == -1).all()
    with pytest.raises(UserError, match="serves its own; version 3 cannot be loaded"):
        engine.load(Weights(version=3, params={}))
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(prompt=""), "request 1: the prompt is empty"),
        (Request(prompt=[]), "request 1: the prompt is empty"),
        (Request(prompt="x", sampling=Sampling(max_tokens=0)), "request 1: sampling.max_tokens=0"),
        (Request(prompt="x", sampling=Sampling(routes=True)), "request 1: sampling.routes needs our own sampler"),
        (Request(prompt="x", sampling=Sampling(thinking=Thinking(max_tokens=4))), "request 1: sampling.thinking needs"),
    ],
)
def test_what_an_endpoint_cannot_be_asked_is_refused_before_anything_is_sent(server, request_, words):
    with pytest.raises(UserError, match=words):
        engine_for(server).ask([Request(prompt="ok"), request_])
    assert server.bodies == []


def test_an_address_that_is_none():
    with pytest.raises(ValidationError, match="expected an address such as"):
        Endpoint(url="localhost:8000", model="m")
    assert Endpoint(url="http://x/v1/", model="m").url == "http://x/v1"
