"""Expert feed-forward: `experts(x, routes, gates, gate_up, down)`, dropless, by one of five equal paths.

Legend: N tokens, C experts per token, S = N*C slots, D model, E experts, F ffn, P capacity, R rows of a block.

- `grouped`, for learning on CPU in f32: slots sorted by expert, one BLAS product per expert (`cabochon.model.grouped`),
  so a skewed router costs what an even one does. The backward is written by hand: its gathers go both ways, where
  autodiff would scatter.
- `blocked`, for CPU without a compiler, in bf16, and for few tokens. The first P slots of each expert go through
  batched matmuls [E, P, D], which XLA on CPU runs at the speed of one big matmul; slots beyond P go in blocks of R
  rows through a loop whose trip count is the number of blocks really needed, so nothing is dropped and a skewed
  router costs time, not tokens. With P = 0 only the loop is left and only the experts that were chosen are touched:
  the form for decode. The backward is written by hand, since autodiff through the loop would keep every iteration's
  weights.
- `ragged`, for accelerators: slots sorted by expert, then `jax.lax.ragged_dot` (all experts for all slots on CPU).
- `dense`: every expert on every token; the reference the others are tested against.
- `native`, for the sampler on CPU: a C++ kernel over packed weights (`cabochon.model.native`), forward only.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from cabochon import target
from cabochon.errors import UserError
from cabochon.model import grouped, native

Dispatch = Literal["auto", "grouped", "blocked", "ragged", "dense", "native"]


def experts(
    x_ND: Float[Array, "N D"],
    routes_NC: Int[Array, "N C"],
    gates_NC: Float[Array, "N C"],
    gate_up_ED2F: Float[Array, "E *up"],
    down_EFD: Float[Array, "E *down"],
    dispatch: Dispatch = "auto",
    of_experts: int | None = None,
) -> Float[Array, "N D"]:
    """Sum over a token's C experts of gate * SwiGLU expert. A route outside [0, E) contributes nothing.

    Differentiable in everything but `routes_NC`. `auto` is `grouped` or `blocked` on CPU and `ragged` elsewhere.
    `of_experts` is how many experts the routes spread over, where these are a part of them. For `native` the weights
    are as `native.pack_gated` and `native.pack_down` made them. Raises UserError where `grouped` cannot be compiled
    here.
    """
    E = gate_up_ED2F.shape[0]
    capacity, block = block_sizes(routes_NC.size, of_experts or E)
    if dispatch == "auto":
        dispatch = "ragged"
        if target.platform() == "cpu":
            many, f32 = capacity > 0, x_ND.dtype == gate_up_ED2F.dtype == jnp.float32
            dispatch = "grouped" if many and f32 and not grouped.missing() else "blocked"
    here_NC = (routes_NC >= 0) & (routes_NC < E)
    gates_NC = jnp.where(here_NC, gates_NC, 0).astype(x_ND.dtype)
    routes_NC = jnp.where(here_NC, routes_NC, E)
    match dispatch:
        case "dense":
            return _dense(x_ND, routes_NC, gates_NC, gate_up_ED2F, down_EFD)
        case "native":
            return native.experts(x_ND, routes_NC, gates_NC, gate_up_ED2F, down_EFD)
        case "ragged":
            return _ragged(x_ND, routes_NC, gates_NC, gate_up_ED2F, down_EFD)
        case "grouped":
            if reason := grouped.missing():
                raise UserError(f"experts cannot be grouped: {reason}")
            return _grouped(x_ND, routes_NC, gates_NC, gate_up_ED2F, down_EFD)
        case "blocked":
            return _blocked((capacity, block), x_ND, routes_NC, gates_NC, gate_up_ED2F, down_EFD)


def block_sizes(slots: int, num_experts: int) -> tuple[int, int]:
    """(capacity P, overflow block R) for a number of slots. Measured on 2 cores, see benchmarks/moe.py.

    An even router fills P = 1.06 x the mean; below 8 slots an expert, only experts that were chosen are worth reading.
    """
    mean = slots / num_experts
    if mean < 8:
        return 0, 8
    capacity = -(-int(mean * 1.0625) // 8) * 8
    return capacity, 32 if capacity >= 64 else 8


def _swiglu(h_2F: Array) -> Array:
    """silu(gate) * up on [..., 2F], gate first."""
    gate, up = jnp.split(h_2F, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _swiglu_grad(h_2F: Array, da_F: Array) -> tuple[Array, Array]:
    """(silu(gate) * up, gradient of it with respect to h) from pre-activations and the output's gradient."""
    gate, up = jnp.split(h_2F, 2, axis=-1)
    sig = jax.nn.sigmoid(gate)
    act = gate * sig
    return act * up, jnp.concatenate([da_F * up * (sig + act * (1 - sig)), da_F * act], axis=-1)


def _dense(x_ND: Array, routes_NC: Array, gates_NC: Array, gate_up: Array, down: Array) -> Array:
    E = gate_up.shape[0]
    gates_NE = (jax.nn.one_hot(routes_NC, E, dtype=x_ND.dtype) * gates_NC[..., None]).sum(1)
    h_END2F = jnp.einsum("nd,edgf->engf", x_ND, gate_up)
    act_ENF = jax.nn.silu(h_END2F[:, :, 0]) * h_END2F[:, :, 1]
    return jnp.einsum("enf,efd,ne->nd", act_ENF, down, gates_NE)


def _ragged(x_ND: Array, routes_NC: Array, gates_NC: Array, gate_up: Array, down: Array) -> Array:
    E, D, _, F = gate_up.shape
    C = routes_NC.shape[1]
    expert_S = routes_NC.reshape(-1)
    order_S = jnp.argsort(expert_S, stable=True)  # slots without an expert (E) sort last, past every group
    counts_E = jnp.bincount(expert_S, length=E).astype(jnp.int32)
    grouped_S1 = (expert_S[order_S] < E)[:, None]

    def keep(x: Array) -> Array:  # rows in no group are unspecified on accelerators, in the result and in its gradient
        return jnp.where(grouped_S1, x, 0)

    h_S2F = keep(lax.ragged_dot(keep(x_ND[order_S // C]), gate_up.reshape(E, D, 2 * F), counts_E))
    y_SD = keep(lax.ragged_dot(_swiglu(h_S2F), down, counts_E))
    y_SD = y_SD * gates_NC.reshape(-1)[order_S][:, None]
    return jnp.zeros_like(x_ND).at[order_S // C].add(y_SD)


def _sorted(routes_NC: Array, E: int) -> tuple[Array, Array, Array]:
    """(slot at each sorted place [S], place of each slot [S], slots of each expert [E]); those of none come last."""
    expert_S = routes_NC.reshape(-1)
    # a slot's rank among those of its expert is a running count, cheaper than a sort
    chosen_SE = (expert_S[:, None] == jnp.arange(E + 1)).astype(jnp.int32)
    seen_SE = jnp.cumsum(chosen_SE, axis=0)
    counts_E = seen_SE[-1]
    place_S = (((jnp.cumsum(counts_E) - counts_E) + seen_SE - 1) * chosen_SE).sum(-1)
    slot_S = jnp.zeros_like(place_S).at[place_S].set(jnp.arange(expert_S.size), unique_indices=True)
    return slot_S, place_S, counts_E[:E]


@jax.custom_vjp
def _grouped(x_ND: Array, routes_NC: Array, gates_NC: Array, gate_up: Array, down: Array) -> Array:
    return _grouped_fwd(x_ND, routes_NC, gates_NC, gate_up, down)[0]


def _grouped_fwd(x_ND: Array, routes_NC: Array, gates_NC: Array, gate_up: Array, down: Array) -> tuple[Array, tuple]:
    (E, D, _, F), (N, C) = gate_up.shape, routes_NC.shape
    slot_S, place_S, counts_E = plan = _sorted(routes_NC, E)
    h_S2F = grouped.rows(x_ND[slot_S // C], gate_up.reshape(E, D, 2 * F), counts_E)
    y_NCD = grouped.rows(_swiglu(h_S2F), down, counts_E)[place_S].reshape(N, C, D)
    return (y_NCD * gates_NC[..., None]).sum(1), (x_ND, plan, h_S2F, gates_NC, gate_up, down)


def _grouped_bwd(saved: tuple, dout_ND: Array) -> tuple:
    """The gates' gradient is taken at the activations, not at the outputs, which need then not be kept (or, under
    remat, made again): <act @ down, dout> = <act, dout @ down'>. Guo et al. 2025 (SonicMoE)."""
    x_ND, (slot_S, place_S, counts_E), h_S2F, gates_NC, gate_up, down = saved
    (E, D, _, F), (N, C) = gate_up.shape, gates_NC.shape
    dout_SD = dout_ND[slot_S // C]
    dact_SF = grouped.rows(dout_SD, down, counts_E, turned=True)  # to be scaled by the gates
    act_SF, dh_S2F, dgates_S = grouped.swiglu_grad(h_S2F, dact_SF, gates_NC.reshape(-1)[slot_S])
    dgate_up = grouped.outer(x_ND[slot_S // C], dh_S2F, counts_E).reshape(gate_up.shape)
    dx_SD = grouped.rows(dh_S2F, gate_up.reshape(E, D, 2 * F), counts_E, turned=True)
    dx_ND = dx_SD[place_S].reshape(N, C, D).sum(1)
    return dx_ND, None, dgates_S[place_S].reshape(N, C), dgate_up, grouped.outer(act_SF, dout_SD, counts_E)


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _plan(routes_NC: Array, E: int, P: int, R: int) -> tuple[Array, Array, Array, Array, Array]:
    """Where each slot is computed.

    Returns (table_EP, place_S, spill_S, block_end_E, spill_end_E): the slot in each expert's capacity row (S for none),
    the row of [E*P] where a slot sits (E*P for none), spilled slots sorted by expert, and running totals of spill
    blocks and spilled slots by expert.
    """
    expert_S = routes_NC.reshape(-1)
    S = expert_S.size
    slot_S = jnp.arange(S, dtype=jnp.int32)
    # a slot's rank among those of its expert: a running count, cheaper than a sort
    chosen_SE = (expert_S[:, None] == jnp.arange(E)).astype(jnp.int32)
    seen_SE = jnp.cumsum(chosen_SE, axis=0)
    rank_S = (seen_SE * chosen_SE).sum(-1) - 1  # -1 where the slot has no expert
    spill_E = jnp.maximum(seen_SE[-1] - P, 0)
    spill_end_E = jnp.cumsum(spill_E)
    place_S = jnp.where((rank_S >= 0) & (rank_S < P), expert_S * P + rank_S, E * P).astype(jnp.int32)
    table_EP = jnp.full(E * P, S, jnp.int32).at[place_S].set(slot_S, mode="drop").reshape(E, P)
    at_S = jnp.where(rank_S >= P, (spill_end_E - spill_E)[expert_S] + rank_S - P, S + R)
    spill_S = jnp.full(S + R, S, jnp.int32).at[at_S].set(slot_S, mode="drop")
    return table_EP, place_S, spill_S, jnp.cumsum(-(-spill_E // R)), spill_end_E


def _spill_block(
    j: Array, R: int, S: int, spill_S: Array, block_end_E: Array, spill_end_E: Array
) -> tuple[Array, Array]:
    """(expert, slots [R], S where the block is not full) of the j-th overflow block."""
    e = jnp.searchsorted(block_end_E, j, side="right")
    before = jnp.where(e > 0, block_end_E[e - 1], 0)
    first = jnp.where(e > 0, spill_end_E[e - 1], 0) + (j - before) * R
    rows_R = lax.dynamic_slice(spill_S, (first,), (R,))
    return e, jnp.where(first + jnp.arange(R) < spill_end_E[e], rows_R, S)


def _take(x_SD: Array, rows: Array) -> Array:
    """Rows of x, zeros where the row lies past the end."""
    return x_SD.at[rows].get(mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(
    sizes: tuple[int, int], x_ND: Array, routes_NC: Array, gates_NC: Array, gate_up: Array, down: Array
) -> Array:
    return _blocked_fwd(sizes, x_ND, routes_NC, gates_NC, gate_up, down)[0]


def _blocked_fwd(
    sizes: tuple[int, int], x_ND: Array, routes_NC: Array, gates_NC: Array, gate_up: Array, down: Array
) -> tuple[Array, tuple]:
    (P, R), (E, D, _, F), (N, C) = sizes, gate_up.shape, routes_NC.shape
    S, w1_ED2F = N * C, gate_up.reshape(E, D, 2 * F)
    plan = table_EP, place_S, *spill = _plan(routes_NC, E, P, R)
    x_EPD, h_EP2F = jnp.zeros((E, 0, D), x_ND.dtype), jnp.zeros((E, 0, 2 * F), x_ND.dtype)
    y_SD = jnp.zeros((S, D), x_ND.dtype)
    if P:
        x_EPD = _take(x_ND, table_EP // C)
        h_EP2F = jnp.einsum("epd,edf->epf", x_EPD, w1_ED2F)
        y_SD = _take(jnp.einsum("epf,efd->epd", _swiglu(h_EP2F), down).reshape(E * P, D), place_S)

    def block(j: Array, y_SD: Array) -> Array:
        e, rows_R = _spill_block(j, R, S, *spill)
        y_RD = _swiglu(_take(x_ND, rows_R // C) @ w1_ED2F[e]) @ down[e]
        return y_SD.at[rows_R].set(y_RD, mode="drop")

    y_SD = lax.fori_loop(0, spill[1][-1], block, y_SD)
    out_ND = (y_SD.reshape(N, C, D) * gates_NC[..., None]).sum(1)
    return out_ND, (x_ND, plan, x_EPD, h_EP2F, y_SD, gates_NC, gate_up, down)


def _blocked_bwd(sizes: tuple[int, int], saved: tuple, dout_ND: Array) -> tuple:
    x_ND, (table_EP, place_S, *spill), x_EPD, h_EP2F, y_SD, gates_NC, gate_up, down = saved
    (P, R), (E, D, _, F), (N, C) = sizes, gate_up.shape, gates_NC.shape
    S, w1_ED2F = N * C, gate_up.reshape(E, D, 2 * F)
    dgates_NC = (y_SD.reshape(N, C, D) * dout_ND[:, None]).sum(-1)
    dy_SD = (dout_ND[:, None] * gates_NC[..., None]).reshape(S, D)
    if P:
        dy_EPD = _take(dy_SD, table_EP)
        act_EPF, dh_EP2F = _swiglu_grad(h_EP2F, jnp.einsum("epd,efd->epf", dy_EPD, down))
        ddown = jnp.einsum("epf,epd->efd", act_EPF, dy_EPD)
        dw1 = jnp.einsum("epd,epf->edf", x_EPD, dh_EP2F)
        dx_SD = _take(jnp.einsum("epf,edf->epd", dh_EP2F, w1_ED2F).reshape(E * P, D), place_S)
    else:
        ddown, dw1, dx_SD = jnp.zeros_like(down), jnp.zeros_like(w1_ED2F), jnp.zeros_like(dy_SD)

    def outer(a_RI: Array, b_RO: Array) -> Array:
        return jnp.dot(a_RI.T, b_RO, preferred_element_type=jnp.float32)

    def add_to(w_EIO: Array, e: Array, dw_IO: Array) -> Array:  # in place; `.at[e].add` would be a scatter
        return lax.dynamic_update_index_in_dim(w_EIO, w_EIO[e] + dw_IO, e, 0)

    # carried in f32: hundreds of small bf16 increments would be lost below half a unit in the last place
    dw1, ddown = dw1.astype(jnp.float32), ddown.astype(jnp.float32)

    def block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dx_SD, dw1, ddown = carry
        e, rows_R = _spill_block(j, R, S, *spill)
        x_RD, dy_RD = _take(x_ND, rows_R // C), _take(dy_SD, rows_R)
        act_RF, dh_R2F = _swiglu_grad(x_RD @ w1_ED2F[e], dy_RD @ down[e].T)
        dx_SD = dx_SD.at[rows_R].set(dh_R2F @ w1_ED2F[e].T, mode="drop")
        return dx_SD, add_to(dw1, e, outer(x_RD, dh_R2F)), add_to(ddown, e, outer(act_RF, dy_RD))

    dx_SD, dw1, ddown = lax.fori_loop(0, spill[1][-1], block, (dx_SD, dw1, ddown))
    dgate_up = dw1.reshape(gate_up.shape).astype(gate_up.dtype)
    return dx_SD.reshape(N, C, D).sum(1), None, dgates_NC, dgate_up, ddown.astype(down.dtype)


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
