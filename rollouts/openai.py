"""Any OpenAI-compatible endpoint (vLLM, sglang-jax, ours, OpenAI itself) as an engine: for judges and for evaluation.

An endpoint fails in its own ways, so each sample comes back with a status of its own. One that is late, overloaded or
speaks nonsense is asked again, a bounded number of times and within a deadline; nothing that a server does raises.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import httpx2
import numpy as np
from pydantic import ValidationError, field_validator

from cabochon.config import PatienceConfig
from cabochon.errors import UserError
from cabochon.protocols import Weights
from cabochon.tokenizer import ByteTokenizer, Tokenizer
from cabochon.types import Completion, Request, Sampling

MAX_BYTES = 64 << 20
"""of one reply"""
ROUNDING = 1e-2
"""how far above 0 a log-prob may be"""


class Endpoint(PatienceConfig):
    """Where a model is served."""

    url: str
    """up to the version: http://localhost:8000/v1"""
    model: str
    """as the endpoint calls it"""

    @field_validator("url")
    @classmethod
    def _an_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")) or len(url.split("/")) < 3 or not url.split("/")[2]:
            raise ValueError(f"{url!r}: expected an address such as http://localhost:8000/v1")
        return url.rstrip("/")


AnswerStatus = Literal["ok", "timeout", "unavailable", "malformed", "refused"]
"""`timeout`: no reply in time; `unavailable`: no connection, overload or a server's error; `malformed`: a reply that is
no answer; `refused`: the endpoint will not answer this request however often it is asked. Only `ok` is the model's
doing: everything else is an infrastructure failure, never a score."""


class TokenChoice(NamedTuple):
    """A token of an answer, and what the model thought of others in its place."""

    text: str
    logprob: float
    """nats"""
    top: Mapping[str, float]
    """text → log-prob of the likeliest tokens"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sample of a request."""

    status: AnswerStatus
    text: str = ""
    finish: Literal["stop", "length", "abort"] = "abort"
    tokens: tuple[TokenChoice, ...] = ()
    """empty where no log-probs were asked for"""
    detail: str = ""
    """what went wrong, one line"""
    attempts: int = 1
    seconds: float = 0.0


@dataclass(kw_only=True)
class Usage:
    """What was asked of an endpoint so far."""

    requests: int = 0
    attempts: int = 0
    failed: int = 0
    """requests without an answer in the end"""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """as the endpoint counts them, replies that could not be used included"""
    cost: float = 0.0


@dataclass(kw_only=True)
class _Outage:
    """Of one call: requests in a row without any reply that began after the last reply to another (one that began
    before it says nothing: the server was there meanwhile), and how many of them are too many."""

    silent: int = 0
    heard: float = float("-inf")
    """when the last reply came"""
    most: int

    def reply(self, now: float) -> None:
        self.silent, self.heard = 0, now

    def silence(self, since: float) -> None:
        self.silent += since > self.heard


def open_endpoint(address: str, patience: PatienceConfig = PatienceConfig()) -> OpenAIEngine:
    """The model at `http://host/v1#name`. Raises UserError where the address is none."""
    url, _, name = address.partition("#")
    if not name:
        raise UserError(f"{address}: which model of the endpoint? write {url}#NAME")
    try:
        return OpenAIEngine(Endpoint(url=url, model=name, **patience.model_dump()))
    except ValidationError as error:
        raise UserError(f"{address}: {error.errors()[0]['msg']}") from None


class OpenAIEngine:
    """Example: `OpenAIEngine(Endpoint(url="http://localhost:8000/v1", model="judge")).ask([Request(prompt="Hi")])`.

    Text and ids go to `/completions`, messages to `/chat/completions`. `ask` is what judges use; `generate` is the
    PolicyEngine door, whose tokens have mask 0: an endpoint draws from weights we do not train. Not for use inside a
    running event loop; there, await `answers`.
    """

    version = -1
    """of no learner's weights"""

    def __init__(self, endpoint: Endpoint, tokenizer: Tokenizer | None = None):
        """`tokenizer` writes texts as ids in `generate`; bytes by default."""
        self.endpoint, self.tokenizer, self.usage = endpoint, tokenizer or ByteTokenizer(), Usage()

    def ask(self, requests: Sequence[Request], top_logprobs: int = 0) -> list[Answer]:
        """All samples of the first request, then of the second, and so on. `top_logprobs`: how many of the likeliest
        tokens to report in each place; 0 for no log-probs.

        Raises UserError, before anything is sent, for what an endpoint cannot be asked.
        """
        return asyncio.run(self.answers(requests, top_logprobs))

    async def answers(self, requests: Sequence[Request], top_logprobs: int = 0) -> list[Answer]:
        """As `ask`."""
        bodies = [_body(self.endpoint.model, r, top_logprobs, f"request {i}") for i, r in enumerate(requests)]
        key = os.environ.get(self.endpoint.key_env)
        gate = asyncio.Semaphore(self.endpoint.concurrency)
        async with httpx2.AsyncClient(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=None,  # every attempt is under a deadline of its own, which covers the whole reply
            limits=httpx2.Limits(max_connections=self.endpoint.concurrency),
        ) as client:
            outage = _Outage(most=self.endpoint.concurrency)
            work = [self._patiently(client, gate, outage, path, body, top_logprobs) for path, body in bodies]
            return [answer for answers in await asyncio.gather(*work) for answer in answers]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Texts as completions: ids by the tokenizer, no log-probs, mask 0; `abort` where there was no answer."""
        return [self._completion(answer) for answer in self.ask(requests)]

    def load(self, weights: Weights) -> None:
        """Raises UserError: an endpoint serves the weights it has."""
        raise UserError(f"weights: {self.endpoint.url} serves its own; version {weights.version} cannot be loaded")

    def _completion(self, answer: Answer) -> Completion:
        tokens = np.array(self.tokenizer.encode(answer.text), np.int32)
        T = len(tokens)
        return Completion(
            tokens=tokens,
            logprobs=np.zeros(T, np.float32),
            mask=np.zeros(T, bool),
            text=answer.text,
            finish=answer.finish,
            policy_version=np.full(T, self.version, np.int32),
            answer=(0, T),
        )

    async def _patiently(
        self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, outage: _Outage, path: str, body: dict[str, Any],
        top: int,
    ) -> list[Answer]:  # fmt: skip
        """The answers of one request. The place at the gate is kept during pauses: a server that struggles gets less
        to do, and one that is silent to as many in a row as the gate lets through is not asked any more: a thousand
        requests would else wait out their deadlines, a gateful after the other."""
        cfg, clock = self.endpoint, asyncio.get_running_loop().time
        async with gate:
            start, attempt, failure = clock(), 0, _Failure("timeout", "")
            self.usage.requests += 1
            if outage.silent >= outage.most:
                self.usage.failed += 1
                unsent = Answer(status="unavailable", detail="not sent: no reply to those before it", attempts=0)
                return [unsent] * body["n"]
            while attempt < cfg.attempts and (left := cfg.deadline_seconds - (clock() - start)) > 0:
                attempt += 1
                self.usage.attempts += 1
                try:
                    async with asyncio.timeout(min(cfg.attempt_seconds, left)):
                        reply = await self._reply(client, cfg.url + path, body)
                    found = _answers(reply, body["n"], top, attempt, clock() - start)
                    self.usage.failed += any(a.status != "ok" for a in found)
                    outage.reply(clock())
                    return found
                except TimeoutError:
                    failure = _Failure("timeout", f"no reply within {min(cfg.attempt_seconds, left):g} s")
                except _Failure as error:
                    failure = error
                if failure.status == "refused":
                    break
                pause = max(failure.wait, cfg.backoff_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
                if attempt < cfg.attempts and clock() - start + pause < cfg.deadline_seconds:
                    await asyncio.sleep(pause)
                else:
                    break
        self.usage.failed += 1
        if failure.status in ("timeout", "unavailable"):
            outage.silence(start)
        else:
            outage.reply(clock())
        lost = Answer(status=failure.status, detail=failure.detail, attempts=attempt, seconds=clock() - start)
        return [lost] * body["n"]

    async def _reply(self, client: httpx2.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that came back, its tokens counted. Raises _Failure."""
        content = bytearray()
        try:
            # dumps and not json=: half a surrogate pair in a text is escaped instead of refused by this side
            async with client.stream("POST", url, content=json.dumps(body)) as response:
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > MAX_BYTES:
                        raise _Failure("malformed", f"a reply of more than {MAX_BYTES >> 20} MiB")
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            kind: AnswerStatus = "malformed" if isinstance(error, httpx2.DecodingError) else "unavailable"
            raise _Failure(kind, f"{type(error).__name__}: {error}") from None
        text = bytes(content).decode("utf-8", "replace")
        if response.status_code != 200:
            later = response.status_code in (408, 409, 425, 429) or response.status_code >= 500
            kind = "unavailable" if later else "refused"
            raise _Failure(kind, f"HTTP {response.status_code}: {text[:300]}", _seconds(response.headers))
        try:
            reply = json.loads(text)
            usage = reply.get("usage") or {}
            prompt, completion = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (ValueError, AttributeError, TypeError, RecursionError, OverflowError):
            raise _Failure("malformed", f"not a reply of this API: {text[:300]!r}") from None
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += completion
        cfg = self.endpoint
        self.usage.cost += (prompt * cfg.prompt_price + completion * cfg.completion_price) / 1e6
        return reply


class _Failure(Exception):
    """An attempt without an answer."""

    def __init__(self, status: AnswerStatus, detail: str, wait: float = 0.0):
        self.status, self.detail, self.wait = status, " ".join(detail.split()), wait


def _seconds(headers: Mapping[str, str]) -> float:
    """What the server asks to wait; 0 where it does not say, or gives a date."""
    try:
        return max(0.0, float(headers.get("retry-after", "0")))
    except ValueError:
        return 0.0


def _body(model: str, request: Request, top_logprobs: int, where: str) -> tuple[str, dict[str, Any]]:
    """(path, JSON body). What OpenAI's own API does not know is sent only where it is asked for. Raises UserError."""
    s, plain = request.sampling, Sampling()
    for name in ("thinking", "routes"):
        if getattr(s, name) != getattr(plain, name):
            raise UserError(f"{where}: sampling.{name} needs our own sampler; an endpoint cannot do it")
    if s.max_tokens < 1 or s.n < 1:
        raise UserError(f"{where}: sampling.max_tokens={s.max_tokens}, sampling.n={s.n}; expected 1 or more")
    if not len(request.prompt):
        raise UserError(f"{where}: the prompt is empty; give at least one token")
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": s.max_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "n": s.n,
        "seed": request.seed % 2**63,
    }
    extra = {
        "stop": (s.stop, list(s.stop)),
        "logit_bias": (s.logit_bias, {str(i): b for i, b in s.logit_bias.items()}),
        "top_k": (s.top_k, s.top_k),
        "min_p": (s.min_p, s.min_p),
        "stop_token_ids": (s.stop_ids, list(s.stop_ids)),
        "ignore_eos": (s.ignore_eos, True),
    }
    body |= {name: value for name, (wanted, value) in extra.items() if wanted}
    if isinstance(request.prompt, str | np.ndarray):
        text = request.prompt if isinstance(request.prompt, str) else request.prompt.tolist()
        return "/completions", body | {"prompt": text} | ({"logprobs": top_logprobs} if top_logprobs else {})
    asked = {"logprobs": True, "top_logprobs": top_logprobs} if top_logprobs else {}
    return "/chat/completions", body | {"messages": [dict(m) for m in request.prompt]} | asked


def _answers(reply: dict[str, Any], n: int, top: int, attempt: int, seconds: float) -> list[Answer]:
    """The n samples of a reply. Raises _Failure where it is not what was asked for."""
    try:
        choices = sorted(reply["choices"], key=lambda c: c["index"])
        if len(choices) != n:
            raise _Failure("malformed", f"{len(choices)} choices where {n} were asked for")
        return [_answer(choice, top, attempt, seconds) for choice in choices]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise _Failure("malformed", f"{type(error).__name__} {error} in {json.dumps(reply)[:300]}") from None


def _answer(choice: dict[str, Any], top: int, attempt: int, seconds: float) -> Answer:
    chat = "message" in choice
    text = (choice["message"]["content"] if chat else choice["text"]) or ""
    finish = choice["finish_reason"]
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}")
    if finish == "content_filter":
        return Answer(status="refused", detail="the content filter", attempts=attempt, seconds=seconds)
    if finish not in ("stop", "length", "tool_calls", "eos"):
        raise _Failure("malformed", f"the answer was cut off: finish_reason {finish!r}")
    tokens: tuple[TokenChoice, ...] = ()
    if top:
        if not choice.get("logprobs"):
            why = "no log-probs in the reply; top_logprobs=0 asks for none"
            return Answer(status="refused", detail=why, attempts=attempt, seconds=seconds)
        tokens = _chat_tokens(choice["logprobs"]) if chat else _text_tokens(choice["logprobs"])
    return Answer(
        status="ok",
        text=text,
        finish="length" if finish == "length" else "stop",
        tokens=tokens,
        attempts=attempt,
        seconds=seconds,
    )


def _chat_tokens(logprobs: dict[str, Any]) -> tuple[TokenChoice, ...]:
    return tuple(
        _token(t["token"], t["logprob"], [(o["token"], o["logprob"]) for o in t["top_logprobs"]])
        for t in logprobs["content"]
    )


def _text_tokens(logprobs: dict[str, Any]) -> tuple[TokenChoice, ...]:
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return tuple(_token(t, p, (others or {}).items()) for t, p, others in rows)


def _token(text: Any, logprob: Any, top: Iterable[tuple[Any, Any]]) -> TokenChoice:
    """Raises ValueError or TypeError for what is no text, or no logarithm of a probability: Python's JSON knows NaN and
    Infinity, and a judge would make a score of them."""
    rows = [(text, float(logprob)), *((t, float(p)) for t, p in top)]
    for each, nats in rows:
        if not isinstance(each, str) or not nats < ROUNDING:
            raise ValueError(f"token {each!r} with log-prob {nats}")
    return TokenChoice(text, rows[0][1], dict(rows[1:]))
