"""`cabochon rm RECIPE | rm eval | rm rows | rm sample`: reward models, scalar and generative. Heavy imports on use."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cabochon.cli_stages import DryRun, Parts, ResumeAnyway, TrainsByDefault, run_stage
from cabochon.errors import UserError
from cabochon.files import write_whole

if TYPE_CHECKING:
    from cabochon.model.config import ModelConfig
    from cabochon.protocols import PolicyEngine
    from cabochon.reward.asking import Asker
    from cabochon.reward.open import JudgeRun
    from cabochon.reward.rows import Labelled
    from cabochon.rl.evaluate import JudgeTexts
    from cabochon.tokenizer import Tokenizer

JudgeParts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[JUDGE_RECIPE]... [KEY=VALUE]...", help="for a judge: such as judge.reason=false"),
]
Data = Annotated[Path, typer.Argument(metavar="DATA", help="rows with prompt, completion, label; or chosen, rejected")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="the JSONL file to write")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]


app = typer.Typer(cls=TrainsByDefault, no_args_is_help=True, help="Reward models: `cabochon rm RECIPE` trains one.")


@app.command()
def train(parts: Parts, dry_run: DryRun = False, resume_anyway: ResumeAnyway = False) -> None:
    """Train a scalar reward model on preference pairs. The same command again goes on where it stopped.

    Example: cabochon rm tiny-rm data.train=pairs.jsonl data.eval_fraction=0.1 run.dir=runs/rm
    """
    from cabochon import overrides
    from cabochon.reward.config import RewardModelConfig

    cfg = overrides.load(RewardModelConfig, *overrides.split(parts))
    if dry_run:
        _describe(parts)
        return
    from cabochon.reward.train import main

    run_stage(main, cfg, resume_anyway, "lower optim.learning_rate, or look at the data of that step")


def _describe(parts: list[str]) -> None:
    from cabochon import overrides
    from cabochon.cli_weights import describe
    from cabochon.learner import Learner
    from cabochon.parallel import mesh_of
    from cabochon.plan import memory_lines
    from cabochon.policy import open_tokenizer
    from cabochon.reward.config import RewardModelConfig
    from cabochon.reward.data import Position, read_splits
    from cabochon.reward.loss import bradley_terry
    from cabochon.reward.train import feed_of, scored_model, told

    cfg = overrides.load(RewardModelConfig, *overrides.split(parts))
    print(overrides.dump(cfg), end="")
    tokenizer = open_tokenizer(cfg.model)
    data, held = read_splits(cfg.data, tokenizer, cfg.step.sequence_length, cfg.step.batch_size)
    learner = Learner(scored_model(cfg), bradley_terry(), mesh_of(cfg.mesh))
    feed, position, steps = feed_of(cfg, data, tokenizer), Position(), 0
    while position.epoch == 0:
        _, _, position = feed.take(position)
        steps += 1
    lines = [describe(learner.cfg.model), told(data, held), f"{cfg.steps} steps are {cfg.steps / steps:.2f} epochs"]
    print("\n".join([*lines, *memory_lines(learner)]), file=sys.stderr)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a directory, or an endpoint: http://host/v1#name")],
    data: Data,
    parts: JudgeParts = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON; else eval-DATA.json beside MODEL, or here")] = None,
    limit: Annotated[int, typer.Option(min=2, help="completions at most")] = 2000,
    own: Annotated[str, typer.Option(help="the `author` of rows that MODEL wrote: does it prefer them?")] = "",
) -> None:
    """Agreement with labels, calibration, position and length bias, padding and injections: a table, and JSON.

    Example: cabochon rm eval runs/rm/final held.jsonl        (scalar)
             cabochon rm eval runs/judge/final held.jsonl judge judge.reason=false
    """
    from cabochon.metrics import plain
    from cabochon.reward.evaluate import evaluate as measure
    from cabochon.reward.evaluate import evaluate_pairs, table
    from cabochon.reward.judge import PairwiseJudge
    from cabochon.reward.open import is_endpoint, judge_of, usage_of
    from cabochon.reward.rows import matched
    from cabochon.reward.scorer import ModelReward

    items = read_labelled(data)[:limit]
    reward: Any
    if not is_endpoint(model) and _scalar(model):
        if parts:
            raise UserError(f"{model}: a scalar reward model; {parts[0]} is for judges, leave it out")
        reward = ModelReward.open(model)
        score = lambda tasks, texts: reward.score_texts([t.prompt for t in tasks], texts)  # noqa: E731
        report = measure(score, items, bounded=False, own=own)
    else:
        run = judge_run(parts)
        reward = judge_of(open_asker(model, run), run)
        if isinstance(reward, PairwiseJudge):
            if own:
                raise UserError(f"--own {own}: is of answers judged one by one; leave it out, or set pairwise=false")
            if not (pairs := matched(items, tolerance=1.0)):
                raise UserError(f"{data}: no prompt has a right and a wrong completion, so there is nothing to compare")
            report = evaluate_pairs(reward, pairs)
        else:
            best = run.judge.criteria[-1].choices[-1]
            report = measure(reward.score_texts, items, bounded=True, best=best, own=own)
    report = {"model": model, "model_id": reward.model_id, "data": str(data), **report}
    if usage := usage_of(reward):
        report["endpoint"] = usage
    print("\n".join(table(report)))
    place = out or (Path(model).parent if Path(model).exists() else Path.cwd()) / f"eval-{data.stem}.json"
    write_whole(place, json.dumps(plain(report), indent=1) + "\n")
    print(f"written to {place}", file=sys.stderr)


@app.command()
def rows(
    data: Data,
    out: Out,
    parts: JudgeParts = None,
    use: Annotated[Literal["sft", "rl", "rm"], typer.Option("--for", help="the stage that is to read them")] = "sft",
    model: Annotated[
        str | None, typer.Option(help="the judge that will be asked: what its tokenizer knows is not shown to it")
    ] = None,
    match: Annotated[bool, typer.Option(help="right and wrong answers to one prompt, of about equal length")] = True,
    attack: Annotated[
        float, typer.Option(min=0, max=1, help="share of copies that also ask for the verdict, or go on at length")
    ] = 0.0,
    overwrite: Overwrite = False,
) -> None:
    """Make training rows: verdicts to say (`sft`), tasks whose verifier knows the verdict (`rl`), pairs (`rm`). For a
    judge that compares (`pairwise=true`) each pair is shown in both orders.

    Example: cabochon rm rows labelled.jsonl judge-sft.jsonl judge-terse --model smollm2-135m-instruct
    """
    from cabochon.metrics import plain
    from cabochon.policy import model_tokenizer
    from cabochon.reward.open import judge_of
    from cabochon.reward.prompt import special_texts
    from cabochon.reward.rows import attacked, matched, preference_rows, sft_rows, task_rows

    _check_free(out, overwrite)
    run, items = judge_run(parts), read_labelled(data)
    if run.pairwise and not match:
        raise UserError("--no-match: a judge of pairs is shown a right and a wrong answer; leave it out")
    pairs = matched(items)
    if (match or use == "rm") and not pairs:
        raise UserError(f"{data}: no prompt has a right and a wrong completion of about equal length; sample more, "
                        "or add --no-match")  # fmt: skip
    groups = [tuple(pair) for pair in pairs] if match or use == "rm" else [(item,) for item in items]
    groups = [*groups, *attacked(groups, attack)]
    if use == "rm":
        made = preference_rows([(group[0], group[1]) for group in groups])
    else:
        asker = _Unasked() if model is None else _Unasked(specials=special_texts(model_tokenizer(model)))
        judge = judge_of(asker, run)
        made = sft_rows(judge, groups) if use == "sft" else task_rows(judge, groups)
    write_whole(out, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in made))
    print(f"{out}: {len(made):,} rows of {len(items):,} completions", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class _Unasked:
    """Rows are made with a judge's prompts, not its answers."""

    specials: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<eos>", "<bos>", "<pad>")
    model_id: str = "none"

    def ask(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("rows need no answers")


@app.command()
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="the policy to sample from")],
    tasks: Annotated[Path, typer.Argument(metavar="TASKS", help="tasks with verifiers")],
    out: Out,
    chat: Annotated[bool, typer.Option("--chat", help="put prompts that are text through the chat template")] = False,
    n: Annotated[int, typer.Option("--n", min=1, help="completions per task")] = 8,
    limit: Annotated[int, typer.Option(min=1, help="tasks at most, of each domain alike")] = 10_000,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    slots: Annotated[int, typer.Option(min=1, help="sequences decoded together")] = 8,
    length: Annotated[int, typer.Option(min=8, help="prompt and completion of one sequence, in tokens")] = 2048,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Sample solutions and label them with their verifiers: endless rows for reward models. What was cut off at
    --max-tokens is left out: it has no end to score.

    Example: cabochon rm sample runs/sft/final tasks.jsonl labelled.jsonl --n 8
    """
    from cabochon.chat import as_turns
    from cabochon.metrics import plain
    from cabochon.model.address import open_language_model
    from cabochon.rl.evaluate import first_of_each
    from cabochon.rollouts.local import requests_for
    from cabochon.types import Sampling
    from cabochon.verifiers.build import probes_for, verifier_for
    from cabochon.verifiers.pool import VerifierPool
    from cabochon.verifiers.tasks import read_tasks

    _check_free(out, overwrite)
    wanted = first_of_each(read_tasks(tasks), limit)
    engine = make_engine(*open_language_model(model), length=length, slots=slots)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, n=n)
    print(f"drawing {n} completions of each of {len(wanted):,} tasks from {model}", file=sys.stderr)
    drawn = engine.generate(requests_for([as_turns(task.prompt, chat) for task in wanted], sampling, seed))
    each = [task for task in wanted for _ in range(n)]
    ended = [(task, c.text) for task, c in zip(each, drawn, strict=True) if c.finish == "stop"]
    print(f"judging the {len(ended):,} that came to an end", file=sys.stderr)
    with VerifierPool(verifier=verifier_for(wanted), probes=probes_for(wanted)) as pool:
        verdicts = pool.verify([task for task, _ in ended], [text for _, text in ended])
    kept = [
        {"prompt": task.prompt, "completion": text, "label": v.score == 1.0, "payload": dict(task.payload)}
        for (task, text), v in zip(ended, verdicts, strict=True)
        if v.score is not None
    ]
    left = f"{len(drawn) - len(ended)} were cut off, {len(ended) - len(kept)} could not be judged"
    if not kept:
        raise UserError(f"{model}: none of {len(drawn):,} completions can be used: {left}; raise --max-tokens")
    write_whole(out, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in kept))
    share = sum(bool(row["label"]) for row in kept) / len(kept)
    print(f"{out}: {len(kept):,} completions, {share:.0%} right; {left}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------- wiring


def judge_run(parts: Sequence[str] | None) -> JudgeRun:
    from cabochon import overrides
    from cabochon.reward.open import JudgeRun

    return overrides.load(JudgeRun, *overrides.split(parts or []))


def make_engine(
    config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer, length: int = 1024, slots: int = 8
) -> PolicyEngine:
    """Our sampler on weights that do not change."""
    from cabochon.protocols import Weights
    from cabochon.rollouts.local import LocalEngine
    from cabochon.rollouts.slots import SlotConfig

    return LocalEngine(config, tokenizer, Weights(version=0, params=params), SlotConfig(slots=slots, length=length))


def open_asker(address: str, run: JudgeRun) -> Asker:
    """A model of ours, or `http://host/v1#name`, an endpoint with the model's name there."""
    from cabochon.reward import open as opening
    from cabochon.rollouts.openai import open_endpoint

    return opening.open_asker(address, run, make_engine, open_endpoint)


def judge_of_reasoning(address: str, recipe: str) -> JudgeTexts:
    """What says whether the reasoning of a response is sound. Raises UserError where the recipe compares pairs."""
    from cabochon.reward.judge import Judge

    run = judge_run([recipe])
    if run.pairwise:
        raise UserError(f"--judge-recipe {recipe}: compares two; give one that grades each, such as judge-cot")
    return Judge(open_asker(address, run), run.judge).score_texts


def read_labelled(path: Path) -> list[Labelled]:
    """Raises UserError naming file and line."""
    from cabochon.data import read_rows
    from cabochon.reward.rows import labelled_of

    return [item for row in read_rows(path) for item in labelled_of(row)]


def _scalar(address: str) -> bool:
    from cabochon.reward.open import is_scalar

    return is_scalar(address)


def _check_free(path: Path, overwrite: bool) -> None:
    """Before the work, which may take hours. Raises UserError."""
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another name, or add --overwrite")
