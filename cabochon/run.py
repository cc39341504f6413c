"""The run directory: what a stage is given, what it writes, and how it goes on after a kill. The same for every stage.

    DIR/config.yaml      the resolved config; `cabochon STAGE DIR/config.yaml` runs it again
    DIR/inputs.json      the data files that were read, with their SHA-256
    DIR/metrics.jsonl    a row per step; what depends on the clock stands under `clock`, all else is reproducible
    DIR/moe.jsonl        a row per step of a sparse model: the load of every expert of every layer, replay agreement
    DIR/events.jsonl     what happened and when: started, resumed, alarms, stopped, finished
    DIR/tensorboard/     the same scalars
    DIR/checkpoints/     see cabochon.checkpoint
    DIR/final/           the result, a Hugging Face directory, written whole or not at all
    DIR/manifest.json    written last: what the result came from

A stage reads like this (cfg is its StageConfig, `tick` whatever it does in a step):

    with open_run(cfg, "sft", data=[cfg.data.train], resume_anyway=resume_anyway, shown=("loss", "lr")) as run:
        if run.finished:
            return
        learner, state, position = ...                       # built from cfg alone
        if saved := run.restore(learner.abstract_state()):   # also drops the metrics of steps after that checkpoint
            state, position = saved.state, saved.meta["position"]
        for step in run.steps(saved.step if saved else 0, cfg.steps):
            state, row = tick(state)
            run.log(step, row, clock={"tokens_per_second": ...})
            if run.save_due(step):
                run.save(step, state, {"position": position})   # raises KeyboardInterrupt where Ctrl-C asked for it
        convert.save(run.final, ..., overwrite=True)
        run.finish(steps=cfg.steps, results={"loss": ...})

Rules: log a step before it is saved; everything that decides the next step is in `state` or in the meta given to `save`
(plain JSON); nothing is kept in the process alone. Then a run killed at any moment ends with the same metrics as one
that was not, the clock apart. Errors: UserError for what the user can change (another process has the directory, a
config that differs), MachineError for a disk that is full or gone; what was written before stays whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cabochon import overrides
from cabochon.checkpoint import Checkpointer, Restored
from cabochon.config import StageConfig
from cabochon.console import Console, duration
from cabochon.errors import MachineError, UserError
from cabochon.files import sha256, write_whole
from cabochon.locks import locked
from cabochon.metrics import EventFile, Journal, plain, scalars
from cabochon.trackers import Trackers, start_trackers, tracker_named

PACKAGES = ("cabochon", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
"""whose versions the manifest names"""
EXPERTS = "moe.jsonl"


class Run:
    """One stage's run; made by `open_run`."""

    def __init__(
        self, config: StageConfig, stage: str, *, inputs: Mapping[str, Any], checkpoints: Checkpointer, console: Console
    ) -> None:
        self.config, self.stage, self.dir = config, stage, Path(config.run.dir)
        self.inputs, self.checkpoints, self.console = inputs, checkpoints, console
        self.final = self.dir / "final"
        self.finished = (self.dir / "manifest.json").exists()
        self.resumes = checkpoints.latest() is not None
        """there is a checkpoint to go on from"""
        self.stopping = False
        """Ctrl-C or SIGTERM came: `save_due` says yes, and `save` leaves with KeyboardInterrupt"""
        self.seconds = 0.0
        """spent in steps, over all sessions"""
        self._metrics, self._events = Journal(self.dir / "metrics.jsonl"), Journal(self.dir / "events.jsonl")
        self._experts: Journal | None = None
        self._scalars: EventFile | None = None
        self._trackers: Trackers | None = None
        self._mark = time.perf_counter()

    # -- going on ------------------------------------------------------------------------------------------------------

    def restore(self, abstract: Any) -> Restored | None:
        """The newest checkpoint (`meta` is what `save` was given), None in a fresh run. Drops later rows of metrics."""
        saved = self.checkpoints.restore(abstract) if self.resumes else None
        step = saved.step if saved else 0
        dropped = self._metrics.cut(lambda row: saved is None or row["step"] > step)
        if (self.dir / EXPERTS).exists():
            self._expert_file().cut(lambda row: saved is None or row["step"] > step)
        if saved is not None:
            self.seconds = saved.meta["seconds"]
            again = f"; steps {step + 1} to {step + dropped} are done again" if dropped else ""
            self.event("resumed", f"{self.dir}: going on after step {step}{again}", step=step)
            saved = saved._replace(meta=saved.meta["stage"])
        if self.config.run.tensorboard:
            self._scalars = EventFile(self.dir / "tensorboard", purge_from=step + 1)
        if names := self.config.run.trackers:
            self._trackers = start_trackers(names, self.dir, self.config.model_dump(mode="json"))
        return saved

    def steps(self, done: int, total: int) -> Iterator[int]:
        """Yields `done` + 1 to `total`. While it does, the first Ctrl-C or SIGTERM asks the run to save and leave, and
        a second one kills; progress is shown."""
        self.console.start(done, total)
        before = self._catch() if threading.current_thread() is threading.main_thread() else {}
        try:
            for step in range(done + 1, total + 1):
                self._mark = time.perf_counter()
                yield step
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.console.stop()

    def _catch(self) -> dict[int, Any]:
        def ask(number: int, frame: Any) -> None:
            self.stopping = True
            # Not a handler of ours: Python's run between bytecodes, and a step may be minutes in compiled code.
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_DFL)
            self.console.line("stopping after this step, with a checkpoint; once more to leave at once")

        return {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}

    # -- what is written -----------------------------------------------------------------------------------------------

    def log(
        self,
        step: int,
        row: Mapping[str, Any],
        clock: Mapping[str, Any] | None = None,
        experts: Mapping[str, Any] | None = None,
    ) -> None:
        """One row of metrics.jsonl, in the file when this returns; numbers go to TensorBoard, some to the console.

        `clock`: whatever a second run would measure otherwise. Seconds of the step and in all are added to it.
        `experts`: this step's row of moe.jsonl, see `metrics.expert_row`.
        """
        seconds, self._mark = time.perf_counter() - self._mark, time.perf_counter()
        self.seconds += seconds
        clock = plain({"time": time.time(), "seconds": seconds, "elapsed": self.seconds, **(clock or {})})
        values = {"step": step, **plain(row)}
        if experts is not None:
            self._expert_file().append({"step": step, **experts})
        self._metrics.append({**values, "clock": clock})
        numbers = list(scalars({k: v for k, v in values.items() if k != "step"} | {"clock": clock}))
        if self._scalars is not None:
            self._scalars.add(step, numbers)
        if self._trackers is not None:
            self._trackers.log(step, dict(numbers))
            for line in self._trackers.news():
                self.event("tracker", line, step=step)
        self.console.step(step, {**clock, **values}, seconds)

    def event(
        self,
        kind: str,
        message: str,
        *,
        step: int | None = None,
        data: Mapping[str, Any] | None = None,
        shown: bool = True,
    ) -> None:
        """A line of events.jsonl and, where `shown`, of the console; `data` is plain JSON."""
        at = {} if step is None else {"step": step}
        self._events.append({"time": time.time(), "event": kind, **at, "message": message, **(data or {})})
        if shown:
            self.console.line(f"{kind}: {message}")

    def _expert_file(self) -> Journal:
        self._experts = self._experts or Journal(self.dir / EXPERTS)
        return self._experts

    def rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds."""
        return self._metrics.rows()

    def save_due(self, step: int) -> bool:
        """A checkpoint is due after this step, or was asked for by Ctrl-C. The last step is the stage's to save."""
        return self.stopping or step % self.config.run.save_every == 0

    def save(self, step: int, state: Any, meta: Mapping[str, Any], *, metric: float | None = None) -> None:
        """Checkpoint a step that has been logged. `metric` rates it, for those who keep the best.

        Raises MachineError where it could not be written, with those before intact; KeyboardInterrupt, after saving,
        where Ctrl-C asked to stop.
        """
        self._metrics.sync()
        try:
            self.checkpoints.save(step, state, {"stage": dict(meta), "seconds": self.seconds}, metric=metric)
        except UserError as error:
            raise MachineError(str(error)) from error
        self._mark = time.perf_counter()
        if self.stopping:
            raise KeyboardInterrupt

    def finish(self, *, steps: int, results: Mapping[str, Any], parents: Sequence[str] = ()) -> None:
        """Write manifest.json: the run is finished once it is there. `final/` must be whole before.

        `results`: the numbers to remember it by. `parents`: models it used besides `config.model.address`.
        """
        addresses = [*([self.config.model.address] if self.config.model.address else []), *parents]
        manifest = {
            "stage": self.stage,
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "steps": steps,
            "seconds": self.seconds,
            "results": plain(results),
            "seed": self.config.seed,
            "config_sha256": sha256(self.dir / "config.yaml"),
            "parents": [{"address": a, "manifest": _manifest_of(Path(a))} for a in addresses],
            **self.inputs,
            "versions": _versions(),
        }
        write_whole(self.dir / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        self.finished = True
        told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in results.items())
        self.event("finished", f"{self.final}: {steps} steps in {duration(self.seconds)}; {told}", step=steps)

    def close(self) -> None:
        self.console.stop()
        for line in self._trackers.finish() if self._trackers else ():
            with contextlib.suppress(MachineError):
                self.event("tracker", line)
        for file in (self._metrics, self._events, self._experts, self._scalars):
            if file is not None:
                file.close()


@contextmanager
def open_run(
    config: StageConfig,
    stage: str,
    *,
    data: Sequence[str] = (),
    resume_anyway: bool = False,
    shown: Sequence[str] = (),
    keep_best: int = 0,
    best: Literal["max", "min"] = "max",
) -> Iterator[Run]:
    """Open, or open again, the directory `config.run.dir` for one process.

    `data`: files and directories the run reads; a change in them counts as a change of config. `shown`: keys of a row
    the console shows. `keep_best`, `best`: as in Checkpointer. Raises UserError where another process has the
    directory, where it holds something else, or where config or data differ from those of a run that has made a step
    and `resume_anyway` is off; before the first step, who mends a row or a key runs the same command again.
    """
    place = Path(config.run.dir)
    for name in config.run.trackers:
        tracker_named(name)
    inputs = {"data": [_identity(Path(path)) for path in data]}
    with locked(place), contextlib.ExitStack() as stack:
        begun, differences = _begun(place), _differences(place, stage, config, inputs)
        if differences and not resume_anyway:
            raise UserError(
                f"{place}: the run there was begun with other settings: {'; '.join(differences)}. "
                "Give another run.dir, or add --resume-anyway to go on with the new ones"
            )
        saver = Checkpointer(place / "checkpoints", keep_last=config.run.keep_last, keep_best=keep_best, best=best)
        if differences:
            (place / "manifest.json").unlink(missing_ok=True)  # no longer what final/ came from
        if not (place / "manifest.json").exists():
            write_whole(place / "inputs.json", json.dumps(inputs, indent=1) + "\n")
            write_whole(place / "config.yaml", overrides.dump(config))
        run = Run(config, stage, inputs=inputs, checkpoints=saver, console=Console(shown, config.run.log_every))
        stack.callback(run.close)
        if run.finished:
            run.console.line(f"{place}: this run is finished; its result is {run.final}")
        elif not begun:
            run.event("started", f"{place}: {stage}, seed {config.seed}")
        if differences:
            run.event("changed", "; ".join(differences))
        try:
            yield run
        except BaseException as error:
            run.console.stop()
            stopped = isinstance(error, KeyboardInterrupt)  # any other error is printed by whoever catches it
            with contextlib.suppress(MachineError):  # the disk may be what failed: say the first thing, not the second
                said = str(error) or f"the same command goes on in {place}"
                run.event("stopped" if stopped else "failed", said, shown=stopped)
            raise


def _begun(place: Path) -> bool:
    """A step was logged or saved there."""
    return any(file.stat().st_size for file in place.glob("metrics.jsonl")) or any(place.glob("checkpoints/*"))


def _differences(place: Path, stage: str, config: StageConfig, inputs: Mapping[str, Any]) -> list[str]:
    """What differs from the run in `place`, in words: `optim.b1: 0.9 -> 0.8`. Empty where none has begun."""
    file = place / "config.yaml"
    found = [p.name for p in place.iterdir() if p.name not in (".lock", "inputs.json")]
    if found and not file.exists():
        raise UserError(f"{place}: holds {found[0]!r} and is no run directory; give another run.dir")
    if not _begun(place):
        return []
    if (was := overrides.peek([str(file)], [], "stage")) not in (None, stage):
        raise UserError(f"{place}: holds a run of `{was}`, this is one of `{stage}`; give another run.dir")
    old, new = (dict(_leaves(c.model_dump(mode="json"))) for c in (overrides.load(type(config), [str(file)]), config))
    out = []
    for key in [*old, *(k for k in new if k not in old)]:
        if not key.startswith("run.") and old.get(key) != new.get(key):
            out.append(f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}")
    before = {f["path"]: f["sha256"] for f in json.loads((place / "inputs.json").read_text())["data"]}
    for each in inputs["data"]:
        if before.get(each["path"], each["sha256"]) != each["sha256"]:
            out.append(f"{each['path']} was changed since")
    return out


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _identity(path: Path) -> dict[str, Any]:
    """A data file, or every file of a directory, by content. Raises UserError where there is none."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    try:
        digests = [sha256(file) for file in files]
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    whole = digests[0] if digests and files == [path] else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return {"path": str(path), "bytes": size, "sha256": whole}


def _manifest_of(model: Path) -> Any:
    """The manifest of the run a model is the `final/` of, None for other models."""
    file = model / ".." / "manifest.json"
    return json.loads(file.read_text(encoding="utf-8")) if model.name == "final" and file.is_file() else None


def _versions() -> dict[str, str | None]:
    out: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    return {**out, "git": _git_commit()}


def _git_commit() -> str | None:
    """Of the checkout this package runs from, with `+` where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(here.parent):
            return None  # installed inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
