"""A TRL config file (`trl grpo --config x.yaml`) as a recipe of ours; which key is which stands in `import_keys`.

What has a counterpart is carried over, with TRL's own default where the file does not say; what has none becomes a
comment at the end of the recipe. The recipe resolves, or nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cabochon.cli_stages import schema_of
from cabochon.errors import UserError
from cabochon.import_keys import TRL, Stage

DEFAULTS: dict[str, Any] = {
    "seed": 42, "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "logging_steps": 10,
    "save_steps": 500, "gradient_checkpointing": True, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "report_to": "none",
}  # fmt: skip
"""TRL 1.16's, the same for all its trainers; a test compares"""
STAGE_DEFAULTS: dict[Stage, dict[str, Any]] = {
    "sft": {"learning_rate": 2e-5, "max_length": 1024, "packing": False, "truncation_mode": "keep_start"},
    "rm": {"learning_rate": 1e-4, "max_length": 1024},
    "rl": {
        "learning_rate": 1e-6, "num_generations": 8, "max_completion_length": 512, "temperature": 1.0, "top_k": 0,
        "top_p": 1.0, "beta": 0.0, "num_iterations": 1, "epsilon": 0.2, "loss_type": "dapo", "scale_rewards": "group",
        "importance_sampling_level": "token", "entropy_coef": 0.0,
    },
}  # fmt: skip
LORA_DEFAULTS = {"lora_r": 16, "lora_alpha": 32}
"""of the CLI"""


REASONS = {
    "reward_funcs": "name the verifier in each task: verifier: trl.rewards:accuracy_reward, or my_rewards.py:f",
    "reward_weights": "reward.weights, with reward.combine=weighted and a component per name",
    "use_vllm": "sampling is ours: engine.kind=ray for workers of their own, engine.kind=local for none",
    "lora_dropout": "there is no dropout",
    "eval_steps": "name held-out rows (data.eval or tasks.held_out), then set eval.every",
    "dataset_train_split": "files have no splits",
    "dataset_test_split": "files have no splits",
    "num_train_epochs": "steps are counted, not epochs",
    "mask_truncated_completions": "a truncated completion is judged as it is; see update.algorithm.overlong",
    "vllm_importance_sampling_correction": "update.mismatch corrects always; see its keys",
    "per_device_eval_batch_size": "evaluation uses the training step's shape",
    "warmup_ratio": "given beside warmup_steps",
}
"""Why a key has no counterpart, where there is more to say than that"""


def import_trl(path: Path, *, stage: Stage | None, steps: int | None, devices: int) -> str:
    """The text of a recipe. `steps` and `devices` stand in for what TRL takes from the data and from the launcher.

    Raises UserError naming the file and the key: what cannot be read, a stage that cannot be told, a loss without a
    counterpart, a recipe that would not resolve.
    """
    given = _read(path)
    stage = stage or _stage_of(path, given)
    known = DEFAULTS | STAGE_DEFAULTS[stage] | {k: v for k, v in given.items() if v is not None}
    try:
        recipe, used = _recipe(known, stage, steps, devices)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: a key has a value of another kind than TRL's: {error}") from None
    text = _text(path, stage, recipe, {k: v for k, v in given.items() if k not in used})
    _check(path, stage, recipe)
    return text


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{path}: expected a mapping of keys, as `trl ... --config` takes it")
    # YAML 1.1 reads 1e-5 as text; TRL's parser turns it into the number it is
    number = r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"
    return {k: float(v) if isinstance(v, str) and re.fullmatch(number, v) else v for k, v in data.items()}


def _stage_of(path: Path, given: Mapping[str, Any]) -> Stage:
    """By the keys that one trainer alone has."""
    marks: dict[Stage, set[str]] = {
        "rl": {"num_generations", "max_completion_length", "beta", "epsilon", "reward_funcs", "scale_rewards"},
        "rm": {"center_rewards_coefficient"},
        "sft": {"packing", "assistant_only_loss", "completion_only_loss", "dataset_text_field", "truncation_mode"},
    }
    found = [stage for stage, keys in marks.items() if keys & given.keys()]
    if len(found) != 1:
        said = f"has keys of {' and of '.join(found)}" if found else "has no key that one trainer alone knows"
        raise UserError(f"{path}: {said}; say which it is with --stage sft, rm or rl")
    return found[0]


def _recipe(known: Mapping[str, Any], stage: Stage, steps: int | None, devices: int) -> tuple[dict[str, Any], set[str]]:
    """(recipe, keys of theirs that are in it)"""
    recipe: dict[str, Any] = {"stage": stage}
    used: set[str] = set()

    def put(ours: str, value: Any, *theirs: str) -> None:
        node = recipe
        *sections, last = ours.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
        used.update(theirs)

    total = steps or int(known.get("max_steps", -1))
    if total < 1:
        raise UserError("max_steps is not set, and steps are what is counted here: give --steps, rows x epochs / batch")
    put("steps", total, "max_steps")
    for key in TRL:
        if stage in key.stages and key.convert is not None and key.theirs in known:
            put(key.ours, key.convert(known[key.theirs]), key.theirs)
    if "model" not in recipe:
        raise UserError("model_name_or_path is not set; expected the model to begin with")
    data = ("tasks", "train") if stage == "rl" else ("data", "train")
    if data[1] not in recipe.get(data[0], {}):
        raise UserError("dataset_name is not set; expected a file of rows (mixtures under `datasets:` are not read)")
    _optimiser(known, total, put)
    _lora(known, put)
    _trackers(known, put)
    if stage == "sft":
        only = known.get("assistant_only_loss") or known.get("completion_only_loss")
        explicit = known.get("completion_only_loss") is False and not only
        put("data.train_on", "all" if explicit else "assistant", "assistant_only_loss", "completion_only_loss")
    per_pass = int(known["per_device_train_batch_size"]) * devices
    passes = int(known["gradient_accumulation_steps"])
    if stage == "rl":
        _rollouts(known, per_pass, passes, put)
        _algorithm(known, put)
    else:
        put("step.batch_size", per_pass * passes, "per_device_train_batch_size")
    put("step.micro_batches", passes, "gradient_accumulation_steps")
    return recipe, used


Put = Callable[..., None]


def _optimiser(known: Mapping[str, Any], total: int, put: Put) -> None:
    warm = float(known["warmup_steps"]) or float(known.get("warmup_ratio") or 0)
    used = ("warmup_steps",) if float(known["warmup_steps"]) else ("warmup_steps", "warmup_ratio")
    put("optim.warmup_steps", round(warm * total) if warm < 1 else int(warm), *used)
    schedules = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
    schedule = schedules.get(known["lr_scheduler_type"])
    if schedule is None:
        named = known["lr_scheduler_type"]
        raise UserError(f"lr_scheduler_type: {named} has no counterpart; use {', '.join(schedules)}")
    put("optim.schedule", schedule, "lr_scheduler_type")
    if schedule != "constant":
        put("optim.total_steps", total)
        put("optim.end_factor", 0.0)
    kind = str(known["optim"])
    if not kind.startswith(("adamw", "adafactor")):
        raise UserError(f"optim: {kind} has no counterpart; use adamw or adafactor")


MATRICES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "out", "gate_proj": "gate_up",
            "up_proj": "gate_up", "down_proj": "down"}  # fmt: skip


def _lora(known: Mapping[str, Any], put: Put) -> None:
    if not known.get("use_peft"):
        return
    known = LORA_DEFAULTS | dict(known)
    put("lora.rank", int(known["lora_r"]), "use_peft", "lora_r")
    put("lora.alpha", float(known["lora_alpha"]), "lora_alpha")
    wanted = known.get("lora_target_modules") or []
    wanted = [wanted] if isinstance(wanted, str) else wanted
    names = list(MATRICES) if wanted == ["all-linear"] else wanted
    if unknown := [name for name in names if name not in MATRICES]:
        raise UserError(f"lora_target_modules: {unknown[0]} has no counterpart; known are {', '.join(MATRICES)}")
    if names:
        put("lora.targets", list(dict.fromkeys(MATRICES[name] for name in names)), "lora_target_modules")


def _trackers(known: Mapping[str, Any], put: Put) -> None:
    wanted = known["report_to"] or []
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    ours = [name for name in wanted if name in ("mlflow", "trackio", "wandb")]
    if set(wanted) <= {"none", "all", "tensorboard", *ours}:
        put("run.trackers", ours, "report_to")


def _rollouts(known: Mapping[str, Any], per_pass: int, passes: int, put: Put) -> None:
    group = int(known["num_generations"])
    completions = int(known.get("generation_batch_size") or per_pass * int(known.get("steps_per_generation") or passes))
    if completions % group:
        raise UserError(f"num_generations={group} does not divide the {completions} completions of a generation")
    updates = max(1, completions // (per_pass * passes))
    put("rollout.prompts", completions // group, "generation_batch_size", "steps_per_generation")
    put("update.minibatches", updates, "per_device_train_batch_size")
    new = int(known["max_completion_length"])
    length = int(known.get("vllm_max_model_length") or new + 512)
    put("sampling.max_tokens", new, "max_completion_length")
    put("engine.length", length, "vllm_max_model_length")
    put("step.sequence_length", length)
    groups = -(-(completions // group) // updates)
    put("step.batch_size", -(-groups * group // passes) * passes)


def _algorithm(known: Mapping[str, Any], put: Put) -> None:
    scales = {"group": "group", "batch": "batch", "none": "none", "True": "group", "False": "none"}
    scale = scales.get(str(known["scale_rewards"]))
    if scale is None:
        raise UserError(f"scale_rewards: {known['scale_rewards']} has no counterpart; use group, batch or none")
    loss, low = str(known["loss_type"]), float(known["epsilon"])
    high = float(known.get("epsilon_high") or low)
    clip = {"low": low, "high": high, "dual": float(known.get("delta") or 0.0)}
    baseline = {"scale": scale, "zero_variance": "keep"}
    constant = int(known["max_completion_length"])
    kinds: dict[str, dict[str, Any]] = {
        "grpo": {"kind": "grpo", "baseline": baseline, "clip": clip, "aggregation": "seq_mean_token_mean"},
        "bnpo": {"kind": "grpo", "baseline": baseline, "clip": clip, "aggregation": "token_mean"},
        # theirs is DAPO's loss; its dynamic sampling is another switch
        "dapo": {"kind": "dapo", "baseline": baseline, "clip": clip, "dynamic_sampling": False},
        "dr_grpo": {"kind": "dr_grpo", "clip": clip, "max_tokens": constant},
        "cispo": {"kind": "cispo", "baseline": baseline, "ratio_cap": high},
    }
    if loss not in kinds:
        raise UserError(f"loss_type: {loss} has no counterpart; use {', '.join(kinds)}")
    chosen = kinds[loss]
    if known["importance_sampling_level"] == "sequence":
        chosen = {"kind": "gspo", "baseline": baseline, "clip": clip}
    put("update.algorithm", chosen, "loss_type", "scale_rewards", "importance_sampling_level", "epsilon")
    put("update.algorithm.kind", chosen["kind"], "epsilon_high")
    if clip["dual"]:
        put("update.algorithm.clip.dual", clip["dual"], "delta")


def _text(path: Path, stage: Stage, recipe: Mapping[str, Any], left: Mapping[str, Any]) -> str:
    lines = [f"# From {path.name}, a config of TRL; what it did not say is TRL's default."]
    lines.append(yaml.safe_dump(dict(recipe), sort_keys=False, default_flow_style=None, width=120).rstrip())
    if left:
        lines.append("# Without a counterpart:")
    for key, value in left.items():
        shown = " ".join(repr(value).split())[:60]
        lines.append(f"#   {key}: {shown}" + (f" ({REASONS[key]})" if key in REASONS else ""))
    return "\n".join(lines) + "\n"


def _check(path: Path, stage: Stage, recipe: Mapping[str, Any]) -> None:
    try:
        schema_of(stage).model_validate(dict(recipe))
    except ValueError as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path}: the recipe made of it would not resolve: {said[:300]}") from None
