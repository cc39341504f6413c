"""One control group per run, where the machine lets us: memory without swap, processes, CPU share. Version 1 and 2.

Runs in the launcher, which imports little. A group is a folder; freeing it is removing the folder.
"""

from __future__ import annotations

import contextlib
import os
import time

ROOT = "/sys/fs/cgroup"


class Groups:
    """Makes groups below this process's own, so limits from above stay in force. `usable` is False where it cannot."""

    def __init__(self, root: str = ROOT) -> None:
        self.version = 2 if os.path.exists(f"{root}/cgroup.controllers") else 1
        self.parents: dict[str, str] = {}
        own: dict[str, str] = {}
        with contextlib.suppress(OSError), open("/proc/self/cgroup") as f:
            for line in f:
                _, names, path = line.rstrip("\n").split(":", 2)
                for name in names.split(","):
                    own[name] = path
        if self.version == 2:
            self._version2(root, own.get("", "/"))
        else:
            for name in ("memory", "pids", "cpu"):
                for path in (own.get(name, "/"), "/"):
                    folder = os.path.normpath(f"{root}/{name}/{path}")
                    if os.access(folder, os.W_OK) and os.path.exists(f"{folder}/cgroup.procs"):
                        self.parents[name] = folder
                        break
        for parent in set(self.parents.values()):
            _sweep(parent)
        self.usable = {"memory", "pids"} <= self.parents.keys() and self._works()

    def _version2(self, root: str, path: str) -> None:
        """A group that holds processes cannot hand controllers to children, so this process moves into a leaf first."""
        folder = os.path.normpath(f"{root}/{path}")
        try:
            leaf = f"{folder}/cabochon-{os.getpid()}"
            os.mkdir(leaf)
            _write(f"{leaf}/cgroup.procs", "0")
            _write(f"{folder}/cgroup.subtree_control", "+memory +pids +cpu")
        except OSError:
            return
        self.parents = dict.fromkeys(("memory", "pids", "cpu"), folder)

    def _works(self) -> bool:
        try:
            group = Group(self, "probe", 64 << 20, 16, 1.0)
        except OSError:
            return False
        group.remove()
        return True


class Group:
    """Raises OSError where it cannot be made."""

    def __init__(self, groups: Groups, name: str, memory_bytes: int, pids: int, cpus: float) -> None:
        name = f"cabochon-{os.getpid()}-{name}"
        self.folders = sorted({f"{parent}/{name}" for parent in groups.parents.values()})
        self.version = groups.version
        for folder in self.folders:
            os.makedirs(folder, exist_ok=True)
        memory, pid, cpu = (f"{groups.parents.get(c, '')}/{name}" for c in ("memory", "pids", "cpu"))
        self.memory = memory
        _write(f"{pid}/pids.max", str(pids))
        if groups.version == 2:
            _write(f"{memory}/memory.max", str(memory_bytes))
            _write(f"{cpu}/cpu.max", f"{int(cpus * 100_000)} 100000")
            with contextlib.suppress(OSError):  # absent where the kernel has no swap accounting
                _write(f"{memory}/memory.swap.max", "0")
            return
        _write(f"{memory}/memory.limit_in_bytes", str(memory_bytes))
        for more in ("memsw", "kmem.tcp"):  # swap; and buffers of internet sockets, which version 1 counts apart
            with contextlib.suppress(OSError):
                _write(f"{memory}/memory.{more}.limit_in_bytes", str(memory_bytes))
        if "cpu" in groups.parents:
            with contextlib.suppress(OSError):
                _write(f"{cpu}/cpu.cfs_quota_us", str(int(cpus * 100_000)))

    def enter(self) -> None:
        """Moves the calling process in."""
        for folder in self.folders:
            _write(f"{folder}/cgroup.procs", "0")

    def oom_kills(self) -> int:
        path = f"{self.memory}/{'memory.events' if self.version == 2 else 'memory.oom_control'}"
        try:
            with open(path) as f:
                return sum(int(line.split()[1]) for line in f if line.startswith("oom_kill "))
        except OSError:
            return 0

    def processes(self) -> list[int]:
        try:
            with open(f"{self.memory}/cgroup.procs") as f:
                return [int(line) for line in f]
        except OSError:
            return []

    def remove(self) -> bool:
        """False where it is still in use."""
        for _ in range(50):
            left = []
            for folder in self.folders:
                try:
                    os.rmdir(folder)
                except FileNotFoundError:
                    pass
                except OSError:
                    left.append(folder)
            if not left:
                return True
            self.folders = left
            time.sleep(0.002)
        return False


def _sweep(parent: str) -> None:
    """Removes the groups of launchers that were killed; one that is in use cannot be removed."""
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            pid = name.removeprefix("cabochon-").partition("-")[0]
            if name.startswith("cabochon-") and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                with contextlib.suppress(OSError):
                    os.rmdir(f"{parent}/{name}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as f:
        f.write(text)
