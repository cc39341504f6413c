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
    """a prompt and a completion that are text become a conversation, in the model's chat template"""
    train_on: Literal["assistant", "all"] = "assistant"
    """tokens the loss sees: what the assistant wrote (a completion, a text), or all of them"""
    packing: bool = True
    """several examples share a row, kept apart by segment; otherwise each is padded to a row of its own"""
    too_long: Literal["error", "drop", "left", "right"] = "error"
    """an example longer than step.sequence_length: refuse it, leave it out, or cut its left or its right end off"""
    empty: Literal["error", "drop"] = "error"
    """an example that has no token to learn: refuse it, or leave it out. What cutting emptied is always left out"""


class EvalConfig(Frozen):
    """The evaluation loss, over all held-out rows."""

    every: int = Field(0, ge=0)
    """steps between evaluations, 0 for none; the last step is always evaluated"""
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
        held = bool(self.data.eval) or self.data.eval_fraction > 0
        if self.eval.every and not held:
            raise ValueError(f"eval.every={self.eval.every} needs held-out rows: set data.eval or data.eval_fraction")
        if not self.eval.every and (self.eval.keep == "best" or self.eval.patience):
            raise ValueError("eval.keep=best and eval.patience need evaluations: set eval.every")
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
