"""TRL's GRPOTrainer on the workload of benchmarks/rl.py, in a process of its own.

    python benchmarks/rl_trl.py START TASKS OUT WORKLOAD SEED      writes OUT/steps.json and the model
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from rl_reward import exact
from trl import GRPOConfig, GRPOTrainer


def main() -> None:
    start, tasks, out, workload, seed = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
    work = json.loads(Path(workload).read_text())
    torch.set_num_threads(2)
    rows = [json.loads(line) for line in Path(tasks).read_text().splitlines()]
    data = Dataset.from_list([{"prompt": r["prompt"], "answer": r["payload"]["answer"]} for r in rows])
    cfg = GRPOConfig(
        output_dir=str(out / "trainer"), max_steps=work["steps"], seed=seed, data_seed=seed,
        per_device_train_batch_size=work["prompts"] * work["group_size"] // work["trl_accumulation"],
        gradient_accumulation_steps=work["trl_accumulation"],
        num_generations=work["group_size"], max_completion_length=work["max_tokens"], temperature=1.0, top_k=0,
        learning_rate=work["learning_rate"], lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95,
        weight_decay=0.0, max_grad_norm=1.0, beta=0.0, loss_type="grpo", scale_rewards="group", epsilon=0.2,
        gradient_checkpointing=False, bf16=False, fp16=False, use_cpu=True, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(model=str(start), reward_funcs=exact, args=cfg, train_dataset=data)
    trainer.train()
    seen = [row for row in trainer.state.log_history if "step_time" in row]
    steps = [{"seconds": row["step_time"], "reward": row["reward"]} for row in seen]
    trainer.save_model(str(out / "final"))
    (out / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
