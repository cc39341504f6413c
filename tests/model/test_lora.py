"""LoRA leaves: where they may stand, what they cost to draw, and that merging keeps the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.model import transformer as tf
from cabochon.model.config import MoeConfig
from cabochon.model.lora import add_lora, merge_lora
from cabochon.testing import tiny_config, tiny_moe

LORA = tf.Lora(rank=2, alpha=6.0, targets=("qkv", "out", "gate_up", "down"))


@pytest.mark.parametrize("cfg", [tiny_config(), tiny_moe()], ids=["dense", "sparse with a shared expert"])
def test_merged_weights_are_the_same_function(cfg):
    plain = tf.init(cfg, jax.random.key(0))
    params = add_lora(cfg, plain, LORA)
    moved = jax.tree_util.tree_map_with_path(lambda path, x: x + 0.1 if path[-1].key == "lora_b" else x, params)
    tokens = jnp.arange(12).reshape(2, 6)
    forward = jax.jit(lambda p, lora: tf.forward(cfg, p, tokens, lora=lora).hidden_BTD, static_argnums=1)
    base = forward(plain, None)
    np.testing.assert_allclose(forward(params, LORA), base, atol=1e-5)
    merged = merge_lora(moved, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    want = forward(moved, LORA)
    assert float(jnp.abs(want - base).max()) > 0.1
    np.testing.assert_allclose(forward(merged, None), want, atol=1e-4)


def test_what_is_added_is_drawn_from_the_seed():
    cfg = tiny_config()
    plain = tf.init(cfg, jax.random.key(0))
    a, b, again = (jax.tree.leaves(add_lora(cfg, plain, LORA, seed)) for seed in (1, 2, 1))
    assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(np.array_equal(x, y) for x, y in zip(a, again, strict=True))


def test_shared_experts_can_be_targets_and_routed_ones_cannot():
    sparse = tiny_moe(layer_kinds=("moe",) * 4)
    leaves = add_lora(sparse, tf.init(sparse, jax.random.key(0)), tf.Lora(rank=1, alpha=1.0, targets=("down",)))
    assert "lora_a" in leaves["blocks"]["0"]["0"]["moe"]["shared"]["down"]
    routed = tiny_moe(layer_kinds=("moe",) * 4, moe=MoeConfig(num_experts=4, top_k=2, ffn_dim=8))
    with pytest.raises(
        UserError, match=r"lora\.targets: 'down' names no matrix of this model; expected some of out, qkv"
    ):
        add_lora(routed, tf.init(routed, jax.random.key(0)), tf.Lora(rank=1, alpha=1.0, targets=("down",)))
