"""Supervised fine-tuning, top to bottom. `cabochon sft RECIPE` runs `main`; docs/sft.md is the user's side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from cabochon import metrics, parallel
from cabochon.batch import Batch
from cabochon.learner import Learner, StepReport, TrainState, check, cross_entropy
from cabochon.model import convert
from cabochon.model import transformer as tf
from cabochon.model.hf_export import refuse_unexportable
from cabochon.model.lora import merge_lora
from cabochon.policy import learner_config, open_policy, open_tokenizer
from cabochon.run import Run, open_run
from cabochon.sft.config import ExamplesConfig, SftConfig
from cabochon.sft.data import Encoded, Feed, Position, Split, read_splits
from cabochon.tokenizer import Tokenizer

SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
"""what the console shows of a step"""
ROUTER_TERMS = ("balance", "router_z", "simbal")
"""the learner's own loss terms"""
START = Position()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a resumed run has to know beside the train state."""

    position: Position = START
    best: float | None = None
    """lowest evaluation loss"""
    best_step: int = 0
    stale: int = 0
    """evaluations since then"""
    stopped: bool = False
    """early, for want of a better evaluation"""

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Progress:
        return cls(**{**meta, "position": Position(*meta["position"])})

    def rated(self, step: int, loss: float) -> Progress:
        """After an evaluation. A loss that is not a number is never the best."""
        if not math.isnan(loss) and (self.best is None or loss < self.best):
            return replace(self, best=loss, best_step=step, stale=0)
        return replace(self, stale=self.stale + 1)


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


def main(cfg: SftConfig, *, resume_anyway: bool = False) -> Path:
    """Train, and return the directory with the result. The same call again goes on where it stopped.

    Raises UserError (recipe, data, directory), MachineError (disk), NonFiniteError (the loss or a gradient is not
    finite: the checkpoints hold what was before), KeyboardInterrupt after Ctrl-C saved a checkpoint.
    """
    with open_stage(cfg, "sft", resume_anyway=resume_anyway) as run:
        if run.finished:
            return run.final
        learner = Learner(learner_config(cfg), cross_entropy, parallel.mesh_of(cfg.mesh))
        tokenizer = open_tokenizer(cfg.model)
        train, held = read_splits(cfg.data, tokenizer, cfg.step.sequence_length)

        def update(step: int, state: TrainState, batch: Batch, examples: Sequence[Encoded]) -> Any:
            return *learner.step(state, parallel.place(batch, learner.mesh)), batch_row(batch, examples)

        return fit(cfg, run, Job(learner=learner, tokenizer=tokenizer, train=train, held=held, update=update))


def open_stage(
    cfg: ExamplesConfig, stage: str, *, models: Sequence[str] = (), resume_anyway: bool = False
) -> AbstractContextManager[Run]:
    """The run directory; `models` are paths whose content counts as the data's does."""
    files = [source.path for source in (*cfg.data.train, *cfg.data.eval)]
    keep_best = int(cfg.eval.keep == "best")
    return open_run(cfg, stage, data=[*files, *models], resume_anyway=resume_anyway, shown=SHOWN,
                    keep_best=keep_best, best="min")  # fmt: skip


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
        counts = {"train": asdict(job.train.counts), "eval": asdict(job.held.counts)}
        run.event("data", told(cfg, job.train, job.held, len(feed.rows(0))), data=counts)
        if eval_batches:
            before = evaluate(learner, state.params, eval_batches)
            run.event("evaluation", f"loss before training {before:.4f}", step=0, data={"eval_loss": before})

    # -- the loop ------------------------------------------------------------------------------------------------------
    batch, examples, following = feed.take(progress.position)
    for step in run.steps(done, done if progress.stopped else cfg.steps):
        start = time.perf_counter()
        state, report, row = job.update(step, state, batch, examples)
        row["epoch"] = progress.position.epoch
        progress = replace(progress, position=following)
        batch, examples, following = feed.take(following)  # while the device is busy
        check(report, step)
        row |= report_row(jax.device_get(report))
        speed = row["tokens"] / (time.perf_counter() - start)
        if row["grad_norm"] == 0:
            run.event("alarm", "every gradient is zero: nothing is learnt", step=step)
        rated = bool(eval_batches) and (step % cfg.eval.every == 0 or step == cfg.steps)
        if rated:
            row["eval_loss"] = evaluate(learner, state.params, eval_batches)
            progress = progress.rated(step, row["eval_loss"])
        progress = replace(progress, stopped=rated and 0 < cfg.eval.patience <= progress.stale)
        run.log(step, row, clock={"tokens_per_second": speed, "mfu": work * speed / peak})
        best = cfg.eval.keep == "best" and rated and progress.stale == 0
        if step == cfg.steps or progress.stopped or best or run.save_due(step):
            run.save(step, state, asdict(progress), metric=row.get("eval_loss"))
        if progress.stopped:
            run.event("early stop", f"no better evaluation loss in the last {progress.stale}", step=step)
            break

    # -- the result ----------------------------------------------------------------------------------------------------
    kept = int(state.step)
    if cfg.eval.keep == "best" and progress.best_step != kept:
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


def told(cfg: ExamplesConfig, train: Split, held: Split, rows: int) -> str:
    """The data in a line."""
    c, batch = train.counts, cfg.step.batch_size
    unused = f"{c.truncated} truncated, {c.dropped_long} too long and {c.dropped_empty} without a target left out"
    return (
        f"{c.examples:,} examples ({held.counts.examples:,} held out), {c.tokens:,} tokens, {c.trained_tokens:,} "
        f"trained; {rows:,} rows an epoch, {c.tokens / (rows * cfg.step.sequence_length):.0%} full; "
        f"{cfg.steps} steps of {batch} rows are {cfg.steps * batch / rows:.2f} epochs; {unused}"
    )


def export(directory: Path, learner: Learner, state: TrainState, tokenizer: Tokenizer) -> None:
    """The weights as a Hugging Face directory, low-rank additions merged in."""
    params = merge_lora(state.params, learner.cfg.lora_matrices)
    convert.save(directory, learner.cfg.model, params, tokenizer=tokenizer, overwrite=True)


def results_of(run: Run, step: int) -> dict[str, Any]:
    """The losses at the step that was exported."""
    row = next(row for row in run.rows() if row["step"] == step)
    return {"step": step, **{name: row[name] for name in ("loss", "eval_loss") if name in row}}
