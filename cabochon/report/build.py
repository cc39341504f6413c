"""From run directories to the data of a page. `RunReader` keeps its place in each file, so looking again is cheap."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cabochon.locks import held
from cabochon.report import lineage, page, rollouts
from cabochon.report.files import OF_A_JOB, Row, Tail, count_of, number_of, read_object, stamp
from cabochon.report.series import Curves, Loads
from cabochon.report.verdict import verdict

EVENTS = 400
"""shown: the latest, and of alarms the first ones"""
STEPS, GROUPS, COMPLETIONS = 24, 8, 8
"""of completions in a file, as far as there is room"""
PAGE = 5_000_000
"""bytes of a file"""


class RunReader:
    """One run. Reads only; every file may be missing, half-written, or cut back by a run that resumed."""

    def __init__(self, name: str, place: Path) -> None:
        self.name, self.place = name, place
        self._metrics, self._moe = Tail(place / "metrics.jsonl"), Tail(place / "moe.jsonl")
        self._events = Tail(place / "events.jsonl")
        self._curves, self._loads = Curves(), Loads()
        self._told: list[Row] = []
        self._stamp: dict[str, tuple[int, int]] = {}
        self._tokenizer: Any = None

    def refresh(self) -> bool:
        """Read what came since; whether anything did: the half of a line is nothing yet."""
        old, self._stamp = self._stamp, stamp(self.place)
        if self._stamp == old:
            return False
        seen = self._versions()
        if self._metrics.restarted():
            self._curves = Curves()
        for row in self._metrics.rows():
            self._curves.add(row.get("step"), row)
        if self._moe.restarted():
            self._loads = Loads()
        for row in self._moe.rows():
            self._loads.add(row)
        if self._events.restarted():
            self._told = []
        self._told += [rollouts.limited(row) for row in self._events.rows() if "event" in row]
        whole = any(self._stamp.get(name) != old.get(name) for name in ("manifest.json", "rollouts", "config.yaml"))
        return whole or self._versions() != seen

    def _versions(self) -> tuple[int, ...]:
        return self._metrics.version, self._moe.version, self._events.version

    def snapshot(self) -> Row:
        """Everything but the verdict and completions, as plain data."""
        config, manifest = lineage.config_of(self.place), read_object(self.place / "manifest.json")
        curves = self._curves.columns()
        before: Row = next((e["held_out"] for e in self._told if isinstance(e.get("held_out"), dict)), {})
        tasks = next((n for e in self._told if (n := count_of(e.get("tasks")))), None)
        asked = config.get("eval")
        return {
            "name": self.name, "dir": str(self.place), "stage": str(config.get("stage", "")), "config": config,
            "steps": curves["step"][-1] if curves["step"] else 0,
            "planned": count_of(config.get("steps")),
            "status": self._status(manifest), "before": before,
            "held_out_tasks": tasks or (count_of(asked.get("tasks")) if isinstance(asked, dict) else None) or 1,
            "curves": curves, "moe": self._loads.heat(), "events": _shown(self._told),
            "rollout_steps": list(rollouts.steps_of(self.place)), "ancestors": lineage.ancestors(self.place, config),
            "manifest": {k: v for k, v in (manifest or {}).items() if k in lineage.KEPT} or None,
            "evaluations": self._evaluations(), "left_out": self._left_out(),
        }  # fmt: skip

    def groups(self, step: int, groups: int = GROUPS, completions: int = COMPLETIONS) -> Row:
        """Completions of a step; empty where there are none."""
        path = rollouts.steps_of(self.place).get(step)
        if path is None:
            return {"groups": [], "of": 0, "odd": 0}
        if self._tokenizer is None:
            model = lineage.config_of(self.place).get("model")
            address = model.get("address") if isinstance(model, dict) else None
            self._tokenizer = rollouts.tokenizer_of(self.place, address if isinstance(address, str) else None)
        return rollouts.groups_of(path, self._tokenizer, groups=groups, completions=completions)

    def _status(self, manifest: Row | None) -> str:
        if manifest is not None:
            return "finished"
        last = next((e["event"] for e in reversed(self._told) if e["event"] in ("stopped", "failed", "resumed")), "")
        if held(self.place):
            return "running"
        return last if last in ("stopped", "failed") else "killed"

    def _evaluations(self) -> dict[str, Any]:
        """What `cabochon rm eval` left beside the model."""
        files = sorted(self.place.glob("eval-*.json"))[:20]
        return {f.name: rollouts.limited(found) for f in files if (found := read_object(f)) is not None}

    def _left_out(self) -> list[str]:
        out = []
        if self._curves.width > 1:
            out.append(f"curves: a point is the mean of {self._curves.width} steps, its band their least and greatest")
        if self._loads.width > 1:
            out.append(f"expert loads: a column is the sum of {self._loads.width} steps")
        if len(self._told) > EVENTS:
            out.append(f"events: {EVENTS} of {len(self._told):,}")
        if bad := self._metrics.bad + self._moe.bad + self._events.bad:
            out.append(f"{bad} lines that are no JSON objects were passed over")
        if odd := self._curves.odd + self._loads.odd:
            out.append(f"{odd} rows of metrics.jsonl and moe.jsonl that cannot be read as such were passed over")
        return out


def _shown(events: list[Row]) -> list[Row]:
    alarms = [e for e in events if e["event"] == "alarm"][: EVENTS // 2]
    rest = [e for e in events if e["event"] != "alarm"][len(alarms) - EVENTS :]
    return sorted([*alarms, *rest], key=lambda e: number_of(e.get("time")) or 0)


class Readers:
    """Every run of the directories given, and what they have in common."""

    def __init__(self, places: Sequence[Path]) -> None:
        """Raises UserError where a directory holds no run."""
        self.places = list(places)
        named = [(place, name, at) for place in self.places for name, at in lineage.runs_in(place)]
        several = len(self.places) > 1
        self.runs = [RunReader(f"{place.name}/{name}" if several and at != place else name, at)
                     for place, name, at in named]  # fmt: skip
        self._jobs: dict[Path, dict[str, tuple[int, int]]] = {}

    def refresh(self) -> bool:
        """Reads what is new; whether anything is, in the runs or in the files of their job."""
        self._newcomers()
        before, self._jobs = self._jobs, {j: stamp(j, OF_A_JOB) for j in {*self.places, *self._parents()}}
        return any([run.refresh() for run in self.runs]) or self._jobs != before

    def _parents(self) -> set[Path]:
        """Where an evaluation of a run lies, if it was evaluated."""
        return {run.place.parent for run in self.runs}

    def _newcomers(self) -> None:
        """A job's later stages begin while it is looked at."""
        have = {run.place for run in self.runs}
        for place in self.places:
            for name, at in lineage.runs_in(place) if not lineage.is_run(place) else []:
                if at not in have:
                    self.runs.append(RunReader(name if len(self.places) == 1 else f"{place.name}/{name}", at))

    def snapshot(self) -> Row:
        runs = [run.snapshot() for run in self.runs]
        job = self.places[0] if len(self.places) == 1 and not lineage.is_run(self.places[0]) else None
        beside = {place: _evaluation(place) for place in self._parents()}
        for run in runs:
            run["verdict"] = verdict(run, _paired(beside[Path(run["dir"]).parent], run["dir"]))
        return {
            "title": str(self.places[0]) if len(self.places) == 1 else f"{len(runs)} runs",
            "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "live": False, "runs": runs,
            "differences": lineage.differences([run["config"] for run in runs]),
            "job": None if job is None else {"stages": read_object(job / "pipeline.json"), "eval": beside.get(job)},
        }  # fmt: skip


def _evaluation(job: Path) -> Row | None:
    """eval.json of `cabochon eval`, without its thousands of answers."""
    found = read_object(job / "eval.json")
    if found is None or not isinstance(found.get("evaluations"), list):
        return None
    kept = ("model", "thinking", "seconds", "domains", "against_first")
    return {
        "asked": found.get("asked"),
        "evaluations": [{k: e.get(k) for k in kept} for e in found["evaluations"] if isinstance(e, dict)],
    }


def _paired(evaluation: Row | None, place: str) -> dict[str, float] | None:
    """The test of this run's result against the first model of the evaluation, None where it has no interval, as of a
    single task.

    The evaluation may have been made from another directory than this page, so that it names the run otherwise: where
    no model is this very place, job, run and `final` are enough.
    """
    own = Path(_resolved(f"{place}/final"))
    entries = [(Path(_resolved(str(e.get("model")))), e) for e in (evaluation or {}).get("evaluations", [])]
    same = [e for at, e in entries if at == own] or [e for at, e in entries if at.parts[-3:] == own.parts[-3:]]
    for entry in same:
        tests = entry.get("against_first")
        found = tests.get("all") if isinstance(tests, dict) else None
        if isinstance(found, dict):
            numbers = {k: x for k in ("difference", "low", "high") if (x := number_of(found.get(k))) is not None}
            if len(numbers) == 3:
                return numbers
    return None


def _resolved(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # a name that no file can have
        return path


class Page(NamedTuple):
    html: str
    verdicts: list[str]
    """a line for each run: its name, its verdict, and the first reason for it"""


def report(places: Sequence[Path]) -> Page:
    """The page of these runs, of at most `PAGE` bytes. Raises UserError where a directory holds no run."""
    readers = Readers(places)
    readers.refresh()
    data = readers.snapshot()
    frame = len(page.render(data).encode())
    room = PAGE - frame - 50_000
    having = [i for i, run in enumerate(data["runs"]) if run["rollout_steps"]]
    for i in having:
        _embed(readers.runs[i], data["runs"][i], room // len(having))
    verdicts = [f"{run['name']}: {run['verdict']['title']}: {run['verdict']['because'][0]}" for run in data["runs"]]
    return Page(page.render(data), verdicts)


def _embed(reader: RunReader, run: Row, room: int) -> None:
    """Completions of as many steps as there is room for, at most `STEPS`, the ends of the run first."""
    kept: dict[int, Row] = {}
    for step in rollouts.spread(run["rollout_steps"], STEPS):
        found = reader.groups(step)
        size = len(page.embedded(found).encode())
        if size > room:
            break
        room -= size
        kept[step] = found
    run["rollouts"] = dict(sorted(kept.items()))
    total = len(run["rollout_steps"])
    if odd := sum(found["odd"] for found in kept.values()):
        run["left_out"].append(f"{odd} completions have tokens or a form that cannot be read as such")
    run["left_out"].append(
        f"completions: {len(kept)} of {total:,} steps, at most {GROUPS} groups of {COMPLETIONS} each; all are in "
        f"{run['dir']}/rollouts"
    )
