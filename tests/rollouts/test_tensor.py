"""One engine over several devices: the same completions, each device with its part."""

import jax
import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.model import transformer as tf
from cabochon.overrides import load
from cabochon.protocols import Weights
from cabochon.rl.recipe import RlConfig
from cabochon.rl.train import slot_config
from cabochon.rollouts.local import LocalEngine, requests_for
from cabochon.rollouts.slots import SlotConfig
from cabochon.testing import tiny_moe
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Sampling

MODEL = tiny_moe(vocab_size=264, num_layers=2, layer_kinds=("dense", "moe"))


def engine(tensor: int, seed: int = 0) -> LocalEngine:
    cfg = SlotConfig(slots=4, length=64, chunks=(32,), block=32, kernels="xla", tensor=tensor)
    weights = Weights(version=0, params=tf.init(MODEL, jax.random.key(seed)))
    return LocalEngine(MODEL, ByteTokenizer(), weights, cfg)


def test_two_devices_say_what_one_says():
    one, two = engine(1), engine(2)
    asked = requests_for(["hello", "a longer prompt"], Sampling(max_tokens=12, n=3, routes=True))
    for a, b in zip(one.generate(asked), two.generate(asked), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.routes, b.routes)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert two.sampler.compiled == {"prefill": 1, "start": 1, "decode": 1}, "one program each, from the first call on"
    assert two.sampler._programs.decode._cache_size() == 1

    def held(x: jax.Array) -> float:  # the part of an array that the first device has
        return x.addressable_shards[0].data.size / x.size

    layer = two.sampler._params["layers"][1]
    assert [held(layer["attn"]["qkv"]["w"]), held(layer["moe"]["gate_up"]), held(layer["moe"]["down"])] == [0.5] * 3
    assert held(two.sampler._slots.k[0]) == 0.5
    new = Weights(version=1, params=tf.init(MODEL, jax.random.key(1)))
    for e in (one, two):
        e.load(new)
    np.testing.assert_allclose(
        one.generate(asked)[0].logprobs, two.generate(asked)[0].logprobs, atol=1e-5
    )
    assert two.sampler._programs.decode._cache_size() == 1


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match="tensor=16 needs as many devices for one engine, here are 8"):
        engine(16)


def test_the_recipe_says_how_many():
    cfg = load(RlConfig, ["demo-rl"], ["engine.tensor=4"])
    assert slot_config(cfg).tensor == 4
    assert slot_config(load(RlConfig, ["demo-rl"])).tensor == 1
