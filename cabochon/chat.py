"""Conversations to text and token ids through a model's own chat template, and which tokens the assistant wrote.

A template is a program that came with the model. It runs in jinja2's immutable sandbox, sees only plain data, and
reaches no attribute, file or module; nothing bounds its time or memory, so a model's template is trusted that far.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np

from cabochon.errors import UserError
from cabochon.tokenizer import TemplateText, Tokenizer
from cabochon.types import Prompt

Span = tuple[int, int]
"""`[start, end)` in characters"""


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedChat:
    """A whole conversation as tokens.

    Example (ChatML): `hi` answered by `yo` gives the ids of
    `<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nyo<|im_end|>` and a mask True on `yo<|im_end|>` alone.
    """

    ids: np.ndarray
    """[T] int32"""
    mask: np.ndarray
    """[T] bool: tokens with at least one character of an assistant turn"""
    straddling: tuple[int, ...]
    """Indices of tokens that hold characters from both sides of a turn's edge, because the tokenizer merged across it.
    They are in the mask, as in transformers; a sampler, whose prompt ends at the edge, would spell them otherwise."""


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the model's template writes it.

    `tools` are JSON schemas; a `tool_use` template is taken where there is one. `add_generation_prompt` opens the
    assistant's turn. `variables` are further names the template reads, such as `{"enable_thinking": False}`; one that
    writes today's date (Llama 3.1) can be pinned with `{"date_string": ...}`.

    Raises:
        UserError: no template, a template that does not parse or that refuses the conversation (names its file).
    """
    return _Chat(tokenizer, tools, variables).render(messages, add_generation_prompt)


def as_turns(prompt: Prompt, chat: bool) -> Prompt:
    """What a policy is asked: with `chat`, text is what a user says, so that it goes through the chat template."""
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of `render_chat`. Nothing is added around it: the template itself writes beginning-of-text."""
    return tokenizer.encode(_Chat(tokenizer, tools, variables).render(messages, add_generation_prompt))


def encode_chat_with_mask(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> MaskedChat:
    """A whole conversation and which of its tokens the assistant wrote.

    Where the template marks them (`{% generation %}`), the marks say. Elsewhere an assistant turn is what follows the
    prompt a sampler would be given, up to the end of the turn: the difference between two renderings, usually with the
    line break after the end-of-turn token. The text is tokenised once, whole, and characters are mapped to tokens.

    Raises:
        UserError: as `render_chat`; turns that cannot be told apart, because the template rewrites earlier ones.
    """
    chat = _Chat(tokenizer, tools, variables)
    text, spans = chat.assistant_spans(messages)
    ids, offsets = tokenizer.encode_with_offsets(text)
    inside = np.zeros(len(text) + 2, np.int64)
    for start, end in spans:
        inside[start + 1 : end + 1] = 1
    before = inside.cumsum()  # assistant characters before each place
    edges = np.array(offsets, np.int64).reshape(-1, 2)
    first, last = edges[:, 0], np.maximum(edges[:, 1], edges[:, 0] + 1)  # no characters: goes with what follows
    count = before[last] - before[first]
    straddling = np.flatnonzero((count > 0) & (count < last - first))
    return MaskedChat(ids=np.array(ids, np.int32), mask=count > 0, straddling=tuple(straddling.tolist()))


class _Chat:
    """One tokenizer's template with the tools and variables of one call."""

    def __init__(
        self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None, variables: Mapping[str, Any] | None
    ) -> None:
        self.template = _choose(tokenizer, tools is not None)
        self.names: dict[str, Any] = {**tokenizer.special, "documents": None, "tools": _plain(tools, "tools")}
        for name, value in (variables or {}).items():
            if name in ("messages", "tools", "add_generation_prompt"):
                raise UserError(f"chat template variable {name!r} is set by the call itself; pass other names")
            self.names[name] = _plain(value, name)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        return self._render(messages, add_generation_prompt, _Marks())

    def assistant_spans(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
        marks = _Marks()
        text = self._render(messages, False, marks)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not _compile(self.template.text)[1]:
            return text, [self._span(messages, i, text) for i in turns]
        if turns and not any(marked for _, marked in marks.found):
            self._fail("has {% generation %} marks but none around the assistant turns of this conversation")
        for start, marked in marks.found:
            if not text.startswith(marked, start):
                self._fail("has {% generation %} marks inside a captured block, so their place is not known")
        return text, [(start, start + len(marked)) for start, marked in marks.found]

    def _span(self, messages: Sequence[Mapping[str, Any]], turn: int, text: str) -> Span:
        """Where assistant message `turn` lies in `text`, by rendering up to it and up to its end."""
        advice = "use a template with {% generation %} marks, or conversations of one assistant turn, the last"
        if turn == 0:
            self._fail(f"has no {{% generation %}} marks and the conversation opens with the assistant; {advice}")
        before = self._render(messages[:turn], True, _Marks())
        after = self._render(messages[: turn + 1], False, _Marks()) if turn + 1 < len(messages) else text
        for part in (before, after):
            if not text.startswith(part):
                at = next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), len(text))
                change = f"{part[at : at + 20]!r} becomes {text[at : at + 20]!r}"
                self._fail(
                    f"writes message {turn} otherwise when more follows ({change}), "
                    f"so its tokens cannot be told from the rest; {advice}"
                )
        if len(after) <= len(before):
            self._fail(f"writes nothing for assistant message {turn} after the generation prompt; {advice}")
        return len(before), len(after)

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, marks: _Marks) -> str:
        if not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise UserError(f"a conversation is a list of messages with a role, got {_shorten(messages)}")
        plain = _plain([_message(m) for m in messages], "messages")
        try:
            template, _ = _compile(self.template.text)
            with marks.collecting():
                for piece in template.generate(
                    self.names | {"messages": plain, "add_generation_prompt": add_generation_prompt}
                ):
                    marks.write(piece)
        except jinja2.TemplateSyntaxError as error:
            self._fail(f"does not parse: line {error.lineno}: {error.message}")
        except Exception as error:  # a template may raise anything, through what it does to the data
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            self._fail(f"refused the conversation: {kind}{error}")
        return marks.text

    def _fail(self, reason: str) -> NoReturn:
        raise UserError(" ".join(f"{self.template.source}: the chat template {reason}".split()))


class _Marks:
    """The text written so far and the `{% generation %}` blocks met in it."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self.found: list[tuple[int, str]] = []
        """(first character, text) of each block"""

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def write(self, piece: str) -> None:
        self._pieces.append(piece)
        self._length += len(piece)

    def mark(self, block: str) -> None:
        self.found.append((self._length, block))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: ContextVar[_Marks] = ContextVar("marks")


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: writes its body, and notes where it stands."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: jinja2.runtime.Macro) -> str:
        block = caller()
        _CURRENT.get().mark(block)
        return block


class _Namespace(jinja2.utils.Namespace):
    """jinja's `namespace`, without names that begin with an underscore."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace may not hold {name!r}")
        super().__setitem__(name, value)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _dict(*args: Any, **items: Any) -> dict[Any, Any]:
    return dict(*args, **items)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: jinja's own would escape `<`, `>` and `&` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=64)
def _compile(text: str) -> tuple[jinja2.Template, bool]:
    """The compiled template, and whether it has generation marks."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _dict, "namespace": _Namespace}
    marked = any(
        isinstance(node.call, jinja2.nodes.Call)
        and isinstance(node.call.node, jinja2.nodes.ExtensionAttribute)
        for node in env.parse(text).find_all(jinja2.nodes.CallBlock)
    )
    return env.from_string(text), marked


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers prepares it. A key of None means absent: templates test for presence, and would write `None`.
    Reasoning goes by several names in data and in templates: it is given under those that templates read."""
    out = {k: v for k, v in message.items() if v is not None}
    reasoning = next((out[k] for k in ("reasoning_content", "thinking", "reasoning") if k in out), None)
    return out if reasoning is None else {"thinking": reasoning, **out, "reasoning_content": reasoning}


def _choose(tokenizer: Tokenizer, with_tools: bool) -> TemplateText:
    templates = tokenizer.templates
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        have = f"only templates named {', '.join(templates)}" if templates else "no chat template"
        raise UserError(f"{tokenizer.source}: {have}; add chat_template.jinja, or use prompts that are plain text")
    return templates["default"]


def _plain(value: Any, where: str) -> Any:
    """A copy made of plain JSON types: a richer object would have methods that the sandbox does not know."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
        case Sequence() if not isinstance(value, bytes):
            return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise UserError(f"{where} is a {type(value).__name__}; a chat template takes text, numbers, lists and mappings")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
