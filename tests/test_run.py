"""The run directory, driven by a stage of three lines: fresh, killed, stopped, finished, changed, shared, full."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Literal

import numpy as np
import pytest

from cabochon.config import StageConfig
from cabochon.errors import MachineError, UserError
from cabochon.overrides import load
from cabochon.run import open_run
from cabochon.testing import tiny_config


def config(place, **changes):
    base = {"model": {"scratch": tiny_config()}, "run": {"dir": str(place), "save_every": 3, "tensorboard": False}}
    return StageConfig.model_validate(base | changes)


def toy_stage(cfg, total=10, *, pause=0.0, at_step=lambda step, run: None, **options):
    """A walk whose every step depends on all before it, and on nothing else."""
    with open_run(cfg, "toy", shown=("x",), **options) as run:
        if run.finished:
            return "finished"
        state, position = {"x": np.float32(cfg.seed), "ballast": np.zeros(1000, np.float32)}, 0
        if saved := run.restore(state):
            state, position = saved.state, saved.meta["position"]
        for step in run.steps(saved.step if saved else 0, total):
            position += step
            state = state | {"x": np.float32(np.sin(np.float32(state["x"]) + position))}
            time.sleep(pause)
            run.log(step, {"x": state["x"], "position": position}, clock={"speed": 1.0})
            at_step(step, run)
            if run.save_due(step) or step == total:
                run.save(step, state, {"position": position})
        run.final.mkdir(exist_ok=True)
        run.finish(steps=total, results={"x": state["x"]})
        return saved.step if saved else 0


def rows(place):
    """metrics.jsonl without the clock"""
    out = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    for row in out:
        assert set(row.pop("clock")) == {"time", "seconds", "elapsed", "speed"}
    return out


def events(place):
    return [json.loads(line)["event"] for line in (place / "events.jsonl").read_text().splitlines()]


class Crash(Exception):
    pass


def crash_at(n):
    def at_step(step, run):
        if step == n:
            raise Crash

    return at_step


def test_a_fresh_run_writes_everything_and_a_second_call_says_it_is_finished(tmp_path, capsys):
    place = tmp_path / "run"
    assert toy_stage(config(place)) == 0
    assert [row["step"] for row in rows(place)] == list(range(1, 11))
    assert {p.name for p in place.iterdir()} == {
        ".lock", "config.yaml", "inputs.json", "metrics.jsonl", "events.jsonl", "checkpoints", "final", "manifest.json"
    }  # fmt: skip
    manifest = json.loads((place / "manifest.json").read_text())
    assert (manifest["stage"], manifest["steps"], manifest["seed"]) == ("toy", 10, 0)
    assert manifest["results"] == {"x": rows(place)[-1]["x"]}
    assert manifest["versions"]["jax"]
    assert load(StageConfig, [str(place / "config.yaml")]) == config(place)
    said = capsys.readouterr().out
    assert "step  1/10  x " in said
    assert "step 10/10  x " in said
    assert "step  2/10" not in said, "a line for every tenth step only"
    before = (place / "metrics.jsonl").read_bytes()
    assert toy_stage(config(place)) == "finished"
    assert "this run is finished; its result is" in capsys.readouterr().out
    assert (place / "metrics.jsonl").read_bytes() == before
    assert events(place) == ["started", "finished"]


@pytest.mark.parametrize("at", [1, 3, 5, 10])
def test_a_run_that_broke_goes_on_and_ends_with_the_same_metrics(tmp_path, capsys, at):
    toy_stage(config(tmp_path / "whole"))
    with pytest.raises(Crash):
        toy_stage(config(tmp_path / "broken"), at_step=crash_at(at))
    assert "failed" not in capsys.readouterr().out, "who catches it prints it"
    assert toy_stage(config(tmp_path / "broken")) == (at - 1) // 3 * 3
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    went_on = ["resumed"] if at > 3 else []
    assert events(tmp_path / "broken") == ["started", "failed", *went_on, "finished"]


def test_half_a_line_at_the_end_is_dropped(tmp_path):
    toy_stage(config(tmp_path / "whole"))
    with pytest.raises(Crash):
        toy_stage(config(tmp_path / "broken"), at_step=crash_at(4))
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "x"')
    toy_stage(config(tmp_path / "broken"))
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_the_loads_of_experts_are_kept_in_step_with_the_metrics(tmp_path):
    def logged(run, steps):
        for step in steps:
            run.log(step, {"x": step}, experts={"used": [[step, 2]]})

    state = {"x": np.float32(0)}
    with open_run(config(tmp_path), "toy") as run:
        assert run.restore(state) is None
        logged(run, range(1, 4))
        run.save(3, state, {})
        logged(run, range(4, 6))
    with open_run(config(tmp_path), "toy") as run:
        assert run.restore(state).step == 3
        logged(run, [4])
    found = [json.loads(line) for line in (tmp_path / "moe.jsonl").read_text().splitlines()]
    assert found == [{"step": n, "used": [[n, 2]]} for n in (1, 2, 3, 4)]


def test_a_changed_config_is_refused_with_the_difference_unless_asked(tmp_path):
    place = tmp_path / "run"
    with pytest.raises(Crash):
        toy_stage(config(place), at_step=crash_at(5))
    changed = config(place, seed=3, optim={"b1": 0.8})
    with pytest.raises(UserError, match=r"optim\.b1: 0\.9 -> 0\.8; seed: 0 -> 3\. Give another run\.dir"):
        toy_stage(changed)
    assert load(StageConfig, [str(place / "config.yaml")]).seed == 0
    assert toy_stage(changed, resume_anyway=True) == 3
    assert load(StageConfig, [str(place / "config.yaml")]).seed == 3
    assert events(place) == ["started", "failed", "changed", "resumed", "finished"]


def test_the_run_section_may_change(tmp_path):
    place = tmp_path / "run"
    with pytest.raises(Crash):
        toy_stage(config(place), at_step=crash_at(5))
    moved = place.rename(tmp_path / "moved")
    assert toy_stage(config(moved, run={"dir": str(moved), "save_every": 1, "tensorboard": False})) == 3
    assert not (moved / "tensorboard").exists()


def test_data_that_was_changed_is_refused(tmp_path):
    data, place = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("{}\n")
    with pytest.raises(Crash):
        toy_stage(config(place), at_step=crash_at(5), data=[str(data)])
    data.write_text("{} \n")
    with pytest.raises(UserError, match=r"rows\.jsonl was changed since"):
        toy_stage(config(place), data=[str(data)])
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read: No such file"):
        toy_stage(config(place), data=[str(tmp_path / "gone.jsonl")])


def test_what_stopped_before_its_first_step_may_be_mended_and_run_again(tmp_path):
    """A bad row, or a key it was told to set: nothing was made yet that the old settings decided."""
    data, place = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("{oops\n")
    with pytest.raises(Crash), open_run(config(place), "toy", data=[str(data)]):
        raise Crash
    data.write_text("{}\n")
    mended = config(place, seed=3)
    assert toy_stage(mended, data=[str(data)]) == 0
    assert load(StageConfig, [str(place / "config.yaml")]).seed == 3
    assert json.loads((place / "manifest.json").read_text())["seed"] == 3
    assert events(place) == ["started", "failed", "started", "finished"]
    with pytest.raises(UserError, match=r"seed: 3 -> 4\."):
        toy_stage(config(place, seed=4), data=[str(data)])


def test_a_run_of_another_stage_is_not_gone_on_with(tmp_path):
    class Other(StageConfig):
        stage: Literal["other"] = "other"

    cfg = Other.model_validate(config(tmp_path / "run").model_dump())
    with open_run(cfg, "other") as run:
        run.log(1, {})
    with pytest.raises(UserError, match=r"run: holds a run of `other`, this is one of `toy`; give another run\.dir$"):
        toy_stage(config(tmp_path / "run"))
    with open_run(cfg, "other") as run:
        assert len(run.rows()) == 1


def test_two_at_once_is_one_clear_line(tmp_path):
    cfg = config(tmp_path / "run")

    def second(step, run):
        if step == 2:
            with pytest.raises(UserError, match=rf"process {os.getpid()} is running there; wait for it"):
                toy_stage(cfg)

    assert toy_stage(cfg, at_step=second) == 0


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match=r"holds 'thesis\.tex' and is no run directory"):
        toy_stage(config(tmp_path))
    with pytest.raises(UserError, match=r"cannot be a run directory: (Not a directory|File exists)"):
        toy_stage(config(tmp_path / "thesis.tex"))


def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path):
    place, limit = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, run):
        if step == 5:
            size = (place / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limit[1]))

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(MachineError, match=r"metrics\.jsonl: cannot be written: "):
            toy_stage(config(place), at_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [row["step"] for row in rows(place)] == [1, 2, 3, 4, 5], "no half of a line"
    assert toy_stage(config(place)) == 3
    toy_stage(config(tmp_path / "whole"))
    assert rows(place) == rows(tmp_path / "whole")


def test_a_full_disk_while_saving_is_a_machine_error_and_the_checkpoint_before_is_intact(tmp_path):
    place, limit = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, run):
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(MachineError, match=r"0002-step-6: the checkpoint could not be written .*step 3 is intact"):
            toy_stage(config(place), at_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert toy_stage(config(place)) == 3


def test_lineage(tmp_path):
    toy_stage(config(tmp_path / "first"))
    second = {"model": {"address": str(tmp_path / "first" / "final")}}
    toy_stage(config(tmp_path / "second", **second))
    manifest = json.loads((tmp_path / "second" / "manifest.json").read_text())
    assert manifest["parents"][0]["manifest"] == json.loads((tmp_path / "first" / "manifest.json").read_text())


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from test_run import config, toy_stage
from pathlib import Path
toy_stage(config(Path({place!r})), 40, pause={pause})
"""


def start(place, steps, pause=0.02):
    """The toy stage in a process of its own, once `steps` rows are there."""
    code = CHILD.format(tests=os.path.dirname(__file__), place=str(place), pause=pause)
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        if (place / "metrics.jsonl").exists() and (place / "metrics.jsonl").read_bytes().count(b"\n") >= steps:
            return child
        time.sleep(0.005)
    raise AssertionError(child.communicate()[1])


def test_ctrl_c_saves_and_leaves_with_130_a_second_one_kills(tmp_path):
    place = tmp_path / "run"
    child = start(place, 5)
    child.send_signal(signal.SIGINT)
    out = child.communicate(timeout=60)[0]
    assert child.returncode in (-signal.SIGINT, 130), "KeyboardInterrupt"
    last = rows(place)[-1]["step"]
    assert "stopping after this step, with a checkpoint" in out
    assert events(place) == ["started", "stopped"]
    assert any(p.name.endswith(f"-step-{last}") for p in (place / "checkpoints").iterdir())
    toy_stage(config(tmp_path / "whole"), 40)
    assert toy_stage(config(place), 40) == last
    assert rows(place) == rows(tmp_path / "whole")

    child = start(tmp_path / "again", 1, pause=2)
    child.send_signal(signal.SIGINT)
    while "stopping after this step" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGINT
    assert events(tmp_path / "again") == ["started"]


def test_kill_9_at_three_moments(tmp_path):
    place = tmp_path / "run"
    for steps in (2, 11, 30):
        child = start(place, steps)
        child.kill()
        child.communicate(timeout=60)
    toy_stage(config(place), 40)
    toy_stage(config(tmp_path / "whole"), 40)
    assert rows(place) == rows(tmp_path / "whole")
    assert json.loads((place / "manifest.json").read_text())["steps"] == 40
