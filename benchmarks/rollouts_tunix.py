"""Tunix's sampler on the shape of a model, for benchmarks/rollouts.py: in an environment of its own (google-tunix).

    python benchmarks/rollouts_tunix.py '{"layers": 30, ...}'     a line in: {"prompts": [[ids]], "new": n, "seed": s}
                                                                  a line out: seconds

Random weights, f32: the time does not depend on them. Sampling at temperature 1 and top-p 1.
"""

from __future__ import annotations

import json
import sys
import time

from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama


class Ids:
    """A tokenizer whose texts are token ids with spaces between."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def encode(self, text: str, **_: object) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return self.vocab - 1

    def pad_id(self) -> int:
        return 1


def main() -> None:
    shape = json.loads(sys.argv[1])
    config = llama.ModelConfig(
        num_layers=shape["layers"], vocab_size=shape["vocab"], embed_dim=shape["dim"], hidden_dim=shape["ffn"],
        num_heads=shape["heads"], head_dim=shape["head_dim"], num_kv_heads=shape["kv_heads"],
        rope_theta=int(shape["rope_theta"]), norm_eps=1e-5, weight_tying=True,
    )  # fmt: skip
    cache = CacheConfig(cache_size=shape["length"], num_layers=config.num_layers, num_kv_heads=config.num_kv_heads,
                        head_dim=config.head_dim)  # fmt: skip
    sampler = Sampler(llama.Llama3(config, rngs=nnx.Rngs(0)), Ids(config.vocab_size), cache)
    for line in sys.stdin:
        asked = json.loads(line)
        texts = [" ".join(map(str, ids)) for ids in asked["prompts"]]
        start = time.perf_counter()
        out = sampler(
            texts, max_generation_steps=asked["new"], max_prompt_length=len(asked["prompts"][0]), temperature=1.0,
            top_p=1.0, seed=asked["seed"],
        )  # fmt: skip
        assert len(out.text) == len(texts)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
