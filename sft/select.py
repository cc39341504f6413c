"""Which checkpoint of a run to begin RL with (algorithms.md section 20).

RL needs a policy that still explores: the entropy of what it samples at temperature 1 should lie in a range, and of the
checkpoints there the one that solves most tasks in some of its tries is the best start. Entropy over training data is
lower than over samples and says nothing here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np

from cabochon import parallel
from cabochon.batch import best_fit, from_sequences
from cabochon.chat import as_turns
from cabochon.checkpoint import Checkpointer
from cabochon.config import StepConfig
from cabochon.errors import MachineError, UserError
from cabochon.files import write_whole
from cabochon.learner import Learner, cross_entropy
from cabochon.metrics import plain
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig
from cabochon.model.lora import merge_lora
from cabochon.ops import masked_mean
from cabochon.policy import learner_config, open_tokenizer
from cabochon.protocols import PolicyEngine, Weights
from cabochon.sft.config import DistillConfig, ExamplesConfig
from cabochon.sft.distill import shared_tokenizer
from cabochon.sft.train import export
from cabochon.tokenizer import Tokenizer
from cabochon.types import Completion, Request, Sampling, Task, Verdict

Engine = Callable[[ModelConfig, Tokenizer, Weights], PolicyEngine]
Judge = Callable[[Sequence[Task], Sequence[str]], Sequence[Verdict]]
ROWS = 8
"""of a batch that entropy is measured on, times the devices that split them"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What each checkpoint is asked, alike."""

    samples: int = 8
    """of each task"""
    max_tokens: int = 256
    low: float = 0.3
    high: float = 0.5
    """nats per token: the range entropy should lie in"""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint and what it sampled."""

    step: int
    entropy: float
    """nats per sampled token, of the whole distribution it was drawn from"""
    pass_1: float
    pass_n: float
    """share of tasks that one of the n samples solves"""
    truncated: float
    tokens: float
    """mean length of a sample"""
    unjudged: int
    """tasks of which some sample could not be judged: they are in neither pass rate"""


def choose(candidates: Sequence[Candidate], low: float, high: float) -> tuple[Candidate, bool]:
    """The best pass@n of those with an entropy in the range, pass@1 and then the earlier step breaking ties; where
    there is none, the nearest to the range, and False."""
    inside = [c for c in candidates if low <= c.entropy <= high]
    if inside:
        return max(inside, key=lambda c: (c.pass_n, c.pass_1, -c.step)), True
    return min(candidates, key=lambda c: (max(low - c.entropy, c.entropy - high), -c.pass_n, c.step)), False


def table(candidates: Sequence[Candidate], chosen: Candidate, asked: Asked) -> str:
    """A line per checkpoint, the chosen one marked."""
    lines = [f"   step  entropy  pass@1  pass@{asked.samples:<3} cut off  tokens"]
    for c in candidates:
        mark, place = "*" if c is chosen else " ", " "
        if not asked.low <= c.entropy <= asked.high:
            place = "<" if c.entropy < asked.low else ">"
        lines.append(f"{mark} {c.step:5}  {c.entropy:6.3f}{place}  {c.pass_1:6.1%}  {c.pass_n:7.1%}  {c.truncated:6.1%}"
                     f"  {c.tokens:6.1f}" + (f"  ({c.unjudged} tasks not judged)" if c.unjudged else ""))  # fmt: skip
    return "\n".join(lines)


def select(
    cfg: ExamplesConfig, tasks: Sequence[Task], engine: Engine, judge: Judge, asked: Asked,
    told: Callable[[str], None] = lambda line: None,
) -> tuple[list[Candidate], Candidate, bool]:  # fmt: skip
    """Measure every checkpoint of the run `cfg` is of; write `select.json`, and the chosen one as the Hugging Face
    directory `selected/`, into it.

    Returns the candidates, the chosen one, and whether its entropy is in the range. Raises UserError where there is no
    checkpoint, MachineError where no sample could be judged or the disk is full.
    """
    place = Path(cfg.run.dir)
    saver = Checkpointer(place / "checkpoints", keep_last=1)
    steps = sorted({entry.step for entry in saver.entries()})
    if not steps:
        raise UserError(f"{place}: there is no checkpoint to choose from; expected the directory of an SFT run")
    mesh = parallel.mesh_of(cfg.mesh)
    learner = Learner(learner_config(cfg), cross_entropy, mesh)
    model = learner.cfg.model
    tokenizer = shared_tokenizer(cfg, model) if isinstance(cfg, DistillConfig) else open_tokenizer(cfg.model)
    seeds = np.random.SeedSequence(asked.seed).generate_state(len(tasks), np.uint64)
    sampling = Sampling(max_tokens=asked.max_tokens, n=asked.samples)
    prompts = [as_turns(task.prompt, cfg.data.chat) for task in tasks]
    requests = [Request(prompt=p, sampling=sampling, seed=int(s)) for p, s in zip(prompts, seeds, strict=True)]
    sampler: PolicyEngine | None = None
    found = []
    for step in steps:
        state = saver.restore(learner.abstract_state(), step=step).state
        params = jax.tree.map(np.asarray, merge_lora(state.params, learner.cfg.lora_matrices))
        weights = Weights(version=step, params=params)
        if sampler is None:
            sampler = engine(model, tokenizer, weights)
        else:
            sampler.load(weights)
        completions = sampler.generate(requests)
        verdicts = judge([task for task in tasks for _ in range(asked.samples)], [c.text for c in completions])
        entropy = sampled_entropy(cfg, params, completions)
        found.append(rated(step, entropy, completions, verdicts, asked.samples))
        if found[-1].unjudged == len(tasks):
            why = next(verdict.detail for verdict in verdicts if verdict.score is None)
            raise MachineError(f"step {step}: none of {len(tasks)} tasks could be judged: {why}")
        told(f"step {step}: entropy {entropy:.3f}, pass@{asked.samples} {found[-1].pass_n:.1%}")
    chosen, inside = choose(found, asked.low, asked.high)
    state = saver.restore(learner.abstract_state(), step=chosen.step).state
    export(place / "selected", learner, state, tokenizer)
    said = {"asked": asdict(asked), "tasks": len(tasks), "chosen": chosen.step, "in_range": inside}
    record = plain({**said, "candidates": [asdict(c) for c in found]})
    write_whole(place / "select.json", json.dumps(record, indent=1) + "\n")
    return found, chosen, inside


def rated(
    step: int, entropy: float, completions: Sequence[Completion], verdicts: Sequence[Verdict], samples: int
) -> Candidate:
    """Pass rates over the tasks all of whose samples were judged; an answer is right where its score is 1."""
    scores = np.array([np.nan if v.score is None else v.score for v in verdicts]).reshape(-1, samples)
    judged = ~np.isnan(scores).any(-1)
    right = scores[judged] == 1
    nothing = not judged.any()
    return Candidate(
        step=step,
        entropy=entropy,
        pass_1=math.nan if nothing else float(right.mean()),
        pass_n=math.nan if nothing else float(right.any(-1).mean()),
        truncated=float(np.mean([c.finish == "length" for c in completions])),
        tokens=float(np.mean([c.mask.sum() for c in completions])),
        unjudged=int((~judged).sum()),
    )


def sampled_entropy(cfg: ExamplesConfig, params: tf.Params, completions: Sequence[Completion]) -> float:
    """Mean entropy, nats, of the distributions that the sampled tokens were drawn from, out of the full logits."""
    tokens, masks = [], []
    for c in completions:
        assert c.prompt_tokens is not None
        tokens.append(np.concatenate([c.prompt_tokens, c.tokens]).astype(np.int32))
        masks.append(np.concatenate([np.zeros(len(c.prompt_tokens), bool), c.mask]))
    length = -(-max(len(t) for t in tokens) // 64) * 64
    mesh = parallel.mesh_of(cfg.mesh)
    size = ROWS * (1 if mesh is None else parallel.row_shards(mesh))
    step = StepConfig(batch_size=size, sequence_length=length, logit_chunk=cfg.step.logit_chunk)
    shape = replace(learner_config(cfg, entropy=True), step=step, lora=None)
    learner = Learner(shape, cross_entropy, mesh)
    if mesh is not None:
        params = jax.device_put(params, learner.state_shardings().params)
    rows = best_fit([len(t) for t in tokens], length)
    rows += [[]] * (-len(rows) % size)
    total = count = 0.0
    for start in range(0, len(rows), size):
        batch = parallel.place(from_sequences(tokens, masks, length, rows=rows[start : start + size]), mesh)
        mean = masked_mean(learner.score(params, batch).tokens.entropy_BT, batch.mask_BT)
        total, count = total + float(mean.total), count + float(mean.count)
    return total / count
