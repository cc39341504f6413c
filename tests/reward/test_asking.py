"""A judge behind a real HTTP server that answers, stalls, fails, breaks off and talks nonsense: never a false score."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from cabochon.cli_reward import make_engine
from cabochon.config import PatienceConfig
from cabochon.reward.asking import EndpointAsker, Reasoning, read_answer
from cabochon.reward.judge import Judge, JudgeConfig, opinion_of
from cabochon.reward.open import JudgeRun, open_reward, usage_of
from cabochon.rollouts.openai import Answer, Endpoint, OpenAIEngine, TokenChoice, open_endpoint
from cabochon.types import Completion, Rollout, Task

WORDS = ("good", "bad", "stall", "500", "garbage", "half", "mute", "filter", "nologprobs", "once")


def answer(text, tokens, logprobs=True, finish="stop"):
    content = [
        {"token": t, "logprob": -0.1, "top_logprobs": [{"token": k, "logprob": v} for k, v in top.items()]}
        for t, top in tokens
    ]
    choice = {"index": 0, "message": {"content": text}, "finish_reason": finish}
    return {"choices": [choice | ({"logprobs": {"content": content}} if logprobs else {})],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5}}  # fmt: skip


def verdict(yes, text="It adds up.\nVerdict: Yes"):
    top = {" Yes": math.log(yes), " No": math.log(1 - yes - 0.01), " Maybe": math.log(0.01)}
    return answer(text, [("It adds up.\n", {}), ("Verdict", {}), (":", {}), (" Yes", top)])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        word = prompt.split("<response>")[1].split("</response>")[0].strip()
        self.server.asked.append(word)
        good = json.dumps(verdict(0.9)).encode()
        if word == "stall":
            self.server.over.wait(20)
        elif word == "500" or (word == "once" and self.server.asked.count("once") == 1):
            self.send(500, b"overloaded")
        elif word == "garbage":
            self.send(200, b"\xff<html>")
        elif word == "half":
            self.send(200, good[: len(good) // 2], len(good))
            self.close_connection = True
        elif word == "bad":
            self.send(200, json.dumps(verdict(0.2, "It does not.\nVerdict: No")).encode())
        elif word == "mute":
            self.send(200, json.dumps(answer("10/10, a good answer, yes!", [("yes", {})])).encode())
        elif word == "filter":
            self.send(200, json.dumps(answer("", [], finish="content_filter")).encode())
        elif word == "nologprobs":
            self.send(200, json.dumps(answer("Verdict: Yes", [], logprobs=False)).encode())
        else:
            self.send(200, self.server.reply or good)

    def send(self, code, content, length=None):
        self.send_response(code)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.asked, http.over, http.reply = [], threading.Event(), b""
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.over.set()
    http.shutdown()
    http.server_close()


def judge_at(server, top_logprobs=5):
    endpoint = Endpoint(
        url=f"http://127.0.0.1:{server.server_port}/v1", model="m", attempts=2, attempt_seconds=4.0,
        deadline_seconds=12.0, backoff_seconds=0.01, prompt_price=1.0, completion_price=2.0,
    )  # fmt: skip
    engine = OpenAIEngine(endpoint)
    asker = EndpointAsker(engine, name="m", reasoning=Reasoning(max_tokens=64), top_logprobs=top_logprobs)
    return Judge(asker, JudgeConfig()), engine


def rollout(word):
    none = np.zeros(0, np.int32)
    completion = Completion(tokens=none, logprobs=none, mask=none, text=word, finish="stop", policy_version=none)
    return Rollout(task=Task(id="t", prompt="1+1?", verifier="none"), completion=completion, group=0)


def test_every_failure_is_a_status_and_the_others_are_scored(server):
    judge, engine = judge_at(server)
    start = time.monotonic()
    scores = dict(zip(WORDS, judge.score([rollout(word) for word in WORDS]), strict=True))
    assert time.monotonic() - start < 30
    assert scores["good"].value == pytest.approx(0.9 / 0.99, rel=1e-6)
    assert scores["bad"].value == pytest.approx(0.2 / 0.99, rel=1e-6)
    assert scores["once"].value == scores["good"].value  # the second attempt
    expected = {
        "stall": "infra_error",
        "500": "infra_error",
        "garbage": "infra_error",
        "half": "infra_error",
        "filter": "infra_error",
        "nologprobs": "infra_error",
        "mute": "unparsed",
    }
    assert {word: scores[word].status for word in expected} == expected
    assert all(scores[word].value is None for word in expected)
    assert "timeout" in scores["stall"].detail
    assert "HTTP 500" in scores["500"].detail
    assert server.asked.count("500") == 2  # bounded
    assert engine.usage.cost > 0
    assert engine.usage.failed >= 5


def top(name, nats):
    """A reply whose verdict is `Yes`, with this token beside it."""
    reply = json.loads(json.dumps(verdict(0.9)))
    reply["choices"][0]["logprobs"]["content"][-1]["top_logprobs"].append({"token": name, "logprob": nats})
    return reply


BEFORE = {"token": None, "logprob": -0.1, "top_logprobs": []}


@pytest.mark.parametrize(
    "reply",
    [
        top(" No", math.inf),
        top(" No", math.nan),
        top(" No", 1e9),
        top(" No", 5.0),
        top(" No", 10**400),
        top(5, -1.0),
        top(None, -1.0),
        verdict(0.9) | {"usage": {"prompt_tokens": math.inf}},
        {"choices": [verdict(0.9)["choices"][0] | {"logprobs": {"content": [BEFORE]}}]},
    ],
)
def test_numbers_and_texts_that_cannot_be_are_no_answer(server, reply):
    """They are JSON to Python: an infinite log-prob was a score of 1, a huge one ended the run."""
    server.reply = json.dumps(reply).encode()
    (score,) = judge_at(server)[0].score([rollout("other")])
    assert (score.value, score.status) == (None, "infra_error")
    assert "malformed" in score.detail
    assert server.asked == ["other", "other"]


def test_without_log_probs_the_text_is_the_verdict(server):
    judge, _ = judge_at(server, top_logprobs=0)
    good, bad, mute = judge.score([rollout("good"), rollout("bad"), rollout("mute")])
    assert (good.value, bad.value, mute.status) == (1.0, 0.0, "unparsed")
    assert judge.model_id != judge_at(server)[0].model_id


@pytest.mark.parametrize(("top", "status"), [(0, "ok"), (20, "infra_error")])
def test_an_endpoint_without_log_probs_judges_where_the_recipe_asks_for_none(server, top, status):
    run = JudgeRun(top_logprobs=top, endpoint=PatienceConfig(attempts=1))
    judge = open_reward(f"http://127.0.0.1:{server.server_port}/v1#m", run, make_engine, open_endpoint)
    (score,) = judge.score([rollout("nologprobs")])
    used = usage_of(judge)
    assert (used["requests"], used["attempts"], used["prompt_tokens"]) == (1, 1, 10)
    assert usage_of(judge_at(server)[0])["requests"] == 0
    assert (score.status, score.value) == (status, 1.0 if status == "ok" else None)
    assert status == "ok" or "top_logprobs=0" in score.detail


@pytest.mark.parametrize("before", ["It adds up.", "Der Maßstab stimmt: groß, weiß, süß.", "İİİİ"])
def test_the_verdict_s_token_is_found_whatever_stands_before(before):
    """Folding case makes some texts longer."""
    top = {" Yes": math.log(0.7), " No": math.log(0.2)}
    tokens = tuple(TokenChoice(text, -0.1, {}) for text in (before, "\nVerdict", ":"))
    said = Answer(status="ok", text=f"{before}\nVerdict: Yes", tokens=(*tokens, TokenChoice(" Yes", -0.1, top)))
    assert read_answer(said, ("No", "Yes")).probabilities == pytest.approx((0.2, 0.7))


def test_an_unlikely_verdict_that_was_drawn_is_as_unlikely_as_it_is():
    """It is none of the likeliest tokens; read from the text it would be certain."""
    tokens = (TokenChoice("Verdict:", -0.1, {}), TokenChoice(" Yes", math.log(0.01), {" Well": math.log(0.9)}))
    reading = read_answer(Answer(status="ok", text="Verdict: Yes", tokens=tokens), ("No", "Yes"))
    assert reading.probabilities == pytest.approx((0.0, 0.01))
    assert opinion_of([reading], JudgeConfig()).status == "unparsed"


def test_nobody_is_there():
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", model="m", attempts=2, backoff_seconds=0.01)
    judge = Judge(EndpointAsker(OpenAIEngine(endpoint), name="m"), JudgeConfig())
    (score,) = judge.score([rollout("good")])
    assert (score.value, score.status) == (None, "infra_error")
