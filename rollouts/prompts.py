"""From a request to what the sampler runs: ids, limits checked, tags spelt. Every refusal is a line and comes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cabochon.chat import encode_chat
from cabochon.errors import UserError
from cabochon.model.config import ModelConfig
from cabochon.rollouts.slots import BIASES, STOP_IDS, SlotConfig
from cabochon.rollouts.thinking import Tags, tags_of
from cabochon.tokenizer import Tokenizer
from cabochon.types import Prompt, Request, Sampling

COLDEST, HOTTEST = 1e-6, 1e6
"""temperatures beside 0: over either a logit, its bias in it, stays a finite f32"""
LEAST_TOP_P = 1e-6
"""smaller ones become 0 in f32, which keeps no token at all"""
MOST_BIAS = 1e9
"""either way: more than any logit, and over the coldest temperature still finite in f32"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A request that can be met."""

    tokens: np.ndarray
    """[P] int32"""
    sampling: Sampling
    seed: int
    stop_ids: tuple[int, ...]
    """the model's own unless they are ignored, and the request's"""
    tags: Tags | None


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt | np.ndarray) -> np.ndarray:
    """[P] int32: messages through the chat template with the assistant's turn opened, text with what the model puts
    before a text, ids as they are."""
    if isinstance(prompt, np.ndarray):
        return prompt.astype(np.int32)
    if isinstance(prompt, str):
        return np.array(tokenizer.encode(prompt, add_special=True), np.int32)
    return np.array(encode_chat(tokenizer, prompt, add_generation_prompt=True), np.int32)


def prepare(
    model: ModelConfig, tokenizer: Tokenizer, cfg: SlotConfig, request: Request, where: str, draw: bool = True
) -> Prepared:
    """Check a request. `where` names it in messages, `request 3`; without `draw` the prompt is only scored and may fill
    the context. Raises UserError."""
    s, tokens = request.sampling, encode_prompt(tokenizer, request.prompt)
    vocab, room = model.vocab_size, min(cfg.length, model.max_positions)
    if not tokens.size:
        raise UserError(f"{where}: the prompt is empty; give at least one token")
    if tokens.min() < 0 or tokens.max() >= vocab:
        bad = tokens[(tokens < 0) | (tokens >= vocab)][0]
        raise UserError(f"{where}: prompt token {bad} is not in the vocabulary; expected 0 to {vocab - 1}")
    if len(tokens) > room - draw:
        most = "fewer than" if draw else "at most"
        raise UserError(
            f"{where}: the prompt has {len(tokens)} tokens; expected {most} the context of {room}: shorten it"
        )
    if draw and len(tokens) + s.max_tokens > room:
        raise UserError(
            f"{where}: {len(tokens)} prompt tokens and max_tokens={s.max_tokens} do not fit in the context of {room}; "
            f"max_tokens can be {room - len(tokens)}"
        )
    _check_sampling(s, vocab, where)
    eos = () if s.ignore_eos else tuple(dict.fromkeys((*model.eos_ids, *tokenizer.eos_ids)))
    stop_ids = tuple(dict.fromkeys((*s.stop_ids, *eos)))
    if len(stop_ids) > STOP_IDS:
        raise UserError(f"{where}: {len(stop_ids)} stop ids; expected at most {STOP_IDS}")
    tags = tags_of(tokenizer, s.thinking, s.max_tokens) if s.thinking is not None else None
    return Prepared(tokens=tokens, sampling=s, seed=request.seed, stop_ids=stop_ids, tags=tags)


def _check_sampling(s: Sampling, vocab: int, where: str) -> None:
    for name, good, expected in (
        ("max_tokens", s.max_tokens >= 1, "1 or more"),
        ("n", s.n >= 1, "1 or more"),
        (
            "temperature", s.temperature == 0 or COLDEST <= s.temperature <= HOTTEST,
            f"0 (greedy) or {COLDEST:g} to {HOTTEST:g}",
        ),
        ("top_k", 0 <= s.top_k < 2**31, "0 (off) or more, below 2^31"),
        ("top_p", LEAST_TOP_P <= s.top_p <= 1, f"{LEAST_TOP_P:g} to 1 (off)"),
        ("min_p", 0 <= s.min_p <= 1, "0 (off) to 1"),
        ("stop", all(s.stop), "strings that are not empty"),
    ):  # fmt: skip
        if not good:
            raise UserError(f"{where}: sampling.{name}={repr(getattr(s, name))[:80]}; expected {expected}")
    if len(s.logit_bias) > BIASES:
        raise UserError(f"{where}: sampling.logit_bias has {len(s.logit_bias)} ids; expected at most {BIASES}")
    for i, bias in s.logit_bias.items():
        if not -MOST_BIAS <= bias <= MOST_BIAS:
            expected = f"{-MOST_BIAS:g} to {MOST_BIAS:g} (-100 bans a token)"
            raise UserError(f"{where}: sampling.logit_bias[{i}]={bias!r}; expected {expected}")
    for name, ids in (("stop_ids", s.stop_ids), ("logit_bias", s.logit_bias)):
        for i in ids:
            if not 0 <= i < vocab:
                raise UserError(f"{where}: sampling.{name} has id {i}, unknown to the model; expected 0 to {vocab - 1}")


def stopped(tokenizer: Tokenizer, tokens: Sequence[int], checked: int, stop: Sequence[str]) -> int | None:
    """How many tokens stand once a stop string is complete, looking at those from `checked` on; None if none is.

    Only the last tokens are decoded, as many as a stop string can span.
    """
    window = max((len(s.encode()) for s in stop), default=0) + 8
    for t in range(checked, len(tokens)):
        tail = tokenizer.decode_on(tokens[max(0, t + 1 - window) : t + 1], skip_special=True)
        if any(s in tail for s in stop):
            return t + 1
    return None


def text_of(tokenizer: Tokenizer, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """The text of tokens that follow a prompt, up to the first stop string in it."""
    text = tokenizer.decode_on(tokens, skip_special=True)
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def pieces(length: int, chunks: Sequence[int]) -> list[tuple[int, int]]:
    """(real tokens, chunk length) of the pieces a prompt is read in: never more than twice the work, few shapes."""
    out: list[tuple[int, int]] = []
    sizes = sorted(chunks)
    while length > 0:
        enough = next((c for c in sizes if c >= length), sizes[-1])
        fitting = [c for c in sizes if c <= length]
        chunk = fitting[-1] if fitting and enough > 2 * length else enough
        out.append((min(chunk, length), chunk))
        length -= out[-1][0]
    return out
