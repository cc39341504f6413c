"""LocalEngine: the sampler behind the PolicyEngine door, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cabochon.errors import UserError
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig
from cabochon.protocols import Weights
from cabochon.rollouts.sampler import Sampler, Watch
from cabochon.rollouts.slots import SlotConfig
from cabochon.tokenizer import Tokenizer
from cabochon.types import Completion, Prompt, Request, Sampling


class LocalEngine:
    """A policy that continues prompts on this machine's first device.

    Example: `LocalEngine(config, tokenizer, Weights(version=0, params=params)).generate([Request(prompt="Hello")])`.
    """

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer, weights: Weights, cfg: SlotConfig | None = None):
        check_tree(model, weights.params)
        self.sampler = Sampler(model, weights.params, tokenizer, cfg or SlotConfig(), weights.version)

    @property
    def version(self) -> int:
        return self.sampler.version

    def generate(self, requests: Sequence[Request], watch: Watch | None = None) -> list[Completion]:
        """All samples of all requests, in order. `watch` sees (index of the request, sample, tokens so far).

        Raises UserError, before anything is drawn, where a request cannot be met.
        """
        work = [self.sampler.prepare(request, f"request {i}") for i, request in enumerate(requests)]
        index = {self.sampler.submit(w): i for i, w in enumerate(work)}

        def seen(ticket: int, sample: int, tokens: np.ndarray) -> None:
            if watch is not None:
                watch(index[ticket], sample, tokens)

        found: dict[tuple[int, int], Completion] = {}
        while self.sampler.busy:
            for ticket, sample, completion in self.sampler.step(seen if watch else None):
                found[index[ticket], sample] = completion
        return [found[key] for key in sorted(found)]

    def load(self, weights: Weights) -> None:
        """Draw from these weights from now on. Raises UserError where they are of another model."""
        check_tree(self.sampler.model, weights.params)
        self.sampler.load(weights.params, weights.version)


def requests_for(prompts: Sequence[Prompt | np.ndarray], sampling: Sampling, seed: int = 0) -> list[Request]:
    """One request per prompt, each with a seed of its own derived from `seed` and its place."""
    seeds = np.random.SeedSequence(seed).generate_state(max(1, len(prompts)), np.uint64)
    return [Request(prompt=p, sampling=sampling, seed=int(s)) for p, s in zip(prompts, seeds, strict=False)]


def check_tree(model: ModelConfig, params: Mapping[str, Any]) -> None:
    """Raises UserError naming the first array that is missing, unknown or of another shape."""
    expected, got = (
        {jax.tree_util.keystr(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (tf.abstract(model), dict(params))
    )
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            have, want = got.get(name, "missing"), expected.get(name, "no such array")
            raise UserError(f"weights: {name} is {have}, the model expects {want}")
