"""What a run measures, written as it happens: JSON lines, TensorBoard scalars, and floating-point work per token.

The TensorBoard writer is 40 lines of its own because tensorboardX imports torch wherever torch is installed, and
writes from a thread whose errors nobody sees.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cabochon.errors import UserError
from cabochon.files import encodable, writing
from cabochon.model import moe
from cabochon.model.config import ModelConfig
from cabochon.model.upcycle import parameter_counts

Row = dict[str, Any]


class Journal:
    """An append-only file of JSON objects, a line each. A line is in the file when `append` returns, or not at all.

    Opening one drops the half of a line that a killed process may have left at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            data = path.read_bytes()
            os.ftruncate(self._fd, data.rfind(b"\n") + 1)

    def append(self, row: Mapping[str, Any]) -> None:
        """Raises MachineError, the file as it was, where the line does not fit on the disk."""
        line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with writing(self.path):
            size = os.fstat(self._fd).st_size
            try:
                written = os.write(self._fd, line)
                if written < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(self._fd, size)
                raise

    def rows(self) -> list[Row]:
        """Raises UserError naming the line that is not a JSON object."""
        return [row for _, row in self._lines()]

    def cut(self, drop: Callable[[Row], bool]) -> int:
        """Truncate at the first row that `drop` is true of; returns how many rows went."""
        lines = list(self._lines())
        first = next((i for i, (_, row) in enumerate(lines) if drop(row)), len(lines))
        if first < len(lines):
            with writing(self.path):
                os.ftruncate(self._fd, lines[first][0])
        return len(lines) - first

    def sync(self) -> None:
        with writing(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _lines(self) -> Iterator[tuple[int, Row]]:
        """(byte offset, row)"""
        offset = 0
        for number, raw in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            try:
                row = json.loads(raw)
            except ValueError as error:
                raise UserError(f"{self.path}:{number}: not JSON: {error}; remove the line to go on") from None
            yield offset, row
            offset += len(raw)


def plain(value: Any) -> Any:
    """Numpy and jax numbers and arrays as Python ones; what is not finite as None, since JSON has no name for it;
    text such that a file can hold it."""
    match value:
        case str():
            return encodable(value)
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {plain(str(k)): plain(v) for k, v in value.items()}
        case list() | tuple():
            return [plain(v) for v in value]
        case np.generic() | np.ndarray() | jax.Array():
            array = np.asarray(value)
            at_once = array.dtype.kind in "biu" or (array.dtype.kind == "f" and np.isfinite(array).all())
            return array.tolist() if at_once else plain(array.tolist())
    raise TypeError(f"a row of metrics holds numbers, text, lists and mappings; got {type(value).__name__}")


def idle(row: Mapping[str, Any], step: int) -> str:
    """Why a step changed nothing; "" where it may have. A warm-up may begin at a rate of 0."""
    if row["grad_norm"] == 0:
        return "every gradient is zero: nothing is learnt"
    if row["learning_rate"] == 0 and step > 1:
        return ("the learning rate is 0: nothing is learnt; set optim.learning_rate, or optim.total_steps so that the "
                "schedule does not end before the run")  # fmt: skip
    return ""


def scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row, nested names joined by `/`."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


# -------------------------------------------------------------------------------------------------------- TensorBoard


class EventFile:
    """One TensorBoard event file: records of protobuf messages, framed and checksummed as TFRecord files are.

    `purge_from`: earlier files' scalars from this step on are to be forgotten, since a resumed run writes them again.
    """

    def __init__(self, directory: Path, purge_from: int | None = None) -> None:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self.path = directory / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
            self._file = self.path.open("wb", buffering=0)
        self._event(0, _bytes(3, b"brain.Event:2"))
        if purge_from is not None:
            self._event(purge_from, _bytes(7, _varint(1, 1)))  # session_log { status: START }

    def add(self, step: int, values: Sequence[tuple[str, float]]) -> None:
        """Scalars of one step, in one write."""
        each = (_bytes(1, _bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", value)) for tag, value in values)
        self._event(step, _bytes(5, b"".join(each)))

    def close(self) -> None:
        self._file.close()

    def _event(self, step: int, body: bytes) -> None:
        data = b"\x09" + struct.pack("<d", time.time()) + _varint(2, step) + body
        length = struct.pack("<Q", len(data))
        with writing(self.path):
            self._file.write(length + _masked_crc(length) + data + _masked_crc(data))


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(value)) + value


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated and offset as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


# --------------------------------------------------------------------------------------------------------- utilisation


def flops_per_token(model: ModelConfig, length: int) -> float:
    """Floating-point operations to train on one token: 6 per active parameter that is multiplied with, and the causal
    attention of a sequence of `length` tokens. Recomputation is not counted (it is not useful work)."""
    matrices = parameter_counts(model).active - (0 if model.tied_head else model.vocab_size * model.dim)
    attention = 6 * model.num_layers * model.num_heads * model.head_dim * length
    return 6.0 * matrices + attention


def measured_peak(dtype: str = "float32", size: int = 1024) -> float:
    """Operations per second of one device in a square matrix product, the best of a few: about a tenth of a second."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    product(a, a).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def expert_row(stats: moe.RouterStats | None, *, replayed: bool = False) -> dict[str, Any] | None:
    """A row of moe.jsonl (on the host), None for a dense model: `used` [L][E] tokens that each expert of each sparse
    layer got, and with `replayed` routes `agreement` [L], the share of tokens the live router would send the same way.
    """
    if stats is None:
        return None
    row: dict[str, Any] = {"used": np.rint(np.asarray(stats.used_E)).astype(int).tolist()}
    if replayed:
        row["agreement"] = np.round(np.asarray(moe.router_metrics(stats)["agreement"], np.float64), 5).tolist()
    return row


def router_row(stats: moe.RouterStats, *, replayed: bool = False) -> dict[str, float]:
    """Worst or mean over the sparse layers (on the host); with `replayed` routes, `agreement` with them."""
    read = {name: np.asarray(value) for name, value in moe.router_metrics(stats).items()}
    row = {
        "max_violation": float(read["max_violation"].max()),
        "effective_experts": float(read["effective_experts"].min()),
        "router_entropy": float(read["router_entropy"].mean()),
        "dead_experts": int((np.asarray(stats.used_E) == 0).sum()),
    }
    return row | ({"agreement": float(read["agreement"].mean())} if replayed else {})
