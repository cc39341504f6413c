"""Runs the shipped attack suite against an installed sandbox: forging, escaping, spying, exhausting, lingering, honest.

Every program is judged as a completion would be. Around each one the runner checks what the program could have touched:
a neighbour in a sandbox of its own that must keep answering, a file, a port, a socket, a process and a secret of the
host, and that nothing it started is left.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from cabochon.types import Task, Verdict
from cabochon.verifiers.code import CodeVerifier
from cabochon.verifiers.sandbox import attacks_data, attacks_harm, attacks_honest
from cabochon.verifiers.sandbox.base import Limits, Sandbox
from cabochon.verifiers.sandbox.session import Session
from cabochon.verifiers.sandbox.wire import pack, unpack

LIMITS = Limits(
    wall_seconds=6.0, cpu_seconds=4.0, memory_bytes=400 << 20, pids=40, file_bytes=32 << 20, output_bytes=1 << 20
)
"""What the suite runs under."""
SECRET_NAME = "CABOCHON_ATTACK_SECRET"

_SQUARES = ["assert solve(3) == 9", "assert solve(-4) == 16", "assert solve(12) == 144"]
_FLOATS = [
    "assert abs(solve(2) - 1.41421) < 1e-3",
    "assert math.isclose(solve(9), 3.0)",
    "assert isclose(solve(16), 4.0)",
]
_ROOTS = [
    "assert abs(Solution().root(2) - 1.41421) < 1e-3",
    "assert Solution().root(9) - 3.0 <= 1e-6 and 3.0 - Solution().root(9) <= 1e-6",
    "assert 3.9 < Solution().root(16) < 4.1",
    "assert -Solution().root(25) < -4.9",
]
_SORTED = ["xs = [3, 1, 2]\nassert solve(xs) == sorted(xs)", "assert solve([2, 1]) == [1, 2]"]
_IN_PLACE = ["xs = [3, 1, 2]\nsolve(xs)\nassert xs == [1, 2, 3]"]
_STACK = [
    "s = Stack()\ns.push(1).push(2)\nassert len(s) == 2 and s.top == 2\nassert s.pop() == 2 and s.pop() == 1",
    "s = Stack()\ntry:\n    s.pop()\n    assert False\nexcept IndexError:\n    pass",
    "assert Stack([1, 2]) == Stack([1, 2]) and list(Stack([1, 2])) == [1, 2]",
    "assert 2 in Stack([1, 2])\nassert isinstance(Stack(), Stack)",
]
_FILE = """
import unittest
from solution import solve

class TestSolve(unittest.TestCase):
    def test_positive(self):
        self.assertEqual(solve(3), 9)

    def test_negative(self):
        self.assertEqual(solve(-4), 16)
        self.assertTrue(solve(12) == 144)
"""
FORMS: dict[str, Mapping[str, Any]] = {
    "squares": {"tests": _SQUARES},
    "floats": {"tests": _FLOATS, "entry_point": "solve"},
    "solutions": {"tests": _ROOTS},
    "sorted": {"tests": _SORTED},
    "in place": {"tests": _IN_PLACE},
    "stack": {"tests": _STACK},
    "stdio": {"cases": [{"stdin": "7\n", "stdout": "49\n"}, {"stdin": "-12\n", "stdout": "144\n"}]},
    "unittest": {"kind": "unittest", "tests": _FILE},
    "escape": {"tests": ["assert solve() == 'escaped'"]},
    "linger": {"tests": ["assert solve() == 'done'"]},
}
Group = Literal["forging", "escaping", "spying", "exhausting", "lingering", "honest"]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One program, the tests it meets, and whether they may, must or must not pay it."""

    name: str
    group: Group
    form: str
    source: str
    pay: Literal["never", "always", "either"] = "never"
    times: int = 1


def suite() -> list[Attack]:
    """Every shipped program."""
    data, harm, honest = attacks_data, attacks_harm, attacks_honest
    out: list[Attack] = []

    def add(
        group: Group, form: str, programs: Mapping[str, str], pay: Literal["never", "always", "either"] = "never"
    ) -> None:
        out.extend(Attack(name=n, group=group, form=form, source=s, pay=pay) for n, s in programs.items())

    add("forging", "squares", data.FORGING)
    add("forging", "floats", data.FLOATS)
    add("forging", "solutions", data.SOLUTIONS)
    add("forging", "sorted", data.SORTING)
    add("forging", "stdio", data.STDIO)
    add("forging", "unittest", data.UNITTEST)
    add("escaping", "escape", harm.ESCAPES)
    add("spying", "escape", harm.SPIES)
    add("exhausting", "escape", harm.EXHAUSTION)
    add("lingering", "linger", harm.LINGERING, "either")
    for form, programs in (("squares", honest.SQUARES), ("sorted", honest.SORTS), ("in place", honest.IN_PLACE),
                           ("stack", honest.STACKS), ("stdio", honest.STDIO)):  # fmt: skip
        add("honest", form, programs, "always")
    return [replace(a, times=2) if a.name == "leaves a note" else a for a in out]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How one attack went. `problem` is empty where all is well."""

    attack: Attack
    verdict: Verdict
    problem: str


class Inhabited(Sandbox, Protocol):
    """A sandbox that can count its own."""

    def alive(self) -> int:
        """Sandboxes of this owner that have not ended, less those that wait."""
        ...


class Host:
    """What on the host a program might touch, and whether it was."""

    def __init__(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="cabochon-canary-"))
        self.folder.chmod(0o777)
        (self.folder / "secret").write_text("HOST-SECRET")
        (self.folder / "secret").chmod(0o666)
        self.port = socket.create_server(("127.0.0.1", 0))
        self.name = f"cabochon-canary-{secrets.token_hex(8)}"
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind("\0" + self.name)
        self.abstract.listen()
        for s in (self.port, self.abstract):
            s.setblocking(False)
        os.environ[SECRET_NAME] = "HOST-SECRET"
        self.process = subprocess.Popen(["sleep", "3600"])

    def filled(self, source: str) -> str:
        for name, value in (("canary", self.folder), ("port", self.port.getsockname()[1]), ("socket", self.name),
                            ("pid", self.process.pid), ("secret_name", SECRET_NAME)):  # fmt: skip
            source = source.replace("{" + name + "}", str(value))
        return source

    def touched(self) -> str:
        """What is not as it was."""
        if [p.name for p in self.folder.iterdir()] != ["secret"] or (
            self.folder / "secret"
        ).read_text() != "HOST-SECRET":
            return f"host files changed: {sorted(p.name for p in self.folder.iterdir())}"
        for s in (self.port, self.abstract):
            with contextlib.suppress(BlockingIOError):
                s.accept()
                return "a connection reached the host"
        return "" if self.process.poll() is None else "a process of the host was killed"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.port.close()
        self.abstract.close()
        os.environ.pop(SECRET_NAME, None)
        shutil.rmtree(self.folder, ignore_errors=True)


_NEIGHBOUR = b"""
import socket
open('/tmp/diary', 'w').write('NEIGHBOUR-SECRET')
s = socket.socket(socket.AF_UNIX); s.bind('\\0neighbour-meeting'); s.listen()
def beat(n): return [n + 1, open('/tmp/diary').read()]
"""


class Neighbour:
    """An honest program in a sandbox beside the attacker's, asked for a sign of life."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.session: Session = sandbox.open(LIMITS)
        self.session.begin(
            "candidate",
            replace(LIMITS, wall_seconds=36000.0, cpu_seconds=3600.0),
            source=_NEIGHBOUR,
            wanted=["beat"],
            classes=[],
        )
        self.session.deadline = time.monotonic() + 20
        self.session.receive()
        self.count = 0

    def touched(self) -> str:
        """Why the neighbour is not well."""
        self.count += 1
        self.session.deadline = time.monotonic() + 5
        try:
            self.session.send(b"C" + pack((self.count, "beat", "call", [self.count], {})))
            answer = unpack(self.session.receive()[1:])
        except Exception as e:  # whatever it is, the neighbour is not answering
            return f"the neighbour does not answer: {type(e).__name__}: {e}"
        want = (self.count, "value", [self.count + 1, "NEIGHBOUR-SECRET"], None)
        return "" if answer == want else f"the neighbour answers {answer!r}"

    def close(self) -> None:
        self.session.close()


def run(sandbox: Inhabited, attacks: list[Attack] | None = None, *, limits: Limits = LIMITS) -> Iterator[Finding]:
    """Runs `attacks` one after another; honest ones get four times the wall time. Raises SandboxError where the machine
    fails."""
    verifier = CodeVerifier(sandbox, limits=limits)
    patient = CodeVerifier(sandbox, limits=replace(limits, wall_seconds=4 * limits.wall_seconds))
    with contextlib.closing(Host()) as host, contextlib.closing(Neighbour(sandbox)) as neighbour:
        for attack in suite() if attacks is None else attacks:
            yield _one(sandbox, patient if attack.pay == "always" else verifier, host, neighbour, attack)


def _one(sandbox: Inhabited, verifier: CodeVerifier, host: Host, neighbour: Neighbour, attack: Attack) -> Finding:
    task = Task(id=attack.name, prompt="", verifier="code", payload=FORMS[attack.form])
    program = f"```python\n{host.filled(attack.source)}\n```"
    verdict = verifier.verify(task, program)
    for _ in range(attack.times - 1):
        verdict = verifier.verify(task, program)
    problem = ""
    if verdict.status == "infra_error":
        problem = f"the machine was blamed: {verdict.detail}"
    elif attack.pay == "never" and verdict.score != 0.0:
        problem = f"paid {verdict.score}"
    elif attack.pay == "always" and verdict.score != 1.0:
        problem = f"an honest program was judged {verdict.status}: {verdict.detail}"
    elif verdict.seconds > len(FORMS[attack.form].get("cases", [0])) * verifier.limits.wall_seconds + 2.0:
        problem = f"took {verdict.seconds:.1f} s"
    problem = problem or host.touched() or neighbour.touched() or _left(sandbox)
    return Finding(attack=attack, verdict=verdict, problem=problem)


def _left(sandbox: Inhabited, seconds: float = 15.0) -> str:
    """Whether more sandboxes live than wait, the neighbour aside. A container is counted out a little after it
    ended."""
    until = time.monotonic() + seconds
    while (extra := sandbox.alive() - 1) > 0:
        if time.monotonic() > until:
            return f"{extra} sandboxes are left"
        time.sleep(0.05)
    return ""
