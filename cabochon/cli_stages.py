"""`cabochon sft`, `data check`, `tasks make`: stages and what prepares them. Heavy imports happen on use."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cabochon import overrides
from cabochon.errors import MachineError, UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from cabochon.config import StageConfig
    from cabochon.sft.config import SftConfig

Parts = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="recipe names or files, then settings (steps=200)"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print the resolved config, the batch arithmetic, the memory; train nothing")
]
ResumeAnyway = Annotated[
    bool, typer.Option("--resume-anyway", help="go on in a run directory that was begun with other settings")
]
ON, OFF = "\x1b[1;32m", "\x1b[0m"
"""trained text on a terminal"""

STAGES = ("judge", "rl", "rm", "run", "sft", "tasks")


def schema_of(stage: object) -> type[BaseModel]:
    """The config type of recipes that say `stage: ...`; recipes of a model alone say nothing."""
    from cabochon.config import TrainConfig
    from cabochon.make_tasks import TasksConfig
    from cabochon.pipeline import PipelineConfig
    from cabochon.reward.config import RewardModelConfig
    from cabochon.reward.open import JudgeRun
    from cabochon.rl.recipe import RlConfig
    from cabochon.sft.config import SftConfig

    match stage:
        case None:
            return TrainConfig
        case "judge":
            return JudgeRun
        case "rl":
            return RlConfig
        case "rm":
            return RewardModelConfig
        case "run":
            return PipelineConfig
        case "sft":
            return SftConfig
        case "tasks":
            return TasksConfig
    near = difflib.get_close_matches(str(stage), STAGES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"stage: there is no stage {stage!r}; expected one of {', '.join(STAGES)}{hint}")


def load_recipe(parts: list[str]) -> BaseModel:
    """The config of any recipe, by what it says its stage is."""
    recipes, settings = overrides.split(parts)
    return overrides.load(schema_of(overrides.peek(recipes, settings, "stage")), recipes, settings)


def sft(parts: Parts, dry_run: DryRun = False, resume_anyway: ResumeAnyway = False) -> None:
    """Fine-tune a model on examples. The same command again goes on where it stopped; Ctrl-C saves first.

    Example: cabochon sft gsm8k-sft data.train=gsm8k_train.jsonl run.dir=runs/gsm8k
    """
    from cabochon.sft.config import SftConfig

    cfg = overrides.load(SftConfig, *overrides.split(parts))
    if dry_run:
        _describe_sft(cfg)
        return
    from cabochon.sft.train import main

    run_stage(main, cfg, resume_anyway, "lower optim.learning_rate, or look at the data of that step")


def run_stage(main: Callable[..., Path], cfg: StageConfig, resume_anyway: bool, hint: str) -> None:
    """Run a stage and print where its result is. Raises MachineError, with `hint`, where it became non-finite."""
    from cabochon.learner import NonFiniteError

    try:
        print(main(cfg, resume_anyway=resume_anyway))
    except NonFiniteError as error:
        raise MachineError(f"{cfg.run.dir}: {error}; {hint}") from error


def _describe_sft(cfg: SftConfig) -> None:
    from cabochon.cli_weights import describe
    from cabochon.learner import Learner, cross_entropy
    from cabochon.parallel import mesh_of
    from cabochon.plan import memory_lines
    from cabochon.policy import learner_config, open_tokenizer
    from cabochon.sft.data import read_splits
    from cabochon.sft.train import feed_of, told

    print(overrides.dump(cfg), end="")
    tokenizer = open_tokenizer(cfg.model)
    train, held = read_splits(cfg.data, tokenizer, cfg.step.sequence_length)
    learner = Learner(learner_config(cfg), cross_entropy, mesh_of(cfg.mesh))
    step = cfg.step
    lines = [
        describe(learner.cfg.model),
        told(cfg, train, held, len(feed_of(cfg, train, tokenizer).rows(0))),
        f"a step: {step.batch_size} rows x {step.sequence_length} tokens = {step.batch_size * step.sequence_length:,}, "
        f"in {step.micro_batches} micro-batches",
        *memory_lines(learner),
    ]
    print("\n".join(lines), file=sys.stderr)


def data_check(
    parts: Parts, rows: Annotated[int, typer.Option(min=0, help="examples to print, trained tokens marked")] = 3
) -> None:
    """Look at the data of an SFT recipe: lengths, packing, what would be cut, copies, leaks; exit code 1 for a leak.

    Example: cabochon data check gsm8k-sft data.train=gsm8k_train.jsonl data.eval=gsm8k_test.jsonl
    """
    from cabochon.policy import open_tokenizer
    from cabochon.sft.check import as_lines, check, marked
    from cabochon.sft.config import SftConfig

    cfg = overrides.load(SftConfig, *overrides.split(parts))
    tokenizer = open_tokenizer(cfg.model)
    report = check(cfg, tokenizer, rows=rows)
    print("\n".join(as_lines(report)))
    on, off = (ON, OFF) if sys.stdout.isatty() else ("⟦", "⟧")
    for encoded in report.sample:
        print(f"\n-- {encoded.where}: {len(encoded.ids)} tokens, {int(encoded.mask.sum())} trained")
        print(marked(encoded, tokenizer, on=on, off=off))
    raise typer.Exit(1 if report.leaks else 0)


def tasks_make(
    parts: Parts, overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is at `out`")] = False
) -> None:
    """Make reasoning tasks with their answers: train.jsonl and test.jsonl, for SFT and for RL alike.

    Example: cabochon tasks make demo-tasks out=runs/demo/tasks
    """
    from cabochon.make_tasks import TasksConfig, make

    cfg = overrides.load(TasksConfig, *overrides.split(parts))
    training, held = make(cfg, overwrite=overwrite)
    print(f"{cfg.out}: {training:,} tasks in train.jsonl, {held:,} held out in test.jsonl")
