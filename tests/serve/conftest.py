"""A tiny model behind a real socket."""

import json
import threading
import time

import httpx2
import jax
import pytest

from cabochon.model import transformer as tf
from cabochon.rollouts.sampler import Sampler
from cabochon.rollouts.slots import SlotConfig
from cabochon.serve.server import ModelServer, ServerConfig
from cabochon.testing import tiny_config
from cabochon.tokenizer import ByteTokenizer

TOK = ByteTokenizer()
MODEL = tiny_config(vocab_size=TOK.vocab_size, max_positions=512, eos_ids=TOK.eos_ids)
PARAMS = jax.tree.map(lambda x: x * 3, tf.init(MODEL, jax.random.key(0)))
SLOTS = SlotConfig(slots=4, length=256, block=64, chunks=(16, 64), steps=4)


class Running:
    """A server in a thread of this process, and a client for it."""

    def __init__(self, key=None, params=None, **changes):
        settings = {"port": 0, "queue": 28, "max_tokens": 200, "grace": 5.0, "timeout": 60.0} | changes
        self.sampler = make_sampler(params)
        self.server = ModelServer(self.sampler, "tiny", ServerConfig(**settings), key)
        self.engine, self.url, self.error = self.server.engine, self.server.address, None
        started = threading.Event()

        def run():
            try:
                self.server.run(started.set)
            except Exception as error:
                self.error = error
            finally:
                started.set()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert started.wait(30)
        self.client = httpx2.Client(base_url=self.url, timeout=60, headers={"Authorization": f"Bearer {key}"})

    def post(self, path, **body):
        return self.client.post(path, json={"model": "tiny"} | body)

    def stream(self, path, **body):
        """(chunks, whether the stream ended as it should)."""
        with self.client.stream("POST", path, json={"model": "tiny", "stream": True} | body) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        return [json.loads(line) for line in lines if line != "[DONE]"], lines[-1] == "[DONE]"

    def idle(self, seconds=20):
        """Wait until nothing is under way."""
        end = time.monotonic() + seconds
        while self.engine.status().unfinished:
            assert time.monotonic() < end, self.engine.status()
            time.sleep(0.02)

    def close(self):
        self.client.close()
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


def make_sampler(params=None):
    """A sampler of its own: each has one thread. The compiled programs are shared."""
    return Sampler(MODEL, params or PARAMS, TOK, SLOTS)


@pytest.fixture(scope="session")
def sampler():
    """What says what a server must answer."""
    return make_sampler()


@pytest.fixture(scope="session")
def make_server():
    """Start servers with other settings."""
    return Running


@pytest.fixture(scope="module")
def server():
    running = Running()
    yield running
    running.close()
    assert running.error is None
    assert running.engine.status().unfinished == 0
    assert not running.sampler.busy
