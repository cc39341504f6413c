"""Log-probs of given continuations under a frozen model: how a verdict is read without drawing it.

Legend: B rows, T tokens of a row, M places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cabochon.errors import UserError
from cabochon.model import transformer as tf
from cabochon.model import value
from cabochon.model.config import ModelConfig
from cabochon.reward.packing import pack


class Likelihood:
    """Example: `Likelihood(model, params).logprobs([context], [[ids_of_yes, ids_of_no]])[0]`, nats.

    Contexts that differ in nothing share a forward pass: verdicts of one token each cost one in all.
    """

    def __init__(self, model: ModelConfig, params: Mapping[str, Any], *, length: int = 1024, rows: int = 8) -> None:
        """`length`: of the longest context and continuation; `rows`: of that length, computed together."""
        self.model, self.length, self.rows = model, length, rows
        self._params = jax.device_put(value.without_head(params))

        def logprobs(params: tf.Params, tokens_BT: Any, segment_BT: Any, position_BT: Any, at_M: Any, id_M: Any) -> Any:
            with jax.default_matmul_precision("float32"):
                hidden = tf.forward(model, params, tokens_BT, position_BT, segment_BT).hidden_BTD
                z_MV = tf.logits(model, params, hidden.reshape(-1, model.dim)[at_M])
                return z_MV[jnp.arange(len(at_M)), id_M] - jax.nn.logsumexp(z_MV, -1)

        self._logprobs = jax.jit(logprobs)

    def logprobs(self, contexts: Sequence[np.ndarray], choices: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Per context, [choices] f64: log p(choice | context), summed over its tokens.

        Raises UserError where a context with its longest choice is longer than `length`, or a choice is empty.
        """
        rows: dict[bytes, int] = {}
        sequences: list[np.ndarray] = []
        wanted: list[list[tuple[int, int, int]]] = []  # (context, choice, token) at places of each sequence
        targets: list[list[tuple[int, int]]] = []  # (place in the sequence, id)
        for c, (context, each) in enumerate(zip(contexts, choices, strict=True)):
            for k, choice in enumerate(each):
                if not len(choice) or not len(context):
                    raise UserError(f"context {c}: it and each of its continuations need at least one token")
                ids = np.concatenate([context, choice[:-1]]).astype(np.int32)
                if len(ids) > self.length:
                    raise UserError(f"context {c}: {len(ids)} tokens with a verdict; expected at most {self.length}")
                s = rows.setdefault(ids.tobytes(), len(sequences))
                if s == len(sequences):
                    sequences.append(ids)
                    wanted.append([])
                    targets.append([])
                for t, id in enumerate(choice.tolist()):
                    wanted[s].append((c, k, t))
                    targets[s].append((len(context) - 1 + t, id))
        out = [np.zeros(len(each), np.float64) for each in choices]
        for packed in pack(sequences, length=self.length, rows=self.rows):
            places = [
                (packed.starts[i] + at, id, c, k)
                for i, s in enumerate(packed.members)
                for (at, id), (c, k, _) in zip(targets[s], wanted[s], strict=True)
            ]
            M = 1 << (len(places) - 1).bit_length()
            at_M, id_M = np.zeros(M, np.int32), np.zeros(M, np.int32)
            at_M[: len(places)], id_M[: len(places)] = [p[0] for p in places], [p[1] for p in places]
            batch = packed.batch
            found = np.asarray(
                self._logprobs(self._params, batch.tokens_BT, batch.segment_BT, batch.position_BT, at_M, id_M)
            )
            for (_, _, c, k), logp in zip(places, found, strict=False):
                out[c][k] += logp
        return out
