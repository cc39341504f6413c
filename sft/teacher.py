"""What a teacher thinks of tokens: the likeliest k for each place, asked at each step or kept on disk.

The cache is a directory per (teacher, data), of shards of SHARD examples each:

    DIR/KEY/00000.shard    safetensors bytes, then their SHA-256
        tokens [E]         trained tokens of each example
        counts [N]         kept tokens of each trained token
        ids [M], logp [M]  of all of them: u16 where the vocabulary allows, and f16

A shard is written whole or not at all and checked when it is opened, so a build that was killed goes on where it was,
and a damaged shard is made again. Legend: B rows, T tokens, K kept tokens; E examples, N trained tokens, M entries.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from cabochon.batch import Batch
from cabochon.config import PrecisionConfig
from cabochon.files import sync, writing
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig
from cabochon.sft.config import TeacherConfig
from cabochon.sft.data import Counts, Encoded, Feed, Split

SHARD = 256
"""examples"""
DIGEST = 32
FORMAT = "1"
KINDS = {"uint16": "U16", "uint32": "U32", "float16": "F16"}
"""numpy's names and safetensors'"""


class Top(NamedTuple):
    """Likeliest first; -1 and 0 where none is kept."""

    ids: Any
    """[..., K] int32"""
    logp: Any
    """[..., K] f32 nats, of the full distribution"""


Score = Callable[[Batch], Top]
"""[B, T, K] for the places that are trained, nothing elsewhere"""


def scorer(
    model: ModelConfig, params: tf.Params, cfg: TeacherConfig, precision: PrecisionConfig, *,
    vocab: int, chunk: int = 0, mesh: Mesh | None = None,
) -> Score:  # fmt: skip
    """The teacher's forward pass. Tokens from `vocab` on (padding of its embedding) are never kept.

    `chunk`: about how many tokens' logits exist at one time, 0 for all.
    """
    compute = jnp.dtype(precision.compute)

    def likeliest(h: Array, cast: tf.Params) -> Top:
        z = tf.logits(model, cast, h)
        logp, ids = jax.lax.top_k(z[..., :vocab], min(cfg.top_k, vocab))
        return Top(ids, logp - jax.nn.logsumexp(z, axis=-1, keepdims=True))

    def score(params: tf.Params, batch: Batch) -> Top:
        cast = tf.cast(params, compute)
        out = tf.forward(model, cast, batch.tokens_BT, batch.position_BT, batch.segment_BT, run=tf.Runtime(mesh=mesh))
        before_BTD = jnp.roll(out.hidden_BTD, 1, axis=1)
        B, T, D = before_BTD.shape
        step = min(T, max(1, chunk // B)) if chunk else T
        n = -(-T // step)
        parts = jnp.pad(before_BTD, ((0, 0), (0, n * step - T), (0, 0))).reshape(B, n, step, D).swapaxes(0, 1)
        ids, logp = jax.lax.map(lambda h: likeliest(h, cast), parts)
        ids, logp = (x.swapaxes(0, 1).reshape(B, n * step, -1)[:, :T] for x in (ids, logp))
        mass_before = jnp.cumsum(jnp.exp(logp), axis=-1) - jnp.exp(logp)
        kept = (mass_before < cfg.mass) & (batch.mask_BT > 0)[..., None]
        return Top(jnp.where(kept, ids, -1), jnp.where(kept, logp, 0.0))

    precise = "float32" if precision.compute == "float32" else "default"
    jitted = jax.jit(score)

    def call(batch: Batch) -> Top:
        with jax.default_matmul_precision(precise):
            return jitted(params, batch)

    return call


# --------------------------------------------------------------------------------------------------------------- cache


def cache_key(teacher: str, cfg: TeacherConfig, precision: PrecisionConfig, examples: Sequence[Encoded]) -> str:
    """64 hex digits over everything that decides what is kept: the teacher's content hash, what is kept of it, the
    examples' tokens and which of them are trained."""
    digest = hashlib.sha256(json.dumps([FORMAT, SHARD, teacher, cfg.top_k, cfg.mass, precision.compute]).encode())
    for example in examples:
        digest.update(len(example.ids).to_bytes(8, "little"))
        digest.update(example.ids.astype("<i4").tobytes() + example.mask.astype(np.uint8).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One file, read where it lies."""

    counts: np.ndarray
    ids: np.ndarray
    logp: np.ndarray
    token_start: np.ndarray
    """[E + 1]"""
    entry_start: np.ndarray
    """[E + 1]"""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a cache takes."""

    tokens: int = 0
    entries: int = 0
    bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(tokens=self.tokens + other.tokens, entries=self.entries + other.entries,
                    bytes=self.bytes + other.bytes)  # fmt: skip


class Cache:
    """The teacher's log-probs of a list of examples.

    Example: `cache = Cache.build(place, examples, 64, batches, score)[0]; cache.read(examples[3:5])`.
    """

    def __init__(self, shards: Sequence[Shard], examples: Sequence[Encoded], top_k: int):
        self.shards, self.top_k = shards, top_k
        self._index = {example.where: i for i, example in enumerate(examples)}

    @classmethod
    def build(
        cls, place: Path, examples: Sequence[Encoded], cfg: TeacherConfig, feed: Feed, score: Callable[[], Score],
        told: Callable[[str], None] = lambda line: None,
    ) -> tuple[Cache, Size, int]:  # fmt: skip
        """Open what is in `place`, making what is missing or damaged there; (cache, its size, shards made).

        `feed` gives the shape of batches; `score` is called once, when the teacher is needed. Raises MachineError
        where the disk is full, with every shard that was finished kept.
        """
        shards, size, made = [], Size(), 0
        ask: Score | None = None
        for start in range(0, len(examples), SHARD):
            file, some = place / f"{start // SHARD:05d}.shard", examples[start : start + SHARD]
            shard, why = read_shard(file)
            if shard is None:
                if why:
                    told(f"{file}: {why}; made again")
                ask = ask or score()
                write_shard(file, encode_shard(some, cfg, feed, ask))
                shard, why = read_shard(file)
                assert shard is not None, why
                made += 1
            shards.append(shard)
            size += Size(tokens=len(shard.counts), entries=len(shard.ids), bytes=file.stat().st_size)
        return cls(shards, examples, cfg.top_k), size, made

    def read(self, examples: Sequence[Encoded]) -> Top:
        """[n, K] for their trained tokens, in order."""
        parts = [self._one(self._index[example.where]) for example in examples]
        counts, ids, logp = (np.concatenate(column) for column in zip(*parts, strict=True))
        kept = np.arange(self.top_k) < counts[:, None]
        out = Top(np.full(kept.shape, -1, np.int32), np.zeros(kept.shape, np.float32))
        out.ids[kept], out.logp[kept] = ids, logp
        return out

    def _one(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shard, i = self.shards[i // SHARD], i % SHARD
        entries = slice(shard.entry_start[i], shard.entry_start[i + 1])
        return shard.counts[shard.token_start[i] : shard.token_start[i + 1]], shard.ids[entries], shard.logp[entries]


def encode_shard(examples: Sequence[Encoded], cfg: TeacherConfig, feed: Feed, score: Score) -> bytes:
    """The teacher's answers for these examples, as safetensors."""
    split = Split(examples=list(examples), sizes=(len(examples),), weights=(1.0,), counts=Counts())
    here = replace(feed, split=split, packing=True, _plan={})
    found: dict[str, Top] = {}
    for batch, some in here.all_with_examples():
        top = jax.device_get(score(batch))
        trained = batch.mask_BT > 0
        ends = np.cumsum([int(example.mask.sum()) for example in some])[:-1]
        for example, ids, logp in zip(some, *(np.split(x[trained], ends) for x in top), strict=True):
            found[example.where] = Top(ids, logp)
    ids, logp = (np.concatenate([getattr(found[e.where], name) for e in examples]) for name in ("ids", "logp"))
    kept = ids >= 0
    arrays = {
        "tokens": np.array([int(e.mask.sum()) for e in examples], np.uint32),
        "counts": kept.sum(-1).astype(np.uint16),
        "ids": ids[kept].astype(np.uint16 if ids.max(initial=0) < 1 << 16 else np.uint32),
        "logp": logp[kept].astype(np.float16),
    }
    return pack_arrays(arrays)


def pack_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """In the safetensors format: the header's length, the header, the arrays one after the other."""
    header, end = {}, 0
    for name, x in arrays.items():
        header[name] = {"dtype": KINDS[x.dtype.name], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(x.tobytes() for x in arrays.values())])


def write_shard(file: Path, data: bytes) -> None:
    """The bytes and their SHA-256, whole or not at all. Raises MachineError."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.partial")  # two runs may make the same one
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as out:
                out.write(data + hashlib.sha256(data).digest())
                out.flush()
                os.fsync(out.fileno())
            draft.rename(file)
            sync(file.parent)
        finally:
            draft.unlink(missing_ok=True)


def read_shard(file: Path) -> tuple[Shard | None, str]:
    """The shard, or None and why: an empty reason where there is no file."""
    if not file.exists() or file.stat().st_size <= DIGEST:
        return None, "too short" if file.exists() else ""
    raw = np.memmap(file, np.uint8, mode="r")
    data = raw[:-DIGEST]
    if hashlib.sha256(data.data).digest() != raw[-DIGEST:].tobytes():
        return None, "its checksum differs from what was written"
    length = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + length].tobytes())

    def array(name: str, dtype: type[np.generic]) -> np.ndarray:
        begin, end = header[name]["data_offsets"]
        return np.frombuffer(data, dtype, (end - begin) // np.dtype(dtype).itemsize, 8 + length + begin)

    counts = array("counts", np.uint16)
    token_start = np.concatenate([[0], np.cumsum(array("tokens", np.uint32))]).astype(np.int64)
    entries = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    ids = array("ids", np.uint16 if header["ids"]["dtype"] == "U16" else np.uint32)
    shard = Shard(counts=counts, ids=ids, logp=array("logp", np.float16), token_start=token_start,
                  entry_start=entries[token_start])  # fmt: skip
    return shard, ""
