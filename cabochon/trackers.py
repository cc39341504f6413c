"""Experiment trackers beside a run's own files: wandb, trackio, mlflow. None is on by itself (`run.trackers=[wandb]`).

A run never waits for a tracker and never stops for one. Each has a thread of its own that takes rows from a queue; what
it does not take in time, or refuses, is counted, and the run says once that it goes on without. The run directory has
everything anyway.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from typing import Any, Literal, Protocol, assert_never, runtime_checkable

from cabochon.errors import UserError

Name = Literal["mlflow", "trackio", "wandb"]

WAITING = 10_000
"""rows that a slow tracker may be behind"""
FINISH_SECONDS = 30.0
"""for all trackers together to take what is left at the end"""


@runtime_checkable
class Tracker(Protocol):
    """What a tracker does. Everything is called from one thread, and anything may raise."""

    def start(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Open the run, or open it again where this directory was tracked before."""
        ...

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


class WandbTracker:
    """Weights & Biases. WANDB_MODE, WANDB_PROJECT and the like are obeyed; its files are in DIR/wandb."""

    def start(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        name = run_dir.resolve().name
        project = os.environ.get("WANDB_PROJECT", "cabochon")
        self._run = wandb.init(
            project=project, name=name, id=_identity(run_dir), resume="allow", dir=str(run_dir), config=dict(config),
            settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def finish(self) -> None:
        self._run.finish()


class TrackioTracker:
    """trackio, wandb's calls on a local store (TRACKIO_DIR)."""

    def start(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        name = f"{run_dir.resolve().name}-{_identity(run_dir)}"
        self._trackio.init(project="cabochon", name=name, config=dict(config), resume="allow")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._trackio.log(dict(scalars), step=step)

    def finish(self) -> None:
        self._trackio.finish()


class MlflowTracker:
    """MLflow, at MLFLOW_TRACKING_URI or else in DIR/mlflow. DIR/mlflow-run has the run's id, to go on with it."""

    def start(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        here = (run_dir / "mlflow").resolve()
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # releases from 3.10 on ask for it
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or here.as_uri())
        known = run_dir / "mlflow-run"
        if known.exists():
            self._run = known.read_text(encoding="utf-8").strip()
            return
        found = self._client.get_experiment_by_name("cabochon")
        experiment = found.experiment_id if found else self._client.create_experiment("cabochon")
        self._run = self._client.create_run(experiment, run_name=run_dir.resolve().name).info.run_id
        known.write_text(self._run, encoding="utf-8")
        params = [Param(key, str(value)[:6000]) for key, value in flat(config)]
        for i in range(0, len(params), 100):
            self._client.log_batch(self._run, params=params[i : i + 100])

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in scalars.items()]
        for i in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[i : i + 1000])

    def finish(self) -> None:
        self._client.set_terminated(self._run)


def tracker_named(name: Name) -> Tracker:
    """Raises UserError where its package is not installed."""
    if find_spec(name) is None:
        raise UserError(f"run.trackers: {name} is not installed: pip install 'cabochon[{name}]'")
    match name:
        case "mlflow":
            return MlflowTracker()
        case "trackio":
            return TrackioTracker()
        case "wandb":
            return WandbTracker()
    assert_never(name)


class Trackers:
    """All of a run's trackers, each fed by its own thread. Nothing here raises or blocks, but `finish` for a while."""

    def __init__(self, trackers: Mapping[str, Tracker], run_dir: Path, config: Mapping[str, Any]):
        self._feeds = [_Feed(name, tracker, run_dir, config) for name, tracker in trackers.items()]

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for feed in self._feeds:
            feed.put((step, scalars))

    def news(self) -> list[str]:
        """What went wrong for the first time since the last call, a line for each tracker."""
        return [line for feed in self._feeds if (line := feed.first_failure())]

    def finish(self, seconds: float = FINISH_SECONDS) -> list[str]:
        """Let them take what is left. A line for each tracker that did not take everything."""
        deadline = time.monotonic() + seconds
        for feed in self._feeds:
            feed.put(None)
        return [line for feed in self._feeds if (line := feed.ended(deadline))]


class _Feed:
    """A tracker, its thread and its queue."""

    def __init__(self, name: str, tracker: Tracker, run_dir: Path, config: Mapping[str, Any]):
        self.name, self._tracker = name, tracker
        self._queue: Queue[tuple[int, Mapping[str, float]] | None] = Queue(WAITING)
        self._given = self._lost = 0
        self._failure, self._told = "", False
        self._thread = threading.Thread(target=self._run, args=(run_dir, config), name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, row: tuple[int, Mapping[str, float]] | None) -> None:
        self._given += row is not None
        try:
            self._queue.put_nowait(row)
        except Full:
            self._lose(f"it is {WAITING:,} rows behind")

    def first_failure(self) -> str:
        if self._told or not self._failure:
            return ""
        self._told = True
        return f"{self.name}: {self._failure}; the run goes on without what it does not take"

    def ended(self, deadline: float) -> str:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            return f"{self.name}: {self._queue.qsize()} of {self._given} rows were not taken in time"
        lost = f"{self._lost} of {self._given} rows were not taken"
        return f"{self.name}: {lost}: {self._failure}" if self._failure else ""

    def _run(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        try:
            self._tracker.start(run_dir, config)
            started = True
        except BaseException as error:  # other people's code, which may even call sys.exit
            self._failure, started = _line(error), False
        while (row := self._queue.get()) is not None:  # ends with the None of `finish`, or as a daemon
            try:
                if not started:
                    self._lost += 1
                else:
                    self._tracker.log(*row)
            except BaseException as error:
                self._lose(_line(error))
        try:
            if started:
                self._tracker.finish()
        except BaseException as error:
            self._failure = self._failure or _line(error)

    def _lose(self, why: str) -> None:
        self._lost += 1
        self._failure = self._failure or why


def start_trackers(names: Sequence[Name], run_dir: Path, config: Mapping[str, Any]) -> Trackers:
    """Raises UserError for one whose package is not installed."""
    return Trackers({name: tracker_named(name) for name in names}, run_dir, config)


def flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and their values."""
    out: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out += flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", value))
    return out


def _identity(run_dir: Path) -> str:
    """The same for the same directory on the same machine."""
    return hashlib.sha256(f"{os.uname().nodename}:{run_dir.resolve()}".encode()).hexdigest()[:12]


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
