"""The launcher: one small helper process per owner that starts and ends sandboxes on request.

It exists because of three facts. A sandbox must die with its owner, and "parent" means the *thread* that forked it, so
nothing with threads may fork it. A fork of a process that holds a model is slow. And joining a control group and giving
up root must happen between fork and exec, where a threaded Python may run no code.

Requests come as datagrams on descriptor 0, with four descriptors for a start: `S id argv...` or `K id`. When the
owner is gone, by its socket or by its pid, everything goes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from typing import Any

from cabochon.verifiers.sandbox.cgroups import Group, Groups
from cabochon.verifiers.sandbox.wire import pack, unpack

UID_BASE = 0x60000000
"""As root, every sandbox gets a user of its own from here up: RLIMIT_NPROC counts by user and exempts root."""


class Running:
    """One started sandbox."""

    def __init__(self, pid: int, status: int, group: Group | None, watch_bytes: int) -> None:
        self.pid = pid
        self.status = status
        self.group = group
        self.watch_bytes = watch_bytes
        self.over = False


class Launcher:
    """Owns the processes. Single-threaded; one poll loop."""

    def __init__(self, control: socket.socket, owner: int, cgroups: bool) -> None:
        self.control = control
        self.owner = os.pidfd_open(owner)
        self.groups = Groups() if cgroups else Groups("/nowhere")
        self.running: dict[int, Running] = {}
        self.leaving: list[Group] = []
        self.count = 0
        wake_r, self.wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.wake_r = wake_r
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)

    def loop(self) -> None:
        poller = select.poll()
        for fd in (self.control.fileno(), self.owner, self.wake_r):
            poller.register(fd, select.POLLIN)
        while True:
            watched = not self.groups.usable and any(r.watch_bytes for r in self.running.values())
            events = dict(poller.poll(20 if watched else 200 if self.leaving else None))
            if self.owner in events:
                return
            if self.wake_r in events:
                os.read(self.wake_r, 4096)
            if self.control.fileno() in events and not self._request():
                return
            self._reap()
            self.leaving = [g for g in self.leaving if not g.remove()]
            if watched:
                self._watch()

    def _request(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 4, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        request = unpack(data)
        if request["do"] == "kill":
            if request["id"] in self.running:
                self._kill(self.running[request["id"]])
            return True
        try:
            self._start(request, fds)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.write(fds[2], f"sandbox not started: {e}".encode())
            os.close(fds[3])  # without a word: the owner sees that it was not the program's doing
        for fd in fds[:3]:
            os.close(fd)
        return True

    def _start(self, request: dict[str, Any], fds: list[int]) -> None:
        """Forks and execs; the status descriptor stays here and closes without a word where that fails."""
        stdin, stdout, stderr, status = fds
        memory, pids, cpus = request["memory_bytes"], request["pids"], request["cpus"]
        self.count += 1
        group = None
        if self.groups.usable:
            group = Group(self.groups, str(self.count), memory, pids, cpus)
        argv = [str(a) for a in request["argv"]]
        seccomp = os.memfd_create("seccomp", 0)
        os.write(seccomp, request["seccomp"])
        os.lseek(seccomp, 0, os.SEEK_SET)
        pid = os.fork()
        if pid == 0:
            try:
                self._become(argv, stdin, stdout, stderr, seccomp, group)
            except BaseException as e:
                os.write(2, f"sandbox not started: {type(e).__name__}: {e}".encode())
            finally:
                os._exit(127)
        os.close(seccomp)
        self.running[request["id"]] = Running(pid, status, group, 0 if group else memory)

    def _become(self, argv: list[str], stdin: int, stdout: int, stderr: int, seccomp: int, group: Group | None) -> None:
        os.dup2(stderr, 2)
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        if group is not None:
            group.enter()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        if os.geteuid() == 0:
            uid = UID_BASE + os.getpid() % 1_000_000
            for fd in (1, 2):  # else a program could not open /dev/stdout
                os.fchown(fd, uid, uid)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        os.dup2(seccomp, 3, inheritable=True)
        os.closerange(4, 256)
        os.execve(argv[0], argv, {})

    def _kill(self, run: Running) -> None:
        """Ends the sandbox's first process, whereupon the kernel ends all others before bubblewrap can exit."""
        inner: list[int] = []
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{run.pid}/task/{run.pid}/children") as f:
            inner = [int(n) for n in f.read().split()]
        for pid in inner or [run.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if run.group is None and not inner:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)

    def _reap(self) -> None:
        for number, run in list(self.running.items()):
            try:
                pid, status = os.waitpid(run.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = run.pid, 0
            if pid == 0:
                continue
            for left in run.group.processes() if run.group else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)
            oom = run.over or bool(run.group and run.group.oom_kills())
            with contextlib.suppress(OSError):
                os.write(run.status, f"{os.waitstatus_to_exitcode(status)} {int(oom)}".encode())
            os.close(run.status)
            if run.group:
                self.leaving.append(run.group)
            del self.running[number]

    def _watch(self) -> None:
        """Without control groups: ends a tree whose resident private memory is over its limit."""
        for run in self.running.values():
            if run.watch_bytes and sum(map(_resident, _tree(run.pid))) > run.watch_bytes:
                run.over = True
                self._kill(run)

    def end(self) -> None:
        """Kills every sandbox and removes its group."""
        for run in self.running.values():
            self._kill(run)
        for run in self.running.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(run.pid, 0)
            if run.group:
                self.leaving.append(run.group)
        for group in self.leaving:
            group.remove()


def _tree(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{one}/task"):
                with contextlib.suppress(OSError, ValueError), open(f"/proc/{one}/task/{task}/children") as f:
                    todo += [int(n) for n in f.read().split()]
    return found


def _resident(pid: int) -> int:
    """Bytes of memory no file on disk backs, shared mappings included (counted once per process that maps them)."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/status") as f:
        return sum(int(line.split()[1]) << 10 for line in f if line.startswith(("RssAnon:", "RssShmem:")))
    return 0


def main() -> None:
    """`python -c "...main()" OWNER_PID cgroups|none`, with the control socket as descriptor 0."""
    control = socket.socket(fileno=os.dup(0))
    quiet = os.open("/dev/null", os.O_RDWR)
    os.dup2(quiet, 0)
    os.setpgid(0, 0)  # Ctrl-C at the terminal is the owner's business
    launcher = Launcher(control, int(sys.argv[1]), cgroups=sys.argv[2] == "cgroups")
    control.send(pack({"cgroups": launcher.groups.usable}))
    try:
        launcher.loop()
    finally:
        launcher.end()
