"""What goes back: completions and the chunks of a stream, in the shapes of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cabochon.rollouts.prompts import text_of
from cabochon.serve.asked import Asked
from cabochon.serve.engine import Ended, Piece
from cabochon.serve.text import Pieces

LEAST = -9999.0
"""JSON has no minus infinity"""


class Drawn(NamedTuple):
    """One token and what the model thought in its place."""

    token: int
    logprob: float | None
    """nats; None for the first token of a text"""
    top: Sequence[tuple[int, float]]
    """the likeliest ids"""


@dataclass
class Count:
    """Tokens of a request."""

    prompt: int
    completion: int = 0

    def json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


def drawn_tokens(asked: Asked, prompt: int, ended: Ended) -> list[Drawn]:
    """The tokens of a choice, the prompt's before them where it is echoed."""
    work, completion, scores = asked.works[prompt], ended.completion, ended.scores
    own = [] if completion is None else completion.tokens.tolist()
    if scores is None:
        raw = [] if completion is None or completion.raw_logprobs is None else completion.raw_logprobs.tolist()
        return [Drawn(token, max(logprob, LEAST), ()) for token, logprob in zip(own, raw, strict=True)]
    first = 0 if asked.echo else len(work.tokens)
    out = []
    for t, token in enumerate([*work.tokens.tolist(), *own][first:], first):
        if t == 0:
            out.append(Drawn(token, None, ()))
            continue
        likely = zip(scores.top_ids[t].tolist(), scores.top_logprobs[t].tolist(), strict=True)
        top = [(i, max(logprob, LEAST)) for i, logprob in list(likely)[: asked.top]]
        out.append(Drawn(token, max(float(scores.logprobs[t]), LEAST), top))
    return out


def chat_logprobs(pieces: Pieces, drawn: Sequence[Drawn]) -> dict[str, Any]:
    def one(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": pieces.string(token), "logprob": logprob, "bytes": list(pieces.bytes_of(token))}

    content = [one(d.token, d.logprob) | {"top_logprobs": [one(*each) for each in d.top]} for d in drawn]
    return {"content": content, "refusal": None}


def text_logprobs(pieces: Pieces, drawn: Sequence[Drawn], text: str, *, begins: bool) -> dict[str, Any]:
    """The token itself is among `top_logprobs`, whether it is one of the likeliest or not. `begins`: `text` follows no
    other."""
    top: list[dict[str, float] | None] = []
    for d in drawn:
        likely = {pieces.string(i): logprob for i, logprob in reversed(d.top)}
        top.append(None if d.logprob is None else dict(reversed(likely.items())) | {pieces.string(d.token): d.logprob})
    places = pieces.offsets([d.token for d in drawn], text, begins=begins)
    return {
        "tokens": [pieces.string(d.token) for d in drawn],
        "token_logprobs": [d.logprob for d in drawn],
        "top_logprobs": top,
        "text_offset": [min(at, len(text)) for at in places],
    }


def finish_of(ended: Ended) -> str:
    return "length" if ended.completion is None else ended.completion.finish


def whole_choice(asked: Asked, index: int, prompt: int, ended: Ended) -> dict[str, Any]:
    """A choice of an answer that comes at once."""
    own = "" if ended.completion is None else ended.completion.text
    drawn = None if asked.top is None else drawn_tokens(asked, prompt, ended)
    choice: dict[str, Any] = {"index": index, "finish_reason": finish_of(ended)}
    pieces = asked.served.pieces
    if not asked.chat:
        text = asked.echoes[prompt] + own
        scored = None if drawn is None else text_logprobs(pieces, drawn, text, begins=asked.echo)
        return choice | {"text": text, "logprobs": scored}
    parts = asked.parts(prompt, own, whole=True)
    message: dict[str, Any] = {"role": "assistant", "content": parts.content, "refusal": None}
    if parts.reasoning is not None:
        message["reasoning_content"] = parts.reasoning
    return choice | {"message": message, "logprobs": None if drawn is None else chat_logprobs(pieces, drawn)}


def envelope(asked: Asked, *, chunk: bool) -> dict[str, Any]:
    """What every answer and every chunk begins with."""
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if asked.chat else "text_completion"
    return {
        "id": ("chatcmpl-" if asked.chat else "cmpl-") + asked.id,
        "object": kind,
        "created": asked.created,
        "model": asked.served.name,
    }


@dataclass
class StreamedChoice:
    """One choice of a stream: what of it was sent, and the chunks that more of it makes."""

    asked: Asked
    index: int
    prompt: int
    sent: dict[str, int] = field(default_factory=dict)
    """characters, by the name of the part"""

    def opening(self) -> Iterator[dict[str, Any]]:
        """Before anything is drawn."""
        if self.asked.chat:
            yield self._chunk({"delta": {"role": "assistant", "content": ""}})
        elif self.asked.echo and self.asked.top is None:
            yield self._chunk({"text": self.asked.echoes[self.prompt]})

    def more(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """What can be shown now and could not before."""
        work, tokens = self.asked.works[self.prompt], piece.tokens.tolist()
        if tokens and tokens[-1] in work.stop_ids:  # most likely the end, which has no text
            tokens.pop()
        text = text_of(self.asked.served.tokenizer, tokens, work.sampling.stop)
        yield from self._new(text, whole=False)

    def last(self, ended: Ended) -> Iterator[dict[str, Any]]:
        """The rest, then why it ended. With log-probs all of it comes now: they are those of the whole text."""
        finish, own = {"finish_reason": finish_of(ended)}, "" if ended.completion is None else ended.completion.text
        if self.asked.top is None:
            yield from self._new(own, whole=True)
            yield self._chunk({"delta": {}} if self.asked.chat else {"text": ""}) | finish
            return
        choice = whole_choice(self.asked, self.index, self.prompt, ended)
        if self.asked.chat:
            message = choice.pop("message")
            choice["delta"] = {k: v for k, v in message.items() if k not in ("role", "refusal")}
        yield choice

    def _new(self, text: str, *, whole: bool) -> Iterator[dict[str, Any]]:
        parts = self.asked.parts(self.prompt, text, whole=whole)
        for name, value in (("reasoning_content", parts.reasoning or ""), ("content", parts.content)):
            if new := value[self.sent.get(name, 0) :]:
                self.sent[name] = len(value)
                yield self._chunk({"delta": {name: new}} if self.asked.chat else {"text": new})

    def _chunk(self, content: Mapping[str, Any]) -> dict[str, Any]:
        return {"index": self.index, "logprobs": None, "finish_reason": None, **content}


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
