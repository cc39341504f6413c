"""`cabochon import-config` and `cabochon tasks import`: what comes from other systems."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cabochon.errors import MachineError, UserError


def import_config(
    file: Annotated[Path, typer.Argument(metavar="TRL.YAML", help="what `trl sft|reward|grpo --config` takes")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="write the recipe here, do not print it")] = None,
    stage: Annotated[
        Literal["sft", "rm", "rl"] | None, typer.Option(help="which trainer it is for, where its keys do not tell")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="optimiser steps, where it counts epochs")] = None,
    devices: Annotated[int, typer.Option(min=1, help="processes it was launched with")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is at --out")] = False,
) -> None:
    """Make a recipe of a TRL config; keys without a counterpart become comments.

    Example: cabochon import-config grpo.yaml --steps 500 -o mine.yaml
    """
    from cabochon.import_config import import_trl

    text = import_trl(file, stage=stage, steps=steps, devices=devices)
    if out is None:
        print(text, end="")
        return
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; add --overwrite to replace it")
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{out}: cannot be written: {error.strerror}") from error
    left = sum(line.startswith("#   ") for line in text.splitlines())
    print(f"{out}: {left} keys without a counterpart, as comments at its end", file=sys.stderr)


def tasks_import(
    form: Annotated[Literal["verl", "skyrl", "verifiers"], typer.Argument(metavar="FORM", help="whose rows they are")],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="parquet, JSONL, JSON, or a dataset directory")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the task file to write, .jsonl")],
    reward: Annotated[
        str | None, typer.Option(help="path.py:function in that system's form; default: maths against the ground truth")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is at OUT")] = False,
) -> None:
    """Make a task file of another RL system's dataset.

    Example: cabochon tasks import verl gsm8k/train.parquet tasks.jsonl --reward my_reward.py:compute_score
    """
    from cabochon.adapters import import_tasks

    print(f"{out}: {import_tasks(form, source, out, reward=reward, overwrite=overwrite):,} tasks")
