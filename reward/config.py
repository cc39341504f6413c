"""What a reward model's recipe holds. No jax, so the CLI starts quickly."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cabochon.config import Frozen, Sources, StageConfig


class PreferenceColumns(Frozen):
    """What a row's columns are called. A row is a pair, or one completion with a label, by what it has."""

    prompt: str = "prompt"
    """text or messages; where it is missing, it is what the two answers begin with"""
    chosen: str = "chosen"
    rejected: str = "rejected"
    margin: str = "margin"
    """how far the scores should be apart; 0 where the row has none"""
    completion: str = "completion"
    label: str = "label"
    """true for a good completion"""


class PreferenceData(Frozen):
    """The rows and how they are read."""

    train: Sources = Field(min_length=1)
    """a path, a list of paths, or a list of {path, weight}"""
    eval: Sources = ()
    """held-out rows"""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """this share of `train`, chosen by the prompt's words, is held out as well"""
    columns: PreferenceColumns = PreferenceColumns()
    chat: bool = False
    """a prompt and answers that are text become conversations, in the model's chat template"""
    packing: bool = True
    """several pairs share a row, kept apart by segment; otherwise each has a row of its own"""
    too_long: Literal["error", "drop"] = "error"
    """a pair longer than step.sequence_length: refuse it or leave it out; never cut, since its end is what is scored"""
    max_prompt_pairs: int = Field(0, ge=0)
    """pairs of one prompt that are used in an epoch, 0 for all; many alike are learnt by heart"""


class BradleyTerryConfig(Frozen):
    """The loss (algorithms.md section 3)."""

    centre: float = Field(0.01, ge=0)
    """weight of the squared sum of a pair's scores, which keeps them near 0"""
    margin_scale: float = Field(1.0, ge=0)
    """what the rows' margins are multiplied with; 0 for the plain loss"""


class EvalConfig(Frozen):
    """Accuracy, margin and calibration on the held-out pairs."""

    every: int = Field(0, ge=0)
    """steps between evaluations, 0 for the last step only"""


class RewardModelConfig(StageConfig):
    """`cabochon rm`."""

    stage: Literal["rm"] = "rm"
    """which command the recipe is for"""
    steps: int = Field(ge=1)
    """optimiser steps; `--dry-run` says how many epochs that is. More than one over-fits quickly"""
    data: PreferenceData
    loss: BradleyTerryConfig = BradleyTerryConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _check(self) -> RewardModelConfig:
        if self.eval.every and not (self.data.eval or self.data.eval_fraction):
            raise ValueError(f"eval.every={self.eval.every} needs held-out rows: set data.eval or data.eval_fraction")
        return self
