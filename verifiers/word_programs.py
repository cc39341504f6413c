"""Small programming tasks made from words, judged by running the answer: the code domain of the demo.

"Write a Python function f(x): add 3, then double." is answered by `def f(x): return (x+3)*2`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from cabochon.types import Task

_INPUTS = (0, 1, 2, 5, -3, 10)


@dataclass(frozen=True)
class _Step:
    """One operation: how it is said, its source with `{}` for what came before, and its value."""

    words: str
    source: str
    times: int
    plus: int

    def __call__(self, x: int) -> int:
        return x * self.times + self.plus


def _step(draw: random.Random, largest: int) -> _Step:
    n = draw.randint(2, largest)
    match draw.choice(("add", "subtract", "multiply", "double", "negate")):
        case "add":
            return _Step(f"add {n}", f"{{}}+{n}", 1, n)
        case "subtract":
            return _Step(f"subtract {n}", f"{{}}-{n}", 1, -n)
        case "multiply":
            return _Step(f"multiply by {n}", f"({{}})*{n}", n, 0)
        case "double":
            return _Step("double", "({})*2", 2, 0)
        case _:
            return _Step("negate", "-({})", -1, 0)


def word_programs(size: int, seed: int = 0, *, most_steps: int = 3, largest: int = 9) -> list[Task]:
    """`size` different tasks of 1 to `most_steps` operations with numbers up to `largest`, verifier `code`.

    Fewer where there are not so many. The payload has the tests and a `reference` solution; the same seed gives the
    same tasks.
    """
    draw, seen = random.Random(f"word_programs/{seed}"), set[str]()
    tasks: list[Task] = []
    for _ in range(50 * size):
        steps = [_step(draw, largest) for _ in range(draw.randint(1, most_steps))]
        words = ", then ".join(step.words for step in steps)
        if words in seen:
            continue
        seen.add(words)
        source, values = "x", list(_INPUTS)
        for step in steps:
            source, values = step.source.format(source), [step(v) for v in values]
        tests = [f"assert f({x}) == {y}" for x, y in zip(_INPUTS, values, strict=True)]
        payload = {"test_list": tests, "reference": f"def f(x): return {source.replace('(x)', 'x')}"}
        tasks.append(
            Task(
                id=f"word_programs/{seed}/{len(tasks)}",
                prompt=f"Write a Python function f(x): {words}.",
                verifier="code",
                payload=payload,
                domain="code",
            )
        )
        if len(tasks) == size:
            break
    return tasks
