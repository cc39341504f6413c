"""From a request's body to work for the engine: prompts as ids, limits applied, what to report of each token."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cabochon.chat import render_chat
from cabochon.errors import UserError
from cabochon.rollouts.local import requests_for
from cabochon.rollouts.prompts import Prepared, encode_prompt
from cabochon.rollouts.sampler import Sampler
from cabochon.serve.bodies import ApiError, Body, ChatBody, CompletionBody, shown
from cabochon.serve.text import Parts, Pieces, safe_length, split_thinking
from cabochon.tokenizer import Tokenizer
from cabochon.types import Sampling, Thinking

TAGS = (Thinking.open, Thinking.close)
STOPS = 16
"""texts that may end a sample at most: every new token is held against each"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """A model as clients know it, and how much of it they may ask for."""

    name: str
    sampler: Sampler
    max_tokens: int
    """new tokens of one sample at most"""
    places: int
    """samples that have a slot or wait for one at most"""
    created: int = field(default_factory=lambda: int(time.time()))
    pieces: Pieces = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", Pieces(self.tokenizer))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.sampler.tokenizer

    @property
    def length(self) -> int:
        """Tokens of prompt and completion together."""
        return min(self.sampler.cfg.length, self.sampler.model.max_positions)


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A request that can be met."""

    served: Served
    chat: bool
    works: Sequence[Prepared]
    """of each prompt"""
    echoes: Sequence[str]
    """of each prompt: what its completions begin with"""
    begun: Sequence[bool]
    """of each prompt: it ends inside of thinking"""
    split: bool
    """thinking is reported apart"""
    top: int | None = None
    """likeliest tokens to report in each place; None for no log-probs"""
    echo: bool = False
    draw: bool = True
    stream: bool = False
    usage: bool = False
    """a stream ends with a count of tokens"""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def scored(self) -> bool:
        """The forward pass over the text as it stands is needed: the sampler keeps the drawn token's log-prob only."""
        return self.top is not None and (self.top > 0 or self.echo)

    def parts(self, prompt: int, text: str, *, whole: bool) -> Parts:
        """A completion's text as it is shown; of one that is not `whole` what no further token can take back."""
        if not whole:
            text = text[: safe_length(text, (*self.works[prompt].sampling.stop, *(TAGS if self.split else ())))]
        return split_thinking(text, *TAGS, begun=self.begun[prompt]) if self.split else Parts(None, text)


def asked_chat(served: Served, body: ChatBody) -> Asked:
    """Raises ApiError."""
    _check(served, body, prompts=1)
    try:
        text = render_chat(
            served.tokenizer, body.plain_messages(), add_generation_prompt=True, variables=body.chat_template_kwargs
        )
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    _check_size(served, text, "messages")
    prompt = np.array(served.tokenizer.encode(text), np.int32)
    room = max(1, served.length - len(prompt))
    most = body.max_completion_tokens or body.max_tokens or min(served.max_tokens, room)
    works = _prepared(served, body, [prompt], most)
    split = body.thinking_budget is not None
    return Asked(
        served=served, chat=True, works=works, echoes=[""], begun=[split and _inside(served, prompt)], split=split,
        top=body.top_logprobs if body.logprobs else None, stream=body.stream, usage=body.stream_options.include_usage,
    )  # fmt: skip


def asked_completion(served: Served, body: CompletionBody) -> Asked:
    """Raises ApiError."""
    given = body.prompts()
    _check(served, body, prompts=len(given))
    for prompt in given:
        if isinstance(prompt, str):
            _check_size(served, prompt, "prompt")
    prompts = [encode_prompt(served.tokenizer, p if isinstance(p, str) else np.array(p, np.int64)) for p in given]
    works = _prepared(served, body, prompts, body.max_tokens)
    texts = [p if isinstance(p, str) else served.tokenizer.decode(p, skip_special=True) for p in given]
    return Asked(
        served=served, chat=False, works=works, echoes=texts if body.echo else [""] * len(given),
        begun=[False] * len(given), split=False, top=body.logprobs, echo=body.echo, draw=body.max_tokens > 0,
        stream=body.stream, usage=body.stream_options.include_usage,
    )  # fmt: skip


def _check(served: Served, body: Body, *, prompts: int) -> None:
    """What can be said before a prompt becomes tokens, of which there may be millions in a body."""
    if body.model not in (None, served.name):
        message = f"the model {shown(repr(body.model))} is not served here; this is {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    if (wanted := prompts * body.n) > served.places:
        message = f"the request asks for {wanted} samples; this server holds {served.places} at most"
        raise ApiError(400, message, param="n")
    if len(body.stops) > STOPS:
        raise ApiError(400, f"stop: {len(body.stops)} texts; this server takes {STOPS} at most", param="stop")


def _check_size(served: Served, text: str, param: str) -> None:
    """No text of so many bytes fits, whatever its tokens; to make them would hold up every client meanwhile."""
    size, most = len(text.encode()), served.length * served.pieces.longest
    if size > most:
        context = f"this model's context of {served.length} tokens holds at most {most:,}"
        message = f"the prompt has {size:,} bytes; {context}"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def _prepared(served: Served, body: Body, prompts: Sequence[np.ndarray], max_tokens: int) -> list[Prepared]:
    """With no tokens to draw the prompts are only scored."""
    if max_tokens > served.max_tokens:
        message = f"max_tokens={max_tokens}: this server draws at most {served.max_tokens} tokens a sample"
        raise ApiError(400, message, param="max_tokens")
    longest = max(map(len, prompts))
    if longest + max_tokens > served.length:
        message = (
            f"the prompt has {longest} tokens and max_tokens is {max_tokens}, together more than this model's context "
            f"of {served.length} tokens"
        )
        raise ApiError(400, message, param="max_tokens", code="context_length_exceeded")
    sampling = Sampling(
        max_tokens=max(1, max_tokens),
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        stop=body.stops,
        stop_ids=tuple(body.stop_token_ids),
        n=body.n,
        logit_bias=_biases(body.logit_bias),
        thinking=None if body.thinking_budget is None else Thinking(max_tokens=body.thinking_budget),
        ignore_eos=body.ignore_eos,
    )
    seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
    try:
        requests = requests_for(prompts, sampling, seed)
        return [served.sampler.prepare(r, f"prompt {i}", draw=max_tokens > 0) for i, r in enumerate(requests)]
    except UserError as error:
        raise ApiError(400, str(error)) from None


def _biases(given: Mapping[str, Any]) -> dict[int, float]:
    if bad := [key for key in given if not re.fullmatch("0|[1-9][0-9]{0,9}", key)]:
        raise ApiError(400, f"logit_bias: {shown(repr(bad[0]))} is not a token id", param="logit_bias")
    return {int(key): value for key, value in given.items()}


def _inside(served: Served, prompt: np.ndarray) -> bool:
    """The prompt ends with the open tag (as `rollouts.thinking` decides it)."""
    return served.tokenizer.decode(prompt[-32:]).rstrip().endswith(TAGS[0])
