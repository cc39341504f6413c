"""Scored completions per second: ModelReward in batches against one by one, and against transformers' forward pass on
the same weights (f32, padded batches, sorted by length), on answers of mixed lengths. Also a judge that reads its
verdict in one pass.

    python benchmarks/reward.py [--answers 256] [--rows 8]

Ratios are between runs in turns on the same machine; each is the best of three.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from cabochon.model import transformer as tf
from cabochon.model import value
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.reward.asking import LocalAsker
from cabochon.reward.judge import Judge, JudgeConfig
from cabochon.reward.scorer import ModelReward, save_reward
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Task

SHAPE = {"vocab_size": 264, "dim": 256, "num_layers": 6, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32,
         "bos_id": 257, "eos_ids": (260, 258), "pad_id": 256}  # fmt: skip
MODELS = {
    "dense": ModelConfig(family="llama", ffn_dim=768, **SHAPE),
    "sparse": ModelConfig(
        family="qwen3_moe", qk_norm="head", norm_eps=1e-6, moe=MoeConfig(num_experts=8, top_k=2, ffn_dim=384), **SHAPE
    ),
}


def best_of(n: int, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, the least of n rounds in turns, after one that compiles."""
    out = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(n):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            out[name] = min(out[name], time.perf_counter() - start)
    return out


def theirs(directory: Path, sequences: list[np.ndarray], rows: int) -> Callable[[], np.ndarray]:
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))

    def run() -> np.ndarray:
        out = np.zeros(len(sequences), np.float32)
        with torch.no_grad():
            for at in range(0, len(order), rows):
                part = order[at : at + rows]
                longest = max(len(sequences[i]) for i in part)
                ids = np.full((len(part), longest), 256)
                for r, i in enumerate(part):
                    ids[r, : len(sequences[i])] = sequences[i]
                mask = torch.tensor(ids != 256).long()
                out[part] = model(input_ids=torch.tensor(ids), attention_mask=mask).logits[:, 0].numpy()
        return out

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    lengths = draw.integers(24, 256, args.answers)
    sequences = [np.append(draw.integers(97, 123, n), 260).astype(np.int32) for n in lengths]
    for name, model in MODELS.items():
        params = value.with_head(model, tf.init(model, jax.random.key(0)))
        params["value"]["w"] = jax.random.normal(jax.random.key(1), (model.dim,)) / 16
        with tempfile.TemporaryDirectory() as place:
            save_reward(Path(place) / "rm", model, params, ByteTokenizer(), offset=0.0, chat=False, length=256)
            reward = ModelReward.open(Path(place) / "rm", rows=args.rows)
            reference = theirs(Path(place) / "rm", sequences, args.rows * 2)
            few = sequences[:32]
            gap = float(np.abs(reward.raw(sequences) - reference()).max())
            seconds = best_of(3, {
                "batched": lambda r=reward: r.raw(sequences),
                "one by one": lambda r=reward: [r.raw([ids]) for ids in few],  # noqa: B023
                "transformers": reference,
            })  # fmt: skip
        asker = LocalAsker(model, params, ByteTokenizer(), model_id="x", length=256, rows=args.rows)
        judge = Judge(asker, JudgeConfig(template="terse", reason=False, min_mass=0.0))
        tasks = [Task(id=str(i), prompt=f"{i}?", verifier="none") for i in range(64)]
        texts = ["".join(map(chr, ids[:100])) for ids in sequences[:64]]
        judged = best_of(3, {"judge": lambda j=judge: j.score_texts(tasks, texts)})["judge"]  # noqa: B023
        rate = {
            "batched": args.answers / seconds["batched"],
            "one by one": len(few) / seconds["one by one"],
            "transformers": args.answers / seconds["transformers"],
            "judge": len(texts) / judged,
        }
        print(json.dumps({
            "model": name,
            "completions_per_second": {k: round(v, 1) for k, v in rate.items()},
            "batched / one by one": round(rate["batched"] / rate["one by one"], 2),
            "batched / transformers": round(rate["batched"] / rate["transformers"], 2),
            "largest difference of scores": gap,
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
