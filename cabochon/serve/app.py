"""The HTTP side: routes, the key, limits, and what happens when a client is slow, impatient or gone.

Whoever leaves frees the slots: a call's jobs are cancelled in one `finally`, however the call ended. Every wait here
ends by the request's deadline.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse

from cabochon.serve.asked import Asked, Served, asked_chat, asked_completion
from cabochon.serve.bodies import ApiError, ChatBody, CompletionBody, parse, shown
from cabochon.serve.engine import STOPPING, Busy, Ended, Event, Failed, Job, ServingEngine, Stopped
from cabochon.serve.replies import DONE, Count, StreamedChoice, envelope, event, whole_choice

BODY_SECONDS = 30.0
"""for a client to send its request"""
GRACE_SECONDS = 5.0
"""beyond the deadline, for the last bytes of a stream to be taken"""
LAST_SECONDS = 1.0
"""for a stream's last words once the server ends"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may use up. How many samples wait is the engine's to say."""

    seconds: float = 600.0
    """for a request, from its arrival to the last byte"""
    body_bytes: int = 8 << 20


class Told(NamedTuple):
    """An event and the choice it is about."""

    job: int
    event: Event


class Call:
    """One request's jobs while they run. An async context manager: leaving it cancels what is left of them."""

    def __init__(self, engine: ServingEngine, asked: Asked, seconds: float):
        self.asked, self._engine = asked, engine
        loop = asyncio.get_running_loop()
        self.deadline = loop.time() + seconds
        self._events: asyncio.Queue[Told] = asyncio.Queue()
        self._clock, self._seconds = loop.time, seconds

        def emitter(index: int) -> Callable[[Event], None]:
            def emit(what: Event) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(self._events.put_nowait, Told(index, what))

            return emit

        self.jobs = [
            Job(
                work=work, emit=emitter(i), scored=asked.scored, draw=asked.draw,
                stream=asked.stream and asked.top is None,
            )
            for i, work in enumerate(asked.works)
        ]  # fmt: skip
        self._left = sum(job.samples for job in self.jobs)
        self.count = Count(sum(len(work.tokens) for work in asked.works))

    async def __aenter__(self) -> Call:
        """Raises ApiError where there is no place."""
        try:
            self._engine.submit(self.jobs)
        except Busy as error:
            raise ApiError(429, f"too many requests: {error}; try again later", code="queue_full") from None
        except Stopped as error:
            raise ApiError(503, f"the model is not served any more: {error}") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        self._engine.cancel(self.jobs)

    async def events(self) -> AsyncIterator[Told]:
        """Until every sample has ended. Raises ApiError at the deadline and where the engine is gone."""
        while self._left:
            try:
                told = await asyncio.wait_for(self._events.get(), max(0.0, self.deadline - self._clock()))
            except TimeoutError:
                raise ApiError(504, f"not done within {self._seconds:g} s", code="timeout") from None
            match told.event:
                case Failed(detail, stopping):
                    raise ApiError(503 if stopping else 500, detail)
                case Ended(_, completion, _):
                    self._left -= 1
                    self.count.completion += 0 if completion is None else len(completion.tokens)
            yield told

    def index(self, job: int, sample: int) -> int:
        """Of the choice: all samples of the first prompt, then of the second."""
        return sum(each.samples for each in self.jobs[:job]) + sample


async def _whole(call: Call) -> Response:
    choices: list[dict[str, Any]] = []
    async with call:
        async for told in call.events():
            if isinstance(told.event, Ended):
                index = call.index(told.job, told.event.sample)
                choices.append(whole_choice(call.asked, index, told.job, told.event))
    choices.sort(key=lambda choice: choice["index"])
    return JSONResponse(envelope(call.asked, chunk=False) | {"choices": choices, "usage": call.count.json()})


async def _chunks(call: Call) -> AsyncIterator[bytes]:
    head = envelope(call.asked, chunk=True)
    choices = {
        (j, s): StreamedChoice(call.asked, call.index(j, s), j) for j, job in enumerate(call.jobs)
        for s in range(job.samples)
    }  # fmt: skip
    for choice in choices.values():
        for opening in choice.opening():
            yield event(head | {"choices": [opening]})
    try:
        async for job, what in call.events():
            assert not isinstance(what, Failed)
            choice = choices[job, what.sample]
            for chunk in choice.last(what) if isinstance(what, Ended) else choice.more(what):
                yield event(head | {"choices": [chunk]})
    except ApiError as error:  # the status line is long gone: the client is told in the stream
        yield event(error.body)
        return
    if call.asked.usage:
        yield event(head | {"choices": [], "usage": call.count.json()})
    yield DONE


class _Stream(StreamingResponse):
    """A stream whose call ends with it, whoever ends it, and that does not wait for ever for a client to read."""

    def __init__(self, call: Call):
        super().__init__(_chunks(call), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._call = call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._call.deadline + GRACE_SECONDS):
                    await super().__call__(scope, receive, send)
        except asyncio.CancelledError:  # only the end of the server cancels; RuntimeError: the last chunk was sent
            with suppress(TimeoutError, RuntimeError):
                async with asyncio.timeout(LAST_SECONDS):
                    await send({"type": "http.response.body", "body": event(ApiError(503, STOPPING).body)})
        finally:
            await self._call.__aexit__()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What `work` makes; where the client leaves meanwhile, `work` is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)  # `work` has the deadline
        return await doing if doing.done() else Response(status_code=499)
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


class _Door:
    """What is asked before any route: is there room, and does this server go by that name. Refusals in our shape."""

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: list[str], crowded: Callable[[], bool]):
        self._app, self._hosts, self._crowded = app, hosts, crowded

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def let_in(*_: Any) -> None:
            await self._app(scope, receive, send)

        async def refuse(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                error = ApiError(400, "this server does not go by the name in the header Host")
                await _answer(error)(scope, receive, send)

        if self._crowded():
            await _answer(ApiError(503, "too many connections; try again later"))(scope, receive, send)
        else:
            await TrustedHostMiddleware(let_in, self._hosts)(scope, receive, refuse)


def make_app(
    served: Served,
    engine: ServingEngine,
    limits: Limits,
    key: str | None,
    hosts: list[str],
    crowded: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """`key`: what clients must send as a bearer token, None for nothing. `hosts`: names it answers to. `crowded`: are
    there more connections than it serves."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Door, hosts=hosts, crowded=crowded)
    app.add_exception_handler(ApiError, _as_answer)
    for status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        app.add_exception_handler(status, partial(_no_such_route, status))
    app.add_exception_handler(Exception, _as_answer)

    def check_key(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), (key or "").encode()) and scheme.lower() == "bearer"
        if key is not None and not right:
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def answer(request: Request, read: Callable[[bytes], Asked]) -> Response:
        check_key(request)
        try:
            raw = await _body(request, limits.body_bytes)
            asked = await asyncio.to_thread(read, raw)  # a long prompt takes a while to become tokens
            call = Call(engine, asked, limits.seconds)
            if not asked.stream:
                return await _unless_gone(request, _whole(call))
        except asyncio.CancelledError:  # only the end of the server cancels
            raise ApiError(503, STOPPING) from None
        await call.__aenter__()
        return _Stream(call)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, lambda raw: asked_chat(served, parse(ChatBody, raw)))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, lambda raw: asked_completion(served, parse(CompletionBody, raw)))

    card = {"id": served.name, "object": "model", "created": served.created, "owned_by": "cabochon"}
    card["max_model_len"] = served.length

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        check_key(request)
        if name != served.name:
            raise ApiError(404, f"the model {shown(repr(name))} is not served here; this is {served.name!r}")
        return JSONResponse(card)

    @app.get("/health")
    async def health() -> Response:
        status = engine.status()
        return JSONResponse(
            {"status": "failed" if status.failure else "ok", **status._asdict()}, 503 if status.failure else 200
        )

    return app


async def _body(request: Request, limit: int) -> bytes:
    """Raises ApiError where it is too long, too slow, or not JSON by its header: a browser may send anything else to
    any address without asking."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "expected the header Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while (part := await request.receive())["type"] == "http.request":
                body += part.get("body", b"")
                if len(body) > limit:
                    raise ApiError(413, f"the request is longer than {limit:,} bytes")
                if not part.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the request did not come in within {BODY_SECONDS:g} s") from None
    raise ApiError(499, "the client left before its request was here")


def _answer(error: ApiError) -> Response:
    headers = {429: {"Retry-After": "1"}, 503: {"Connection": "close"}}.get(error.status)
    return JSONResponse(error.body, error.status, headers)


async def _as_answer(request: Request, error: Exception) -> Response:
    return _answer(error if isinstance(error, ApiError) else ApiError(500, "a fault of this server; its log has more"))


async def _no_such_route(status: HTTPStatus, request: Request, error: Any) -> Response:
    """`error`: Starlette's own, whose headers say what is allowed."""
    return JSONResponse(ApiError(status, status.phrase).body, status, error.headers)
