"""A Ray cluster of the test's own on this machine: others here are left alone (`ray stop` would end them all)."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import ray


class Head(NamedTuple):
    """Where it answers."""

    address: str
    """for `ray.init`"""
    jobs: str
    """the job server's URL"""
    process: subprocess.Popen


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def ray_head(*, cpus: int, jobs: bool, seconds: float = 180) -> Iterator[Head]:
    """`ray start --head --block` until the block is left; then it and all it started are gone."""
    ip = "127.0.0.1" if jobs else ray.util.get_node_ip_address()  # `ray.init` takes the first for the second
    port, server, agent, grpc, client, metrics = free_ports(6)
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--node-ip-address={ip}",
        f"--port={port}", f"--num-cpus={cpus}", f"--include-dashboard={str(jobs).lower()}",
        f"--dashboard-port={server}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
        f"--metrics-export-port={metrics}", "--object-store-memory=100000000", "--disable-usage-stats",
        *([f"--ray-client-server-port={client}"] if jobs else []),
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # a job's `python`
    env["RAY_AUTH_MODE"] = "disabled"  # a token that lies in this user's home would be asked for
    if jobs:  # one device, as a user has
        env.pop("XLA_FLAGS", None)
    with tempfile.TemporaryDirectory(prefix="cbray", ignore_cleanup_errors=True) as place:
        log = Path(place) / "head.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, f"--temp-dir={place}/r"], stdout=out, stderr=subprocess.STDOUT, env=env,
                start_new_session=True,
            )  # fmt: skip
        try:
            for wanted in [port, server] if jobs else [port]:
                _answering((ip, wanted), process, log, time.monotonic() + seconds)
            yield Head(f"{ip}:{port}", f"http://127.0.0.1:{server}", process)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)


def _answering(at: tuple[str, int], process: subprocess.Popen, log: Path, deadline: float) -> None:
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket() as s:
            if s.connect_ex(at) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"ray start: {at} does not answer: {log.read_text()[-2000:]}")
