"""TRL's configs as recipes: what they come to, key by key, and the tables the documentation shows."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from cabochon import import_config, import_keys
from cabochon.cli_stages import schema_of
from cabochon.errors import UserError
from cabochon.import_config import DEFAULTS, STAGE_DEFAULTS, import_trl
from cabochon.overrides import keys_of, load
from cabochon.rl.config import Cispo, Dapo, DrGrpo, Grpo, Gspo, Ppo

GRPO = """
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: tasks.jsonl
output_dir: runs/grpo
learning_rate: 1e-5
max_steps: 200
warmup_steps: 0.1
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
num_generations: 16
max_completion_length: 256
temperature: 0.9
beta: 0.04
epsilon_high: 0.28
loss_type: dr_grpo
report_to: [wandb, tensorboard]
use_peft: true
lora_r: 8
lora_target_modules: [q_proj, v_proj, down_proj]
reward_funcs: [accuracy_reward]
vllm_mode: colocate
"""
SFT = {"model_name_or_path": "runs/m", "dataset_name": "a.jsonl", "max_steps": 100, "packing": True}
RL = {"model_name_or_path": "runs/m", "dataset_name": "t.jsonl", "max_steps": 100, "num_generations": 8}


def recipe_of(tmp_path, config, stage=None, **how):
    file = tmp_path / "trl.yaml"
    file.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    text = import_trl(file, stage=stage, **({"steps": None, "devices": 1} | how))
    out = tmp_path / "recipe.yaml"
    out.write_text(text)
    return load(schema_of(yaml.safe_load(text)["stage"]), [str(out)]), text


def test_a_grpo_config(tmp_path):
    cfg, text = recipe_of(tmp_path, GRPO, devices=2)
    assert cfg.model.address == "hf:Qwen/Qwen3-0.6B"
    assert (cfg.steps, cfg.optim.learning_rate, cfg.optim.warmup_steps) == (200, 1e-5, 20)
    assert (cfg.optim.schedule, cfg.optim.total_steps, cfg.optim.end_factor) == ("linear", 200, 0.0)
    assert (cfg.rollout.prompts, cfg.rollout.group_size, cfg.rollout.completions) == (4, 16, 64)  # 4 x 2 devices x 8
    assert (cfg.step.batch_size, cfg.step.micro_batches, cfg.update.minibatches) == (64, 8, 1)
    assert (cfg.sampling.max_tokens, cfg.engine.length, cfg.sampling.temperature) == (256, 768, 0.9)
    assert isinstance(cfg.update.algorithm, DrGrpo)
    assert (cfg.update.algorithm.max_tokens, cfg.update.algorithm.clip.high) == (256, 0.28)
    assert cfg.update.kl.coef == 0.04
    assert (cfg.run.trackers, cfg.run.dir, cfg.seed) == (("wandb",), "runs/grpo", 42)
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets) == (8, 32.0, ("qkv", "down"))
    comments = [line for line in text.splitlines() if line.startswith("#   ")]
    assert [line.split(":")[0].removeprefix("#   ") for line in comments] == ["reward_funcs", "vllm_mode"]
    assert "name the verifier in each task" in comments[0]


def test_an_sft_and_a_reward_config(tmp_path):
    cfg, text = recipe_of(tmp_path, SFT | {"gradient_accumulation_steps": 2, "dataset_text_field": "body"})
    assert (cfg.stage, cfg.steps, cfg.data.packing, cfg.data.too_long) == ("sft", 100, True, "right")
    assert (cfg.step.batch_size, cfg.step.micro_batches, cfg.step.sequence_length) == (16, 2, 1024)
    assert (cfg.optim.learning_rate, cfg.optim.b2, cfg.step.remat) == (2e-5, 0.999, "full")
    assert cfg.data.columns.text == "body"
    assert "Without a counterpart" not in text
    rm, _ = recipe_of(tmp_path, SFT | {"packing": None, "center_rewards_coefficient": 0.02}, stage="rm")
    assert (rm.stage, rm.loss.centre, rm.optim.learning_rate) == ("rm", 0.02, 1e-4)
    epochs = {k: v for k, v in SFT.items() if k != "max_steps"} | {"num_train_epochs": 2}
    assert recipe_of(tmp_path, epochs, steps=7)[0].steps == 7


@pytest.mark.parametrize(
    ("given", "kind", "expected"),
    [
        ({"loss_type": "grpo"}, Grpo, {"aggregation": "seq_mean_token_mean"}),
        ({"loss_type": "bnpo", "scale_rewards": False}, Grpo, {"aggregation": "token_mean"}),
        ({}, Dapo, {"dynamic_sampling": False}),
        ({"loss_type": "cispo", "epsilon_high": 4.0}, Cispo, {"ratio_cap": 4.0}),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4}, Gspo, {}),
    ],
)
def test_losses(tmp_path, given, kind, expected):
    cfg, _ = recipe_of(tmp_path, RL | given)
    algorithm = cfg.update.algorithm
    assert type(algorithm) is kind
    assert {k: getattr(algorithm, k) for k in expected} == expected
    assert algorithm.baseline.scale == ("none" if "scale_rewards" in given else "group")


CHANGED = {
    "model_name_or_path": "runs/other", "dataset_name": "b.jsonl", "output_dir": "runs/x", "seed": 1, "max_steps": 50,
    "learning_rate": 3e-6, "lr_scheduler_type": "cosine", "warmup_steps": 5, "warmup_ratio": 0.2, "weight_decay": 0.1,
    "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "max_grad_norm": 2.0, "optim": "adafactor",
    "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "gradient_checkpointing": False, "bf16": True,
    "router_aux_loss_coef": 0.01, "use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear",
    "logging_steps": 3, "save_steps": 7, "save_total_limit": 5, "report_to": "mlflow", "max_length": 99,
    "packing": False, "truncation_mode": "keep_end", "dataset_text_field": "body", "completion_only_loss": False,
    "center_rewards_coefficient": 0.5, "num_generations": 4, "steps_per_generation": 4, "generation_batch_size": 32,
    "num_iterations": 2, "max_completion_length": 64, "vllm_max_model_length": 900, "temperature": 0.5, "top_k": 5,
    "top_p": 0.5, "min_p": 0.1, "loss_type": "grpo", "importance_sampling_level": "sequence", "scale_rewards": "batch",
    "epsilon": 0.1, "epsilon_high": 0.3, "delta": 4.0, "beta": 0.1, "entropy_coef": 0.01,
}  # fmt: skip
"""another value of every key in the table, but of those that need others beside them"""
BASES = {"sft": SFT, "rm": SFT | {"packing": None}, "rl": RL}


@pytest.mark.parametrize("stage", BASES)
def test_every_key_of_the_table_changes_the_recipe(tmp_path, stage):
    base = BASES[stage] | {"use_peft": True}
    before, _ = recipe_of(tmp_path, base, stage=stage)
    for key in import_keys.TRL:
        if stage not in key.stages or key.theirs in ("assistant_only_loss", "eval_steps", "use_peft"):
            continue
        after, text = recipe_of(tmp_path, base | {key.theirs: CHANGED[key.theirs]}, stage=stage)
        assert after != before, key.theirs
        assert f"#   {key.theirs}:" not in text, key.theirs


def test_keys_of_ours_in_every_table_exist():
    paths = [path for kind in (Grpo, Dapo, Ppo, Cispo) for path in keys_of(kind)]
    kinds = {f"update.algorithm.{'.'.join(map(str, path))}" for path in paths}
    for keys in (import_keys.TRL, import_keys.VERL, import_keys.TUNIX):
        for key in keys:
            for stage in key.stages if keys is import_keys.TRL else ("rl",):
                known = {".".join(map(str, path)) for path in keys_of(schema_of(stage))} | kinds
                if stage == "rl":
                    known |= {"tasks.train"}
                if key.ours == "eval.every" or stage in key.stages:
                    assert set(key.ours.split(", ")) <= known, key


def test_defaults_are_trls():
    trl = pytest.importorskip("trl")
    classes = {"sft": trl.SFTConfig, "rm": trl.RewardConfig, "rl": trl.GRPOConfig}
    names = {f.name for c in (*classes.values(), trl.ModelConfig, trl.ScriptArguments) for f in dataclasses.fields(c)}
    for stage, kind in classes.items():
        fields = {f.name: f.default for f in dataclasses.fields(kind)}
        for name, value in (DEFAULTS | STAGE_DEFAULTS[stage]).items():
            assert fields[name] == value, (stage, name)
    assert {key.theirs for key in import_keys.TRL} - names <= {"warmup_ratio"}  # of older releases
    lora = {f.name: f.default for f in dataclasses.fields(trl.ModelConfig)}
    assert {name: lora[name] for name in import_config.LORA_DEFAULTS} == import_config.LORA_DEFAULTS


def test_the_documentation_shows_these_tables():
    text = (Path(__file__).parent.parent / "docs/coming-from.md").read_text()
    for keys in (import_keys.TRL, import_keys.VERL, import_keys.TUNIX):
        assert import_keys.table(keys) in text, "python -m cabochon.import_keys prints the tables as they are"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("a: [", "not YAML"),
        ("- a", "expected a mapping of keys"),
        ({"model_name_or_path": "m", "max_steps": 3}, "say which it is with --stage"),
        (SFT | {"num_generations": 2}, "has keys of rl and of sft"),
        (SFT | {"max_steps": -1}, "give --steps"),
        (SFT | {"model_name_or_path": None}, "model_name_or_path is not set"),
        (RL | {"dataset_name": None}, "dataset_name is not set"),
        (SFT | {"lr_scheduler_type": "polynomial"}, "polynomial has no counterpart; use linear"),
        (SFT | {"optim": "sgd"}, "optim: sgd has no counterpart"),
        (RL | {"loss_type": "sapo"}, "loss_type: sapo has no counterpart; use grpo"),
        (RL | {"num_generations": 3}, "num_generations=3 does not divide the 8 completions"),
        (SFT | {"learning_rate": "fast"}, "another kind than TRL's"),
        (SFT | {"learning_rate": -1.0}, "would not resolve: .*optim.learning_rate"),
        (SFT | {"use_peft": True, "lora_target_modules": ["x"]}, "lora_target_modules: x has no counterpart"),
    ],
)
def test_what_cannot_be_imported_is_a_line(tmp_path, config, said):
    with pytest.raises(UserError, match=said) as caught:
        recipe_of(tmp_path, config)
    assert str(tmp_path / "trl.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "recipe.yaml").exists()
