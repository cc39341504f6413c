"""Routing replay (algorithms.md section 12): the experts a sampler used, installed in the learner.

In f32 both sides agree to rounding. A sampler in bf16 routes otherwise now and then: replay takes that part of the gap
away, and leaves what bf16 does to everything else.
"""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from learner_side import learner_side

from cabochon.model import address
from cabochon.model import transformer as tf
from cabochon.model.upcycle import upcycle
from cabochon.protocols import Weights
from cabochon.rollouts.local import LocalEngine, requests_for
from cabochon.rollouts.slots import SlotConfig
from cabochon.testing import tiny_moe
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Sampling


@dataclass(frozen=True)
class Gap:
    """Sampler against learner over all sampled tokens; nats."""

    mean: float
    """of |d|, d = learner - sampler"""
    most: float
    k3: float
    """mean of e^d - 1 - d, the estimate of KL(sampler || learner)"""
    agreement: float
    """share of (token, layer) with equal sets of experts"""


def gap(model, params, completions, length, *, replay):
    """By hand, from arrays."""
    d, same = [], []
    for c, (logp, used) in zip(
        completions, learner_side(model, params, completions, length, replay=replay), strict=True
    ):
        d.append((logp - c.raw_logprobs)[c.mask].astype(np.float64))
        recorded = np.concatenate([c.prompt_routes, c.routes[:-1]])
        same.append((np.sort(recorded, -1) == np.sort(used[:-1], -1)).all(-1).ravel())
    d, same = np.concatenate(d), np.concatenate(same)
    return Gap(abs(d).mean(), abs(d).max(), (np.expm1(d) - d).mean(), same.mean())


def compare(model, params, tokenizer, cfg, prompts, sampling):
    """(without, with) replay for an f32 and a bf16 sampler."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        slots = SlotConfig(**cfg, dtype=dtype, cache_dtype=dtype)
        engine = LocalEngine(model, tokenizer, Weights(version=0, params=params), slots)
        out = engine.generate(requests_for(prompts, sampling, seed=1))
        found[dtype] = [gap(model, params, out, slots.length, replay=replay) for replay in (False, True)]
        for name, g in zip(("without", "with"), found[dtype], strict=True):
            print(
                f"{dtype} sampler, {name} replay: mean {g.mean:.2e}, max {g.most:.2e}, k3 {g.k3:.2e} nats, "
                f"{g.agreement:.4%} of routes equal, {sum(int(c.mask.sum()) for c in out)} tokens"
            )
    return found["float32"], found["bfloat16"]


def peaked(model):
    """Weights whose routers decide, and whose experts differ."""

    def grown(path, x):
        name = jax.tree_util.keystr(path)
        return x * (20 if "router" in name else 8 if "table" in name else 2 if "head" in name else 1)

    return jax.tree_util.tree_map_with_path(grown, tf.init(model, jax.random.key(1)))


def test_tiny_moe():
    tok = ByteTokenizer()
    model = tiny_moe(vocab_size=tok.vocab_size)
    cfg = {"slots": 8, "length": 128, "block": 64, "chunks": (32,)}
    prompts = ["The quick brown fox", "two words", "x" * 30, "a"]
    # so many that the few tokens routed otherwise are some on any CPU: k3 is mostly theirs
    sampling = Sampling(max_tokens=90, n=16, routes=True, ignore_eos=True)
    f32, bf16 = compare(model, peaked(model), tok, cfg, prompts, sampling)
    assert f32[1].most <= 1e-5
    assert f32[1].agreement == bf16[1].agreement == 1  # what was recorded was installed
    assert f32[0].agreement > 0.999
    assert bf16[0].agreement < 0.999
    assert bf16[0].k3 > 1.5 * bf16[1].k3
    assert bf16[0].most > 2 * bf16[1].most  # few tokens are routed otherwise, and those are far off
    assert bf16[0].mean > bf16[1].mean
    assert bf16[1].k3 > 10 * f32[1].k3  # what bf16 does to the rest stays


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_with_four_experts():
    """135M upcycled, the experts made to differ by noise of 30 % of each tensor's size."""
    config, params, tokenizer = address.open_model("smollm2-135m-instruct")
    model, params = upcycle(config, params, num_experts=4, top_k=2, noise=0.3, seed=0)
    cfg = {"slots": 8, "length": 128, "block": 128, "chunks": (16,)}
    prompts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a small village", "2 + 2 ="]
    sampling = Sampling(max_tokens=64, n=2, routes=True, ignore_eos=True)
    f32, bf16 = compare(model, params, tokenizer, cfg, prompts, sampling)
    assert f32[1].most <= 1e-4
    assert f32[0].most >= f32[1].most
    assert bf16[0].agreement < 0.999
    assert bf16[0].k3 > bf16[1].k3
    assert bf16[0].mean > bf16[1].mean
