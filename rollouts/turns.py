"""What stands between two turns, and how turns become one Completion. Pure; the loop is in `environment`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from cabochon.chat import render_chat
from cabochon.errors import UserError
from cabochon.tokenizer import Tokenizer
from cabochon.types import Completion, Message, Span, Timings


def between_turns(
    tokenizer: Tokenizer,
    before: Sequence[Message],
    last: int,
    observation: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> np.ndarray:
    """[N] int32: what follows a sampled turn up to the next one: the end of the turn where the policy did not write it,
    the observation, and the opening of the assistant's turn.

    `before` is the conversation up to the turn, `last` the last id drawn. Raises UserError where the template leaves
    out what an assistant says, or refuses the observation.
    """
    mark = "TURN"
    while mark in repr((before, observation)):
        mark += "N"
    text = render_chat(
        tokenizer,
        [*before, {"role": "assistant", "content": mark}, *observation],
        tools=tools,
        add_generation_prompt=True,
    )
    _, found, tail = text.rpartition(mark)
    if not found:
        source = tokenizer.templates["default"].source
        raise UserError(f"{source}: the chat template leaves out the assistant's text, so turns cannot follow it")
    end = tokenizer.token(last) if last in tokenizer.eos_ids else None
    if end is not None and tail.lstrip().startswith(end):
        # kept in front while encoding: some tokenizers spell a text otherwise where it begins
        return np.array(tokenizer.encode(tail[tail.index(end) :])[1:], np.int32)
    return np.array(tokenizer.encode(tail), np.int32)


HERMES = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{schemas}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""Qwen's wording, for templates that have none."""


def show_tools(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[Message], list[Mapping[str, Any]] | None]:
    """(messages, tools for the template). A template that ignores tools gets them as text in the system message."""
    if not tools:
        return list(messages), None
    plain, told = (render_chat(tokenizer, messages, tools=t) for t in (None, tools))
    if plain != told:
        return list(messages), list(tools)
    text = HERMES.format(schemas="\n".join(json.dumps(t, ensure_ascii=False) for t in tools))
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]], None
    return [{"role": "system", "content": text}, *messages], None


def readable(tokenizer: Tokenizer, message: Message, limit: int) -> Message:
    """A message of the environment as the policy may see it: every text in it clipped and defused."""
    text = {key: defused(tokenizer, clipped(value, limit)) for key, value in message.items() if isinstance(value, str)}
    return cast(Message, {**message, **text})


def clipped(text: str, limit: int) -> str:
    """At most `limit` characters and a note of how many are left out, from the middle: errors stand at the end."""
    if len(text) <= limit:
        return text
    head = limit - limit // 2
    tail = text[len(text) - limit // 2 :] if limit > 1 else ""
    return f"{text[:head]}\n[{len(text) - limit} characters left out]\n{tail}"


def defused(tokenizer: Tokenizer, text: str) -> str:
    """The text with special tokens broken up, so that what a tool prints cannot open or end a turn; and encodable."""
    text = text.encode("utf-8", "replace").decode()
    for token in tokenizer.core.get_added_tokens_decoder().values():
        if token.special and len(token.content) > 1 and token.content in text:
            text = text.replace(token.content, f"{token.content[0]} {token.content[1:]}")
    return text


def joined(whole: Completion, context: np.ndarray, turn: Completion) -> Completion:
    """Turns so far, context, and a further turn.

    Routes: a turn's own were recorded as its tokens ran. Its last token and the context ran as part of the next prompt.
    """
    at, gap = len(whole.tokens), len(context)

    def with_gap(a: np.ndarray, b: np.ndarray, fill: int = 0) -> np.ndarray:
        return np.concatenate([a, np.full(gap, fill, a.dtype), b])

    raw = routes = None
    if whole.raw_logprobs is not None and turn.raw_logprobs is not None:
        raw = with_gap(whole.raw_logprobs, turn.raw_logprobs)
    if whole.routes is not None and turn.routes is not None and turn.prompt_routes is not None:
        between = turn.prompt_routes[len(turn.prompt_routes) - gap - 1 :]
        routes = np.concatenate([whole.routes[:-1], between, turn.routes])

    def moved(span: Span | None) -> Span | None:
        return None if span is None else (span[0] + at + gap, span[1] + at + gap)

    return replace(
        turn,
        tokens=np.concatenate([whole.tokens, context, turn.tokens]),
        logprobs=with_gap(whole.logprobs, turn.logprobs),
        raw_logprobs=raw,
        mask=with_gap(whole.mask, turn.mask),
        policy_version=with_gap(whole.policy_version, turn.policy_version, int(whole.policy_version[-1])),
        routes=routes,
        prompt_routes=whole.prompt_routes,
        thinking=moved(turn.thinking),
        answer=moved(turn.answer),
        timings=_added(whole.timings, turn.timings),
    )


def _added(a: Timings | None, b: Timings | None) -> Timings | None:
    if a is None or b is None:
        return None
    return Timings(queued=a.queued + b.queued, prefill=a.prefill + b.prefill, decode=a.decode + b.decode)


def nothing(prompt: np.ndarray) -> Completion:
    """Of an episode that ended before its first token."""
    none = np.zeros(0, np.float32)
    ints = np.zeros(0, np.int32)
    return Completion(
        tokens=ints, logprobs=none, mask=np.zeros(0, bool), text="", finish="abort", policy_version=ints,
        prompt_tokens=prompt,
    )  # fmt: skip
