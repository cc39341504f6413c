"""The compiled programs of the sampler: read a piece of a prompt, start a slot, take it back, decode several tokens.

Legend: B slots, T tokens of a piece, S cache positions, D model, V vocab, K kv heads, G queries of each, H head dim,
L sparse layers, C experts per token, N decode steps.

Everything has a static shape, so a program is compiled once (a prefill once per chunk length). A row's arithmetic does
not see its neighbours: the attention goes over the cache in blocks of fixed size, as many as the longest running row
needs, and a block past a row's own end leaves its running sums as they are, bit for bit. The layers are unrolled and
own their weights: a scan would copy each layer's slice out of the stack at every step, and reading is what decode waits
for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from cabochon.model import native
from cabochon.model import transformer as tf
from cabochon.model.config import LayerKind, ModelConfig
from cabochon.model.layers import RMSNorm, rope_tables
from cabochon.rollouts import thinking
from cabochon.rollouts.engine_params import EngineParams
from cabochon.rollouts.filters import draw
from cabochon.rollouts.slots import Prefix, Row, SlotConfig, Slots, cache_sharding, sample_keys

_LOW = -1e30


class Steps(NamedTuple):
    """What one dispatch drew: [N, B, ...], of which the first `taken` steps happened."""

    token_NB: Array
    logp_NB: Array
    raw_NB: Array
    sampled_NB: Array
    """bool, False where the token was forced"""
    live_NB: Array
    """bool: this slot drew a token at this step"""
    phase_NB: Array
    """int32, of thinking, after the token"""
    routes_NBLC: Array
    """int32, of the forward pass that led to the token, so of the token before it"""
    taken: Array


class Programs(NamedTuple):
    """The jitted functions and how often each was traced, by name: a count that grows in steady state is a bug."""

    prefill: jax.stages.Wrapped
    start: Callable[..., Slots]
    recall: Callable[..., Prefix]
    decode: jax.stages.Wrapped
    traces: Counter[str]


@lru_cache(maxsize=16)
def programs(model: ModelConfig, cfg: SlotConfig) -> Programs:
    """Shared by all samplers of one shape in this process."""
    traces: Counter[str] = Counter()

    def counted(name: str, fn: Callable) -> Callable:
        def traced(*args: Any) -> Any:
            traces[name] += 1
            return _in_place(cfg, fn(model, cfg, *args))

        return traced

    return Programs(
        prefill=jax.jit(counted("prefill", _prefill), donate_argnums=1),
        start=jax.jit(counted("start", _start), donate_argnums=0),
        recall=jax.jit(counted("recall", _recall), donate_argnums=0),
        decode=jax.jit(counted("decode", _decode), donate_argnums=1),
        traces=traces,
    )


def _in_place(cfg: SlotConfig, out: Any) -> Any:
    """What a program returns lies where it lay when it was given, so that the next call is the same program."""
    if (mesh := cfg.mesh) is None:
        return out
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, cache_sharding(mesh, x)), out)


# -- forward -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _structure(model: ModelConfig, kind: LayerKind | None) -> tuple[nnx.GraphDef, nnx.State]:
    """A block of the policy, or its last norm for None, without its arrays."""
    if kind is None:
        return nnx.split(nnx.eval_shape(lambda: RMSNorm((model.dim,), ("embed",), model.norm_eps, nnx.Rngs(0))))
    return nnx.split(nnx.eval_shape(lambda: tf.Block(model, kind, nnx.Rngs(0), (), None)))


def bound(model: ModelConfig, kind: LayerKind | None, params: Mapping[str, Any]) -> Any:
    """The module over these arrays."""
    graph, state = _structure(model, kind)
    state = jax.tree.map(lambda v: v, state)
    nnx.replace_by_pure_dict(state, dict(params))
    return nnx.merge(graph, state)


def _use_native(block: tf.Block, live_BT: Array) -> None:
    """Let the block's matmuls run natively, on the live rows."""
    feeds = [block.mlp] if block.kind == "dense" else [block.moe.shared] if block.moe.cfg.shared_ffn_dim else []
    for one in (block.attn.qkv, block.attn.out, *(m for f in feeds for m in (f.gate_up, f.down))):
        one.multiply = partial(native.linear, live_BT, one.outs)


def _attend(
    scale: float, q_BTKGH: Array, k_BKSH: Array, v_BKSH: Array, position_BT: Array, window: int, block: int
) -> Array:
    """Attention over what stands in the cache up to each token, by blocks with a running softmax; [B, T, K, G, H]."""
    B, T, K, G, H = q_BTKGH.shape
    S = k_BKSH.shape[2]
    q = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)

    def piece(cache: Array, i: Array | int) -> Array:  # a slice is a copy: a cache of one block is taken whole
        taken = cache if block == S else jax.lax.dynamic_slice_in_dim(cache, i * block, block, axis=2)
        return (taken.view(jnp.bfloat16) if taken.dtype == jnp.uint16 else taken).astype(q.dtype)

    def part(i: Array | int, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        most, total, out = sums
        k, v = piece(k_BKSH, i), piece(v_BKSH, i)
        back_BTs = position_BT[:, :, None] - (i * block + jnp.arange(block, dtype=jnp.int32))
        seen_BTs = (back_BTs >= 0) & (back_BTs < (window or 2**30))
        seen = jnp.broadcast_to(seen_BTs[:, None, None], (B, 1, G, T, block)).reshape(B, 1, G * T, block)
        score = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32) * scale
        new = jnp.maximum(most, jnp.where(seen, score, _LOW).max(-1))
        weight = jnp.where(seen, jnp.exp(score - new[..., None]), 0.0)
        keep = jnp.exp(most - new)
        value = jnp.einsum("bkqs,bksh->bkqh", weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new, total * keep + weight.sum(-1), out * keep[..., None] + value

    zero = jnp.zeros((B, K, G * T), jnp.float32)
    blocks = jnp.minimum(position_BT.max() // block + 1, S // block)
    sums = zero + _LOW, zero, jnp.zeros((B, K, G * T, H), jnp.float32)
    _, total, out = part(0, sums) if block == S else jax.lax.fori_loop(0, blocks, part, sums)
    out = (out / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


def _forward(
    model: ModelConfig,
    cfg: SlotConfig,
    params: EngineParams,
    token_BT: Array,
    position_BT: Array,
    real_BT: Array,
    cache: tuple[tuple[Array, ...], tuple[Array, ...]],
    write: Callable[[Array, Array], Array],
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...], Array]:
    """(hidden [B,T,D] before the final norm, keys, values, routes [B,T,L,C]). `write(cache, new_BTKH)` stores one."""
    x = params["embed"]["table"][token_BT]
    x = x.astype(jnp.float32) if cfg.native else x
    seen_BT = jnp.where(real_BT, position_BT, 0)
    with jax.ensure_compile_time_eval():  # sines of positions known only later would be taken anew in every layer
        cos, sin = (table[0] for table in rope_tables(model, jnp.arange(cfg.prefix_positions)[None]))
    cos, sin = cos[position_BT], sin[position_BT]
    keys: list[Array] = []
    values: list[Array] = []
    routes: list[Array] = []
    for layer, (kind, window) in enumerate(zip(model.kinds, model.windows, strict=True)):
        b = bound(model, kind, params["layers"][layer])
        if cfg.native:
            _use_native(b, real_BT)
        q, k, v = b.attn.project(b.attn_norm(x), cos, sin)
        keys.append(write(cache[0][layer], k))
        values.append(write(cache[1][layer], v))
        if cfg.native:
            out = native.attend(q, keys[-1], values[-1], seen_BT, real_BT, b.attn.scale, window)
        else:
            out = _attend(b.attn.scale, q, keys[-1], values[-1], seen_BT, window, cfg.block)
        x = x + b.attn.out(out)
        h = b.mlp_norm(x)
        if kind == "dense":
            x = x + b.mlp(h)
        else:
            y, used_BTC, _ = b.moe(h, real_BT, None, "native" if cfg.native else "auto", cfg.mesh)
            x, routes = x + y, [*routes, used_BTC]
    none = jnp.zeros((*token_BT.shape, 0, model.moe.top_k if model.moe else 1), jnp.int32)
    return x, tuple(keys), tuple(values), jnp.stack(routes, 2).astype(jnp.int32) if routes else none


def _held(new: Array, cache: Array) -> Array:
    """New keys or values as the cache holds them."""
    return new.astype(jnp.bfloat16).view(jnp.uint16) if cache.dtype == jnp.uint16 else new.astype(cache.dtype)


def read_chunk(
    model: ModelConfig, cfg: SlotConfig, params: EngineParams, prefix: Prefix, token_T: Array, start: Array, real: Array
) -> tuple[Array, Prefix, Array]:
    """Read a piece of a text: `real` tokens from position `start`, padded to T. Returns hidden [1,T,D] before the final
    norm, the prefix with their keys and values, and routes [1,T,L,C]."""
    step_T = jnp.arange(token_T.shape[0], dtype=jnp.int32)

    def write(cache: Array, new_1TKH: Array) -> Array:
        new = _held(new_1TKH, cache).swapaxes(1, 2)
        return jax.lax.dynamic_update_slice(cache, new, (0, 0, start, 0))

    x_1TD, k, v, routes = _forward(
        model, cfg, params, token_T[None], (start + step_T)[None], (step_T < real)[None], (prefix.k, prefix.v),
        write,
    )  # fmt: skip
    return x_1TD, Prefix(k, v), routes


def _prefill(
    model: ModelConfig, cfg: SlotConfig, params: EngineParams, prefix: Prefix, token_T: Array, start: Array, real: Array
) -> tuple[Prefix, Array]:
    """Read a piece of a prompt. Returns prefix and routes [T,L,C]."""
    _, prefix, routes = read_chunk(model, cfg, params, prefix, token_T, start, real)
    return prefix, routes[0]


def _start(
    model: ModelConfig, cfg: SlotConfig, slots: Slots, prefix: Prefix, slot_N: Array, count: Array, row: Row,
    first: Array,
) -> Slots:  # fmt: skip
    """Put `count` samples of one prompt in slots, the `first` of them and those after it: copy the blocks of the
    prompt's keys and values that are filled, and the row they share but for its key. `slot_N` is padded with slots that
    are none; `row` has the words of the seed in the key's place."""
    blocks = -(-row.position_B // cfg.block)

    def copied(to: Array, source: Array) -> Array:
        def one(i: Array, to: Array) -> Array:
            at = (i % blocks) * cfg.block
            piece = jax.lax.dynamic_slice_in_dim(source, at, cfg.block, axis=2)
            return jax.lax.dynamic_update_slice(to, piece, (slot_N[i // blocks], 0, at, 0))

        return jax.lax.fori_loop(0, count * blocks, one, to)

    keys_N2 = sample_keys(row.key_B2, first, slot_N.shape[0])
    rows = jax.tree.map(lambda all_B, one: all_B.at[slot_N].set(one, mode="drop"), slots.row, row)
    return Slots(
        k=tuple(copied(a, b) for a, b in zip(slots.k, prefix.k, strict=True)),
        v=tuple(copied(a, b) for a, b in zip(slots.v, prefix.v, strict=True)),
        row=rows._replace(key_B2=slots.row.key_B2.at[slot_N].set(keys_N2, mode="drop")),
    )


def _recall(model: ModelConfig, cfg: SlotConfig, prefix: Prefix, slots: Slots, slot: Array) -> Prefix:
    """The keys and values of a slot, back in the buffer that prompts are read into."""

    def copied(to: Array, source: Array) -> Array:
        return jax.lax.dynamic_update_slice(to, jax.lax.dynamic_slice_in_dim(source, slot, 1), (0, 0, 0, 0))

    k, v = (jax.tree.map(copied, to, source) for to, source in ((prefix.k, slots.k), (prefix.v, slots.v)))
    return Prefix(k, v)


# -- decode ------------------------------------------------------------------------------------------------------------


def _decode(
    model: ModelConfig, cfg: SlotConfig, params: EngineParams, slots: Slots, stopped_B: Array, waiting: Array
) -> tuple[Slots, Steps]:
    """Up to `cfg.steps` tokens for every live slot; ends early where none is left, or one is free and work is waiting.

    `stopped_B` are slots whose sequence the host has ended in the meantime.
    """
    slots = slots._replace(row=slots.row._replace(live_B=slots.row.live_B & ~stopped_B))
    sparse, C = len(model.moe_layers), model.moe.top_k if model.moe else 1
    shape = (cfg.steps, cfg.slots)
    out = Steps(
        token_NB=jnp.zeros(shape, jnp.int32),
        logp_NB=jnp.zeros(shape, jnp.float32),
        raw_NB=jnp.zeros(shape, jnp.float32),
        sampled_NB=jnp.zeros(shape, bool),
        live_NB=jnp.zeros(shape, bool),
        phase_NB=jnp.zeros(shape, jnp.int32),
        routes_NBLC=jnp.zeros((*shape, sparse, C), jnp.int32),
        taken=jnp.zeros((), jnp.int32),
    )
    was_B = slots.row.live_B

    def more(carry: tuple[Slots, Steps]) -> Array:
        slots, out = carry
        ended = (was_B & ~slots.row.live_B).any()
        return (out.taken < cfg.steps) & slots.row.live_B.any() & ~(waiting & ended)

    return jax.lax.while_loop(more, partial(_step, model, cfg, params), (slots, out))


def _step(model: ModelConfig, cfg: SlotConfig, params: EngineParams, carry: tuple[Slots, Steps]) -> tuple[Slots, Steps]:
    """One token for every live slot."""
    (k, v, row), out = carry
    every_B = jnp.arange(cfg.slots)

    def write(cache: Array, new_B1KH: Array) -> Array:
        return cache.at[every_B, :, row.position_B].set(_held(new_B1KH[:, 0], cache), mode="drop")

    x_B1D, k, v, routes_B1LC = _forward(
        model, cfg, params, row.token_B[:, None], row.position_B[:, None], row.live_B[:, None], (k, v), write
    )
    x_BD = bound(model, None, params["final_norm"])(x_B1D)[:, 0]
    if cfg.native:
        logits_BV = native.multiply(x_BD, row.live_B, params["head"]["w"], model.vocab_size)
    else:
        logits_BV = tf.logits(model, params, x_BD)
    position_B = row.position_B + 1
    keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(row.key_B2), position_B)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    ban_BM = thinking.banned(row.thought, row.stop_BM, model.vocab_size)
    drawn = draw(logits_BV, row.knobs, ban_BM, uniform_B2, row.live_B)
    forced_B, forced_token_B = thinking.forced_now(row.thought)
    token_B = jnp.where(forced_B, forced_token_B, drawn.token_B)
    sampled_B = row.live_B & ~forced_B
    thought = thinking.after(row.thought, token_B, forced_B)
    i = out.taken
    out = Steps(
        token_NB=out.token_NB.at[i].set(token_B),
        logp_NB=out.logp_NB.at[i].set(jnp.where(sampled_B, drawn.logp_B, 0.0)),
        raw_NB=out.raw_NB.at[i].set(jnp.where(sampled_B, drawn.raw_logp_B, 0.0)),
        sampled_NB=out.sampled_NB.at[i].set(sampled_B),
        live_NB=out.live_NB.at[i].set(row.live_B),
        phase_NB=out.phase_NB.at[i].set(thought.phase_B),
        routes_NBLC=out.routes_NBLC.at[i].set(routes_B1LC[:, 0]),
        taken=i + 1,
    )
    stop_B = ~forced_B & (token_B[:, None] == row.stop_BM).any(-1)
    left_B = row.left_B - 1
    row = row._replace(
        token_B=token_B,
        position_B=jnp.where(row.live_B, position_B, row.position_B),
        live_B=row.live_B & ~stop_B & (left_B > 0),
        left_B=left_B,
        thought=thought,
    )
    return Slots(k, v, row), out
