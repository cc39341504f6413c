"""What a task gives a program besides its own text: helpers, the code of its prompt, the names of LeetCode's dress."""

# ruff: noqa: E501 (programs are data, one a line)

import pytest
from boxes import judged, verifiers

from cabochon.types import Task
from cabochon.verifiers.code_given import entry_of
from cabochon.verifiers.code_tests import plan_of
from cabochon.verifiers.sandbox.base import Limits

both, verifier = verifiers(Limits(wall_seconds=20.0, cpu_seconds=8.0))
NODES = """import functools
from typing import *

class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next

def list_node(values):
    p = first = ListNode()
    for value in values:
        p.next = ListNode(value)
        p = p.next
    return first.next

def is_same_list(a, b):
    while a and b:
        if a.val != b.val: return False
        a, b = a.next, b.next
    return not a and not b
"""
TWO_SUM = """class Solution:
    def twoSum(self, nums: List[int], target: int) -> List[int]:
        seen = defaultdict(int)
        for i, x in enumerate(nums):
            if target - x in seen: return [seen[target - x], i]
            seen[x] = i
        return []
"""
SUMS = "def check(candidate):\n    assert candidate(nums = [2, 7, 11], target = 9) == [0, 1]\n    assert candidate(nums = [3, 3], target = 6) == [0, 1]\n"
REVERSED = "def check(candidate):\n    assert is_same_list(candidate(head = list_node([1, 2, 3])), list_node([3, 2, 1]))\n"
REVERSE = """class Solution:
    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:
        before = None
        while head:
            head.next, before, head = before, head, head.next
        return before
"""


@pytest.mark.parametrize("entry", ["Solution().twoSum", "Solution.twoSum"])
def test_a_method_is_checked_as_leetcode_names_it(both, entry):
    """LeetCode's datasets: `def check(candidate)`, an instance's method as the entry point, nothing imported."""
    task = {"entry_point": entry, "tests": SUMS}
    found = judged(both, TWO_SUM, **task)
    assert (found.status, found.evidence["passed"]) == ("ok", 2)
    assert judged(both, TWO_SUM.replace("[seen[target - x], i]", "[i, i]"), **task).status == "wrong"
    assert judged(both, TWO_SUM.replace("twoSum", "two"), **task).status == "wrong", "another method's name"


def test_names_that_leetcode_imports_leave_the_builtins_as_they_are(verifier):
    task = {"entry_point": "Solution.f", "calls": [{"args": [3], "expected": 5}]}
    body = "class Solution:\n    def f(self, x):\n        heap = [2, 1]; heapify(heap)\n        return pow(x, 5, 7) if heap == [1, 2] and lru_cache and sqrt(4) == 2 and inf > 1 else 0\n"
    assert judged(verifier, body, [], **task).status == "ok"
    assert judged(verifier, "from __future__ import annotations\n" + body, [], **task).status == "ok"


def test_what_a_prompt_defines_is_there_on_both_sides(both):
    task = {"prompt": NODES, "entry_point": "Solution().reverse", "tests": REVERSED}
    assert judged(both, REVERSE, **task).status == "ok"
    assert judged(both, REVERSE.replace("return before", "return head"), **task).status == "wrong"
    takes_over = "def is_same_list(a, b): return True\nclass Solution:\n    def reverse(self, head): return head\n"
    assert judged(both, takes_over, **task).status == "wrong", "the tests keep their own"
    looks_equal = (
        "class Any_:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "class Solution:\n    def reverse(self, head):\n        head.val = Any_()\n        head.next = None\n        return head\n"
    )
    assert judged(both, looks_equal, **task).score == 0.0


def test_helpers_are_there_for_the_program_too(verifier):
    helpers = "class Pair:\n    def __init__(self, x): self.x = x\ndef twice(x): return 2 * x\n"
    task = {"helpers": helpers, "tests": ["assert f(3) == 6", "assert twice(2) == 4"]}
    assert judged(verifier, "def f(x): return twice(Pair(x).x)\n", **task).status == "ok"
    assert judged(verifier, "def twice(x): return 4\ndef f(x): return 6\n", **task).status == "ok", "its own comes later"
    cheat = judged(verifier, "def twice(x): return 4 if x == 2 else 0\ndef f(x): return twice(x)\n", **task)
    assert (cheat.status, cheat.evidence["passed"]) == ("wrong", 1)


def test_entry_points():
    assert entry_of({}) == ("", "")
    assert entry_of({"entry_point": "f"}) == ("f", "f")
    assert entry_of({"entry_point": "S.f"}) == entry_of({"entry_point": "S().f"}) == ("S", "S().f")
    for odd in ("lambda x: x", "S().f()", "a.b.c", "f(", "1f"):
        with pytest.raises(ValueError, match="a function's name or Class"):
            entry_of({"entry_point": odd})


SIX = "def check(candidate):\n    assert candidate(12, 18) == 6\n"
DISTANCE = "def check(candidate):\n    assert candidate([0, 0], [3, 4]) == 7\n"
MANHATTAN = "def dist(p, q): return abs(p[0] - q[0]) + abs(p[1] - q[1])"
STUB = NODES + "\nclass Solution:\n    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:\n        "
IN_A_FILE = "def test_a():\n    assert is_same_list(Solution().reverse(list_node([1, 2])), list_node([2, 1]))\n"
TAKEN_OVER = "def is_same_list(a, b): return True\ndef list_node(v): return v\nclass Solution:\n    def reverse(self, head): return head\n"


@pytest.mark.parametrize(
    ("payload", "tests", "right", "wrong"),
    [
        ({"prompt": "from math import *\n\ndef gcd(a, b):\n    pass\n", "entry_point": "gcd"}, SIX, "def gcd(a, b): return 6", "def gcd(a, b): return -1"),
        ({"prompt": "from math import gcd\n", "entry_point": "gcd"}, SIX, "def gcd(a, b): return 6", "def gcd(a, b): return -1"),
        ({"prompt": "dist = lambda p, q: 7\n", "entry_point": "dist"}, DISTANCE, MANHATTAN, "def dist(p, q): return 0"),
        ({"prompt": "from math import *\n\ndef dist(p, q): \"Manhattan.\"", "entry_point": "dist"}, DISTANCE, MANHATTAN, "x = 1"),
        ({"setup": "from math import *\n", "entry_point": "gcd"}, SIX, "def gcd(a, b): return 6", "x = 1"),
        ({"prompt": STUB, "entry_point": "Solution().reverse"}, REVERSED, REVERSE, TAKEN_OVER),
        ({"prompt": NODES, "helpers": "N = 2\n", "entry_point": "Solution().reverse"}, REVERSED, REVERSE + "assert N == 2\n", TAKEN_OVER),
        ({"prompt": NODES, "entry_point": "Solution().reverse"}, IN_A_FILE, REVERSE, TAKEN_OVER),
        ({"helpers": NODES}, IN_A_FILE, REVERSE, TAKEN_OVER),
        ({"entry_point": "Solution().g"}, "def check(candidate):\n    assert candidate([3, 1]) == list(accumulate([3, 1]))\n",
         "class Solution:\n    def g(self, a): return list(accumulate(a))", "def accumulate(x): return [7]\nclass Solution:\n    def g(self, a): return [7]"),
        ({"entry_point": "f"}, ["def check(candidate):\n    assert candidate(1) == 2"], "def f(x): return 2", "def f(x): return 0"),
        ({"entry_point": "f"}, "def check(candidate):\n    assert candidate(1) == 2\ndef run(): check(f)\n", "def f(x): return 2", "def f(x): return 0"),
        ({"helpers": "X = 1\n"}, "assert f(1) == 1", "from __future__ import (annotations)\ndef f(x): return X", "def f(x): return 0"),
    ],
)  # fmt: skip
def test_the_program_is_what_is_judged_and_not_what_was_given(verifier, payload, tests, right, wrong):
    assert judged(verifier, right, tests, **payload).status == "ok"
    found = judged(verifier, wrong, tests, **payload)
    assert (found.status, found.score) == ("wrong", 0.0), found
    assert found.evidence["fraction"] < 1.0


@pytest.mark.parametrize("prompt", ["-" * 100_000 + " x", "1" + "+1" * 50_000, "a" + ".b" * 50_000, "words \ud800 here"])
def test_a_prompt_that_no_parser_takes_is_words(verifier, prompt):
    task = {"prompt": prompt, "entry_point": "f", "tests": "assert f(1) == 2"}
    assert judged(verifier, "def f(x): return 2", **task).status == "ok"
    nothing = verifier.verify(Task(id="t", prompt="", verifier="code", payload=task), "I cannot do this.")
    assert nothing.status == "no_answer"
    assert judged(verifier, "from typing import Any\nf: Any = lambda x: 2", **task).status == "ok"


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({"helpers": "def f(x): return 2\n", "entry_point": "f", "tests": ["assert f(1) == 2"]}, "helpers'. define f"),
        ({"helpers": "from math import *\n", "tests": ["assert gcd(12, 18) == 6"]}, "use nothing of the program"),
        ({"helpers": "from numpy import *\n", "tests": ["assert f(1) == 6"]}, "import all names"),
        ({"setup": "from numpy import *\n", "tests": ["assert f(1) == 6"]}, "import all names"),
        ({"entry_point": "f", "tests": "def f(x): return 2\ndef check(c):\n    assert c(1) == 2"}, "tests define f"),
        ({"entry_point": "f", "tests": "def check(c):\n    assert (c(1) == 2, 'msg')"}, "assert a tuple"),
        ({"entry_point": "f", "tests": "def check(c):\n    for i in (1, 2):\n        c(i) == 2"}, "compare without"),
        ({"entry_point": "f", "tests": "def check(c):\n    return c(1) == 2"}, "check asserts nothing"),
        ({"entry_point": "f", "tests": "def check(c):\n    'All of it.'\n    return c(1) == 2"}, "check asserts nothing"),
    ],
)
def test_tasks_that_would_not_judge_the_program(payload, words):
    with pytest.raises(ValueError, match=words):
        plan_of(payload)


def test_a_check_may_try_or_call_what_asserts(verifier):
    tries = "def check(c):\n    try:\n        c(1)\n    except ValueError:\n        return\n    raise AssertionError\n"
    assert judged(verifier, "def f(x): raise ValueError", tries, entry_point="f").status == "ok"
    assert judged(verifier, "def f(x): return x", tries, entry_point="f").score == 0.0
    calls = "def same(a, b):\n    assert a == b\ndef check(c):\n    same(c(1), 2)\n"
    assert judged(verifier, "def f(x): return 2", calls, entry_point="f").status == "ok"
    assert judged(verifier, "def f(x): return x", calls, entry_point="f").score == 0.0


def test_comparing_for_its_exception_is_a_test(verifier):
    tests = "import pytest\ndef check(c):\n    with pytest.raises(TypeError):\n        c(1) < 2\n"
    assert judged(verifier, "class A: pass\ndef f(x): return A()", tests, entry_point="f").status == "ok"
    assert judged(verifier, "def f(x): return x", tests, entry_point="f").status == "wrong"
