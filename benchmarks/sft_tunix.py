"""Tunix's trainer on the shape of a model, for benchmarks/sft.py: runs in an environment of its own (google-tunix).

    python benchmarks/sft_tunix.py '{"layers": 30, ...}' ROWS LENGTH      one line in, one step, seconds out

Random weights and tokens: the time does not depend on them. AdamW, clipping at 1, f32, as in the other peers. A step is
what `PeftTrainer.train` calls, compiled and warm.
"""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.sft import peft_trainer, utils


def main() -> None:
    shape, rows, length = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    config = llama.ModelConfig(
        num_layers=shape["layers"], vocab_size=shape["vocab"], embed_dim=shape["dim"], hidden_dim=shape["ffn"],
        num_heads=shape["heads"], head_dim=shape["head_dim"], num_kv_heads=shape["kv_heads"],
        rope_theta=int(shape["rope_theta"]), norm_eps=1e-5, weight_tying=True,
    )  # fmt: skip
    policy = llama.Llama3(config, rngs=nnx.Rngs(0))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, b1=0.9, b2=0.95, weight_decay=0.0))
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=1_000_000, max_steps=1_000_000)
    trainer = peft_trainer.PeftTrainer(policy, optimizer, settings)

    def inputs(given: peft_trainer.TrainingInput) -> dict[str, jax.Array]:
        mask = given.input_tokens >= 0
        return {
            "input_tokens": given.input_tokens,
            "input_mask": given.input_mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    trainer = trainer.with_gen_model_input_fn(inputs)
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)  # as `train` asks for it
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, shape["vocab"], (rows, length)), jnp.int32)
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=jnp.ones_like(tokens))
    for _ in sys.stdin:
        start = time.perf_counter()
        jax.block_until_ready(step(batch))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
