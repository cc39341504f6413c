"""Supervised fine-tuning, top to bottom. `cabochon sft RECIPE` runs `main`; docs/sft.md is the user's side."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
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
from cabochon.policy import learner_config, open_policy
from cabochon.run import Run, open_run
from cabochon.sft.config import SftConfig
from cabochon.sft.data import Encoded, Feed, Position, Split, read_splits
from cabochon.tokenizer import Tokenizer

SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu")
"""what the console shows of a step"""
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


def main(cfg: SftConfig, *, resume_anyway: bool = False) -> Path:
    """Train, and return the directory with the result. The same call again goes on where it stopped.

    Raises UserError (recipe, data, directory), MachineError (disk), NonFiniteError (the loss or a gradient is not
    finite: the checkpoints hold what was before), KeyboardInterrupt after Ctrl-C saved a checkpoint.
    """
    files = [source.path for source in (*cfg.data.train, *cfg.data.eval)]
    keep_best = int(cfg.eval.keep == "best")
    with open_run(
        cfg, "sft", data=files, resume_anyway=resume_anyway, shown=SHOWN, keep_best=keep_best, best="min"
    ) as run:
        if run.finished:
            return run.final

        # -- the step, the model, the data -----------------------------------------------------------------------------
        mesh = parallel.mesh_of(cfg.mesh)
        learner = Learner(learner_config(cfg), cross_entropy, mesh)
        refuse_unexportable(learner.cfg.model)
        policy = open_policy(cfg.model, cfg.seed, mesh)
        tokenizer = policy.tokenizer
        train, held = read_splits(cfg.data, tokenizer, cfg.step.sequence_length)
        feed, eval_feed = (feed_of(cfg, split, tokenizer) for split in (train, held))
        eval_batches = eval_feed.all_once() if cfg.eval.every else []
        work = metrics.flops_per_token(learner.cfg.model, cfg.step.sequence_length)
        peak = jax.device_count() * (cfg.run.peak_tflops * 1e12 or metrics.measured_peak(cfg.precision.compute))

        # -- a fresh state, or the one that was saved ------------------------------------------------------------------
        if saved := run.restore(learner.abstract_state()):
            state, done, progress = saved.state, saved.step, Progress.of(saved.meta)
        else:
            state, done, progress = learner.init_state(policy.params), 0, Progress()
            counts = {"train": asdict(train.counts), "eval": asdict(held.counts)}
            run.event("data", told(cfg, train, held, len(feed.rows(0))), data=counts)
            if eval_batches:
                before = evaluate(learner, state.params, eval_batches)
                run.event("evaluation", f"loss before training {before:.4f}", step=0, data={"eval_loss": before})
        del policy  # its weights are in the state, or were replaced by those saved

        # -- the loop --------------------------------------------------------------------------------------------------
        batch, examples, following = feed.take(progress.position)
        for step in run.steps(done, done if progress.stopped else cfg.steps):
            start = time.perf_counter()
            state, report = learner.step(state, parallel.place(batch, mesh))
            row = batch_row(batch, examples) | {"epoch": progress.position.epoch}
            progress = replace(progress, position=following)
            batch, examples, following = feed.take(following)  # while the device is busy
            check(report, step)
            report = jax.device_get(report)
            row |= report_row(report)
            speed = row["tokens"] / (time.perf_counter() - start)
            if row["grad_norm"] == 0:
                run.event("alarm", "every gradient is zero: nothing is learnt", step=step)
            rated = bool(eval_batches) and (step % cfg.eval.every == 0 or step == cfg.steps)
            if rated:
                row["eval_loss"] = evaluate(learner, state.params, eval_batches)
                progress = progress.rated(step, row["eval_loss"])
            progress = replace(progress, stopped=rated and 0 < cfg.eval.patience <= progress.stale)
            clock = {"tokens_per_second": speed, "mfu": work * speed / peak}
            run.log(step, row, clock=clock, experts=metrics.expert_row(report.router))
            best = keep_best and rated and progress.stale == 0
            if step == cfg.steps or progress.stopped or best or run.save_due(step):
                run.save(step, state, asdict(progress), metric=row.get("eval_loss"))
            if progress.stopped:
                run.event("early stop", f"no better evaluation loss in the last {progress.stale}", step=step)
                break

        # -- the result ------------------------------------------------------------------------------------------------
        kept = int(state.step)
        if keep_best and progress.best_step != kept:
            state = run.checkpoints.restore(learner.abstract_state(), step=progress.best_step).state
        export(run.final, learner, state, tokenizer)
        run.finish(steps=kept, results=results_of(run, int(state.step)))
        return run.final


def feed_of(cfg: SftConfig, split: Split, tokenizer: Tokenizer) -> Feed:
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
    loss = {name: float(term.total) / max(float(term.count), 1.0) for name, term in report.loss.items()}
    row: dict[str, Any] = {
        "loss": loss.pop("nll"),
        "grad_norm": float(report.grad_norm),
        "learning_rate": float(report.learning_rate),
    }
    if report.router is not None:
        row["moe"] = {**loss, **metrics.router_row(report.router)}
    return row


def told(cfg: SftConfig, train: Split, held: Split, rows: int) -> str:
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
