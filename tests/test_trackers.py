"""Trackers for real where they work offline; what fails or hangs never stops a run."""

import json
import threading
import time

import numpy as np
import pytest

from cabochon import trackers
from cabochon.config import StageConfig
from cabochon.errors import UserError
from cabochon.run import open_run
from cabochon.testing import tiny_config


def config(place, *names):
    run = {"dir": str(place), "tensorboard": False, "trackers": list(names)}
    return StageConfig.model_validate({"model": {"scratch": tiny_config()}, "run": run})


def stage(cfg, steps):
    """A run of a few steps that stops without being finished, so that the next call goes on."""
    with open_run(cfg, "toy") as run:
        saved = run.restore({"x": np.float32(0)})
        for step in run.steps(saved.step if saved else 0, steps):
            run.log(step, {"loss": 1.0 / step, "parts": {"a": step}, "name": "text"})
        run.save(steps, {"x": np.float32(steps)}, {})


def events(place):
    lines = (place / "events.jsonl").read_text().splitlines()
    return [row["message"] for row in map(json.loads, lines) if row["event"] == "tracker"]


def test_mlflow_has_every_number_and_goes_on_after_a_resume(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cfg = config(tmp_path / "run", "mlflow")
    stage(cfg, 3)
    stage(cfg, 5)
    assert events(tmp_path / "run") == []
    client = MlflowClient((tmp_path / "run/mlflow").as_uri())
    run = client.get_run((tmp_path / "run/mlflow-run").read_text())
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "parts/a")] == [
        (step, float(step)) for step in range(1, 6)
    ]
    assert run.data.metrics["loss"] == pytest.approx(0.2)
    assert "clock/seconds" in run.data.metrics
    assert run.data.params["optim.b1"] == "0.9"
    assert run.info.status == "FINISHED"


def contents(data):
    """Of a .wandb file: records in blocks of 32 KiB, as LevelDB's log has them; one may be split over two."""
    out, at = b"", 7  # the file's own header
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size = int.from_bytes(data[at + 4 : at + 6], "little")
        out += data[at + 7 : at + 7 + size]
        at += 7 + size
    return out


def test_wandb_offline_has_every_number(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    stage(config(tmp_path / "run", "wandb"), 3)
    assert events(tmp_path / "run") == []
    kept = list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(kept) == 1
    names = (b"parts/a", b"loss", b"clock/seconds", b"learning_rate")
    deadline = time.monotonic() + 60  # a process of wandb's own writes the file, and may still be at it
    while missing := [name for name in names if name not in contents(kept[0].read_bytes())]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)


def test_none_is_on_by_itself_and_a_missing_one_is_a_line(tmp_path, monkeypatch):
    stage(config(tmp_path / "plain"), 1)
    assert {p.name for p in (tmp_path / "plain").iterdir()} & {"wandb", "mlflow"} == set()
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run\.trackers: trackio is not installed: pip install 'cabochon\[trackio\]'"):
        stage(config(tmp_path / "none", "trackio"), 1)
    assert not (tmp_path / "none").exists()


class Faulty:
    """Raises where it is told to, and keeps what it took."""

    def __init__(self, fails):
        self.fails, self.rows, self.finished = fails, [], False

    def start(self, run_dir, config):
        if "start" in self.fails:
            raise SystemExit("no network")

    def log(self, step, scalars):
        if step in self.fails:
            raise OSError(f"lost\nstep {step}")
        self.rows.append(step)

    def finish(self):
        self.finished = True


@pytest.mark.parametrize(
    ("fails", "taken", "said"),
    [
        ((), [1, 2, 3, 4], []),
        ((2, 3), [1, 4], ["2 of 4 rows were not taken: OSError: lost step 2"]),
        (("start",), [], ["4 of 4 rows were not taken: SystemExit: no network"]),
    ],
)
def test_a_tracker_that_fails_is_counted_and_the_run_goes_on(tmp_path, monkeypatch, fails, taken, said):
    tracker = Faulty(fails)
    monkeypatch.setattr("cabochon.run.tracker_named", lambda name: tracker)
    monkeypatch.setattr(trackers, "tracker_named", lambda name: tracker)
    stage(config(tmp_path / "run", "wandb"), 4)
    assert tracker.rows == taken
    assert tracker.finished == ("start" not in fails)
    told = events(tmp_path / "run")
    assert [line.removeprefix("wandb: ") for line in told if "of 4 rows" in line] == said
    assert len(told) <= 2
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4


def test_a_tracker_that_hangs_holds_nobody_up(tmp_path):
    gate = threading.Event()

    class Hanging(Faulty):
        def log(self, step, scalars):
            gate.wait(30)

    start = time.monotonic()
    feeds = trackers.Trackers({"wandb": Hanging(())}, tmp_path, {})
    for step in range(trackers.WAITING + 10):
        feeds.log(step, {"x": 1.0})
    news = feeds.news()
    assert len(news) == 1
    assert "rows behind" in news[0]
    assert feeds.news() == []
    assert "not taken in time" in feeds.finish(0.1)[0]
    assert time.monotonic() - start < 10
    gate.set()
