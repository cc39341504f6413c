"""New tokens per second of the sampler on SmolLM2-135M against transformers' generate, both f32, in one process.

    python benchmarks/rollouts.py [--batches 1 8 32 --prompt 128 --new 128 --rounds 3 --cases uniform ragged groups]

`uniform`: every sequence draws `--new` tokens. `ragged`: 3 batches of requests whose lengths differ ten times, one
in eight is long; transformers, which has no slots, runs them batch by batch in the order given, as long as the longest.
`groups`: batch / 8 prompts with 8 samples each. Rounds are interleaved, ours and theirs in turn, and medians are
reported with the ratio; above 1 ours is faster. Compilation and loading are left out. The last column is what this
machine could do if a step cost only the reading of the weights once, at the bandwidth measured at the start.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cabochon.model import address, convert
from cabochon.model.config import ModelConfig
from cabochon.protocols import Weights
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.tokenizer import Tokenizer
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


def ours(config: ModelConfig, weights: Weights, tokenizer: Tokenizer, work: Work, length: int) -> Callable[[int], None]:
    engine = LocalEngine(config, tokenizer, weights, SlotConfig(slots=work.batch, length=length))
    engine.generate([Request(prompt=work.prompts[0], sampling=Sampling(max_tokens=2, ignore_eos=True))])  # compiles
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


def bandwidth() -> float:
    """Bytes per second of reading 400 MB with all threads of XLA, best of 5."""
    x, read = jnp.ones(100_000_000, jnp.float32), jax.jit(lambda x: x.sum())
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(read(x))
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def timed(run: Callable[[int], None], seed: int) -> float:
    start = time.perf_counter()
    run(seed)
    return time.perf_counter() - start


def report(case: str, work: Work, seconds: Mapping[str, Sequence[float]], roofline: float) -> None:
    rate = {name: work.tokens / statistics.median(s) for name, s in seconds.items()}
    spread = ", ".join(f"{name} {min(s):.2f}-{max(s):.2f} s" for name, s in seconds.items())
    line = " ".join(f"{name} {r:7.1f}" for name, r in rate.items())
    ratio = rate["ours"] / rate["transformers"] if "transformers" in rate else float("nan")
    print(f"{case:8} {work.batch:3} | {line} tok/s | ratio {ratio:.2f} | weights read once {roofline:.0f} | {spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["uniform"], choices=["uniform", "ragged", "groups"])
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    a = parser.parse_args()

    config, params, tokenizer = address.open_model(NAME)
    weights = Weights(version=0, params=params)
    steps_per_second = bandwidth() / (4 * sum(x.size for x in jax.tree.leaves(params)))
    model = None
    if not a.no_peer:
        import torch
        import transformers

        with tempfile.TemporaryDirectory() as folder:
            convert.save(Path(folder) / "m", config, params, tokenizer=tokenizer)
            model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "m", dtype=torch.float32).eval()
    for case in a.cases:
        for batch in a.batches:
            work = Work(case, batch, a.prompt, a.new, config.vocab_size)
            runs = {"ours": ours(config, weights, tokenizer, work, a.prompt + a.new)}
            if model is not None:
                runs["transformers"] = theirs(model, work)
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for i in range(a.rounds):
                for name, run in runs.items():
                    seconds[name].append(timed(run, i))
            report(case, work, seconds, steps_per_second * batch)


if __name__ == "__main__":
    main()
