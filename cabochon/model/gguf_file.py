"""The GGUF file format: header and lazily dequantised tensors. numpy only, no jax.

Versions 2 and 3, little-endian, as llama.cpp writes them. The header is parsed here rather than with
`gguf.GGUFReader`, which keeps one numpy view per vocabulary entry (3.3 s instead of 0.1 s for 49 k tokens) and
answers a cut file with an IndexError; the block formats are decoded by `gguf.quants`.

Shapes are `[out, in]`, as Hugging Face stores them. H is the head dim.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from cabochon.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type to struct letter; 8 is a string, 9 an array."""
_CHUNK = 1 << 22
"""elements dequantised at a time, so that temporaries stay near 50 MB"""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    """bytes from the start of the file"""
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """Everything in a GGUF file except the weights themselves."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """One parameter, read and dequantised when called."""

    path: Path
    name: str
    """in the GGUF file"""
    info: TensorInfo
    rotary_heads: int = 0
    """heads whose rows llama.cpp reordered for its interleaved rotary embedding; 0 where it did not"""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def __call__(self, dtype: np.dtype | type = np.float32) -> np.ndarray:
        """The values `[out, in]`. Memory: the result, plus one small chunk (twice the result for q and k).

        Read through a file handle, since pages of a memory map would count as ours.
        """
        block, block_bytes = GGML_QUANT_SIZES[self.info.kind]
        width = self.info.shape[-1]
        rows = math.prod(self.info.shape[:-1])
        row_bytes = width // block * block_bytes
        out = np.empty((rows, width), dtype)
        step = max(1, _CHUNK // width)
        with self.path.open("rb") as file:
            file.seek(self.info.offset)
            for start in range(0, rows, step):
                n = min(step, rows - start)
                raw = file.read(n * row_bytes)
                if len(raw) < n * row_bytes:
                    raise UserError(f"{self.path}: tensor {self.name} ended early; the file changed while it was read")
                out[start : start + n] = dequantize(np.frombuffer(raw, np.uint8).reshape(n, row_bytes), self.info.kind)
        if self.rotary_heads:
            # llama.cpp stores a head's rows as 0, H/2, 1, H/2+1, ...; half-split rotary wants 0 .. H/2-1, H/2 .. H-1.
            pairs = out.reshape(self.rotary_heads, -1, 2, width if len(self.shape) > 1 else 1)
            out = np.ascontiguousarray(pairs.swapaxes(1, 2))
        return out.reshape(self.info.shape)


class _Cursor:
    """Walks the header; every read is checked against the file's end, and `what` says what was being read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.what = path, data, 0, "the header"

    def fail(self, reason: str) -> NoReturn:
        raise UserError(f"{self.path}: {reason}")

    def take(self, n: int) -> int:
        start, self.at = self.at, self.at + n
        if self.at > len(self.data):
            n_bytes = len(self.data)
            self.fail(f"truncated GGUF: the file ends inside {self.what} (it has {n_bytes:,} bytes); fetch it again")
        return start

    def number(self, letter: str) -> Any:
        return struct.unpack_from("<" + letter, self.data, self.take(struct.calcsize("<" + letter)))[0]

    def string(self) -> str:
        n = self.number("Q")
        start = self.take(n)
        try:
            return self.data[start : start + n].decode()
        except UnicodeDecodeError:
            self.fail(f"{self.what} is not UTF-8 text; the file is damaged or not GGUF")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != 9:
            self.fail(f"{self.what} has unknown value type {kind}; known are 0 to 12")
        item, n = self.number("I"), self.number("Q")
        if item in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[item])
            return np.frombuffer(self.data, dtype, n, self.take(n * dtype.itemsize)).tolist()
        if item != 8:
            self.fail(f"{self.what} is an array of value type {item}; known are numbers and strings")
        return [self.string() for _ in range(n)]


def read_header(path: str | Path) -> Header:
    """Metadata and tensor table of a GGUF file.

    Raises:
        UserError: not a GGUF file; cut short (names the key or tensor); one part of several; an unknown block format.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24 or file.read(4) != b"GGUF":
                raise UserError(f"{path}: not a GGUF file (it does not start with the letters GGUF)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parse(c: _Cursor) -> Header:
    c.at = 4
    version, n_tensors, n_keys = c.number("I"), c.number("Q"), c.number("Q")
    if version not in (2, 3):
        c.fail(f"GGUF version {version}, expected 2 or 3 (little-endian); convert it with a current llama.cpp")
    metadata: dict[str, Any] = {}
    for i in range(n_keys):
        c.what = f"metadata key {i + 1} of {n_keys:,}"
        key = c.string()
        c.what = f"metadata key {key}"
        metadata[key] = c.value(c.number("I"))
    if metadata.get("split.count") not in (None, 0, 1):
        c.fail(f"split.count={metadata['split.count']}: one part of several; join them with llama-gguf-split --merge")
    found: list[tuple[str, tuple[int, ...], int, int]] = []
    for i in range(n_tensors):
        c.what = f"tensor entry {i + 1} of {n_tensors:,}"
        name = c.string()
        c.what = f"the entry of tensor {name}"
        if (n_dims := c.number("I")) not in (1, 2, 3, 4):
            c.fail(f"tensor {name} has {n_dims} dimensions, expected 1 to 4; the file is damaged")
        shape = tuple(c.number("Q") for _ in range(n_dims))[::-1]
        found.append((name, shape, c.number("I"), c.number("Q")))
    align = metadata.get("general.alignment", 32)
    if not isinstance(align, int) or align < 1:
        c.fail(f"general.alignment={align!r}, expected a positive number; the file is damaged")
    start = -(-c.at // align) * align
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in found:
        if kind not in GGMLQuantizationType._value2member_map_:
            c.fail(f"tensor {name} has unknown block format {kind}; a newer `gguf` package may know it")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if name in tensors or shape[-1] % block:
            c.fail(f"tensor {name} {shape} is listed twice or does not fit blocks of {block}; the file is damaged")
        n_bytes = math.prod(shape) // block * block_bytes
        if start + offset + n_bytes > len(c.data):
            c.fail(
                f"truncated GGUF: tensor {name} ends at byte {start + offset + n_bytes:,} "
                f"but the file has {len(c.data):,}; fetch it again"
            )
        tensors[name] = TensorInfo(shape=shape, kind=GGMLQuantizationType(kind), offset=start + offset, n_bytes=n_bytes)
    return Header(path=c.path, metadata=metadata, tensors=tensors)
