"""A model out of a GGUF file: its ModelConfig, and its weights under Hugging Face names. numpy only, no jax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from pydantic import ValidationError

from cabochon.errors import UserError
from cabochon.model.config import ModelConfig, RopeConfig
from cabochon.model.gguf_file import Header, LazyTensor, read_header


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    family: Literal["llama", "qwen2", "qwen3"]
    reordered: bool
    """llama.cpp stores q and k for interleaved rotary"""
    qk_norm: Literal["none", "head"] = "none"


_ARCHITECTURES = {
    "llama": _Architecture(family="llama", reordered=True),
    "qwen2": _Architecture(family="qwen2", reordered=False),
    "qwen3": _Architecture(family="qwen3", reordered=False, qk_norm="head"),
}


def _architecture(header: Header) -> tuple[str, _Architecture]:
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise UserError(
            f"{header.path}: general.architecture={name!r} is not one this reader knows "
            f"({', '.join(_ARCHITECTURES)}); load the model's Hugging Face directory instead"
        )
    if experts := header.metadata.get(f"{name}.expert_count", 0):
        raise UserError(
            f"{header.path}: {name}.expert_count={experts}: only dense GGUF models are read; "
            "load the model's Hugging Face directory instead"
        )
    return name, _ARCHITECTURES[name]


def _number(header: Header, key: str, default: int | float | None = None) -> Any:
    """A numeric key; f32 values come back as the shortest decimal (9.9999997e-06 is 1e-05)."""
    value = header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        got = "missing" if value is None else f"{type(value).__name__}, one number expected"
        raise UserError(f"{header.path}: metadata key {key} is {got}; this is not a model this reader knows")
    return value if isinstance(value, int) else float(str(np.float32(value)))


def read_config(source: str | Path | Header) -> ModelConfig:
    """The ModelConfig a GGUF file describes, checked against its tensor table; no weight is read.

    Raises:
        UserError: as `read_header`; unknown architecture or rope scaling; a missing key; a tensor missing, unexpected,
            of the wrong shape or in a block format without a decoder.
    """
    header = source if isinstance(source, Header) else read_header(source)
    config = _config(header)
    _entries(header, config)
    return config


def tensors(source: str | Path | Header) -> Iterator[tuple[str, LazyTensor]]:
    """`(Hugging Face name, LazyTensor)` per parameter, in file order. Raises as `read_config`, before the first."""
    header = source if isinstance(source, Header) else read_header(source)
    return iter(_entries(header, _config(header)).items())


def _config(header: Header) -> ModelConfig:
    arch, spec = _architecture(header)
    meta, infos = header.metadata, header.tensors
    if "token_embd.weight" not in infos:
        raise UserError(f"{header.path}: tensor token_embd.weight is missing; this is not a language model")
    layers, dim, heads, ffn = (
        _number(header, f"{arch}.{key}")
        for key in ("block_count", "embedding_length", "attention.head_count", "feed_forward_length")
    )
    if layers > len(infos):
        raise UserError(f"{header.path}: {arch}.block_count={layers} but the file has only {len(infos)} tensors")
    head_dim = _number(header, f"{arch}.attention.key_length", dim // max(heads, 1))
    rotary = _number(header, f"{arch}.rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise UserError(f"{header.path}: {arch}.rope.dimension_count={rotary}, expected the whole head ({head_dim})")
    window = _number(header, f"{arch}.attention.sliding_window", 0)
    eos = [meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")]
    try:
        return ModelConfig(
            family=spec.family,
            vocab_size=infos["token_embd.weight"].shape[0],
            dim=dim,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_number(header, f"{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            ffn_dim=ffn,
            rope=_rope(header, arch, head_dim),
            norm_eps=_number(header, f"{arch}.attention.layer_norm_rms_epsilon"),
            qk_norm=spec.qk_norm,
            qkv_bias="blk.0.attn_q.bias" in infos,
            out_bias="blk.0.attn_output.bias" in infos,
            mlp_bias="blk.0.ffn_gate.bias" in infos,
            tied_head="output.weight" not in infos,
            sliding_window=(window,) * layers if window else (),
            max_positions=_number(header, f"{arch}.context_length"),
            bos_id=meta.get("tokenizer.ggml.bos_token_id"),
            eos_ids=tuple(dict.fromkeys(i for i in eos if i is not None)),
            pad_id=meta.get("tokenizer.ggml.padding_token_id"),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        reason = where + first["msg"].removeprefix("Value error, ")
        raise UserError(f"{header.path}: the metadata gives an impossible model: {reason}") from None


def _rope(header: Header, arch: str, head_dim: int) -> RopeConfig:
    meta = header.metadata
    theta = _number(header, f"{arch}.rope.freq_base", 10_000.0)
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors:
        return _llama3_rope(header, theta, head_dim)
    if kind == "none":
        return RopeConfig(theta=theta)
    factor = _number(header, f"{arch}.rope.scaling.factor")
    context = _number(header, f"{arch}.context_length")
    original = _number(header, f"{arch}.rope.scaling.original_context_length", context)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=factor, original_max_positions=original)
    attn = _number(header, f"{arch}.rope.scaling.attn_factor", 1.0)
    if kind != "yarn" or attn != 1.0:
        wrong = f"attn_factor={attn}" if kind == "yarn" else f"type={kind!r}"
        raise UserError(f"{header.path}: {arch}.rope.scaling.{wrong} is not known here (none, linear, plain yarn are)")
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_positions=original,
        beta_fast=_number(header, f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_number(header, f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
    )


def _llama3_rope(header: Header, theta: float, head_dim: int) -> RopeConfig:
    """Llama 3.1's scaling, which GGUF stores only as one divisor per frequency: find the numbers that give them.

    All published models use low 1, high 4 and 8,192 positions; only the factor differs, and it is the largest divisor.
    """
    got = LazyTensor(path=header.path, name="rope_freqs.weight", info=header.tensors["rope_freqs.weight"])()
    factor, original, low, high = float(got.max()), 8192, 1.0, 4.0
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    want = 1 / ((1 - smooth) / factor + smooth)
    if got.shape != want.shape or not np.allclose(got, want, rtol=1e-4):
        raise UserError(f"{header.path}: tensor rope_freqs.weight is not Llama 3.1's rope scaling, the one known here")
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=factor,
        original_max_positions=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _expected(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name to Hugging Face name and shape, for every tensor a dense model of this config has."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    d, f = config.dim, config.ffn_dim
    out: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (config.vocab_size, d)),
        "output_norm.weight": ("model.norm.weight", (d,)),
    }
    if not config.tied_head:
        out["output.weight"] = ("lm_head.weight", (config.vocab_size, d))
    linear = {
        "attn_q": ("self_attn.q_proj", (q, d), config.qkv_bias),
        "attn_k": ("self_attn.k_proj", (kv, d), config.qkv_bias),
        "attn_v": ("self_attn.v_proj", (kv, d), config.qkv_bias),
        "attn_output": ("self_attn.o_proj", (d, q), config.out_bias),
        "ffn_gate": ("mlp.gate_proj", (f, d), config.mlp_bias),
        "ffn_up": ("mlp.up_proj", (f, d), config.mlp_bias),
        "ffn_down": ("mlp.down_proj", (d, f), config.mlp_bias),
    }
    norms = {"attn_norm": ("input_layernorm", d), "ffn_norm": ("post_attention_layernorm", d)}
    if config.qk_norm == "head":
        norms["attn_q_norm"] = ("self_attn.q_norm", config.head_dim)
        norms["attn_k_norm"] = ("self_attn.k_norm", config.head_dim)
    for i in range(config.num_layers):
        for name, (hf, width) in norms.items():
            out[f"blk.{i}.{name}.weight"] = (f"model.layers.{i}.{hf}.weight", (width,))
        for name, (hf, shape, bias) in linear.items():
            out[f"blk.{i}.{name}.weight"] = (f"model.layers.{i}.{hf}.weight", shape)
            if bias:
                out[f"blk.{i}.{name}.bias"] = (f"model.layers.{i}.{hf}.bias", shape[:1])
    return out


def _entries(header: Header, config: ModelConfig) -> dict[str, LazyTensor]:
    """Hugging Face name to lazy tensor, in file order; the table is checked whole first."""
    expected = _expected(config)
    _, spec = _architecture(header)
    for name, (_, shape) in expected.items():
        if name not in header.tensors:
            raise UserError(f"{header.path}: tensor {name} is missing, expected with shape {shape}")
        if header.tensors[name].shape != shape:
            raise UserError(f"{header.path}: tensor {name} has shape {header.tensors[name].shape}, expected {shape}")
    for kind in {header.tensors[name].kind for name in expected}:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            name = next(n for n in expected if header.tensors[n].kind == kind)
            raise UserError(f"{header.path}: tensor {name}: `gguf` cannot decode block format {kind.name}") from None
    out: dict[str, LazyTensor] = {}
    for name, info in header.tensors.items():
        if name in expected:
            heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2], 0)
            out[expected[name][0]] = LazyTensor(
                path=header.path, name=name, info=info, rotary_heads=heads if spec.reordered else 0
            )
        elif name != "rope_freqs.weight":
            raise UserError(f"{header.path}: unexpected tensor {name}; the model has a part this reader does not know")
    return out
