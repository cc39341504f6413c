"""Training a scalar reward model, top to bottom: what `cabochon rm RECIPE` runs. The user's side is docs/reward.md."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cabochon import metrics, parallel
from cabochon.batch import Batch
from cabochon.learner import Learner, LearnerConfig, StepReport, check
from cabochon.model import transformer as tf
from cabochon.model.hf_export import refuse_unexportable
from cabochon.model.lora import merge_lora
from cabochon.policy import learner_config, open_policy
from cabochon.reward.calibration import PairReport, pair_report
from cabochon.reward.config import RewardModelConfig
from cabochon.reward.data import Feed, Pair, Position, Split, read_splits
from cabochon.reward.loss import bradley_terry
from cabochon.reward.scorer import REFERENCE, save_reward
from cabochon.run import open_run
from cabochon.tokenizer import Tokenizer

SHOWN = ("loss", "accuracy", "difference", "eval_accuracy", "grad_norm", "tokens_per_second")
"""what the console shows of a step"""

Scored = tuple[list[Pair], np.ndarray]
"""pairs, and [N, 2] the scores of chosen and rejected, 0 for one that is not there"""


def main(cfg: RewardModelConfig, *, resume_anyway: bool = False) -> Path:
    """Train, and return the directory with the result. The same call again goes on where it stopped.

    Raises UserError (recipe, data, directory), MachineError (disk), NonFiniteError (the loss or a gradient is not
    finite: the checkpoints hold what was before), KeyboardInterrupt after Ctrl-C saved a checkpoint.
    """
    files = [source.path for source in (*cfg.data.train, *cfg.data.eval)]
    with open_run(cfg, "rm", data=files, resume_anyway=resume_anyway, shown=SHOWN) as run:
        if run.finished:
            return run.final

        # -- the step, the model, the data -----------------------------------------------------------------------------
        mesh = parallel.mesh_of(cfg.mesh)
        loss = bradley_terry(centre=cfg.loss.centre, margin_scale=cfg.loss.margin_scale)
        learner = Learner(scored_model(cfg), loss, mesh)
        refuse_unexportable(learner.cfg.model, classifier=True)
        policy = open_policy(cfg.model, cfg.seed, mesh)
        tokenizer, params = policy.tokenizer, {k: v for k, v in policy.params.items() if k != "head"}
        train, held = read_splits(cfg.data, tokenizer, cfg.step.sequence_length, cfg.step.batch_size)
        feed, held_feed = (feed_of(cfg, split, tokenizer) for split in (train, held))
        values = jax.jit(lambda params, batch: learner.outputs(params, batch).tokens.value_BT)

        # -- a fresh state, or the one that was saved ------------------------------------------------------------------
        if saved := run.restore(learner.abstract_state()):
            state, done, position = saved.state, saved.step, Position(*saved.meta["position"])
        else:
            state, done, position = learner.init_state(params), 0, Position()
            run.event("data", told(train, held), data={"train": len(train.pairs), "eval": len(held.pairs)})
        del policy, params  # they are in the state, or were replaced by those saved

        # -- the loop --------------------------------------------------------------------------------------------------
        batch, rows, following = feed.take(position)
        alarmed = ""
        for step in run.steps(done, cfg.steps):
            start = time.perf_counter()
            state, report = learner.step(state, parallel.place(batch, mesh))
            row = batch_row(batch, rows) | {"epoch": position.epoch}
            position = following
            batch, rows, following = feed.take(following)  # while the device is busy
            check(report, step)
            report = jax.device_get(report)
            row |= report_row(report)
            speed = row["tokens"] / (time.perf_counter() - start)
            if (why := metrics.idle(row, step)) and why != alarmed:
                run.event("alarm", why, step=step)
            alarmed = why
            if held.groups and (step == cfg.steps or (cfg.eval.every and step % cfg.eval.every == 0)):
                row |= eval_row(report_of(score_pairs(values, state.params, held_feed, mesh)))
            run.log(step, row, clock={"tokens_per_second": speed}, experts=metrics.expert_row(report.router))
            if step == cfg.steps or run.save_due(step):
                run.save(step, state, {"position": list(position)})

        # -- the result, centred on a reference set --------------------------------------------------------------------
        reference = held_feed if held.groups else replace(feed, split=first_of(train, REFERENCE // 2))
        scored = score_pairs(values, state.params, reference, mesh)
        there = np.array([[len(p.chosen) > 0, len(p.rejected) > 0] for p in scored[0]])
        bias = float(state.params["value"]["b"])  # a Hugging Face classifier has none; the mean takes its place
        offset = float(scored[1][there].mean()) - bias
        save_reward(
            run.final,
            learner.cfg.model,
            merge_lora(state.params, learner.cfg.lora_matrices),
            tokenizer,
            offset=offset,
            chat=cfg.data.chat,
            length=cfg.step.sequence_length,
        )
        results = eval_row(report_of(scored)) if held.groups else {}
        told_results = {k: v for k, v in results.items() if isinstance(v, float | int)}
        run.finish(steps=cfg.steps, results={**told_results, "offset": offset})
        return run.final


def scored_model(cfg: RewardModelConfig) -> LearnerConfig:
    """The learner's config: a scalar head in the place of the language model's, which would be dead weight."""
    base = learner_config(cfg)
    return replace(base, value=True, model=base.model.model_copy(update={"tied_head": True}))


def feed_of(cfg: RewardModelConfig, split: Split, tokenizer: Tokenizer) -> Feed:
    """Batches of the recipe's shape."""
    return Feed(
        split=split,
        batch_size=cfg.step.batch_size,
        length=cfg.step.sequence_length,
        packing=cfg.data.packing,
        seed=cfg.seed,
        pad_id=tokenizer.pad_id or 0,
    )


def first_of(split: Split, pairs: int) -> Split:
    """About the first so many pairs of a split."""
    groups: list[list[Pair]] = []
    for group in split.groups:
        if sum(map(len, groups)) >= pairs:
            break
        groups.append(group)
    return replace(split, groups=groups)


def score_pairs(values: Any, params: tf.Params, feed: Feed, mesh: Mesh | None) -> Scored:
    """Every pair of the feed once. `values(params, batch)` is [B, T]."""
    pairs: list[Pair] = []
    scores: list[list[float]] = []
    for batch, rows in feed.all_once():
        value_BT = np.asarray(values(params, parallel.place(batch, mesh)))
        for r, row in enumerate(rows):
            ends = np.flatnonzero(np.asarray(batch.mask_BT)[r])
            found = iter(value_BT[r, ends].tolist())
            for pair in row:
                pairs.append(pair)
                scores.append([next(found) if len(ids) else 0.0 for ids in (pair.chosen, pair.rejected)])
    return pairs, np.array(scores, np.float64).reshape(-1, 2)


def report_of(scored: Scored) -> PairReport:
    pairs, scores = scored
    return pair_report(scores[:, 0], scores[:, 1], np.array([[len(p.chosen), len(p.rejected)] for p in pairs]))


def eval_row(report: PairReport) -> dict[str, Any]:
    return {f"eval_{name}": value for name, value in report._asdict().items()}


def batch_row(batch: Batch, rows: Sequence[Sequence[Pair]]) -> dict[str, Any]:
    """What is known of a step before it runs. `fill`: the share of the batch that is not padding."""
    tokens = int((np.asarray(batch.segment_BT) != 0).sum())
    return {"tokens": tokens, "pairs": sum(map(len, rows)), "fill": tokens / batch.tokens_BT.size}


def report_row(report: StepReport) -> dict[str, Any]:
    """What the step measured (on the host)."""
    means: Mapping[str, Any] = {**report.loss, **report.metrics}
    row: dict[str, Any] = {name: float(mean.total) / max(float(mean.count), 1.0) for name, mean in means.items()}
    row["loss"] = row["ranking"] + row.get("centring", 0.0)
    row |= {"grad_norm": float(report.grad_norm), "learning_rate": float(report.learning_rate)}
    if report.router is not None:
        row["moe"] = metrics.router_row(report.router)
    return row


def told(train: Split, held: Split) -> str:
    """The data in a line."""
    dropped = train.dropped + held.dropped
    return (
        f"{len(train.pairs):,} pairs of {len(train.groups):,} prompts, {len(held.pairs):,} pairs held out, "
        f"{dropped:,} left out (too long, or more of one prompt than asked for)"
    )
