"""`cabochon view`: the page, live. A server on this machine alone that reads the runs' files and writes nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, Response, StreamingResponse

from cabochon.errors import UserError
from cabochon.report import page
from cabochon.report.build import Readers

HOST = "127.0.0.1"
PERIOD = 1.0
"""seconds between looks at the files"""
ALIVE = 15.0
"""seconds after which a silent stream says that it is there"""


class Watcher:
    """The readers, used by one thread at a time; `version` counts the times anything was new."""

    def __init__(self, places: Sequence[Path]) -> None:
        self._readers = Readers(places)
        self._lock = asyncio.Lock()
        self.version = 0

    async def look(self) -> int:
        async with self._lock:
            if await asyncio.to_thread(self._readers.refresh) or not self.version:
                self.version += 1
            return self.version

    async def data(self) -> dict[str, Any]:
        await self.look()
        async with self._lock:
            return await asyncio.to_thread(self._readers.snapshot) | {"live": True, "version": self.version}

    async def groups(self, run: int, step: int) -> dict[str, Any]:
        if not 0 <= run < len(self._readers.runs):
            raise HTTPException(404)
        async with self._lock:
            return await asyncio.to_thread(self._readers.runs[run].groups, step)


def application(places: Sequence[Path], leaving: Callable[[], bool]) -> FastAPI:
    """Answers only requests that name this machine as their host; streams end once `leaving`.

    Raises UserError where a directory holds no run.
    """
    watcher = Watcher(places)
    app = FastAPI(title="cabochon view", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    safe = {"Content-Security-Policy": page.policy(live=True) + "; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin"}  # fmt: skip

    def json_of(data: Any) -> Response:
        return Response(page.embedded(data), media_type="application/json", headers=safe)

    @app.get("/")
    async def whole() -> Response:
        return HTMLResponse(await asyncio.to_thread(page.render, await watcher.data()), headers=safe)

    @app.get("/api/data")
    async def data() -> Response:
        return json_of(await watcher.data())

    @app.get("/api/runs/{run}/rollouts/{step}")
    async def groups(run: int, step: int) -> Response:
        return json_of(await watcher.groups(run, step))

    @app.get("/api/events")
    async def events() -> Response:
        async def changes() -> AsyncIterator[str]:
            told, silent = -1, 0.0
            while not leaving():
                version = await watcher.look()
                if version != told:
                    told, silent = version, 0.0
                    yield f"data: {version}\n\n"
                elif silent >= ALIVE:
                    silent = 0.0
                    yield ": here\n\n"
                await asyncio.sleep(PERIOD)
                silent += PERIOD

        return StreamingResponse(changes(), media_type="text/event-stream", headers=safe)

    return app


def serve(places: Sequence[Path], port: int) -> None:
    """Until Ctrl-C. Raises UserError where the port is taken, or a directory holds no run."""
    app = application(places, leaving=lambda: server.should_exit)
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with taken:
        try:
            taken.bind((HOST, port))
        except OSError as error:
            said = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had: {os.strerror(error.errno or 0)}"
            raise UserError(f"--port {port} {said}; give another, or 0 for any that is free") from None
        taken.listen()  # whoever reads the address may come at once
        print(f"http://{HOST}:{taken.getsockname()[1]}/   (Ctrl-C ends it; the runs are only read)", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3, lifespan="off")
        server = uvicorn.Server(config)
        try:
            server.run(sockets=[taken])
        except KeyboardInterrupt:
            print("closed", file=sys.stderr)
