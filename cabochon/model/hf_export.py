"""`ModelConfig` to a `config.json` that transformers 5 loads as the same function, and what has no place in one."""

from __future__ import annotations

from typing import Any

from cabochon.errors import UserError
from cabochon.model.config import ModelConfig, RopeConfig
from cabochon.model.hf_config import ARCHITECTURES, CLASSIFIERS


def to_hf(config: ModelConfig, *, dtype: str = "float32", classifier: bool = False) -> dict[str, Any]:
    """The content of a config.json that transformers 5 loads as the same function; of a sequence classifier with one
    label where `classifier` is on.

    Raises UserError where the family cannot express the config (see `refuse_unexportable`). Static NTK scaling has no
    name there and is written as the base it amounts to, theta * factor^(d/(d-2)).
    """
    refuse_unexportable(config, classifier=classifier)
    family, moe = config.family, config.moe
    windows = set(config.windows)
    out: dict[str, Any] = {
        "architectures": [(CLASSIFIERS if classifier else ARCHITECTURES)[family]],
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_id,
        "dtype": dtype,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_dim or (moe.ffn_dim if moe else 0),
        "max_position_embeddings": config.max_positions,
        "model_type": family,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_id,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope_to_hf(config.rope, config.head_dim),
        "tie_word_embeddings": config.tied_head,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if classifier:
        out |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    if family not in ("qwen2", "mixtral"):
        out["attention_bias"] = config.qkv_bias
    if family == "llama":
        out["mlp_bias"] = config.mlp_bias
    if moe:
        out |= {"num_local_experts" if family == "mixtral" else "num_experts": moe.num_experts,
                "num_experts_per_tok": moe.top_k, "output_router_logits": False}  # fmt: skip
    if moe and family in ("qwen3_moe", "olmoe"):
        out["norm_topk_prob"] = moe.gate == "topk_softmax"
    if family == "olmoe":
        out["clip_qkv"] = config.clip_qkv
    if family == "qwen3_moe":
        dense = [i for i, kind in enumerate(config.kinds) if kind == "dense"]
        out |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
        out |= {"moe_intermediate_size": moe.ffn_dim} if moe else {"num_experts": 0}
    if family.startswith("qwen"):
        out |= {"use_sliding_window": windows != {0}, "sliding_window": max(windows) or None}
    if family in ("qwen2", "qwen3"):
        out["layer_types"] = ["sliding_attention" if w else "full_attention" for w in config.windows]
        out["max_window_layers"] = next((i for i, w in enumerate(config.windows) if w), config.num_layers)
    if family == "mixtral":
        out["sliding_window"] = max(windows) or None
    return dict(sorted(out.items()))


def _rope_to_hf(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    if rope.kind == "ntk":
        return {"rope_type": "default", "rope_theta": rope.theta * rope.factor ** (head_dim / (head_dim - 2))}
    out: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind == "default":
        return out
    out["factor"] = rope.factor
    if rope.kind in ("yarn", "llama3"):
        out["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            out["attention_factor"] = rope.attention_factor
    if rope.kind == "llama3":
        out |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    return out


def refuse_unexportable(config: ModelConfig, *, classifier: bool = False) -> None:
    """Raises UserError naming the first thing the Hugging Face family of `config` has no place for.

    Cheap: call it before hours of work whose result is to be exported.
    """
    problem = _no_place_for(config)
    if classifier and config.family not in CLASSIFIERS:
        problem = problem or "a sequence classifier (transformers has none)"
    if problem is None:
        return
    families = CLASSIFIERS if classifier else ARCHITECTURES
    others = [f for f in families if _no_place_for(config.model_copy(update={"family": f})) is None]
    hint = f"; family={others[0]} has" if others else "; no supported family has: keep it as a cabochon checkpoint"
    raise UserError(f"export: Hugging Face's {config.family} has no place for {problem}{hint}")


def _no_place_for(config: ModelConfig) -> str | None:
    """The first thing about `config` that its family cannot express."""
    family, moe = config.family, config.moe
    sizes = {w for w in config.windows if w}
    sparse_only, dense_only = family in ("mixtral", "olmoe"), family in ("llama", "qwen2", "qwen3")
    qk_norm = {"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}.get(family, "none")
    per_layer_windows = family in ("qwen2", "qwen3")
    problems = {
        "layer_kinds: dense layers": sparse_only and "dense" in config.kinds,
        "layer_kinds: moe layers": dense_only and "moe" in config.kinds,
        "moe.shared_ffn_dim: a shared expert": moe is not None and bool(moe.shared_ffn_dim),
        "moe.aux_free_bias: a selection bias": moe is not None and moe.aux_free_bias,
        "moe.gate=softmax_topk: gates that do not sum to 1":
            family == "mixtral" and moe is not None and moe.gate == "softmax_topk",
        f"qk_norm={config.qk_norm}": config.qk_norm != qk_norm,
        "qkv_bias: biases on q, k, v": config.qkv_bias and family == "mixtral",
        "qkv_bias=false: projections without a bias": not config.qkv_bias and family == "qwen2",
        "out_bias: a bias on the output projection": config.out_bias and family in ("qwen2", "mixtral"),
        "qkv_bias without out_bias, or the reverse":
            config.qkv_bias != config.out_bias and family not in ("qwen2", "mixtral"),
        "mlp_bias": config.mlp_bias and family != "llama",
        "clip_qkv": config.clip_qkv is not None and family != "olmoe",
        "sliding_window": bool(sizes) and family in ("llama", "olmoe"),
        "sliding_window of several sizes": len(sizes) > 1,
        "sliding_window on some layers only": bool(sizes) and 0 in config.windows and not per_layer_windows,
        f"head_dim={config.head_dim} with dim={config.dim} and num_heads={config.num_heads}":
            family == "olmoe" and config.head_dim * config.num_heads != config.dim,
        f"dim={config.dim} that is no multiple of num_heads={config.num_heads}":
            family == "llama" and config.dim % config.num_heads != 0,
    }  # fmt: skip
    return next((what for what, there in problems.items() if there), None)
