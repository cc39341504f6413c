"""The sparse feed-forward: router, routing replay, statistics and auxiliary losses (algorithms.md section 12).

Legend: B rows, T tokens, N tokens in a flat batch, C experts per token, D model, E experts, F ffn, L sparse layers.
Everything about the router is f32. Experts are always dropless: dropping would make a token's probability depend on its
neighbours in the batch, and then no importance ratio is 1 even with equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Bool, Float, Int

from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.model.dispatch import Dispatch, experts
from cabochon.model.layers import LowRank, Mlp, Stack, param
from cabochon.ops import Leaf


class RouterStats(NamedTuple):
    """Sums over real tokens, so that micro-batches and devices add. Stacked [L, ...] by the model."""

    tokens: Leaf
    """[] f32: tokens counted (padding is not)"""
    natural_E: Leaf
    """[E] slots the live router would send to each expert"""
    used_E: Leaf
    """[E] slots each expert really got: differs from natural under replay"""
    prob_E: Leaf
    """[E] sum of router probabilities; carries the gradient of the balance loss"""
    z: Leaf
    """[] sum of squared log-sum-exp of the logits; carries the gradient of the z-loss"""
    entropy: Leaf
    """[] sum of per-token router entropy, nats"""
    agree: Leaf
    """[] tokens whose used set of experts equals the natural one"""
    margin: Leaf
    """[] sum of the gap between the last chosen and the first refused logit"""


def route(
    z_NE: Float[Array, "N E"],
    cfg: MoeConfig,
    bias_E: Float[Array, "E"] | None = None,
    replay_NC: Int[Array, "N C"] | None = None,
) -> tuple[Int[Array, "N C"], Float[Array, "N C"], Int[Array, "N C"]]:
    """(used routes, their gates, natural routes) from router logits.

    Gates always come from the live logits, so a replayed route still trains the router (R3, 2510.11370). A token whose
    replay has any entry outside [0, E) was not recorded and takes its natural route. The bias moves selection only.
    Ties go to the lower expert. `cabochon.batch` refuses replays that name an expert twice.
    """
    p_NE = jax.nn.softmax(z_NE, axis=-1)
    score_NE = z_NE if bias_E is None else p_NE + bias_E
    natural_NC = lax.top_k(lax.stop_gradient(score_NE), cfg.top_k)[1]
    used_NC = natural_NC
    if replay_NC is not None:
        recorded_N1 = ((replay_NC >= 0) & (replay_NC < cfg.num_experts)).all(-1, keepdims=True)
        used_NC = jnp.where(recorded_N1, replay_NC, natural_NC)
    if cfg.gate == "topk_softmax":
        gates_NC = jax.nn.softmax(jnp.take_along_axis(z_NE, used_NC, axis=-1), axis=-1)
    else:
        gates_NC = jnp.take_along_axis(p_NE, used_NC, axis=-1)
    return used_NC, gates_NC, natural_NC


def router_stats(z_NE: Array, natural_NC: Array, used_NC: Array, real_N: Bool[Array, "N"]) -> RouterStats:
    """Statistics of one layer over the tokens marked real."""
    E, C, real = z_NE.shape[-1], natural_NC.shape[-1], real_N.astype(jnp.float32)
    p_NE, lse_N = jax.nn.softmax(z_NE, axis=-1), jax.nn.logsumexp(z_NE, axis=-1)

    def slots(routes_NC: Array) -> Array:
        return (jax.nn.one_hot(routes_NC, E, dtype=jnp.float32).sum(-2) * real[:, None]).sum(0)

    entropy_N = lse_N - (p_NE * z_NE).sum(-1)
    same_N = (jnp.sort(natural_NC, -1) == jnp.sort(used_NC, -1)).all(-1)
    best = lax.top_k(lax.stop_gradient(z_NE), min(C + 1, E))[0]
    return RouterStats(
        tokens=real.sum(),
        natural_E=slots(natural_NC),
        used_E=slots(used_NC),
        prob_E=(p_NE * real[:, None]).sum(0),
        z=(lse_N * lse_N * real).sum(),
        entropy=(lax.stop_gradient(entropy_N) * real).sum(),
        agree=(same_N * real).sum(),
        margin=((best[:, C - 1] - best[:, -1]) * real).sum(),
    )


class Moe(nnx.Module):
    """Router, experts, and an optional shared expert that every token takes."""

    def __init__(
        self,
        cfg: ModelConfig,
        moe: MoeConfig,
        rngs: nnx.Rngs,
        stack: Stack,
        lora_up: LowRank = None,
        lora_down: LowRank = None,
    ):
        D, E, F = cfg.dim, moe.num_experts, moe.ffn_dim
        self.router = nnx.Dict(w=param(rngs, stack, (D, E), ("embed", None), 0.02))
        if moe.aux_free_bias:
            self.router["bias"] = param(rngs, stack, (E,), (None,), 0.0)
        self.gate_up = param(rngs, stack, (E, D, 2, F), ("experts", "embed", None, "ffn"), 1 / math.sqrt(D))
        std = 1 / math.sqrt(F * 2 * cfg.num_layers)
        self.down = param(rngs, stack, (E, F, D), ("experts", "ffn", "embed"), std)
        if moe.shared_ffn_dim:
            self.shared = Mlp(cfg, moe.shared_ffn_dim, rngs, stack, lora_up, lora_down)
        self.cfg = moe

    def __call__(
        self, x_BTD: Array, real_BT: Bool[Array, "B T"], replay_BTC: Array | None, dispatch: Dispatch, mesh: Mesh | None
    ) -> tuple[Float[Array, "B T D"], Int[Array, "B T C"], RouterStats]:
        """(output, routes used, statistics). Padding tokens are sent to no expert."""
        B, T, D = x_BTD.shape
        C = self.cfg.top_k
        w_DE = self.router["w"][...].astype(jnp.float32)
        z_NE = jnp.dot(x_BTD.reshape(-1, D).astype(jnp.float32), w_DE, precision=lax.Precision.HIGHEST)
        bias = self.router["bias"][...].astype(jnp.float32) if self.cfg.aux_free_bias else None
        replay_NC = None if replay_BTC is None else replay_BTC.reshape(-1, C).astype(jnp.int32)
        used_NC, gates_NC, natural_NC = route(z_NE, self.cfg, bias, replay_NC)
        stats = router_stats(z_NE, natural_NC, used_NC, real_BT.reshape(-1))
        routes_BTC = used_NC.reshape(B, T, C)
        sent_BTC = jnp.where(real_BT[..., None], routes_BTC, -1)
        gates_BTC = gates_NC.reshape(B, T, C)
        y_BTD = sharded_experts(x_BTD, sent_BTC, gates_BTC, self.gate_up[...], self.down[...], dispatch, mesh)
        if self.cfg.shared_ffn_dim:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, routes_BTC, stats


def sharded_experts(
    x_BTD: Array,
    routes_BTC: Array,
    gates_BTC: Array,
    gate_up: Array,
    down: Array,
    dispatch: Dispatch,
    mesh: Mesh | None,
) -> Float[Array, "B T D"]:
    """The experts under `shard_map`: rows over data, fsdp and expert, experts over expert, ffn columns over tensor.

    An axis that does not divide the experts, or the ffn columns, leaves them whole on each of its devices, as
    `parallel.spec_for` does. Each expert shard gathers the rows of its expert group, computes its own
    experts for them, and the sums are scattered back: dropless with static shapes, at the price of moving every row
    once each way.
    """
    C = routes_BTC.shape[-1]

    def local(x_BTD: Array, routes_BTC: Array, gates_BTC: Array, gate_up: Array, down: Array) -> Array:
        D = x_BTD.shape[-1]
        if split:
            x_BTD, routes_BTC, gates_BTC = (
                lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x_BTD, routes_BTC, gates_BTC)
            )
            routes_BTC = routes_BTC - lax.axis_index("expert") * gate_up.shape[0]
        y = experts(
            x_BTD.reshape(-1, D), routes_BTC.reshape(-1, C), gates_BTC.reshape(-1, C), gate_up, down, dispatch, E
        ).reshape(x_BTD.shape)
        if split:
            y = lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        return lax.psum(y, "tensor") if by_tensor else y

    def over(axis: str, size: int) -> str | None:
        return axis if mesh is not None and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None

    E = gate_up.shape[0]
    split, by_tensor = over("expert", E), over("tensor", down.shape[1])
    if mesh is None or mesh.size == 1:
        return local(x_BTD, routes_BTC, gates_BTC, gate_up, down)
    rows = Spec(("data", "fsdp", "expert"))
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, rows, Spec(split, None, None, by_tensor), Spec(split, by_tensor, None)),
        out_specs=rows,
        check_vma=False,
    )(x_BTD, routes_BTC, gates_BTC, gate_up, down)


def balance_loss(
    stats: RouterStats, top_k: int, load_LE: Float[Array, "L E"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Switch/GShard load balance as (total, tokens): E sum_i f_i P_i, 1 when even, mean over layers.

    f is the fraction of slots, P the mean probability; the gradient flows through P only. `load_LE` gives f of the
    whole batch when `stats` covers a part of it; then the parts' totals add up to the global loss.
    """
    E = stats.prob_E.shape[-1]
    tokens = jnp.maximum(stats.tokens, 1.0)
    f_LE = stats.natural_E / (tokens * top_k)[..., None] if load_LE is None else load_LE
    per_layer = E * (lax.stop_gradient(f_LE) * stats.prob_E).sum(-1)
    return per_layer.mean(), stats.tokens.mean()


def z_loss(stats: RouterStats) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean squared log-sum-exp of the router logits (ST-MoE) as (total, tokens), mean over layers."""
    return stats.z.mean(), stats.tokens.mean()


def simbal_loss(router_LDE: Float[Array, "L D E"], dead_zone: float = 1e-3) -> Float[Array, ""]:
    """Entrywise L1 norm of R^T R - I, mean over layers (SimBal, 2506.14038 eq. 4).

    The gradient is 2 R sign(R^T R - I), with sign 0 inside the dead zone so that the optimum is a resting point.
    """
    gram_LEE = jnp.einsum("lde,ldf->lef", router_LDE, router_LDE, precision=lax.Precision.HIGHEST)
    gram_LEE = gram_LEE - jnp.eye(router_LDE.shape[-1])
    off = jnp.abs(gram_LEE)
    return jnp.where(off > dead_zone, off, lax.stop_gradient(off)).sum((-1, -2)).mean()


def bias_step(bias_LE: Array, natural_LE: Array, rate: float) -> Array:
    """Aux-free balancing (2408.15664): b += rate * sign(mean load - load), the mean of the change taken out."""
    step = rate * jnp.sign(natural_LE.mean(-1, keepdims=True) - natural_LE)
    return bias_LE + step - step.mean(-1, keepdims=True)


def step_biases(cfg: ModelConfig, params: Mapping[str, Any], stats: RouterStats, rate: float) -> dict[str, Any]:
    """`bias_step` on every selection bias; statistics are in layer order, biases lie per group and position."""
    blocks, first = {}, 0
    for g, (pattern, n) in enumerate(cfg.groups):
        sparse = [p for p, kind in enumerate(pattern) if kind == "moe"]
        group = dict(params["blocks"][str(g)])
        for j, p in enumerate(sparse):
            block = group[str(p)]
            router = block["moe"]["router"]
            natural_nE = stats.natural_E[first + j : first + n * len(sparse) : len(sparse)]
            router = {**router, "bias": bias_step(router["bias"], natural_nE, rate)}
            group[str(p)] = {**block, "moe": {**block["moe"], "router": router}}
        blocks[str(g)] = group
        first += n * len(sparse)
    return {**params, "blocks": blocks}


def router_metrics(stats: RouterStats) -> dict[str, Array]:
    """Per-layer readings [L] of summed statistics: load violation, load entropy, agreement, router entropy, margin."""
    load = stats.used_E / jnp.maximum(stats.used_E.sum(-1, keepdims=True), 1.0)
    mean = stats.used_E.mean(-1)
    entropy = -(load * jnp.log(jnp.where(load > 0, load, 1.0))).sum(-1)
    tokens = jnp.maximum(stats.tokens, 1.0)
    return {
        "max_violation": (stats.used_E.max(-1) - mean) / jnp.where(mean > 0, mean, 1.0),
        "load_entropy": entropy,
        "effective_experts": jnp.exp(entropy),
        "agreement": stats.agree / tokens,
        "router_entropy": stats.entropy / tokens,
        "margin": stats.margin / tokens,
    }
