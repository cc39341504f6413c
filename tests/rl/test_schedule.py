from collections import Counter

import pytest

from cabochon.errors import UserError
from cabochon.rl.schedule import Schedule
from cabochon.types import Task

TASKS = [
    Task(id=f"{d}{i}", prompt=f"{d} {i}", verifier="math", domain=d)
    for d, n in (("a", 30), ("b", 10))
    for i in range(n)
]


def test_every_task_of_a_domain_comes_once_before_any_comes_again():
    schedule = Schedule(TASKS, {}, seed=3)
    of_a = [t.id for t in (schedule[i] for i in range(500)) if t.domain == "a"]
    assert sorted(of_a[:30]) == sorted(t.id for t in TASKS if t.domain == "a")
    assert sorted(of_a[30:60]) == sorted(of_a[:30])
    assert of_a[30:60] != of_a[:30], "in another order"


@pytest.mark.parametrize(
    ("shares", "expected"), [({}, 0.75), ({"b": 30}, 0.5), ({"a": 1, "b": 3}, 0.25), ({"b": 0}, 1.0)]
)
def test_shares(shares, expected):
    schedule = Schedule(TASKS, shares, seed=0)
    n = 256
    assert Counter(schedule[i].domain for i in range(n))["a"] / n == pytest.approx(expected, abs=0.005)


def test_a_small_share_is_no_larger_than_asked():
    schedule = Schedule(TASKS, {"a": 1, "b": 0.001}, seed=0)
    assert Counter(schedule[i].domain for i in range(1001))["b"] == 1


def test_the_index_alone_decides():
    ids = [Schedule(TASKS, {}, seed=1)[i].id for i in range(300)]
    schedule = Schedule(TASKS, {}, seed=1)
    assert [schedule[i].id for i in reversed(range(300))] == ids[::-1]
    assert [Schedule(TASKS, {}, seed=2)[i].id for i in range(300)] != ids


@pytest.mark.parametrize(
    ("shares", "says"), [({"c": 1}, "domains a, b only"), ({"a": 0, "b": 0}, "every domain has share 0")]
)
def test_shares_that_cannot_be(shares, says):
    with pytest.raises(UserError, match=says):
        Schedule(TASKS, shares, seed=0)
