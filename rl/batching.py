"""Rollouts become batches of a fixed shape: packed rows of prompt and completion, weights, advantages, log-probs.

Legend: B rows, T tokens of a row, N completions, t tokens of one. The shape is the learner's whatever the lengths, so
nothing is compiled twice; rows fill one micro-batch after the other, and the learner skips those left empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cabochon.batch import Batch, best_fit, from_rows, from_sequences, to_rows
from cabochon.config import StepConfig
from cabochon.errors import UserError
from cabochon.rl.advantages import Advantages, Samples
from cabochon.rl.aggregation import shuffled_groups, token_weights, within_budget
from cabochon.rl.update import Update
from cabochon.types import Rollout


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Where completions lie in a batch: those of one prompt share it, so that it is read once.

    A row is made of segments. One holds a prompt without its last token; each completion after it is a segment that
    continues it: the prompt's last token, whose state the completion's first token is drawn from, and the completion.
    Arrays per completion are in the order of the rollouts the layout was made of.
    """

    rows: list[list[int]]
    """segments of each row, a prompt before its completions; most often some rows are empty"""
    lengths: list[int]
    """tokens of each completion that are in the batch: it may be cut behind its last trained token"""
    prompts: list[tuple[int, int]]
    """(a completion, tokens) of each shared prompt: their segments are numbered after those of the completions"""
    continues: list[int | None]
    """per segment the one it continues: None for a prompt, and after a prompt of one token"""
    length: int

    @property
    def completions(self) -> list[list[int]]:
        """Those of each row."""
        return [[i for i in row if i < len(self.lengths)] for row in self.rows]

    def to_rows(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """[B, T] f32 from one value per completion token; prompts and padding get 0."""
        parts = [np.concatenate([np.zeros(1), v[:n]]) for n, v in zip(self.lengths, values, strict=True)]
        return to_rows([*parts, *(np.zeros(n) for _, n in self.prompts)], self.rows, self.length)

    def from_rows(self, x_BT: np.ndarray) -> list[np.ndarray]:
        """Per completion [t]: what stands at its tokens, such as their log-probs."""
        return [x[1:] for x in self.states(x_BT)]

    def states(self, x_BT: np.ndarray) -> list[np.ndarray]:
        """Per completion [t + 1]: what a head said of the state before each token, and after the last."""
        counts = [1 + n for n in self.lengths] + [n for _, n in self.prompts]
        return from_rows(x_BT, self.rows, counts)[: len(self.lengths)]


def prompt_tokens(rollout: Rollout) -> np.ndarray:
    """[P] ids that the sampler read. Raises UserError where the engine did not say."""
    tokens = rollout.completion.prompt_tokens
    if tokens is None or not len(tokens):
        raise UserError(f"task {rollout.task.id}: the completion came without its prompt's tokens")
    return tokens


def layout(rollouts: Sequence[Rollout], step: StepConfig, lengths: Sequence[int] | None = None) -> Layout:
    """Best fit of the rollouts, cut to `lengths` completion tokens each. Raises UserError where they do not fit."""
    lengths = [len(r.completion.tokens) for r in rollouts] if lengths is None else list(lengths)
    chunks = _sharing(rollouts, lengths, step.sequence_length)
    prompts: list[tuple[int, int]] = []
    continues: list[int | None] = [None] * len(rollouts)
    segments: list[list[int]] = []
    for members in chunks:
        shared = len(prompt_tokens(rollouts[members[0]])) - 1
        first = [len(rollouts) + len(prompts)] if shared else []
        if shared:
            prompts.append((members[0], shared))
            for i in members:
                continues[i] = first[0]
        segments.append(first + members)
    counts = [1 + n for n in lengths] + [n for _, n in prompts]
    packed = best_fit([sum(counts[i] for i in part) for part in segments], step.sequence_length)
    if len(packed) > step.batch_size:
        raise UserError(
            f"{len(rollouts)} completions need {len(packed)} rows of {step.sequence_length} tokens; expected at most "
            f"step.batch_size={step.batch_size}: raise it, or update.minibatches"
        )
    rows: list[list[int]] = [[] for _ in range(step.batch_size)]
    micro = step.micro_batches
    places = [row for part in range(micro) for row in range(part, step.batch_size, micro)]  # learner: row % micro
    for place, parts in zip(places, packed, strict=False):
        rows[place] = [i for part in parts for i in segments[part]]
    continues += [None] * len(prompts)
    return Layout(rows=rows, lengths=lengths, prompts=prompts, continues=continues, length=step.sequence_length)


def _sharing(rollouts: Sequence[Rollout], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Completions of the same prompt, as many together as fit into a row with it.

    Prompts that were read through other experts are other prompts: their routes are replayed.
    """
    same: dict[tuple[bytes, bytes], list[list[int]]] = {}
    room: dict[tuple[bytes, bytes], int] = {}
    for i, (r, n) in enumerate(zip(rollouts, lengths, strict=True)):
        prompt, routes = prompt_tokens(r), r.completion.prompt_routes
        key = (prompt.tobytes(), b"" if routes is None else routes.tobytes())
        if room.get(key, 0) < 1 + n:
            same.setdefault(key, []).append([])
            room[key] = capacity - len(prompt) + 1
        same[key][-1].append(i)
        room[key] -= 1 + n
    return [members for chunks in same.values() for members in chunks]


def to_batch(
    rollouts: Sequence[Rollout], at: Layout, weights: Sequence[np.ndarray] | None = None, *, routes: bool = False
) -> Batch:
    """Tokens, segments, behaviour log-probs and, where asked for, the sampler's routes.

    `weights`: per completion [t], of each token in the loss; None: 1 where the policy sampled it, which is what scoring
    wants. Prompts have weight 0.
    """
    weights = [r.completion.mask.astype(np.float32) for r in rollouts] if weights is None else weights
    tokens, masks, used = [], [], []
    for r, weight, n in zip(rollouts, weights, at.lengths, strict=True):
        tokens.append(np.concatenate([prompt_tokens(r)[-1:], r.completion.tokens[:n]]).astype(np.int32))
        masks.append(np.concatenate([np.zeros(1, np.float32), weight[:n]]))
        if routes:
            read, drawn = _routes(r)
            used.append(np.concatenate([read[-1:], drawn[:n]]).astype(np.int32))
    for member, n in at.prompts:
        tokens.append(prompt_tokens(rollouts[member])[:n])
        masks.append(np.zeros(n, np.float32))
        if routes:
            used.append(_routes(rollouts[member])[0][:n].astype(np.int32))
    batch = from_sequences(tokens, masks, at.length, rows=at.rows, routes=used or None, prefixes=at.continues)
    return replace(batch, logp_behaviour_BT=at.to_rows([r.completion.logprobs for r in rollouts]))


def _routes(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """[P, L, C] of the prompt and [t, L, C] of the completion."""
    c = rollout.completion
    if c.prompt_routes is None or c.routes is None:
        raise UserError(
            f"task {rollout.task.id}: no routes were recorded; router.replay=r3 needs them: sample with routes=true, "
            "or set router.replay to r2 or none"
        )
    return c.prompt_routes, c.routes


def samples(
    rollouts: Sequence[Rollout],
    reward_N: np.ndarray,
    *,
    penalties: Sequence[np.ndarray] | None = None,
    values: Sequence[np.ndarray] | None = None,
) -> Samples:
    """What an advantage estimator sees of rollouts and their rewards (NaN: none)."""
    return Samples(
        reward_N=np.asarray(reward_N, np.float64),
        group_N=np.array([r.group for r in rollouts]),
        domains=[r.task.domain for r in rollouts],
        masks=[r.completion.mask.astype(bool) for r in rollouts],
        penalties=penalties,
        values=values,
        truncated_N=np.array([r.completion.finish == "length" for r in rollouts]),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Minibatch:
    """One update's batch and what went into it."""

    batch: Batch
    at: Layout
    members: list[int]
    """indices into the rollouts"""
    trained_tokens: int
    fill: float
    """trained tokens there were to choose from / the budget; 1 without one. Below 0.9 the budget is too large"""


def minibatches(
    rollouts: Sequence[Rollout],
    advantages: Advantages,
    update: Update,
    step: StepConfig,
    count: int,
    rng: np.random.Generator,
    *,
    reference: Sequence[np.ndarray] | None = None,
    values: Sequence[np.ndarray] | None = None,
) -> list[Minibatch]:
    """Up to `count` batches of whole groups in random order, of the completions that are kept; fewer where there are
    fewer groups, none where nothing is left to train on.

    `reference`: per completion [t] log-probs; `values`: per completion [t + 1], needed where there is a critic.
    """
    group_N = np.array([r.group for r in rollouts])
    kept = np.flatnonzero(advantages.keep_N)
    order = kept[shuffled_groups(group_N[kept], rng)] if len(kept) else kept
    groups = list(dict.fromkeys(group_N[order].tolist()))  # in their random order
    parts = np.array_split(np.array(groups), count) if groups else []
    made = []
    for part in parts:
        members = [int(i) for i in order if group_N[i] in part]
        if members:
            made.append(_minibatch(rollouts, members, advantages, update, step, reference, values))
    return [m for m in made if m.trained_tokens]


def _minibatch(
    rollouts: Sequence[Rollout],
    members: list[int],
    advantages: Advantages,
    update: Update,
    step: StepConfig,
    reference: Sequence[np.ndarray] | None,
    values: Sequence[np.ndarray] | None,
) -> Minibatch:
    masks = {i: rollouts[i].completion.mask.astype(bool) for i in members}
    count_N = np.array([masks[i].sum() for i in members])
    available = int(count_N.sum())
    if update.budget is not None:
        count_N = within_budget(count_N, update.budget)
    members, count_N = [i for i, n in zip(members, count_N, strict=True) if n], count_N[count_N > 0]
    group_N = np.array([rollouts[i].group for i in members])
    weight_N, share_N = token_weights(update.aggregation, count_N, group_N, update.constant)
    weights = [w * (masks[i] & (masks[i].cumsum() <= n)) for i, n, w in zip(members, count_N, weight_N, strict=True)]
    chosen = [rollouts[i] for i in members]
    at = layout(chosen, step, [int(np.flatnonzero(w)[-1]) + 1 for w in weights])
    batch = to_batch(chosen, at, weights, routes=update.replays_sampler)
    batch = replace(
        batch,
        advantage_BT=at.to_rows([advantages.tokens[i] for i in members]),
        divisor_B=np.array([sum(share_N[i] for i in row) for row in at.completions], np.float32),
        logp_reference_BT=None if reference is None else at.to_rows([reference[i] for i in members]),
    )
    if advantages.returns is not None and values is not None:
        batch = replace(
            batch,
            return_BT=at.to_rows([advantages.returns[i] for i in members]),
            value_BT=at.to_rows([values[i][:-1] for i in members]),
        )
    fill = 1.0 if update.budget is None else available / update.budget
    return Minibatch(batch=batch, at=at, members=members, trained_tokens=int(count_N.sum()), fill=fill)
