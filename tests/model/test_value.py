"""The scalar head: arithmetic in f32, and no part of what an engine or an export sees."""

import jax
import jax.numpy as jnp
import numpy as np

from cabochon.model import convert, value
from cabochon.model import transformer as tf
from cabochon.testing import tiny_config

CFG = tiny_config()


def test_head_is_read_in_f32_from_bf16_states():
    params = value.with_head(CFG, tf.init(CFG, jax.random.key(0)))
    assert not np.asarray(params["value"]["w"]).any()
    head = {"w": jnp.full(CFG.dim, 1 / 3), "b": jnp.float32(0.25)}
    kept = value.with_head(CFG, {**params, "value": head})
    cast = tf.cast(kept, jnp.bfloat16)
    hidden = jnp.arange(CFG.dim, dtype=jnp.bfloat16)[None]
    want = np.arange(CFG.dim).sum() / 3 + 0.25
    np.testing.assert_allclose(value.values(cast["value"], hidden), [want], rtol=1e-6)


def test_the_language_model_does_not_see_it(tmp_path):
    params = tf.init(CFG, jax.random.key(0))
    with_head = value.with_head(CFG, params)
    tokens = jnp.arange(6)[None]
    np.testing.assert_array_equal(
        tf.forward(CFG, with_head, tokens).hidden_BTD, tf.forward(CFG, params, tokens).hidden_BTD
    )
    convert.save(tmp_path / "a", CFG, with_head)
    _, back = convert.load(tmp_path / "a")
    assert jax.tree.structure(back) == jax.tree.structure(value.without_head(with_head)) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
