"""Checkpoints: a training state and what goes with it, written whole or not at all, checked before it is trusted.

On disk, `<directory>/<sequence>-step-<step>/`:

    state/         the arrays, by Orbax, each under the path it has in the state ("params.embed.table")
    meta.json      step, metric, and whatever the caller needs to go on: data position, RNG, resolved config
    manifest.json  shape and type of every array, size and SHA-256 of every file, and the SHA-256 of the manifest itself

A save goes to a directory whose name begins with a dot, is synced, and takes its name by one rename; a killed or failed
save leaves what was there. The sequence number says which came later, so a run that went back to an older step finds
its own checkpoints and not the abandoned ones. With several processes on one shared disk all call `save` and
`restore`; the first of them names, checks and prunes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from cabochon.errors import UserError
from cabochon.files import sha256, sync

_NAME = re.compile(r"(\d{4,})-step-(\d+)")
_FORMAT = 1


class Restored(NamedTuple):
    """What `restore` gives back."""

    step: int
    state: Any
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One finished checkpoint on disk."""

    path: Path
    sequence: int
    step: int


class CorruptCheckpoint(Exception):
    """A checkpoint whose files are not what was written; the message names the first that differs."""


class Checkpointer:
    """Saves to and restores from one directory.

    Keeps the newest `keep_last`, and of the rest the `keep_best` with the best `metric` (`best` says which way), the
    first of equal ones.
    """

    def __init__(
        self, directory: Path | str, *, keep_last: int = 2, keep_best: int = 0, best: Literal["max", "min"] = "max"
    ) -> None:
        if keep_last < 1 or keep_best < 0:
            raise UserError(f"keep_last={keep_last}, keep_best={keep_best}: keep at least the last one")
        self.directory = Path(directory)
        self.keep_last, self.keep_best, self.best_is = keep_last, keep_best, best

    def entries(self) -> list[Entry]:
        """Finished checkpoints, oldest first."""
        found = []
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if matched := _NAME.fullmatch(path.name):
                found.append(Entry(path=path, sequence=int(matched[1]), step=int(matched[2])))
        return sorted(found, key=lambda entry: entry.sequence)

    def latest(self) -> int | None:
        """The step saved last, unchecked; None where there is nothing."""
        entries = self.entries()
        return entries[-1].step if entries else None

    def save(self, step: int, state: Any, meta: Mapping[str, Any], *, metric: float | None = None) -> Path:
        """Write `state` (a pytree of arrays) and `meta` (plain JSON), then drop what is not to be kept.

        Raises UserError, with everything saved before intact, where the disk is full or cannot be written.
        """
        arrays = _named(state)
        metric = metric if metric is not None and math.isfinite(metric) else None
        text = json.dumps({"step": step, "metric": metric, "meta": dict(meta)}, indent=1)
        entries = self.entries()
        final = self.directory / f"{entries[-1].sequence + 1 if entries else 1:04d}-step-{step}"
        temporary = self.directory / f".{final.name}.partial"
        before = f"step {entries[-1].step} is intact" if entries else "there was none before"
        first = jax.process_index() == 0
        _barrier("before")
        try:
            if first:
                self._make_room(temporary, sum(int(a.nbytes) for a in arrays.values()))
            _barrier("room")
            _write_arrays(temporary / "state", arrays)
            if first:
                (temporary / "meta.json").write_text(text, encoding="utf-8")
                _seal(temporary, arrays)
                temporary.rename(final)
                sync(self.directory)
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore raises any of the three through Orbax
            shutil.rmtree(temporary, ignore_errors=True)
            why = _reason(error)
            raise UserError(f"{final}: the checkpoint could not be written ({why}); {before}") from error
        if first:
            self._prune()
        _barrier("after")
        return final

    def _make_room(self, temporary: Path, size: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob(".*.partial"):  # of a killed save
            shutil.rmtree(left)
        free = shutil.disk_usage(self.directory).free
        if size > free:
            raise OSError(f"disk full: it takes {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
        temporary.mkdir()

    def _prune(self) -> None:
        entries = self.entries()
        kept = {entry.sequence for entry in entries[-self.keep_last :]}
        rest = [entry for entry in self._best_first() if entry.sequence not in kept]
        kept |= {entry.sequence for entry in rest[: self.keep_best]}
        for entry in entries:
            if entry.sequence not in kept:
                # Renamed first, so that a kill in the middle does not leave half a checkpoint under a good name.
                dying = entry.path.with_name(f".{entry.path.name}.partial")
                entry.path.rename(dying)
                shutil.rmtree(dying)

    def best(self) -> int | None:
        """The step with the best metric among those on disk, the first of equal ones."""
        return next((entry.step for entry in self._best_first()), None)

    def _best_first(self) -> list[Entry]:
        """Those with a metric; of equal ones the first is best, as for whoever counts evaluations without a better."""
        sign = -1 if self.best_is == "max" else 1
        rated = [(sign * metric, entry) for entry in self.entries() if (metric := _metric(entry.path)) is not None]
        return [entry for _, entry in sorted(rated, key=lambda each: each[0])]  # a stable sort

    def restore(self, abstract: Any, *, step: int | None = None) -> Restored:
        """The newest checkpoint that is whole, or that of `step`, as a tree like `abstract`.

        `abstract` has arrays or `jax.ShapeDtypeStruct`s at its leaves; their shardings say where the values go (the
        default device where there is none), whatever mesh they were saved from. A damaged checkpoint is named in a
        warning and the one before it is used. Raises UserError where none is whole, or where the tree does not match.
        """
        entries = [e for e in self.entries() if step in (None, e.step)]
        if not entries:
            there = ", ".join(str(e.step) for e in self.entries()) or "none"
            which = "" if step is None else f" of step {step}"
            raise UserError(f"{self.directory}: no checkpoint{which} (steps there: {there})")
        damaged = []
        for entry in reversed(entries):
            try:
                manifest = verify(entry.path)
            except CorruptCheckpoint as error:
                damaged.append(str(error))
                warnings.warn(f"DAMAGED CHECKPOINT skipped: {error}", stacklevel=2)
                continue
            if damaged:
                warnings.warn(f"going on from step {entry.step} instead ({entry.path})", stacklevel=2)
            _check_tree(entry.path, manifest["arrays"], _named(abstract))
            state = _read_arrays(entry.path / "state", abstract)
            meta = json.loads((entry.path / "meta.json").read_text(encoding="utf-8"))
            return Restored(entry.step, state, meta["meta"])
        raise UserError(f"{self.directory}: no checkpoint is whole; the newest: {damaged[0]}")


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint all of whose files are as they were written; raises CorruptCheckpoint otherwise."""
    try:
        sealed = json.loads((path / "manifest.json").read_bytes())
        manifest = sealed["manifest"]
        if _digest_of(manifest) != sealed["sha256"] or manifest["format"] != _FORMAT:
            raise CorruptCheckpoint(f"{path / 'manifest.json'}: does not match its own checksum")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{path / 'manifest.json'}: not readable ({error})") from None
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CorruptCheckpoint(f"{file}: missing")
        if file.stat().st_size != expected["bytes"]:
            raise CorruptCheckpoint(f"{file}: {file.stat().st_size} bytes, {expected['bytes']} were written")
        if sha256(file) != expected["sha256"]:
            raise CorruptCheckpoint(f"{file}: checksum differs from what was written")
    return manifest


def _seal(directory: Path, arrays: Mapping[str, Any]) -> None:
    """Checksums of every file, then everything synced to disk."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    manifest = {
        "format": _FORMAT,
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "arrays": {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in arrays.items()},
        "files": {
            str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files
        },
    }
    sealed = {"sha256": _digest_of(manifest), "manifest": manifest}
    (directory / "manifest.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")
    for inner in (*directory.rglob("*"), directory):
        sync(inner)


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _metric(path: Path) -> float | None:
    try:
        return json.loads((path / "meta.json").read_text(encoding="utf-8"))["metric"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: `restore` will say so; here it merely is not the best


def _named(state: Any) -> dict[str, Any]:
    """Leaves by dotted path. PRNG keys appear as the numbers they are made of."""
    out: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f"state.{name}: expected an array, found {type(leaf).__name__}; plain values go into meta")
        out[name] = leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.eval_shape(jax.random.key_data, leaf)
            out[name] = jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else data
        elif leaf.dtype != jax.dtypes.canonicalize_dtype(leaf.dtype):
            raise TypeError(f"state.{name}: {leaf.dtype} would be stored as a narrower type; it goes into meta")
    return out


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    stored = {name: jnp.asarray(a) for name, a in arrays.items() if 0 not in a.shape}  # Orbax refuses empty arrays
    # Uncompressed: zstd saved a quarter of 1.6 GB of f32 state and took twice the time to write, four times to read.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as orbax:
        orbax.save(path.absolute(), args=ocp.args.PyTreeSave(stored))


def _read_arrays(path: Path, abstract: Any) -> Any:
    default = SingleDeviceSharding(jax.devices()[0])
    leaves, tree = jax.tree_util.tree_flatten(abstract)
    named = _named(abstract)
    targets = {}
    for (name, data), leaf in zip(named.items(), leaves, strict=True):
        sharding = leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
        targets[name] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding or default)
    wanted = {name: target for name, target in targets.items() if 0 not in target.shape}
    places = ocp.checkpoint_utils.construct_restore_args(wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        got = orbax.restore(path.absolute(), args=ocp.args.PyTreeRestore(wanted, restore_args=places))
    out = []
    for name, leaf in zip(named, leaves, strict=True):
        value = got[name] if name in got else jnp.zeros(targets[name].shape, targets[name].dtype)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            value = jax.random.wrap_key_data(value, impl=_key_impl(leaf))
        out.append(value)
    return jax.tree_util.tree_unflatten(tree, out)


def _key_impl(key: Any) -> Any:
    """The generator of a PRNG key that may be abstract: jax tells it of arrays only, so ask while tracing."""
    told: list[Any] = []
    jax.eval_shape(lambda k: told.append(jax.random.key_impl(k)), key)
    return told[0]


def _check_tree(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, leaf in wanted.items():
        expected = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        if saved.get(name) != expected:
            there = "is not in it" if name not in saved else "is {shape} {dtype} there".format(**saved[name])
            raise UserError(f"{path}: {name} {there}, expected {expected['shape']} {expected['dtype']}; "
                            "the run's config is not the one it was saved with")  # fmt: skip
    if extra := [name for name in saved if name not in wanted]:
        raise UserError(f"{path}: {extra[0]} is in it but not in this run's state; the run's config is not the one "
                        "it was saved with")  # fmt: skip


def _reason(error: Exception) -> str:
    """The line of a long library message that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = re.search(r"(No space left on device|disk full[^\n]*|File too large|Permission denied|Disk quota exceeded)",
                     str(error), re.IGNORECASE)  # fmt: skip
    return told[0] if told else lines[0][:200]


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"cabochon.checkpoint.{name}")
