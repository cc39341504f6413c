"""Weights in and out against transformers on tiny random models of every family, and what damage to files says."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from cabochon.errors import UserError
from cabochon.model import convert, transformer
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.model.hf_files import read_header
from cabochon.model.hf_names import leaf_shapes

COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
          "initializer_range": 0.3}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2-windowed": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe-hybrid": ("Qwen3Moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                      "moe_intermediate_size": 24, "decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen3_moe-all-dense": ("Qwen3Moe", {"head_dim": 16, "mlp_only_layers": [0, 1, 2]}),
    "mixtral-windowed": ("Mixtral", {"num_local_experts": 4, "sliding_window": 5}),
    "olmoe-clipped": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.8, "eos_token_id": 3}),
}  # fmt: skip
SPARSE = [name for name, (_, keys) in FAMILIES.items() if {"num_experts", "num_local_experts"} & set(keys)]


def theirs(name, **extra):
    """A tiny random transformers model whose norms and biases are not their trivial initial values."""
    import torch
    import transformers

    kind, keys = FAMILIES[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **keys, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2) if p.ndim == 1 else p
    return model


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(config, params, tokens):
    out = transformer.forward(config, params, jnp.asarray(tokens, jnp.int32))
    return np.asarray(transformer.logits(config, params, out.hidden_BTD))


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


def tree_of(config, seed=0):
    """Random parameters by the documented shapes alone."""
    rng = np.random.default_rng(seed)
    out = {}
    for path, shape in leaf_shapes(config).items():
        node = out
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = rng.standard_normal(shape).astype(np.float32)
    return out


TOKENS = (np.arange(24).reshape(2, 12) * 7) % 64


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_there_and_back(name, tmp_path):
    """Load theirs in shards: equal logits. Export: transformers loads it whole and agrees. Import: bitwise the same."""
    import transformers

    model = theirs(name)
    model.save_pretrained(tmp_path / "a", max_shard_size=20_000)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    config, params = convert.load(tmp_path / "a")
    expected = their_logits(model, TOKENS)
    np.testing.assert_allclose(our_logits(config, params, TOKENS), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1

    convert.save(tmp_path / "b", config, params, max_shard_bytes=30_000)
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told.values()), told
    np.testing.assert_array_equal(their_logits(again, TOKENS), expected)
    config_2, params_2 = convert.load(tmp_path / "b")
    assert config_2 == config
    assert_same_tree(params_2, params)


@pytest.mark.parametrize("name", SPARSE)
def test_the_fused_expert_layout_reads_the_same(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "each", save_original_format=True)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = read_header(tmp_path / "fused" / "model.safetensors")
    assert any(n.endswith("mlp.experts.gate_up_proj") for n in names)
    each, fused = convert.load(tmp_path / "each"), convert.load(tmp_path / "fused")
    assert each[0] == fused[0]
    assert_same_tree(each[1], fused[1])
    convert.save(tmp_path / "written", *fused)
    assert set(read_header(tmp_path / "written" / "model.safetensors")) == set(
        read_header(tmp_path / "each" / "model.safetensors")
    )


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-unrounded": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_scaling_gives_their_logits(kind, tmp_path):
    model = theirs("llama", rope_parameters={"rope_theta": 100.0, **ROPES[kind]}, head_dim=16)
    model.save_pretrained(tmp_path)
    config, params = convert.load(tmp_path)
    tokens = (np.arange(60)[None] * 11) % 64
    expected = their_logits(model, tokens)
    np.testing.assert_allclose(our_logits(config, params, tokens), expected, atol=1e-4, rtol=0)
    plain = config.model_copy(update={"rope": config.rope.model_copy(update={"kind": "default"})})
    assert np.abs(our_logits(plain, params, tokens) - expected).max() > 0.01  # the test can tell


MOE_CONFIG = ModelConfig(
    family="qwen3_moe", vocab_size=64, dim=32, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48,
    layer_kinds=("dense", "moe", "moe") * 2, qk_norm="head", tied_head=False,
    moe=MoeConfig(num_experts=4, top_k=2, ffn_dim=24),
)  # fmt: skip


def test_values_land_where_the_layout_says(tmp_path):
    """Query head h and layer l by hand: HF q_proj row 8h+j of layer 3 is qkv.w[repeat 1, :, h // 2, h % 2, j]."""
    from safetensors.numpy import load_file

    params = tree_of(MOE_CONFIG)
    convert.save(tmp_path / "m", MOE_CONFIG, params)
    flat = load_file(tmp_path / "m" / "model.safetensors")
    block = params["blocks"]["0"]["0"]  # layers 0 and 3: the dense ones
    q, k = flat["model.layers.3.self_attn.q_proj.weight"], flat["model.layers.3.self_attn.k_proj.weight"]
    for h in range(4):
        np.testing.assert_array_equal(q[8 * h + 5], block["attn"]["qkv"]["w"][1, :, h // 2, h % 2, 5])
    np.testing.assert_array_equal(k[8 + 3], block["attn"]["qkv"]["w"][1, :, 1, 2, 3])
    np.testing.assert_array_equal(flat["model.layers.3.mlp.up_proj.weight"], block["mlp"]["gate_up"]["w"][1, :, 1].T)
    sparse = params["blocks"]["0"]["2"]["moe"]  # layers 2 and 5
    gate = flat["model.layers.5.mlp.experts.3.gate_proj.weight"]
    np.testing.assert_array_equal(gate, sparse["gate_up"][1, 3, :, 0].T)
    np.testing.assert_array_equal(flat["model.layers.2.mlp.experts.1.down_proj.weight"], sparse["down"][0, 1].T)
    np.testing.assert_array_equal(flat["model.layers.2.mlp.gate.weight"], sparse["router"]["w"][0].T)
    np.testing.assert_array_equal(flat["lm_head.weight"], params["head"]["w"].T)


def test_read_straight_into_shards(tmp_path):
    """Every leaf cut along two mesh axes (experts, and whichever dim divides): the same values, each shard its part."""
    params = tree_of(MOE_CONFIG)
    convert.save(tmp_path / "m", MOE_CONFIG, params)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def cut(x):
        spec = [None] * x.ndim
        for axis in ("b", "a"):
            size = mesh.shape[axis]
            at = next((i for i in reversed(range(x.ndim)) if spec[i] is None and x.shape[i] % size == 0), None)
            if at is not None:
                spec[at] = axis
        return NamedSharding(mesh, P(*spec))

    shardings = jax.tree.map(cut, params)
    _, got = convert.load(tmp_path / "m", shardings=shardings)
    assert_same_tree(got, params)
    for leaf, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding
        assert len(leaf.addressable_shards) == 8
    gate_up = got["blocks"]["0"]["1"]["moe"]["gate_up"]  # [2, 4, 32, 2, 24]: over "b" in the last dim, over "a" before
    assert gate_up.addressable_shards[0].data.shape == (2, 4, 32, 1, 6)
    one = SingleDeviceSharding(jax.devices()[5])
    _, elsewhere = convert.load(tmp_path / "m", shardings=one)
    assert {leaf.device for leaf in jax.tree.leaves(elsewhere)} == {jax.devices()[5]}
    assert_same_tree(elsewhere, params)


def test_loaded_parameters_survive_donation(tmp_path):
    """They sit on memory that came from numpy; a step that donates them must neither fail nor change them early."""
    params = tree_of(MOE_CONFIG)
    convert.save(tmp_path / "m", MOE_CONFIG, params)
    _, got = convert.load(tmp_path / "m")
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    got = step(step(got))
    assert_same_tree(got, jax.tree.map(lambda x: (x + np.float32(1)) + np.float32(1), params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types_on_disk(dtype, tmp_path):
    """Rounded once when written; read back to f32 exactly; half the bytes."""
    params = tree_of(MOE_CONFIG)
    convert.save(tmp_path / "m", MOE_CONFIG, params, dtype=dtype)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == dtype
    _, got = convert.load(tmp_path / "m")
    assert_same_tree(got, jax.tree.map(lambda x: np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32)), params))
    _, half = convert.load(tmp_path / "m", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_a_tied_checkpoint_may_repeat_its_head_but_not_change_it(tmp_path):
    from safetensors.numpy import load_file, save_file

    config = ModelConfig(vocab_size=64, dim=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, ffn_dim=8)
    convert.save(tmp_path, config, tree_of(config), overwrite=True)
    file = tmp_path / "model.safetensors"
    flat = load_file(file)
    head = flat["model.embed_tokens.weight"].copy()
    save_file({**flat, "lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4)}, file)
    convert.load(tmp_path)
    head[0, 0] += 1
    save_file({**flat, "lm_head.weight": head}, file)
    with pytest.raises(UserError, match=r"model\.safetensors: lm_head\.weight: differs .* tie_word_embeddings"):
        convert.load(tmp_path)


def test_an_existing_directory_is_not_overwritten_unless_told(tmp_path):
    params = tree_of(MOE_CONFIG)
    (tmp_path / "m").mkdir()
    convert.save(tmp_path / "m", MOE_CONFIG, params)  # empty: fine
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.save(tmp_path / "m", MOE_CONFIG, params)
    assert (tmp_path / "m" / "notes.txt").exists()
    other = tree_of(MOE_CONFIG, seed=1)
    convert.save(tmp_path / "m", MOE_CONFIG, other, overwrite=True)
    assert not (tmp_path / "m" / "notes.txt").exists()
    assert_same_tree(convert.load(tmp_path / "m")[1], other)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failed_export_leaves_nothing(tmp_path):
    params = tree_of(MOE_CONFIG)

    class Full:
        def save(self, directory):
            assert (directory / "model.safetensors").exists()
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"m: could not be written: No space left on device; nothing was left"):
        convert.save(tmp_path / "m", MOE_CONFIG, params, tokenizer=Full())
    del params["final_norm"]
    with pytest.raises(UserError, match=r"parameter final_norm\.scale: expected shape \[32\], found nothing"):
        convert.save(tmp_path / "m", MOE_CONFIG, params)
    params["final_norm"] = {"scale": np.zeros(31)}
    with pytest.raises(UserError, match=r"final_norm\.scale: expected shape \[32\], found \[31\]"):
        convert.save(tmp_path / "m", MOE_CONFIG, params)
    params["final_norm"] = {"scale": np.zeros(32), "lora_a": np.zeros(32)}
    with pytest.raises(UserError, match=r"parameter final_norm\.lora_a: not part of a qwen3_moe model"):
        convert.save(tmp_path / "m", MOE_CONFIG, params)
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, numpy as np
sys.path.insert(0, sys.argv[2])
from cabochon.model import convert
from cabochon.model.config import ModelConfig
from test_convert import tree_of
config = ModelConfig(vocab_size=20000, dim=512, num_layers=4, num_heads=8, num_kv_heads=8, head_dim=64, ffn_dim=2048)
params = tree_of(config)
print("begin", flush=True)
convert.save(sys.argv[1], config, params, max_shard_bytes=10_000_000)
"""


def test_kill_9_in_the_middle_of_an_export_leaves_nothing_under_its_name(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "m"), os.path.dirname(__file__)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begin\n"
    while not list(tmp_path.glob(".m.*.partial/model-00002*")):
        time.sleep(0.001)
        assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "m").exists()
    assert [p.name.startswith(".m.") for p in tmp_path.iterdir()] == [True]


def test_the_tokenizer_goes_along(tmp_path):
    from cabochon.tokenizer import ByteTokenizer, Tokenizer

    tok = ByteTokenizer()
    config = MOE_CONFIG.model_copy(update={"vocab_size": tok.vocab_size, "eos_ids": (1, 2), "bos_id": 0})
    convert.save(tmp_path / "m", config, tree_of(config), tokenizer=tok)
    assert Tokenizer.from_dir(tmp_path / "m").encode("Grüße") == tok.encode("Grüße")
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["bos_token_id"]) == ([1, 2], 0)
    expected = config.model_copy(update={"pad_id": tok.pad_id})  # the config named none, the tokenizer did
    assert convert.read_config(tmp_path / "m") == expected
