"""Host carriers: the nouns that cross doors on the CPU side. numpy only, no jax, so a bare worker can import them.

Shapes: T tokens of one completion (prompt excluded), L MoE layers, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np


class Message(TypedDict, total=False):
    """One chat message, in the form chat templates expect."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]]
    name: str


Prompt = str | Sequence[Message]

Status = Literal["ok", "wrong", "no_answer", "timeout", "crash", "oom", "malformed", "infra_error"]
"""What a verdict says happened. `infra_error` is the machine's doing and carries no score; the rest is the model's."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to solve.

    Example: `Task(id="gsm8k/test/3", prompt="Natalia sold ...", verifier="math", payload={"answer": "72"})`.
    """

    id: str
    prompt: Prompt
    verifier: str
    """Which verifier judges it; composition by task reads this."""
    payload: Mapping[str, Any] = field(default_factory=dict)
    """What that verifier needs: gold answer, tests, constraints. The policy never sees it."""
    domain: str = "default"
    """Statistics and baselines are kept per domain."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a verifier says of one completion.

    `score` is in [0, 1], or None where there is nothing to score (`infra_error`, or a reward function that abstains).
    """

    score: float | None
    status: Status
    detail: str = ""
    """One line a person can read."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Plain data behind the verdict: extracted answer, gold, failing test, stderr tail, parts of a composition."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.status == "infra_error" and self.score is not None:
            raise ValueError(f"an infra_error carries no score, got {self.score}")
        if self.score is not None and not 0.0 <= self.score <= 1.0:
            raise ValueError(f"Verdict.score must lie in [0, 1], got {self.score}")


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """A budget for what stands between two tags (algorithms.md section 16).

    Thinking starts where the prompt ends with `open` or the policy writes it. Tags are matched as token ids, in the
    spellings the tokenizer gives them next to common neighbours.
    """

    max_tokens: int
    """thinking tokens sampled before the close tag is forced; the tags themselves do not count"""
    min_tokens: int = 0
    """thinking tokens before which the close tag and the end of the text cannot be sampled"""
    open: str = "<think>"
    close: str = "</think>"
    forced: str = ""
    """what is forced at the budget, with `close` in it; empty means `close` alone"""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw completions. `max_tokens` counts new tokens; `top_k=0`, `top_p=1`, `min_p=0` switch a filter off.

    The order is bias, temperature, top-k, top-p among what is left, min-p. Tokens that tie with the last one kept are
    kept too. `temperature=0` takes the likeliest token, a distribution with log-prob 0 on it.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    """strings that end a completion: the text ends before them, the tokens with the one that completed them"""
    stop_ids: tuple[int, ...] = ()
    """ids that end it besides the model's own; the token is kept, its text is not"""
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """added to the logit of a token id before anything else; the raw log-probs do not see it"""
    thinking: Thinking | None = None
    routes: bool = False
    """record the experts of every token, for replay in the learner"""
    ignore_eos: bool = False
    """go on past the model's own end-of-text ids (benchmarks)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt and how to continue it.

    The seed alone decides the draws of its `sampling.n` samples: the same request gives the same tokens in any company.
    """

    prompt: Prompt | np.ndarray
    """text, messages, or [P] token ids"""
    sampling: Sampling = Sampling()
    seed: int = 0
    task: Task | None = None
    """what it is asked for; engines of episodes make its environment"""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds: from the request to its slot, of which reading the prompt (once for its samples), and from there on."""

    queued: float
    prefill: float
    decode: float


Span = tuple[int, int]
"""[start, end) in `Completion.tokens`"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """Tokens that followed a prompt, with what the learner needs to know of how they were drawn.

    Tool output and forced tokens are in `tokens` with `mask` 0: context, never trained on.
    """

    tokens: np.ndarray
    """[T] int32"""
    logprobs: np.ndarray
    """[T] f32, of the distribution really sampled from (nats); 0 where `mask` is 0"""
    mask: np.ndarray
    """[T] bool, True where the policy itself sampled the token"""
    text: str
    finish: Literal["stop", "length", "abort"]
    policy_version: np.ndarray
    """[T] int32: the learner step whose weights drew the token"""
    routes: np.ndarray | None = None
    """[T, L, K] expert ids, -1 where none was recorded: the last token had no forward pass"""
    raw_logprobs: np.ndarray | None = None
    """[T] f32, under the policy itself (temperature 1, no filter, no bias); 0 where `mask` is 0"""
    prompt_tokens: np.ndarray | None = None
    """[P] int32, the ids the prompt was read as"""
    prompt_routes: np.ndarray | None = None
    """[P, L, K]"""
    thinking: Span | None = None
    """between the tags, tags excluded; None where nothing was thought"""
    answer: Span | None = None
    """what follows the close tag, or everything where there was no thinking; None where thinking never ended"""
    timings: Timings | None = None
    reward: float | None = None
    """what the environment of an episode gave for it; None where it gave nothing or there was none"""
    detail: str = ""
    """why it was given up, one line, where that is known"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """A task, one completion of it, and the verdict: frozen, so later stages make a new one with `replace`."""

    task: Task
    completion: Completion
    group: int
    """Rollouts of one prompt share a group."""
    verdict: Verdict | None = None


ScoreStatus = Literal["ok", "truncated", "unparsed", "inconsistent", "too_long", "infra_error"]
"""What a score says happened. `truncated`: the answer was cut off, so its score is of a kind of text the model was not
trained on. `unparsed`: the judge gave no verdict that can be read. `inconsistent`: its verdict followed the order it
was shown the answers in. `infra_error`: the machine's doing. Only `ok` and `truncated` carry a value."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a reward model says of one completion: on its own scale, a judge's in [0, 1]."""

    value: float | None
    status: ScoreStatus = "ok"
    model_id: str
    """a hash of everything that decides the value: weights, tokenizer, template, settings"""
    detail: str = ""
    """One line a person can read."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Plain data behind it: parts of a rubric, votes, what the judge wrote."""

    def __post_init__(self) -> None:
        if (self.value is not None) != (self.status in ("ok", "truncated")):
            raise ValueError(f"a score that is {self.status} has value {self.value}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"Score.value must be a finite number, got {self.value}")
