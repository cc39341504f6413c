"""`cabochon rl`, `cabochon eval`: plain functions with typer's annotations, registered by the roof."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cabochon.cli_stages import DryRun, Parts, ResumeAnyway, run_stage

if TYPE_CHECKING:
    from cabochon.model.config import ModelConfig
    from cabochon.rl.recipe import RlConfig


def rl(parts: Parts, dry_run: DryRun = False, resume_anyway: ResumeAnyway = False) -> None:
    """Reinforcement learning on verifiable tasks. The same command again goes on where it stopped; Ctrl-C saves first.

    Example: cabochon rl demo-rl model.address=runs/sft/final tasks.train=tasks.jsonl run.dir=runs/rl
    """
    from cabochon import overrides
    from cabochon.rl.recipe import RlConfig

    cfg = overrides.load(RlConfig, *overrides.split(parts))
    if dry_run:
        _describe(cfg)
        return
    from cabochon.rl.train import main

    run_stage(main, cfg, resume_anyway, "lower optim.learning_rate, or set update.algorithm.clip")


def _describe(cfg: RlConfig) -> None:
    from cabochon import overrides
    from cabochon.cli_weights import describe
    from cabochon.parallel import mesh_of
    from cabochon.plan import memory_lines
    from cabochon.policy import model_config
    from cabochon.rl.train import learners_of, tasks_of
    from cabochon.rl.update import plan_update
    from cabochon.tpu_compile import rl_batch

    print(overrides.dump(cfg), end="")
    train, held = tasks_of(cfg)
    model = model_config(cfg.model)
    update = plan_update(cfg.update, sparse=model.moe is not None)
    learners = learners_of(cfg, update, mesh_of(cfg.mesh))
    r = cfg.rollout
    lines = [
        describe(model),
        f"{len(train):,} tasks to learn from, {len(held):,} held out",
        f"a step: {r.prompts} prompts x {r.group_size} = {r.prompts * r.group_size} completions of up to "
        f"{cfg.sampling.max_tokens} tokens, {cfg.update.minibatches * cfg.update.epochs} updates",
        *memory_lines(learners.policy, rl_batch(learners.policy, update)),
        *_engine_lines(cfg, model),
    ]
    print("\n".join(lines), file=sys.stderr)


def _engine_lines(cfg: RlConfig, model: ModelConfig) -> list[str]:
    """Memory beside the learner's: an engine has two versions of the weights while it takes over the newer one; of
    those for Ray's workers there are a copy to publish again and, until Ray lets go of the older, two in its store."""
    import jax
    import jax.numpy as jnp

    from cabochon.model import transformer as tf
    from cabochon.rollouts.slots import SlotConfig

    size = jnp.dtype(cfg.precision.compute).itemsize
    weights = size * sum(x.size for x in jax.tree.leaves(tf.abstract(model)))
    slots = SlotConfig(slots=cfg.engine.slots, length=cfg.engine.length)
    cache = size * 2 * model.num_layers * model.num_kv_heads * model.head_dim * slots.slots * slots.positions
    ray = cfg.engine.kind == "ray"
    name = f"each of {cfg.engine.ray.workers} engines" if ray and cfg.engine.ray.workers > 1 else "the engine"
    parts = {f"besides, {name}": 2 * weights + cache} | ({"weights on their way to it": 3 * weights} if ray else {})
    return [f"{part:32}{amount / 1e9:9.3f} GB" for part, amount in parts.items()]


def eval_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="a directory, a .gguf file or a known name")],
    tasks: Annotated[list[Path], typer.Option(help="JSONL of tasks; may be given several times")],
    chat: Annotated[bool, typer.Option("--chat", help="put prompts that are text through the chat template")] = False,
    samples: Annotated[int, typer.Option(min=1, help="completions of each task")] = 4,
    most: Annotated[int, typer.Option(min=1, help="tasks at most, the first of each domain alike")] = 1000,
    max_tokens: Annotated[int, typer.Option(min=1, help="new tokens at most")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 for all")] = 1.0,
    thinking: Annotated[list[int] | None, typer.Option(help="thinking tokens; several make a sweep of budgets")] = None,
    slots: Annotated[int, typer.Option(min=1, help="sequences decoded together")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="the same seed asks the same")] = 0,
    sandbox: Annotated[Literal["bubblewrap", "docker"], typer.Option(help="for `code` tasks")] = "bubblewrap",
    judge: Annotated[str, typer.Option(help="a model or endpoint that judges reasoning: adds CoT-Pass@K")] = "",
    judge_recipe: Annotated[str, typer.Option(help="how it judges")] = "judge-cot",
    out: Annotated[Path | None, typer.Option(help="write everything here as JSON")] = None,
) -> None:
    """Accuracy on tasks: mean with its interval, pass@k, maj@k, by domain; several models are compared in pairs.

    Example: cabochon eval runs/sft/final runs/rl/final --tasks test.jsonl --samples 8
    """
    from cabochon.cli_reward import judge_of_reasoning
    from cabochon.rl import evaluate

    opinion = judge_of_reasoning(judge, judge_recipe) if judge else None
    asked = evaluate.Asked(
        tasks=tuple(str(path) for path in tasks), chat=chat, most=most, samples=samples, max_tokens=max_tokens,
        temperature=temperature, top_p=top_p, thinking=tuple(thinking or ()), slots=slots, seed=seed,
        sandbox=sandbox, judge=judge,
    )  # fmt: skip
    report = evaluate.compare(models, asked, told=lambda line: print(line, file=sys.stderr), judge=opinion)
    print(evaluate.as_table(report))
    if out is not None:
        evaluate.write(report, out)
        print(out, file=sys.stderr)
