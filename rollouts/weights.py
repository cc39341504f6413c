"""Weights on their way from the learner to the engines: cut into chunks, checked on arrival, pulled by version.

A tensor lies whole in one chunk where it fits, so that reading it back is a view and not a copy. Where the chunks are
kept is the one thing in which the stores differ: memory and files here, Ray's object store in `ray_store.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (numpy knows `bfloat16` by name once it is imported)
import numpy as np

from cabochon.errors import MachineError
from cabochon.files import replaced_directory
from cabochon.model import transformer as tf
from cabochon.protocols import Manifest, Piece, TensorEntry, WeightProbe, Weights

CHUNK_BYTES = 64 * 2**20
_ALIGN = 64


class WeightsError(MachineError):
    """Published weights cannot be had as they were published; names version and tensor."""


def host_copy(weights: Weights, dtype: str | None = None) -> Weights:
    """The same in arrays of our own on the host, so that the learner may donate its buffers; `dtype` casts as an engine
    of that type would (the router stays f32).
    """
    params = weights.params if dtype is None else tf.cast(dict(weights.params), dtype)
    copied = jax.tree.map(lambda x: np.array(x, copy=True), params)
    return Weights(version=weights.version, params=copied, probe=weights.probe)


def tensors_of(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Path to array, in the order of the tree."""
    out: dict[str, np.ndarray] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            out |= tensors_of(value, f"{prefix}{key}/")
        else:
            out[prefix + key] = np.ascontiguousarray(value)
    return out


def tree_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of `tensors_of`."""
    tree: dict[str, Any] = {}
    for name, x in tensors.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = x
    return tree


def plan(weights: Weights, chunk_bytes: int) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Where each tensor goes, and the tensors."""
    tensors = tensors_of(weights.params)
    entries: list[TensorEntry] = []
    chunks = [0]
    for name, x in tensors.items():
        pieces: list[Piece] = []
        left = x.nbytes
        while left or not pieces:
            start = -(-chunks[-1] // _ALIGN) * _ALIGN
            if start and start + min(left, chunk_bytes) > chunk_bytes:
                chunks.append(0)
                start = 0
            take = min(left, chunk_bytes)
            pieces.append(Piece(len(chunks) - 1, start, take))
            chunks[-1] = start + take
            left -= take
        crc = zlib.crc32(_bytes(x).data)
        entries.append(TensorEntry(name, str(x.dtype), x.shape, crc, tuple(pieces)))
    manifest = Manifest(version=weights.version, tensors=tuple(entries), chunks=tuple(chunks), probe=weights.probe)
    return manifest, tensors


def fill(manifest: Manifest, tensors: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """The chunks, uint8, one at a time."""
    parts: list[list[tuple[Piece, str, int]]] = [[] for _ in manifest.chunks]
    for entry in manifest.tensors:
        at = 0
        for piece in entry.pieces:
            parts[piece.chunk].append((piece, entry.name, at))
            at += piece.nbytes
    for size, members in zip(manifest.chunks, parts, strict=True):
        chunk = np.zeros(size, np.uint8)
        for piece, name, at in members:
            chunk[piece.offset : piece.offset + piece.nbytes] = _bytes(tensors[name])[at : at + piece.nbytes]
        yield chunk


def assemble(manifest: Manifest, chunks: list[np.ndarray]) -> Weights:
    """The weights of which these are the chunks. Raises WeightsError for a checksum that does not match."""
    tensors: dict[str, np.ndarray] = {}
    for entry in manifest.tensors:
        parts = [chunks[p.chunk][p.offset : p.offset + p.nbytes] for p in entry.pieces]
        raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if raw.nbytes != sum(p.nbytes for p in entry.pieces) or (crc := zlib.crc32(raw.data)) != entry.crc32:
            found = f"{raw.nbytes} bytes" if raw.nbytes != sum(p.nbytes for p in entry.pieces) else f"{crc:08x}"
            raise WeightsError(
                f"weights version {manifest.version}: tensor {entry.name}: checksum {entry.crc32:08x} was published, "
                f"found {found}"
            )
        tensors[entry.name] = raw.view(np.dtype(entry.dtype)).reshape(entry.shape)
    return Weights(version=manifest.version, params=tree_of(tensors), probe=manifest.probe)


def _bytes(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1).view(np.uint8)


class ChunkedStore(ABC):
    """What the stores share. A subclass keeps (manifest, chunks) by version, in the order of publication."""

    def __init__(self, *, keep: int = 2, dtype: str | None = None, chunk_bytes: int = CHUNK_BYTES):
        """`keep`: versions held, the newest; `dtype`: cast at publication."""
        if keep < 1 or chunk_bytes < 1:
            raise ValueError(f"keep and chunk_bytes must be 1 or more, got {keep} and {chunk_bytes}")
        self.keep, self.dtype, self.chunk_bytes = keep, dtype, chunk_bytes

    def publish(self, weights: Weights) -> Manifest:
        """Store a copy; a version that is there already is replaced."""
        if self.dtype is not None:
            weights = host_copy(weights, self.dtype)
        manifest, tensors = plan(weights, self.chunk_bytes)
        others = [version for version in self.versions() if version != manifest.version]
        for version in others[: max(len(others) + 1 - self.keep, 0)]:  # first: no more than `keep` are ever there
            self._drop(version)
        self._put(manifest, fill(manifest, tensors))
        return manifest

    def latest(self) -> int | None:
        held = self.versions()
        return held[-1] if held else None

    def fetch(self, version: int) -> Weights:
        """Views of the chunks where the store can give them. Raises WeightsError."""
        if version not in (held := self.versions()):
            raise WeightsError(f"weights version {version} is not in the store; it holds {held or 'nothing'}")
        manifest = self._manifest(version)
        return assemble(manifest, [self._chunk(manifest, i) for i in range(len(manifest.chunks))])

    @abstractmethod
    def versions(self) -> list[int]:
        """What is held, the newest last."""

    @abstractmethod
    def _put(self, manifest: Manifest, chunks: Iterator[np.ndarray]) -> None: ...

    @abstractmethod
    def _manifest(self, version: int) -> Manifest: ...

    @abstractmethod
    def _chunk(self, manifest: Manifest, i: int) -> np.ndarray:
        """uint8. Raises WeightsError where it is lost."""

    @abstractmethod
    def _drop(self, version: int) -> None: ...


def lost(manifest: Manifest, i: int, why: str) -> WeightsError:
    """The error for chunk `i` that is gone."""
    names = [e.name for e in manifest.tensors if any(p.chunk == i for p in e.pieces)]
    return WeightsError(
        f"weights version {manifest.version}: chunk {i} is lost, with tensor {names[0]} and {len(names) - 1} others: "
        f"{why}"
    )


@dataclass(frozen=True)
class _Held:
    manifest: Manifest
    chunks: list[np.ndarray]


class MemoryStore(ChunkedStore):
    """In this process."""

    def __init__(self, *, keep: int = 2, dtype: str | None = None, chunk_bytes: int = CHUNK_BYTES):
        super().__init__(keep=keep, dtype=dtype, chunk_bytes=chunk_bytes)
        self._held: dict[int, _Held] = {}

    def versions(self) -> list[int]:
        return list(self._held)

    def _put(self, manifest: Manifest, chunks: Iterator[np.ndarray]) -> None:
        self._held.pop(manifest.version, None)
        self._held[manifest.version] = _Held(manifest, list(chunks))

    def _manifest(self, version: int) -> Manifest:
        return self._held[version].manifest

    def _chunk(self, manifest: Manifest, i: int) -> np.ndarray:
        return self._held[manifest.version].chunks[i]

    def _drop(self, version: int) -> None:
        del self._held[version]


class FileStore(ChunkedStore):
    """A directory that every worker sees: `<publication>-<version>/manifest.json` and `chunk-<i>.bin`.

    A publication appears whole or not at all.
    """

    def __init__(self, directory: Path, *, keep: int = 2, dtype: str | None = None, chunk_bytes: int = CHUNK_BYTES):
        super().__init__(keep=keep, dtype=dtype, chunk_bytes=chunk_bytes)
        self.directory = directory

    def versions(self) -> list[int]:
        return [version for _, version in self._entries()]

    def _entries(self) -> list[tuple[int, int]]:
        """(publication, version), oldest first; the newest publication of a version counts."""
        names = [p.name for p in self.directory.iterdir()] if self.directory.is_dir() else []
        found = sorted((int(m[1]), int(m[2])) for m in (re.fullmatch(r"(\d{8,})-(\d+)", n) for n in names) if m)
        newest = {version: publication for publication, version in found}
        return sorted((publication, version) for version, publication in newest.items())

    def _path(self, version: int) -> Path:
        publication = {v: p for p, v in self._entries()}[version]
        return self.directory / f"{publication:08d}-{version}"

    def _put(self, manifest: Manifest, chunks: Iterator[np.ndarray]) -> None:
        entries = self._entries()
        before = [self._path(manifest.version)] if manifest.version in self.versions() else []
        publication = entries[-1][0] + 1 if entries else 0
        with replaced_directory(self.directory / f"{publication:08d}-{manifest.version}", overwrite=False) as at:
            for i, chunk in enumerate(chunks):
                chunk.tofile(at / f"chunk-{i}.bin")
            (at / "manifest.json").write_text(json.dumps(_plain(manifest)))
        for path in before:
            shutil.rmtree(path)

    def _manifest(self, version: int) -> Manifest:
        path = self._path(version) / "manifest.json"
        try:
            return _from_plain(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"weights version {version}: {path}: not a manifest ({error})") from None

    def _chunk(self, manifest: Manifest, i: int) -> np.ndarray:
        path = self._path(manifest.version) / f"chunk-{i}.bin"
        try:
            return np.fromfile(path, np.uint8)
        except OSError as error:
            raise lost(manifest, i, f"{path}: {error.strerror or error}") from None

    def _drop(self, version: int) -> None:
        shutil.rmtree(self._path(version))


def _plain(manifest: Manifest) -> dict[str, Any]:
    probe = manifest.probe
    return {
        "version": manifest.version,
        "chunks": manifest.chunks,
        "tensors": [e._asdict() for e in manifest.tensors],
        "probe": None if probe is None else {
            "tokens": probe.tokens.tolist(), "prompt": probe.prompt, "logprobs": probe.logprobs.tolist()
        },
    }  # fmt: skip


def _from_plain(plain: Mapping[str, Any]) -> Manifest:
    probe = plain["probe"]
    return Manifest(
        version=plain["version"],
        chunks=tuple(plain["chunks"]),
        tensors=tuple(
            TensorEntry(**e | {"shape": tuple(e["shape"]), "pieces": tuple(Piece(*p) for p in e["pieces"])})
            for e in plain["tensors"]
        ),
        probe=None if probe is None else WeightProbe(
            tokens=np.array(probe["tokens"], np.int32), prompt=probe["prompt"],
            logprobs=np.array(probe["logprobs"], np.float32),
        ),
    )  # fmt: skip
