"""`config.json` to `ModelConfig`, in both key generations of Hugging Face. The way back is `hf_export.py`.

transformers 4 writes `rope_theta`, `rope_scaling`, `torch_dtype`; transformers 5 writes `rope_parameters`, `dtype`, and
`num_local_experts` for every sparse family. Both are read (5.23 is the version compared with).
What the policy cannot compute is refused here, before any weight is read: a key that would change the numbers is
never skipped in silence.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cabochon.errors import UserError
from cabochon.model.config import LayerKind, ModelConfig, MoeConfig, RopeConfig

log = logging.getLogger(__name__)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}

CLASSIFIERS = {
    family: name.replace("CausalLM", "SequenceClassification")
    for family, name in ARCHITECTURES.items()
    if family != "olmoe"
}
"""A reward model: no language model's head, a score instead (`convert.save`)."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    # What transformers assumes where config.json leaves a key out (configuration_<family>.py, 5.23).
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 4,
                  "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "mixtral": {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 1e6,
                "num_experts": 8, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2},
    "olmoe": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8,
              "pad_token_id": 1, "eos_token_id": 50279},
}  # fmt: skip

_MUST_BE: dict[str, tuple[Any, ...]] = {
    # Keys that change the function and of which the policy computes one value only.
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "shared_expert_intermediate_size": (0, None),
    "n_shared_experts": (0, None),
}

_KEYS = {
    # What our fields are called in config.json, for errors.
    "dim": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "ffn_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings", "bos_id": "bos_token_id", "eos_ids": "eos_token_id",
    "pad_id": "pad_token_id", "top_k": "num_experts_per_tok", "theta": "rope_theta",
    "original_max_positions": "original_max_position_embeddings",
}  # fmt: skip

_WIDTH = {"qwen3_moe": "moe_intermediate_size", "mixtral": "intermediate_size", "olmoe": "intermediate_size"}
"""the key of an expert's width"""

_HARMLESS = frozenset(
    # Training-only, generation-only and book-keeping keys, and those read below.
    """architectures model_type dtype torch_dtype transformers_version _name_or_path name_or_path use_cache auto_map
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop output_router_logits router_aux_loss_coef
    router_jitter_noise pretraining_tp vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps max_position_embeddings rope_theta rope_scaling rope_parameters
    tie_word_embeddings attention_bias mlp_bias clip_qkv norm_topk_prob num_experts num_local_experts
    num_experts_per_tok moe_intermediate_size decoder_sparse_step mlp_only_layers use_sliding_window sliding_window
    max_window_layers layer_types bos_token_id eos_token_id pad_token_id is_llama_config transformers.js_config
    unsloth_fixed unsloth_version task_specific_params return_dict output_hidden_states output_attentions
    original_max_position_embeddings use_mrope is_decoder chunk_size_feed_forward id2label label2id problem_type
    tokenizer_class finetuning_task prefix sep_token_id decoder_start_token_id cross_attention_hidden_size
    min_length max_length do_sample temperature top_k top_p""".split()  # noqa: SIM905 - a list of 80 strings would take a screen
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming the file, and the line where it stops being JSON."""
    try:
        got = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a Hugging Face model directory has one") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno} column {error.colno} ({error.msg})") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(got, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(got).__name__}")
    return got


def read_config(directory: Path | str) -> ModelConfig:
    """The config of a Hugging Face directory; `generation_config.json` has the last word on the special tokens."""
    directory = Path(directory)
    raw = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    special = {}
    if generation.exists():
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        special = {key: value for key, value in read_json(generation).items() if key in keys and value is not None}
    elsewhere = dict.fromkeys(special, str(generation))
    return from_hf(raw | special, file=str(directory / "config.json"), elsewhere=elsewhere)


def from_hf(
    raw: Mapping[str, Any], *, file: str = "config.json", elsewhere: Mapping[str, str] | None = None
) -> ModelConfig:
    """A `ModelConfig` from the content of config.json. Raises UserError naming `file`, the key and its value.

    `elsewhere`: the files of keys that come from another one.
    """
    family = _family(raw, file)
    _refuse_what_we_do_not_compute(raw, file)
    get = _Reader(raw, _DEFAULTS[family], file)
    layers, dim, heads = (
        get.whole(key, most=100_000) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    kv_heads = get("num_key_value_heads") or heads
    bias = get.flag("attention_bias")
    eos = get("eos_token_id")
    try:
        kinds, moe = _feed_forward(get, family, layers)
        return ModelConfig(
            family=family,
            vocab_size=get.whole("vocab_size"),
            dim=dim,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=get("head_dim") or dim // heads,
            ffn_dim=get.whole("intermediate_size") if "dense" in kinds else 0,
            layer_kinds=kinds if len(set(kinds)) > 1 else (),
            moe=moe,
            rope=_rope(get, raw, file),
            norm_eps=get("rms_norm_eps"),
            qk_norm={"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}.get(family, "none"),
            qkv_bias=True if family == "qwen2" else bias and family != "mixtral",
            out_bias=bias and family not in ("qwen2", "mixtral"),
            mlp_bias=get.flag("mlp_bias") and family == "llama",
            clip_qkv=get("clip_qkv") if family == "olmoe" else None,
            tied_head=get.flag("tie_word_embeddings") or raw.get("architectures") == [CLASSIFIERS.get(family)],
            sliding_window=_windows(get, family, layers, file),
            max_positions=get.whole("max_position_embeddings"),
            bos_id=_first(get("bos_token_id")),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            pad_id=_first(get("pad_token_id")),
        )
    except ValidationError as error:
        said = _in_their_words(error, raw, family)
        raise UserError(f"{(elsewhere or {}).get(said.partition(':')[0], file)}: {said}") from None


def _in_their_words(error: ValidationError, raw: Mapping[str, Any], family: str) -> str:
    """What is wrong with a config, by the keys of config.json: `rms_norm_eps: Input should be ... (got -1)`."""
    first = error.errors()[0]
    said = re.sub(r"\w+", lambda word: _KEYS.get(word[0], word[0]), first["msg"].removeprefix("Value error, "))
    if not first["loc"]:
        return said
    key = str(first["loc"][0])
    key = _WIDTH[family] if (error.title, key) == ("MoeConfig", "ffn_dim") else _KEYS.get(key, key)
    section = _rope_section(raw)
    if error.title == "RopeConfig" and key in raw.get(section, ()):
        key = f"{section}.{key}"
    return f"{key}: {said} (got {first['input']!r:.80})"


def _rope_section(raw: Mapping[str, Any]) -> str:
    return "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"


class _Reader:
    """Looks a key up in config.json, then among the family's defaults."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any], file: str) -> None:
        self.raw, self.defaults, self.file = raw, defaults, file

    def __call__(self, key: str, default: Any = None) -> Any:
        """The value; an explicit null counts (`num_key_value_heads: null` means one per query head)."""
        return self.raw[key] if key in self.raw else self.defaults.get(key, default)

    def whole(self, key: str, default: Any = None, *, least: int = 1, most: int = 2**53) -> Any:
        """A whole number that must be there."""
        value = self(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            near = get_close_matches(key, [k for k in self.raw if k not in _HARMLESS], 1)
            hint = f"; did you mean it by {near[0]}?" if near else ""
            raise UserError(f"{self.file}: {key}: expected a whole number, found {value!r:.80}{hint}")
        if value < least:
            raise UserError(f"{self.file}: {key}: expected {least} or more, found {value}")
        if value > most:
            raise UserError(f"{self.file}: {key}: expected at most {most}, found {value:.3g}")
        return value

    def flag(self, key: str) -> bool:
        """True or false, which is also what null means and a key that is not there. Text is neither."""
        value = self(key)
        if not isinstance(value, bool | None):
            raise UserError(f"{self.file}: {key}: expected true or false, found {value!r:.80}")
        return bool(value)

    def listed(self, key: str, kind: type) -> Any:
        """A list of `kind`, empty where there is none."""
        value = self(key) or []
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            what = {int: "whole numbers", str: "names"}[kind]
            raise UserError(f"{self.file}: {key}: expected a list of {what}, found {value!r:.80}")
        return value


def _number(scaling: Mapping[str, Any], name: str, where: str) -> float | None:
    """A number of the rotary parameters, None where there is none."""
    value = scaling.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{where}.{name}: expected a number, found {value!r:.80}")
    return value


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _family(raw: Mapping[str, Any], file: str) -> str:
    by_architecture = {name: family for names in (ARCHITECTURES, CLASSIFIERS) for family, name in names.items()}
    named = _Reader(raw, {}, file).listed("architectures", str)
    for name in named:
        if name in by_architecture:
            return by_architecture[name]
    if not named and str(raw.get("model_type")) in ARCHITECTURES:
        return str(raw["model_type"])
    key, value = ("architectures", named[0]) if named else ("model_type", raw.get("model_type"))
    known = sorted(by_architecture if named else ARCHITECTURES)
    near = get_close_matches(str(value), known, 1, cutoff=0)
    nearest = near[0] if near else known[0]
    raise UserError(f"{file}: {key}: unknown {value!r}; nearest is {nearest} (known: {', '.join(known)})")


def _refuse_what_we_do_not_compute(raw: Mapping[str, Any], file: str) -> None:
    for key, allowed in _MUST_BE.items():
        if key in raw and raw[key] not in allowed:
            value = "{...}" if isinstance(raw[key], dict) else repr(raw[key])
            raise UserError(f"{file}: {key}: {value} is not supported; nearest is {allowed[0]!r}")
    unknown = sorted(k for k, v in raw.items() if k not in _HARMLESS and k not in _MUST_BE and v not in (None, False))
    if unknown:
        log.warning("%s: ignored keys that are not known to change the model: %s", file, ", ".join(unknown))


def _feed_forward(get: _Reader, family: str, layers: int) -> tuple[tuple[LayerKind, ...], MoeConfig | None]:
    """One kind per layer, and the sparse block if any layer has one."""
    if family in ("llama", "qwen2", "qwen3"):
        return _repeat("dense", layers), None
    experts = get.raw.get("num_local_experts", get("num_experts"))
    kinds = _repeat("moe", layers)
    if family == "qwen3_moe":
        step, dense = get.whole("decoder_sparse_step", 1), set(get.listed("mlp_only_layers", int))
        if not experts:
            dense = set(range(layers))
        kinds = tuple(_kind(i not in dense and (i + 1) % step == 0) for i in range(layers))
    if "moe" not in kinds:
        return kinds, None
    renormalised = family == "mixtral" or get.flag("norm_topk_prob")
    if not isinstance(experts, int) or get.whole("num_experts_per_tok") > experts:
        wrong = f"{get('num_experts_per_tok')} experts per token of {experts!r} experts"
        raise UserError(f"{get.file}: num_experts_per_tok: {wrong}; expected at most that many")
    moe = MoeConfig(
        num_experts=experts,
        top_k=get.whole("num_experts_per_tok"),
        ffn_dim=get.whole(_WIDTH[family]),
        gate="topk_softmax" if renormalised else "softmax_topk",
    )
    return kinds, moe


def _kind(sparse: bool) -> LayerKind:
    return "moe" if sparse else "dense"


def _repeat(kind: LayerKind, layers: int) -> tuple[LayerKind, ...]:
    return (kind,) * layers


def _windows(get: _Reader, family: str, layers: int, file: str) -> tuple[int, ...]:
    """Tokens each layer looks back over, 0 for all; () where every layer sees all."""
    window = get("sliding_window", 4096 if family.startswith("qwen") else None)
    if family == "mixtral":
        return (window,) * layers if window else ()
    if not family.startswith("qwen") or not get.flag("use_sliding_window") or window is None:
        if "sliding_attention" in get.listed("layer_types", str):
            raise UserError(f"{file}: layer_types: names sliding_attention, but sliding_window is not in use")
        return ()
    if family == "qwen3_moe":  # this family has no layer types: every layer slides
        return (window,) * layers
    types = get.listed("layer_types", str)
    if not types:
        start = get.whole("max_window_layers", 28, least=0)
        types = ["sliding_attention" if i >= start else "full_attention" for i in range(layers)]
    sizes = {"full_attention": 0, "sliding_attention": window}
    for kind in types:
        if kind not in sizes:
            raise UserError(f"{file}: layer_types: {kind!r} is not supported; expected one of {', '.join(sizes)}")
    return tuple(sizes[kind] for kind in types) if "sliding_attention" in types else ()


def _rope(get: _Reader, raw: Mapping[str, Any], file: str) -> RopeConfig:
    """Rotary parameters: nested under `rope_parameters` (5), or `rope_theta` beside `rope_scaling` (4).

    Where both are there, transformers takes `rope_scaling` and forgets the theta of the other: refused.
    """
    key = _rope_section(raw)
    if raw.get("rope_parameters") and raw.get("rope_scaling") not in (None, {}, raw["rope_parameters"]):
        raise UserError(f"{file}: rope_scaling: differs from rope_parameters, which is there too; keep one of them, "
                        "with rope_theta in it")  # fmt: skip
    scaling = raw.get(key) or {}
    if not isinstance(scaling, dict) or "full_attention" in scaling or "sliding_attention" in scaling:
        raise UserError(f"{file}: {key}: one rotary embedding for all layers is supported, found one per layer type")
    theta = scaling.get("rope_theta") or get("rope_theta", 10_000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kinds = ("default", "linear", "yarn", "llama3")
    if kind not in kinds:
        why = "its angles depend on the current length" if kind in ("dynamic", "longrope") else "unknown"
        near = get_close_matches(str(kind), kinds, 1, cutoff=0)
        raise UserError(f"{file}: {key}.rope_type: {kind!r} is not supported ({why}); nearest is {near[0]}")
    if scaling.get("partial_rotary_factor", 1) not in (1, None):
        raise UserError(f"{file}: {key}.partial_rotary_factor: {scaling['partial_rotary_factor']} is not supported; "
                        "nearest is 1")  # fmt: skip
    if kind == "default":
        return RopeConfig(theta=theta)
    longest, before = get.whole("max_position_embeddings"), "original_max_position_embeddings"
    original = _number(raw, before, f"{file}: {key}") or _number(scaling, before, f"{file}: {key}") or longest
    factor = _number(scaling, "factor", f"{file}: {key}") or (longest / original if kind == "yarn" else None)
    if factor is None:
        raise UserError(f"{file}: {key}.factor: missing; rope_type {kind!r} needs it")
    out: dict[str, Any] = {"kind": kind, "theta": theta, "factor": factor}
    if kind != "linear":
        out["original_max_positions"] = original
    if kind == "yarn":
        if not isinstance(scaling.get("truncate", True), bool):
            raise UserError(f"{file}: {key}.truncate: expected true or false, got {scaling['truncate']!r}")
        out["truncate"] = scaling.get("truncate", True)
        out |= {"beta_fast": scaling.get("beta_fast") or 32, "beta_slow": scaling.get("beta_slow") or 1}
        out["attention_factor"] = _attention_factor(scaling, factor, f"{file}: {key}")
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            if name not in scaling:
                raise UserError(f"{file}: {key}.{name}: missing; rope_type 'llama3' needs it")
            out[name] = scaling[name]
    return RopeConfig(**out)


def _attention_factor(scaling: Mapping[str, Any], factor: float, where: str) -> float | None:
    """YaRN's scale of cos and sin: given, or by DeepSeek's pair of mscale, or None for 0.1 ln(factor) + 1."""
    if (given := _number(scaling, "attention_factor", where)) is not None:
        return given
    one, all_dim = (_number(scaling, name, where) for name in ("mscale", "mscale_all_dim"))
    if not (one and all_dim) or factor <= 1:
        return None
    return (0.1 * one * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
