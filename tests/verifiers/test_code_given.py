"""What a task gives a program besides its own text: helpers, the code of its prompt, the names of LeetCode's dress."""

# ruff: noqa: E501 (programs are data, one a line)

import pytest
from boxes import judged, verifiers

from cabochon.verifiers.code_tests import entry_of
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
