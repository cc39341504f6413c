"""`cabochon sft`, `distill`, `data check`, `tasks make`: stages and what prepares them. Heavy imports happen on use."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from cabochon.errors import MachineError, UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from cabochon.config import StageConfig
    from cabochon.learner import LossFn
    from cabochon.model.config import ModelConfig
    from cabochon.protocols import PolicyEngine, Weights
    from cabochon.sft.config import DistillConfig, ExamplesConfig, SampledConfig
    from cabochon.sft.train import Exam
    from cabochon.tokenizer import Tokenizer

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

STAGES = ("distill", "judge", "rl", "rm", "run", "sft", "tasks")


def schema_of(stage: object, where: str | None = None) -> type[BaseModel]:
    """The config type of recipes that say `stage: ...`; recipes of a model alone say nothing. `where` it is said."""
    from cabochon.config import TrainConfig
    from cabochon.make_tasks import TasksConfig
    from cabochon.pipeline import PipelineConfig
    from cabochon.reward.config import RewardModelConfig
    from cabochon.reward.open import JudgeRun
    from cabochon.rl.recipe import RlConfig
    from cabochon.sft.config import DistillConfig, SftConfig

    match stage:
        case None:
            return TrainConfig
        case "distill":
            return DistillConfig
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
    place = "" if where is None else f"{where}: "
    raise UserError(f"{place}stage: there is no stage {stage!r}; expected one of {', '.join(STAGES)}{hint}")


def load_recipe(parts: list[str]) -> BaseModel:
    """The config of any recipe, by what it says its stage is."""
    from cabochon import overrides

    recipes, settings = overrides.split(parts)
    stage, where = (look(recipes, settings, "stage") for look in (overrides.peek, overrides.origin))
    return overrides.load(schema_of(stage, where), recipes, settings)


class TrainsByDefault(TyperGroup):
    """A group whose `train` need not be said: `sft RECIPE` is `sft train RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["train", *args]
        return super().parse_args(ctx, args)


sft = typer.Typer(cls=TrainsByDefault, no_args_is_help=True, help="Fine-tuning: `cabochon sft RECIPE` trains.")


@sft.command("train")
def sft_train(parts: Parts, dry_run: DryRun = False, resume_anyway: ResumeAnyway = False) -> None:
    """Fine-tune a model on examples. The same command again goes on where it stopped; Ctrl-C saves first.

    Example: cabochon sft gsm8k-sft data.train=gsm8k_train.jsonl run.dir=runs/gsm8k
    """
    from cabochon import overrides
    from cabochon.sft.config import SftConfig

    cfg = overrides.load(SftConfig, *overrides.split(parts))
    if dry_run:
        from cabochon.learner import cross_entropy
        from cabochon.policy import open_tokenizer

        _describe(cfg, cross_entropy, open_tokenizer(cfg.model))
        return
    from cabochon.sft.train import main

    hint = "lower optim.learning_rate, or look at the data of that step"
    run_stage(partial(main, exam=open_exam), cfg, resume_anyway, hint)


def run_stage(main: Callable[..., Path], cfg: StageConfig, resume_anyway: bool, hint: str) -> None:
    """Run a stage and print where its result is. Raises MachineError, with `hint`, where it became non-finite."""
    from cabochon.learner import NonFiniteError

    try:
        print(main(cfg, resume_anyway=resume_anyway))
    except NonFiniteError as error:
        raise MachineError(f"{cfg.run.dir}: {error}; {hint}") from error


@sft.command("select")
def sft_select(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="the directory of a run of sft or distill")],
    tasks: Annotated[list[Path], typer.Option(help="JSONL of tasks; may be given several times")],
    samples: Annotated[int, typer.Option(min=1, help="completions of each task")] = 8,
    most: Annotated[int, typer.Option(min=1, help="tasks at most, the first of each domain alike")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="new tokens at most")] = 256,
    low: Annotated[float, typer.Option(min=0.0, help="nats: least entropy of a sampled token")] = 0.3,
    high: Annotated[float, typer.Option(min=0.0, help="nats: most entropy of a sampled token")] = 0.5,
    slots: Annotated[int, typer.Option(min=1, help="sequences decoded together")] = 32,
    seed: Annotated[int, typer.Option(help="the same seed asks the same")] = 0,
    sandbox: Annotated[Literal["bubblewrap", "docker"], typer.Option(help="for `code` tasks")] = "bubblewrap",
) -> None:
    """Choose the checkpoint to begin RL with: entropy of its samples in a range, then pass@n; it becomes RUN/selected.
    A run keeps as many checkpoints to choose from as run.keep_last says; prompts are asked as its data.chat has them.

    Example: cabochon sft select runs/demo/sft --tasks runs/demo/tasks/test.jsonl
    """
    from cabochon.chat import as_turns
    from cabochon.rl.evaluate import first_of_each
    from cabochon.rollouts.prompts import encode_prompt
    from cabochon.sft.select import Asked, select, table
    from cabochon.verifiers.build import probes_for, verifier_for
    from cabochon.verifiers.pool import VerifierPool
    from cabochon.verifiers.tasks import read_tasks

    cfg: Any = load_recipe([str(run / "config.yaml")])
    if cfg.stage not in ("sft", "distill"):
        raise UserError(f"{run}: a run of {cfg.stage}; expected one of sft or distill")
    cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(run)})})
    chosen_tasks = first_of_each([task for path in tasks for task in read_tasks(str(path))], most)
    asked = Asked(samples=samples, max_tokens=max_tokens, low=low, high=high, seed=seed)

    def engine(model: ModelConfig, tokenizer: Tokenizer, weights: Weights) -> PolicyEngine:
        longest = max(len(encode_prompt(tokenizer, as_turns(task.prompt, cfg.data.chat))) for task in chosen_tasks)
        return local_engine(model, tokenizer, weights, slots, longest + max_tokens)

    verifier = verifier_for(chosen_tasks, sandbox=sandbox)
    with VerifierPool(verifier=verifier, probes=probes_for(chosen_tasks)) as verifiers:
        found, chosen, inside = select(cfg, chosen_tasks, engine, verifiers.verify, asked,
                                       told=lambda line: print(line, file=sys.stderr))  # fmt: skip
    print(table(found, chosen, asked))
    where = "" if inside else f"; no entropy lies in {low} to {high}, it is the nearest"
    print(f"{run / 'selected'}: step {chosen.step}{where}")


def local_engine(model: ModelConfig, tokenizer: Tokenizer, weights: Weights, slots: int, length: int) -> PolicyEngine:
    """A sampler in this process."""
    from cabochon.rollouts.local import LocalEngine
    from cabochon.rollouts.slots import SlotConfig

    return LocalEngine(model, tokenizer, weights, SlotConfig(slots=slots, length=length))


@contextmanager
def open_exam(
    cfg: SampledConfig, chat: bool, seed: int, model: ModelConfig, tokenizer: Tokenizer
) -> Iterator[Exam]:
    """Held-out tasks asked of weights as `cabochon eval` asks them; sampler and graders stay between two calls. `chat`:
    prompts that are text go through the chat template.

    Raises UserError for tasks that cannot be read or do not fit the model, GradingBroken.
    """
    from cabochon.chat import as_turns
    from cabochon.rl.evaluate import accuracies, answer, first_of_each
    from cabochon.rollouts.prompts import encode_prompt
    from cabochon.sft.train import Exam
    from cabochon.types import Sampling
    from cabochon.verifiers.build import probes_for, verifier_for
    from cabochon.verifiers.pool import VerifierPool
    from cabochon.verifiers.tasks import read_tasks

    tasks = first_of_each([task for path in cfg.tasks for task in read_tasks(path)], cfg.most)
    longest = max(len(encode_prompt(tokenizer, as_turns(task.prompt, chat))) for task in tasks)
    sampling = Sampling(max_tokens=cfg.max_tokens, temperature=cfg.temperature, n=cfg.samples)
    engine: PolicyEngine | None = None
    with VerifierPool(verifier=verifier_for(tasks, sandbox=cfg.sandbox), probes=probes_for(tasks)) as verifiers:

        def accuracy(weights: Weights) -> Mapping[str, float]:
            nonlocal engine
            if engine is None:
                engine = local_engine(model, tokenizer, weights, cfg.slots, longest + cfg.max_tokens)
            else:
                engine.load(weights)
            return accuracies(answer(engine, verifiers, tasks, sampling, seed, chat=chat))

        yield Exam(tasks=len(tasks), accuracy=accuracy)


def distill(parts: Parts, dry_run: DryRun = False, resume_anyway: ResumeAnyway = False) -> None:
    """Teach a small model what a large one thinks of each token, or of what the small one writes itself.

    Example: cabochon distill demo-distill teacher.address=runs/demo/sft/final teacher.cache=runs/demo/teacher
    """
    from cabochon import overrides
    from cabochon.sft.config import DistillConfig

    cfg = overrides.load(DistillConfig, *overrides.split(parts))
    if dry_run:
        _describe_distill(cfg)
        return
    from cabochon.sft.distill import main

    hint = "lower optim.learning_rate, or look at the data of that step"
    run_stage(partial(main, engine=local_engine, exam=open_exam), cfg, resume_anyway, hint)


def _describe_distill(cfg: DistillConfig) -> None:
    from cabochon.policy import model_config
    from cabochon.sft.distill import shared_tokenizer
    from cabochon.sft.divergence import distillation

    tokenizer = shared_tokenizer(cfg, model_config(cfg.model))
    _describe(cfg, distillation(cfg.divergence), tokenizer, cfg.teacher.top_k)
    each = (6 if tokenizer.vocab_size > 1 << 16 else 4) * cfg.teacher.top_k + 2
    place = cfg.teacher.cache
    where = f"in {place}, at most {each} bytes a trained token" if place else "asked at each step"
    own = f"{cfg.on_policy.fraction:.0%} of the steps on the student's own samples"
    print(f"teacher {cfg.teacher.address}: the likeliest {cfg.teacher.top_k} tokens, {where}; {own}", file=sys.stderr)


def _describe(cfg: ExamplesConfig, loss: LossFn, tokenizer: Tokenizer, candidates: int = 0) -> None:
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from cabochon import overrides
    from cabochon.cli_weights import describe
    from cabochon.learner import Learner
    from cabochon.parallel import mesh_of
    from cabochon.plan import abstract_batch, memory_lines
    from cabochon.policy import learner_config
    from cabochon.sft.data import read_splits
    from cabochon.sft.train import feed_of, told

    print(overrides.dump(cfg), end="")
    train, held = read_splits(cfg.data, tokenizer, cfg.step.sequence_length)
    learner = Learner(learner_config(cfg), loss, mesh_of(cfg.mesh))
    batch = abstract_batch(learner)
    if candidates:
        shape, sharding = (*batch.tokens_BT.shape, candidates), batch.tokens_BT.sharding
        ids, logp = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.int32, jnp.float32))
        batch = replace(batch, candidates_BTK=ids, teacher_BTK=logp)
    step = cfg.step
    lines = [
        describe(learner.cfg.model),
        told(cfg, train, held, feed_of(cfg, train, tokenizer).rows(0)),
        f"a step: {step.batch_size} rows x {step.sequence_length} tokens = {step.batch_size * step.sequence_length:,}, "
        f"in {step.micro_batches} micro-batches",
        *memory_lines(learner, batch),
    ]
    print("\n".join(lines), file=sys.stderr)


def data_check(
    parts: Parts, rows: Annotated[int, typer.Option(min=0, help="examples to print, trained tokens marked")] = 3
) -> None:
    """Look at the data of a recipe of sft or distill: lengths, packing, what would be cut, copies, leaks; exit code 1
    for a leak.

    Example: cabochon data check gsm8k-sft data.train=gsm8k_train.jsonl data.eval=gsm8k_test.jsonl
    """
    from cabochon import overrides
    from cabochon.policy import model_config, open_tokenizer
    from cabochon.sft.check import as_lines, check, marked
    from cabochon.sft.config import DistillConfig, SftConfig
    from cabochon.sft.distill import shared_tokenizer
    from cabochon.verifiers.tasks import read_tasks

    recipes, settings = overrides.split(parts)
    if overrides.peek(recipes, settings, "steps") is None:
        settings.append("steps=1")  # says nothing about data
    cfg: SftConfig | DistillConfig
    if overrides.peek(recipes, settings, "stage") == "distill":
        cfg = overrides.load(DistillConfig, recipes, settings)
        tokenizer = shared_tokenizer(cfg, model_config(cfg.model))
    else:
        cfg = overrides.load(SftConfig, recipes, settings)
        tokenizer = open_tokenizer(cfg.model)
    asked = cfg.eval.sampled.tasks if cfg.eval.sampled is not None else ()
    report = check(cfg, tokenizer, tasks=[task for path in asked for task in read_tasks(path)], rows=rows)
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
    from cabochon import overrides
    from cabochon.make_tasks import TasksConfig, make

    cfg = overrides.load(TasksConfig, *overrides.split(parts))
    training, held = make(cfg, overwrite=overwrite)
    print(f"{cfg.out}: {training:,} tasks in train.jsonl, {held:,} held out in test.jsonl")
