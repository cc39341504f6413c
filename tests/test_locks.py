"""One process at a time, and patience with one that is about to leave."""

import os
import subprocess
import sys
import time

import pytest

from cabochon import locks
from cabochon.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from cabochon.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.readline()
os._exit(9)  # as after kill -9: the child is not waited for
"""


@pytest.fixture
def orphan(tmp_path):
    """Makes a holder of the directory whose parent then dies; gives its pid."""

    def made(seconds):
        words = [sys.executable, "-c", PARENT, HOLD, str(tmp_path), str(seconds)]
        job = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        pid = int(job.stdout.readline())
        with pytest.raises(UserError, match=f"process {pid} is running there"), locks.locked(tmp_path):
            pass  # while its parent lives it is not waited for
        job.communicate("go\n", timeout=30)
        return pid

    return made


def test_a_stage_whose_job_was_killed_is_waited_for(tmp_path, orphan, capfd):
    pid = orphan(2.0)
    with locks.locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()} {os.getppid()}"
    assert capfd.readouterr().err == (
        f"{tmp_path}: process {pid} is running there, and its job is gone: waiting for it to leave\n"
    )


def test_and_not_for_ever(tmp_path, orphan, monkeypatch):
    monkeypatch.setattr(locks, "LEAVING_SECONDS", 0.5)
    pid, began = orphan(20.0), time.monotonic()
    with pytest.raises(UserError, match=f"process {pid} is running there"), locks.locked(tmp_path):
        pass
    assert 0.5 <= time.monotonic() - began < 15
    os.kill(pid, 9)


def test_who_looks_on_sees_whether_it_is_held(tmp_path):
    assert not locks.held(tmp_path)
    with locks.locked(tmp_path):
        assert locks.held(tmp_path)
    (tmp_path / ".lock").write_text("999999999 1")
    assert not locks.held(tmp_path), "its process is gone"


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be a run directory"), locks.locked(tmp_path / "file"):
        pass
