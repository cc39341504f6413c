"""Sparse upcycling: the same function at step 0, whatever the router; counts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.model import convert, transformer
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.model.hf_export import refuse_unexportable
from cabochon.model.hf_names import leaf_shapes, set_leaf
from cabochon.model.upcycle import parameter_counts, upcycle, upcycled_config

TOKENS = jnp.asarray((np.arange(40).reshape(2, 20) * 13) % 64, jnp.int32)


def dense(family="llama", **keys):
    base = {"vocab_size": 64, "dim": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return ModelConfig(family=family, **{**base, "ffn_dim": 48, **keys})


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params):
    out = transformer.forward(config, params, TOKENS)
    return transformer.logits(config, params, out.hidden_BTD), out.routes_BTLC


def logits(config, params):
    return np.asarray(forward(config, params)[0])


def random_params(config):
    """Weights of sizes at which a wrong gate shows in the logits."""
    rng = np.random.default_rng(0)
    out = {}
    for path, shape in leaf_shapes(config).items():
        scale = 1.0 if path[-1] in ("scale", "table") else 0.3
        set_leaf(out, path, jnp.asarray(scale * rng.standard_normal(shape), jnp.float32))
    return out


@pytest.mark.parametrize(
    ("family", "keys", "layers"),
    [
        ("llama", {}, None),
        ("llama", {}, (1, 3)),
        ("qwen2", {"qkv_bias": True}, (0, 2, 3)),
        ("qwen3", {"qk_norm": "head"}, None),
    ],
)
def test_same_logits_at_step_zero(family, keys, layers):
    config = dense(family, **keys)
    params = random_params(config)
    sparse, experts = upcycle(config, params, num_experts=4, top_k=2, layers=layers)
    expected_kinds = tuple("moe" if layers is None or i in layers else "dense" for i in range(4))
    assert sparse.kinds == expected_kinds
    assert jax.tree.map(jnp.shape, experts) == jax.tree.map(lambda x: x.shape, transformer.abstract(sparse))
    before = logits(config, params)
    np.testing.assert_allclose(logits(sparse, experts), before, atol=1e-4, rtol=0)
    assert before.std() > 0.5


@pytest.mark.parametrize("top_k", [1, 3])
def test_any_top_k_is_exact(top_k):
    config = dense()
    params = random_params(config)
    sparse, experts = upcycle(config, params, num_experts=4, top_k=top_k, router_std=5.0)
    np.testing.assert_allclose(logits(sparse, experts), logits(config, params), atol=1e-4, rtol=0)


def test_tokens_really_go_to_different_experts():
    config = dense()
    sparse, experts = upcycle(config, random_params(config), num_experts=4, top_k=2)
    routes = np.asarray(forward(sparse, experts)[1])
    assert len({tuple(sorted(pair)) for pair in routes.reshape(-1, 2).tolist()}) >= 4


def test_noise_is_a_fraction_of_the_root_mean_square_and_differs_per_expert():
    config = dense(dim=64, ffn_dim=128, num_layers=2)
    params = random_params(config)
    sparse, experts = upcycle(config, params, num_experts=4, top_k=2, noise=0.1, seed=3)
    original = np.asarray(params["blocks"]["0"]["0"]["mlp"]["gate_up"]["w"])  # [2, 64, 2, 128]
    noisy = np.asarray(experts["blocks"]["0"]["0"]["moe"]["gate_up"])  # [2, 4, 64, 2, 128]
    rms = np.sqrt((original**2).mean((1, 2, 3)))
    for layer in range(2):
        delta = (noisy[layer] - original[layer]).reshape(4, -1)
        np.testing.assert_allclose(delta.std(axis=1) / rms[layer], 0.1, rtol=0.05)
        np.testing.assert_allclose(np.corrcoef(delta), np.eye(4), atol=0.05)
    assert np.abs(logits(sparse, experts) - logits(config, params)).max() > 1e-3
    again = upcycle(config, params, num_experts=4, top_k=2, noise=0.1, seed=3)[1]
    jax.tree.map(np.testing.assert_array_equal, again, experts)


def test_router_starts():
    config = dense(dim=64)
    params = random_params(config)
    _, normal = upcycle(config, params, num_experts=8, top_k=2, router_std=0.02)
    w = np.asarray(normal["blocks"]["0"]["0"]["moe"]["router"]["w"])
    assert w.std() == pytest.approx(0.02, rel=0.1)
    assert not np.allclose(w[0], w[1])
    _, orthogonal = upcycle(config, params, num_experts=8, top_k=2, router="orthogonal")
    for r in np.asarray(orthogonal["blocks"]["0"]["0"]["moe"]["router"]["w"]):  # SimBal: |R^T R - I|_1 = 0
        np.testing.assert_allclose(r.T @ r, np.eye(8), atol=1e-5)
    with pytest.raises(UserError, match="router=orthogonal: 65 experts cannot be orthogonal in 64"):
        upcycle(config, params, num_experts=65, top_k=2, router="orthogonal")


def test_counts_by_hand():
    """V=10 D=4 N=K=1 H=2 F=3, one layer, tied: embed 40; norms 4+4+4; qkv 4*3*2=24; out 8; dense mlp 36."""
    config = ModelConfig(vocab_size=10, dim=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, ffn_dim=3)
    counts = parameter_counts(config)
    assert (counts.total, counts.active) == (40 + 12 + 24 + 8 + 36, 40 + 12 + 24 + 8 + 36)
    sparse = parameter_counts(upcycled_config(config, num_experts=8, top_k=2))  # router 4*8
    assert (sparse.total, sparse.active) == (40 + 12 + 24 + 8 + 32 + 8 * 36, 40 + 12 + 24 + 8 + 32 + 2 * 36)


def test_counts_of_a_published_model():
    """Mixtral 8x7B: 46.7 billion parameters of which 12.9 are active (its paper says 47 and 13)."""
    config = ModelConfig(
        family="mixtral", vocab_size=32000, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        moe=MoeConfig(num_experts=8, top_k=2, ffn_dim=14336), tied_head=False,
    )  # fmt: skip
    counts = parameter_counts(config)
    assert (counts.total, counts.active) == (46_702_792_704, 12_879_925_248)


@pytest.mark.parametrize(("family", "keys"), [("llama", {}), ("qwen3", {"qk_norm": "head", "head_dim": 16})])
@pytest.mark.parametrize("layers", [None, (1, 2)], ids=str)
def test_transformers_runs_what_was_upcycled(family, keys, layers, tmp_path):
    import torch
    import transformers

    config = dense(family, **keys)
    params = random_params(config)
    sparse, experts = upcycle(config, params, num_experts=4, top_k=2, layers=layers)
    if family == "llama" and layers:
        with pytest.raises(UserError, match="mixtral has no place for layer_kinds: dense layers"):
            refuse_unexportable(sparse)
        return
    convert.save(tmp_path / "m", sparse, experts)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    np.testing.assert_allclose(theirs, logits(config, params), atol=1e-4, rtol=0)


def test_biases_of_qwen2_are_said_to_be_unexportable():
    sparse = upcycled_config(dense("qwen2", qkv_bias=True), num_experts=4, top_k=2)
    with pytest.raises(UserError, match="mixtral has no place for qkv_bias: biases on q, k, v; no supported family"):
        refuse_unexportable(sparse)


@pytest.mark.parametrize(
    ("config", "keys", "says"),
    [
        (dense(mlp_bias=True), {}, "mlp_bias=true: experts have no biases"),
        (dense(), {"top_k": 5}, "top_k=5: expected 1 to num_experts=4"),
        (dense(), {"layers": [4]}, "layer 4: the model has layers 0 to 3"),
        (dense(), {"layers": []}, "no layer to convert"),
        (dense("mixtral", moe=MoeConfig(ffn_dim=48)), {}, "family mixtral is not dense; expected one of llama"),
    ],
)
def test_what_cannot_be_upcycled(config, keys, says):
    with pytest.raises(UserError, match=says):
        upcycled_config(config, **{"num_experts": 4, "top_k": 2, **keys})


def test_only_what_changes_is_new_memory():
    config = dense()
    params = random_params(config)
    sparse, experts = upcycle(config, params, num_experts=4, top_k=2)
    assert experts["embed"]["table"] is params["embed"]["table"]
    assert experts["blocks"]["0"]["0"]["attn"]["qkv"]["w"] is params["blocks"]["0"]["0"]["attn"]["qkv"]["w"]
    assert sum(x.size for x in jax.tree.leaves(experts)) == parameter_counts(sparse).total
    assert len(leaf_shapes(sparse)) == len(jax.tree.leaves(experts))
