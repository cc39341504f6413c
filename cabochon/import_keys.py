"""Keys of TRL, verl and Tunix and ours: the tables of docs/coming-from.md, and what `import-config` goes by."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Stage = Literal["sft", "rm", "rl"]


@dataclass(frozen=True)
class Key:
    """A key of another system and ours."""

    theirs: str
    ours: str
    """dotted; several joined by a comma where one of theirs decides them"""
    stages: tuple[Stage, ...] = ("sft", "rm", "rl")
    convert: Callable[[Any], Any] | None = None
    """a plain value; None: worked out together with other keys"""
    remark: str = ""


def _same(value: Any) -> Any:
    return value


def _address(value: Any) -> str:
    name = str(value)
    local = Path(name).exists() or name.startswith((".", "/", "~", "hf:"))
    return name if local or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) else f"hf:{name}"


RL: tuple[Stage, ...] = ("rl",)
TRAINED: tuple[Stage, ...] = ("sft", "rm")
TRL = (
    Key("model_name_or_path", "model.address", convert=_address, remark="`owner/name` becomes `hf:owner/name`"),
    Key("dataset_name", "data.train", stages=TRAINED, convert=_same, remark="a file or a `save_to_disk` directory"),
    Key("dataset_name", "tasks.train", stages=RL, convert=lambda v: [v], remark="tasks: see `cabochon tasks import`"),
    Key("output_dir", "run.dir", convert=_same),
    Key("seed", "seed", convert=_same),
    Key("max_steps", "steps", remark="or `num_train_epochs`; here steps alone, `--steps` gives them"),
    Key("learning_rate", "optim.learning_rate", convert=float),
    Key("lr_scheduler_type", "optim.schedule, optim.total_steps, optim.end_factor", remark="down to 0, as theirs"),
    Key("warmup_steps", "optim.warmup_steps", remark="below 1 a share of all steps, as `warmup_ratio`"),
    Key("warmup_ratio", "optim.warmup_steps"),
    Key("weight_decay", "optim.weight_decay", convert=float),
    Key("adam_beta1", "optim.b1", convert=float),
    Key("adam_beta2", "optim.b2", convert=float),
    Key("adam_epsilon", "optim.eps", convert=float),
    Key("max_grad_norm", "optim.clip_norm", convert=float),
    Key("optim", "optim.kind", convert=lambda v: "adafactor" if v == "adafactor" else "adamw"),
    Key("per_device_train_batch_size", "step.batch_size", remark="theirs x accumulation x `--devices`"),
    Key("gradient_accumulation_steps", "step.micro_batches"),
    Key("gradient_checkpointing", "step.remat", convert=lambda v: "full" if v else "none"),
    Key("bf16", "precision.compute", convert=lambda v: "bfloat16" if v else "float32"),
    Key("router_aux_loss_coef", "aux.balance", convert=float),
    Key("use_peft", "lora", remark="on where it is true"),
    Key("lora_r", "lora.rank"),
    Key("lora_alpha", "lora.alpha"),
    Key("lora_target_modules", "lora.targets", remark="`q_proj` and its like are one matrix here"),
    Key("logging_steps", "run.log_every",
        convert=lambda v: max(1, int(v)), remark="of the console; files have every step"),
    Key("save_steps", "run.save_every", convert=lambda v: max(1, int(v))),
    Key("save_total_limit", "run.keep_last", convert=int),
    Key("report_to", "run.trackers", remark="TensorBoard is on by itself"),
    Key("max_length", "step.sequence_length", stages=TRAINED, convert=int),
    Key("packing", "data.packing", stages=("sft",), convert=bool),
    Key("truncation_mode", "data.too_long",
        stages=("sft",), convert=lambda v: "left" if v == "keep_end" else "right"),
    Key("dataset_text_field", "data.columns.text", stages=("sft",), convert=_same),
    Key("assistant_only_loss", "data.train_on", stages=("sft",), remark="theirs learns all of `messages` by default"),
    Key("completion_only_loss", "data.train_on", stages=("sft",)),
    Key("center_rewards_coefficient", "loss.centre", stages=("rm",), convert=lambda v: float(v or 0)),
    Key("num_generations", "rollout.group_size", stages=RL, convert=int),
    Key("steps_per_generation", "rollout.prompts, update.minibatches",
        stages=RL, remark="completions of a generation / num_generations; updates from it"),
    Key("generation_batch_size", "rollout.prompts, update.minibatches", stages=RL),
    Key("num_iterations", "update.epochs", stages=RL, convert=int),
    Key("max_completion_length", "sampling.max_tokens, engine.length, step.sequence_length",
        stages=RL, remark="engine.length has 512 more for the prompt"),
    Key("vllm_max_model_length", "engine.length, step.sequence_length", stages=RL),
    Key("temperature", "sampling.temperature", stages=RL, convert=float),
    Key("top_k", "sampling.top_k", stages=RL, convert=lambda v: max(0, int(v or 0))),
    Key("top_p", "sampling.top_p", stages=RL, convert=float),
    Key("min_p", "sampling.min_p", stages=RL, convert=lambda v: float(v or 0)),
    Key("loss_type", "update.algorithm.kind, update.algorithm.aggregation",
        stages=RL, remark="grpo, bnpo, dapo, dr_grpo, cispo"),
    Key("importance_sampling_level", "update.algorithm.kind", stages=RL, remark="`sequence` is gspo"),
    Key("scale_rewards", "update.algorithm.baseline.scale", stages=RL),
    Key("epsilon", "update.algorithm.clip.low", stages=RL),
    Key("epsilon_high", "update.algorithm.clip.high", stages=RL, remark="of cispo `ratio_cap`"),
    Key("delta", "update.algorithm.clip.dual", stages=RL),
    Key("beta", "update.kl.coef", stages=RL, convert=float),
    Key("entropy_coef", "update.entropy_coef", stages=RL, convert=float),
    Key("eval_steps", "eval.every", remark="needs held-out rows; a comment says so"),
)  # fmt: skip
"""Keys of TRL's GRPOConfig, SFTConfig, RewardConfig, ModelConfig and ScriptArguments"""

VERL = (
    Key("actor_rollout_ref.model.path", "model.address"),
    Key("data.train_files", "tasks.train", remark="`cabochon tasks import verl` makes them"),
    Key("data.val_files", "tasks.held_out"),
    Key("data.train_batch_size", "rollout.prompts"),
    Key("data.max_response_length", "sampling.max_tokens"),
    Key("data.max_prompt_length", "engine.length", remark="prompt and response together"),
    Key("actor_rollout_ref.rollout.n", "rollout.group_size"),
    Key("actor_rollout_ref.rollout.temperature", "sampling.temperature"),
    Key("actor_rollout_ref.rollout.max_num_seqs", "engine.slots", remark="of each worker"),
    Key("actor_rollout_ref.actor.ppo_mini_batch_size", "update.minibatches",
        remark="a number of parts, not of prompts"),
    Key("actor_rollout_ref.actor.ppo_epochs", "update.epochs"),
    Key("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", "step.micro_batches",
        remark="a number of parts, not of rows"),
    Key("actor_rollout_ref.actor.optim.lr", "optim.learning_rate"),
    Key("actor_rollout_ref.actor.grad_clip", "optim.clip_norm"),
    Key("actor_rollout_ref.actor.clip_ratio_low", "update.algorithm.clip.low"),
    Key("actor_rollout_ref.actor.clip_ratio_high", "update.algorithm.clip.high"),
    Key("actor_rollout_ref.actor.clip_ratio_c", "update.algorithm.clip.dual"),
    Key("actor_rollout_ref.actor.loss_agg_mode", "update.algorithm.aggregation"),
    Key("actor_rollout_ref.actor.entropy_coeff", "update.entropy_coef"),
    Key("actor_rollout_ref.actor.use_kl_loss, kl_loss_coef", "update.kl.coef",
        remark="with update.kl.placement=loss"),
    Key("actor_rollout_ref.actor.kl_loss_type", "update.kl.estimator", remark="low_var_kl is k3"),
    Key("algorithm.adv_estimator", "update.algorithm.kind"),
    Key("algorithm.norm_adv_by_std_in_grpo", "update.algorithm.baseline.scale"),
    Key("algorithm.use_kl_in_reward", "update.kl.placement"),
    Key("algorithm.filter_groups.enable", "update.algorithm.dynamic_sampling"),
    Key("algorithm.gamma", "update.algorithm.gamma"),
    Key("algorithm.lam", "update.algorithm.lam"),
    Key("trainer.total_training_steps", "steps"),
    Key("trainer.save_freq", "run.save_every"),
    Key("trainer.test_freq", "eval.every"),
    Key("trainer.logger", "run.trackers"),
    Key("trainer.default_local_dir", "run.dir"),
)  # fmt: skip
TUNIX = (
    Key("GRPOConfig.num_generations", "rollout.group_size"),
    Key("GRPOConfig.num_iterations", "update.epochs"),
    Key("GRPOConfig.beta", "update.kl.coef"),
    Key("GRPOConfig.epsilon", "update.algorithm.clip.low"),
    Key("GRPOConfig.epsilon_high", "update.algorithm.clip.high"),
    Key("GRPOConfig.loss_agg_mode", "update.algorithm.aggregation"),
    Key("RolloutConfig.max_tokens_to_generate", "sampling.max_tokens"),
    Key("RolloutConfig.temperature, top_p, top_k", "sampling.temperature"),
    Key("RolloutConfig.kv_cache_size", "engine.length"),
    Key("RLTrainingConfig.max_steps", "steps"),
    Key("RLTrainingConfig.eval_every_n_steps", "eval.every"),
    Key("RLTrainingConfig.gradient_accumulation_steps", "step.micro_batches"),
    Key("RLTrainingConfig.mini_batch_size", "update.minibatches", remark="a number of parts, not of rows"),
    Key("RLTrainingConfig.checkpoint_root_directory", "run.dir"),
    Key("RLTrainingConfig.checkpointing_options.save_interval_steps", "run.save_every"),
    Key("ClusterConfig.role_to_mesh", "mesh", remark="one mesh for the learner; workers by engine.ray"),
)  # fmt: skip


def table(keys: tuple[Key, ...]) -> str:
    """The rows of a table in Markdown."""
    rows = [f"| `{k.theirs}` | {', '.join(f'`{o}`' for o in k.ours.split(', '))} | {k.remark} |" for k in keys]
    return "\n".join(rows)


if __name__ == "__main__":
    for keys in (TRL, VERL, TUNIX):
        print(table(keys), end="\n\n")
