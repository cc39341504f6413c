"""Distillation, top to bottom. `cabochon distill RECIPE` runs `main`; docs/sft.md is the user's side.

The loop is that of fine-tuning. What differs is the step: the batch also carries the teacher's likeliest tokens for
each place, out of the cache or asked then and there, or it is what the student itself wrote after the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cabochon import parallel
from cabochon.batch import Batch, best_fit, from_sequences
from cabochon.config import PolicyConfig
from cabochon.errors import UserError
from cabochon.learner import Learner, TrainState
from cabochon.model.address import resolve
from cabochon.model.config import ModelConfig
from cabochon.model.lora import merge_lora
from cabochon.policy import learner_config, open_policy, open_tokenizer
from cabochon.protocols import PolicyEngine, Weights
from cabochon.run import Run
from cabochon.sft.config import DistillConfig
from cabochon.sft.data import Encoded, Split, read_splits
from cabochon.sft.divergence import distillation
from cabochon.sft.teacher import Cache, Score, Top, cache_key, scorer
from cabochon.sft.train import Job, OpenExam, batch_row, feed_of, fit, open_exam, open_stage
from cabochon.tokenizer import Tokenizer
from cabochon.types import Request, Sampling

OpenEngine = Callable[[ModelConfig, Tokenizer, Weights, int, int], PolicyEngine]
"""(model, tokenizer, weights, slots, length in tokens) -> an engine; whoever starts the stage brings one"""
DRAW = 3
"""which of the run's random streams decides between data and samples"""


def main(cfg: DistillConfig, *, engine: OpenEngine, exam: OpenExam | None = None, resume_anyway: bool = False) -> Path:
    """Distil, and return the directory with the student. The same call again goes on where it stopped.

    `exam` is for recipes with `eval.sampled`. Raises what `sft.train.main` raises; UserError as well where the
    tokenizers differ.
    """
    teacher = resolve(cfg.teacher.address).path
    with open_stage(cfg, "distill", models=[str(teacher)], resume_anyway=resume_anyway) as run:
        if run.finished:
            return run.final
        mesh = parallel.mesh_of(cfg.mesh)
        learner, on_samples = learners_of(cfg)
        tokenizer = shared_tokenizer(cfg, learner.cfg.model)
        train, held = read_splits(cfg.data, tokenizer, cfg.step.sequence_length)
        identity = run.inputs["data"][-1]["sha256"]
        ask = Asked(cfg=cfg, vocab=min(tokenizer.vocab_size, learner.cfg.model.vocab_size))
        tell = _from_cache(cfg, run, train, tokenizer, identity, ask) if cfg.teacher.cache else ask.live
        writer = Writer.of(cfg, train, learner.cfg.model, tokenizer, engine) if cfg.on_policy.fraction else None

        def update(step: int, state: TrainState, batch: Batch, examples: Sequence[Encoded]) -> Any:
            if writer is not None and writer.turn(step):
                batch = writer.write(step, state, examples)
                row = batch_row(batch, []) | {"on_policy": True, "sequences": writer.count}
                top, chosen = ask.live(batch, []), on_samples
            else:
                row = batch_row(batch, examples) | ({"on_policy": False} if writer is not None else {})
                top, chosen = tell(batch, examples), learner
            batch = replace(batch, candidates_BTK=top.ids, teacher_BTK=top.logp)
            return *chosen.step(state, parallel.place(batch, mesh)), row

        with open_exam(cfg, exam, learner.cfg.model, tokenizer) as opened:
            job = Job(learner=learner, tokenizer=tokenizer, train=train, held=held, update=update,
                      parents=(cfg.teacher.address,), exam=opened)  # fmt: skip
            return fit(cfg, run, job)


def learners_of(cfg: DistillConfig) -> tuple[Learner, Learner]:
    """Of batches of data, and of the student's samples, whose tokens are no labels. They share their state."""
    shape, mesh = learner_config(cfg), parallel.mesh_of(cfg.mesh)
    loss = distillation(cfg.divergence)
    return Learner(shape, loss, mesh), Learner(shape, distillation(cfg.divergence, labels=0.0), mesh)


def shared_tokenizer(cfg: DistillConfig, student: ModelConfig) -> Tokenizer:
    """The one both use; a student from scratch takes its teacher's. Raises UserError naming the first difference."""
    address = cfg.teacher.address
    theirs = open_tokenizer(PolicyConfig(address=address))
    if cfg.model.scratch is not None:
        if student.vocab_size < theirs.vocab_size:
            raise UserError(f"model.scratch.vocab_size={student.vocab_size}: the teacher's tokenizer needs "
                            f"{theirs.vocab_size} or more")  # fmt: skip
        return theirs
    ours = open_tokenizer(cfg.model)
    if (difference := ours.first_difference(theirs)) is not None:
        i, here, there = difference
        raise UserError(f"teacher.address={address}: its tokenizer is not the student's: token {i} is {there!r} there, "
                        f"{here!r} in {ours.source}; distillation needs one vocabulary")  # fmt: skip
    return ours


# ------------------------------------------------------------------------------------------------------------- teacher


@dataclass(kw_only=True, eq=False)
class Asked:
    """The teacher in memory, opened when it is first needed."""

    cfg: DistillConfig
    vocab: int
    score: Score | None = None

    def open(self) -> Score:
        if self.score is None:
            cfg, mesh = self.cfg, parallel.mesh_of(self.cfg.mesh)
            policy = open_policy(PolicyConfig(address=cfg.teacher.address), mesh=mesh)
            self.score = scorer(policy.config, policy.params, cfg.teacher, cfg.precision, vocab=self.vocab,
                                chunk=cfg.step.logit_chunk, mesh=mesh)  # fmt: skip
        return self.score

    def live(self, batch: Batch, examples: Sequence[Encoded]) -> Top:
        """[B, T, K], computed now."""
        return self.open()(parallel.place(batch, parallel.mesh_of(self.cfg.mesh)))


def _from_cache(
    cfg: DistillConfig, run: Run, train: Split, tokenizer: Tokenizer, identity: str, ask: Asked
) -> Callable[[Batch, Sequence[Encoded]], Top]:
    """[B, T, K] out of the cache, which is made first."""
    assert cfg.teacher.cache is not None
    key = cache_key(identity, cfg.teacher, cfg.precision, train.examples)
    place = Path(cfg.teacher.cache) / key[:16]

    def once() -> Score:
        mesh, score = parallel.mesh_of(cfg.mesh), ask.open()
        return lambda batch: score(parallel.place(batch, mesh))

    cache, size, made = Cache.build(place, train.examples, cfg.teacher, feed_of(cfg, train, tokenizer), once,
                                    told=lambda line: run.event("teacher", line))  # fmt: skip
    if not cfg.on_policy.fraction:
        ask.score = None  # its weights are not needed any more
    told = (
        f"{place}: {size.bytes:,} bytes, {size.bytes / size.tokens:.1f} a trained token, "
        f"{size.entries / size.tokens:.1f} tokens kept for each; {made} of {len(cache.shards)} shards made now"
    )
    run.event("teacher", told, data={"bytes": size.bytes, "tokens": size.tokens, "entries": size.entries})

    def read(batch: Batch, examples: Sequence[Encoded]) -> Top:
        found, trained = cache.read(examples), batch.mask_BT > 0
        shape = (*trained.shape, cfg.teacher.top_k)
        out = Top(np.full(shape, -1, np.int32), np.zeros(shape, np.float32))
        out.ids[trained], out.logp[trained] = found
        return out

    return read


# -------------------------------------------------------------------------------------------------- the student writes


@dataclass(kw_only=True, eq=False)
class Writer:
    """Batches of what the student writes after the prompts of the data."""

    cfg: DistillConfig
    model: ModelConfig
    tokenizer: Tokenizer
    open_engine: OpenEngine
    longest: int
    """tokens of a prompt and its sample"""
    count: int
    """samples in a batch: as many as surely fit"""
    engine: PolicyEngine | None = None

    @classmethod
    def of(
        cls, cfg: DistillConfig, train: Split, model: ModelConfig, tokenizer: Tokenizer, open_engine: OpenEngine
    ) -> Writer:
        """Raises UserError where a prompt and its sample do not fit into a row."""
        prompt = max(train.examples, key=lambda e: len(prompt_of(e)))
        longest, length = len(prompt_of(prompt)) + cfg.on_policy.max_tokens, cfg.step.sequence_length
        if longest > length:
            raise UserError(
                f"{prompt.where}: {len(prompt_of(prompt))} prompt tokens and on_policy.max_tokens="
                f"{cfg.on_policy.max_tokens} do not fit step.sequence_length={length}; lower the one or raise the other"
            )
        # best fit opens a row only where no other has room for the longest
        count = cfg.step.batch_size * (length // longest)
        return cls(cfg=cfg, model=model, tokenizer=tokenizer, open_engine=open_engine, longest=longest, count=count)

    def turn(self, step: int) -> bool:
        """Is this step one of the student's? A function of the seed and the step alone."""
        return bool(np.random.default_rng([self.cfg.seed, DRAW, step]).random() < self.cfg.on_policy.fraction)

    def write(self, step: int, state: TrainState, examples: Sequence[Encoded]) -> Batch:
        """Samples of the student as it is now, one for each of the first prompts of the batch, from the first again
        where there are fewer."""
        cfg, lora = self.cfg, learner_config(self.cfg).lora_matrices
        # copied: the next update takes the state's arrays over
        params = jax.tree.map(np.array, merge_lora(state.params, lora))
        weights = Weights(version=step, params=params)
        if self.engine is None:
            self.engine = self.open_engine(self.model, self.tokenizer, weights, cfg.on_policy.slots, self.longest)
        else:
            self.engine.load(weights)
        sampling = Sampling(max_tokens=cfg.on_policy.max_tokens, temperature=cfg.on_policy.temperature)
        seeds = np.random.SeedSequence([cfg.seed, DRAW, step]).generate_state(self.count, np.uint64)
        prompts = [prompt_of(examples[i % len(examples)]) for i in range(self.count)]
        found = self.engine.generate(
            [Request(prompt=p, sampling=sampling, seed=int(s)) for p, s in zip(prompts, seeds, strict=True)]
        )
        tokens = [np.concatenate([p, c.tokens]).astype(np.int32) for p, c in zip(prompts, found, strict=True)]
        masks = [np.concatenate([np.zeros(len(p), bool), c.mask]) for p, c in zip(prompts, found, strict=True)]
        rows = best_fit([len(t) for t in tokens], cfg.step.sequence_length)
        rows += [[]] * (cfg.step.batch_size - len(rows))
        return from_sequences(tokens, masks, cfg.step.sequence_length, rows=rows, pad_id=self.tokenizer.pad_id or 0)


def prompt_of(example: Encoded) -> np.ndarray:
    """[p] int32: what stands before the first trained token."""
    return example.ids[: int(example.mask.argmax())]
