"""One Docker container for a sandbox: what it is born with, what runs in it first, whose it is, and its end where that
owner is dead.

A container's life is mostly the engine's work, and the engine copies and compiles what it is given several times over.
So the program it starts is a line or two, and its seccomp profile knows this machine's own calls only.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import socket
import time
from typing import Any

import docker
import docker.errors

from cabochon.verifiers.sandbox import rootfs
from cabochon.verifiers.sandbox.base import Limits
from cabochon.verifiers.sandbox.engine import FAILURES
from cabochon.verifiers.sandbox.image import AGENT_LABEL
from cabochon.verifiers.sandbox.seccomp_profile import profile
from cabochon.verifiers.sandbox.session import START_SECONDS

LABEL = "cabochon.sandbox"
MAX_AGE_SECONDS = 1800.0
"""A container older than this is nobody's, whoever its label says owns it."""
IDLE_SECONDS = 20.0
"""A waiting container that has heard nothing for so long ends itself: its engine died, whose other ends stay open, or
its owner is stopped. The owner says it is there every fifth of it."""
_OVERHEAD_BYTES = 24 << 20
"""Process 1's own memory, on top of the program's limit."""
_FIRST_USER, _USERS = 20_000, 40_000
"""Each container has a user of its own, for whom the kernel counts pages of pipes, queued signals and descriptors on
their way; below 65,536, which is what an engine without root has."""
_MAIN = f"from cabochon.verifiers.sandbox.inside import main\nmain(True, {IDLE_SECONDS})"


def scripts(image: dict[str, Any]) -> tuple[str, bytes]:
    """What `python -c` is given in a container of this image (the engine's description of it), and what it then reads
    as more of the same: nothing where the image carries our very modules, else their source."""
    labels = (image.get("Config") or {}).get("Labels") or {}
    if labels.get(AGENT_LABEL) == rootfs.agent_key():
        return f"import sys\nsys.path.insert(0, '/agent')\n{_MAIN}", b""
    source = (rootfs.agent_script() + _MAIN).encode()
    first = f"""import os, select
source = b''
while len(source) < {len(source)}:
    piece = select.select([0], [], [], {IDLE_SECONDS})[0] and os.read(0, {len(source)} - len(source))
    if not piece: os._exit(0)
    source += piece
exec(source)"""
    return first, source


def start(
    api: docker.APIClient, image: str, program: tuple[str, bytes], limits: Limits, runtime: str
) -> tuple[str, socket.socket]:
    """The name of a container that has begun `program` (see `scripts`), and its streams. Raises one of FAILURES."""
    size = limits.file_bytes
    memory = limits.memory_bytes + _OVERHEAD_BYTES
    host = api.create_host_config(
        network_mode="none", read_only=True, cap_drop=["ALL"],
        security_opt=["no-new-privileges", f"seccomp={profile()}"],
        ipc_mode="private", log_config=docker.types.LogConfig(type="none", config={}),
        mem_limit=memory, memswap_limit=memory, pids_limit=limits.pids + 2, auto_remove=True, shm_size=size,
        cpu_period=100_000, cpu_quota=int(limits.cpus * 100_000), runtime=runtime or None,
        tmpfs={"/tmp": f"rw,nosuid,nodev,size={size},mode=1777"},
        ulimits=[docker.types.Ulimit(name="core", soft=0, hard=0),
                 docker.types.Ulimit(name="nofile", soft=max(limits.nofile, 64), hard=max(limits.nofile, 64))],
    )  # fmt: skip
    script, source = program
    user = _FIRST_USER + secrets.randbelow(_USERS)
    container = api.create_container(
        image, entrypoint=["python3", "-I", "-S", "-X", "utf8", "-c"], command=[script], user=f"{user}:65534",
        stdin_open=True, environment={"HOME": "/tmp", "LANG": "C.UTF-8"}, working_dir="/tmp", hostname="sandbox",
        host_config=host, labels={LABEL: "1", f"{LABEL}.owner": owner_label()}, network_disabled=True,
    )["Id"]  # fmt: skip
    try:
        stream = api.attach_socket(container, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        sock = socket.socket(fileno=os.dup(stream.fileno()))
        stream._response.close()  # else the library's own descriptor keeps the connection open after ours is closed
        stream.close()
        api.start(container)
        sock.settimeout(START_SECONDS)
        sock.sendall(source)
    except FAILURES:
        with contextlib.suppress(*FAILURES):
            api.remove_container(container, force=True)
        raise
    return container, sock


def owner_label() -> str:
    """This process, told apart from a later one with its number and from other machines' processes."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.getpid()}:{_started(os.getpid())}"


def _started(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _alive(label: str) -> bool:
    """Whether the owner a label names still runs; an owner on another machine counts as alive."""
    boot, pid, started = ([*label.split(":"), "", "", ""])[:3]
    if boot != owner_label().split(":")[0] or not pid.isdigit():
        return True
    return bool(started) and _started(int(pid)) == started


def reap(api: docker.APIClient, own: str = "") -> int:
    """Removes containers whose owner is dead, that are over age, or, with `own`, that are this process's; how many."""
    removed = 0
    for container in api.containers(all=True, filters={"label": f"{LABEL}=1"}):
        label = container["Labels"].get(f"{LABEL}.owner", "")
        old = time.time() - container["Created"] > MAX_AGE_SECONDS
        if label == own or old or not _alive(label):
            with contextlib.suppress(docker.errors.APIError):  # it went by itself meanwhile
                api.remove_container(container["Id"], force=True)
                removed += 1
    return removed
