"""Tools a policy may call, and the environment that answers its calls.

A call is JSON between tags, as Hermes and Qwen write it:

    <tool_call>{"name": "calculator", "arguments": {"expression": "2 + 2"}}</tool_call>

Whatever goes wrong with it (no JSON, no such tool, wrong arguments, an exception, no answer in time) is an observation
the policy can read and correct. Only a MachineError passes through: a sandbox that is gone is not the policy's doing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import jsonschema

from cabochon.errors import MachineError, UserError
from cabochon.rollouts.calculator import evaluate
from cabochon.rollouts.environment import Step, within
from cabochon.types import Message, Task


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function the policy may call.

    Example: `Tool(name="now", description="The time", parameters={"type": "object"}, run=lambda: time.ctime())`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object"""
    run: Callable[..., object]
    """called with the arguments by name; text goes back as it is, anything else as JSON"""
    seconds: float = 10.0
    """waited for an answer; afterwards the policy reads that there was none"""

    def __post_init__(self) -> None:
        try:
            jsonschema.Draft202012Validator.check_schema(dict(self.parameters))
        except jsonschema.SchemaError as error:
            raise UserError(f"tool {self.name}: parameters are not a JSON schema: {error.message}") from None

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates and the OpenAI API take it."""
        about = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": about}


class Call(NamedTuple):
    """One call as the policy wrote it; `error` says what is wrong with it, empty where nothing is."""

    name: str
    arguments: dict[str, Any]
    error: str = ""


OPEN, CLOSE = "<tool_call>", "</tool_call>"


def calls_in(text: str) -> list[Call]:
    """The calls of one turn, in order. What stands in `<think>` is not a call."""
    said = text.rpartition("</think>")[2]
    if "<think>" in said:
        said = said.partition("<think>")[0]
    found: list[Call] = []
    at = 0
    while (start := said.find(OPEN, at)) >= 0:
        end = said.find(CLOSE, start)
        if end < 0:
            return [*found, Call("", {}, f"{OPEN} without {CLOSE}; write the call again, whole")]
        found.append(_call(said[start + len(OPEN) : end]))
        at = end + len(CLOSE)
    return found


def _call(body: str) -> Call:
    form = 'expected {"name": "...", "arguments": {...}}'
    try:
        data = json.loads(body, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        return Call("", {}, f"the call is not JSON ({error}); {form}")
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return Call("", {}, f"the call has no name; {form}")
    arguments = data.get("arguments", data.get("parameters", {}))
    if not isinstance(arguments, dict):
        return Call(data["name"], {}, f"the arguments are no JSON object; {form}")
    return Call(data["name"], arguments)


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


class ToolEnvironment:
    """A conversation in which the policy may call tools. A turn without a call is its answer and ends the episode.

    Example: `run_episodes(engine, tokenizer, lambda task: ToolEnvironment([calculator()]), tasks, sampling, seeds)`.
    """

    def __init__(self, tools: Sequence[Tool], *, system: str = "", calls_per_turn: int = 4):
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            names = [tool.name for tool in tools]
            raise UserError(f"two tools are called {next(n for n in names if names.count(n) > 1)!r}")
        self.system, self.calls_per_turn = system, calls_per_turn

    @property
    def tools(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self._tools.values()]

    def reset(self, task: Task) -> list[Message]:
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        if isinstance(task.prompt, str):
            return [*opening, {"role": "user", "content": task.prompt}]
        return [*opening, *task.prompt]

    def step(self, text: str) -> Step:
        calls = calls_in(text)
        if not calls:
            return Step(done=True)
        said: list[Message] = []
        for i, call in enumerate(calls):
            late = f"not run: at most {self.calls_per_turn} calls in a turn"
            content = self._run(call) if i < self.calls_per_turn else f"error: {late}"
            said.append({"role": "tool", "name": call.name, "content": content})
            if i == self.calls_per_turn:  # told once
                break
        return Step(observation=tuple(said))

    def close(self) -> None:
        """Nothing is held."""

    def _run(self, call: Call) -> str:
        tool = self._tools.get(call.name)
        if call.error:
            return f"error: {call.error}"
        if tool is None:
            return f"error: no tool is called {call.name!r}; there are: {', '.join(self._tools) or 'none'}"
        wrong = jsonschema.Draft202012Validator(dict(tool.parameters)).iter_errors(call.arguments)
        if (first := next(iter(wrong), None)) is not None:
            return f"error: {tool.name}: {'.'.join(map(str, first.path)) or 'arguments'}: {first.message}"
        try:
            out = within(tool.seconds, lambda: tool.run(**call.arguments))
            return out if isinstance(out, str) else json.dumps(out, ensure_ascii=False, default=str)
        except MachineError:
            raise
        except TimeoutError:
            return f"error: {tool.name} gave no answer within {tool.seconds:g} s"
        except Exception as error:  # a tool may raise anything; the policy reads it
            return f"error: {type(error).__name__}: {error}"


# -- shipped tools -----------------------------------------------------------------------------------------------------


def calculator() -> Tool:
    """Arithmetic; see `cabochon.rollouts.calculator`."""
    return Tool(
        name="calculator",
        description="Evaluate an arithmetic expression, for example (3 + 4) * 2 ** 5 / sqrt(2).",
        parameters={
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "the expression"}},
            "required": ["expression"],
            "additionalProperties": False,
        },
        run=evaluate,
        seconds=5.0,
    )


class Ran(Protocol):
    """How a program ended, as a Sandbox says it."""

    @property
    def status(self) -> str: ...
    @property
    def stdout(self) -> bytes: ...
    @property
    def stderr(self) -> bytes: ...
    @property
    def detail(self) -> str: ...


def python(run: Callable[[str], Ran], seconds: float = 60.0) -> Tool:
    """Python programs, each in a sandbox of its own. `run` takes the source and bounds the run; `seconds` is how long
    it is waited for, queueing included.

    Example: `python(python_runner(sandbox_named("bubblewrap")))`, both of `cabochon.verifiers.build`.
    """

    def ran(code: str) -> str:
        result = run(code)
        parts = [result.stdout.decode("utf-8", "replace")]
        if result.status != "ok":
            parts.append(result.stderr.decode("utf-8", "replace"))
            parts.append(f"[{result.status}{': ' if result.detail else ''}{result.detail}]")
        said = "\n".join(part.strip("\n") for part in parts if part.strip())
        return said or "[no output: print what you want to see]"

    return Tool(
        name="python",
        description="Run a Python program and read what it prints. Nothing is kept from one call to the next.",
        parameters={
            "type": "object",
            "properties": {"code": {"type": "string", "description": "the program"}},
            "required": ["code"],
            "additionalProperties": False,
        },
        run=ran,
        seconds=seconds,
    )
