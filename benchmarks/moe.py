"""Sparse feed-forward, forward + backward, against the dense one of equal active FLOPs and transformers' MoE block.

    python benchmarks/moe.py [--tokens 2048 --dim 256 --ffn 512 --experts 8 --top-k 2 --rounds 15]

Everything is interleaved in one process, one call of each per round, and reported as ratios of medians: above 1, ours
is faster. All f32, the same weights and router inputs. `compile` builds the train step of a 30-layer model, scanned.
torch is a development dependency; without it the peer rows are left out and said so.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cabochon.batch import Batch
from cabochon.config import OptimConfig, StepConfig
from cabochon.heap import keep_pages
from cabochon.learner import Learner, LearnerConfig, cross_entropy
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.model.dispatch import experts
from cabochon.model.moe import route

Call = Callable[[], object]


def ours(a: argparse.Namespace, skew: float) -> tuple[dict[str, Call], tuple]:
    """Router + experts, and the dense layer whose width is top_k x ffn."""
    k = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(k[0], (a.tokens, a.dim))
    router = jax.random.normal(k[1], (a.dim, a.experts)) * 0.02
    gate_up = jax.random.normal(k[2], (a.experts, a.dim, 2, a.ffn)) / a.dim**0.5
    down = jax.random.normal(k[3], (a.experts, a.ffn, a.dim)) / a.ffn**0.5
    wide_up = jax.random.normal(k[4], (a.dim, 2 * a.top_k * a.ffn)) / a.dim**0.5
    wide_down = jax.random.normal(k[5], (a.top_k * a.ffn, a.dim)) / a.ffn**0.5
    cfg = MoeConfig(num_experts=a.experts, top_k=a.top_k, ffn_dim=a.ffn)
    lean = skew * jnp.arange(a.experts, dtype=jnp.float32)

    def sparse(x: jax.Array, router: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        routes, gates, _ = route(x @ router + lean, cfg)
        return experts(x, routes, gates, gate_up, down)

    def dense(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        gate, lift = jnp.split(x @ up, 2, axis=-1)
        return (jax.nn.silu(gate) * lift) @ down

    def both(fn: Callable, *args: jax.Array) -> tuple[Call, Call]:
        forward = jax.jit(fn)
        backward = jax.jit(jax.value_and_grad(lambda *w: fn(*w).sum(), tuple(range(len(args)))))
        return (lambda: jax.block_until_ready(forward(*args))), (lambda: jax.block_until_ready(backward(*args)))

    calls = {}
    calls["ours forward"], calls["ours forward+backward"] = both(sparse, x, router, gate_up, down)
    calls["dense forward"], calls["dense forward+backward"] = both(dense, x, wide_up, wide_down)
    return calls, (x, router, gate_up, down)


def peer(a: argparse.Namespace, weights: tuple, implementation: str) -> dict[str, Call]:
    """transformers' Mixtral block with the same weights."""
    import numpy as np
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    x, router, gate_up, down = (torch.from_numpy(np.array(w)) for w in weights)
    cfg = MixtralConfig(
        hidden_size=a.dim, intermediate_size=a.ffn, num_local_experts=a.experts, num_experts_per_tok=a.top_k
    )
    cfg._experts_implementation = implementation
    block = MixtralSparseMoeBlock(cfg)
    with torch.no_grad():
        block.gate.weight.copy_(router.T)
        block.experts.gate_up_proj.copy_(gate_up.permute(0, 2, 3, 1).reshape(a.experts, 2 * a.ffn, a.dim))
        block.experts.down_proj.copy_(down.permute(0, 2, 1))
    x = x[None].requires_grad_()

    def forward() -> object:
        with torch.no_grad():
            return block(x)

    def backward() -> None:
        block.zero_grad()
        x.grad = None
        block(x).sum().backward()

    name = f"transformers {implementation}"
    return {f"{name} forward": forward, f"{name} forward+backward": backward}


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds per call, in a new random order each round, a pause before each.

    A fixed order would always let the same call pay for its predecessor: threads of torch spin on for a while.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for name in names:
        calls[name]()
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            time.sleep(0.05)
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def compile_seconds(layers: int) -> tuple[float, float]:
    """(trace, compile) of the train step of a scanned sparse model, persistent cache off."""
    jax.config.update("jax_enable_compilation_cache", False)
    model = ModelConfig(
        vocab_size=49152, dim=576, num_layers=layers, num_heads=9, num_kv_heads=3, head_dim=64,
        moe=MoeConfig(num_experts=4, top_k=2, ffn_dim=1536),
    )  # fmt: skip
    cfg = LearnerConfig(model=model, step=StepConfig(batch_size=4, sequence_length=256), optim=OptimConfig())
    learner = Learner(cfg, cross_entropy)
    ints, floats = (jax.ShapeDtypeStruct((4, 256), t) for t in (jnp.int32, jnp.float32))
    batch = Batch(tokens_BT=ints, segment_BT=ints, position_BT=ints, mask_BT=floats)
    start = time.perf_counter()
    lowered = learner.step.lower(learner.abstract_state(), batch)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"tokens": 2048, "dim": 256, "ffn": 512, "experts": 8, "top_k": 2, "rounds": 15}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--skew", type=float, default=0.0, help="added to expert e's logit, times e: an uneven router")
    a = parser.parse_args()
    keep_pages()  # as the command does; the peer and the dense layer gain as well
    calls, weights = ours(a, a.skew)
    try:
        for implementation in ("grouped_mm", "eager"):
            calls |= peer(a, weights, implementation)
    except ImportError as e:
        print(f"no peer: {e}")
    median = interleaved(calls, a.rounds)
    print(
        f"tokens {a.tokens}, D {a.dim}, F {a.ffn}, E {a.experts}, top-{a.top_k}, skew {a.skew}, {a.rounds} rounds, f32"
    )
    for what in ("forward", "forward+backward"):
        for name, seconds in median.items():
            if name.endswith(f" {what}"):
                print(f"  {name:38s} {seconds * 1e3:8.1f} ms   time / ours {seconds / median[f'ours {what}']:.2f}")
    trace, build = compile_seconds(30)
    print(f"train step of 30 scanned sparse layers: trace {trace:.1f} s, compile {build:.1f} s")


if __name__ == "__main__":
    main()
