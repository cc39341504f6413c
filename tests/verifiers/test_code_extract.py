"""Programs in completions."""

import pytest
from clock import shortest
from hypothesis import given
from hypothesis import strategies as st

from cabochon.verifiers.code_extract import answer, block, blocks, program

CODE = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (f"Here:\n```python\n{CODE}```\nDone.", CODE),
        (f"```py\nold\n```\nbetter:\n```Python\n{CODE}```", CODE),
        (f"```\n{CODE}```", CODE),
        (f"~~~python\n{CODE}~~~", CODE),
        (f"````python\n{CODE}```` \n", CODE),
        (f"```python\n{CODE}", CODE),
        (f"```python\n{CODE}```\nOutput:\n```\n3\n```", CODE),
        (f"```python\n{CODE}```\nRun it:\n```bash\npython f.py\n```", CODE),
        ("```bash\nls\n```", "ls\n"),
        (f"1. so:\n   ```python\n   {CODE.replace(chr(10), chr(10) + '   ').rstrip()}\n   ```", CODE),
        (f"<think>\n```python\nwrong\n```\n</think>\n```python\n{CODE}```", CODE),
        (f"<think>hm</think>{CODE}", CODE),
        (CODE, CODE),
        ("x = 5", "x = 5"),
        ("print('hi')", "print('hi')"),
        ("I cannot solve this.", ""),
        ("", ""),
        ("<think>\n```python\nx = 1\n```\n</think>\nNo idea.", ""),
        ("```python\n```\n", ""),
        ("```python\r\nx = 1\r\n```", "x = 1\r\n"),
        ("\ufeff" + CODE, CODE),
        (f"```python\n\ufeff{CODE}```", CODE),
        (f"```python\n{CODE}```\nDemo:\n```pycon\n>>> f(2)\n2\n```", CODE),
        ("```pycon\n>>> 1\n```", ">>> 1\n"),
        (f"```python\nT = '</think>'\n{CODE}```", f"T = '</think>'\n{CODE}"),
        (f"I don't know.</think>\n{CODE}", "\n" + CODE),
        (
            f'```python\ndef g():\n    """So:\n\n    ```python\n    g()\n    ```\n    """\n{CODE}```',
            f'def g():\n    """So:\n\n    ```python\n    g()\n    ```\n    """\n{CODE}',
        ),
        (f"```python\n{CODE}   ```\nSo it is.", CODE),
        (f"<answer>```python\n{CODE}```</answer>", CODE),
        (f"Here it is: ```python\n{CODE}```\nDone.", CODE),
        (f"The `f` method:```Python\n{CODE}```", CODE),
        (f"{'so ' * 60}: ```python\r\n{CODE}```", CODE),
        (f'<answer lang="py"><code>```\n{CODE}```</code></answer>', CODE),
        (f"<answer>\n{CODE}</answer>", CODE),
        (f"```python\n{CODE.rstrip()}```", CODE.rstrip()),
        (f"```python\n{CODE}``` This works.", CODE),
        (f"```python\n{CODE}```.\nSo it is.", CODE),
        (f"```python\nold = 1\n\nOops:\n```python\n{CODE}```", CODE),
        (f"A block that starts with ```python\nfollows.\n\n```python\n{CODE}```", CODE),
        (f"````markdown\nIt:\n```python\n{CODE}```\n````", CODE),
        ("1. so:\n   ```python\n   S = '\u2028\x0c'\n   ```", "S = '\u2028\x0c'\n"),
        (f"As in ```python``` or so.\n```python\n{CODE}```\nDone.", CODE),
        (f'```python\nS = "a ```python"\n{CODE}```', f'S = "a ```python"\n{CODE}'),
    ],
)
def test_program(text, want):
    assert program(text) == want


def test_a_block_keeps_its_indentation():
    """A body that goes on from a prompt."""
    text = "<think>a</think>```python\n    return x\n```"
    assert block("So:\n" + text.partition("</think>")[2]) == "    return x\n"
    assert block("no program") == ""
    assert answer(text).startswith("```python")


def test_blocks_in_order():
    assert blocks("```a\n1\n```\n```b\n2\n```") == [("a", "1\n"), ("b", "2\n")]


@given(st.text(st.sampled_from("`~ \npython<think>/=()\x00\ud800é"), max_size=300))
def test_any_text_gives_a_text(text):
    assert isinstance(program(text), str)


@pytest.mark.parametrize(
    "text",
    [
        "`" * 10**6,
        "```\n" * 200_000,
        "~" * 10**6 + "\n",
        "[" * 10**7,
        "</think>" * 10**5,
        "'</think>'" * 10**5,
        "a" * 10**7,
    ],
)
def test_large_texts_are_quick(text):
    assert shortest(2, lambda: program(text)) < 2


USE = "```python\nprint(f(2))\n```"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (f"```python\n{CODE}```\nUsage:\n{USE}", CODE),
        (f"```python\n{CODE}```\n```python\ndef test_f():\n    assert f(2) == 2\n```", CODE),
        (f"```python\nf = max\n```\nBetter:\n```python\n{CODE}```\n{USE}\n{USE}", CODE),
        (f"```\n{CODE}```\n```\nf == 2\n```", CODE),
        (f"```python\nclass f:\n    pass\n```\n{USE}", "class f:\n    pass\n"),
        (f"```python\n{CODE}```\nThe body is\n```python\n    return 2 * x\n```", "return 2 * x\n"),
        (f"```python\ndef ff(x): pass\n```\n{USE}", "print(f(2))\n"),
        (f"<think>\n```python\n{CODE}```\n</think>\n{USE}", "print(f(2))\n"),
    ],
)
def test_an_example_of_use_is_not_the_program(text, want):
    assert program(text, ("f", "g.h")) == want


def test_looking_for_names_takes_linear_time():
    for filling in ("\n", " ", "\t\n", "def ", "async def "):
        text = f"```python\n{CODE}```\n```python\n{filling * 300_000}\n```"
        assert shortest(2, lambda text=text: program(text, ("f", "g"))) < 2
