"""Tunix's GRPO on the workload of benchmarks/rl.py, in a process and an environment of its own (google-tunix).

    python benchmarks/rl_tunix.py START TASKS OUT WORKLOAD SEED      writes OUT/steps.json and the model

START is a dense Qwen3 in f32. Of a completion Tunix's loss sees all but the token that ends it.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tokenizers
from flax import nnx
from rl_reward import exact
from safetensors.numpy import load_file, save_file
from tunix.models.qwen3 import model as qwen
from tunix.models.qwen3 import params
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.utils.torch_utils import torch_key_to_jax_key


class Text:
    """START's tokenizer with the names Tunix asks for."""

    def __init__(self, start: Path):
        self.core = tokenizers.Tokenizer.from_file(str(start / "tokenizer.json"))
        self.special = json.loads((start / "generation_config.json").read_text())

    def encode(self, text: str, **_: object) -> list[int]:
        return list(self.core.encode(text).ids)

    def decode(self, ids: list[int], **_: object) -> str:
        return str(self.core.decode(ids))

    def bos_id(self) -> None:
        """None: what a prompt begins with, `encode` has put there already."""

    def eos_id(self) -> int:
        return self.eos_ids()[0]

    def eos_ids(self) -> list[int]:
        ids = self.special["eos_token_id"]
        return list(ids) if isinstance(ids, list) else [ids]

    def pad_id(self) -> int:
        return int(self.special["pad_token_id"])


def model_config(start: Path) -> qwen.ModelConfig:
    given = json.loads((start / "config.json").read_text())
    # Tunix's model has one rotary base whatever its config says, so START's takes the place of the default.
    qwen.apply_rope = functools.partial(qwen.apply_rope, rope_theta=given["rope_parameters"]["rope_theta"])
    return qwen.ModelConfig(
        num_layers=given["num_hidden_layers"], vocab_size=given["vocab_size"], embed_dim=given["hidden_size"],
        hidden_dim=given["intermediate_size"], num_heads=given["num_attention_heads"], head_dim=given["head_dim"],
        num_kv_heads=given["num_key_value_heads"], rope_theta=int(given["rope_parameters"]["rope_theta"]),
        norm_eps=given["rms_norm_eps"], use_tied_embedding=given["tie_word_embeddings"],
    )  # fmt: skip


def save(model: qwen.Qwen3, start: Path, out: Path) -> None:
    """START with the model's weights: Tunix's names and transposes, the other way."""
    shutil.copytree(start, out, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {".".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(model))}
    names, tensors = params._get_key_and_transform_mapping(model.config), load_file(start / "model.safetensors")
    for name, first in tensors.items():
        key, transposed = torch_key_to_jax_key(names, name)
        value = state[key].reshape(first.shape[::-1]).T if transposed else state[key]
        tensors[name] = np.ascontiguousarray(value, first.dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    start, tasks, out, workload, seed = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
    work = json.loads(Path(workload).read_text())
    rows = [json.loads(line) for line in Path(tasks).read_text().splitlines()]
    text, config, mesh = Text(start), model_config(start), jax.sharding.Mesh([[jax.devices()[0]]], ("fsdp", "tp"))
    longest = max(len(text.encode(row["prompt"])) for row in rows)
    rollout = RolloutConfig(
        max_tokens_to_generate=work["max_tokens"], max_prompt_length=longest, temperature=1.0, top_p=1.0,
        kv_cache_size=longest + work["max_tokens"], eos_tokens=text.eos_ids(),
    )  # fmt: skip
    optimizer = optax.adamw(work["learning_rate"], b1=0.9, b2=0.95, weight_decay=0.0)
    # One step more than there are batches for: the last one ends when the next is asked for.
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optimizer), eval_every_n_steps=1_000_000,
        max_steps=work["steps"] + 1,
    )  # fmt: skip
    cluster = rl_cluster.RLCluster(
        actor=params.create_model_from_safe_tensors(str(start), config, mesh),
        tokenizer=text,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={rl_cluster.Role.ACTOR: mesh, rl_cluster.Role.ROLLOUT: mesh},
            training_config=training, rollout_config=rollout,
        ),
    )  # fmt: skip
    model, marks, rewards = cluster.actor_trainer.model, list[float](), list[float]()

    def batches() -> Iterator[dict[str, np.ndarray]]:
        order = np.random.default_rng(seed).permutation(len(rows))
        for step in range(work["steps"] + 1):
            jax.block_until_ready(nnx.state(model))
            marks.append(time.perf_counter())
            if step < work["steps"]:
                # The sampler begins every call at the seed it is given, the same noise at each step if it stays.
                rollout.seed = seed * work["steps"] + step
                at = np.arange(work["prompts"]) + step * work["prompts"]
                some = [rows[i] for i in order.take(at, mode="wrap")]
                yield {"prompts": np.array([row["prompt"] for row in some]),
                       "answer": np.array([row["payload"]["answer"] for row in some])}  # fmt: skip

    def reward(prompts: list[str], completions: list[str], answer: np.ndarray, **_: Any) -> list[float]:
        scores = exact(prompts, completions, answer)
        rewards.append(float(np.mean(scores)))
        return scores

    algorithm = GRPOConfig(num_generations=work["group_size"], num_iterations=1, beta=0.0, epsilon=0.2)
    GRPOLearner(cluster, algorithm, reward).train(batches())
    steps = [{"seconds": s, "reward": r} for s, r in zip(np.diff(marks).tolist(), rewards, strict=True)]
    save(model, start, out / "final")
    (out / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
