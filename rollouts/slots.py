"""The slots: one static-shape pytree on device that holds every running sequence, and the row a request becomes.

Legend: B slots, S cache positions, K kv heads, H head dim, M entries of a short list, A spellings of a tag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array

from cabochon import parallel, target
from cabochon.config import MeshConfig
from cabochon.errors import UserError
from cabochon.model import native
from cabochon.model.config import ModelConfig
from cabochon.ops import Leaf
from cabochon.rollouts import thinking
from cabochon.rollouts.filters import Knobs
from cabochon.types import Sampling

STOP_IDS = 16
BIASES = 300
"""entries per request, as much as OpenAI's API takes"""


@dataclass(frozen=True, kw_only=True)
class SlotConfig:
    """The static shapes of an engine: they decide what is compiled and, to the last bit, what is computed.

    The same request gives the same bits in every engine of the same SlotConfig. With other shapes log-probs may differ
    in their last bits; tokens then too, where a draw falls on the edge between two.
    """

    slots: int = 8
    """sequences decoded together; at 1 a matmul is a matrix-vector product, which rounds otherwise"""
    length: int = 1024
    """prompt and completion of one sequence, in tokens"""
    steps: int = 8
    """tokens per dispatch; the host looks at what was drawn this often"""
    chunks: tuple[int, ...] = (64, 512)
    """lengths in which prompts are read; each is compiled once, at first use"""
    block: int = 128
    """cache positions attended to at once; the attention's cost follows the longest running sequence in such steps"""
    dtype: str = "float32"
    """of the weights; of the activations too, but for the native kernels, whose activations and sums are f32"""
    cache_dtype: str = "float32"
    kernels: Literal["auto", "native", "xla"] = "auto"
    """`native`: C++ for CPUs with AVX-512 (`cabochon.model.native`); `auto`: where this machine can"""
    reuse: int = 0
    """prompt tokens that a request must share with a sequence that ended lately for its keys and values to be taken
    from there instead of being computed (multi-turn); 0: never. What is taken agrees with a fresh reading to 1e-5, not
    to the last bit, so where it is on, company can move a draw that falls on the edge between two tokens"""
    tensor: int = 1
    """devices that share one engine: each holds its part of the heads, feed-forward columns and vocabulary"""

    @property
    def native(self) -> bool:
        """Does this engine run the native kernels? Raises UserError where they are asked for and cannot run."""
        if self.kernels == "native" and (why := native.missing()):
            raise UserError(f"kernels=native cannot run here: {why}; expected xla or auto")
        return self.kernels != "xla" and self.tensor == 1 and not native.missing()

    @property
    def mesh(self) -> Mesh | None:
        """Of the first `tensor` devices; None for one. Raises UserError where there are fewer."""
        if self.tensor == 1:
            return None
        devices = target.devices()
        if len(devices) < self.tensor:
            raise UserError(f"tensor={self.tensor} needs as many devices for one engine, here are {len(devices)}")
        return parallel.make_mesh(MeshConfig(fsdp=1, tensor=self.tensor), list(devices[: self.tensor]))

    @property
    def positions(self) -> int:
        """S: `length` rounded up to whole blocks."""
        return -(-self.length // self.block) * self.block

    @property
    def prefix_positions(self) -> int:
        """Of the buffer prompts are read into: padding of the last chunk may reach past the end."""
        return -(-(self.length + max(self.chunks)) // self.block) * self.block


class Row(NamedTuple):
    """What a slot knows of its sequence. With leaves [B, ...] it is all slots; without B, one about to start."""

    token_B: Leaf
    """int32, the token whose forward pass is next"""
    position_B: Leaf
    """int32, its position"""
    live_B: Leaf
    left_B: Leaf
    """int32, tokens it may still draw"""
    key_B2: Leaf
    """uint32, its seed and sample; the draw at position p uses fold_in(key, p)"""
    stop_BM: Leaf
    """int32, -1 for none"""
    knobs: Knobs
    thought: thinking.Thought


class Slots(NamedTuple):
    """Everything that decoding changes, donated from call to call. Keys and values: an array [B, K, S, H] a layer.

    A bf16 cache is held as the uint16 of its bits: XLA on CPU would turn the whole of it into f32 and back to write one
    token (62 of 84 ms a step).
    """

    k: tuple[Leaf, ...]
    v: tuple[Leaf, ...]
    row: Row


class Prefix(NamedTuple):
    """Keys and values of one prompt, shared by the samples that continue it: [1, K, S', H] a layer."""

    k: tuple[Leaf, ...]
    v: tuple[Leaf, ...]


def empty_slots(model: ModelConfig, cfg: SlotConfig) -> Slots:
    """No sequence running."""
    row = make_row(
        token=0, position=0, left=0, key=np.zeros(2, np.uint32), stop_ids=(),
        knobs=make_knobs(Sampling(), model.vocab_size), thought=thinking.idle(),
    )._replace(live_B=np.bool_(False))  # fmt: skip
    rows = jax.tree.map(lambda x: _put(np.repeat(np.asarray(x)[None], cfg.slots, 0), cfg), row)
    return Slots(*_cache(model, cfg, cfg.slots, cfg.positions), rows)


def empty_prefix(model: ModelConfig, cfg: SlotConfig) -> Prefix:
    return Prefix(*_cache(model, cfg, 1, cfg.prefix_positions))


def _cache(model: ModelConfig, cfg: SlotConfig, rows: int, positions: int) -> tuple[tuple, tuple]:
    shape = (rows, model.num_kv_heads, positions, model.head_dim)
    held = "uint16" if cfg.cache_dtype == "bfloat16" else cfg.cache_dtype
    zeros = np.zeros(shape, jnp.dtype(held))  # copied to the device: nothing to compile
    k, v = (tuple(_put(zeros, cfg) for _ in range(model.num_layers)) for _ in "kv")
    return k, v


def _put(x: np.ndarray, cfg: SlotConfig) -> jax.Array:
    place = cache_sharding(cfg.mesh, x)
    return jnp.array(x) if place is None else jax.device_put(x, place)


def cache_sharding(mesh: Mesh | None, x: Leaf) -> NamedSharding | None:
    """Keys and values [B, K, S, H] are split by kv heads where the devices divide them; all else is everywhere."""
    if mesh is None:
        return None
    by_head = x.ndim == 4 and x.shape[1] % mesh.shape["tensor"] == 0
    return NamedSharding(mesh, Spec(None, "tensor") if by_head else Spec())


def make_row(
    *,
    token: int,
    position: int,
    left: int,
    key: np.ndarray,
    stop_ids: tuple[int, ...],
    knobs: Knobs,
    thought: thinking.Thought,
) -> Row:
    """One sequence as it enters its slot (numpy leaves, no B)."""
    stop = np.full(STOP_IDS, -1, np.int32)
    stop[: len(stop_ids)] = stop_ids
    return Row(
        token_B=np.int32(token),
        position_B=np.int32(position),
        live_B=np.bool_(True),
        left_B=np.int32(left),
        key_B2=key,
        stop_BM=stop,
        knobs=knobs,
        thought=thought,
    )


def make_knobs(sampling: Sampling, vocab: int) -> Knobs:
    """How one sequence samples (numpy leaves, no B). Raises OverflowError for what the device's numbers cannot hold."""
    bias_id, bias = np.full(BIASES, vocab, np.int32), np.zeros(BIASES, np.float32)
    bias_id[: len(sampling.logit_bias)] = list(sampling.logit_bias)
    bias[: len(sampling.logit_bias)] = list(sampling.logit_bias.values())
    return Knobs(
        np.float32(sampling.temperature), np.int32(sampling.top_k), np.float32(sampling.top_p),
        np.float32(sampling.min_p), bias_id, bias,
    )  # fmt: skip


def seed_words(seed: int) -> np.ndarray:
    """[2] uint32: the seed modulo 2^64, upper half first."""
    return np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def sample_keys(seed_2: Array, first: Array, count: int) -> Array:
    """[count, 2] uint32: fold_in(key(seed), sample) of the samples from `first` on."""
    key = jax.random.wrap_key_data(seed_2)
    return jax.vmap(lambda n: jax.random.key_data(jax.random.fold_in(key, n)))(first + jnp.arange(count))
