"""Is it learning? One word, a title, and the reasons in plain words. Pure functions of what a page shows.

A change counts where its 95 % interval leaves out zero. The held-out score speaks before the reward of training: with
dynamic sampling or a curriculum the latter is of tasks chosen to be neither easy nor hard, and need not rise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cabochon.report.files import number_of

State = Literal["learning", "flat", "worse", "collapsed", "early"]
TITLES: Mapping[State, str] = {
    "learning": "It is learning", "flat": "No clear change", "worse": "It is getting worse",
    "collapsed": "It collapsed", "early": "Too early to tell",
}  # fmt: skip
FATAL = frozenset({"entropy", "no_answer", "truncated", "empty", "all_wrong", "nothing_trained", "load", "logprobs"})
"""alarms that say why a run collapsed"""
LEAST = 8
"""points of a curve that a trend needs"""


class Change(NamedTuple):
    """Between the first and the last third of a curve, or two measurements."""

    first: float
    last: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.last - self.first


def trend(values: Sequence[float | None], *, steep: bool = False) -> Change | None:
    """The last third of a curve against its first, with a 95 % interval of the difference; None where it is too short.

    Neighbouring points resemble each other: each third counts as n (1 - r) / (1 + r) independent ones, r being the
    correlation of neighbours about the thirds' own means. `steep`: the noise is that of each point against the next
    (von Neumann's estimate), for losses: what they fall by within the first third is no noise, and batches are drawn
    independently.
    """
    y = np.array([v for v in values if v is not None], np.float64)
    if len(y) < LEAST:
        return None
    parts = np.split(y, [len(y) // 3, len(y) - len(y) // 3])
    ends = (parts[0], parts[2])
    first, last = (float(x.mean()) for x in ends)
    if steep:
        error = math.sqrt(sum(float(np.square(np.diff(x)).mean()) / 2 / len(x) for x in ends))
        return Change(first, last, last - first - 1.96 * error, last - first + 1.96 * error)
    rest = [x - x.mean() for x in ends]
    power = sum(float((r**2).sum()) for r in rest)
    r = sum(float((x[1:] * x[:-1]).sum()) for x in rest) / power if power > 0 else 0.0
    r = min(max(r, 0.0), 0.95)
    error = math.sqrt(sum(float(x.var(ddof=1)) / max(len(x) * (1 - r) / (1 + r), 1.0) for x in ends))
    return Change(first, last, last - first - 1.96 * error, last - first + 1.96 * error)


def shares(first: float, last: float, tasks: int) -> Change:
    """Two accuracies on `tasks` tasks. Their being the same tasks is not used, so the interval is on the wide side."""
    error = math.sqrt(max(first * (1 - first) + last * (1 - last), 0.0) / max(tasks, 1))
    return Change(first, last, last - first - 1.96 * error, last - first + 1.96 * error)


def verdict(run: Mapping[str, Any], paired: Mapping[str, float] | None = None) -> dict[str, Any]:
    """`state`, `title`, `because`: of a run as `build.RunReader.snapshot` has it.

    `paired`: what `cabochon eval` found of its result against the model it began from (finite numbers), which outweighs
    the rest. Why a run failed stands first.
    """
    match run["stage"]:
        case "rl":
            state, because = _rl(run)
        case "rm":
            state, because = _descent(run, ("eval_loss", "ranking", "loss"), "ranking loss")
            because += _accuracy(run)
        case _:
            state, because = _descent(run, ("eval_loss", "loss"), "loss")
    if paired:
        change = Change(0.0, paired["difference"], paired["low"], paired["high"])
        state = state if state == "collapsed" else _direction(change)
        d, low, high = (100 * x for x in (change.last, change.low, change.high))
        because.insert(0, f"evaluated afterwards against the first model, on the same held-out tasks: {d:+.1f} points, "
                          f"95 % interval {low:+.1f} to {high:+.1f}")  # fmt: skip
    if run["status"] == "failed":
        failed = (str(e.get("message")) for e in reversed(run["events"]) if e["event"] == "failed")
        because.insert(0, next(failed, "it failed"))
    alarms = [e for e in run["events"] if e["event"] == "alarm"]
    if alarms:
        names = sorted({str(e.get("alarm", "alarm")) for e in alarms})
        because.append(f"{len(alarms)} alarm{'s' * (len(alarms) > 1)}: {', '.join(names)} (see Events)")
    elif run["stage"] == "rl" and run["steps"]:
        because.append("no alarm went off")
    return {"state": state, "title": f"{TITLES[state]}{_status(run)}", "because": because}


def _status(run: Mapping[str, Any]) -> str:
    planned = run["planned"]
    at = f"step {run['steps']:,}" + (f" of {planned:,}" if planned else "")
    match run["status"]:
        case "finished":
            return ""
        case "running":
            return f"; still running, {at}"
        case "failed":
            return f"; it failed at {at}"
    return f"; not finished, {at}"


def _rl(run: Mapping[str, Any]) -> tuple[State, list[str]]:
    values = run["curves"]["values"]
    because: list[str] = []
    state: State = "early"
    reward = trend(values.get("score", values.get("reward", [])))
    if reward:
        state = _direction(reward)
        because.append(f"the score in training {_moved(reward)}")
    points = held_out(run)
    if len(points) > 1:
        change = shares(points[0][1], points[-1][1], run["held_out_tasks"])
        state = _direction(change)
        because.insert(0, f"held-out score {_moved(change, percent=True)}, on {run['held_out_tasks']:,} tasks")
    if why := _collapse(run, values):
        return "collapsed", [why, *because]
    if not because:
        because.append(f"{LEAST} steps are the least a trend is read from")
    return state, because


def held_out(run: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(step, accuracy), before the first step included."""
    curves = run["curves"]
    later = zip(curves["step"], curves["values"].get("held_out", []), strict=False)
    first = number_of(run["before"].get("all"))
    before = [] if first is None else [(0, first)]
    return before + [(step, value) for step, value in later if value is not None]


def _collapse(run: Mapping[str, Any], values: Mapping[str, Sequence[float | None]]) -> str | None:
    """The score of the end is less than half of what it was at its best, and beyond chance."""
    y = np.array([v for v in values.get("score", values.get("reward", [])) if v is not None], np.float64)
    if len(y) < LEAST:
        return None
    windows = np.array_split(y, min(8, len(y) // 4))
    best, last = max(windows, key=lambda w: float(w.mean())), windows[-1]
    error = math.sqrt(best.var(ddof=1) / len(best) + last.var(ddof=1) / len(last))
    if best.mean() <= 0.05 or last.mean() > best.mean() / 2 or best.mean() - last.mean() < 2 * error:
        return None
    late = run["steps"] * 0.25
    after = [str(e.get("alarm")) for e in run["events"] if (number_of(e.get("step")) or 0) >= late]
    fatal = sorted(FATAL.intersection(after))
    named = f", after the alarms {', '.join(fatal)}" if fatal else ""
    return f"the score fell from {best.mean():.2f} at its best to {last.mean():.2f}{named}"


def _descent(run: Mapping[str, Any], names: Sequence[str], what: str) -> tuple[State, list[str]]:
    values = run["curves"]["values"]
    for name in names:
        known = [v for v in values.get(name, []) if v is not None]
        held = "held-out " if name.startswith("eval") else ""
        if name.startswith("eval") and len(known) >= 2:
            down, best = known[0] - known[-1], min(known)
            said = f"the {held}{what} went from {known[0]:.4g} to {known[-1]:.4g}"
            if known[-1] > best * 1.02 and known[-1] - best > 0.5 * abs(known[0] - best):
                return "worse", [f"{said}; its best was {best:.4g}: it fits its training data too closely"]
            return ("learning" if down > 0.005 * abs(known[0]) else "flat"), [said]
        if change := trend(known, steep=True):
            state = _direction(Change(-change.first, -change.last, -change.high, -change.low))
            return state, [f"the {held}{what} {_moved(change)}"]
    return "early", [f"{LEAST} steps are the least a trend is read from"]


def _accuracy(run: Mapping[str, Any]) -> list[str]:
    known = [v for v in run["curves"]["values"].get("eval_accuracy", []) if v is not None]
    return [f"it prefers the better of two held-out answers in {known[-1]:.1%} of the pairs"] if known else []


def _direction(change: Change) -> State:
    return "learning" if change.low > 0 else "worse" if change.high < 0 else "flat"


def _moved(change: Change, percent: bool = False) -> str:
    verb = "rose" if change.low > 0 else "fell" if change.high < 0 else "moved no more than chance would"
    if percent:
        n = [100 * x for x in (change.first, change.last, change.difference, change.low, change.high)]
        return f"{verb}: {n[0]:.1f} % to {n[1]:.1f} % ({n[2]:+.1f} points, 95 % interval {n[3]:+.1f} to {n[4]:+.1f})"
    interval = f"95 % interval {change.low:+.2g} to {change.high:+.2g}"
    return f"{verb}: {change.first:.3g} to {change.last:.3g} ({change.difference:+.2g}, {interval})"
