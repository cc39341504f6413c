"""The one table between Hugging Face tensors and our stacked parameters, used in both directions.

Every Hugging Face tensor is one `Piece`: reshape it, permute its axes, and it is a block of one of our leaves. Nothing
is added or scaled, so writing is the same table read backwards and a round trip is bitwise.

Legend: n repeats of a pattern, D model, N query heads, K kv heads, H head dim, F ffn, E experts, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cabochon.model.config import ModelConfig

Path = tuple[str, ...]
Index = tuple[int | slice, ...]
ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One Hugging Face tensor: `leaf[index] = tensor.reshape(view).transpose(order)`."""

    name: str
    shape: tuple[int, ...]
    leaf: Path
    index: Index
    view: tuple[int, ...]
    order: tuple[int, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The block of the leaf, as a view where numpy can."""
        return tensor.reshape(self.view).transpose(self.order)

    def to_theirs(self, block: np.ndarray) -> np.ndarray:
        """The Hugging Face tensor back from the block."""
        return block.transpose(np.argsort(self.order)).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a checkpoint names and stores its sparse blocks."""

    fused: bool = False
    """all experts in one tensor [E, 2F, D], as transformers 5 holds them in memory"""
    block: str = "mlp"
    """`mlp`, or `block_sparse_moe` for Mixtral on disk"""


def written_layout(config: ModelConfig) -> Layout:
    """The layout every reader knows: one tensor per expert, under the family's own names."""
    return Layout(block="block_sparse_moe" if config.family == "mixtral" else "mlp")


def layout_of(config: ModelConfig, names: Iterable[str]) -> Layout:
    """The layout a checkpoint with these tensor names has."""
    fused = block = False
    for name in names:
        fused = fused or name.endswith(".experts.gate_up_proj")
        block = block or ".block_sparse_moe." in name
    return Layout(fused=fused, block="block_sparse_moe" if block else "mlp")


def slots(config: ModelConfig) -> list[tuple[int, int, int]]:
    """For each layer, the `(group, position, repeat)` its parameters are stacked at."""
    return [
        (g, p, i)
        for g, (pattern, repeats) in enumerate(config.groups)
        for i in range(repeats)
        for p in range(len(pattern))
    ]


def leaf_shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """The shape of every parameter, by path: `("blocks", "0", "0", "attn", "qkv", "w")`."""
    D, H, K, V = config.dim, config.head_dim, config.num_kv_heads, config.vocab_size
    Q = config.num_heads // K
    out: dict[Path, tuple[int, ...]] = {("embed", "table"): (V, D)}
    for g, (pattern, n) in enumerate(config.groups):
        for p, kind in enumerate(pattern):
            block: dict[str, tuple[int, ...]] = {
                "attn_norm.scale": (D,),
                "attn.qkv.w": (D, K, Q + 2, H),
                "attn.out.w": (K, Q, H, D),
                "mlp_norm.scale": (D,),
            }
            if config.qkv_bias:
                block["attn.qkv.b"] = (K, Q + 2, H)
            if config.out_bias:
                block["attn.out.b"] = (D,)
            if config.qk_norm != "none":
                full = config.qk_norm == "full"
                block |= {"attn.q_norm.scale": (K, Q, H) if full else (H,),
                          "attn.k_norm.scale": (K, H) if full else (H,)}  # fmt: skip
            block |= _dense_shapes(config) if kind == "dense" else _moe_shapes(config)
            out |= {("blocks", str(g), str(p), *name.split(".")): (n, *shape) for name, shape in block.items()}
    out[("final_norm", "scale")] = (D,)
    if not config.tied_head:
        out[("head", "w")] = (D, V)
    return out


def _dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, F = config.dim, config.ffn_dim
    out: dict[str, tuple[int, ...]] = {"mlp.gate_up.w": (D, 2, F), "mlp.down.w": (F, D)}
    if config.mlp_bias:
        out |= {"mlp.gate_up.b": (2, F), "mlp.down.b": (D,)}
    return out


def _moe_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    assert config.moe is not None
    D, E, F, S = config.dim, config.moe.num_experts, config.moe.ffn_dim, config.moe.shared_ffn_dim
    out: dict[str, tuple[int, ...]] = {"moe.router.w": (D, E), "moe.gate_up": (E, D, 2, F), "moe.down": (E, F, D)}
    if config.moe.aux_free_bias:
        out["moe.router.bias"] = (E,)
    if S:
        out |= {"moe.shared.gate_up.w": (D, 2, S), "moe.shared.down.w": (S, D)}
    return out


def pieces(config: ModelConfig, layout: Layout) -> Iterator[Piece]:
    """Every Hugging Face tensor of a model, grouped by leaf so that a reader fills one leaf at a time."""
    by_leaf: dict[Path, list[Piece]] = {}
    for piece in _pieces(config, layout):
        by_leaf.setdefault(piece.leaf, []).append(piece)
    for group in by_leaf.values():
        yield from group


def _pieces(config: ModelConfig, layout: Layout) -> Iterator[Piece]:
    V, D = config.vocab_size, config.dim
    yield _piece("model.embed_tokens.weight", ("embed", "table"), (), (V, D), (0, 1))
    yield _piece("model.norm.weight", ("final_norm", "scale"), (), (D,), (0,))
    if not config.tied_head:
        yield _piece("lm_head.weight", ("head", "w"), (), (V, D), (1, 0))
    for layer, (kind, (g, p, i)) in enumerate(zip(config.kinds, slots(config), strict=True)):
        theirs, ours = f"model.layers.{layer}.", ("blocks", str(g), str(p))
        yield from _attention(config, theirs, ours, i)
        yield from _dense(config, theirs, ours, i) if kind == "dense" else _moe(config, layout, theirs, ours, i)


def _piece(
    name: str, leaf: Path, index: Index, view: tuple[int, ...], order: tuple[int, ...],
    shape: tuple[int, ...] | None = None,
) -> Piece:  # fmt: skip
    return Piece(name=name, leaf=leaf, index=index, view=view, order=order, shape=shape or view)


def _attention(config: ModelConfig, theirs: str, ours: Path, i: int) -> Iterator[Piece]:
    D, H, K = config.dim, config.head_dim, config.num_kv_heads
    Q = config.num_heads // K  # query head h reads kv head h // Q, so [N] splits as [K, Q]
    yield _piece(theirs + "input_layernorm.weight", (*ours, "attn_norm", "scale"), (i,), (D,), (0,))
    yield _piece(theirs + "post_attention_layernorm.weight", (*ours, "mlp_norm", "scale"), (i,), (D,), (0,))
    theirs, ours = theirs + "self_attn.", (*ours, "attn")
    w, b = (*ours, "qkv", "w"), (*ours, "qkv", "b")
    yield _piece(theirs + "q_proj.weight", w, (i, ALL, ALL, slice(0, Q)), (K, Q, H, D), (3, 0, 1, 2), (K * Q * H, D))
    if config.qkv_bias:
        yield _piece(theirs + "q_proj.bias", b, (i, ALL, slice(0, Q)), (K, Q, H), (0, 1, 2), (K * Q * H,))
    for at, name in ((Q, "k_proj"), (Q + 1, "v_proj")):
        yield _piece(f"{theirs}{name}.weight", w, (i, ALL, ALL, at), (K, H, D), (2, 0, 1), (K * H, D))
        if config.qkv_bias:
            yield _piece(f"{theirs}{name}.bias", b, (i, ALL, at), (K, H), (0, 1), (K * H,))
    yield _piece(theirs + "o_proj.weight", (*ours, "out", "w"), (i,), (D, K, Q, H), (1, 2, 3, 0), (D, K * Q * H))
    if config.out_bias:
        yield _piece(theirs + "o_proj.bias", (*ours, "out", "b"), (i,), (D,), (0,))
    if config.qk_norm == "none":
        return
    full = config.qk_norm == "full"
    q, k = ((K, Q, H), (K, H)) if full else ((H,), (H,))
    for name, view in (("q_norm", q), ("k_norm", k)):
        order, size = tuple(range(len(view))), (int(np.prod(view)),)
        yield _piece(f"{theirs}{name}.weight", (*ours, name, "scale"), (i,), view, order, size)


def _dense(config: ModelConfig, theirs: str, ours: Path, i: int) -> Iterator[Piece]:
    D, F = config.dim, config.ffn_dim
    theirs, ours = theirs + "mlp.", (*ours, "mlp")
    for at, name in enumerate(("gate_proj", "up_proj")):
        yield _piece(f"{theirs}{name}.weight", (*ours, "gate_up", "w"), (i, ALL, at), (F, D), (1, 0))
        if config.mlp_bias:
            yield _piece(f"{theirs}{name}.bias", (*ours, "gate_up", "b"), (i, at), (F,), (0,))
    yield _piece(theirs + "down_proj.weight", (*ours, "down", "w"), (i,), (D, F), (1, 0))
    if config.mlp_bias:
        yield _piece(theirs + "down_proj.bias", (*ours, "down", "b"), (i,), (D,), (0,))


def _moe(config: ModelConfig, layout: Layout, theirs: str, ours: Path, i: int) -> Iterator[Piece]:
    assert config.moe is not None
    D, E, F = config.dim, config.moe.num_experts, config.moe.ffn_dim
    theirs, ours = f"{theirs}{layout.block}.", (*ours, "moe")
    yield _piece(theirs + "gate.weight", (*ours, "router", "w"), (i,), (E, D), (1, 0))
    gate_up, down = (*ours, "gate_up"), (*ours, "down")
    if layout.fused:
        yield _piece(theirs + "experts.gate_up_proj", gate_up, (i,), (E, 2, F, D), (0, 3, 1, 2), (E, 2 * F, D))
        yield _piece(theirs + "experts.down_proj", down, (i,), (E, D, F), (0, 2, 1))
        return
    native = layout.block == "block_sparse_moe"
    names = ("w1", "w3", "w2") if native else ("gate_proj", "up_proj", "down_proj")
    for e in range(E):
        for at, name in enumerate(names[:2]):
            yield _piece(f"{theirs}experts.{e}.{name}.weight", gate_up, (i, e, ALL, at), (F, D), (1, 0))
        yield _piece(f"{theirs}experts.{e}.{names[2]}.weight", down, (i, e), (D, F), (1, 0))


def get_leaf(params: Mapping[str, Any], path: Path) -> Any:
    """The array at a path of the nested dict."""
    node: Any = params
    for key in path:
        node = node[key]
    return node


def set_leaf(params: dict[str, Any], path: Path, value: Any) -> None:
    """Put an array at a path, making the dicts on the way."""
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value
