"""Groups in order, verified as they come, refilled, bounded in age."""

import threading
import time
from contextlib import closing

import jax
import numpy as np
import pytest

from cabochon.model import transformer as tf
from cabochon.protocols import Weights
from cabochon.rollouts.collect import Collector, Completions, ahead, group_seed, room
from cabochon.rollouts.environment import EpisodeLimits, Step
from cabochon.rollouts.episodes import EpisodeEngine
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.slots import SlotConfig
from cabochon.rollouts.stream import LocalStream, RequestStream
from cabochon.testing import FakeEngine, tiny_config
from cabochon.tokenizer import ByteTokenizer
from cabochon.types import Completion, Request, Sampling, Task, Verdict
from cabochon.verifiers.base import Probe
from cabochon.verifiers.pool import VerifierPool

TOK = ByteTokenizer()
MODEL = tiny_config(vocab_size=TOK.vocab_size)


class Even:
    """Right where the text has an even number of characters; what it was asked is kept."""

    def __init__(self):
        self.asked: list[str] = []
        self.lock = threading.Lock()

    def verify(self, task, text):
        with self.lock:
            self.asked.append(text)
        if text == "garbage":
            return Verdict(score=0.0, status="malformed")
        even = len(text) % 2 == 0 and bool(text)
        return Verdict(score=float(even), status="ok" if even else "wrong", detail=f"{task.id}: {text}")


def pool(verifier):
    task = Task(id="probe", prompt="?", verifier="even")
    return VerifierPool(verifier=verifier, probes=[Probe(task=task, gold="ab", garbage="garbage")], retries=0)


def tasks(*prompts):
    return [Task(id=f"task-{p}", prompt=p, verifier="even") for p in prompts]


def fake(reply=lambda prompt, seed, sample: prompt + "x" * sample):
    return RequestStream(FakeEngine(reply))


def test_a_group_per_task_in_their_order_each_sample_with_its_own_verdict():
    with pool(Even()) as judge, Collector(Completions(fake(), Sampling(n=3)), judge, first_group=7) as collector:
        got = collector.collect(tasks("a", "bb", "c"))
        assert [g.id for g in got.groups] == [7, 8, 9]
        assert collector.next_group == 10
        assert [(r.group, r.task.id, r.completion.text) for r in got.rollouts] == [
            (7 + i, f"task-{p}", p + "x" * s) for i, p in enumerate(("a", "bb", "c")) for s in range(3)
        ]
        for r in got.rollouts:
            assert r.verdict.detail == f"{r.task.id}: {r.completion.text}"
            assert r.verdict.score == (len(r.completion.text) % 2 == 0)
        assert got.dropped == got.stale == []
        assert (collector.in_flight, collector.waiting) == (0, 0)
        assert collector.collect([]).groups == []


def test_what_several_samples_say_is_judged_once():
    even = Even()
    source = Completions(fake(lambda prompt, seed, sample: prompt + "x" * (sample % 2)), Sampling(n=6))
    with pool(even) as judge, Collector(source, judge) as collector:
        got = collector.collect(tasks("a", "a", "bb"))
    assert [len(r.completion.text) % 2 == 0 for r in got.rollouts] == [r.verdict.score == 1 for r in got.rollouts]
    asked = sorted(text for text in even.asked if text in ("a", "ax", "bb", "bbx"))
    assert asked == ["a", "a", "ax", "ax", "bb", "bbx"], "once for each task, whatever other tasks ask"


def test_draws_depend_on_the_seed_and_the_groups_number_alone():
    """A run that resumed at group 1 draws what the whole run drew there."""

    def seeds(seed, first, prompts):
        engine = FakeEngine(lambda prompt, seed, sample: f"{seed}")
        with pool(Even()) as judge:
            source = Completions(RequestStream(engine), Sampling(n=1))
            with Collector(source, judge, seed=seed, first_group=first) as collector:
                return [int(r.completion.text) for r in collector.collect(tasks(*prompts)).rollouts]

    whole = seeds(3, 0, "abc")
    assert whole == [group_seed(3, i) for i in range(3)]
    assert seeds(3, 1, "bc") == whole[1:]
    assert len({*whole, *seeds(4, 0, "abc")}) == 6


def test_dropped_groups_are_replaced_from_more_a_bounded_number_of_times():
    more = iter(tasks("dd", "e", "ff", "gg"))
    with pool(Even()) as judge, Collector(Completions(fake(), Sampling(n=1)), judge) as collector:
        got = collector.collect(
            tasks("a", "bb", "c"), keep=lambda g: g.rollouts[0].verdict.score == 1, more=more, refills=3
        )
        assert [g.task.id for g in got.groups] == ["task-bb", "task-dd", "task-ff"]
        assert [g.task.id for g in got.dropped] == ["task-a", "task-c", "task-e"]
        assert next(more).prompt == "gg"  # no more tasks were taken than were started
        short = collector.collect(tasks("a", "b"), keep=lambda g: False, more=iter(tasks("c", "d", "e")), refills=2)
        assert (len(short.groups), len(short.dropped)) == (0, 4)
        dry = collector.collect(tasks("a", "b"), keep=lambda g: False, more=iter(tasks("c")), refills=9)
        assert (len(dry.groups), len(dry.dropped)) == (0, 3)


class Flaky:
    """A judge that fails the first `times` of each text."""

    def __init__(self, times):
        self.times, self.seen = times, {}

    def verify_one(self, task, text):
        self.seen[text] = self.seen.get(text, 0) + 1
        if self.seen[text] <= self.times:
            return Verdict(score=None, status="infra_error", detail="sandbox gone")
        return Verdict(score=1.0, status="ok")


@pytest.mark.parametrize(("times", "status", "asked"), [(0, "ok", 1), (1, "ok", 2), (2, "infra_error", 2)])
def test_an_infrastructure_failure_is_tried_again_then_kept_as_one(times, status, asked):
    judge = Flaky(times)
    with Collector(Completions(fake(), Sampling(n=2)), judge, retries=1) as collector:
        got = collector.collect(tasks("a"))
        assert [r.verdict.status for r in got.rollouts] == [status] * 2
        assert set(judge.seen.values()) == {asked}
        assert collector.counters.verdicts_repeated == 2 * (asked - 1)


def test_a_verdict_that_does_not_come_is_an_infrastructure_failure():
    release = threading.Event()

    class Stuck:
        def verify_one(self, task, text):
            if text == "b":
                release.wait(60)
            return Verdict(score=1.0, status="ok")

    with Collector(Completions(fake(), Sampling(n=1)), Stuck(), deadline_seconds=0.5) as collector:
        start = time.monotonic()
        got = collector.collect(tasks("a", "b", "c"))
        assert time.monotonic() - start < 20
        assert [r.verdict.status for r in got.rollouts] == ["ok", "infra_error", "ok"]
        assert collector.counters.verdicts_late == 1
        release.set()


def test_a_long_queue_costs_no_verdict():
    """The deadline is of the work, not of the wait for a thread."""

    class Slow:
        def verify_one(self, task, text):
            time.sleep(0.05)
            return Verdict(score=1.0, status="ok")

    with Collector(Completions(fake(), Sampling(n=8)), Slow(), threads=2, deadline_seconds=0.5) as collector:
        got = collector.collect(tasks(*"abcdef"))
        assert {r.verdict.status for r in got.rollouts} == {"ok"}
        assert collector.row() == {"verdicts_repeated": 0, "verdicts_late": 0}


def test_verdicts_that_hang_hold_up_no_other():
    """Not even where every thread is taken by one."""
    release = threading.Event()

    class Stuck:
        def verify_one(self, task, text):
            if text in "ab":
                release.wait(60)
            return Verdict(score=1.0, status="ok")

    with Collector(Completions(fake(), Sampling(n=1)), Stuck(), threads=2, deadline_seconds=0.5) as collector:
        start = time.monotonic()
        got = collector.collect(tasks("a", "b", "c", "d", "e"))
        assert time.monotonic() - start < 20
        assert [r.verdict.status for r in got.rollouts] == ["infra_error"] * 2 + ["ok"] * 3
        assert collector.row() == {"verdicts_repeated": 0, "verdicts_late": 2}
        assert [r.verdict.status for r in collector.collect(tasks("f")).rollouts] == ["ok"]
        assert collector.row() == {"verdicts_repeated": 0, "verdicts_late": 0}, "of each step by itself"
        release.set()


def test_verification_overlaps_generation():
    """The judge has begun on the first group before the engine was asked for the last."""
    asked: list[tuple[str, str]] = []

    class Judge:
        def verify_one(self, task, text):
            asked.append(("judge", text))
            return Verdict(score=1.0, status="ok")

    def reply(prompt, seed, sample):
        asked.append(("engine", prompt))
        time.sleep(0.05)
        return prompt

    with Collector(Completions(fake(reply), Sampling(n=1)), Judge()) as collector:
        collector.collect(tasks(*"abcdef"))
    assert asked.index(("judge", "a")) < asked.index(("engine", "f"))


def test_what_the_engine_gave_up_is_not_judged():
    class Gone(FakeEngine):
        def generate(self, requests):
            empty = np.zeros(0, np.int32)
            return [Completion(tokens=empty, logprobs=np.zeros(0, np.float32), mask=np.zeros(0, bool), text="",
                               finish="abort", policy_version=empty)]  # fmt: skip

    judge = Even()
    with pool(judge) as verifiers:
        probed = len(judge.asked)
        source = Completions(RequestStream(Gone(lambda *a: "")), Sampling(n=1))
        with Collector(source, verifiers) as collector:
            (rollout,) = collector.collect(tasks("a")).rollouts
            assert rollout.verdict.status == "infra_error"
            assert len(judge.asked) == probed


# -- several steps in flight, on a real sampler ------------------------------------------------------------------------


def weights(version):
    return Weights(version=version, params=tf.init(MODEL, jax.random.key(version)))


@pytest.fixture(scope="module")
def local():
    return LocalEngine(MODEL, TOK, weights(0), SlotConfig(slots=4, length=64, block=32, chunks=(16,), steps=2))


class Content:
    def verify_one(self, task, text):
        return Verdict(score=1.0, status="ok")


def collector_of(local, n=2, max_tokens=12):
    sampling = Sampling(n=n, max_tokens=max_tokens, ignore_eos=True)
    return Collector(Completions(LocalStream(local), sampling), Content())


def test_groups_are_handed_over_in_the_order_they_were_started(local):
    """However they finish; a group in flight goes on over an update, with the version of each token."""
    local.load(weights(0))
    stream = LocalStream(local)
    source = Completions(stream, Sampling(n=2, max_tokens=12, ignore_eos=True))
    with Collector(source, Content()) as collector:
        collector.start(tasks("a", "b", "c", "d", "e", "f"))
        assert stream.poll(0.0) == []  # one dispatch of two tokens, in four slots
        local.load(weights(1))
        first = collector.take(2)
        assert [g.id for g in first.groups] == [0, 1]
        assert collector.in_flight + collector.waiting == 4
        for r in first.rollouts:
            assert r.completion.policy_version.tolist() == [0] * 2 + [1] * 10
        assert [g.oldest for g in first.groups] == [0, 0]
        assert [(g.id, g.oldest) for g in collector.take(3).groups] == [(2, 1), (3, 1), (4, 1)]
        assert [g.id for g in collector.take(5).groups] == [5]


def test_a_group_that_is_too_old_is_drawn_again(local):
    local.load(weights(0))
    with collector_of(local) as collector:
        collector.start(tasks("a", "b", "c"))
        while collector.waiting < 3:
            collector.advance(0.1)
        local.load(weights(2))
        got = collector.take(3, max_lag=1, refills=2)
        assert [g.task.id for g in got.stale] == ["task-a", "task-b", "task-c"]
        assert [(g.id, g.task.id, g.oldest) for g in got.groups] == [(3, "task-a", 2), (4, "task-b", 2)]
        collector.start(tasks("d"))
        while not collector.waiting:
            collector.advance(0.1)
        local.load(weights(3))
        assert [g.oldest for g in collector.take(1, max_lag=1).groups] == [2]


def test_abort_forgets(local):
    with collector_of(local) as collector:
        collector.start(tasks("a", "b"))
        collector.advance(0.0)
        collector.abort()
        assert collector.take(2).groups == []
        assert [g.task.id for g in collector.collect(tasks("c")).groups] == ["task-c"]


def test_local_stream_is_the_local_engine(local):
    requests = [Request(prompt=p, sampling=Sampling(max_tokens=8, n=2), seed=1) for p in ("one", "two two")]
    expected = [c.tokens.tolist() for c in local.generate(requests)]
    stream = LocalStream(local)
    other = stream.submit([Request(prompt="other", sampling=Sampling(max_tokens=3, n=2))])
    assert [c.tokens.tolist() for c in stream.generate(requests)] == expected
    late: list = []
    while len(late) < 2:
        late += stream.poll(1.0)
    assert {(f.ticket, f.sample) for f in late} == {(other[0], 0), (other[0], 1)}
    assert stream.poll(0.0) == []


def test_admission_is_that_of_the_reference():
    """algorithms.md section 11: eta 4, v 10, B 32, accepted 400, running 50, at most 100 -> 30."""
    assert room(max_lag=4, batch=32, waiting=400 - 10 * 32, running=50, most=100) == 30
    assert room(max_lag=0, batch=8, waiting=0, running=0, most=100) == 8
    assert room(max_lag=0, batch=8, waiting=3, running=5, most=100) == 0
    assert room(max_lag=9, batch=8, waiting=0, running=90, most=64) == 0


def test_as_many_are_kept_ahead_as_can_be_used():
    """Two standard deviations below what would be wanted; all of it where every group is kept."""
    draws = np.random.default_rng(0)
    for wanted, share in ((8, 1.0), (8, 0.5), (8, 0.25), (64, 0.25), (256, 0.1)):
        n = ahead(wanted, share)
        kept = draws.binomial(n, share, 20_000)
        assert np.mean(kept > wanted) < 0.05, "what is beyond grows too old"
        assert n * share + 2 * np.sqrt(n * share * (1 - share)) > wanted - 1.1, "and no fewer than that allows"
    assert ahead(8, 1.0) == 8


@pytest.mark.parametrize("max_lag", [None, 1])
def test_where_most_are_refused_they_are_not_replaced_one_by_one(max_lag):
    rounds: list[int] = []

    class Source(Completions):
        def start(self, given, seeds):
            rounds.append(len(given))
            return super().start(given, seeds)

    more = iter(tasks(*("ab" if i % 4 == 3 else "a" for i in range(1000))))
    keep = lambda g: len(g.task.prompt) == 2  # noqa: E731
    with Collector(Source(fake(lambda prompt, seed, sample: prompt), Sampling(n=1)), Content()) as collector:
        for _ in range(12):
            collector.start([next(more) for _ in range(max(8 - collector.in_flight - collector.waiting, 0))])
            got = collector.take(8, keep=keep, more=more, refills=64, max_lag=max_lag)
            assert len(got.groups) == 8
            ids = [g.id for g in got.groups]
            assert ids == sorted(ids)
            assert not got.stale
            last, rounds[:] = [n for n in rounds if n], []
        under_way = collector.in_flight + collector.waiting
    if max_lag is None:
        assert max(last[1:]) == 1, "one for one: as a run that draws and learns in turn has always done"
        assert under_way == 0
    else:
        assert len(last) <= 5, "what is missing comes in few rounds"
        assert 8 <= under_way <= 32, "and the next step's is under way: a quarter of it will do"


def test_episodes_are_rollouts_like_others():
    """One completion each, tool output in it with mask 0, judged by the text of its last turn."""

    class Echo:
        tools = ()

        def __init__(self, task):
            self.turn = 0

        def reset(self, task):
            return [{"role": "user", "content": task.prompt}]

        def step(self, text):
            self.turn += 1
            return Step(observation=({"role": "user", "content": f"again {text}"},), done=self.turn == 2)

        def close(self):
            pass

    engine = FakeEngine(lambda prompt, seed, sample: f"s{sample}" + "!" * prompt.count("again"))
    episodes = EpisodeEngine(RequestStream(engine), TOK, Echo, EpisodeLimits(tokens=400))
    source = Completions(episodes, Sampling(n=2, max_tokens=20))
    with closing(episodes), pool(Even()) as judge, Collector(source, judge) as collector:
        got = collector.collect(tasks("go", "on"))
    assert [r.task.id for r in got.rollouts] == ["task-go", "task-go", "task-on", "task-on"]
    for i, r in enumerate(got.rollouts):
        assert TOK.decode(r.completion.tokens).startswith(f"s{i % 2}")
        assert r.completion.text == "s0!"  # the last turn
        assert 0 < r.completion.mask.sum() < len(r.completion.tokens)
        assert r.verdict.status == "wrong"
