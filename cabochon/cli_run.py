"""`cabochon run`: every stage's command and config is read before the first stage begins."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cabochon import cli_stages
from cabochon.errors import UserError

if TYPE_CHECKING:
    from typer._click.core import Command

    from cabochon.pipeline import PipelineConfig

StagesAndSettings = Annotated[
    list[str], typer.Argument(metavar="RECIPE [STAGE.KEY=VALUE]...", help="a job, then settings for its stages")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check every stage's command and config, print them, run none")]
ResumeAnyway = Annotated[
    bool,
    typer.Option(
        "--resume-anyway",
        help="stages that were begun with other settings or inputs go on, from what they learnt with the old ones",
    ),
]

OF_THE_COMMAND = ("distill", "rl", "sft")
"""commands whose recipes need not name their stage"""


def run(
    context: typer.Context, parts: StagesAndSettings, dry_run: DryRun = False, resume_anyway: ResumeAnyway = False
) -> None:
    """Run a job's stages in order, going on where it stopped: SFT, reward models, RL, evaluation.

    Example: cabochon run demo rl.steps=50 dir=runs/mine
    """
    from cabochon import pipeline

    cfg = pipeline.read(parts)
    resuming = check(context.find_root().command, cfg)
    if not dry_run:
        return pipeline.run(cfg, resuming if resume_anyway else ())
    for words in cfg.stages.values():
        print(f"cabochon {shlex.join(words)}")


def check(cabochon: Command, cfg: PipelineConfig) -> list[str]:
    """Read the commands of all stages, and the configs they are given, as the stages themselves will. Returns the
    stages whose command has `--resume-anyway`.

    Raises UserError naming the first stage that would refuse its command. Files that earlier stages make are not
    looked for.
    """
    from cabochon import overrides

    resuming = []
    for name, words in cfg.stages.items():
        try:
            params = _params(cabochon, words)
            parts = list(params.get("parts") or ())
            if "resume_anyway" in params:
                resuming.append(name)
            recipes, settings = overrides.split(parts)
            if recipes:
                own = words[0] if words[0] in OF_THE_COMMAND else None
                stage = overrides.peek(recipes, settings, "stage") or own
                where = overrides.origin(recipes, settings, "stage")
                overrides.load(cli_stages.schema_of(stage, where), recipes, settings)
        except typer.TyperException as error:
            raise UserError(f"stage {name}: cabochon {shlex.join(words)}: {error.format_message()}") from None
        except UserError as error:
            raise UserError(f"stage {name}: {error}") from None
    return resuming


def _params(command: Command, words: tuple[str, ...]) -> dict[str, Any]:
    """What the words of a command line give its command, by name; raises TyperException where it is none."""
    context = command.make_context("cabochon", list(words))
    while isinstance(command, TyperGroup):
        # what a group has not read itself is the name and the words of one of its commands
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None, "resolve_command raises where there is none"
        command, context = found, found.make_context(name, rest, parent=context)
    return context.params
