"""What is drawn next: a pure function of the state that a checkpoint holds."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cabochon.errors import UserError
from cabochon.rl.feed import CurriculumConfig, Feed
from cabochon.rl.schedule import Schedule
from cabochon.types import Completion, Rollout, Task, Verdict

TASKS = [
    Task(id=f"{d}{i}", prompt=f"{d} {i}", verifier="math", domain=d, payload={"level": i % 5})
    for d in "ab" for i in range(10)
]  # fmt: skip


def seen(task, scores, group=0):
    """A group whose samples got these scores; None: the machine failed."""
    none = Completion(
        tokens=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32), mask=np.zeros(0, bool), text="", finish="stop",
        policy_version=np.zeros(0, np.int32),
    )  # fmt: skip
    verdicts = [Verdict(score=s, status="infra_error" if s is None else "ok") for s in scores]
    return [Rollout(task=task, completion=none, group=group, verdict=v) for v in verdicts]


def drawn(feed, n):
    return [next(feed).id for _ in range(n)]


def test_without_a_curriculum_it_is_the_schedule_after_what_was_in_flight():
    schedule = Schedule(TASKS, {"a": 3, "b": 1}, seed=4)
    feed = Feed(TASKS, [{"a": 3, "b": 1}], 4, unfinished=["b7", "a2"])
    assert drawn(feed, 1) == ["b7"]
    assert (feed.again, feed.places) == (["a2"], [0]), "what a checkpoint needs to start the rest again"
    assert drawn(feed, 20) == ["a2", *(schedule[i].id for i in range(19))]
    assert feed.again == []
    feed.observe(seen(TASKS[0], [1.0]))
    assert (feed.rates, feed.row()) == ({}, {}), "nothing is kept that nothing reads"


def test_what_was_in_flight_and_is_no_task_any_more_is_left_out():
    feed = Feed(TASKS, [{}], 4, unfinished=["gone", "b7", "lost"])
    assert (feed.gone, feed.again) == (["gone", "lost"], ["b7"])
    assert drawn(feed, 2) == ["b7", Schedule(TASKS, {}, seed=4)[0].id]


def test_each_phase_has_its_mixture_and_goes_on_where_it_was():
    phases = [{"b": 0}, {"a": 1, "b": 4}]
    feed = Feed(TASKS, phases, 0)
    assert {t[0] for t in drawn(feed, 30)} == {"a"}
    feed.phase = 1
    second = drawn(feed, 255)
    assert Counter(t[0] for t in second)["a"] / 255 == pytest.approx(0.2, abs=0.005)
    again = Feed(TASKS, phases, 0, places=feed.places)
    again.phase = 1
    assert drawn(again, 40) == drawn(feed, 40)
    assert feed.places == [30, 295]


def test_tasks_that_are_solved_half_the_time_come_most_and_none_is_left_out():
    feed = Feed(TASKS, [{"b": 0}], 1, curriculum=CurriculumConfig(floor=0.2, decay=0.5))
    levels = {t.id: 1.0 if i < 4 else 0.0 if i < 8 else 0.5 for i, t in enumerate(TASKS[:10])}
    for _ in range(12):
        for task in TASKS[:10]:
            feed.observe(seen(task, [levels[task.id]] * 2))
    counts = Counter(drawn(feed, 3000))
    for task, level in levels.items():  # weights: 2 tasks of 1 and 8 of 0.2
        assert counts[task] / 3000 == pytest.approx(1 / 3.6 if level == 0.5 else 0.2 / 3.6, abs=0.03), task
    assert feed.row() == {"curriculum": {"tried": 10, "easy": 0.4, "hard": 0.4}}


def test_the_rate_is_a_running_mean_and_the_machines_failures_say_nothing():
    feed = Feed(TASKS, [{}], 1, curriculum=CurriculumConfig(decay=0.75))
    feed.observe([*seen(TASKS[1], [0.0], group=1), *seen(TASKS[0], [1.0, None, 0.0, 1.0, 1.0], group=0)])
    assert feed.rates == {"a0": 0.75 * 0.5 + 0.25 * 0.75, "a1": 0.75 * 0.5}
    feed.observe(seen(TASKS[0], [None, None]))
    assert feed.rates["a0"] == 0.5625


def test_what_an_environment_pays_is_a_solve_rate_where_the_verifier_abstains():
    feed = Feed(TASKS, [{}], 0, curriculum=CurriculumConfig(decay=0.5))
    paid = [replace(r, completion=replace(r.completion, reward=3.0)) for r in seen(TASKS[0], [None, None])]
    feed.observe(paid)
    assert feed.rates == {TASKS[0].id: 0.75}


def test_tasks_of_a_bucket_share_a_rate():
    feed = Feed(TASKS, [{"b": 0}], 1, curriculum=CurriculumConfig(by="level", floor=0.01, decay=0.0))
    for level in (0, 1, 2, 4):
        feed.observe(seen(TASKS[level], [1.0, 1.0]))
    assert set(feed.rates) == {"a/0", "a/1", "a/2", "a/4"}
    counts = Counter(drawn(feed, 500))
    assert counts["a3"] + counts["a8"] > 450, "level 3 alone is not known to be solved"
    with pytest.raises(UserError, match=r"tasks\.curriculum\.by='difficulty', and its payload has no such key"):
        Feed(TASKS, [{}], 1, curriculum=CurriculumConfig(by="difficulty"))


def test_the_same_state_draws_the_same():
    cfg = CurriculumConfig(decay=0.5)
    whole, feed = (Feed(TASKS, [{}], 7, curriculum=cfg) for _ in range(2))
    ids = []
    for i in range(40):
        if i == 17:
            feed = Feed(TASKS, [{}], 7, curriculum=cfg, places=feed.places, rates=feed.rates)
        task, other = next(whole), next(feed)
        ids.append((task.id, other.id))
        for f in (whole, feed):
            f.observe(seen(task, [float(i % 3 == 0), 1.0], group=i))
    assert all(a == b for a, b in ids)


def test_shares_that_cannot_be_name_their_phase():
    with pytest.raises(UserError, match=r"phases\[0\].shares.c: there are tasks of the domains a, b only"):
        Feed(TASKS, [{}, {"c": 1}], 0)
