"""`cabochon generate` and `cabochon chat`: plain functions with typer's annotations, registered by the roof."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cabochon.errors import UserError
from cabochon.files import encodable

if TYPE_CHECKING:
    import numpy as np

    from cabochon.rollouts.local import LocalEngine
    from cabochon.tokenizer import Tokenizer
    from cabochon.types import Completion, Message, Prompt, Request, Sampling

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="a directory, a .gguf file, hf:owner/name or smollm2-135m-instruct")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="new tokens at most")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")]
TopK = Annotated[int, typer.Option(min=0, help="0 for all")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="1 for all")]
MinP = Annotated[float, typer.Option(min=0.0, max=1.0, help="least probability, as a part of the greatest; 0 for all")]
Seed = Annotated[int, typer.Option(help="the same seed gives the same text")]
Stop = Annotated[list[str] | None, typer.Option(help="end before this text; may be given several times")]
Budget = Annotated[int | None, typer.Option(min=0, help="tokens between <think> and </think>, then it is closed")]
Context = Annotated[int, typer.Option(min=16, help="prompt and completion together, in tokens")]

READ_AT_ONCE = 8
"""rows of a file that run together"""


def generate_command(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue; may be given several times")] = None,
    file: Annotated[Path | None, typer.Option(help="JSONL: a `prompt` in each row, text or a list of messages")] = None,
    out: Annotated[Path | None, typer.Option(help="write a JSON row per completion here instead of the text")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put each text through the model's chat template")] = False,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="completions of each prompt")] = 1,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    stop: Stop = None,
    thinking: Budget = None,
    context: Context = 2048,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="a table of each token's log-probabilities")] = False,
) -> None:
    """Continue prompts; one alone is shown as it is written.

    Example: cabochon generate smollm2-135m-instruct --chat --prompt "What is 2 + 2?" --temperature 0
    """
    from cabochon.chat import as_turns
    from cabochon.rollouts.local import requests_for

    prompts = [*(prompt or []), *(_rows(file) if file else [])]
    if not prompts:
        raise UserError('nothing to continue; give --prompt "some text" or --file prompts.jsonl')
    prompts = [as_turns(p, chat) for p in prompts]
    sampling = _sampling(max_tokens, temperature, top_k, top_p, min_p, stop, thinking, n)
    requests = requests_for(prompts, sampling, seed)
    alone = len(requests) * n == 1
    engine, tokenizer = _open(model, 1 if alone else min(READ_AT_ONCE, max(2, len(requests) * n)), context)
    if alone and out is None:
        start = time.monotonic()
        completions = [_stream(engine, tokenizer, requests[0])]
    else:
        start = time.monotonic()
        completions = engine.generate(requests)
        _write(requests, completions, n, out)
    if logprobs:
        for completion in completions:
            print(_table(tokenizer, completion))
    _report(completions, time.monotonic() - start)


def chat_command(
    model: Model,
    system: Annotated[str | None, typer.Option(help="a system message to begin with")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    thinking: Budget = None,
    context: Context = 2048,
) -> None:
    """Talk with a model; an empty line or Ctrl-D ends it.

    Example: cabochon chat smollm2-135m-instruct --system "Answer in one sentence."
    """
    from cabochon.types import Request

    sampling = _sampling(max_tokens, temperature, top_k, top_p, min_p, None, thinking, 1)
    engine, tokenizer = _open(model, 1, context)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn, line in enumerate(_lines()):
        messages.append({"role": "user", "content": line})
        completion = _stream(engine, tokenizer, Request(prompt=list(messages), sampling=sampling, seed=seed + turn))
        messages.append({"role": "assistant", "content": completion.text})


def _lines() -> Iterator[str]:
    """What the user types, until an empty line or the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _sampling(
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    stop: Sequence[str] | None,
    thinking: int | None,
    n: int,
) -> Sampling:
    from cabochon.types import Sampling, Thinking

    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=tuple(stop or ()),
        n=n,
        thinking=None if thinking is None else Thinking(max_tokens=thinking),
    )


def _open(model: str, slots: int, context: int) -> tuple[LocalEngine, Tokenizer]:
    from cabochon.model.address import open_language_model
    from cabochon.protocols import Weights
    from cabochon.rollouts.local import LocalEngine
    from cabochon.rollouts.slots import SlotConfig

    config, params, tokenizer = open_language_model(model)
    cfg = SlotConfig(slots=slots, length=min(context, config.max_positions), steps=4 if slots == 1 else 8)
    return LocalEngine(config, tokenizer, Weights(version=0, params=params), cfg), tokenizer


def _rows(file: Path) -> list[Prompt]:
    """The prompts of a JSONL file. Raises UserError naming the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: not JSON: {error.msg} at column {error.colno}") from None
        found = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(found, str | list):
            raise UserError(f'{file}:{number}: expected an object with "prompt", text or a list of messages')
        prompts.append(found)
    return prompts


def _stream(engine: LocalEngine, tokenizer: Tokenizer, request: Request) -> Completion:
    """Run one request, showing its text as it comes; what could still become a stop string is held back."""
    shown = 0

    def show(text: str) -> None:
        nonlocal shown
        if len(text) > shown:
            print(text[shown:], end="", flush=True)
            shown = len(text)

    stop = request.sampling.stop
    completion = engine.generate([request], _watcher(tokenizer, stop, show))[0]
    show(completion.text)
    print()
    return completion


def _watcher(
    tokenizer: Tokenizer, stop: Sequence[str], show: Callable[[str], None]
) -> Callable[[int, int, np.ndarray], None]:
    from cabochon.rollouts.prompts import text_of

    held = max((len(s) - 1 for s in stop), default=0)

    def watch(index: int, sample: int, tokens: np.ndarray) -> None:
        text = text_of(tokenizer, tokens.tolist(), stop).rstrip("\ufffd")  # half a character: wait for the rest
        show(text[: len(text) - held])

    return watch


def _write(requests: Sequence[Request], completions: Sequence[Completion], n: int, out: Path | None) -> None:
    """Completions as JSON rows in a file, or as text under a heading each."""
    if out is None:
        for i, completion in enumerate(completions):
            print(f"--- {i // n}.{i % n} ({completion.finish}, {len(completion.tokens)} tokens)\n{completion.text}")
        return
    with out.open("w", encoding="utf-8") as file:
        for i, c in enumerate(completions):
            row = {
                "prompt": requests[i // n].prompt,
                "sample": i % n,
                "completion": c.text,
                "finish": c.finish,
                "tokens": c.tokens.tolist(),
                "logprobs": [round(float(x), 6) for x in c.logprobs],
            }
            file.write(encodable(json.dumps(row, ensure_ascii=False)) + "\n")


def _table(tokenizer: Tokenizer, completion: Completion) -> str:
    """One line per token: id, text, log-prob as sampled, log-prob under the policy; forced tokens are marked."""
    lines = [f"{'id':>7}  {'token':20} {'sampled':>9} {'policy':>9}"]
    raw = completion.logprobs if completion.raw_logprobs is None else completion.raw_logprobs
    for token, logp, policy, own in zip(completion.tokens, completion.logprobs, raw, completion.mask, strict=True):
        text = repr(tokenizer.decode([token]))[1:-1][:20]
        numbers = f"{logp:9.4f} {policy:9.4f}" if own else f"{'forced':>9} {'':9}"
        lines.append(f"{token:7d}  {text:20} {numbers}")
    return "\n".join(lines)


def _report(completions: Sequence[Completion], seconds: float) -> None:
    """One line on stderr."""
    tokens = sum(len(c.tokens) for c in completions)
    rate = f"{tokens / seconds:.1f} tokens/s, compile included"
    many = "s" if len(completions) > 1 else ""
    print(f"{len(completions)} completion{many}, {tokens} tokens in {seconds:.1f} s ({rate})", file=sys.stderr)
