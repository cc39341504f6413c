"""Runs of every stage and state; long ones in little memory; looking changes nothing."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest
import runs
from typer.testing import CliRunner

from cabochon.cli import app
from cabochon.locks import locked
from cabochon.report.build import Readers, RunReader, report
from cabochon.rl import evaluate


def snapshot(place):
    reader = RunReader(place.name, place)
    reader.refresh()
    return reader.snapshot()


def test_memory_does_not_grow_with_the_run(tmp_path):
    peaks = []
    for steps in (800, 1600):
        place = runs.rl_run(tmp_path / str(steps), steps, rollouts=2)
        tracemalloc.start()
        found = snapshot(place)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found["curves"]["step"]) == 400
        assert found["steps"] == steps
    assert peaks[1] < 1.15 * peaks[0], "twice the rows"


def test_looking_again_reads_what_is_new_and_ends_as_if_read_at_once(tmp_path):
    whole = runs.rl_run(tmp_path / "whole", 900)
    part = runs.rl_run(tmp_path / "part", 900)
    reader = RunReader("part", part)
    for name in ("metrics.jsonl", "moe.jsonl"):
        data = (part / name).read_bytes()
        (part / name).write_bytes(b"")
        for i in range(0, len(data), 100_001):  # never at a line's end
            with (part / name).open("ab") as file:
                file.write(data[i : i + 100_001])
            assert reader.refresh()
    assert not reader.refresh(), "nothing new"
    a, b = reader.snapshot(), snapshot(whole)
    assert a["curves"] == b["curves"]
    assert a["moe"] == b["moe"]


def test_a_run_that_went_back_to_a_checkpoint_is_followed(tmp_path):
    place = runs.rl_run(tmp_path / "run", 50)
    reader = RunReader("run", place)
    reader.refresh()
    for name in ("metrics.jsonl", "moe.jsonl"):
        lines = (place / name).read_bytes().splitlines(keepends=True)
        (place / name).write_bytes(b"".join(lines[:20]))
    reader.refresh()
    assert reader.snapshot()["steps"] == 20
    assert reader.snapshot()["moe"]["step"][-1] == 20


def test_files_that_are_missing_or_strange_leave_the_rest(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    (place / "config.yaml").write_text("stage: rl\nsteps: 5\n")
    found = snapshot(place)
    assert (found["steps"], found["moe"], found["events"]) == (0, None, [])
    (place / "config.yaml").write_text("{{ not yaml")
    (place / "metrics.jsonl").write_text('{"step": "x"}\n{"step": -1}\n{"step": 2, "reward": 1}\n{"st')
    (place / "moe.jsonl").write_text('{"step": 1, "used": []}\n')
    (place / "events.jsonl").write_text('{"event": 3, "message": {"a": 1}}\n{"time": "x", "event": "alarm"}\n')
    (place / "manifest.json").write_text('{"parents": ["x", {"manifest": 3}], "data": 5')
    (place / "rollouts").mkdir()
    (place / "rollouts" / "step_000002.jsonl").write_text('{"group": 1}\n{"prompt": 3, "group": 1, "tokens": [1]}\n7\n')
    readers = Readers([place])
    readers.refresh()
    assert readers.snapshot()["runs"][0]["steps"] == 2
    assert readers.runs[0].groups(2)["of"] == 1


@pytest.mark.parametrize(("last", "status"), [("stopped", "stopped"), ("failed", "failed"), ("started", "killed")])
def test_what_became_of_a_run(tmp_path, last, status):
    place = runs.rl_run(tmp_path / "run", 5, events=({"time": 1.8e9, "event": last, "message": ""},))
    assert snapshot(place)["status"] == status
    with locked(place):
        assert snapshot(place)["status"] == "running"
    runs.finish(place)
    assert snapshot(place)["status"] == "finished"


def test_the_evaluation_of_a_job_decides_its_verdict(tmp_path):
    runs.rl_run(tmp_path / "rl", 40, level=lambda x: 0.5)
    test = {"difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.001}
    entries = [{"model": "x", "domains": {}}, {"model": f"{tmp_path}/rl/final", "against_first": {"all": test}}]
    (tmp_path / "eval.json").write_text(json.dumps({"evaluations": entries}))
    readers = Readers([tmp_path])
    readers.refresh()
    found = readers.snapshot()["runs"][0]["verdict"]
    assert found["state"] == "learning"
    assert "+20.0 points, 95 % interval +10.0 to +30.0" in found["because"][0]
    alone = report([tmp_path / "rl"])
    assert alone.verdicts == [f"rl: {found['title']}: {found['because'][0]}"], "also where the run is looked at alone"


@pytest.mark.parametrize("looked_at", [".", "rl"], ids=["the job", "the run alone"])
def test_an_evaluation_that_comes_later_is_news(tmp_path, looked_at):
    runs.rl_run(tmp_path / "rl", 9)
    readers = Readers([tmp_path / looked_at])
    assert readers.refresh()
    assert not readers.refresh()
    (tmp_path / "eval.json").write_text('{"evaluations": []}')
    assert readers.refresh()
    assert not readers.refresh()


@pytest.mark.parametrize("said", ["run/job/rl/final", "elsewhere/job/rl/final", "{tmp_path}/run/job/rl/final"])
def test_the_verdict_does_not_depend_on_how_a_directory_is_typed(tmp_path, monkeypatch, said):
    job = tmp_path / "run" / "job"
    runs.rl_run(job / "rl", 9, rollouts=1, groups=1)
    test = {"difference": 0.2, "low": 0.1, "high": 0.3, "p": 0.001}
    entry = {"model": said.format(tmp_path=tmp_path), "against_first": {"all": test}}
    other = entry | {"model": f"{tmp_path}/other/rl/final", "against_first": {"all": test | {"difference": 0.9}}}
    (job / "eval.json").write_text(json.dumps({"evaluations": [other, entry]}))
    for cwd, typed in ((tmp_path, "run/job"), (job.parent, "job"), (job, "rl"), (job, "."), (tmp_path, str(job))):
        monkeypatch.chdir(cwd)
        (line,) = report([Path(typed)]).verdicts
        assert "+20.0 points, 95 % interval +10.0 to +30.0" in line, typed


def test_an_evaluation_of_a_single_task_has_no_interval_and_decides_nothing(tmp_path):
    runs.rl_run(tmp_path / "rl", 40, level=lambda x: 0.5, rollouts=1, groups=1)
    test = evaluate.against(*({"problems": [{"task": "x", "domain": "d", "mean": m}]} for m in (0.0, 1.0)))
    entries = [{"model": "base"}, {"model": str(tmp_path / "rl" / "final"), "against_first": test}]
    evaluate.write({"evaluations": entries}, tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["evaluations"][1]["against_first"]["all"]["low"] is None
    (line,) = report([tmp_path]).verdicts
    assert "No clear change" in line
    assert "points, 95" in line, "the held-out score of the run"
    assert "evaluated afterwards" not in line


def test_only_what_is_whole_is_new(tmp_path):
    place = runs.rl_run(tmp_path / "run", 5)
    reader = RunReader("run", place)
    assert reader.refresh()
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
        file.flush()
        assert not reader.refresh(), "half a line"
        file.write('ard": 1}\n')
        file.flush()
        assert reader.refresh()
    (place / "events.jsonl").touch()
    assert not reader.refresh(), "as it was"
    runs.finish(place)
    assert reader.refresh()


HUGE = "1" + "0" * 400
ODD = {
    "metrics.jsonl": [f'{{"step": 6, "score": {HUGE}}}', '{"step": 1e999, "score": 1}', '{"step": "x"}'],
    "moe.jsonl": [
        '{"step": Infinity, "used": [[1, 1]]}', '{"step": 6, "used": [[1, null]]}',
        '{"step": 6, "used": [[1, 1], [1, 1]], "agreement": [[1], [1, 2]]}',
        '{"step": 6, "used": [[1, 1], [1, 1]], "agreement": [1]}',
    ],
}  # fmt: skip


def test_odd_values_are_passed_over_and_counted(tmp_path):
    place = runs.rl_run(tmp_path / "run", 5, layers=2, experts=2)
    good = snapshot(place)
    for name, odd in ODD.items():
        with (place / name).open("a") as file:
            file.write("".join(line + "\n" for line in odd))
    found = snapshot(place)
    assert (found["curves"], found["moe"]) == (good["curves"], good["moe"])
    assert "7 rows of metrics.jsonl and moe.jsonl that cannot be read as such were passed over" in found["left_out"]
    with (place / "moe.jsonl").open("a") as file:
        file.write('{"step": 6, "used": [[1, 1], [1, 1]], "agreement": [NaN, 0.5]}\n')
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.7e308}\n' * 2)
    found = snapshot(place)
    assert found["moe"]["agreement"][-1] == [None, 0.5], "a layer that had no token"
    assert found["curves"]["values"]["loss"][-1] is None, "two of them have no sum"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("events.jsonl", '{"event": "alarm", "alarm": [1], "step": "4", "time": NaN, "value": Infinity}\n'),
        ("events.jsonl", f'{{"event": ["a"], "held_out": {{"all": "x"}}, "tasks": {HUGE}}}\n'),
        ("manifest.json", '{"results": {"x": NaN}, "parents": [{"manifest": {"parents": 5}}], "data": "x"}'),
        ("config.yaml", "stage: rl\nsteps: .inf\noptim: {x: .nan}\neval: {tasks: many}\nmodel: {address: 5}\n"),
        ("config.yaml", "stage: rl\n2020-01-01: a\n"),
        ("config.yaml", "stage: rl\na: &a [*a]\n"),
        ("eval-x.json", '{"accuracy": NaN, "reliability": {"a": {"right": Infinity}}}'),
        ("../eval.json", '{"evaluations": [{"model": 5, "against_first": [1]}, {"model": "a\\u0000", "x": NaN}]}'),
    ],
)
def test_one_odd_value_does_not_take_the_page_away(tmp_path, name, text):
    place = runs.rl_run(tmp_path / "job" / "rl", 9, rollouts=1, groups=1)
    with (place / name).open("a" if name == "events.jsonl" else "w") as file:
        file.write(text)
    page = report([tmp_path / "job"])
    data = re.search(r'id="data">(.*?)</script>', page.html)[1]
    assert json.loads(data, parse_constant=pytest.fail)["runs"][0]["steps"] == 9


def test_what_a_model_said_does_not_command_the_terminal(tmp_path):
    told = {"time": 1.79e9, "event": "failed", "message": "\x1b[2J \ud800 boom"}
    place = runs.rl_run(tmp_path / "run", 5, events=(told,), rollouts=1, groups=1)
    done = CliRunner().invoke(app, ["report", str(place)])
    assert done.exit_code == 0, done.exception
    assert "\ufffd[2J \ufffd boom" in done.stdout
    assert "\x1b" not in done.stdout


def test_looking_changes_nothing_in_the_run(tmp_path):
    place = runs.rl_run(tmp_path / "run", 20)

    def state():
        return {(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in [place, *place.rglob("*")]}

    before = state()
    done = CliRunner().invoke(app, ["report", str(place), "-o", str(tmp_path / "out" / "page.html")])
    assert done.exit_code == 0, done.output
    assert "page.html" in done.output
    assert state() == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["page.html"]


def test_the_page_lies_in_the_run_where_no_other_place_is_named(tmp_path, monkeypatch):
    place = runs.rl_run(tmp_path / "run", 20)
    (tmp_path / "report.html").write_text("another's")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", "run"])
    assert done.exit_code == 0, done.output
    assert "run/report.html " in done.output
    assert (place / "report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "report.html").read_text() == "another's"
