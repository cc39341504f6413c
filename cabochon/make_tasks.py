"""Verifiable tasks with their answers as rows of text: supervised data, and tasks for RL, from the same file.

A row has `prompt` and `completion`, which SFT reads, and `verifier`, `payload`, `domain`, which `read_tasks` reads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from cabochon.config import Frozen
from cabochon.errors import MachineError, UserError
from cabochon.files import encodable, replaced_directory
from cabochon.types import Task
from cabochon.verifiers.reasoning import PROMPT_ENDING, Puzzles, puzzle_tasks
from cabochon.verifiers.tasks import split
from cabochon.verifiers.word_programs import word_programs


class PuzzlesConfig(Frozen):
    """Items of one reasoning-gym dataset."""

    name: str
    size: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    config: dict[str, Any] = {}
    """the dataset's own settings of difficulty"""


class ProgramsConfig(Frozen):
    """Small programming tasks made from words."""

    size: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    most_steps: int = Field(3, ge=1)
    """operations in the longest"""


class TasksConfig(Frozen):
    """`cabochon tasks make`."""

    stage: Literal["tasks"] = "tasks"
    """which command the recipe is for"""
    out: str
    """directory that gets train.jsonl and test.jsonl"""
    puzzles: tuple[PuzzlesConfig, ...] = ()
    programs: tuple[ProgramsConfig, ...] = ()
    held_out: float = Field(0.1, gt=0, lt=1)
    """expected share of test.jsonl; the side follows from the prompt's words, so no problem is on both"""
    prompt: str = "{question}" + PROMPT_ENDING
    """what is asked; begins with {question}, by which an answer's judge knows the puzzle"""
    completion: str = "<answer>{answer}</answer>"
    """what is to be said; {answer} is the right answer, or a right program"""
    gives_up: float = Field(0.0, ge=0, lt=1)
    """expected share of train.jsonl whose completion is `excuse`: imperfect demonstrations, for RL to correct"""
    excuse: str = "I give up."
    """what they say"""

    @field_validator("completion")
    @classmethod
    def _has_answer(cls, text: str) -> str:
        if "{answer}" not in text:
            raise ValueError("expected a text with {answer} in it")
        return text

    @field_validator("prompt")
    @classmethod
    def _has_question(cls, text: str) -> str:
        if not text.startswith("{question}"):
            raise ValueError("expected a text that begins with {question}")
        return text

    @model_validator(mode="after")
    def _has_something(self) -> TasksConfig:
        if not self.puzzles and not self.programs:
            raise ValueError("no tasks: give puzzles or programs")
        return self


def make(cfg: TasksConfig, *, overwrite: bool = False) -> tuple[int, int]:
    """Write train.jsonl and test.jsonl, whole or not at all; returns their numbers of rows.

    Held-out prompts are there once each. Raises UserError for an unknown dataset or setting, one without answers, a
    side without rows, or an `out` that holds something.
    """
    tasks: list[Task] = []
    for each in cfg.puzzles:
        tasks += puzzle_tasks(Puzzles(name=each.name, size=each.size, seed=each.seed, config=each.config))
    for programs in cfg.programs:
        tasks += word_programs(programs.size, programs.seed, most_steps=programs.most_steps)
    ids = Counter(task.id for task in tasks)
    if twice := next((task for task in tasks if ids[task.id] > 1), None):
        raise UserError(f"{twice.domain} is made twice with the same settings and seed; give one of them another seed")
    training, held = split(tasks, cfg.held_out)
    unique = list({str(task.prompt): task for task in held}.values())
    if not training or not unique:
        raise UserError(f"{len(tasks)} items leave {len(training)} to train on and {len(unique)} held out; make more")
    with replaced_directory(Path(cfg.out), overwrite=overwrite) as place:
        _write(place / "train.jsonl", training, cfg, gives_up=cfg.gives_up)
        _write(place / "test.jsonl", unique, cfg)
    return len(training), len(unique)


def _write(path: Path, tasks: Sequence[Task], cfg: TasksConfig, *, gives_up: float = 0.0) -> None:
    draws = np.random.default_rng(len(tasks)).random(len(tasks))
    try:
        with path.open("w", encoding="utf-8") as file:
            for task, draw in zip(tasks, draws, strict=True):
                row = row_of(task, cfg)
                if draw < gives_up:
                    row["completion"] = cfg.excuse
                file.write(encodable(json.dumps(row, ensure_ascii=False)) + "\n")
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from error


def row_of(task: Task, cfg: TasksConfig) -> dict[str, Any]:
    """The task as one row. Raises UserError where nobody knows its answer."""
    answer = task.payload.get("answer", task.payload.get("reference"))
    if answer is None:
        raise UserError(f"{task.id}: reasoning-gym gives it no answer; choose another dataset than {task.domain!r}")
    prompt = cfg.prompt.replace("{question}", str(task.prompt).removesuffix(PROMPT_ENDING))
    return {
        "id": task.id,
        "prompt": prompt,
        "completion": cfg.completion.replace("{answer}", str(answer)),
        "verifier": task.verifier,
        "payload": dict(task.payload),
        "domain": task.domain,
    }
