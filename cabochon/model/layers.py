"""The parts of a block that do not route: norms, rotary embedding, attention with its cache, dense feed-forward.

Legend: B rows, T tokens, S cache or key positions, D model, N query heads, K kv heads, G = N/K, H head dim, F ffn.
Modules hold stacked parameters: `stack` prepends axes (the repeats of a scanned group) and is sliced away by the scan.
Every parameter carries `axes`, the logical name of each of its dims, which `cabochon.parallel` maps to the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from cabochon import target
from cabochon.model import flash
from cabochon.model.config import ModelConfig, RopeConfig

Stack = tuple[int, ...]
LowRank = tuple[int, float] | None
"""(rank, alpha) of a LoRA addition, or none."""


def param(rngs: nnx.Rngs, stack: Stack, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> nnx.Param:
    """A parameter [*stack, *shape] drawn from N(0, std²); std 0 gives zeros, a negative one ones."""
    full = (*stack, *shape)
    if std > 0:
        value = jax.random.normal(rngs.params(), full, jnp.float32) * std
    else:
        value = jnp.zeros(full) if std == 0 else jnp.ones(full)
    return nnx.Param(value, axes=(*("layers" for _ in stack), *axes))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last `len(shape)` dims, in f32."""

    def __init__(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...], eps: float, rngs: nnx.Rngs, stack: Stack = ()
    ):
        self.scale = param(rngs, stack, shape, axes, -1.0)
        self.over, self.eps = len(shape), eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        over = tuple(range(-self.over, 0))
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=over, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Array, n: int) -> Array:
    """`jnp.tensordot` over n trailing dims of x and leading dims of w. Autodiff would make the gradient of w the other
    way round, [outs, ins], and XLA on CPU would then turn it, and what it is made of, in copies of their own."""
    return jnp.tensordot(x, w, n)


def _product_grad(n: int, kept: tuple[Array, Array], from_: Array) -> tuple[Array, Array]:
    x, w = kept
    lead, outs = x.ndim - n, w.ndim - n
    rows, columns = tuple(range(lead)), tuple(range(outs))
    dx = jnp.tensordot(from_, w, ([lead + i for i in columns], [n + i for i in columns]))
    return dx, jnp.tensordot(x, from_, (rows, rows))


_product.defvjp(lambda x, w, n: (jnp.tensordot(x, w, n), (x, w)), _product_grad)


class Linear(nnx.Module):
    """x @ w + b with named output dims: contracts `len(ins)` trailing dims of x. Optional low-rank addition (LoRA).

    `lora` is (rank, alpha): adds (x @ a) @ b * alpha / rank with b zero at first (Hu et al. 2106.09685).
    """

    def __init__(
        self,
        ins: tuple[int, ...],
        outs: tuple[int, ...],
        axes: tuple[str | None, ...],
        rngs: nnx.Rngs,
        stack: Stack = (),
        bias: bool = False,
        std: float | None = None,
        lora: LowRank = None,
    ):
        n = len(ins)
        self.w = param(rngs, stack, (*ins, *outs), axes, std or 1 / math.sqrt(math.prod(ins)))
        if bias:
            self.b = param(rngs, stack, outs, axes[n:], 0.0)
        if lora:
            self.lora_a = param(rngs, stack, (*ins, lora[0]), (*axes[:n], None), 1 / math.sqrt(math.prod(ins)))
            self.lora_b = param(rngs, stack, (lora[0], *outs), (None, *axes[n:]), 0.0)
        self.n, self.outs, self.bias, self.lora = n, outs, bias, lora
        self.multiply: Callable[[Array, Array, int], Array] = _product  # the sampler may put a kernel here

    def __call__(self, x: Array) -> Array:
        y = self.multiply(x, self.w[...], self.n)
        if self.lora:
            rank, alpha = self.lora
            y = y + jnp.tensordot(jnp.tensordot(x, self.lora_a[...], self.n), self.lora_b[...], 1) * (alpha / rank)
        return y + self.b[...] if self.bias else y


def rope_frequencies(cfg: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """(inverse frequencies [H/2] f32, factor on cos and sin). algorithms.md section 14; kinds as in Hugging Face."""
    half = np.arange(0, head_dim, 2, dtype=np.float64)
    inv = cfg.theta ** (-half / head_dim)
    match cfg.kind:
        case "default":
            return inv.astype(np.float32), 1.0
        case "linear":
            return (inv / cfg.factor).astype(np.float32), 1.0
        case "ntk":
            base = cfg.theta * cfg.factor ** (head_dim / (head_dim - 2))
            return (base ** (-half / head_dim)).astype(np.float32), 1.0
        case "yarn":

            def turns_at(n: float) -> float:  # the dim whose frequency makes n turns over the original context
                return head_dim * math.log(cfg.original_max_positions / (n * 2 * math.pi)) / (2 * math.log(cfg.theta))

            low, high = turns_at(cfg.beta_fast), turns_at(cfg.beta_slow)
            if cfg.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
            scale = cfg.attention_factor or (0.1 * math.log(cfg.factor) + 1 if cfg.factor > 1 else 1.0)
            return (inv * (1 - ramp) + inv / cfg.factor * ramp).astype(np.float32), scale
        case "llama3":
            wave = 2 * math.pi / inv
            long, short = (
                cfg.original_max_positions / cfg.low_freq_factor,
                cfg.original_max_positions / cfg.high_freq_factor,
            )
            span = cfg.high_freq_factor - cfg.low_freq_factor
            blend = (cfg.original_max_positions / wave - cfg.low_freq_factor) / span
            smooth = (1 - blend) * inv / cfg.factor + blend * inv
            return np.where(wave > long, inv / cfg.factor, np.where(wave < short, inv, smooth)).astype(np.float32), 1.0


def rope_tables(
    cfg: ModelConfig, positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """cos and sin [B, T, H/2] in f32 (bf16 positions past 256 would be wrong)."""
    inv, scale = rope_frequencies(cfg.rope, cfg.head_dim)
    angles = positions_BT.astype(jnp.float32)[..., None] * inv
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Array, cos_BTh: Array, sin_BTh: Array) -> Array:
    """Half-split rotary embedding of x [B, T, ..., H]."""
    extra = (slice(None), slice(None), *(None for _ in range(x.ndim - 3)))
    cos, sin = cos_BTh[extra], sin_BTh[extra]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def may_attend(
    q_position_BT: Array,
    k_position_BS: Array,
    q_segment_BT: Array,
    k_segment_BS: Array,
    window: Array | int = 0,
    q_prefix_BT: Array | None = None,
) -> Bool[Array, "B T S"]:
    """Causal within a segment and the one it continues (`q_prefix_BT`, 0 for none), at most `window` back (0 for no
    limit); segment 0 is padding."""
    back = q_position_BT[:, :, None] - k_position_BS[:, None, :]
    seen = q_segment_BT[:, :, None] == k_segment_BS[:, None, :]
    if q_prefix_BT is not None:
        seen |= q_prefix_BT[:, :, None] == k_segment_BS[:, None, :]
    return seen & (k_segment_BS[:, None, :] != 0) & (back >= 0) & ((back < window) | (jnp.asarray(window) == 0))


class Attention(nnx.Module):
    """Grouped-query attention; q, k and v are one matrix [D, K, G + 2, H], a kv head beside the queries reading it."""

    def __init__(
        self,
        cfg: ModelConfig,
        rngs: nnx.Rngs,
        stack: Stack,
        lora: LowRank,
        lora_out: LowRank,
    ):
        D, K, H = cfg.dim, cfg.num_kv_heads, cfg.head_dim
        G = cfg.num_heads // K
        self.G, self.scale, self.qk_norm, self.clip = G, H**-0.5, cfg.qk_norm, cfg.clip_qkv
        self.qkv = Linear((D,), (K, G + 2, H), ("embed", "kv_heads", None, None), rngs, stack, cfg.qkv_bias, lora=lora)
        out_std = 1 / math.sqrt(cfg.num_heads * H * 2 * cfg.num_layers)
        out_axes = ("kv_heads", None, None, "embed")
        self.out = Linear((K, G, H), (D,), out_axes, rngs, stack, cfg.out_bias, out_std, lora_out)
        if cfg.qk_norm == "head":
            self.q_norm = RMSNorm((H,), (None,), cfg.norm_eps, rngs, stack)
            self.k_norm = RMSNorm((H,), (None,), cfg.norm_eps, rngs, stack)
        elif cfg.qk_norm == "full":
            self.q_norm = RMSNorm((K, G, H), ("kv_heads", None, None), cfg.norm_eps, rngs, stack)
            self.k_norm = RMSNorm((K, H), ("kv_heads", None), cfg.norm_eps, rngs, stack)

    def project(self, x_BTD: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Rotated q [B,T,K,G,H] and k [B,T,K,H], and v [B,T,K,H]."""
        qkv = self.qkv(x_BTD)
        q, k, v = qkv[..., : self.G, :], qkv[..., self.G, :], qkv[..., self.G + 1, :]
        if self.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:  # after the norm, as OLMoE does
            q, k, v = (jnp.clip(x, -self.clip, self.clip) for x in (q, k, v))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(
        self, q_BTKGH: Array, k_BSKH: Array, v_BSKH: Array, allow_BTS: Array, mesh: Mesh | None = None
    ) -> Array:
        """Softmax attention in f32 and the output projection. A query that may see nothing gets a finite value."""
        whole = mesh is None or mesh.size == 1  # XLA cannot divide a call of ours among devices
        f32 = q_BTKGH.dtype == k_BSKH.dtype == np.float32
        if whole and f32 and target.platform() == "cpu" and not flash.missing():
            return self.out(flash.attend(q_BTKGH, k_BSKH, v_BSKH, allow_BTS, self.scale))
        scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * self.scale
        scores = jnp.where(allow_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
        probs = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
        return self.out(jnp.einsum("bkgts,bskh->btkgh", probs, v_BSKH))


class Mlp(nnx.Module):
    """Dense SwiGLU; gate and up are one matrix [D, 2, F]."""

    def __init__(
        self, cfg: ModelConfig, ffn_dim: int, rngs: nnx.Rngs, stack: Stack, lora_up: LowRank = None,
        lora_down: LowRank = None,
    ):  # fmt: skip
        D, F = cfg.dim, ffn_dim
        self.gate_up = Linear((D,), (2, F), ("embed", None, "ffn"), rngs, stack, cfg.mlp_bias, lora=lora_up)
        std = 1 / math.sqrt(F * 2 * cfg.num_layers)
        self.down = Linear((F,), (D,), ("ffn", "embed"), rngs, stack, cfg.mlp_bias, std, lora_down)

    def __call__(self, x_BTD: Array) -> Array:
        h = self.gate_up(x_BTD)
        return self.down(jax.nn.silu(h[..., 0, :]) * h[..., 1, :])
