"""Calls as models write them, good and bad; whatever a tool does is something the policy can read."""

import json
import os
import time

import pytest
from clock import shortest

from cabochon.errors import MachineError, UserError
from cabochon.rollouts.environment import Environment
from cabochon.rollouts.tools import Tool, ToolEnvironment, calculator, calls_in, python
from cabochon.types import Task
from cabochon.verifiers.build import python_runner, sandbox_named
from cabochon.verifiers.sandbox.base import Limits
from cabochon.verifiers.sandbox.process import ProcessSandbox
from cabochon.verifiers.sandbox.testing import sandbox

ANY = {"type": "object"}


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def answer(tools, text):
    """Contents of what the policy is shown after `text`."""
    step = ToolEnvironment(tools).step(text)
    assert not step.done
    assert step.reward is None
    assert all(message["role"] == "tool" for message in step.observation)
    return [message["content"] for message in step.observation]


def test_calls_are_read_in_order():
    text = f"Let me see. {call('a', x=1)} and {call('b')}\n"
    assert calls_in(text) == [("a", {"x": 1}, ""), ("b", {}, "")]
    assert calls_in('<tool_call>{"name": "a", "parameters": {"x": 2}}</tool_call>') == [("a", {"x": 2}, "")]
    assert calls_in("no call") == []


def test_a_flood_of_openings_takes_no_time():
    def read():
        assert len(calls_in("<tool_call>" * 100_000)) == 1
        assert len(calls_in("<tool_call></tool_call>" * 20_000)) == 20_000

    assert shortest(2, read) < 2


def test_thoughts_of_a_call_are_no_call():
    assert calls_in(f"<think>{call('a')}</think>done") == []
    assert calls_in(f"<think>maybe {call('a')}") == []
    assert calls_in(f"{call('a')}</think>{call('b')}") == [("b", {}, "")]
    assert calls_in(f"{call('a')}<think>hm") == [("a", {}, "")]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("2 + 2", "is not JSON"),
        ("[1]", "no name"),
        ('{"arguments": {}}', "no name"),
        ('{"name": 3}', "no name"),
        ('{"name": "calculator", "arguments": "2 + 2"}', "no JSON object"),
        ('{"name": "calculator", "arguments": {"expression": NaN}}', "NaN is not a number"),
        ("[" * 100_000, "is not JSON"),
        ('{"name": "calculator", "arguments": {"expression": 2}}', "expression: 2 is not of type 'string'"),
        ('{"name": "calculator", "arguments": {}}', "'expression' is a required property"),
        ('{"name": "calculator", "arguments": {"expression": "1", "y": 1}}', "'y' was unexpected"),
        ('{"name": "calculater", "arguments": {}}', "no tool is called 'calculater'; there are: calculator"),
        ('{"name": "calculator", "arguments": {"expression": "9**9**9"}}', "more than 4096 bits"),
    ],
)
def test_a_bad_call_is_an_observation(body, why):
    (content,) = answer([calculator()], f"<tool_call>{body}</tool_call>")
    assert content.startswith("error: ")
    assert why in content


def test_a_call_left_open_is_an_observation():
    first, second = answer([calculator()], call("calculator", expression="1 + 1") + '<tool_call>{"name": "calc')
    assert first == "2"
    assert "<tool_call> without </tool_call>" in second


def test_a_tool_that_fails_hangs_or_returns_something_else():
    def fails(**_):
        raise KeyError("lost")

    tools = [
        Tool(name="fails", description="", parameters=ANY, run=fails),
        Tool(name="hangs", description="", parameters=ANY, run=lambda: time.sleep(60), seconds=0.1),
        Tool(name="data", description="", parameters=ANY, run=lambda: {"a": [1, 2.5]}),
        Tool(name="exits", description="", parameters=ANY, run=lambda: [].pop()),
    ]
    start = time.monotonic()
    assert answer(tools, call("fails") + call("hangs") + call("data") + call("exits")) == [
        "error: KeyError: 'lost'",
        "error: hangs gave no answer within 0.1 s",
        '{"a": [1, 2.5]}',
        "error: IndexError: pop from empty list",
    ]
    assert time.monotonic() - start < 30


def test_a_machine_that_fails_is_not_an_observation():
    def gone():
        raise MachineError("the sandbox is gone")

    with pytest.raises(MachineError, match="the sandbox is gone"):
        ToolEnvironment([Tool(name="t", description="", parameters=ANY, run=gone)]).step(call("t"))


def test_calls_beyond_the_limit_are_not_run():
    ran = []
    tool = Tool(name="t", description="", parameters=ANY, run=lambda x: ran.append(x) or "ok")
    step = ToolEnvironment([tool], calls_per_turn=2).step("".join(call("t", x=i) for i in range(9)))
    assert [m["content"] for m in step.observation] == ["ok", "ok", "error: not run: at most 2 calls in a turn"]
    assert ran == [0, 1]


def test_the_environment():
    env = ToolEnvironment([calculator()], system="Use tools.")
    assert isinstance(env, Environment)
    assert env.tools[0]["function"]["parameters"]["required"] == ["expression"]
    task = Task(id="t", prompt="2 + 2?", verifier="math")
    assert env.reset(task) == [{"role": "system", "content": "Use tools."}, {"role": "user", "content": "2 + 2?"}]
    chat = Task(id="t", prompt=[{"role": "user", "content": "hi"}], verifier="math")
    assert ToolEnvironment([]).reset(chat) == [{"role": "user", "content": "hi"}]
    assert env.step("It is four.").done


def test_unusable_tools():
    with pytest.raises(UserError, match="tool t: parameters are not a JSON schema"):
        Tool(name="t", description="", parameters={"type": 3}, run=str)
    with pytest.raises(UserError, match="two tools are called 'calculator'"):
        ToolEnvironment([calculator(), calculator()])


# -- Python ------------------------------------------------------------------------------------------------------------

SHORT = Limits(wall_seconds=5.0, cpu_seconds=5.0, output_bytes=100_000)


@pytest.fixture(scope="module", params=["process", pytest.param("bubblewrap", marks=pytest.mark.bubblewrap)])
def interpreter(request):
    try:
        box = ProcessSandbox() if request.param == "process" else sandbox("bubblewrap", warm=1)
    except UserError as e:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(e))
    yield python(python_runner(box, SHORT))
    box.close()


def test_python_runs_in_a_sandbox(interpreter):
    assert answer([interpreter], call("python", code="print(sum(range(10)))")) == ["45"]
    assert answer([interpreter], call("python", code="1 + 1")) == ["[no output: print what you want to see]"]
    (content,) = answer([interpreter], call("python", code="print('before')\n1 / 0"))
    assert content.startswith("before\nTraceback")
    assert "ZeroDivisionError" in content
    assert content.rstrip().splitlines()[-1].startswith("[crash")


def test_a_program_that_does_not_end_or_writes_without_end(interpreter):
    slow = python(python_runner(ProcessSandbox(), Limits(wall_seconds=0.5)))
    (content,) = answer([slow], call("python", code="while True: pass"))
    assert "[timeout" in content
    (flood,) = answer([interpreter], call("python", code="print('x' * 10_000_000)"))
    assert 90_000 < len(flood) < 110_000


def test_sandboxes_by_name():
    from cabochon.verifiers.sandbox.bubblewrap import BubblewrapSandbox

    box = sandbox_named("bubblewrap")
    assert isinstance(box, BubblewrapSandbox)
    box.close()
