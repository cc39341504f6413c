"""What an SFT recipe holds. No jax, so the CLI starts quickly."""

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


class SftConfig(StageConfig):
    """`cabochon sft`."""

    stage: Literal["sft"] = "sft"
    """which command the recipe is for"""
    steps: int = Field(ge=1)
    """optimiser steps; `--dry-run` says how many epochs that is"""
    data: DataConfig
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _check(self) -> SftConfig:
        held = bool(self.data.eval) or self.data.eval_fraction > 0
        if self.eval.every and not held:
            raise ValueError(f"eval.every={self.eval.every} needs held-out rows: set data.eval or data.eval_fraction")
        if not self.eval.every and (self.eval.keep == "best" or self.eval.patience):
            raise ValueError("eval.keep=best and eval.patience need evaluations: set eval.every")
        return self
