"""New tokens per second of the sampler on SmolLM2-135M against transformers' generate and Tunix's sampler.

    python benchmarks/rollouts.py [--batches 1 8 32 --prompt 128 --new 128 --rounds 3 --cases uniform ragged groups]
                                  [--dtypes float32 bfloat16 --kernels auto native xla --peers float32 bfloat16]
                                  [--tunix PYTHON]     the interpreter of an environment with google-tunix (f32)
    python benchmarks/rollouts.py --tiny          # a mixture of experts as `make demo` trains: start-up and tokens/s

`uniform`: every sequence draws `--new` tokens. `ragged`: 3 batches of requests whose lengths differ ten times, one
in eight is long; the peers, which have no slots, run them batch by batch in the order given, as long as the longest.
`groups`: batch / 8 prompts with 8 samples each. Rounds are interleaved, ours and theirs in turn, and medians are
reported, with the ratio of our first to the best peer; above 1 ours is faster. Compilation and loading are left out.
The roofline is what a step could do at most in f32: the weights read once at the bandwidth, or their products at the
matmul rate (XLA's, 2048 rows), both measured in each round, whichever takes longer. `steps` is what our first did of it
in `uniform`: new tokens per second without the prompts' part, which a shorter run tells.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cabochon.model import address, convert
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.protocols import Weights
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.tokenizer import ByteTokenizer, Tokenizer
from cabochon.types import Request, Sampling

NAME = "smollm2-135m-instruct"
GROUP = 8
ROUNDS_OF_WORK = 3
"""batches of requests in `ragged`, so that a freed slot has something to take"""


class Work:
    """One case: prompts [n, P], how many tokens each draws, and how many samples of each prompt."""

    def __init__(self, case: str, batch: int, prompt: int, new: int, vocab: int):
        rng = np.random.default_rng(0)
        prompts = {"uniform": batch, "ragged": batch * ROUNDS_OF_WORK, "groups": max(1, batch // GROUP)}[case]
        self.prompts = rng.integers(100, vocab - 100, (prompts, prompt)).astype(np.int32)
        self.samples = min(GROUP, batch) if case == "groups" else 1
        short = max(1, new // 10)
        self.new = [new if case != "ragged" or i % 8 == 0 else short for i in range(prompts)]
        self.batch = batch
        self.tokens = sum(self.new) * self.samples

    def requests(self, seed: int) -> list[Request]:
        return [
            Request(prompt=p, sampling=Sampling(max_tokens=n, n=self.samples, ignore_eos=True), seed=seed + i)
            for i, (p, n) in enumerate(zip(self.prompts, self.new, strict=True))
        ]


def started(
    config: ModelConfig, weights: Weights, tokenizer: Tokenizer, work: Work, cfg: SlotConfig
) -> LocalEngine:
    engine = LocalEngine(config, tokenizer, weights, cfg)
    engine.generate([Request(prompt=work.prompts[0], sampling=Sampling(max_tokens=2, ignore_eos=True))])  # compiles
    return engine


def ours(engine: LocalEngine, work: Work) -> Callable[[int], None]:
    known = engine.sampler.compiled

    def run(seed: int) -> None:
        drawn = sum(len(c.tokens) for c in engine.generate(work.requests(seed)))
        assert drawn == work.tokens, f"{drawn} tokens, expected {work.tokens}"
        assert engine.sampler.compiled == known, "recompiled in steady state"

    return run


def theirs(model, work: Work) -> Callable[[int], None]:
    import torch

    def run(seed: int) -> None:
        torch.manual_seed(seed)
        for start in range(0, len(work.prompts), work.batch):
            ids = torch.from_numpy(work.prompts[start : start + work.batch].astype(np.int64))
            model.generate(
                ids, max_new_tokens=max(work.new[start : start + work.batch]), do_sample=True, top_k=0, top_p=1.0,
                num_return_sequences=work.samples, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip

    return run


def tunix(python: str, config: ModelConfig, length: int) -> subprocess.Popen[str]:
    """Tunix's sampler in a process of its own, which works when it is asked to and waits otherwise."""
    shape = {"layers": config.num_layers, "vocab": config.vocab_size, "dim": config.dim, "ffn": config.ffn_dim,
             "heads": config.num_heads, "head_dim": config.head_dim, "kv_heads": config.num_kv_heads,
             "rope_theta": config.rope.theta, "length": length}  # fmt: skip
    words = [python, str(Path(__file__).with_name("rollouts_tunix.py")), json.dumps(shape)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    atexit.register(child.kill)
    return child


def tunix_runs(child: subprocess.Popen[str], work: Work) -> Callable[[int], None]:
    assert child.stdin is not None
    assert child.stdout is not None
    ask, told = child.stdin, child.stdout

    def run(seed: int) -> None:
        for start in range(0, len(work.prompts), work.batch):
            some = slice(start, start + work.batch)
            prompts = np.repeat(work.prompts[some], work.samples, axis=0).tolist()
            print(json.dumps({"prompts": prompts, "new": max(work.new[some]), "seed": seed}), file=ask, flush=True)
            float(told.readline())

    run(0)  # compiles
    return run


def best_of(run: Callable[[], object], times: int = 6) -> float:
    """Seconds of the fastest."""
    return min(timed(lambda _: jax.block_until_ready(run()), 0) for _ in range(times))


def roofline(parameters: int, batch: int) -> float:
    """Tokens per second that no f32 step of this many parameters and rows can beat, see the top."""
    x, read = jnp.ones(100_000_000, jnp.float32), jax.jit(lambda x: x.sum())
    a, product = jnp.ones((2048, 2048), jnp.float32), jax.jit(jnp.dot)
    bytes_per_second, flops = x.nbytes / best_of(lambda: read(x)), 2 * 2048**3 / best_of(lambda: product(a, a))
    return batch / max(4 * parameters / bytes_per_second, 2 * parameters * batch / flops)


def timed(run: Callable[[int], None], seed: int) -> float:
    start = time.perf_counter()
    run(seed)
    return time.perf_counter() - start


def report(
    case: str, work: Work, short: Work, seconds: Mapping[str, Sequence[float]], most: float, prompts: Sequence[float]
) -> None:
    """`prompts` are the seconds of `short` by our first, if it was run: the same prompts with fewer tokens drawn."""
    rate = {name: work.tokens / statistics.median(s) for name, s in seconds.items()}
    spread = ", ".join(f"{name} {min(s):.2f}-{max(s):.2f} s" for name, s in seconds.items())
    line = " ".join(f"{name} {r:7.1f}" for name, r in rate.items())
    peers = [r for name, r in rate.items() if name.startswith(("transformers", "tunix"))]
    ratio = next(iter(rate.values())) / max(peers) if peers else float("nan")
    print(f"{case:8} {work.batch:3} | {line} tok/s | ratio {ratio:.2f} | roofline {most:.0f} | {spread}", flush=True)
    if prompts:
        whole = next(iter(seconds.values()))
        steps = (work.tokens - short.tokens) / statistics.median(a - b for a, b in zip(whole, prompts, strict=True))
        print(f"{'':12} | steps {steps:.1f} tok/s, {steps / most:.0%} of the roofline", flush=True)


def tiny(slots: int = 32, prompt: int = 64, new: int = 64) -> None:
    """Four sparse layers over bytes, groups of 8: seconds from weights to the first token, then tokens a second."""
    experts = MoeConfig(num_experts=8, top_k=2, ffn_dim=192)
    config = ModelConfig(
        vocab_size=259, dim=192, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=32, moe=experts, qk_norm="head"
    )
    weights = Weights(version=0, params=tf.init(config, jax.random.key(0)))
    for kernels in ("auto", "xla"):
        start = time.perf_counter()
        cfg = SlotConfig(slots=slots, length=prompt + new, kernels=kernels)
        engine = LocalEngine(config, ByteTokenizer(), weights, cfg)
        engine.generate([Request(prompt="x" * prompt, sampling=Sampling(max_tokens=1))])
        first = time.perf_counter() - start
        rng = np.random.default_rng(0)
        sampling = Sampling(max_tokens=new, n=GROUP, ignore_eos=True)
        requests = [Request(prompt=rng.integers(0, 255, prompt), sampling=sampling, seed=i) for i in range(8)]
        seconds = statistics.median(timed(lambda _, e=engine, r=requests: e.generate(r), 0) for _ in range(5))
        print(f"tiny, kernels {kernels}: first token after {first:.1f} s, then {8 * GROUP * new / seconds:.0f} tok/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["uniform"], choices=["uniform", "ragged", "groups"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of our weights and cache")
    parser.add_argument("--kernels", nargs="+", default=["auto"], choices=["auto", "native", "xla"])
    parser.add_argument("--peers", nargs="*", default=["float32", "bfloat16"], help="of transformers; none: ours alone")
    parser.add_argument("--tunix", metavar="PYTHON")
    parser.add_argument("--tiny", action="store_true")
    a = parser.parse_args()
    if a.tiny:
        return tiny()

    config, params, tokenizer = address.open_model(NAME)
    weights = Weights(version=0, params=params)
    parameters = sum(x.size for x in jax.tree.leaves(params))
    models = {}
    if a.peers:
        import torch
        import transformers

        with tempfile.TemporaryDirectory() as folder:
            convert.save(Path(folder) / "m", config, params, tokenizer=tokenizer)
            for dtype in a.peers:
                place = Path(folder) / "m"
                model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype))
                models[dtype] = model.eval()
    child = tunix(a.tunix, config, a.prompt + a.new) if a.tunix else None
    for case in a.cases:
        for batch in a.batches:
            work = Work(case, batch, a.prompt, a.new, config.vocab_size)
            length = a.prompt + a.new
            engines = {
                f"{k} {d}": started(config, weights, tokenizer, work, SlotConfig(
                    slots=batch, length=length, dtype=d, cache_dtype=d, kernels=k, chunks=(a.prompt,)))
                for k in a.kernels for d in a.dtypes
            }  # fmt: skip
            runs = {name: ours(engine, work) for name, engine in engines.items()}
            runs |= {f"transformers {d}": theirs(model, work) for d, model in models.items()}
            if child:
                runs["tunix"] = tunix_runs(child, work)
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            short, prompts, most = Work(case, batch, a.prompt, max(1, a.new // 16), config.vocab_size), [], []
            few = ours(next(iter(engines.values())), short)
            for i in range(a.rounds):
                most.append(roofline(parameters, batch))
                if case == "uniform":
                    prompts.append(timed(few, i))
                for name, run in runs.items():
                    seconds[name].append(timed(run, i))
            report(case, work, short, seconds, statistics.median(most), prompts)


if __name__ == "__main__":
    main()
