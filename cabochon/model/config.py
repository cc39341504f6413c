"""ModelConfig: every number that defines the policy's function. Pydantic, frozen; no jax.

Legend: D model, N query heads, K kv heads, H head dim, F ffn, E experts, C experts per token, V vocab, L layers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LayerKind = Literal["dense", "moe"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RopeConfig(_Frozen):
    """Rotary embedding (algorithms.md section 14). `factor` is L_new / L_original; unused by kind `default`."""

    kind: Literal["default", "linear", "ntk", "yarn", "llama3"] = "default"
    theta: float = Field(10_000.0, gt=1)
    factor: float = Field(1.0, ge=1)
    original_max_positions: int = Field(2048, gt=0)
    beta_fast: float = Field(32.0, gt=0)
    """yarn: rotations above which a frequency is left alone"""
    beta_slow: float = Field(1.0, gt=0)
    """yarn: rotations below which a frequency is fully interpolated"""
    truncate: bool = True
    """yarn: the dims at which the ramp begins and ends are whole numbers"""
    attention_factor: float | None = Field(None, gt=0)
    """yarn: scale of cos and sin; None means 0.1 ln(factor) + 1"""
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    """llama3: wavelengths between original/high and original/low are blended"""

    @model_validator(mode="after")
    def _check(self) -> RopeConfig:
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and low >= high:
            raise ValueError(f"low_freq_factor={low:g} must be below high_freq_factor={high:g}")
        return self


class MoeConfig(_Frozen):
    """The sparse feed-forward and its router (algorithms.md section 12)."""

    num_experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1)
    ffn_dim: int = Field(gt=0)
    """F of one expert"""
    shared_ffn_dim: int = Field(0, ge=0)
    """F of the always-on shared expert; 0 for none"""
    gate: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    """`topk_softmax` (equal to softmax, top-k, renormalise) sums to 1; `softmax_topk` keeps the raw probabilities"""
    aux_free_bias: bool = False
    """add a learned-by-rule bias to the scores for selection only (DeepSeek-V3)"""

    @model_validator(mode="after")
    def _check(self) -> MoeConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        return self


class ModelConfig(_Frozen):
    """A decoder-only transformer. `layer_kinds` says which feed-forward each layer has."""

    family: Literal["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "olmoe"] = "llama"
    """Hugging Face family it is read from and written as"""
    vocab_size: int = Field(gt=0)
    dim: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    ffn_dim: int = Field(0, ge=0)
    """F of a dense layer; 0 only where every layer is sparse"""
    layer_kinds: tuple[LayerKind, ...] = ()
    """one per layer; empty means all dense, or all moe where `moe` is given"""
    moe: MoeConfig | None = None
    rope: RopeConfig = RopeConfig()
    norm_eps: float = Field(1e-5, gt=0)
    qk_norm: Literal["none", "head", "full"] = "none"
    """`head`: RMSNorm over each head (Qwen3); `full`: over the whole projection (OLMoE)"""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    clip_qkv: float | None = Field(None, gt=0)
    tied_head: bool = True
    sliding_window: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """tokens each layer may look back over, itself included, 0 for all; one per layer, empty for none"""
    max_positions: int = Field(2048, gt=0)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if self.rope.kind == "ntk" and self.head_dim == 2:
            raise ValueError("head_dim=2 has one frequency only: rope.kind=ntk needs 4 or more")
        for name in ("layer_kinds", "sliding_window"):
            got = len(getattr(self, name))
            if got not in (0, self.num_layers):
                raise ValueError(f"{name} has {got} entries, expected {self.num_layers} (one per layer) or none")
        if "moe" in self.kinds and self.moe is None:
            raise ValueError("layer_kinds names moe layers but moe is not set")
        if "dense" in self.kinds and not self.ffn_dim:
            raise ValueError("ffn_dim must be positive where a layer is dense")
        return self

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """One kind per layer, defaults filled in."""
        return self.layer_kinds or (("moe" if self.moe else "dense"),) * self.num_layers

    @property
    def windows(self) -> tuple[int, ...]:
        """One window per layer, defaults filled in."""
        return self.sliding_window or (0,) * self.num_layers

    @property
    def groups(self) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
        """The layers as `(pattern, repeats)` groups, each scanned: `dmmdmm` is one group `(d, m, m) x 2`.

        Greedy: at each layer take the pattern of up to 8 kinds that covers most layers, the shorter on a tie.
        """
        out: list[tuple[tuple[LayerKind, ...], int]] = []
        start, kinds = 0, self.kinds
        while start < len(kinds):
            best: tuple[tuple[LayerKind, ...], int] = ((kinds[start],), 1)
            for period in range(1, 9):
                pattern, n = kinds[start : start + period], 1
                while kinds[start + n * period : start + (n + 1) * period] == pattern:
                    n += 1
                if (n > 1 or period == 1) and n * period > len(best[0]) * best[1]:
                    best = (pattern, n)
            out.append(best)
            start += len(best[0]) * best[1]
        return tuple(out)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the sparse layers; routes and router statistics are stacked in this order."""
        return tuple(i for i, kind in enumerate(self.kinds) if kind == "moe")
