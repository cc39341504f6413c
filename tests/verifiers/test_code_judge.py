"""One judgement, from the side of who is to blame and what may cross: programs that bring the tests' process down,
partial scores, functions that call each other across the line, and what is the same object."""

# ruff: noqa: E501 (programs are data, one a line)

import pytest
from boxes import judged, verifiers

from cabochon.types import Task
from cabochon.verifiers.code import CodeVerifier
from cabochon.verifiers.code_judge import MAX_UNITS, Outcome, _unit
from cabochon.verifiers.sandbox.base import Limits
from cabochon.verifiers.sandbox.session import Stopped
from cabochon.verifiers.sandbox.wire import pack

LIMITS = Limits(wall_seconds=10.0, cpu_seconds=4.0, memory_bytes=400 << 20)
both, verifier = verifiers(LIMITS)


@pytest.mark.parametrize(
    ("tests", "source"),
    [
        (["assert set(ITEMS) == {1, 2, 3}"], "ITEMS = range(10**9)"),
        (["assert sorted(ITEMS) == [1, 2, 3]"], "ITEMS = range(20_000_000)"),
    ],
)
def test_a_constant_too_large_for_the_tests_is_the_programs_doing(both, tests, source):
    verdict = judged(both, source, tests)
    assert (verdict.status, verdict.score) in [("malformed", 0.0), ("oom", 0.0)], verdict
    assert verdict.seconds < LIMITS.wall_seconds + 2


def test_tests_that_die_by_themselves_are_not_the_programs_doing(verifier):
    """No value of the program has reached them, though they have heard of its names."""
    for tests in (["import os\nos._exit(1)\nassert f(1) == 1"], ["import os\nos._exit(1)\nassert f(Box(1)) == 1"]):
        verdict = judged(verifier, "class Box:\n    def __init__(self, x): pass\ndef f(x): return x", tests)
        assert verdict.status == "infra_error", verdict


def test_more_tests_than_can_be_counted_are_the_programs_doing():
    outcome = Outcome(total=MAX_UNITS, first_failure={"test": "the first"})
    with pytest.raises(Stopped) as stopped:
        _unit(b"U" + pack(("one more", False, {})), outcome)
    assert stopped.value.reason == "malformed"


CHECK = {"entry_point": "sq", "prompt": 'def sq(x):\n    """Square."""\n'}
CHECKS = "def check(candidate):\n" + "".join(f"    assert candidate({i}) == {i * i}\n" for i in range(6))
FILE = "from solution import sq\n" + "".join(f"def test_{i}(): assert sq({i}) == {i * i}\n" for i in range(6))
ROWS = "import pytest\nfrom solution import sq\n@pytest.mark.parametrize('x', [0, 1, 2, 3, 4, 5])\ndef test_sq(x): assert sq(x) == x * x\n"
UNCOUNTED = ROWS.replace("[0, 1, 2, 3, 4, 5]", "range(6)")


@pytest.mark.parametrize(
    ("source", "status", "passed"),
    [
        ("import os\ndef sq(x): return 0 if x == 0 else os._exit(0)", "crash", 1),
        ("def sq(x):\n    while x > 1: pass\n    return x * x", "timeout", 2),
        ("import sys\nC = sys.modules['cabochon.verifiers.sandbox.inside'].Candidate\ndef sq(x):\n    if x == 1: C.answer = lambda self, r: b'T'  # from the next one on\n    return x * x", "malformed", 2),
    ],
)  # fmt: skip
def test_a_judgement_that_breaks_off_is_paid_for_what_it_was_planned_to_be(both, source, status, passed):
    verifier = CodeVerifier(both.sandbox, score="fraction", limits=Limits(wall_seconds=3.0, cpu_seconds=10.0))
    for tests, payload in ((CHECKS, CHECK), (FILE, {}), (ROWS, {})):
        verdict = judged(verifier, source, tests, **payload)
        assert verdict.status == status, verdict
        assert verdict.score == verdict.evidence["fraction"] == pytest.approx(passed / 6), verdict
    verdict = judged(verifier, source, UNCOUNTED)
    assert (verdict.status, verdict.evidence["passed"]) == (status, passed)
    assert verdict.score == pytest.approx(passed / (passed + 1))


@pytest.mark.parametrize(
    ("tests", "source"),
    [
        ("assert apply(square, 3) == 9", "def square(x): return x * x\ndef apply(f, x): return f(x)"),
        ("assert compose(inc, dbl)(3) == 7", "def inc(x): return x + 1\ndef dbl(x): return 2 * x\ndef compose(f, g): return lambda x: f(g(x))"),
        ("assert apply(lambda n: fib(n), 6) == 8", "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\ndef apply(f, x): return f(x)"),
        ("out = []\nTree(1).walk(lambda n: out.append(n.v))\nassert out == [1]", "class Tree:\n    def __init__(self, v): self.v = v\n    def walk(self, f): f(self)"),
        ("assert sort_by([P(2), P(1)], lambda p: p.x)[0].x == 1", "class P:\n    def __init__(self, x): self.x = x\ndef sort_by(xs, k): return sorted(xs, key=k)"),
        ("assert create(Dog).speak() == 'w'", "class Dog:\n    def speak(self): return 'w'\ndef create(c): return c()"),
        ("def down(n): return 0 if n == 0 else up(down, n - 1) + 1\nassert up(down, 20) == 20", "def up(f, n): return f(n)"),
        ("def bad(n): raise KeyError(twice(n))\ntry:\n    run(bad)\n    assert False\nexcept KeyError:\n    pass\nassert twice(2) == 4", "def twice(n): return 2 * n\ndef run(f): return f(1)"),
        ("assert pmap(lambda x: twice(x), list(range(30))) == [2 * x for x in range(30)]", "from concurrent.futures import ThreadPoolExecutor\ndef twice(x): return 2 * x\ndef pmap(f, xs):\n    with ThreadPoolExecutor(8) as p: return list(p.map(f, xs))"),
    ],
)  # fmt: skip
def test_functions_of_both_sides_call_each_other(verifier, tests, source):
    verdict = judged(verifier, source, [tests])
    assert verdict.status == "ok", verdict


@pytest.mark.parametrize(
    ("tests", "source", "score"),
    [
        ("s = Stack()\nassert s.push(1) is s", "class Stack:\n    def push(self, x): return self", 1),
        ("s = Stack()\nassert s.push(1) is s", "class Stack:\n    def push(self, x): return Stack()", 0),
        ("assert Single.get() is Single.get()", "class Single:\n    one = None\n    @classmethod\n    def get(cls):\n        cls.one = cls.one or cls(); return cls.one", 1),
        ("assert Light().state is State.RED and State.RED is not State.GREEN", "from enum import Enum\nclass State(Enum):\n    RED = 1\n    GREEN = 2\nclass Light:\n    state = State.RED", 1),
    ],
)  # fmt: skip
def test_the_same_object_is_the_same_object(verifier, tests, source, score):
    verdict = judged(verifier, source, [tests])
    assert verdict.score == score, verdict


@pytest.mark.parametrize(
    ("source", "score"),
    [
        ("def f(x: List[int]) -> List[int]: return x * x", 0),
        ("from __future__ import annotations\ndef f(x: Missing) -> Gone: return x * x", 1),
        ("def f(x: int): return f.__annotations__['x'](x) ** 2", 1),
    ],
)
def test_annotations_are_what_a_plain_interpreter_makes_of_them(verifier, source, score):
    assert judged(verifier, source, ["assert f(2) == 4"]).score == score
    scripted = source + "\nprint(f(2))"
    task = Task(id="t", prompt="", verifier="code", payload={"cases": [{"stdin": "", "stdout": "4"}]})
    assert verifier.verify(task, f"```python\n{scripted}\n```").score == score


def test_annotations_of_the_tests_are_values_too(verifier):
    tests = "from solution import f\ndef test_a():\n    def g(a: int): pass\n    assert g.__annotations__ == {'a': int} and f(2) == 4\n"
    assert judged(verifier, "def f(x): return x * x", tests).status == "ok"


SWALLOWS = {
    "unittest": "import unittest\nfrom solution import f\nclass T(unittest.TestCase):\n    def test_a(self):\n        with self.assertRaises(BaseException): f(1)\n",
    "pytest": "import pytest\nfrom solution import f\ndef test_a():\n    with pytest.raises(BaseException): f(1)\n",
    "except": ["try:\n    f(1)\nexcept BaseException:\n    pass"],
    "bare except": ["try:\n    f(1)\nexcept:\n    pass"],
    "finally": ["def g():\n    try: f(1)\n    finally: return 3\nassert g() == 3"],
    "a thread": ["import threading\nt = threading.Thread(target=f, args=(1,))\nt.start(); t.join()\nassert True"],
}  # fmt: skip
STOPS = {
    "no plain data": ("def f(x):\n    a = []; a.append(a); return a", "malformed"),
    "a forged answer": ("import sys\nC = sys.modules['cabochon.verifiers.sandbox.inside'].Candidate\nC.answer = lambda self, r: b'T'\ndef f(x): return 0", "malformed"),
    "too large a value": ("def f(x): return 'x' * (9 << 20)", "malformed"),
    "os._exit": ("import os\ndef f(x): os._exit(0)", "crash"),
    "a signal": ("import os\ndef f(x): os.kill(os.getpid(), 11)", "crash"),
    "timeout": ("def f(x):\n    while True: pass", "timeout"),
}  # fmt: skip


@pytest.mark.parametrize("how", STOPS)
def test_what_stopped_the_program_is_the_verdict_whatever_the_tests_catch(both, how):
    source, status = STOPS[how]
    verifier = CodeVerifier(both.sandbox, limits=Limits(wall_seconds=2.0 if how == "timeout" else 20.0))
    for form in SWALLOWS if how == "no plain data" else ("unittest", "bare except"):
        verdict = judged(verifier, source, SWALLOWS[form])
        assert (verdict.status, verdict.score) == (status, 0.0), (form, verdict)
