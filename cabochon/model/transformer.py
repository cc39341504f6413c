"""The policy: a decoder-only transformer in Flax NNX, layers stacked per repeating group and scanned.

Legend: B rows, T new tokens, S cache slots, D model, V vocab, K kv heads, H head dim, A layers, L sparse layers,
C experts per token. Outside this module the parameters are a plain nested dict of arrays (`Params`); the tree is
written out in docs/model.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from cabochon.errors import UserError
from cabochon.model import value
from cabochon.model.config import LayerKind, ModelConfig
from cabochon.model.dispatch import Dispatch
from cabochon.model.layers import Attention, Mlp, RMSNorm, Stack, may_attend, param, rope_tables
from cabochon.model.moe import Moe, RouterStats
from cabochon.parallel import keep_rows

Params = dict[str, Any]
"""Nested dict of arrays, f32 masters."""

Remat = Literal["none", "full", "dots"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which matrices get a low-rank addition: `targets` among qkv, out, gate_up, down (not experts)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def of(self, name: str) -> tuple[int, float] | None:
        return (self.rank, self.alpha) if name in self.targets else None


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How to compute, as opposed to what: changes speed and memory, never the function."""

    remat: Remat = "none"
    dispatch: Dispatch = "auto"
    mesh: Mesh | None = None


class Cache(NamedTuple):
    """Keys and values of tokens already seen; row b holds positions [0, length_b)."""

    k_ABSKH: Array
    v_ABSKH: Array
    length_B: Array


class ModelOutput(NamedTuple):
    """hidden_BTD is after the final norm; logits come from `logits`, so that a loss can take them in chunks."""

    hidden_BTD: Array
    routes_BTLC: Array | None
    stats: RouterStats | None
    cache: Cache | None


class Block(nnx.Module):
    """One layer: attention and a feed-forward, each behind a norm and a residual."""

    def __init__(self, cfg: ModelConfig, kind: LayerKind, rngs: nnx.Rngs, stack: Stack, lora: Lora | None):
        def low(name: str) -> tuple[int, float] | None:
            return lora.of(name) if lora else None

        self.attn_norm = RMSNorm((cfg.dim,), ("embed",), cfg.norm_eps, rngs, stack)
        self.attn = Attention(cfg, rngs, stack, low("qkv"), low("out"))
        self.mlp_norm = RMSNorm((cfg.dim,), ("embed",), cfg.norm_eps, rngs, stack)
        if kind == "moe":
            assert cfg.moe is not None
            self.moe = Moe(cfg, cfg.moe, rngs, stack, low("gate_up"), low("down"))
        else:
            self.mlp = Mlp(cfg, cfg.ffn_dim, rngs, stack, low("gate_up"), low("down"))
        self.kind = kind


class Transformer(nnx.Module):
    """Holds the parameters; `forward` is the function."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, lora: Lora | None = None):
        self.embed = nnx.Dict(table=param(rngs, (), (cfg.vocab_size, cfg.dim), ("vocab", "embed"), 0.02))
        self.blocks = nnx.Dict(
            {
                str(g): nnx.Dict({str(p): Block(cfg, kind, rngs, (n,), lora) for p, kind in enumerate(pattern)})
                for g, (pattern, n) in enumerate(cfg.groups)
            }
        )
        self.final_norm = RMSNorm((cfg.dim,), ("embed",), cfg.norm_eps, rngs)
        if not cfg.tied_head:
            self.head = nnx.Dict(w=param(rngs, (), (cfg.dim, cfg.vocab_size), ("embed", "vocab"), cfg.dim**-0.5))


@lru_cache(maxsize=32)
def _structure(cfg: ModelConfig, lora: Lora | None) -> tuple[nnx.GraphDef, nnx.State]:
    """The module's graph and its abstract state; built once per shape."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(cfg, nnx.Rngs(0), lora)))


def init(cfg: ModelConfig, key: Array, lora: Lora | None = None) -> Params:
    """Fresh f32 parameters from a typed PRNG key."""
    return nnx.to_pure_dict(nnx.state(Transformer(cfg, nnx.Rngs(params=key), lora)))


def abstract(cfg: ModelConfig, lora: Lora | None = None) -> Params:
    """The tree with `jax.ShapeDtypeStruct` leaves."""
    return nnx.to_pure_dict(_structure(cfg, lora)[1])


def logical_axes(cfg: ModelConfig, lora: Lora | None = None) -> Params:
    """The tree with, for each array, the logical name of each dim (see `cabochon.parallel`)."""
    state = _structure(cfg, lora)[1]
    return nnx.to_pure_dict(
        jax.tree.map(lambda v: v.replace(v.axes), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    )


def _module(cfg: ModelConfig, params: Mapping[str, Any], lora: Lora | None) -> Transformer:
    graph, state = _structure(cfg, lora)
    state = jax.tree.map(lambda v: v, state)
    nnx.replace_by_pure_dict(state, value.without_head(params))
    return nnx.merge(graph, state)


def init_cache(cfg: ModelConfig, rows: int, slots: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty cache for `rows` sequences of up to `slots` tokens."""
    shape = (cfg.num_layers, rows, slots, cfg.num_kv_heads, cfg.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32))


def logits(cfg: ModelConfig, params: Mapping[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """f32 logits of final hidden states."""
    w = params["embed"]["table"].T if cfg.tied_head else params["head"]["w"]
    return jnp.dot(hidden, w.astype(hidden.dtype), preferred_element_type=jnp.float32)


def cast(params: Params, dtype: DTypeLike) -> Params:
    """Parameters in a compute dtype; the router and a value head stay f32."""

    def one(path: tuple[Any, ...], x: Any) -> Any:
        kept = any(getattr(p, "key", None) in ("router", value.KEY) for p in path)
        return x if kept else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


class _Carry(NamedTuple):
    x_BTD: Array
    k_ABSKH: Array | None
    v_ABSKH: Array | None


class _Inputs(NamedTuple):
    """What every layer reads."""

    cos: Array
    sin: Array
    q_position_BT: Array
    k_position_BS: Array
    q_segment_BT: Array
    k_segment_BS: Array
    q_prefix_BT: Array | None


def _layer(
    block: Block, carry: _Carry, shared: _Inputs, layer: Array, window: Array, replay_BTC: Array | None, run: Runtime
) -> tuple[_Carry, Array | None, RouterStats | None]:
    """One block; with a cache, keys and values are written at the tokens' positions and read back whole."""
    x, k_all, v_all = carry
    q, k, v = block.attn.project(block.attn_norm(x), shared.cos, shared.sin)
    if k_all is not None and v_all is not None:
        row_B1 = jnp.arange(x.shape[0])[:, None]
        k_all = k_all.at[layer, row_B1, shared.q_position_BT].set(k.astype(k_all.dtype), mode="drop")
        v_all = v_all.at[layer, row_B1, shared.q_position_BT].set(v.astype(v_all.dtype), mode="drop")
        k, v = k_all[layer].astype(q.dtype), v_all[layer].astype(q.dtype)
    allow = may_attend(
        shared.q_position_BT, shared.k_position_BS, shared.q_segment_BT, shared.k_segment_BS, window,
        shared.q_prefix_BT,
    )  # fmt: skip
    x = keep_rows(x + block.attn.attend(q, k, v, allow, run.mesh), run.mesh)
    h = block.mlp_norm(x)
    if block.kind == "dense":
        return _Carry(keep_rows(x + block.mlp(h), run.mesh), k_all, v_all), None, None
    y, routes, stats = block.moe(h, shared.q_segment_BT != 0, replay_BTC, run.dispatch, run.mesh)
    return _Carry(x + y, k_all, v_all), routes, stats


def _group(
    blocks: nnx.Dict,
    carry: _Carry,
    shared: _Inputs,
    first: int,
    n: int,
    windows: Array,
    replay: Array | None,
    run: Runtime,
) -> tuple[_Carry, Array | None, RouterStats | None]:
    """Scan one group of `n` repeats of a pattern. `replay` is [n, sparse layers in the pattern, B, T, C]."""
    split = {p: nnx.split(block) for p, block in blocks.items()}

    def body(carry: _Carry, xs: tuple) -> tuple[_Carry, tuple[list[Array], list[RouterStats]]]:
        i, states, windows_P, replay_P = xs
        routes: list[Array] = []
        stats: list[RouterStats] = []
        for p, (graph, _) in enumerate(split.values()):
            block = nnx.merge(graph, states[str(p)])
            replayed = replay_P[len(routes)] if replay_P is not None and block.kind == "moe" else None
            carry, r, s = _layer(block, carry, shared, first + i * len(split) + p, windows_P[p], replayed, run)
            if s is not None and r is not None:
                routes.append(r)
                stats.append(s)
        return carry, (routes, stats)

    if run.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if run.remat == "dots" else None
        body = jax.checkpoint(body, policy=policy)
    states = {p: state for p, (_, state) in split.items()}
    xs = (jnp.arange(n), states, windows.reshape(n, len(split)), replay)
    carry, (routes, stats) = jax.lax.scan(body, carry, xs)
    if not routes:
        return carry, None, None

    def layers_first(*parts: Array) -> Array:  # per sparse position [n, ...] -> [n * positions, ...] in layer order
        return jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:])

    return carry, layers_first(*routes), jax.tree.map(layers_first, *stats)


def forward(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    *,
    prefix_BT: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    routes_BTLC: Int[Array, "B T L C"] | None = None,
    lora: Lora | None = None,
    run: Runtime = Runtime(),
) -> ModelOutput:
    """Hidden states, the routes used, router statistics and the cache after these tokens.

    Without a cache, rows may hold several packed sequences: `segments_BT` numbers them from 1 (0 is padding) and
    `positions_BT` restarts in each; both default to one full sequence per row. `prefix_BT` names the segment of the row
    that a token's own segment continues (0: none), so that several can share one prompt. With a cache the tokens follow
    what is in it, positions are derived, and segment 0 marks padding at the end of a row, which the next call
    overwrites; the caller keeps length + T within its slots (what lies past them is not stored).
    `routes_BTLC` replays recorded routes (-1: not recorded, route naturally).
    """
    B, T = tokens_BT.shape
    segments_BT = jnp.ones((B, T), jnp.int32) if segments_BT is None else segments_BT
    steps_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if cache is not None:
        positions_BT = cache.length_B[:, None] + steps_BT
        S = cache.k_ABSKH.shape[2]
        if T > S:
            raise UserError(f"{T} tokens do not fit a cache of {S} slots")
        k_position_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        k_segment_BS = jnp.ones((B, S), jnp.int32)
    else:
        positions_BT = steps_BT if positions_BT is None else positions_BT
        k_position_BS, k_segment_BS = positions_BT, segments_BT
    model = _module(cfg, params, lora)
    x_BTD = keep_rows(model.embed["table"][...][tokens_BT], run.mesh)
    cos, sin = rope_tables(cfg, positions_BT)
    shared = _Inputs(cos, sin, positions_BT, k_position_BS, segments_BT, k_segment_BS, prefix_BT)
    carry = _Carry(x_BTD, cache.k_ABSKH if cache else None, cache.v_ABSKH if cache else None)
    replay_LBTC = None if routes_BTLC is None else jnp.moveaxis(routes_BTLC, 2, 0)
    first, sparse, routes, stats = 0, 0, [], []
    for g, (pattern, n) in enumerate(cfg.groups):
        m = pattern.count("moe")
        replay = None
        if replay_LBTC is not None and m:
            replay = replay_LBTC[sparse : sparse + n * m].reshape(n, m, *replay_LBTC.shape[1:])
        windows = jnp.asarray(cfg.windows[first : first + n * len(pattern)], jnp.int32)
        carry, r, s = _group(model.blocks[str(g)], carry, shared, first, n, windows, replay, run)
        if r is not None:
            routes.append(r)
            stats.append(s)
        first, sparse = first + n * len(pattern), sparse + n * m
    after = None
    if cache is not None:
        assert carry.k_ABSKH is not None
        assert carry.v_ABSKH is not None
        after = Cache(carry.k_ABSKH, carry.v_ABSKH, cache.length_B + (segments_BT != 0).sum(-1, dtype=jnp.int32))
    return ModelOutput(
        hidden_BTD=model.final_norm(carry.x_BTD),
        routes_BTLC=jnp.moveaxis(jnp.concatenate(routes), 0, 2) if routes else None,
        stats=jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats) if stats else None,
        cache=after,
    )
