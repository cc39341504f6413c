"""Supervised fine-tuning, top to bottom. `cabochon sft RECIPE` runs `main`; docs/sft.md is the user's side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cabochon import metrics, parallel
from cabochon.batch import Batch
from cabochon.learner import Learner, StepReport, TrainState, check, cross_entropy
from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig
from cabochon.model.hf_export import refuse_unexportable
from cabochon.model.lora import merge_lora
from cabochon.policy import learner_config, open_policy, open_tokenizer
from cabochon.protocols import Weights
from cabochon.run import Run, open_run
from cabochon.sft.config import EvalConfig, ExamplesConfig, SampledConfig, SftConfig
from cabochon.sft.data import Encoded, Feed, Position, Split, read_splits
from cabochon.tokenizer import Tokenizer

SHOWN = ("loss", "eval_loss", "held_out", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
"""what the console shows of a step"""
ROUTER_TERMS = ("balance", "router_z", "simbal")
"""the learner's own loss terms"""
RATED = {"loss": "eval_loss", "accuracy": "held_out"}
"""eval.by -> its key in a row"""
START = Position()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a resumed run has to know beside the train state."""

    position: Position = START
    best: float | None = None
    """lowest evaluation loss, or highest accuracy"""
    best_step: int = 0
    stale: int = 0
    """evaluations since then"""
    stopped: bool = False
    """early, for want of a better evaluation"""

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Progress:
        return cls(**{**meta, "position": Position(*meta["position"])})

    def rated(self, step: int, value: float, *, higher: bool = False) -> Progress:
        """After an evaluation, `higher` values being better. What is not a number is never the best."""
        if not math.isnan(value) and (self.best is None or (value > self.best if higher else value < self.best)):
            return replace(self, best=value, best_step=step, stale=0)
        return replace(self, stale=self.stale + 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Exam:
    """Held-out tasks, and who answers and judges them. Rooms do not know each other: the command line brings it."""

    tasks: int
    accuracy: Callable[[Weights], Mapping[str, float]]
    """of a policy: `all`, and every domain where there are several"""


OpenExam = Callable[[SampledConfig, bool, int, ModelConfig, Tokenizer], AbstractContextManager[Exam]]
"""(eval.sampled, data.chat, seed, the policy's shape, its tokenizer) -> the exam, which ends with the context"""
Update = Callable[[int, TrainState, Batch, Sequence[Encoded]], tuple[TrainState, StepReport, dict[str, Any]]]
"""(step, state, the feed's batch, its examples) -> next state, what the step measured, what is known of its batch"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What a stage hands to `fit`."""

    learner: Learner
    """of the state, and of the evaluation loss"""
    tokenizer: Tokenizer
    train: Split
    held: Split
    update: Update
    parents: tuple[str, ...] = ()
    """models it learns from, besides the one it starts as"""
    exam: Exam | None = None


def main(cfg: SftConfig, *, exam: OpenExam | None = None, resume_anyway: bool = False) -> Path:
    """Train, and return the directory with the result. The same call again goes on where it stopped.

    `exam` is for recipes with `eval.sampled`. Raises UserError (recipe, data, directory), MachineError (disk),
    NonFiniteError (the loss or a gradient is not finite: the checkpoints hold what was before), KeyboardInterrupt after
    Ctrl-C saved a checkpoint.
    """
    with open_stage(cfg, "sft", resume_anyway=resume_anyway) as run:
        if run.finished:
            return run.final
        learner = Learner(learner_config(cfg), cross_entropy, parallel.mesh_of(cfg.mesh))
        tokenizer = open_tokenizer(cfg.model)
        train, held = read_splits(cfg.data, tokenizer, cfg.step.sequence_length)

        def update(step: int, state: TrainState, batch: Batch, examples: Sequence[Encoded]) -> Any:
            return *learner.step(state, parallel.place(batch, learner.mesh)), batch_row(batch, examples)

        with open_exam(cfg, exam, learner.cfg.model, tokenizer) as opened:
            job = Job(learner=learner, tokenizer=tokenizer, train=train, held=held, update=update, exam=opened)
            return fit(cfg, run, job)


def open_stage(
    cfg: ExamplesConfig, stage: str, *, models: Sequence[str] = (), resume_anyway: bool = False
) -> AbstractContextManager[Run]:
    """The run directory; `models` are paths whose content counts as the data's does."""
    files = [source.path for source in (*cfg.data.train, *cfg.data.eval)]
    files += cfg.eval.sampled.tasks if cfg.eval.sampled is not None else ()
    keep_best = int(cfg.eval.keep == "best")
    return open_run(cfg, stage, data=[*files, *models], resume_anyway=resume_anyway, shown=SHOWN,
                    keep_best=keep_best, best="min" if cfg.eval.by == "loss" else "max")  # fmt: skip


def open_exam(
    cfg: ExamplesConfig, exam: OpenExam | None, model: ModelConfig, tokenizer: Tokenizer
) -> AbstractContextManager[Exam | None]:
    """The exam the recipe asks for. Raises ValueError where nobody brought one."""
    if cfg.eval.sampled is None:
        return nullcontext()
    if exam is None:
        raise ValueError("the recipe has eval.sampled, so `main` needs `exam`: who samples and who judges")
    return exam(cfg.eval.sampled, cfg.data.chat, cfg.seed, model, tokenizer)


def fit(cfg: ExamplesConfig, run: Run, job: Job) -> Path:
    """The loop over the examples, evaluation, and the result; returns its directory. Raises what `main` does."""
    learner, mesh = job.learner, job.learner.mesh
    refuse_unexportable(learner.cfg.model)
    feed, eval_feed = (feed_of(cfg, split, job.tokenizer) for split in (job.train, job.held))
    eval_batches = eval_feed.all_once() if cfg.eval.every else []
    work = metrics.flops_per_token(learner.cfg.model, cfg.step.sequence_length)
    peak = jax.device_count() * (cfg.run.peak_tflops * 1e12 or metrics.measured_peak(cfg.precision.compute))

    # -- a fresh state, or the one that was saved ----------------------------------------------------------------------
    if saved := run.restore(learner.abstract_state()):
        state, done, progress = saved.state, saved.step, Progress.of(saved.meta)
    else:
        state, done, progress = learner.init_state(open_policy(cfg.model, cfg.seed, mesh).params), 0, Progress()
        tell_data(cfg, run, job, feed)
        if cfg.eval.every:
            tell_start(run, evaluated(job, state, 0, eval_batches), job.exam)

    # -- the loop ------------------------------------------------------------------------------------------------------
    batch, examples, following = feed.take(progress.position)
    alarmed = ""
    for step in run.steps(done, done if progress.stopped else cfg.steps):
        start = time.perf_counter()
        state, report, row = job.update(step, state, batch, examples)
        row["epoch"] = progress.position.epoch
        progress = replace(progress, position=following)
        batch, examples, following = feed.take(following)  # while the device is busy
        check(report, step)
        report = jax.device_get(report)
        row |= report_row(report)
        speed = row["tokens"] / (time.perf_counter() - start)
        if (why := metrics.idle(row, step)) and why != alarmed:
            run.event("alarm", why, step=step)
        alarmed = why
        rated = cfg.eval.every > 0 and (step % cfg.eval.every == 0 or step == cfg.steps)
        if rated:
            row |= evaluated(job, state, step, eval_batches)
            progress = rate(progress, cfg.eval, step, row)
        progress = replace(progress, stopped=rated and 0 < cfg.eval.patience <= progress.stale)
        clock = {"tokens_per_second": speed, "mfu": work * speed / peak}
        run.log(step, row, clock=clock, experts=metrics.expert_row(report.router))
        best = cfg.eval.keep == "best" and rated and progress.stale == 0
        if step == cfg.steps or progress.stopped or best or run.save_due(step):
            run.save(step, state, asdict(progress), metric=row.get(RATED[cfg.eval.by]))
        if progress.stopped:
            run.event("early stop", f"no better {cfg.eval.by} in the last {progress.stale} evaluations", step=step)
            break

    # -- the result ----------------------------------------------------------------------------------------------------
    kept = int(state.step)
    if cfg.eval.keep == "best" and progress.best_step not in (0, kept):
        state = run.checkpoints.restore(learner.abstract_state(), step=progress.best_step).state
    export(run.final, learner, state, job.tokenizer)
    run.finish(steps=kept, results=results_of(run, int(state.step)), parents=job.parents)
    return run.final


def feed_of(cfg: ExamplesConfig, split: Split, tokenizer: Tokenizer) -> Feed:
    """Batches of the recipe's shape."""
    step, pad = cfg.step, tokenizer.pad_id or 0
    return Feed(
        split=split,
        batch_size=step.batch_size,
        length=step.sequence_length,
        packing=cfg.data.packing,
        seed=cfg.seed,
        pad_id=pad,
    )


def evaluate(learner: Learner, params: tf.Params, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy over every trained token of the batches, nats per token."""
    total = count = 0.0
    for batch in batches:
        batch = parallel.place(batch, learner.mesh)
        nll = cross_entropy(learner.score(params, batch).tokens, batch).terms["nll"]
        total, count = total + float(nll.total), count + float(nll.count)
    return total / count


def evaluated(job: Job, state: TrainState, step: int, batches: Sequence[Batch]) -> dict[str, Any]:
    """What a row has of an evaluation: the loss where there are held-out rows, accuracies where there is an exam."""
    row: dict[str, Any] = {"eval_loss": evaluate(job.learner, state.params, batches)} if batches else {}
    if job.exam is not None:
        params = merge_lora(state.params, job.learner.cfg.lora_matrices)
        # copied: the next update takes the state's arrays over
        accuracy = job.exam.accuracy(Weights(version=step, params=jax.tree.map(np.array, params)))
        row |= {"held_out": accuracy["all"], "held_out_domains": dict(accuracy)}
    return row


def rate(progress: Progress, cfg: EvalConfig, step: int, row: Mapping[str, Any]) -> Progress:
    """After an evaluation; one that there is nothing to go by in (no held-out row) changes nothing."""
    value = row.get(RATED[cfg.by])
    return progress if value is None else progress.rated(step, value, higher=cfg.by == "accuracy")


def tell_data(cfg: ExamplesConfig, run: Run, job: Job, feed: Feed) -> None:
    """The event that says what is trained on, and an alarm where held-out prompts are."""
    counts = {"train": asdict(job.train.counts), "eval": asdict(job.held.counts)}
    run.event("data", told(cfg, job.train, job.held, feed.rows(0)), data=counts)
    if leaked := job.held.counts.leaked:
        said = f"{leaked} held-out examples have prompts that are trained on; `cabochon data check` names them"
        run.event("alarm", said, data={"alarm": "held-out leak"})


def tell_start(run: Run, row: Mapping[str, Any], exam: Exam | None) -> None:
    """The events that say what an evaluation before the first step found."""
    if (loss := row.get("eval_loss")) is not None:
        run.event("evaluation", f"loss before training {loss:.4f}", step=0, data={"eval_loss": loss})
    if exam is not None:
        found = row["held_out_domains"]
        said = ", ".join(f"{domain} {accuracy:.1%}" for domain, accuracy in found.items())
        run.event("held out", said, step=0, data={"held_out": found, "tasks": exam.tasks})


def batch_row(batch: Batch, examples: Sequence[Encoded]) -> dict[str, Any]:
    """What is known of a step before it runs. `fill`: the share of the batch that is not padding."""
    tokens = int((batch.segment_BT != 0).sum())
    return {
        "tokens": tokens,
        "trained_tokens": int(batch.mask_BT.sum()),
        "sequences": len(examples),
        "truncated": sum(example.lost > 0 for example in examples),
        "fill": tokens / batch.tokens_BT.size,
    }


def report_row(report: StepReport) -> dict[str, Any]:
    """What the step measured (on the host). Router readings are the worst or the mean over the sparse layers."""
    said = {**report.loss, **report.metrics}
    value = {name: float(term.total) / max(float(term.count), 1.0) for name, term in said.items()}
    router = {name: value.pop(name) for name in ROUTER_TERMS if name in value}
    row: dict[str, Any] = {
        "loss": value.pop(next(name for name in report.loss if name not in ROUTER_TERMS)),
        **value,
        "grad_norm": float(report.grad_norm),
        "learning_rate": float(report.learning_rate),
    }
    if report.router is not None:
        row["moe"] = {**router, **metrics.router_row(report.router)}
    return row


def told(cfg: ExamplesConfig, train: Split, held: Split, epoch: Sequence[Sequence[int]]) -> str:
    """The data in a line; `epoch`: the rows of the first, as examples."""
    c, batch, rows = train.counts, cfg.step.batch_size, len(epoch)
    tokens = sum(len(train.examples[i].ids) for row in epoch for i in row)
    unused = f"{c.truncated} truncated, {c.dropped_long} too long and {c.dropped_empty} without a target left out"
    return (
        f"{c.examples:,} examples ({held.counts.examples:,} held out), {c.tokens:,} tokens, {c.trained_tokens:,} "
        f"trained; {rows:,} rows an epoch, {tokens / (rows * cfg.step.sequence_length):.0%} full; "
        f"{cfg.steps} steps of {batch} rows are {cfg.steps * batch / rows:.2f} epochs; {unused}"
    )


def export(directory: Path, learner: Learner, state: TrainState, tokenizer: Tokenizer) -> None:
    """The weights as a Hugging Face directory, low-rank additions merged in."""
    params = merge_lora(state.params, learner.cfg.lora_matrices)
    convert.save(directory, learner.cfg.model, params, tokenizer=tokenizer, overwrite=True)


def results_of(run: Run, step: int) -> dict[str, Any]:
    """The losses, and the accuracy, at the step that was exported."""
    row = next(row for row in run.rows() if row["step"] == step)
    return {"step": step, **{name: row[name] for name in ("loss", "eval_loss", "held_out") if name in row}}
