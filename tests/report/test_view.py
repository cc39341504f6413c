"""The live page as its own process: what it answers, whom it refuses, how it ends, and that it follows a run."""

import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import runs
from browser import watched


@contextmanager
def viewing(*places, port=0):
    """(process, port) of `cabochon view`."""
    words = [sys.executable, "-m", "cabochon", "view", *map(str, places), "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        found = re.match(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        assert found, process.communicate(timeout=20)
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate(timeout=20)


def get(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def add(place, steps):
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()[-1:]]
    with (place / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps(rows[0] | {"step": step}) + "\n")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    place = runs.rl_run(tmp_path_factory.mktemp("view") / "run", 40)
    with viewing(place) as (_, port):
        yield place, port


def test_it_answers_with_the_page_the_data_and_completions(served):
    place, port = served
    answer, body = get(port, "/")
    assert answer.status == 200
    assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
    assert b"<script>window.owned" not in body
    run = json.loads(get(port, "/api/data")[1])["runs"][0]
    assert (run["dir"], run["steps"]) == (str(place), 40)
    assert json.loads(get(port, "/api/runs/0/rollouts/40")[1])["of"] == 4
    assert json.loads(get(port, "/api/runs/0/rollouts/39")[1])["groups"] == []
    for path in ("/api/runs/1/rollouts/1", "/api/runs/-1/rollouts/1", "/etc/passwd", "/api/../../etc/passwd", "/docs"):
        assert get(port, path)[0].status == 404, path
    assert get(port, "/api/runs/0/rollouts/..%2f..%2fconfig.yaml")[0].status in (404, 422)


def test_a_page_elsewhere_that_points_a_name_here_is_refused(served):
    """DNS rebinding: a browser then says the attacker's name as the host."""
    _, port = served
    assert get(port, "/", Host=f"evil.example:{port}")[0].status == 400
    assert get(port, "/api/data", Host="127.0.0.1.evil.example")[0].status == 400
    assert get(port, "/", Host=f"localhost:{port}")[0].status == 200


def test_it_listens_on_this_machine_alone(served):
    _, port = served
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]


def test_changes_are_told_and_half_a_line_is_not_one_step_more(tmp_path):
    place = runs.rl_run(tmp_path / "run", 40)
    with viewing(place) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/api/events")
        stream = connection.getresponse()
        told = lambda: next(int(x[6:]) for x in iter(stream.readline, b"") if x.startswith(b"data: "))  # noqa: E731
        first = told()
        with (place / "metrics.jsonl").open("a") as file:
            file.write('{"step": 41, "reward"')
        time.sleep(2.5)  # two looks
        data = json.loads(get(port, "/api/data")[1])
        assert (data["version"], data["runs"][0]["steps"]) == (first, 40), "nothing new yet"
        with (place / "metrics.jsonl").open("a") as file:
            file.write(": 0.5}\n")
        assert told() == first + 1
        assert json.loads(get(port, "/api/data")[1])["runs"][0]["steps"] == 41
        os.truncate(place / "metrics.jsonl", 0)
        add_rows = json.dumps({"step": 1, "reward": 0.1}) + "\n"
        (place / "metrics.jsonl").write_text(add_rows)
        told()
        assert json.loads(get(port, "/api/data")[1])["runs"][0]["steps"] == 1
        (place / "metrics.jsonl").unlink()
        told()
        assert json.loads(get(port, "/api/data")[1])["runs"][0]["steps"] == 0
        connection.close()


def test_a_port_that_is_taken_is_one_line(tmp_path):
    place = runs.rl_run(tmp_path / "run", 3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = [sys.executable, "-m", "cabochon", "view", str(place), "--port", str(port)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"cabochon: --port {port} is taken; give another, or 0 for any that is free\n"


def test_ctrl_c_ends_it_at_once_with_readers_there_and_the_run_as_it_was(tmp_path):
    place = runs.rl_run(tmp_path / "run", 20)

    def state():
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in place.rglob("*") if p.is_file()}

    before = state()
    with viewing(place) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/api/events")
        connection.getresponse().readline()
        get(port, "/api/runs/0/rollouts/20")
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert time.monotonic() - begin < 5
        assert process.returncode in (0, 130)
        assert "Traceback" not in said
        connection.close()
    assert state() == before


@pytest.mark.chromium
def test_the_page_follows_the_run_and_keeps_the_cursor_where_it_was_put(tmp_path, chrome):
    job = tmp_path / "job"
    place = runs.rl_run(job / "rl", 40)
    with viewing(job) as (process, port), watched(chrome) as (tab, complaints, requests):
        tab.goto(f"http://127.0.0.1:{port}/")
        tab.wait_for_selector(".cursor output:text-is('step 40')")
        tab.wait_for_selector("#groups article .t")
        add(place, [41, 42])
        tab.wait_for_selector(".cursor output:text-is('step 42')")
        tab.keyboard.press("Home")
        tab.wait_for_selector(".cursor output:text-is('step 1')")
        tab.focus("#cursor")
        add(place, [43])
        tab.wait_for_selector("dd:text-is('43 of 40')")
        assert tab.inner_text(".cursor output") == "step 1"
        assert tab.evaluate("document.activeElement.id") == "cursor"
        runs.rl_run(job / "second", 5)  # a later stage of the job begins
        tab.wait_for_selector("#run-1")
        assert tab.evaluate("window.owned") is None
        assert complaints == []
        assert {re.match(r"\w+://[^/]+", url)[0] for url in requests} == {f"http://127.0.0.1:{port}"}
        process.send_signal(signal.SIGINT)
        tab.wait_for_selector(".live.off")


@pytest.mark.chromium
def test_a_reader_is_left_alone_while_the_run_goes_on(tmp_path, chrome):
    """What was opened, selected, scrolled to and picked stays; the charts above go on."""
    place = runs.rl_run(tmp_path / "run", 40)
    with viewing(place) as (_, port), watched(chrome) as (tab, complaints, _):
        tab.goto(f"http://127.0.0.1:{port}/")
        tab.wait_for_selector("#groups article .t")
        tab.select_option("#rollout-step", "1")
        tab.click("#groups .chips >> nth=-1 >> button >> nth=1")
        for summary in ("#groups article >> nth=0 >> summary", "#environment summary", "#more > summary"):
            tab.click(summary)
        tab.evaluate("getSelection().selectAllChildren(document.querySelector('#groups .prompt'))")
        seen = """[getSelection().toString(), Math.round(scrollY),
            document.getElementById("rollout-step").value,
            document.querySelectorAll("#groups .chips")[1].querySelector("[aria-pressed=true]").textContent,
            [...document.querySelectorAll("details")].filter((d) => d.open).map((d) => d.textContent.slice(0, 20))]"""
        before = tab.evaluate(seen)
        assert before[0]
        assert before[1] > 0
        assert before[2] == "1"
        assert len(before[4]) == 3
        add(place, [41])
        (place / "rollouts" / "step_000041.jsonl").write_bytes((place / "rollouts" / "step_000040.jsonl").read_bytes())
        tab.wait_for_selector("dd:text-is('41 of 40')")
        tab.wait_for_selector("#rollout-step option[value='41']", state="attached")
        tab.wait_for_timeout(500)
        assert tab.evaluate(seen) == before
        tab.keyboard.press("End")
        tab.wait_for_function("document.getElementById('rollout-step').value === '41'")
        assert complaints == []


@pytest.mark.chromium
def test_the_light_goes_out_where_the_server_has_no_answer(tmp_path, chrome):
    place = runs.rl_run(tmp_path / "run", 10)
    with viewing(place) as (_, port), watched(chrome) as (tab, _, _):
        tab.goto(f"http://127.0.0.1:{port}/")
        tab.wait_for_selector("#live:text-is('● live')")
        tab.route("**/api/data", lambda route: route.fulfill(status=500))
        add(place, [11])
        tab.wait_for_selector(".live.off")
        tab.unroute("**/api/data")
        tab.wait_for_selector(".cursor output:text-is('step 11')")
        tab.wait_for_selector("#live:text-is('● live')")
