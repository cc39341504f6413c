"""The owner's side of a zygote by itself: whose workers it may touch, and how it ends."""

import contextlib
import os
import pathlib
import signal
import socket
import time

import pytest

from cabochon.verifiers import zygote as module
from cabochon.verifiers.zygote import MachineFailure, Zygote


def living(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while living(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not living(pid)


@pytest.fixture
def zygote():
    made = Zygote(preload=(), prepare=(), memory_mib=256, keep_environment=(), start_seconds=30.0)
    yield made
    with contextlib.suppress(ProcessLookupError):
        if made.pid is not None:
            os.kill(made.pid, signal.SIGCONT)
    made.close()


@pytest.fixture
def connection():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield theirs


def test_a_worker_is_reaped_with_its_status(zygote, connection):
    pid, parent = zygote.fork(connection)
    assert living(pid)
    assert parent == zygote.pid
    assert zygote.reap(pid, parent) == signal.SIGKILL
    assert not living(pid)


def test_a_worker_of_an_earlier_zygote_is_nobodys_to_kill(zygote, connection):
    """Its number may be a stranger's by now: here it is, a process of the test's own."""
    zygote.fork(connection)
    stranger = os.fork()
    if stranger == 0:
        os.setpgid(0, 0)
        time.sleep(60)
        os._exit(0)
    try:
        assert zygote.reap(stranger, zygote.pid + 1) == 0
        assert living(stranger)
        parent, start = zygote.pid, time.monotonic()
        zygote.close()
        assert time.monotonic() - start < 1, "the stranger holds a copy of the connection, which is no reason to wait"
        assert zygote.reap(stranger, parent) == 0
        assert living(stranger)
    finally:
        os.kill(stranger, signal.SIGKILL)
        os.waitpid(stranger, 0)


def test_a_zygote_killed_before_the_reaping_is_replaced(zygote, connection):
    pid, parent = zygote.fork(connection)
    os.kill(parent, signal.SIGKILL)
    assert gone(pid), "a worker dies with its zygote"
    assert zygote.reap(pid, parent) == 0
    assert zygote.pid is None
    assert zygote.fork(connection)[1] == zygote.pid != parent


def test_a_zygote_that_does_not_end_is_killed_in_time_and_its_workers_with_it(zygote, connection, monkeypatch):
    monkeypatch.setattr(module, "STOP_SECONDS", 0.5)
    pid, parent = zygote.fork(connection)
    os.kill(parent, signal.SIGSTOP)
    start = time.monotonic()
    zygote.close()
    assert 0.5 <= time.monotonic() - start < 5
    assert gone(parent)
    assert gone(pid)


def test_nothing_is_forked_after_the_close(zygote, connection):
    zygote.close()
    with pytest.raises(MachineFailure, match="the worker pool is closed"):
        zygote.fork(connection)
    assert zygote.pid is None


def test_an_interpreter_that_dies_importing_says_its_last_line(connection, tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("raise OSError('no such library')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = Zygote(preload=("dies",), prepare=(), memory_mib=256, keep_environment=(), start_seconds=30.0)
    with pytest.raises(MachineFailure, match="did not start: OSError: no such library"):
        broken.fork(connection)
    assert broken.pid is None
    broken.close()
