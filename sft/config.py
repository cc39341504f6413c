"""What the recipes of fine-tuning and distillation hold. No jax, so the CLI starts quickly."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cabochon.config import ColumnsConfig, Frozen, Sources, StageConfig


class DataConfig(Frozen):
    """The rows, and which of their tokens are learnt."""

    train: Sources = Field(min_length=1)
    """a path, a list of paths, or a list of {path, weight}"""
    eval: Sources = ()
    """held-out rows, for the evaluation loss"""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """this share of `train`, chosen by the prompt's words, is held out as well"""
    columns: ColumnsConfig = ColumnsConfig()
    chat: bool = False
    """a prompt and a completion that are text become a conversation, in the model's chat template; so do the prompts of
    eval.sampled"""
    train_on: Literal["assistant", "all"] = "assistant"
    """tokens the loss sees: what the assistant wrote (a completion, a text), or all of them"""
    packing: bool = True
    """several examples share a row, kept apart by segment; otherwise each is padded to a row of its own"""
    too_long: Literal["error", "drop", "left", "right"] = "error"
    """an example longer than step.sequence_length: refuse it, leave it out, or cut its left or its right end off"""
    empty: Literal["error", "drop"] = "error"
    """an example that has no token to learn: refuse it, or leave it out. What cutting emptied is always left out"""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if weighted := [source for source in self.eval if source.weight != 1]:
            raise ValueError(f"eval: {weighted[0].path} has a weight; each held-out row counts once, leave it out")
        return self


class SampledConfig(Frozen):
    """Held-out tasks that the policy answers and their verifiers judge; `cabochon eval` asks alike."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """files of tasks, JSON lines (docs/rl.md has the shapes)"""
    most: int = Field(200, ge=1)
    """tasks that are asked at most, the first of each domain alike"""
    samples: int = Field(1, ge=1)
    """answers to each"""
    max_tokens: int = Field(256, ge=1)
    """of an answer"""
    temperature: float = Field(1.0, ge=0)
    """0 takes the likeliest token"""
    slots: int = Field(32, ge=1)
    """answers decoded together"""
    sandbox: Literal["bubblewrap", "docker"] = "bubblewrap"
    """where programs of `code` tasks run"""

    @model_validator(mode="after")
    def _check(self) -> SampledConfig:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples={self.samples} at temperature 0 are all alike: ask for 1, or raise temperature")
        return self


class EvalConfig(Frozen):
    """The loss over all held-out rows, and the accuracy of samples where `sampled` asks for it."""

    every: int = Field(0, ge=0)
    """steps between evaluations, 0 for none; before the first step and after the last there is one too"""
    sampled: SampledConfig | None = None
    """held-out tasks to be answered at each evaluation"""
    by: Literal["loss", "accuracy"] = "loss"
    """what makes an evaluation the best: the least loss, or the highest accuracy of `sampled`"""
    keep: Literal["last", "best"] = "last"
    """which step's weights become final/"""
    patience: int = Field(0, ge=0)
    """stop after so many evaluations in a row without a better one; 0 never stops early"""


class ExamplesConfig(StageConfig):
    """A stage that goes through examples: fine-tuning and distillation."""

    steps: int = Field(ge=1)
    """optimiser steps; `--dry-run` says how many epochs that is"""
    data: DataConfig
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _check_eval(self) -> ExamplesConfig:
        e, held = self.eval, bool(self.data.eval) or self.data.eval_fraction > 0
        if e.every and not held and e.sampled is None:
            raise ValueError(f"eval.every={e.every} needs held-out rows (data.eval or data.eval_fraction) or tasks "
                             "(eval.sampled)")  # fmt: skip
        if not e.every and (e.keep == "best" or e.patience or e.sampled is not None):
            raise ValueError("eval.keep=best, eval.patience and eval.sampled need evaluations: set eval.every")
        if e.by == "accuracy" and e.sampled is None:
            raise ValueError("eval.by=accuracy needs tasks to be answered: set eval.sampled.tasks")
        if e.by == "loss" and not held and (e.keep == "best" or e.patience):
            raise ValueError("eval.by=loss needs held-out rows: set data.eval or data.eval_fraction, "
                             "or eval.by=accuracy")  # fmt: skip
        return self


class SftConfig(ExamplesConfig):
    """`cabochon sft`."""

    stage: Literal["sft"] = "sft"
    """which command the recipe is for"""


class TeacherConfig(Frozen):
    """Who is learnt from, and how much of its distribution is kept (algorithms.md section 15)."""

    address: str
    """a model with the student's tokenizer"""
    top_k: int = Field(64, ge=1)
    """likeliest tokens kept for each place"""
    mass: float = Field(1.0, gt=0, le=1)
    """fewer than top_k where so much of the probability is reached before; what is left is the tail"""
    cache: str | None = None
    """directory in which its log-probs are kept, for every run with this teacher and data; null asks it at each step"""


class DivergenceConfig(Frozen):
    """What is minimised at each trained token."""

    beta: float = Field(0.0, ge=0, le=1)
    """0: KL(teacher || student), covers all that the teacher does; 1: KL(student || teacher), keeps to its best;
    between: generalised Jensen-Shannon, beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S"""
    tail: Literal["bucket", "drop", "renormalize"] = "bucket"
    """what is not among the kept tokens: one more outcome; nothing (no divergence any more); or both sides rescaled"""
    labels: float = Field(0.0, ge=0, lt=1)
    """weight of the data's own token (cross-entropy); the teacher has the rest, and all on the student's samples"""


class OnPolicyConfig(Frozen):
    """Steps on what the student itself writes after the prompts, scored by the teacher (GKD, 2306.13649)."""

    fraction: float = Field(0.0, ge=0, le=1)
    """of the steps, drawn by the seed"""
    max_tokens: int = Field(256, ge=1)
    """of a sample"""
    temperature: float = Field(1.0, gt=0)
    slots: int = Field(32, ge=1)
    """samples decoded together"""


class DistillConfig(ExamplesConfig):
    """`cabochon distill`."""

    stage: Literal["distill"] = "distill"
    """which command the recipe is for"""
    teacher: TeacherConfig
    divergence: DivergenceConfig = DivergenceConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()
