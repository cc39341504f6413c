"""Many items: order, exceptions as infra_error, the proof before a run, kills while it runs, a Ray actor."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import pytest

from cabochon.types import Task, Verdict
from cabochon.verifiers.base import Probe
from cabochon.verifiers.build import probes_for, verifier_for
from cabochon.verifiers.math import MATH_WORKERS, MathVerifier
from cabochon.verifiers.pool import GradingBroken, VerifierPool
from cabochon.verifiers.workers import shared_pool

PROBE = Probe(task=Task(id="probe", prompt="1+1?", verifier="math", payload={"answer": "2"}), gold="\\boxed{2}")


def math_task(gold: str, number: int = 0) -> Task:
    return Task(id=f"m/{number}", prompt="", verifier="math", payload={"answer": gold})


@dataclass(frozen=True)
class Grader:
    """A verifier whose failings are chosen."""

    failures: list[Exception] = field(default_factory=list)
    gold: float = 1.0
    blank: float = 0.0

    def verify(self, task: Task, text: str) -> Verdict:
        if text.startswith("fail") and self.failures:
            raise self.failures.pop(0)
        score = self.gold if text == "\\boxed{2}" else self.blank
        return Verdict(score=score, status="ok" if score else "wrong")


def test_order_is_kept_whatever_takes_long() -> None:
    tasks = [math_task(str(n), n) for n in range(60)]
    texts = [f"\\boxed{{{n if n % 3 else n + 1}}}" for n in range(60)]
    texts[30] = "\\boxed{\\max(" + ",".join(f"x^{{{n}}}+\\sin({n}x)" for n in range(60)) + ")}"
    with VerifierPool(verifier=MathVerifier(deadline=0.5), probes=[PROBE], concurrency=2) as pool:
        verdicts = pool.verify(tasks, texts)
    assert [verdict.score for verdict in verdicts] == [float(n % 3 != 0) if n != 30 else 0.0 for n in range(60)]
    assert all(verdict.seconds > 0 for verdict in verdicts)


def test_statuses_are_counted() -> None:
    with VerifierPool(verifier=MathVerifier(), probes=[PROBE]) as pool:
        before = pool.stats.items
        pool.verify([math_task("5")] * 3, ["\\boxed{5}", "\\boxed{6}", ""])
        assert before == 3
        assert pool.stats.items == 6
        assert pool.stats.statuses == {"ok": 2, "no_answer": 2, "wrong": 1, "malformed": 1}


def test_a_grader_that_pays_for_nothing_does_not_start() -> None:
    with pytest.raises(GradingBroken, match="blank answer of task probe must score 0, got 1"):
        VerifierPool(verifier=Grader(blank=1.0), probes=[PROBE])


def test_a_grader_that_does_not_know_the_gold_does_not_start() -> None:
    with pytest.raises(GradingBroken, match="gold answer of task probe must score 1, got 0"):
        VerifierPool(verifier=Grader(gold=0.0), probes=[PROBE])


def test_a_grader_that_raises_off_the_main_thread_does_not_start() -> None:
    class MainThreadOnly:
        def verify(self, task: Task, text: str) -> Verdict:
            signal.signal(
                signal.SIGALRM, signal.SIG_DFL
            )  # what math-verify's timeout does; it raises off the main thread
            return Verdict(score=1.0, status="ok")

    with pytest.raises(GradingBroken, match="signal only works in main thread"):
        VerifierPool(verifier=MainThreadOnly(), probes=[PROBE])


def test_without_a_probe_nothing_starts() -> None:
    with pytest.raises(ValueError, match="probe"):
        VerifierPool(verifier=Grader(), probes=[])
    with VerifierPool.unproven(verifier=Grader()) as pool:
        assert pool.verify_one(PROBE.task, "\\boxed{2}").score == 1.0


def test_a_reward_function_without_a_known_gold_starts_if_it_judges_and_not_if_it_raises(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def half(completions, **_): return [0.5] * len(completions)\n"
        "def broken(completions, lost, **_): return [1.0]\n"
        "def percent(completions, answer, **_): return [100.0 * (c == a) for c, a in zip(completions, answer)]\n"
    )
    names = ("half", "broken", "percent")
    tasks = {name: Task(id="t", prompt="p", verifier=f"{file}:{name}", payload={"answer": "7"}) for name in names}
    fails = {"broken": r"broken fails on the blank answer of task t: .*lost",
             "percent": r"percent fails on the right answer of task t: .*returned 100, outside \[0, 1\]"}  # fmt: skip
    for name, task in tasks.items():
        (probe,) = probes_for([task])
        assert probe.gold is None
        if name == "half":
            with VerifierPool(verifier=verifier_for([task]), probes=[probe]) as pool:
                assert pool.verify_one(task, "anything").score == 0.5
        else:
            with pytest.raises(GradingBroken, match=fails[name]):
                VerifierPool(verifier=verifier_for([task]), probes=[probe])


def test_an_exception_is_retried_and_then_an_infra_error_without_a_score() -> None:
    with VerifierPool(verifier=Grader(failures=[OSError("lost")]), probes=[PROBE], retries=1) as pool:
        assert pool.verify_one(PROBE.task, "fail once").status == "wrong"
        assert pool.stats.retried == 1
    with VerifierPool(verifier=Grader(failures=[OSError("lost")] * 5), probes=[PROBE], retries=1) as pool:
        verdict = pool.verify_one(PROBE.task, "fail always")
        assert (verdict.score, verdict.status) == (None, "infra_error")
        assert verdict.detail == "OSError: lost"


def test_an_unusable_task_is_an_infra_error_at_once() -> None:
    with VerifierPool(verifier=MathVerifier(), probes=[PROBE], retries=3) as pool:
        verdict = pool.verify_one(Task(id="broken", prompt="", verifier="math"), "\\boxed{5}")
        assert verdict.status == "infra_error"
        assert "broken" in verdict.detail
        assert pool.stats.retried == 0


def test_lengths_must_agree() -> None:
    with (
        VerifierPool(verifier=Grader(), probes=[PROBE]) as pool,
        pytest.raises(ValueError, match="1 tasks for 2 texts"),
    ):
        pool.verify([PROBE.task], ["a", "b"])


def test_workers_killed_during_a_batch_cost_nothing_but_time() -> None:
    tasks = [math_task("x^2+2x+1", n) for n in range(300)]
    texts = ["\\boxed{(x+1)^2}" if n % 2 else "\\boxed{(x-1)^2}" for n in range(300)]
    stop = threading.Event()
    workers = shared_pool(MATH_WORKERS)

    def killer() -> None:
        while not stop.wait(0.05):
            children = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(workers._zygote.pid)], capture_output=True, text=True, check=False
            ).stdout.split()
            for pid in children[:1]:
                os.kill(int(pid), signal.SIGKILL)

    with VerifierPool(verifier=MathVerifier(), probes=[PROBE], concurrency=2) as pool:
        killed = workers.stats.killed
        thread = threading.Thread(target=killer)
        thread.start()
        verdicts = pool.verify(tasks, texts)
        stop.set()
        thread.join()
    assert workers.stats.killed > killed
    judged = [verdict for verdict in verdicts if verdict.status != "infra_error"]
    assert len(judged) >= 295  # an item is lost only if three workers in a row were killed under it
    for number, verdict in enumerate(verdicts):
        assert verdict.score in (None, float(number % 2))


@pytest.mark.parametrize("late", [0.0, 3.0], ids=["at work", "before its worker is there"])
def test_ctrl_c_does_not_wait_for_the_items_in_hand(tmp_path, late: float) -> None:
    path = tmp_path / "slow.py"
    path.write_text("import time\ndef sleeps(completions, **kwargs):\n    time.sleep(60)\n    return [1.0]\n")
    asked = f"{path}:sleeps"
    task = Task(id="s", prompt="p", verifier=asked, payload={})
    verifier = verifier_for([task])

    class Late:
        def verify(self, task: Task, text: str) -> Verdict:
            time.sleep(late)
            return verifier.verify(task, text)

    pool = VerifierPool.unproven(verifier=Late(), concurrency=1, retries=0)

    def stopped_at_once() -> None:
        with pool:
            for text in ("a", "b"):
                pool._threads.submit(pool.verify_one, task, text)
            time.sleep(2)
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stopped_at_once()
    assert time.monotonic() - start < 10, "each would take half a minute"
    assert pool.stats.statuses == {"infra_error": 1}, "the second was not begun"


def test_the_room_loads_no_accelerator_stack() -> None:
    code = (
        "import sys\n"
        "import cabochon.verifiers.build, cabochon.verifiers.cli, cabochon.verifiers.compose, cabochon.verifiers.math\n"
        "import cabochon.verifiers.instructions, cabochon.verifiers.reasoning, cabochon.verifiers.tasks\n"
        "import cabochon.verifiers.functions, cabochon.verifiers.pool, cabochon.verifiers.format\n"
        "import cabochon.verifiers.math_solver, cabochon.verifiers.probe, cabochon.verifiers.math_judge\n"
        "print(sorted({'jax', 'flax', 'ray', 'torch', 'optax', 'trl'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_it_works_inside_a_ray_actor() -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:

        @ray.remote
        class Judge:
            def run(self) -> list[float | None]:
                with VerifierPool(verifier=MathVerifier(deadline=0.5), probes=[PROBE], concurrency=2) as pool:
                    texts = ["\\boxed{5}", "\\boxed{6}", "\\boxed{9^{9^{9}}}"]
                    return [verdict.score for verdict in pool.verify([math_task("5")] * 3, texts)]

        start = time.monotonic()
        assert ray.get(Judge.remote().run.remote(), timeout=120) == [1.0, 0.0, 0.0]
        assert time.monotonic() - start < 120
    finally:
        ray.shutdown()
