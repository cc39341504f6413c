"""The `cabochon` command. Each command imports what it needs when it runs, so that `--help` is there at once."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cabochon import (
    cli_import,
    cli_plan,
    cli_report,
    cli_reward,
    cli_rl,
    cli_run,
    cli_serve,
    cli_stages,
    cli_submit,
    cli_weights,
)
from cabochon.errors import MachineError, UserError
from cabochon.heap import keep_pages
from cabochon.rollouts import cli as rollouts_cli
from cabochon.verifiers import cli as verifiers_cli
from cabochon.verifiers.sandbox import cli as sandbox_cli

if TYPE_CHECKING:
    from pydantic import ValidationError


class OneLine(TyperGroup):
    """Says what is wrong with a command line on one line, where Typer draws a box of five."""

    def main(  # type: ignore[override]
        self, args: Any = None, prog_name: Any = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except typer.TyperException as error:
            code = error.exit_code
            if said := " ".join(error.format_message().split()):  # nothing where the help has been printed instead
                print(f"cabochon: {said}", file=sys.stderr)
        except typer.Abort:
            code = 1
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    name="cabochon",
    cls=OneLine,
    help="RL post-training for sparse Mixture-of-Experts language models, in JAX.",
    epilog="An error of use is one line and exit code 2; `cabochon COMMAND --help` has examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

MACHINE = "This machine"
CONFIGS = "Configs"
STAGES = "Stages"
WEIGHTS = "Models"
REWARDS = "Rewards"
LOOK = "Looking at runs"

RecipeAndSettings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE]... [KEY=VALUE]...", help="recipe names or files, then settings (optim.b1=0.9)"),
]


@app.command(rich_help_panel=MACHINE)
def doctor(json: Annotated[bool, typer.Option("--json", help="one JSON object instead of lines")] = False) -> None:
    """Check that this machine can run the main job; exit code 1 where it cannot."""
    from cabochon import doctor as checks

    report = checks.run_checks()
    print(checks.as_json(report) if json else checks.as_lines(report, color=sys.stdout.isatty()))
    raise typer.Exit(0 if checks.healthy(report) else 1)


@app.command(rich_help_panel=CONFIGS)
def config(parts: RecipeAndSettings = None) -> None:
    """Print the resolved config as YAML that can be run again, or list the recipes when none is given.

    Example: cabochon config tiny-moe optim.learning_rate=3e-4 > mine.yaml
    """
    from cabochon import overrides

    if not parts:
        for name in overrides.recipe_names():
            print(f"{name:20} {overrides.summary(name)}")
        return
    print(overrides.dump(cli_stages.load_recipe(parts)), end="")


app.command("import-config", rich_help_panel=CONFIGS)(cli_import.import_config)


app.command(rich_help_panel=STAGES)(cli_run.run)
app.command(rich_help_panel=WEIGHTS)(cli_weights.inspect)
app.command(rich_help_panel=WEIGHTS)(cli_weights.export)
app.command(rich_help_panel=WEIGHTS)(cli_weights.upcycle)

app.command("generate", rich_help_panel=WEIGHTS)(rollouts_cli.generate_command)
app.command("chat", rich_help_panel=WEIGHTS)(rollouts_cli.chat_command)
app.command(rich_help_panel=WEIGHTS)(cli_serve.serve)

app.add_typer(cli_stages.sft, name="sft", rich_help_panel=STAGES)
app.command(rich_help_panel=STAGES)(cli_stages.distill)
app.command(rich_help_panel=STAGES)(cli_rl.rl)
app.command("eval", rich_help_panel=STAGES)(cli_rl.eval_command)
app.command(rich_help_panel=STAGES)(cli_submit.submit)
app.command(rich_help_panel=CONFIGS)(cli_plan.plan)
app.command(rich_help_panel=LOOK)(cli_report.report)
app.command(rich_help_panel=LOOK)(cli_report.view)
data = typer.Typer(no_args_is_help=True, help="Training data: look at it before a run does.")


@data.callback()
def _data() -> None:
    """Keeps `data` a group while it has one command only."""


data.command("check")(cli_stages.data_check)
app.add_typer(data, name="data", rich_help_panel=STAGES)
app.add_typer(cli_reward.app, name="rm", rich_help_panel=STAGES)
tasks = typer.Typer(no_args_is_help=True, help="Verifiable tasks: make them, or bring them along.")
tasks.command("make")(cli_stages.tasks_make)
tasks.command("import")(cli_import.tasks_import)
app.add_typer(tasks, name="tasks", rich_help_panel=STAGES)

app.command("verify", rich_help_panel=REWARDS)(verifiers_cli.verify_command)
reward = typer.Typer(no_args_is_help=True, help="Rewards: test one before a run trusts it.")


@reward.callback()
def _reward() -> None:
    """Keeps `reward` a group while it has one command only."""


reward.command("test")(verifiers_cli.reward_test_command)
app.add_typer(reward, name="reward", rich_help_panel=REWARDS)
sandbox = typer.Typer(no_args_is_help=True, help="Sandboxes: attack the one on this machine, or build its image.")
sandbox.command("attack")(sandbox_cli.attack_command)
sandbox.command("image")(sandbox_cli.image_command)
app.add_typer(sandbox, name="sandbox", rich_help_panel=REWARDS)


def main() -> None:
    """Entry point. One line on stderr for the user's mistake (exit code 2) and for a machine that failed (1); a bug
    keeps its traceback."""
    try:
        try:
            cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "cabochon", "jax"))
            keep_pages()
            app()
        except ValueError as error:
            line = _line_of(error)
            if line is None:
                raise
            print(f"cabochon: {line}", file=sys.stderr)
            sys.exit(2)
        except MachineError as error:
            print(f"cabochon: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)
    except KeyboardInterrupt:
        print("cabochon: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _line_of(error: ValueError) -> str | None:
    """What to tell the user, on one line; None for a bug."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and isinstance(error, pydantic.ValidationError):
        return _first_problem(error)
    return None


def _first_problem(error: ValidationError) -> str:
    """A pydantic error that no file or setting can be blamed for, such as a shape that a checkpoint asks for."""
    first = error.errors(include_url=False)[0]
    where = ".".join([error.title, *(str(part) for part in first["loc"])])
    said = re.sub(r"^(Value error, )?(Input should be)?", lambda m: "expected" if m[2] else "", first["msg"])
    return f"{where}: {said}, got {' '.join(repr(first['input']).split())[:60]}"


if __name__ == "__main__":
    main()
