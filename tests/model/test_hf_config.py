"""config.json in both key generations, against transformers' own reading; every refusal is one line with names."""

import json
import logging

import pytest

from cabochon.errors import UserError
from cabochon.model.config import ModelConfig, MoeConfig, RopeConfig
from cabochon.model.hf_config import from_hf, read_config
from cabochon.model.hf_export import refuse_unexportable, to_hf

BASE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "hidden_act": "silu", "rms_norm_eps": 1e-6}  # fmt: skip


def v4(architecture, **keys):
    return {"architectures": [architecture], "torch_dtype": "bfloat16", "rope_theta": 5e5, **BASE, **keys}


def v5(architecture, **keys):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    return {"architectures": [architecture], "dtype": "bfloat16", **rope, **BASE, **keys}


def ours(family, **keys):
    base = {"vocab_size": 64, "dim": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
            "ffn_dim": 48,
            "norm_eps": 1e-6, "max_positions": 64, "rope": RopeConfig(theta=5e5), "tied_head": False}  # fmt: skip
    return ModelConfig(family=family, **{**base, **keys})


WINDOWED = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}
SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "decoder_sparse_step": 2,
          "mlp_only_layers": [3], "head_dim": 16}  # fmt: skip
CASES = [
    ("LlamaForCausalLM", {}, ours("llama", bos_id=1, eos_ids=(2,))),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "bos_token_id": None,
                          "eos_token_id": [5, 6], "head_dim": 4},
     ours("llama", qkv_bias=True, out_bias=True, mlp_bias=True, tied_head=True, eos_ids=(5, 6), head_dim=4)),
    ("Qwen2ForCausalLM", {}, ours("qwen2", qkv_bias=True)),
    ("Qwen2ForCausalLM", WINDOWED, ours("qwen2", qkv_bias=True, sliding_window=(0, 0, 0, 16))),
    ("Qwen2ForCausalLM", {**WINDOWED, "use_sliding_window": False}, ours("qwen2", qkv_bias=True)),
    ("Qwen3ForCausalLM", {}, ours("qwen3", qk_norm="head", head_dim=128)),
    ("Qwen3ForCausalLM", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8,
                          "layer_types": ["sliding_attention", "full_attention"] * 2},
     ours("qwen3", qk_norm="head", head_dim=16, sliding_window=(8, 0, 8, 0))),
    ("Qwen3MoeForCausalLM", {**SPARSE, "num_experts": 4},
     ours("qwen3_moe", qk_norm="head", head_dim=16, layer_kinds=("dense", "moe", "dense", "dense"),
          moe=MoeConfig(num_experts=4, top_k=2, ffn_dim=24, gate="topk_softmax"))),
    ("Qwen3MoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
     ours("qwen3_moe", qk_norm="head", ffn_dim=0,
          moe=MoeConfig(num_experts=4, top_k=2, ffn_dim=24, gate="softmax_topk"))),
    ("MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": 7, "head_dim": None},
     ours("mixtral", ffn_dim=0, moe=MoeConfig(num_experts=4, top_k=2, ffn_dim=48), sliding_window=(7,) * 4,
          bos_id=1, eos_ids=(2,))),
    ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 3, "clip_qkv": 8.0, "eos_token_id": 9},
     ours("olmoe", ffn_dim=0, qk_norm="full", clip_qkv=8.0, eos_ids=(9,), pad_id=1,
          moe=MoeConfig(num_experts=4, top_k=3, ffn_dim=48, gate="softmax_topk"))),
]  # fmt: skip


@pytest.mark.parametrize("form", [v4, v5])
@pytest.mark.parametrize(("architecture", "keys", "expected"), CASES)
def test_both_key_generations_give_the_same_config(form, architecture, keys, expected):
    assert from_hf(form(architecture, **keys)) == expected


@pytest.mark.parametrize("config", [case[2] for case in CASES])
def test_written_and_read_again_is_the_same(config):
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


@pytest.mark.parametrize("config", [case[2] for case in CASES])
def test_transformers_reads_what_we_write(config, tmp_path):
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(to_hf(config, dtype="bfloat16")))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == config.family
    assert str(theirs.dtype) == "torch.bfloat16"
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.vocab_size) == (32, 4, 64)
    assert theirs.tie_word_embeddings == config.tied_head
    if config.moe:
        assert (theirs.num_experts, theirs.num_experts_per_tok) == (config.moe.num_experts, config.moe.top_k)
    # and what transformers itself writes from that, in its own words, is the same config again
    theirs.architectures = to_hf(config)["architectures"]
    assert from_hf(json.loads(theirs.to_json_string())) == config


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Qwen3Moe", "Mixtral", "Olmoe"])
def test_left_out_keys_mean_what_transformers_means(name):
    """A config.json with only what a model cannot do without equals the same one with every default spelled out."""
    import transformers

    theirs = getattr(transformers, f"{name}Config")(hidden_size=256, num_attention_heads=32, num_hidden_layers=2,
                                                    intermediate_size=48, vocab_size=64)  # fmt: skip
    spelled = json.loads(theirs.to_json_string(use_diff=False))
    spelled["architectures"] = [f"{name}ForCausalLM"]
    bare = {key: spelled[key] for key in ("architectures", "hidden_size", "num_attention_heads", "num_hidden_layers",
                                          "intermediate_size", "vocab_size")}  # fmt: skip
    assert from_hf(bare) == from_hf(spelled)


ROPES = [
    ({"rope_type": "linear", "factor": 4.0}, RopeConfig(kind="linear", theta=1e4, factor=4)),
    ({"type": "linear", "factor": 2}, RopeConfig(kind="linear", theta=1e4, factor=2)),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32},
     RopeConfig(kind="llama3", theta=1e4, factor=8, original_max_positions=32)),
    ({"rope_type": "yarn", "factor": 4.0}, RopeConfig(kind="yarn", theta=1e4, factor=4, original_max_positions=64)),
    ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16, "mscale": 1.0,
      "mscale_all_dim": 0.5},
     RopeConfig(kind="yarn", theta=1e4, factor=4, original_max_positions=16, beta_fast=16,
                attention_factor=1.1386294361119891 / 1.0693147180559945)),
    ({"rope_type": "yarn", "original_max_position_embeddings": 16, "attention_factor": 1.2},
     RopeConfig(kind="yarn", theta=1e4, factor=4, original_max_positions=16, attention_factor=1.2)),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": False},
     RopeConfig(kind="yarn", theta=1e4, factor=4, original_max_positions=64, truncate=False)),
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "expected"), ROPES)
def test_rotary_scaling(scaling, expected):
    raw = {"architectures": ["LlamaForCausalLM"], **BASE}
    assert from_hf({**raw, "rope_theta": 1e4, "rope_scaling": scaling}).rope == expected
    assert from_hf({**raw, "rope_parameters": {**scaling, "rope_theta": 1e4}}).rope == expected
    again = from_hf(to_hf(from_hf({**raw, "rope_theta": 1e4, "rope_scaling": scaling}))).rope
    assert again == expected


def test_static_ntk_is_written_as_its_base():
    """theta' = theta s^(d/(d-2)): for d=8, s=8 that is 8^(4/3) = 16 times the base."""
    config = ours("llama", rope=RopeConfig(kind="ntk", theta=1e4, factor=8))
    assert to_hf(config)["rope_parameters"] == {"rope_type": "default", "rope_theta": pytest.approx(160_000, rel=1e-12)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures: unknown 'MistralForCausalLM'; nearest is Mixtral"),
        ({"architectures": None, "model_type": "qwen4"}, "model_type: unknown 'qwen4'; nearest is qwen"),
        ({"architectures": None}, "model_type: unknown None"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; nearest is 'silu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type: 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, "rope_parameters.rope_type: 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linaer", "factor": 2}}, "(unknown); nearest is linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "rope_scaling.low_freq_factor: missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": 0}},
         "rope_scaling.truncate: expected true or false, got 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
          "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
         "rope_scaling: differs from rope_parameters, which is there too; keep one of them"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, found 'false'"),
        ({"attention_bias": 1}, "attention_bias: expected true or false, found 1"),
        ({"mlp_bias": "no"}, "mlp_bias: expected true or false, found 'no'"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": "false"}, "norm_topk_prob: expected true or"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": "true"}, "use_sliding_window: expected true or"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers: expected at most 100000, found 1e+30"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported; nearest is 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: {...} is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved: True"),
        ({"hidden_size": None}, "hidden_size: expected a whole number, found None"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers: expected a whole number, found '4'"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: Input should be greater than 0 (got -1)"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: Input should be a finite number (got inf)"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected 1 or more, found 0"),
        ({"num_key_value_heads": -1}, "num_key_value_heads: Input should be"),
        ({"intermediate_size": -1}, "intermediate_size: expected 1 or more, found -1"),
        ({"rope_theta": 0.5}, "rope_theta: Input should be greater than 1 (got 0.5)"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor: Input should be"),
        ({"rope_parameters": {"rope_theta": "a"}}, "rope_parameters.rope_theta: Input should be a valid number"),
        ({"bos_token_id": "a"}, "bos_token_id: Input should be a valid integer"),
        ({"eos_token_id": [1, "a"]}, "eos_token_id: Input should be a valid integer"),
        ({"head_dim": 7}, "config.json: head_dim=7 must be even for rotary embeddings"),
        ({"architectures": [["a"]]}, "architectures: expected a list of names, found [['a']]"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: expected a list of names, found 'LlamaForCausalLM'"),
        ({"architectures": None, "model_type": ["llama"]}, "model_type: unknown ['llama']; nearest is llama"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 0}, "decoder_sparse_step: expected 1 or"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": "2"}, "decoder_sparse_step: expected a"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": 3}, "mlp_only_layers: expected a list of whole"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": -1},
         "moe_intermediate_size: expected 1 or more, found -1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": "a"}}, "rope_scaling.mscale: expected a number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": "x"}},
         "rope_scaling.attention_factor: expected a number, found 'x'"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": "x"}},
         "rope_scaling.original_max_position_embeddings: expected a number, found 'x'"),
        ({"architectures": ["Qwen2ForCausalLM"], **WINDOWED, "max_window_layers": "a"},
         "max_window_layers: expected a whole number, found 'a'"),
        ({"architectures": ["Qwen2ForCausalLM"], **WINDOWED, "sliding_window": -1}, "sliding_window: Input should be"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": [["a"]]}, "layer_types: expected a list of names"),
        ({"architectures": ["Qwen2ForCausalLM"], **WINDOWED, "layer_types": [["a"]]}, "layer_types: expected a list"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 4},
         "layer_types: names sliding_attention, but sliding_window is not in use"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
         "layer_types: 'chunked_attention' is not supported"),
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3},
         "num_experts_per_tok: 3 experts per token of 2 experts"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_naming_file_key_and_value(change, says):
    with pytest.raises(UserError) as caught:
        from_hf({**v4("LlamaForCausalLM"), **change}, file="m/config.json")
    message = str(caught.value)
    assert message.startswith("m/config.json: ")
    assert says in message
    assert "\n" not in message


def test_files_that_do_not_parse_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(UserError, match=r"config\.json: not JSON at line 2 column 2"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(maximum recursion"):
        read_config(tmp_path)


def test_generation_config_has_the_last_word_on_special_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(v4("LlamaForCausalLM", eos_token_id=2, pad_token_id=0)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2], "bos_token_id": None}))
    config = read_config(tmp_path)
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (7, 2), 0)


def test_what_generation_config_gets_wrong_is_blamed_on_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(v4("LlamaForCausalLM", eos_token_id=2)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "a"}))
    with pytest.raises(UserError, match=rf"^{tmp_path}/generation_config\.json: eos_token_id: Input should be a valid"):
        read_config(tmp_path)


def test_unknown_keys_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        from_hf(v4("LlamaForCausalLM", residual_scale=0.5, use_cache=True, new_switch=False))
    assert "residual_scale" in caplog.text
    assert "new_switch" not in caplog.text
    assert "use_cache" not in caplog.text


MOE = MoeConfig(num_experts=4, top_k=2, ffn_dim=48)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ours("llama", moe=MOE), "llama has no place for layer_kinds: moe layers; family=mixtral has"),
        (ours("mixtral", moe=MOE, qkv_bias=True), "mixtral has no place for qkv_bias: biases on q, k, v; no supported"),
        (ours("mixtral", moe=MOE, layer_kinds=("dense", "moe") * 2), "mixtral has no place for layer_kinds: dense"),
        (ours("mixtral", moe=MOE.model_copy(update={"gate": "softmax_topk"})), "gates that do not sum to 1"),
        (ours("mixtral", moe=MOE.model_copy(update={"shared_ffn_dim": 8})), "a shared expert"),
        (ours("mixtral", moe=MOE.model_copy(update={"aux_free_bias": True})), "a selection bias"),
        (ours("qwen2"), "qwen2 has no place for qkv_bias=false: projections without a bias; family=llama has"),
        (ours("llama", qkv_bias=True), "qkv_bias without out_bias, or the reverse; family=qwen2"),
        (ours("qwen3", qk_norm="none"), "qwen3 has no place for qk_norm=none; family=llama has"),
        (ours("llama", sliding_window=(4,) * 4), "llama has no place for sliding_window"),
        (ours("qwen3", qk_norm="head", sliding_window=(4, 8, 4, 8)), "sliding_window of several sizes"),
        (ours("qwen2", qkv_bias=True, mlp_bias=True), "qwen2 has no place for mlp_bias"),
        (ours("llama", dim=30, head_dim=8), "llama has no place for dim=30 that is no multiple of num_heads=4"),
    ],
)
def test_what_a_family_cannot_say_is_refused_before_any_work(config, says):
    with pytest.raises(UserError) as caught:
        refuse_unexportable(config)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
