"""An SFT step against transformers + AdamW on torch, and packing against padding.

    python benchmarks/sft.py [--model smollm2-135m-instruct --rows 8 --length 256 --rounds 3 --data gsm8k.jsonl]
                             [--tunix PYTHON]      the interpreter of an environment with google-tunix

The steps run in one process, one of each per round in random order; ratios of medians, above 1 ours is faster. The same
weights and tokens, no padding, AdamW, clipping at 1. Peers: torch in f32, and in f32 with bf16 autocast; Tunix in f32.
`--data` (rows of `question` and `answer`) adds what packing gains on real lengths. torch is a development dependency;
without it the peer rows are left out and said so. Peak memory is the process's, so run one peer at a time (`--only`) to
compare it; Tunix's is not in it.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from cabochon.batch import Batch
from cabochon.config import ColumnsConfig, OptimConfig, SourceConfig, StepConfig
from cabochon.data import read_examples
from cabochon.heap import keep_pages
from cabochon.learner import Learner, LearnerConfig, cross_entropy
from cabochon.metrics import flops_per_token, measured_peak
from cabochon.model import convert
from cabochon.model.address import open_model
from cabochon.model.config import ModelConfig
from cabochon.sft.config import DataConfig
from cabochon.sft.data import encode_split, pack
from cabochon.tokenizer import Tokenizer

Call = Callable[[], object]


def our_step(model: str, ids: np.ndarray, micro: int) -> Call:
    """One update of all rows."""
    config, params, _ = open_model(model)
    rows, length = ids.shape
    step = StepConfig(batch_size=rows, sequence_length=length, micro_batches=micro)
    learner = Learner(LearnerConfig(model=config, step=step, optim=OptimConfig(learning_rate=1e-5)), cross_entropy)
    held = [learner.init_state(params)]
    position = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    mask = np.ones(ids.shape, np.float32)
    mask[:, 0] = 0
    batch = Batch(tokens_BT=ids, segment_BT=np.ones_like(ids), position_BT=position, mask_BT=mask)

    def call() -> object:
        held[0], report = learner.step(held[0], batch)
        return jax.block_until_ready(report.loss["nll"].total)

    return call


def torch_step(model: str, ids: np.ndarray, autocast: bool) -> Call:
    """transformers and AdamW, the way a trainer loop calls them."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as place:
        config, params, tokenizer = open_model(model)
        convert.save(Path(place) / "m", config, params, tokenizer=tokenizer)
        del params
        policy = AutoModelForCausalLM.from_pretrained(Path(place) / "m", dtype=torch.float32)
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    tokens = torch.tensor(ids, dtype=torch.long)

    def call() -> object:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = policy(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return call


def tunix_step(python: str, config: ModelConfig, ids: np.ndarray) -> Call:
    """Tunix's trainer in a process of its own, which works when it is asked to and waits otherwise."""
    shape = {"layers": config.num_layers, "vocab": config.vocab_size, "dim": config.dim, "ffn": config.ffn_dim,
             "heads": config.num_heads, "head_dim": config.head_dim, "kv_heads": config.num_kv_heads,
             "rope_theta": config.rope.theta}  # fmt: skip
    script = str(Path(__file__).with_name("sft_tunix.py"))
    words = [python, script, json.dumps(shape), *map(str, ids.shape)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    atexit.register(child.kill)
    assert child.stdin is not None
    assert child.stdout is not None
    ask, told = child.stdin, child.stdout

    def call() -> object:
        print(file=ask, flush=True)
        return float(told.readline())

    return call


def measure(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one call that warms up."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def packing(path: str, tokenizer: Tokenizer, length: int) -> None:
    """Rows that an epoch takes packed and padded: their ratio is the gain in steps."""
    source = SourceConfig(path=path)
    examples = read_examples([source], ColumnsConfig(prompt="question", completion="answer"), chat=True)
    cfg = DataConfig(train=[path], too_long="drop")
    start = time.perf_counter()
    split = encode_split(examples, [1.0], tokenizer, cfg, length)
    encoded = time.perf_counter() - start
    order = np.arange(len(split.examples))
    start = time.perf_counter()
    packed = pack(split, order, length, True)
    took = time.perf_counter() - start
    tokens = split.counts.tokens
    if not packed:
        raise SystemExit(f"{path}: no example fits into {length} tokens")
    print(f"\npacking {len(order):,} examples of {tokens / len(order):.0f} tokens into rows of {length} "
          f"({len(order) / encoded:,.0f} examples/s to encode, {took:.2f} s to pack)")  # fmt: skip
    for name, rows in (("packed", len(packed)), ("padded", len(order))):
        print(f"  {name:8} {rows:7,} rows, {tokens / rows / length:6.1%} full")
    print(f"  ratio    {len(order) / len(packed):7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data")
    parser.add_argument("--only", choices=("ours", "torch f32", "torch bf16", "tunix"))
    parser.add_argument("--tunix", metavar="PYTHON")
    a = parser.parse_args()
    keep_pages()
    config, _, tokenizer = open_model(a.model)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (a.rows, a.length)).astype(np.int32)
    builders: dict[str, Callable[[], Call]] = {"ours": lambda: our_step(a.model, ids, a.micro)}
    try:
        import torch  # noqa: F401

        builders |= {"torch f32": lambda: torch_step(a.model, ids, False),
                     "torch bf16": lambda: torch_step(a.model, ids, True)}  # fmt: skip
    except ImportError:
        print("torch is not installed: no peers")
    if a.tunix:
        builders["tunix"] = lambda: tunix_step(a.tunix, config, ids)
    calls = {name: build() for name, build in builders.items() if a.only in (None, name)}
    found = measure(calls, a.rounds)
    tokens = a.rows * a.length
    peak = measured_peak()
    print(f"{a.model}, {a.rows} x {a.length} tokens, {a.rounds} rounds; a matrix product: {peak / 1e9:.0f} GFLOP/s")
    for name, seconds in found.items():
        ratio = f"{seconds / found['ours']:6.2f} x" if "ours" in found else ""
        share = flops_per_token(config, a.length) * tokens / seconds / peak
        speed = f"{seconds:7.2f} s a step {tokens / seconds:8.1f} tokens/s"
        print(f"  {name:12} {speed}  {share:5.0%} of that peak  {ratio}")
    print(f"  peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    if a.data:
        packing(a.data, tokenizer, a.length)


if __name__ == "__main__":
    main()
