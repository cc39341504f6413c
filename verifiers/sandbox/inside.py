"""What runs inside a sandbox: waits, warm, for one order on standard input, carries it out and is never used again.

Three orders. `run`: a program with files, arguments and standard input; its output goes straight out. `candidate`:
load a program as the module `solution`, then answer calls. `tests`: see inside_tests. Nothing here is trusted by the
host: the program shares this interpreter and can change all of it. What it can forge are its own return values and
its own output.

Imports are few on purpose: start-up is most of what a run costs.
"""

from __future__ import annotations

import builtins
import gc
import os
import sys
from struct import pack as struct_pack
from struct import unpack as struct_unpack

from cabochon.verifiers.sandbox.inside_remote import Link, told
from cabochon.verifiers.sandbox.wire import MAX_FRAME, WireError, frame, pack, unpack

TYPE_CHECKING = False  # see wire
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any
else:
    ModuleType = type(sys)

READY = b"ready"
TRAILER = b"\x00cabochon-exit:"
"""The supervisor's last words on both streams: this, what only the host and it know, then exit code and OOM-kill count
as two little-endian i32."""
HOME = "/tmp"
"""The only writable folder, a size-limited tmpfs."""


class Channel:
    """Frames over two descriptors."""

    def __init__(self, receive: int, send: int) -> None:
        self.receive = receive
        self.send_fd = send

    def exactly(self, n: int) -> bytes:
        got = bytearray()
        while len(got) < n:
            piece = os.read(self.receive, n - len(got))
            if not piece:
                os._exit(0)  # the host hung up: nobody is left to work for
            got += piece
        return bytes(got)

    def read(self) -> bytes:
        (n,) = struct_unpack("<I", self.exactly(4))
        if n > MAX_FRAME:
            os._exit(1)
        return self.exactly(n)

    def send(self, payload: bytes) -> None:
        view = memoryview(frame(payload))
        while view:
            view = view[os.write(self.send_fd, view) :]


def main(supervised: bool = False, idle_seconds: float = 3600.0) -> None:
    """Reads the order from standard input. `supervised`: this is process 1 of a container and outlives the program; it
    ends when it has not heard from its owner, by an order or an empty frame, for `idle_seconds`."""
    channel = Channel(0, 1)
    channel.send(READY)
    if supervised:
        import select

        _dumpable(False)
        payload = b""
        while not payload:
            if not select.select([0], [], [], idle_seconds)[0]:
                os._exit(0)
            payload = channel.read()
    else:
        payload = channel.read()
    order = unpack(payload)
    if supervised:
        _supervise(order["limits"]["wall_seconds"], channel)
    _limit(order["limits"])
    _refuse(order.get("seccomp", {}))
    home = order.get("home") or HOME
    os.chdir(home)
    for name, data in order["files"].items():
        path = os.path.join(home, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(data)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    sys.path.append(f"{sys.prefix}/lib/{version}/site-packages")  # which -S left out
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # which `site`, not imported here, brings
    if order["mode"] == "run":
        _run(order, home)
        return
    channel = Channel(os.dup(0), os.dup(1))  # dup'ed descriptors are not inherited by programs it starts
    quiet = os.open("/dev/null", os.O_RDONLY)
    os.dup2(quiet, 0)
    os.dup2(2, 1)  # what it prints is noise: kept for evidence, never read as data
    os.close(quiet)
    if order["mode"] == "tests":
        from cabochon.verifiers.sandbox.inside_tests import judge

        judge(order, channel)
    else:
        sys.path.insert(0, home)
        Candidate(channel, order.get("mutates", False)).serve(order["source"], order["wanted"], order["classes"])
    sys.stdout.flush()
    os._exit(0)


def _limit(limits: dict[str, Any]) -> None:
    """Lowers this process's rlimits; without privileges nothing inside can raise them again."""
    import resource as r

    cpu = max(1, int(limits["cpu_seconds"] + 0.999))
    wanted = [(r.RLIMIT_CPU, cpu, cpu + 1), (r.RLIMIT_CORE, 0, 0)]
    wanted += [(which, n, n) for which, n in (
        (r.RLIMIT_NOFILE, limits["nofile"]), (r.RLIMIT_FSIZE, limits["file_bytes"]),
        (r.RLIMIT_NPROC, limits["nproc"]), (r.RLIMIT_DATA, limits["data_bytes"])) if n]  # fmt: skip
    for which, soft, hard in wanted:
        top = r.getrlimit(which)[1]
        if top != r.RLIM_INFINITY:
            soft, hard = min(soft, top), min(hard, top)
        r.setrlimit(which, (soft, hard))


def _oom_kills() -> int:
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            with open(path) as f:
                return sum(int(line.split()[1]) for line in f if line.startswith("oom_kill "))
        except OSError:
            continue
    return 0


def _supervise(wall_seconds: float, channel: Channel) -> None:
    """Forks. The child returns; process 1 waits for it, for the host to hang up, or for the time to be over; then kills
    everything, says how the child ended and exits. Process 1 cannot be killed from inside its own namespace, so no
    program outlives its host or its time, whatever became of the host. The child is held until the frame behind the
    order is read here: what signs the last words is never in its memory, nor in its reach on the pipe."""
    import _signal  # the module around it brings enumerations, and they take as long as the interpreter's own start
    import select
    import time

    gate, opened = os.pipe()
    child = os.fork()
    os.close(opened if child == 0 else gate)
    if child == 0:
        os.read(gate, 1)
        os.close(gate)
        _dumpable(True)
        return
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # the one signal Python handles, which a program could send
    secret = channel.read()
    os.close(opened)
    watch = select.poll()
    ended = os.pidfd_open(child)
    watch.register(ended, select.POLLIN)
    watch.register(0, 0)  # only that the other end is gone
    deadline = time.monotonic() + wall_seconds + 2.0
    finished = False
    while not finished and time.monotonic() < deadline:
        try:
            finished = bool(watch.poll(250))
        except OSError:  # no program may bring this process down, whatever it did to its limits
            time.sleep(0.25)
        while not finished and (other := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            finished = other.si_pid == child
            if not finished:
                os.waitpid(other.si_pid, 0)  # an orphan of the program
    code = -_signal.SIGKILL
    try:  # noqa: SIM105 (contextlib costs an import)
        os.kill(-1, _signal.SIGKILL)
    except ProcessLookupError:
        pass
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            break
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
    words = TRAILER + secret + struct_pack("<ii", code, _oom_kills())
    for fd in (1, 2):  # each stream travels alone, so each has to say that it is at its end
        os.set_blocking(fd, False)  # a stream may be full and its reader gone
        room = select.poll()
        room.register(fd, select.POLLOUT)
        try:
            if room.poll(1000):
                os.write(fd, words)
        except OSError:
            continue
    os._exit(0)


def _dumpable(yes: bool) -> None:
    """Whether processes of the same user may trace this one: process 1 must not be taken over by what it watches."""
    import _ctypes  # the package around it takes ten times as long to import

    _ctypes.call_function(_ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl"), (4, int(yes), 0, 0, 0))  # type: ignore


def _refuse(filters: dict[str, bytes]) -> None:
    """Puts this machine's seccomp filter on this process and all it will start, besides the engine's own, which lets
    io_uring and sockets to a virtual machine's host through where the engine is an older one. Raises OSError."""
    program = filters.get(os.uname().machine)
    if program is None:
        return
    import _ctypes

    class Address(_ctypes._SimpleCData):
        """Of the bytes it is given."""

        _type_ = "z"

    head = struct_pack("@H6x", len(program) // 8) + bytes(Address(program))  # struct sock_fprog
    prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")  # type: ignore
    if _ctypes.call_function(prctl, (22, 2, Address(head), 0, 0)):
        raise OSError("the kernel refused the seccomp filter")


def _run(order: dict[str, Any], home: str) -> None:
    """Runs `order["argv"][0]` as `__main__` in this interpreter, as `python FILE ARGS` would."""
    try:
        stdin = os.memfd_create("stdin")
    except OSError:  # refused where no control group counts it
        stdin = os.open(os.path.join(home, ".stdin"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.unlink(os.path.join(home, ".stdin"))
    view = memoryview(order["stdin"])
    while view:
        view = view[os.write(stdin, view) :]
    os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, 0)
    os.close(stdin)
    path = os.path.join(home, order["argv"][0])
    sys.argv = [path, *order["argv"][1:]]
    sys.path.insert(0, home)
    gc.freeze()  # what is loaded by now is not looked through again, which the interpreter's end does several times
    module = ModuleType("__main__")  # not frozen: what it holds is told when it goes
    module.__dict__.update(__file__=path, __builtins__=__builtins__, __spec__=None)
    with open(path, "rb") as f:
        source = f.read()
    del order
    sys.modules["__main__"] = module
    exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)  # else under the imports of this file


class Candidate(Link):
    """Answers calls on a loaded program. Everything it says is the program's word and no more."""

    def __init__(self, channel: Channel, mutates: bool = False) -> None:
        super().__init__(channel, b"hk", b"KCR", carries_out=mutates, carries_in=True)
        self.module = ModuleType("solution")

    def thing(self, target: Any, op: str, args: list[Any]) -> Any:
        return self.module.__dict__[target] if type(target) is str else self.objects[target]

    def serve(self, source: bytes, wanted: list[str], classes: list[str]) -> None:
        module = self.module
        path = os.path.join(os.getcwd(), "solution.py")
        try:
            with open(path, "wb") as f:
                f.write(source)
            module.__dict__.update(__file__=path, __builtins__=__builtins__)
            sys.modules["solution"] = module
            try:
                code = compile(source, path, "exec", dont_inherit=True)
            except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as e:
                self.channel.send(b"E" + pack(("malformed", type(e).__name__, str(e)[:500])))
                return
            exec(code, module.__dict__)
        except SystemExit:
            pass  # a program that ends itself after its definitions; os._exit is another matter
        except BaseException as e:
            self.channel.send(b"E" + pack(("raised", type(e).__name__, told(e)[2])))
            return
        self.keep = tuple(c for c in map(module.__dict__.get, classes) if isinstance(c, type))
        self.channel.send(b"L" + pack({name: self.describe(name) for name in wanted}, self.number, self.keep))
        while True:
            request = self.channel.read()[1:]
            self.channel.send(b"R" + self.answer(request))

    def describe(self, name: str) -> Any:
        """What `name` is in the program: ("missing",), ("module",), ("function",) or ("coroutine",), which are asked
        for by name, ("given", it), or ("object", its number, its class's) for what looks like plain data and is not."""
        if name not in self.module.__dict__:
            return ("missing",)
        value = self.module.__dict__[name]
        if isinstance(value, ModuleType):
            return ("module",)
        if callable(value) and not isinstance(value, type):
            is_async = getattr(getattr(value, "__code__", None), "co_flags", 0) & 0x80
            return ("coroutine" if is_async else "function",)
        try:
            pack(value, self.number, self.keep)
        except WireError:
            return ("object", self.index(value), self.index(type(value)))
        return ("given", value)
