"""Asking a language model for verdicts: one of our own (an engine that reasons, its weights that are read), or an
endpoint. Either gives, per prompt and vote, a `Reading`: probabilities over the choices, or a status that says why not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from cabochon.chat import encode_chat, render_chat
from cabochon.errors import UserError
from cabochon.model.config import ModelConfig
from cabochon.protocols import PolicyEngine
from cabochon.reward.answers import parse, spelled
from cabochon.reward.likelihood import Likelihood
from cabochon.reward.prompt import MARK, special_texts
from cabochon.tokenizer import Tokenizer
from cabochon.types import Completion, Message, Request, Sampling, Thinking


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One vote of a judge."""

    status: Literal["ok", "unparsed", "too_long", "infra_error"]
    probabilities: tuple[float, ...] = ()
    """of the choices; the rest of the mass went to other texts"""
    text: str = ""
    """what the judge wrote"""
    detail: str = ""


@runtime_checkable
class Asker(Protocol):
    """Where verdicts come from."""

    @property
    def model_id(self) -> str:
        """A hash of what decides its answers."""
        ...

    @property
    def specials(self) -> tuple[str, ...]:
        """Texts that must not reach it in what a stranger wrote."""
        ...

    def ask(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, votes: int, reason: bool, seed: int
    ) -> list[list[Reading]]:
        """Per prompt, `votes` readings. Nothing that a model or a server does raises."""
        ...


def seed_of(prompt: bytes, seed: int) -> int:
    """A seed that follows from the question itself, so that its company does not change the answer."""
    return int.from_bytes(hashlib.sha256(seed.to_bytes(8, "little") + prompt).digest()[:8], "little")


# ----------------------------------------------------------------------------------------------------------- our own


@dataclass(frozen=True, kw_only=True)
class Reasoning:
    """How a judge of ours reasons before its verdict."""

    max_tokens: int = 256
    temperature: float = 1.0
    thinking: Thinking | None = None
    """a budget for what it thinks before the rationale"""


class LocalAsker:
    """A model of ours: an engine writes the rationale, up to `Verdict:`; the verdict is read from the model's own
    log-probs, summed over its spellings, so that it costs no draw and has no noise. Without a rationale no engine is
    needed, and a judgement costs a forward pass."""

    def __init__(
        self,
        model: ModelConfig,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        model_id: str,
        engine: PolicyEngine | None = None,
        reasoning: Reasoning = Reasoning(),
        length: int = 1024,
        rows: int = 8,
    ) -> None:
        """`engine` draws from the same weights. Raises UserError where the tokenizer is of another model."""
        if tokenizer.vocab_size > model.vocab_size:
            raise UserError(f"judge: the tokenizer ({tokenizer.source}) has {tokenizer.vocab_size} tokens, the model "
                            f"{model.vocab_size}: they do not belong together")  # fmt: skip
        length = min(length, model.max_positions)
        self.tokenizer, self.engine, self.reasoning, self.length = tokenizer, engine, reasoning, length
        self._likelihood = Likelihood(model, params, length=length, rows=rows)
        self._mark = tokenizer.encode(MARK)
        self.model_id = hashlib.sha256(f"{model_id} {reasoning}".encode()).hexdigest()[:16]
        self.specials = special_texts(tokenizer)

    def ask(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, votes: int, reason: bool, seed: int
    ) -> list[list[Reading]]:
        """Without a rationale all votes would be equal: one is given. Raises UserError where `reason` has no engine."""
        if not reason:
            return [[reading] for reading in self._read([(self._at_once(each), "") for each in prompts], choices)]
        drawn = self._reason([self._prompt_ids(prompt) for prompt in prompts], votes, seed)
        flat = self._read([c for each in drawn for c in each], [c for c in choices for _ in range(votes)])
        return [flat[i * votes : (i + 1) * votes] for i in range(len(prompts))]

    def _prompt_ids(self, prompt: str) -> np.ndarray:
        turn: Message = {"role": "user", "content": prompt}
        return np.array(encode_chat(self.tokenizer, [turn], add_generation_prompt=True), np.int32)

    def _at_once(self, prompt: str) -> np.ndarray:
        """The tokens before a verdict without a rationale, as training has them (`rows.sft_rows`): a template may write
        more before an answer, an empty thought say, than it does where it opens the turn."""
        turns: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": MARK}]
        text = render_chat(self.tokenizer, turns)
        return np.array(self.tokenizer.encode(text[: text.rindex(MARK) + len(MARK)]), np.int32)

    def _reason(self, ids: Sequence[np.ndarray], votes: int, seed: int) -> list[list[tuple[np.ndarray, str] | Reading]]:
        """Per prompt and vote, the tokens up to the mark and the text before it; or why there are none."""
        if self.engine is None:
            raise UserError("judge: reasoning needs an engine; give one, or set reason=false")
        how = self.reasoning
        sampling = Sampling(max_tokens=how.max_tokens, temperature=how.temperature, stop=(MARK,), n=votes,
                            thinking=how.thinking)  # fmt: skip
        fits = [i for i, each in enumerate(ids) if len(each) + how.max_tokens + len(self._mark) + 16 <= self.length]
        drawn = self.engine.generate(
            [Request(prompt=ids[i], sampling=sampling, seed=seed_of(ids[i].tobytes(), seed)) for i in fits]
        )
        long = Reading(status="too_long", detail=f"the judge's prompt does not fit {self.length} tokens")
        out: list[list[tuple[np.ndarray, str] | Reading]] = [[long] * votes for _ in ids]
        for n, i in enumerate(fits):
            out[i] = [self._context(ids[i], c) for c in drawn[n * votes : (n + 1) * votes]]
        return out

    def _context(self, prompt: np.ndarray, drawn: Completion) -> tuple[np.ndarray, str] | Reading:
        if drawn.finish == "abort":
            return Reading(status="infra_error", detail="the engine gave the request up")
        written = self.tokenizer.decode(drawn.tokens)
        if not written.rstrip().endswith(MARK) or (drawn.thinking is not None and drawn.answer is None):
            return Reading(status="unparsed", text=drawn.text, detail=f"no {MARK} in {len(drawn.tokens)} tokens")
        return np.concatenate([prompt, drawn.tokens]).astype(np.int32), drawn.text

    def _read(
        self, contexts: Sequence[tuple[np.ndarray, str] | Reading], choices: Sequence[Sequence[str]]
    ) -> list[Reading]:
        """The verdict's probabilities where there is a context."""
        out: list[Reading | None] = [c if isinstance(c, Reading) else None for c in contexts]
        asked: list[int] = []
        ids: list[np.ndarray] = []
        spellings: list[list[np.ndarray]] = []
        for i, context in enumerate(contexts):
            if isinstance(context, Reading):
                continue
            spelt = [ids for choice in choices[i] for ids in self._spellings(choice)]
            if len(context[0]) + max(map(len, spelt)) > self.length:
                out[i] = Reading(status="too_long", detail=f"{len(context[0])} tokens, at most {self.length} fit")
                continue
            asked.append(i)
            ids.append(context[0])
            spellings.append(spelt)
        for i, logp in zip(asked, self._likelihood.logprobs(ids, spellings), strict=True):
            context = contexts[i]
            assert not isinstance(context, Reading)
            of_choice = np.repeat(np.arange(len(choices[i])), [len(self._spellings(c)) for c in choices[i]])
            p = np.bincount(of_choice, np.exp(logp), len(choices[i]))
            out[i] = Reading(status="ok", probabilities=tuple(p.tolist()), text=context[1])
        return [reading for reading in out if reading is not None]

    def _spellings(self, choice: str) -> list[np.ndarray]:
        """With a space before and without, as ids; one where the tokenizer writes both alike."""
        each = {tuple(self.tokenizer.encode(text)) for text in (f" {choice}", choice)}
        return [np.array(ids, np.int32) for ids in sorted(each)]


# ---------------------------------------------------------------------------------------------------------- endpoints


@runtime_checkable
class Answer(Protocol):
    """What an endpoint answered: `cabochon.rollouts.openai.Answer` is one."""

    @property
    def status(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def detail(self) -> str: ...
    @property
    def tokens(self) -> Sequence[Any]:
        """Each with `text` and `top`, a map from text to log-prob."""
        ...


@runtime_checkable
class Endpoint(Protocol):
    """Asks many at once; timeouts, retries and cost are its business."""

    usage: Any
    """a dataclass of numbers: what it was asked so far, and what that cost"""

    def ask(self, requests: Sequence[Request], top_logprobs: int = 0) -> Sequence[Answer]: ...


class EndpointAsker:
    """A judge behind an OpenAI-compatible endpoint, through `cabochon.rollouts.openai.OpenAIEngine`.

    The verdict is read from the log-probs of its token where the endpoint gives them, else from the text. An answer
    that did not come is `infra_error`, one that cannot be read `unparsed`: neither is ever a score.
    """

    specials = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>")

    def __init__(
        self, endpoint: Endpoint, *, name: str, reasoning: Reasoning = Reasoning(), top_logprobs: int = 20
    ) -> None:
        """`name`: of the model, as pinned as the provider can pin it; 0 `top_logprobs` reads the text alone."""
        self.endpoint, self.reasoning, self.top_logprobs = endpoint, reasoning, top_logprobs
        self.model_id = hashlib.sha256(f"{name} {reasoning} {top_logprobs}".encode()).hexdigest()[:16]

    def ask(
        self, prompts: Sequence[str], choices: Sequence[Sequence[str]], *, votes: int, reason: bool, seed: int
    ) -> list[list[Reading]]:
        how = self.reasoning
        sampling = Sampling(max_tokens=how.max_tokens if reason else 16, temperature=how.temperature, n=votes)
        requests = [
            Request(
                prompt=[{"role": "user", "content": prompt}],
                sampling=sampling,
                seed=seed_of(prompt.encode("utf-8", "replace"), seed),
            )
            for prompt in prompts
        ]
        answers = self.endpoint.ask(requests, self.top_logprobs)
        flat = [
            read_answer(answer, each)
            for answer, each in zip(answers, [c for c in choices for _ in range(votes)], strict=True)
        ]
        return [flat[i * votes : (i + 1) * votes] for i in range(len(prompts))]


def read_answer(answer: Answer, choices: Sequence[str]) -> Reading:
    """An endpoint's answer as a vote."""
    if answer.status != "ok":
        return Reading(status="infra_error", detail=f"{answer.status}: {answer.detail}")
    chosen = parse(answer.text, choices)
    if chosen is None:
        return Reading(status="unparsed", text=answer.text, detail=f"no line '{MARK} {' | '.join(choices)}' at the end")
    probabilities = _at_verdict(answer, choices)
    if probabilities is None:
        probabilities = [float(i == chosen) for i in range(len(choices))]
    return Reading(status="ok", probabilities=tuple(probabilities), text=answer.text)


def _at_verdict(answer: Answer, choices: Sequence[str]) -> list[float] | None:
    """Probabilities at the first token after the last mark; None where there are no log-probs."""
    marks = list(re.finditer(MARK, "".join(token.text for token in answer.tokens), re.IGNORECASE))
    if not marks:
        return None
    start, at = marks[-1].end(), 0
    for token in answer.tokens:
        # a token may hold the end of the mark as well: then the verdict begins in it and cannot be told from it
        if at >= start and token.text.strip().strip("*_`\"'"):
            found = spelled({token.text: token.logprob, **token.top}, choices)  # it may be drawn and not on top
            return found if sum(found) else None
        at += len(token.text)
    return None
