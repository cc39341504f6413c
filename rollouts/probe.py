"""The log-prob probe: does an engine compute with published weights what the learner computes?

Checksums say that the bytes arrived; the probe says that they became the right function, through the very programs that
serve. The continuation of each row is one token forced by a bias, which the raw log-probs do not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cabochon.errors import MachineError
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig
from cabochon.ops import token_outputs
from cabochon.protocols import WeightProbe, Weights
from cabochon.rollouts.sampler import Sampler, SamplerError
from cabochon.rollouts.weights import WeightsError
from cabochon.types import Request, Sampling

ROWS, PROMPT, FORCED = 4, 12, 4
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
"""by the engine's type, in nats at log-prob 0 and twice that at -10, since logits are rounded in proportion. For three
quarters of the log-probs: where two experts all but tie, the engine may take the other one, and that token and those
after it differ by more"""


def with_probe(model: ModelConfig, weights: Weights) -> Weights:
    """The same with a probe, by the learner's forward pass. Raises MachineError where its log-probs are not finite."""
    draw = np.random.default_rng(0).integers(0, model.vocab_size, (ROWS, PROMPT + 1), dtype=np.int32)
    tokens = np.concatenate([draw, np.repeat(draw[:, -1:], FORCED - 1, 1)], 1)
    logprobs = np.asarray(_logprobs(model, dict(weights.params), tokens))[:, PROMPT:]
    if not np.isfinite(logprobs).all():
        raise MachineError(
            f"weights of version {weights.version}: the learner's own log-probs are not finite, so no engine can serve "
            "them; go back to a checkpoint"
        )
    return replace(weights, probe=WeightProbe(tokens=tokens, prompt=PROMPT, logprobs=logprobs))


@partial(jax.jit, static_argnums=0)
def _logprobs(model: ModelConfig, params: Mapping[str, Any], tokens_BT: Any) -> jax.Array:
    out = tf.forward(model, params, tokens_BT)
    return token_outputs(
        out.hidden_BTD, jnp.asarray(tokens_BT), jnp.ones(tokens_BT.shape, jnp.int32),
        lambda h: tf.logits(model, params, h),
    ).logp_BT  # fmt: skip


def check_probe(sampler: Sampler, probe: WeightProbe) -> None:
    """Run it on an idle sampler. Raises WeightsError where the log-probs are not the learner's."""
    forced = probe.tokens.shape[1] - probe.prompt
    tickets = [
        sampler.submit(
            sampler.prepare(
                Request(
                    prompt=row[: probe.prompt],
                    sampling=Sampling(max_tokens=forced, ignore_eos=True, logit_bias={int(row[-1]): 1e4}),
                )
            )
        )
        for row in probe.tokens
    ]
    got = np.zeros_like(probe.logprobs)
    try:
        while sampler.busy:
            for ticket, _, completion in sampler.step():
                got[tickets.index(ticket)] = completion.raw_logprobs
    except SamplerError as error:
        raise WeightsError(f"weights version {sampler.version}: {error}") from None
    gap = np.abs(got - probe.logprobs)
    limit = TOLERANCE[sampler.cfg.dtype] * (1 + np.abs(probe.logprobs) / 10)
    if (gap > limit).mean() > 0.25:
        row, t = np.unravel_index((gap / limit).argmax(), gap.shape)
        raise WeightsError(
            f"weights version {sampler.version}: every tensor has its checksum, yet the engine's log-probs are not the "
            f"learner's: {got[row, t]:.4f} for {probe.logprobs[row, t]:.4f} at row {row}, token {probe.prompt + t}, "
            f"where {limit[row, t]:.2g} is allowed; {(gap > limit).sum()} of {gap.size} are off by more than that"
        )
