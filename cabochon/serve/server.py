"""From an address of a model to a process that serves it, and its end: a socket, a warm engine, signals."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import uvicorn

from cabochon.errors import MachineError, UserError
from cabochon.model.address import open_language_model
from cabochon.rollouts.sampler import Sampler
from cabochon.rollouts.score import Scorer
from cabochon.rollouts.slots import SlotConfig
from cabochon.serve.app import Limits, make_app
from cabochon.serve.asked import Served
from cabochon.serve.engine import ServingEngine
from cabochon.types import Request, Sampling

CONNECTIONS = 1024
"""at one time; more get 503"""
LAST_SECONDS = 5.0
"""after the grace, for those who still wait to be told"""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a model is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free"""
    slots: int = 8
    """samples drawn together"""
    queue: int = 64
    """samples that may wait; more are refused with 429"""
    length: int = 2048
    """prompt and completion together, in tokens; at most what the model can"""
    max_tokens: int = 1024
    """new tokens of one sample at most"""
    timeout: float = 600.0
    """seconds for a request, waiting included"""
    grace: float = 30.0
    """seconds that requests under way have left once the server is told to stop"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the weights and of the cache"""


def open_sampler(address: str, cfg: ServerConfig) -> Sampler:
    """The model at an address, with its programs compiled: the first client does not wait for that."""
    model, params, tokenizer = open_language_model(address)
    slots = SlotConfig(
        slots=cfg.slots, length=min(cfg.length, model.max_positions), dtype=cfg.dtype, cache_dtype=cfg.dtype
    )
    sampler = Sampler(model, params, tokenizer, slots)
    warm_up(sampler)
    return sampler


def warm_up(sampler: Sampler) -> None:
    """Compile what serving needs: a prompt of a whole chunk of each length, a sample, a score."""
    room = min(sampler.cfg.length, sampler.model.max_positions)
    for chunk in sampler.cfg.chunks:  # a prompt's last token is read by decode
        prompt = np.zeros(min(chunk + 1, room - 1), np.int32)
        sampler.submit(sampler.prepare(Request(prompt=prompt, sampling=Sampling(max_tokens=1, ignore_eos=True))))
        Scorer(sampler).score(prompt)
    while sampler.busy:
        sampler.step()


class ModelServer:
    """A sampler behind a socket.

    Example: `server = ModelServer(sampler, "mine", ServerConfig(port=0), key=None); server.run()`.
    """

    def __init__(
        self, sampler: Sampler, name: str, cfg: ServerConfig, key: str | None, sock: socket.socket | None = None
    ):
        """`key`: what clients must send. `sock`: from `bound`, for those who want to know first. Raises UserError where
        the port cannot be had."""
        self.name, self._socket = name, sock or bound(cfg)
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        self.address = f"http://{host}:{self._socket.getsockname()[1]}/v1"
        self.engine = ServingEngine(sampler, queue=cfg.queue)
        served = Served(name=name, sampler=sampler, max_tokens=cfg.max_tokens, places=self.engine.places)
        app = make_app(
            served, self.engine, Limits(seconds=cfg.timeout), key, _hosts(cfg.host, key),
            crowded=lambda: len(self._server.server_state.connections) > CONNECTIONS,
        )  # fmt: skip
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            http="h11",
            server_header=False,
        )
        self._server = _Server(config, cfg.grace, partial(self.engine.stop, 0.0))
        self.engine.on_failure = self.stop

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`, SIGTERM or Ctrl-C: then requests under way have their grace; a second signal ends it.

        `ready` is called once connections are taken. Raises UserError where another took the port meanwhile,
        MachineError where the engine failed.
        """
        self._server.ready = ready
        self.engine.start()
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        finally:
            stopped = self.engine.stop()
            self._socket.close()
        if self.engine.failure:
            raise MachineError(f"{self.name}: the model cannot be served: {self.engine.failure}")
        if not stopped:
            raise MachineError(f"{self.name}: a step of the model did not end; the process leaves without it")

    def stop(self) -> None:
        """End `run` as SIGTERM does; from any thread."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn, with our signals: it would raise them again at the end, and a graceful stop is no failure."""

    ready: Callable[[], None]

    def __init__(self, config: uvicorn.Config, grace: float, end_work: Callable[[], object]):
        """`end_work`: has everybody who waits told that the server stops; it does not wait for that itself."""
        super().__init__(config)
        self._grace, self._end_work = grace, end_work
        self._hurry = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # two may be bound to one port while neither listens
            host, port, *_ = sockets[0].getsockname() if sockets else ("?", 0)
            raise _unlistened(host, port, error) from None
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but who still waits when the grace is over is answered before the connections are cut."""
        emptying, hurry = asyncio.ensure_future(super().shutdown(sockets)), asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((emptying, hurry), timeout=self._grace, return_when=asyncio.FIRST_COMPLETED)
        self._end_work()
        await asyncio.wait((emptying,), timeout=LAST_SECONDS)
        left = [emptying, hurry, *self.server_state.tasks]
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=LAST_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._asked)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _asked(self) -> None:
        if self.should_exit:
            self._hurry.set()
        self.should_exit = True


def bound(cfg: ServerConfig) -> socket.socket:
    """A socket at the config's address that does not listen yet. Raises UserError where the port cannot be had."""
    host, port = cfg.host, cfg.port
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise _unlistened(host, port, error) from None
    return sock


def _unlistened(host: str, port: int, error: OSError) -> UserError:
    said = error.strerror or str(error)
    return UserError(f"{host}:{port}: cannot be listened on: {said}; give another --port or --host")


def _hosts(host: str, key: str | None) -> list[str]:
    """Names a client may call this server by. Without a key and for this machine alone they are checked, or a web page
    could make its own name point here."""
    return ["localhost", "127.0.0.1", "[::1]"] if key is None and is_loopback(host) else ["*"]


def is_loopback(host: str) -> bool:
    """Does it reach this machine alone?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

