"""What the learner makes of a completion, for tests that compare it with what the sampler said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cabochon.batch import from_sequences
from cabochon.model import transformer as tf
from cabochon.ops import token_outputs


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, batch):
    out = tf.forward(model, params, batch.tokens_BT, batch.position_BT, batch.segment_BT, routes_BTLC=batch.routes_BTLC)
    got = token_outputs(out.hidden_BTD, batch.tokens_BT, batch.segment_BT, lambda h: tf.logits(model, params, h))
    return got.logp_BT, out.routes_BTLC


def learner_side(model, params, completions, length, *, replay):
    """(log-probs [T], routes used [P+T, L, C] or None) of each completion by the learner's f32 forward pass over prompt
    and completion, in one padded batch; `replay` installs the recorded routes."""
    ids = [np.concatenate([c.prompt_tokens, c.tokens]) for c in completions]
    routes = [np.concatenate([c.prompt_routes, c.routes]) for c in completions] if replay else None
    batch = from_sequences(ids, [np.ones(len(i)) for i in ids], length, routes=routes)
    logp, used = jax.device_get(_forward(model, params, jax.tree.map(jnp.asarray, batch)))
    return [
        (logp[b, len(c.prompt_tokens) : len(i)], None if used is None else used[b, : len(i)])
        for b, (c, i) in enumerate(zip(completions, ids, strict=True))
    ]
