"""The policy as a function: packing, padding, cache, replay, scan grouping. f32 throughout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.batch import best_fit, from_sequences
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.testing import tiny_config, tiny_moe

MODELS = {
    "dense": tiny_config(),
    "moe": tiny_moe(),
    "full_norm_window": tiny_moe(qk_norm="full", sliding_window=(0, 4, 4, 0), layer_kinds=("moe",) * 4),
}


def draw(cfg, rows=2, length=11, seed=0):
    params = tf.init(cfg, jax.random.key(seed))
    tokens = jax.random.randint(jax.random.key(seed + 1), (rows, length), 0, cfg.vocab_size)
    return params, tokens


def full(cfg, params, tokens, *args, **kwargs):
    out = jax.jit(lambda p, t: tf.forward(cfg, p, t, *args, **kwargs))(params, tokens)
    return tf.logits(cfg, params, out.hidden_BTD), out


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_equal_rows_of_their_own(name):
    cfg = MODELS[name]
    params, _ = draw(cfg)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, cfg.vocab_size, n).astype(np.int32) for n in (7, 3, 5, 9, 4)]
    masks = [np.ones(len(t)) for t in tokens]
    alone = jax.tree.map(jnp.asarray, from_sequences(tokens, masks, 16))
    bins = best_fit([len(t) for t in tokens], 16)
    assert len(bins) == 2
    packed = jax.tree.map(jnp.asarray, from_sequences(tokens, masks, 16, rows=bins))
    one, _ = full(cfg, params, alone.tokens_BT, alone.position_BT, alone.segment_BT)
    many, _ = full(cfg, params, packed.tokens_BT, packed.position_BT, packed.segment_BT)
    for r, members in enumerate(bins):
        start = 0
        for i in members:
            n = len(tokens[i])
            np.testing.assert_allclose(many[r, start : start + n], one[i, :n], atol=1e-4)
            start += n


def test_padding_changes_nothing_and_is_not_counted():
    cfg = MODELS["moe"]
    params, tokens = draw(cfg)
    short, out = full(cfg, params, tokens)
    segments = jnp.pad(jnp.ones_like(tokens), ((0, 0), (0, 5)))
    padded = jnp.pad(tokens, ((0, 0), (0, 5)), constant_values=7)
    long, padded_out = full(cfg, params, padded, None, segments)
    np.testing.assert_allclose(long[:, :11], short, atol=1e-4)
    for a, b in zip(out.stats, padded_out.stats, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert jnp.isfinite(long).all()


@pytest.mark.parametrize("name", MODELS)
def test_prefill_then_decode_equals_the_full_forward(name):
    cfg = MODELS[name]
    params, tokens = draw(cfg)
    want, _ = full(cfg, params, tokens)
    step = jax.jit(lambda p, t, s, c: tf.forward(cfg, p, t, None, s, cache=c))
    lengths = jnp.array([6, 4])  # rows of different length: the prefill is padded at the end
    segments = (jnp.arange(6) < lengths[:, None]).astype(jnp.int32)
    out = step(params, tokens[:, :6], segments, tf.init_cache(cfg, 2, 16))
    np.testing.assert_array_equal(out.cache.length_B, lengths)
    got = tf.logits(cfg, params, out.hidden_BTD)
    np.testing.assert_allclose(got[0, :6], want[0, :6], atol=1e-4)
    np.testing.assert_allclose(got[1, :4], want[1, :4], atol=1e-4)
    cache = out.cache
    for i in range(5):
        at = lengths + i
        token = jnp.take_along_axis(tokens, at[:, None], 1)
        out = step(params, token, jnp.ones((2, 1), jnp.int32), cache)
        cache = out.cache
        got = tf.logits(cfg, params, out.hidden_BTD)[:, 0]
        np.testing.assert_allclose(got, want[jnp.arange(2), at], atol=1e-4)


def test_replaying_natural_routes_is_a_bitwise_no_op_and_others_change_the_output():
    cfg = MODELS["moe"]
    params, tokens = draw(cfg)
    fn = jax.jit(lambda p, t, r: tf.forward(cfg, p, t, routes_BTLC=r))
    none = jnp.full((2, 11, 2, 2), -1)
    natural = fn(params, tokens, none)
    again = fn(params, tokens, natural.routes_BTLC)
    np.testing.assert_array_equal(again.hidden_BTD, natural.hidden_BTD)
    other = fn(params, tokens, (natural.routes_BTLC + 1) % 4)
    assert float(jnp.abs(other.hidden_BTD - natural.hidden_BTD).max()) > 1e-3
    np.testing.assert_array_equal(other.routes_BTLC, (natural.routes_BTLC + 1) % 4)
    assert float(other.stats.agree.sum()) < float(natural.stats.agree.sum())


def test_router_is_trained_under_replay():
    cfg = MODELS["moe"]
    params, tokens = draw(cfg)
    routes = jnp.broadcast_to(jnp.array([1, 2]), (2, 11, 2, 2))
    loss = lambda p: tf.logits(cfg, p, tf.forward(cfg, p, tokens, routes_BTLC=routes).hidden_BTD).var()  # noqa: E731
    grad = jax.jit(jax.grad(loss))(params)
    assert float(jnp.abs(grad["blocks"]["0"]["1"]["moe"]["router"]["w"]).max()) > 1e-6


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat):
    cfg = MODELS["moe"]
    params, tokens = draw(cfg)

    def loss(p, run):
        return tf.logits(cfg, p, tf.forward(cfg, p, tokens, run=run).hidden_BTD).var()

    want = jax.jit(jax.grad(loss), static_argnums=1)(params, tf.Runtime())
    got = jax.jit(jax.grad(loss), static_argnums=1)(params, tf.Runtime(remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_groups_hold_the_layers_in_order():
    kinds = ("dense", "moe", "moe", "dense", "moe", "moe", "moe")
    cfg = tiny_moe(num_layers=7, layer_kinds=kinds)
    assert cfg.groups == ((("dense", "moe", "moe"), 2), (("moe",), 1))
    assert cfg.moe_layers == (1, 2, 4, 5, 6)
    params, tokens = draw(cfg)
    _, out = full(cfg, params, tokens)
    assert out.routes_BTLC.shape == (2, 11, 5, 2)
    # a layer with a router of its own making: send every token of layer 5 (group 0, position 2, repeat 1) to expert 3
    w = params["blocks"]["0"]["2"]["moe"]["router"]["w"]
    bias = jnp.zeros_like(w).at[1].set(0.0)
    params["blocks"]["0"]["2"]["moe"]["router"]["w"] = bias
    _, out = full(cfg, params, tokens)
    flat = (out.routes_BTLC == jnp.array([0, 1])).all((0, 1, 3))
    np.testing.assert_array_equal(flat, [False, True, False, True, False])


def test_softmax_scale_matches_a_hand_made_single_head():
    cfg = ModelConfig(vocab_size=4, dim=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4, ffn_dim=4)
    params, _ = draw(cfg)
    tokens = jnp.array([[1, 2, 3]])
    table = params["embed"]["table"]
    b = jax.tree.map(lambda x: x[0], params["blocks"]["0"]["0"])
    norm = lambda x: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)  # noqa: E731
    x = table[tokens[0]]
    qkv = jnp.einsum("td,dch->tch", norm(x), b["attn"]["qkv"]["w"][:, 0])
    angle = jnp.arange(3)[:, None] * jnp.array([1.0, 0.01])
    turn = lambda h: jnp.concatenate(  # noqa: E731
        [
            h[:, :2] * jnp.cos(angle) - h[:, 2:] * jnp.sin(angle),
            h[:, 2:] * jnp.cos(angle) + h[:, :2] * jnp.sin(angle),
        ],
        1,
    )
    scores = turn(qkv[:, 0]) @ turn(qkv[:, 1]).T / 2
    probs = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((3, 3))) > 0, scores, -jnp.inf))
    x = x + probs @ qkv[:, 2] @ b["attn"]["out"]["w"][0, 0]
    h = jnp.einsum("td,dcf->tcf", norm(x), b["mlp"]["gate_up"]["w"])
    x = x + (jax.nn.silu(h[:, 0]) * h[:, 1]) @ b["mlp"]["down"]["w"]
    want = norm(x) @ table.T
    got, _ = full(cfg, params, tokens)
    np.testing.assert_allclose(got[0], want, atol=1e-5)


def test_bfloat16_keeps_the_router_in_f32():
    cfg = MODELS["moe"]
    params, tokens = draw(cfg)
    low = tf.cast(params, jnp.bfloat16)
    assert low["blocks"]["0"]["1"]["moe"]["router"]["w"].dtype == jnp.float32
    assert low["blocks"]["0"]["1"]["moe"]["gate_up"].dtype == jnp.bfloat16
    want, _ = full(cfg, params, tokens)
    got, _ = full(cfg, low, tokens)
    assert got.dtype == jnp.float32
    assert 0 < float(jnp.abs(got - want).max()) < 0.2


def test_moe_config_without_moe_section_is_refused():
    with pytest.raises(ValueError, match="moe is not set"):
        tiny_config(layer_kinds=("moe", "moe"))
    assert MoeConfig(num_experts=2, top_k=2, ffn_dim=4).gate == "topk_softmax"
