"""Weights in Ray's object store: on the learner's node, engines read them where they lie, without a copy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import ray

from cabochon.protocols import Manifest
from cabochon.rollouts.weights import CHUNK_BYTES, ChunkedStore, lost


class RayStore(ChunkedStore):
    """One object per chunk, owned by the process that publishes.

    Sent to a worker, it is the table of what is held at that moment.
    """

    def __init__(
        self, *, keep: int = 2, dtype: str | None = None, chunk_bytes: int = CHUNK_BYTES, seconds: float = 60.0
    ):
        """`seconds`: deadline for reading one chunk."""
        super().__init__(keep=keep, dtype=dtype, chunk_bytes=chunk_bytes)
        self.seconds = seconds
        self._held: dict[int, tuple[Manifest, list[ray.ObjectRef]]] = {}

    def versions(self) -> list[int]:
        return list(self._held)

    def _put(self, manifest: Manifest, chunks: Iterator[np.ndarray]) -> None:
        self._held.pop(manifest.version, None)
        self._held[manifest.version] = manifest, [ray.put(chunk) for chunk in chunks]

    def _manifest(self, version: int) -> Manifest:
        return self._held[version][0]

    def _chunk(self, manifest: Manifest, i: int) -> np.ndarray:
        try:
            return ray.get(self._held[manifest.version][1][i], timeout=self.seconds)
        except ray.exceptions.RayError as error:
            raise lost(manifest, i, type(error).__name__) from None

    def _drop(self, version: int) -> None:
        del self._held[version]
