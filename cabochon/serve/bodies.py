"""What a client may ask: the two request bodies, checked, and the errors in OpenAI's shape.

A key that is not known is refused rather than passed over, and so is one this server cannot honour, unless it has the
value that changes nothing. `null` is the same as leaving a key out.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cabochon.rollouts.score import TOP

PASSED_OVER = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
"""keys of OpenAI's API that change nothing here"""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
"""keys this server does not honour, with the values that ask for nothing"""


class ApiError(Exception):
    """An answer that is no completion: HTTP status, and OpenAI's error object."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        kind = "server_error" if status >= 500 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def shown(text: str) -> str:
    """A client's words as an answer repeats them: short, on one line, nothing that commands a terminal."""
    safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:61])
    return safe if len(safe) <= 60 else safe[:59] + "…"


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
B = TypeVar("B", bound="Body")


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False
    """a last chunk without choices that counts tokens"""
    include_obfuscation: Literal[False] = False
    """padding that hides the lengths of chunks; there is none here"""

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class Body(BaseModel):
    """What both endpoints take. `top_k`, `min_p`, `stop_token_ids`, `ignore_eos` and `thinking_budget` are ours."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str | None = None
    """the one that is served, where it is left out"""
    n: int = Field(1, ge=1, lt=2**31)
    seed: int | None = None
    """a random one by default"""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: str | list[str] = []
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    logit_bias: dict[str, float] = {}
    thinking_budget: int | None = Field(None, ge=0, lt=2**31)
    """tokens between <think> and </think> before the close tag is forced"""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for key, values in NEUTRAL.items():
            if data.get(key) is not None and data[key] not in values:
                raise ValueError(f"{key} is not supported by this server; leave it out")
        if data.get("top_k") == -1:  # off, in vLLM's words
            data = data | {"top_k": 0}
        kept = {k: v for k, v in data.items() if v is not None and k not in PASSED_OVER}
        return {k: v for k, v in kept.items() if k in cls.model_fields or k not in NEUTRAL}

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    """as `max_tokens`, and wins over it"""
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=TOP)
    chat_template_kwargs: dict[str, Any] = {}
    """names the model's chat template reads, such as `{"enable_thinking": false}`"""

    @model_validator(mode="after")
    def _check(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def plain_messages(self) -> list[dict[str, Any]]:
        """Contents given in parts as one text. Raises ApiError for a part that is not text."""
        out = []
        for i, message in enumerate(self.messages):
            content = message.get("content")
            if isinstance(content, list):
                texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
                if not all(isinstance(text, str) for text in texts):
                    raise ApiError(400, f"messages[{i}].content: this model reads text only", param="messages")
                message = message | {"content": "".join(map(str, texts))}
            elif not isinstance(content, str | None):
                raise ApiError(400, f"messages[{i}].content: expected text or parts of text", param="messages")
            out.append(message)
        return out


class CompletionBody(Body):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    """one prompt or several, as text or as token ids"""
    max_tokens: int = Field(16, ge=0, lt=2**31)
    """0 only with `echo`: the prompt is scored and nothing drawn"""
    echo: bool = False
    """the answer begins with the prompt, in its log-probs too"""
    logprobs: int | None = Field(None, ge=0, le=TOP)

    @model_validator(mode="after")
    def _check(self) -> CompletionBody:
        if not self.prompt and self.prompt != "":
            raise ValueError("prompt is an empty list; give at least one")
        if self.max_tokens == 0 and not (self.echo and self.n == 1):
            raise ValueError("max_tokens=0 draws nothing: it needs echo, and n=1")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        given: Any = self.prompt
        one = isinstance(given, str) or isinstance(given[0], int)
        return [given] if one else list(given)


def parse(kind: type[B], raw: bytes) -> B:
    """Raises ApiError (400) that names the key."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        known = kind.model_fields.keys() | StreamOptions.model_fields.keys()
        names = [str(part) for part in first["loc"] if str(part) in known or isinstance(part, int)]
        param = ".".join(names) or None
        if first["type"] == "json_invalid":
            said = first["ctx"]["error"]
            if "escape" in said:  # valid JSON may have halves of pairs, and they are no text
                said += r"; of a pair such as \ud83d\ude00 both halves must be there"
            raise ApiError(400, f"the body is not JSON text: {said}") from None
        if first["type"] == "extra_forbidden":
            key = shown(".".join(map(str, first["loc"])))
            near = difflib.get_close_matches(str(first["loc"][-1])[:60], kind.model_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ApiError(400, f"unknown key {key}{hint}", param=key, code="unknown_parameter") from None
        said = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if first["type"] == "value_error":
            raise ApiError(400, said, param=param) from None
        got = shown(repr(first["input"]))
        raise ApiError(400, f"{param or 'the body'}: {said}, got {got}", param=param) from None
