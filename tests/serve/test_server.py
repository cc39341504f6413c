"""A server from its start to its end: places, deadlines, keys, a broken model, stops, the command itself."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import jax
import numpy as np
import pytest

from cabochon.errors import MachineError, UserError
from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.serve.engine import Job
from cabochon.serve.server import ModelServer, ServerConfig, bound, warm_up
from cabochon.types import Request, Sampling

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 200, "n": 4, "ignore_eos": True}


def test_a_full_server_says_so(make_server):
    """Every place is taken by a job whose events nobody takes."""
    running, gate = make_server(queue=0), threading.Event()
    sampling = Sampling(max_tokens=8, n=4, ignore_eos=True)
    work = running.sampler.prepare(Request(prompt="a", sampling=sampling))
    try:
        running.engine.submit([Job(work=work, emit=lambda event: gate.wait(30), stream=True)])
        refused = running.post("/completions", prompt="a", max_tokens=1)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"
        gate.set()
        running.idle()
        assert running.post("/completions", prompt="a", max_tokens=1).status_code == 200
    finally:
        gate.set()
        running.close()


def test_a_deadline_ends_a_request(make_server):
    running = make_server(timeout=0.005)
    try:
        late = running.post("/completions", **LONG)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        running.idle()
        chunks, ended = running.stream("/completions", **LONG)
        assert not ended
        assert chunks[-1]["error"]["code"] == "timeout"
        running.idle()
    finally:
        running.close()


def test_with_a_key_only_those_who_have_it(make_server):
    running = make_server(key="secret")
    try:
        for wrong in ("Bearer other", "", "secret", "Basic secret", b"Bearer s\xe9cret"):
            headers = {"Authorization": wrong}
            refused = running.client.get("/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert running.client.post("/completions", content=b"{}", headers=headers).status_code == 401
        assert running.client.get("/models").status_code == 200
        assert running.client.get("/models", headers={"Authorization": "bearer secret"}).status_code == 200
        assert running.post("/completions", prompt="a", max_tokens=1).status_code == 200
        assert running.client.get(running.url.removesuffix("/v1") + "/health").status_code == 200
    finally:
        running.close()


def test_a_model_that_gives_no_numbers_ends_the_server(sampler, make_server):
    broken = jax.tree.map(lambda x: x * np.nan, tf.init(sampler.model, jax.random.key(0)))
    running = make_server(params=broken)
    failed = running.post("/completions", prompt="a", max_tokens=4)
    assert failed.status_code == 500
    assert "not finite" in failed.json()["error"]["message"]
    running.thread.join(30)
    assert isinstance(running.error, MachineError)
    assert "not finite" in str(running.error)
    running.client.close()


def test_requests_under_way_are_finished_at_a_stop(make_server):
    running = make_server()
    with running.client.stream("POST", "/completions", json=LONG | {"n": 1, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        running.server.stop()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    running.close()
    assert running.error is None


def slowed(running, seconds):
    """Every dispatch takes that long."""
    step = running.sampler.step

    def slow(watch=None):
        time.sleep(seconds)
        return step(watch)

    running.sampler.step = slow


@pytest.mark.parametrize("dispatch", [0.1, 1.5])
def test_who_still_waits_at_the_end_of_the_grace_is_told(make_server, monkeypatch, capsys, dispatch):
    """By the engine once its dispatch is done; where that takes too long, without it."""
    monkeypatch.setattr("cabochon.serve.server.LAST_SECONDS", 0.5)
    running = make_server(grace=0.3)
    slowed(running, dispatch)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(running.post, "/completions", **LONG)
        with running.client.stream("POST", "/completions", json=LONG | {"stream": True, "echo": True}) as response:
            lines = response.iter_lines()
            next(lines)
            while running.engine.status().unfinished < 8:
                time.sleep(0.01)
            running.server.stop()
            last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
        answer = whole.result(20)
    said = {"message": "the server is stopping", "type": "server_error", "param": None, "code": None}
    assert last == {"error": said}
    assert (answer.status_code, answer.json()) == (503, {"error": said})
    running.close()
    assert running.error is None
    assert capsys.readouterr().err == ""


def test_a_port_that_another_took_meanwhile_is_one_line(sampler):
    """Both were bound while neither listened."""
    with bound(ServerConfig(port=0)) as first:
        cfg = ServerConfig(port=first.getsockname()[1])
        server = ModelServer(sampler, "tiny", cfg, None)
        first.listen()
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{cfg.port}: cannot be listened on: .*; give another"):
            server.run()


def test_a_taken_port_is_one_line(sampler):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: cannot be listened on: .*; give another --port"):
            ModelServer(sampler, "tiny", ServerConfig(port=port), None)
    with pytest.raises(UserError, match=r"nowhere\.invalid:0: cannot be listened on"):
        ModelServer(sampler, "tiny", ServerConfig(port=0, host="nowhere.invalid"), None)


def test_after_warming_up_nothing_is_compiled(sampler):
    warm_up(sampler)
    before = sampler.compiled
    for length in (3, 16, 40, 70):
        prompt, sampling = np.zeros(length, np.int32), Sampling(max_tokens=3, ignore_eos=True)
        sampler.submit(sampler.prepare(Request(prompt=prompt, sampling=sampling)))
    while sampler.busy:
        sampler.step()
    assert sampler.compiled == before


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, sampler):
    path = tmp_path_factory.mktemp("model") / "m"
    convert.save(path, sampler.model, tf.init(sampler.model, jax.random.key(0)), tokenizer=sampler.tokenizer)
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_and_stops_when_it_is_asked_to(on_disk, tmp_path, number):
    """A stream under way when the signal comes is finished, and the exit code is 0."""
    key = tmp_path / "key"
    key.write_text("hidden\n")
    command = [sys.executable, "-P", "-m", "cabochon", "serve", str(on_disk), "--port", "0", "--name", "tiny"]
    options = ["--length", "256", "--slots", "2", "--queue", "4", "--max-tokens", "200", "--api-key-file", str(key)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *options], **pipes, env=env) as p:
        try:
            url = re.search(r"tiny: (http://127.0.0.1:\d+/v1)", p.stdout.readline())[1]
            client = httpx2.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer hidden"})
            with client.stream("POST", "/completions", json=LONG | {"n": 2, "stream": True}) as response:
                lines = response.iter_lines()
                next(lines)
                p.send_signal(number)
                assert [line for line in lines if line][-1] == "data: [DONE]"
            client.close()
            out, err = p.communicate(timeout=60)
        finally:
            p.kill()
    assert (p.returncode, out) == (0, ""), err
    assert "Traceback" not in err


def test_a_second_signal_ends_the_grace(on_disk):
    command = [sys.executable, "-P", "-m", "cabochon", "serve", str(on_disk), "--port", "0", "--name", "tiny"]
    options = ["--length", "256", "--slots", "1", "--max-tokens", "200", "--grace", "100"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *options], stdout=-1, stderr=-1, text=True, env=env) as p:
        try:
            url = re.search(r"tiny: (http://127.0.0.1:\d+/v1)", p.stdout.readline())[1]
            with httpx2.stream("POST", f"{url}/completions", json=LONG | {"n": 64, "stream": True}) as response:
                lines = response.iter_lines()
                next(lines)
                p.send_signal(signal.SIGINT)
                time.sleep(0.3)
                p.send_signal(signal.SIGINT)
                assert "the server is stopping" in [line for line in lines if line][-1]
            out, err = p.communicate(timeout=30)
        finally:
            p.kill()
    assert (p.returncode, out) == (0, ""), err
    assert "Traceback" not in err
