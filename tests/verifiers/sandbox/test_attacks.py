"""The shipped attack suite against both isolations: nothing wins, honest programs are paid, neighbours and host stay
as they were."""

import subprocess
from dataclasses import replace

import pytest
from boxes import ISOLATED, opened

from cabochon.errors import UserError
from cabochon.verifiers.code import CodeVerifier
from cabochon.verifiers.sandbox import attacks
from cabochon.verifiers.sandbox.bubblewrap import BubblewrapSandbox
from cabochon.verifiers.sandbox.cli import line, table
from cabochon.verifiers.sandbox.docker import DockerSandbox

QUICK = replace(attacks.LIMITS, wall_seconds=3.0, cpu_seconds=3.0)
SLOW_TO_FAIL = {
    "stops itself", "patched codec", "right but never ends",
    "right, forged trailer, never ends", "thread bomb", "sleeps", "sleeps at load", "spins",
    "big power",
    "files without content", "regular expression", "fork bomb at load", "floods standard output",
    "looks for expected output",
    "a huge description", "ignores signals", "drips on every descriptor", "endless iterator", "settrace",
}  # fmt: skip
"""Held until their time is over: left to the slow suite."""
ON_DOCKER = {
    "exit in the call", "always equal", "int that is equal to all", "patched builtins", "walks frames",
    "reads its memory",
    "forged verdict on every descriptor", "answers in advance", "patched answer", "arithmetic of its own",
    "class with capital",
    "makes its input agree", "right but dies", "patches TestCase", "reads a host file", "through process 1",
    "host port",
    "host abstract socket", "becomes root", "new user namespace", "mounts", "traces process 1", "memory of process 1",
    "setuid copy", "signals everyone", "environment", "others' files", "leaves a note", "memory by many children",
    "fork bomb",
    "disk", "floods standard error", "a frame of four gigabytes", "daemon", "busy daemon", "respawning child", "noisy",
    "threads",
    "200 MB", "sys.exit under main guard", "own classes inside", "deep recursion", "temporary files", "processes",
    "stack",
    "in place", "reads all at once", "io_uring", "host of the virtual machine", "others' descriptors", "shared memory",
    "queue of processes", "a child prints", "interrupts process 1", "limits of process 1", "priority of process 1",
    "opens standard output", "lowers itself", "right, forged trailer, never ends", "a description that grows",
    "what its user may have",
}  # fmt: skip
"""What the default suite runs on docker, where each takes most of a second."""


def check(kind, chosen, limits):
    with opened(kind, QUICK, warm=3) as box:
        findings = list(attacks.run(box, chosen, limits=limits))
    assert len(findings) == len(chosen)
    assert not [line(f) for f in findings if f.problem], table(findings)


def test_the_suite_is_large_enough():
    suite = attacks.suite()
    assert len(suite) == len({(a.form, a.name) for a in suite})
    assert sum(a.pay == "never" for a in suite) >= 60
    assert sum(a.pay == "always" for a in suite) >= 15
    assert {a.group for a in suite} == {"forging", "escaping", "spying", "exhausting", "lingering", "honest"}
    assert {a.name for a in suite} >= ON_DOCKER | SLOW_TO_FAIL


@pytest.mark.bubblewrap
def test_most_programs_on_bubblewrap():
    check("bubblewrap", [a for a in attacks.suite() if a.name not in SLOW_TO_FAIL], QUICK)


@pytest.mark.docker
def test_many_programs_on_docker():
    check("docker", [a for a in attacks.suite() if a.name in ON_DOCKER], QUICK)


@pytest.mark.bubblewrap
def test_bombs_without_control_groups():
    """Where there are none, rlimits and the launcher's watch have to hold the tree."""
    opened("bubblewrap", QUICK, warm=3).close()
    names = {"fork bomb", "memory", "memory by many children", "shared memory", "memory files", "pipes", "disk",
             "200 MB", "threads"}  # fmt: skip
    chosen = [a for a in attacks.suite() if a.name in names]
    with BubblewrapSandbox(limits=QUICK, warm=2, cgroups=False) as box:
        findings = list(attacks.run(box, chosen, limits=QUICK))
        assert not [line(f) for f in findings if f.problem], table(findings)
        many = next(f for f in findings if f.attack.name == "memory by many children")
        assert many.verdict.status == "oom"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ISOLATED)
def test_every_program(kind):
    check(kind, attacks.suite(), attacks.LIMITS)


@pytest.mark.docker
def test_a_sandbox_that_cannot_be_had_leaves_nothing_of_the_host_s_bait(monkeypatch):
    """A `sleep` left over held the pipe its output went to, and whoever read it waited an hour."""
    hosts = []

    class Recorded(attacks.Host):
        def __init__(self):
            super().__init__()
            hosts.append(self)

    monkeypatch.setattr(attacks, "Host", Recorded)
    with DockerSandbox(image="cabochon-none:none") as box, pytest.raises(UserError, match="is not on the engine"):
        next(attacks.run(box))
    assert hosts[0].process.poll() is not None
    assert not hosts[0].folder.exists()


@pytest.mark.bubblewrap
def test_the_runner_sees_a_program_that_wins():
    """The checks themselves: a program that is paid, one that touches the host, an honest one judged wrong."""
    with opened("bubblewrap", QUICK, warm=3) as box:
        host, neighbour = attacks.Host(), attacks.Neighbour(box)
        verifier = CodeVerifier(box, limits=QUICK)
        paid = attacks.Attack(name="paid", group="forging", form="squares", source="def solve(x): return x * x")
        assert attacks._one(box, verifier, host, neighbour, paid).problem == "paid 1.0"
        unpaid = replace(paid, name="unpaid", group="honest", source="def solve(x): return 1", pay="always")
        assert "honest program was judged wrong" in attacks._one(box, verifier, host, neighbour, unpaid).problem
        assert host.touched() == neighbour.touched() == ""
        (host.folder / "written").write_text("x")
        assert "host files changed" in host.touched()
        (host.folder / "written").unlink()
        subprocess.run(["kill", str(host.process.pid)], check=True)
        host.process.wait()
        assert host.touched() == "a process of the host was killed"
        neighbour.session.kill()
        assert "does not answer" in neighbour.touched()
        neighbour.close()
        host.close()
