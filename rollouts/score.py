"""Log-probs of a text that is given, and the likeliest tokens in each place of it, on the weights an engine serves.

Legend: T tokens, D model, V vocab, N likeliest tokens kept. Index t always means the token at position t, given those
before it. The text is read as a prompt is, by chunks, through the sampler's own forward pass; no slot is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from cabochon.model import native
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig
from cabochon.rollouts.engine_params import EngineParams
from cabochon.rollouts.programs import bound, read_chunk
from cabochon.rollouts.prompts import pieces
from cabochon.rollouts.sampler import Sampler
from cabochon.rollouts.slots import Prefix, SlotConfig, empty_prefix

TOP = 20
"""N, as many as OpenAI's API reports"""
ROWS = 64
"""tokens whose logits exist at one time"""


class Scores(NamedTuple):
    """What a policy thinks of a text, at temperature 1 without filters. The first token has none: NaN, -1."""

    logprobs: np.ndarray
    """[T] f32, nats"""
    top_ids: np.ndarray
    """[T, N] int32, the likeliest first"""
    top_logprobs: np.ndarray
    """[T, N] f32"""


class Scorer:
    """Scores texts on a sampler's weights, with a buffer of one sequence of its own. Not thread-safe."""

    def __init__(self, sampler: Sampler):
        self._sampler = sampler
        self._program = _program(sampler.model, sampler.cfg)
        self._prefix = empty_prefix(sampler.model, sampler.cfg)

    def by_chunks(self, tokens: np.ndarray) -> Iterator[Scores | None]:
        """None after each chunk but the last, then the scores, so that others can work in between. One text at a time:
        an iterator that was begun must be used up or dropped before the next one begins.

        `tokens`: [T] int32, at most as many as a sequence of the engine may have.
        """
        T, N, at = len(tokens), min(TOP, self._sampler.model.vocab_size), 0
        following = np.append(tokens[1:], 0)
        out = Scores(
            np.full(T, np.nan, np.float32), np.full((T, N), -1, np.int32), np.full((T, N), np.nan, np.float32)
        )
        for real, chunk in pieces(T - 1, self._sampler.cfg.chunks):
            padded = np.zeros((2, chunk), np.int32)
            padded[:, :real] = tokens[at : at + real], following[at : at + real]
            self._prefix, *found = self._program(
                self._sampler.params, self._prefix, padded[0], padded[1], np.int32(at), np.int32(real)
            )
            for kept, new in zip(out, found, strict=True):
                kept[at + 1 : at + 1 + real] = np.asarray(new)[:real]
            at += real
            if at < T - 1:
                yield None
        yield out

    def score(self, tokens: np.ndarray) -> Scores:
        """All of it at once."""
        return next(scores for scores in self.by_chunks(tokens) if scores is not None)


@lru_cache(maxsize=16)
def _program(model: ModelConfig, cfg: SlotConfig) -> Callable[..., tuple[Prefix, Array, Array, Array]]:
    return jax.jit(partial(_score, model, cfg), donate_argnums=1)


def _score(
    model: ModelConfig,
    cfg: SlotConfig,
    params: EngineParams,
    prefix: Prefix,
    token_T: Array,
    next_T: Array,
    start: Array,
    real: Array,
) -> tuple[Prefix, Array, Array, Array]:
    """Read a piece of a text; of each token that follows its log-prob [T], and the likeliest ids and theirs [T, N]."""
    live_T = jnp.arange(token_T.shape[0], dtype=jnp.int32) < real
    x_1TD, prefix, _ = read_chunk(model, cfg, params, prefix, token_T, start, real)
    x_TD = bound(model, None, params["final_norm"])(x_1TD)[0]

    def rows(some: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x_RD, next_R, live_R = some
        if cfg.native:
            logits_RV = native.multiply(x_RD, live_R, params["head"]["w"], model.vocab_size)
        else:
            logits_RV = tf.logits(model, params, x_RD)
        total_R1 = jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
        chosen_R = jnp.take_along_axis(logits_RV, next_R[:, None], 1) - total_R1
        most_RN, ids_RN = jax.lax.top_k(logits_RV, min(TOP, model.vocab_size))
        return chosen_R[:, 0], ids_RN, most_RN - total_R1

    R = math.gcd(token_T.shape[0], ROWS)
    by_rows = [x.reshape(-1, R, *x.shape[1:]) for x in (x_TD, next_T, live_T)]
    found = jax.lax.map(rows, tuple(by_rows))
    chosen_T, ids_TN, most_TN = (x.reshape(-1, *x.shape[2:]) for x in found)
    return prefix, chosen_T, ids_TN, most_TN
