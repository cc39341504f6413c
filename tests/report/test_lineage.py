import json

import pytest
import runs

from cabochon.errors import UserError
from cabochon.report import lineage


def test_a_jobs_runs_come_in_the_order_of_its_stages(tmp_path):
    for name in ("a", "z", "m"):
        runs.rl_run(tmp_path / name, 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "pipeline.json").write_text(json.dumps({"z": {}, "tasks": {}, "a": {}}))
    assert [name for name, _ in lineage.runs_in(tmp_path)] == ["z", "a", "m"]
    assert [name for name, _ in lineage.runs_in(tmp_path / "m")] == ["m"]


def test_a_run_that_was_refused_before_its_first_step_is_left_out_unless_it_is_all_there_is(tmp_path):
    refused = tmp_path / "refused"
    refused.mkdir()
    (refused / "config.yaml").write_text("stage: rl\n")
    (refused / "events.jsonl").write_text('{"event": "started"}\n{"event": "failed", "message": "no such file"}\n')
    assert [name for name, _ in lineage.runs_in(tmp_path)] == ["refused"]
    runs.rl_run(tmp_path / "good", 2)
    assert [name for name, _ in lineage.runs_in(tmp_path)] == ["good"]
    (refused / "events.jsonl").write_text('{"event": "started"}\n')
    assert {name for name, _ in lineage.runs_in(tmp_path)} == {"good", "refused"}, "it is about to make its first step"
    (refused / "events.jsonl").write_text('{"event": "failed"}\n')
    broken = runs.rl_run(tmp_path / "late", 2)
    with (broken / "events.jsonl").open("a") as events:
        events.write('{"event": "failed", "message": "disk full"}\n')
    assert {name for name, _ in lineage.runs_in(tmp_path)} == {"good", "late"}, "it made steps: worth a look"


def test_what_is_no_run_is_one_line_that_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        lineage.runs_in(tmp_path / "none")
    runs.rl_run(tmp_path / "job" / "rl", 2)
    with pytest.raises(UserError, match=r"did you mean .*job"):
        lineage.runs_in(tmp_path)


def test_ancestors_by_the_manifest_or_by_the_models_place(tmp_path):
    first = {"stage": "sft", "steps": 5, "parents": []}
    second = {"stage": "rm", "steps": 6, "parents": [{"address": "x/final", "manifest": first}]}
    place = runs.rl_run(tmp_path / "rl", 2, address=str(tmp_path / "sft" / "final"))
    runs.finish(place, parents=[{"address": "y/final", "manifest": second}, {"address": "hub/model", "manifest": None}])
    found = lineage.ancestors(place, lineage.config_of(place))
    assert [(a["address"], a["stage"]) for a in found] == [("y/final", "rm"), ("x/final", "sft"), ("hub/model", None)]
    runs.finish(place, parents=[{"address": "x/final", "manifest": first}, {"address": "y/final", "manifest": second}])
    found = lineage.ancestors(place, lineage.config_of(place))
    assert [a["address"] for a in found] == ["y/final", "x/final"]  # what both came from, once and last
    (place / "manifest.json").unlink()
    (tmp_path / "sft").mkdir()
    runs.finish(tmp_path / "sft", stage="sft", steps=77)
    (found,) = lineage.ancestors(place, lineage.config_of(place))
    assert (found["stage"], found["steps"]) == ("sft", 77)


def test_settings_that_differ_where_several_have_them():
    found = lineage.differences([{"a": {"b": 1, "c": 2}, "own": 1}, {"a": {"b": 1, "c": 3}}, {"a": {"b": 1}}])
    assert found == [{"key": "a.c", "values": ["2", "3", None]}]
