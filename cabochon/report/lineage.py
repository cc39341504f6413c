"""Where a result came from: the runs of a job in order, ancestors by their manifests, settings that differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cabochon.errors import UserError
from cabochon.report.files import Row, Tail, read_object

KEPT = ("stage", "finished_at", "steps", "seconds", "results", "seed", "data", "versions")


def is_run(place: Path) -> bool:
    return (place / "config.yaml").is_file()


def runs_in(place: Path) -> list[tuple[str, Path]]:
    """(name, directory) of the run at `place`, or of a job's in the order they were run; those that failed before their
    first step are left out where there are others.

    Raises UserError where there is none.
    """
    if is_run(place):
        return [(place.name or str(place), place)]
    if not place.is_dir():
        raise UserError(f"{place}: no such directory; expected a run's (it holds config.yaml) or a job's")
    found = {p.name: p for p in sorted(place.iterdir()) if p.is_dir() and is_run(p)}
    if not found:
        below = sorted(str(p.parent) for p in place.glob("*/*/config.yaml"))[:1]
        nearest = f"; did you mean {below[0]}?" if below else ""
        raise UserError(f"{place}: no run in here: expected config.yaml, or directories that hold one{nearest}")
    found = {name: p for name, p in found.items() if not _refused(p)} or found
    stages = list(read_object(place / "pipeline.json") or {})
    begun = {name: (p / "config.yaml").stat().st_mtime for name, p in found.items()}
    order = sorted(found, key=lambda name: (stages.index(name) if name in stages else len(stages), begun[name]))
    return [(name, found[name]) for name in order]


def _refused(place: Path) -> bool:
    """It made no step and the last thing it said is why: a wrong key, a missing file."""
    metrics = place / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        return False
    events = list(Tail(place / "events.jsonl").rows())
    return bool(events) and events[-1].get("event") == "failed"


def config_of(place: Path) -> Row:
    """config.yaml as plain data; empty where it cannot be read."""
    try:
        value = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
        return json.loads(json.dumps(value, default=str)) if isinstance(value, dict) else {}
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return {}


def ancestors(place: Path, config: Mapping[str, Any]) -> list[Row]:
    """The runs this one began from or used, nearest first, each once, as their manifests have them."""
    manifest = read_object(place / "manifest.json") or {}
    if not isinstance(manifest.get("parents"), list):
        model = config.get("model")
        address = str(model.get("address") or "") if isinstance(model, Mapping) else ""
        manifest = {"parents": [{"address": address, "manifest": _beside(address)}] if address else []}
    found: dict[str, Row] = {}
    for row in _nested(manifest):
        found.pop(row["address"], None)  # of one that several come from, only the place before all of them is kept
        found[row["address"]] = row
    return list(found.values())


def _nested(manifest: Mapping[str, Any], depth: int = 9) -> Iterator[Row]:
    parents = manifest.get("parents")
    for parent in parents if isinstance(parents, list) else []:
        if isinstance(parent, Mapping) and depth:
            about = parent.get("manifest")
            about = about if isinstance(about, Mapping) else {}
            yield {"address": str(parent.get("address")), **{k: about.get(k) for k in KEPT}}
            yield from _nested(about, depth - 1)


def _beside(address: str) -> Row | None:
    path = Path(address)
    return read_object(path.parent / "manifest.json") if path.name == "final" else None


def differences(configs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Settings that several of the configs have and that are not the same in all: `key`, `values` (null: not there)."""
    flat = [dict(_leaves(config)) for config in configs]
    out: list[Row] = []
    for key in dict.fromkeys(k for one in flat for k in one if not k.startswith("run.") and k != "stage"):
        have = [one[key] for one in flat if key in one]
        if len(have) > 1 and len(set(have)) > 1:
            out.append({"key": key, "values": [one.get(key) for one in flat]})
    return out


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value, ensure_ascii=False)
