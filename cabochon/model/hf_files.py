"""safetensors files: headers checked before anything is allocated, tensors read and written one at a time.

The format is eight bytes of header length, a JSON header, then the bytes of every tensor without holes. We read it
ourselves rather than through the library's memory map, because mapped pages stay in the process's resident set (a
bf16 checkpoint would cost half of the f32 parameters again), and because our errors name the file and the tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from cabochon.errors import UserError
from cabochon.model.hf_config import read_json

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@runtime_checkable
class LazyTensor(Protocol):
    """A tensor on disk, under its Hugging Face name: a `StoredTensor` here, or one out of a GGUF file."""

    @property
    def path(self) -> Path: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __call__(self) -> np.ndarray:
        """Read it."""
        ...


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    path: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """byte in the file"""

    def __call__(self) -> np.ndarray:
        """The tensor in its own type. Memory: the result and nothing else."""
        size = math.prod(self.shape) * self.dtype.itemsize
        raw = np.fromfile(self.path, np.uint8, size, offset=self.start)
        if raw.size != size:
            raise UserError(f"{self.path}: {self.name}: the file ends in the middle of it (changed while being read?)")
        return raw.view(self.dtype).reshape(self.shape)


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face directory by name: one file, or shards with an index; of both, as transformers
    does, the one file.

    Raises UserError for a missing shard, a truncated file or a header that does not add up.
    """
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if (directory / INDEX).exists():
        return _sharded(directory / INDEX)
    if gguf := sorted(directory.glob("*.gguf")):
        raise UserError(f"{directory}: no {SINGLE} in it; found {gguf[0].name}: give that file itself as the model")
    other = sorted(f.name for pattern in ("*.bin", "*.pth") for f in directory.glob(pattern))
    hint = f"; found {other[0]}, which has to be converted to safetensors first" if other else ""
    raise UserError(f"{directory}: no {SINGLE} and no {INDEX} in it{hint}")


def _sharded(index: Path) -> dict[str, StoredTensor]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{index}: weight_map: expected an object of tensor name to file, found {named!r:.60}")
    for name, file in named.items():
        if not isinstance(file, str):
            raise UserError(f"{index}: weight_map: {name}: expected the name of a file, found {file!r:.60}")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(named.values())):
        if Path(file).name != file:
            raise UserError(f"{index}: weight_map: {file!r} is not a plain file name beside the index")
        if not (index.parent / file).exists():
            lost = [name for name, where in named.items() if where == file]
            raise UserError(f"{index.parent / file}: missing shard; {index.name} puts {len(lost)} tensors in it, "
                            f"such as {lost[0]}: fetch it again")  # fmt: skip
        headers[file] = read_header(index.parent / file)
    for name, file in named.items():
        if name not in headers[file]:
            raise UserError(f"{index.parent / file}: {name}: not in this file, though {index.name} says so")
    return {name: headers[file][name] for name, file in named.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What is where in one safetensors file; raises UserError unless the tensors fill the file exactly."""
    try:
        with path.open("rb") as f:
            size = path.stat().st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise UserError(f"{path}: truncated, or not safetensors: its header should be {length} bytes long, "
                                f"the file has {size}")  # fmt: skip
            text = f.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return _entries(path, header, 8 + length, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its safetensors header is not readable ({error})") from None


def _entries(path: Path, header: Mapping[str, Any], data: int, size: int) -> dict[str, StoredTensor]:
    out: dict[str, StoredTensor] = {}
    reached = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tuple(map(int, entry["shape"]))
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(f"{path}: {name}: dtype {entry['dtype']} is not supported (one of {known} is); "
                            "quantised checkpoints have to be dequantised first")  # fmt: skip
        dtype = DTYPES[entry["dtype"]]
        if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize or begin != reached:
            raise UserError(f"{path}: {name}: bytes {begin} to {end} do not fit shape {list(shape)} "
                            f"of {entry['dtype']} after byte {reached}")  # fmt: skip
        if data + end > size:
            raise UserError(f"{path}: {name}: truncated: it should end at byte {data + end}, the file has {size}")
        out[name] = StoredTensor(path=path, name=name, dtype=dtype, shape=shape, start=data + begin)
        reached = end
    if data + reached != size:
        raise UserError(f"{path}: {size - data - reached} bytes after the last tensor belong to none")
    return out


def nearest(name: str, names: Iterable[str]) -> str:
    """`; nearest is X` where some name resembles it, else nothing."""
    near = get_close_matches(name, names, 1)
    return f"; nearest is {near[0]}" if near else ""


class SafetensorsWriter:
    """Writes shards one tensor at a time, so memory holds one tensor; `close` writes the index and syncs the disk.

    `plan` lists every tensor in the order `add` will get them. Shards are filled greedily up to `max_shard_bytes`.
    """

    def __init__(
        self, directory: Path, plan: Sequence[tuple[str, tuple[int, ...]]], dtype: np.dtype, max_shard_bytes: int
    ) -> None:
        self._dir, self._dtype = directory, dtype
        self._code = next(code for code, known in DTYPES.items() if known == dtype)
        self._shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
        room = max_shard_bytes
        for name, shape in plan:
            size = self._size(shape)
            if size > room and self._shards[-1]:
                self._shards.append([])
                room = max_shard_bytes
            room -= size
            self._shards[-1].append((name, shape))
        self._files = [SINGLE] if len(self._shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors" for i in range(len(self._shards))
        ]  # fmt: skip
        self._shard, self._at = -1, 0
        self._out: Any = None
        self._next_shard()

    def _size(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self._dtype.itemsize

    def _next_shard(self) -> None:
        self._finish_shard()
        self._shard, self._at = self._shard + 1, 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self._shards[self._shard]:
            begin, end = end, end + self._size(shape)
            header[name] = {"dtype": self._code, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start on 8 bytes, as the library asks
        self._out = (self._dir / self._files[self._shard]).open("wb")
        self._out.write(len(text).to_bytes(8, "little") + text)

    def _finish_shard(self) -> None:
        if self._out is not None:
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()
            self._out = None

    def add(self, name: str, tensor: np.ndarray) -> None:
        """The next tensor of the plan. Raises UserError where a number of it is beyond the type it is written in."""
        if self._at == len(self._shards[self._shard]):
            self._next_shard()
        expected = self._shards[self._shard][self._at]
        assert (name, tensor.shape) == expected, f"{name} {tensor.shape} written where {expected} was planned"
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(tensor, dtype=self._dtype)
        if stored.dtype != tensor.dtype and np.any(np.isinf(stored) & np.isfinite(tensor)):
            largest = np.abs(tensor[np.isfinite(tensor)]).max()
            raise UserError(f"{name}: {largest:.4g} is beyond the largest number of {self._dtype.name}; "
                            "write bfloat16 or float32")  # fmt: skip
        self._out.write(stored.reshape(-1).view(np.uint8).data)
        self._at += 1

    def close(self, finished: bool) -> None:
        """Sync the last shard and, if everything was written, the index."""
        self._finish_shard()
        if not finished or len(self._shards) == 1:
            return
        assert self._at == len(self._shards[self._shard]), "fewer tensors were added than planned"
        total = sum(self._size(shape) for shard in self._shards for _, shape in shard)
        weight_map = {name: file for file, shard in zip(self._files, self._shards, strict=True) for name, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._dir / INDEX).write_text(json.dumps(index, indent=2) + "\n")
