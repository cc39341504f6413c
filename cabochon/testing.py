"""Small real things for tests, in the package because Ray workers must be able to import them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cabochon.chat import encode_chat
from cabochon.errors import UserError
from cabochon.model.config import ModelConfig, MoeConfig
from cabochon.protocols import Weights
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Completion, Request


def tiny_config(**changes: Any) -> ModelConfig:
    """A dense model of a few thousand parameters; `changes` replace fields of ModelConfig."""
    base: dict[str, Any] = {
        "vocab_size": 64,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_dim": 48,
    }
    return ModelConfig(**(base | changes))


def tiny_moe(**changes: Any) -> ModelConfig:
    """Dense and sparse layers in turn, with a shared expert: four layers, three groups of parameters that differ."""
    base: dict[str, Any] = {
        "num_layers": 4,
        "layer_kinds": ("dense", "moe", "dense", "moe"),
        "moe": MoeConfig(num_experts=4, top_k=2, ffn_dim=24, shared_ffn_dim=16),
        "qk_norm": "head",
        "tied_head": False,
    }
    return tiny_config(**(base | changes))


class FakeEngine:
    """A PolicyEngine without a model: `reply(prompt, seed, sample)` is the text of each sample, one byte a token.

    Log-probs are log(1/2) for every token. A reply is cut at `max_tokens` and ends with the tokenizer's end-of-text id
    where it was not. Requests are kept in `seen`, so that a test can look at what was asked.
    """

    def __init__(self, reply: Callable[[str, int, int], str], context: int = 1024):
        self.reply, self.context, self.version = reply, context, 0
        self.tokenizer = ByteTokenizer()
        self.seen: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        prompts = [self._ids(request, i) for i, request in enumerate(requests)]
        self.seen += requests
        return [
            self._completion(request, ids, sample)
            for request, ids in zip(requests, prompts, strict=True)
            for sample in range(request.sampling.n)
        ]

    def load(self, weights: Weights) -> None:
        if not weights.params:
            raise UserError("weights: no array in them; expected the policy's parameters")
        self.version = weights.version

    def _ids(self, request: Request, i: int) -> np.ndarray:
        prompt = request.prompt
        if isinstance(prompt, np.ndarray):
            ids = prompt.astype(np.int32)
        elif isinstance(prompt, str):
            ids = np.array(self.tokenizer.encode(prompt), np.int32)
        else:
            ids = np.array(encode_chat(self.tokenizer, prompt, add_generation_prompt=True), np.int32)
        if not ids.size:
            raise UserError(f"request {i}: the prompt is empty; give at least one token")
        if len(ids) + request.sampling.max_tokens > self.context:
            raise UserError(f"request {i}: prompt and max_tokens do not fit in the context of {self.context}")
        return ids

    def _completion(self, request: Request, prompt: np.ndarray, sample: int) -> Completion:
        text = self.reply(self.tokenizer.decode(prompt), request.seed, sample)
        ids = [*self.tokenizer.encode(text), self.tokenizer.eos_ids[0]][: request.sampling.max_tokens]
        tokens, T = np.array(ids, np.int32), len(ids)
        ended = ids[-1] in self.tokenizer.eos_ids
        logp = np.full(T, np.log(0.5), np.float32)
        return Completion(
            tokens=tokens,
            logprobs=logp,
            raw_logprobs=logp,
            mask=np.ones(T, bool),
            text=self.tokenizer.decode(tokens, skip_special=True),
            finish="stop" if ended else "length",
            policy_version=np.full(T, self.version, np.int32),
            prompt_tokens=prompt,
            answer=(0, T),
        )
