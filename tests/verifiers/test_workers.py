"""Killable workers: deadlines, kills, caps, a clean environment, and what is counted."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from clock import shortest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cabochon.verifiers.worker_main import HEADER
from cabochon.verifiers.workers import WorkerConfig, WorkerPool, shared_pool
from cabochon.verifiers.zygote import NotReady

JOBS = """
import ctypes, os, time

def add(a, b): return a + b
def pid(): return os.getpid()
def spin(): 
    while True: pass
def nap(seconds): time.sleep(seconds); return seconds
def busy(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass
    return seconds
def eat(): return len([bytearray(1 << 20) for _ in range(4096)])
def fault(): ctypes.string_at(0)
def fail(): raise KeyError("no such grader")
def dive(n=0): return dive(n + 1)
def environment(): return dict(os.environ)
def unplain(): return object()
def huge(): return "x" * (9 << 20)
def echo(text): return text
def die(): os._exit(3)
def real_time(): os.kill(os.getpid(), 40)
def name_it(name): os.environ["PREPARED"] = name
def prepared(): return os.environ["PREPARED"]
def never(name): time.sleep(600)
def start_thread(name):
    import threading
    threading.Thread(target=time.sleep, args=(600,)).start()
def threads():
    import threading
    return threading.active_count()
def suicide(): os.kill(os.getpid(), 9)
def garbage(data):
    for fd in range(3, 30):
        try: os.write(fd, bytes(data))
        except OSError: pass
def child():
    pid = os.fork()
    if pid == 0: time.sleep(600); os._exit(0)
    return pid
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "cabochon_test_jobs.py").write_text(JOBS)
    return str(folder)


@pytest.fixture
def pool(jobs: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(jobs)
    made = WorkerPool(WorkerConfig(size=2, memory_mib=512, retries=2))
    yield made
    made.close()


def run(pool: WorkerPool, name: str, deadline: float = 5.0, **arguments):
    return pool.call(f"cabochon_test_jobs:{name}", arguments, deadline=deadline)


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_value_comes_back_and_the_worker_is_used_again(pool: WorkerPool) -> None:
    assert run(pool, "add", a=2, b=40).value == 42
    assert run(pool, "pid").value == run(pool, "pid").value
    assert pool.stats.replaced == 0


def test_text_of_every_kind_survives_the_way_there_and_back(pool: WorkerPool) -> None:
    for text in ("\x00", "\ud800", "é∑\U0001f600", "a" * 3_000_000, "\\" * 1000):
        assert run(pool, "echo", text=text).value == text


def test_an_endless_loop_is_a_timeout_within_a_second_of_the_deadline(pool: WorkerPool) -> None:
    ended = []
    assert 0.45 < shortest(1.5, lambda: ended.append(run(pool, "spin", deadline=0.5).status)) < 1.5
    assert set(ended) == {"timeout"}
    assert pool.stats.timeouts == pool.stats.replaced == len(ended)
    assert run(pool, "add", a=1, b=1).value == 2


def test_a_deadline_missed_without_cpu_is_the_machines_doing_unless_said_otherwise(pool: WorkerPool) -> None:
    assert run(pool, "nap", deadline=0.2, seconds=30).status == "infra_error"
    assert pool.stats.stalled == 3  # one try and two retries
    outcome = pool.call("cabochon_test_jobs:nap", {"seconds": 30}, deadline=0.2, on_stall="timeout")
    assert outcome.status == "timeout"
    stalled, replaced = pool.stats.stalled, pool.stats.replaced
    assert pool.call("cabochon_test_jobs:nap", {"seconds": 30}, deadline=0.2, on_stall="fail").status == "infra_error"
    assert (pool.stats.stalled, pool.stats.replaced) == (stalled + 1, replaced + 1), "one try, and its worker is gone"


def test_waiting_for_a_free_worker_does_not_count(jobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(jobs)
    pool = WorkerPool(WorkerConfig(size=1))
    try:
        run(pool, "add", a=1, b=1)
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(run(pool, "nap", deadline=0.6, seconds=0.3).status))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == ["done"] * 4  # the last one waited 0.9 s for its turn
    finally:
        pool.close()


def test_a_worker_killed_mid_item_is_replaced_and_the_item_tried_again(pool: WorkerPool) -> None:
    first = run(pool, "pid").value
    results = []
    thread = threading.Thread(target=lambda: results.append(run(pool, "nap", deadline=5, seconds=0.6)))
    thread.start()
    time.sleep(0.2)
    os.kill(first, signal.SIGKILL)
    thread.join()
    assert results[0].status == "done"
    assert results[0].value == 0.6
    assert pool.stats.killed == 1
    assert pool.stats.replaced == 1
    assert run(pool, "pid").value != first


def test_an_item_whose_workers_are_always_killed_ends_as_infra_error(pool: WorkerPool) -> None:
    outcome = run(pool, "suicide")
    assert outcome.status == "infra_error"
    assert "killed" in outcome.detail
    assert pool.stats.killed == 3


def test_a_killed_zygote_is_started_again(pool: WorkerPool) -> None:
    worker = run(pool, "pid").value
    zygote = pool._zygote.pid
    os.kill(zygote, signal.SIGKILL)
    assert gone(worker)  # its workers die with it
    assert run(pool, "add", a=20, b=1).value == 21
    assert pool._zygote.pid != zygote


def test_memory_is_capped(pool: WorkerPool) -> None:
    assert run(pool, "eat", deadline=60).status == "oom"
    assert run(pool, "add", a=1, b=2).value == 3


def test_a_fault_is_a_crash(pool: WorkerPool) -> None:
    outcome = run(pool, "fault")
    assert outcome.status == "crash"
    assert "SIGSEGV" in outcome.detail


def test_a_function_that_raises_is_infra_error_and_says_what(pool: WorkerPool) -> None:
    outcome = run(pool, "fail")
    assert outcome.status == "infra_error"
    assert "KeyError: 'no such grader'" in outcome.detail
    assert "in fail" in outcome.value


@pytest.mark.parametrize(
    ("name", "status"), [("dive", "recursion"), ("unplain", "infra_error"), ("huge", "infra_error")]
)
def test_other_ends(pool: WorkerPool, name: str, status: str) -> None:
    assert run(pool, name).status == status
    assert run(pool, "add", a=1, b=2).value == 3


def test_no_secret_of_the_environment_reaches_a_worker(jobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(jobs)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("JUDGE_URL", "http://judge")
    pool = WorkerPool(WorkerConfig(size=1, keep_environment=("JUDGE_URL",)))
    try:
        seen = run(pool, "environment").value
    finally:
        pool.close()
    assert "secret" not in str(seen)
    assert "HOME" not in seen
    assert seen["JUDGE_URL"] == "http://judge"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    data=st.one_of(
        st.binary(min_size=1, max_size=60),
        st.sampled_from(
            [
                b"\x00" * 8,
                b"\xff" * 8,
                b"\x00" * 7 + b"\x02[]",
                b"\x00" * 7 + b"\x04null",
                b"\x00" * 7 + b'\x0b{"value":1',
                b"\x00" * 7 + b'\x0e{"error":"oom"}',
            ]
        ),
    )
)
def test_whatever_a_worker_sends_the_owner_lives(pool: WorkerPool, data: bytes) -> None:
    ended = []
    assert shortest(3, lambda: ended.append(run(pool, "garbage", deadline=0.5, data=list(data)).status)) < 3
    assert set(ended) <= {"crash", "done", "infra_error", "timeout"}
    assert run(pool, "add", a=2, b=2).value == 4


def test_a_single_use_worker_dies_after_its_item_with_what_it_started(pool: WorkerPool) -> None:
    worker = pool.call("cabochon_test_jobs:pid", {}, deadline=5, single_use=True).value
    assert gone(worker)
    child = pool.call("cabochon_test_jobs:child", {}, deadline=5, single_use=True).value
    assert gone(child)
    assert pool.stats.replaced == 0


def test_the_pool_works_off_the_main_thread_from_its_first_call(jobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(jobs)
    results = []

    def work() -> None:
        pool = WorkerPool(WorkerConfig(size=1))
        results.append(run(pool, "add", a=40, b=2).value)
        results.append(run(pool, "spin", deadline=0.3).status)
        pool.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [42, "timeout"]


def test_closing_leaves_no_process(jobs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(jobs)
    pool = WorkerPool(WorkerConfig(size=2))
    pids = [run(pool, "pid").value, pool._zygote.pid]
    pool.close()
    assert all(gone(pid) for pid in pids)
    assert run(pool, "pid").status == "infra_error"


def test_workers_die_with_an_owner_that_is_killed(jobs: str, tmp_path: pathlib.Path) -> None:
    script = (
        f"import sys, time; sys.path.insert(0, {jobs!r})\n"
        "from cabochon.verifiers.workers import WorkerConfig, WorkerPool\n"
        "pool = WorkerPool(WorkerConfig(size=1))\n"
        "print(pool.call('cabochon_test_jobs:pid', {}, deadline=5).value, pool._zygote.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    owner.kill()
    owner.wait()
    assert all(gone(pid) for pid in pids)


def test_a_module_that_cannot_be_imported_is_one_clear_line() -> None:
    pool = WorkerPool(WorkerConfig(preload=("no_such_module_of_ours",), retries=0))
    outcome = pool.call("math:factorial", {}, deadline=1)
    pool.close()
    assert outcome.status == "infra_error"
    assert "No module named 'no_such_module_of_ours'" in outcome.detail


def test_a_pool_closed_between_taking_and_starting_a_worker_starts_none(jobs: str, monkeypatch) -> None:
    """Otherwise an interpreter outlives the close, and Ctrl-C waits for the item it runs."""

    class ClosedThen(WorkerPool):
        def _fork(self):
            self.close()
            return super()._fork()

    monkeypatch.syspath_prepend(jobs)
    pool = ClosedThen(WorkerConfig(size=1))
    start = time.monotonic()
    outcome = pool.call("cabochon_test_jobs:nap", {"seconds": 30}, deadline=60)
    assert (outcome.status, outcome.detail) == ("infra_error", "the worker pool is closed")
    assert time.monotonic() - start < 20
    assert pool._zygote.pid is None


def test_an_interpreter_that_is_never_done_importing_is_waited_for_once(jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    pathlib.Path(jobs, "never_done.py").write_text("import time; time.sleep(600)\n")
    monkeypatch.syspath_prepend(jobs)
    pool = WorkerPool(WorkerConfig(size=1, preload=("never_done",), start_seconds=1.0))
    start = time.monotonic()
    for _ in range(3):
        outcome = pool.call("cabochon_test_jobs:pid", {}, deadline=5)
        assert outcome.status == "infra_error"
        assert outcome.detail == "the worker interpreter was not done importing never_done in 1 s"
    assert time.monotonic() - start < 3
    pool.close()


def test_closing_does_not_wait_for_an_import(jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    pathlib.Path(jobs, "long_import.py").write_text("import time; time.sleep(600)\n")
    monkeypatch.syspath_prepend(jobs)
    pool = WorkerPool(WorkerConfig(size=1, preload=("long_import",)))
    outcomes = []
    caller = threading.Thread(target=lambda: outcomes.append(run(pool, "pid")))
    caller.start()
    until = time.monotonic() + 10
    while pool._zygote.pid is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)
    start = time.monotonic()
    pool.close()
    caller.join(10)
    assert time.monotonic() - start < 3
    assert (outcomes[0].status, outcomes[0].detail) == ("infra_error", "the worker pool is closed")


def test_each_worker_prepares_itself_before_its_first_item(jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(jobs)
    named = WorkerPool(WorkerConfig(size=1, prepare=("cabochon_test_jobs:name_it", "a name with blanks")))
    assert run(named, "prepared").value == "a name with blanks"
    threaded = WorkerPool(WorkerConfig(size=1, prepare=("cabochon_test_jobs:start_thread", "x")))
    assert run(threaded, "threads").value == 2, "a thread is the worker's own, no fork comes after it"
    never = WorkerPool(WorkerConfig(size=1, prepare=("cabochon_test_jobs:never", "x"), start_seconds=1.0))
    start = time.monotonic()
    for _ in range(3):
        outcome = run(never, "pid")
        assert outcome.status == "infra_error"
        assert outcome.detail == "a worker was not done with cabochon_test_jobs:never x in 1 s"
    assert time.monotonic() - start < 5
    for pool in (named, threaded, never):
        start = time.monotonic()
        pool.close()
        assert time.monotonic() - start < 1.5


def test_a_worker_that_is_late_once_is_an_accident(jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(jobs)
    pool = WorkerPool(WorkerConfig(size=1, start_seconds=20.0))
    assert run(pool, "pid").status == "done"
    monkeypatch.setattr(pool._zygote, "fork", Once(pool._zygote.fork))
    assert run(pool, "die").status == "infra_error"
    assert run(pool, "pid").status == "done"
    pool.close()


class Once:
    """Raises at the first call."""

    def __init__(self, fork) -> None:
        self.fork = fork
        self.raised = False

    def __call__(self, connection):
        if not self.raised:
            self.raised = True
            raise NotReady("late")
        return self.fork(connection)


def test_a_signal_without_a_name_costs_its_item_alone(pool: WorkerPool) -> None:
    for _ in range(3):
        outcome = run(pool, "real_time")
        assert (outcome.status, outcome.detail) == ("crash", "the worker died of signal 40")
    assert run(pool, "add", a=1, b=2).value == 3


def test_a_reply_that_is_nested_without_end_costs_its_item_alone(pool: WorkerPool) -> None:
    outcome = run(pool, "garbage", data=list(HEADER.pack(200_000) + b"[" * 200_000))
    assert outcome.status == "crash", outcome
    assert outcome.detail.startswith("the worker sent garbage")
    assert run(pool, "add", a=1, b=2).value == 3


@pytest.mark.parametrize("way", ["close", "kill"])
def test_what_the_workers_started_ends_with_the_owner(jobs, way: str) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(jobs)!r})\n"
        "from cabochon.verifiers.workers import WorkerConfig, WorkerPool\n"
        "pool = WorkerPool(WorkerConfig(size=1))\n"
        "print(pool.call('cabochon_test_jobs:child', {}, deadline=20).value, flush=True)\n"
        "sys.stdin.read()\n"
        "pool.close()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    child = int(owner.stdout.readline())
    os.kill(child, 0)
    if way == "kill":
        owner.kill()
    owner.communicate(timeout=30)
    until = time.monotonic() + 15
    while is_alive(child):
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_worker_whose_zygote_died_before_it_asked_to_die_with_it_does_not_begin() -> None:
    code = (
        "import socket, threading; from cabochon.verifiers.worker_main import _work\n"
        "ours, theirs = socket.socketpair(); ours.settimeout(10)\n"
        "thread = threading.Thread(target=_work, args=(theirs, [], 1 << 40, 1 << 30), daemon=True); thread.start()\n"
        "thread.join(5); theirs.close(); print(thread.is_alive(), ours.recv(1))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False b''", done.stderr


def test_equal_configs_share_a_pool() -> None:
    assert shared_pool(WorkerConfig(size=1)) is shared_pool(WorkerConfig(size=1))
    assert shared_pool(WorkerConfig(size=1)) is not shared_pool(WorkerConfig(size=2))


def test_arguments_must_be_plain_data(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="plain data"):
        pool.call("math:factorial", {"x": object()}, deadline=1)


def test_nonsense_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="size >= 1"):
        WorkerConfig(size=0)
