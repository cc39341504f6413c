"""Ray itself: a local one of our own, or a place in a running cluster; and whether what we ask of it can be had."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import warnings
from pathlib import Path

import ray

from cabochon.config import RayConfig
from cabochon.errors import MachineError, UserError

CONNECT_SECONDS = 10.0
"""for a cluster's head to accept a connection"""


def cores() -> int:
    """Of this machine, for this process."""
    return len(os.sched_getaffinity(0))


class RaySession:
    """Joined or started by the constructor, left or stopped by `close`.

    A Ray that this process already has is used, and left as it is.
    """

    def __init__(self, cfg: RayConfig, log_dir: Path):
        """Raises UserError where the workers can never fit, MachineError where Ray does not start or answer."""
        self.log_dir = log_dir
        self._ours = not ray.is_initialized()
        self._link: Path | None = None
        if self._ours:
            address = cfg.address or os.environ.get("RAY_ADDRESS")
            self._join(address) if address else self._start(log_dir)
            _keep_stdout_clean()
        try:
            check_placement(cfg, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        except BaseException:
            self.close()
            raise

    def _join(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        if "://" not in address and port.isdigit():  # Ray itself would try for minutes
            try:
                socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
            except OSError as error:
                raise MachineError(f"no Ray cluster answers at {address}: {error}") from None
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            # Ray does not say so, but a cluster that wants a token "cannot be connected to"
            raise MachineError(
                f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}; where it wants a token, set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN where the token is not in its usual place"
            ) from None

    def _start(self, log_dir: Path) -> None:
        """Ray writes its logs below the directory it also puts sockets in, whose paths may have 107 bytes: so it gets a
        short link to ours.
        """
        log_dir.mkdir(parents=True, exist_ok=True)
        self._link = Path(tempfile.mkdtemp(prefix="cabochon-ray-"))
        short = self._link / "r"
        short.symlink_to(log_dir.resolve())
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            with warnings.catch_warnings():  # jax warns of every fork; what Ray forks execs at once
                warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
                ray.init(
                    address="local", num_cpus=cores(), include_dashboard=False, log_to_driver=False,
                    logging_level=logging.ERROR, _temp_dir=str(short),
                )  # fmt: skip
        except Exception as error:  # whatever Ray raises: nothing of it may stay
            self.close()
            raise MachineError(f"Ray does not start: {str(error).splitlines()[0]}; its logs: {log_dir}") from error

    def close(self) -> None:
        """Nothing of ours is left running, and of Ray's files only its logs: sockets, and a link to the latest of them,
        would keep the run's directory from being copied. May be called again.
        """
        if self._ours and ray.is_initialized():
            ray.shutdown()
        if self._link is not None:
            shutil.rmtree(self._link, ignore_errors=True)
            (self.log_dir / "session_latest").unlink(missing_ok=True)
            for sockets in self.log_dir.glob("session_*/sockets"):
                shutil.rmtree(sockets, ignore_errors=True)


def _keep_stdout_clean() -> None:
    """Ray prints what becomes of its workers on the driver's stdout, with `log_to_driver=False` too, and offers no
    switch. The engine tells it itself, as events; Ray's own words are in its logs.
    """
    import ray._private.worker as driver

    driver.print_to_stdstream = lambda *_, **__: None


def wanted(cfg: RayConfig) -> dict[str, float]:
    """Resources of one worker, by Ray's names."""
    return {"CPU": cfg.cpus, **cfg.resources}


def check_placement(cfg: RayConfig, nodes: list[dict[str, float]]) -> None:
    """Raises UserError naming the resource for which the workers can never be placed on these nodes."""
    left = [dict(node) for node in nodes]
    for i in range(cfg.workers):
        node = next((n for n in left if all(n.get(r, 0) >= x for r, x in wanted(cfg).items())), None)
        if node is None:
            raise UserError(f"engine.ray.workers={cfg.workers}: {_missing(cfg, nodes)}; {i} of them can be placed")
        for resource, x in wanted(cfg).items():
            node[resource] -= x


def _missing(cfg: RayConfig, nodes: list[dict[str, float]]) -> str:
    for resource, x in wanted(cfg).items():
        total = sum(n.get(resource, 0) for n in nodes)
        if total < x * cfg.workers:
            return f"{resource} is missing: {x:g} for each worker, {total:g} in all"
    return "no node has " + " and ".join(f"{x:g} {r}" for r, x in wanted(cfg).items()) + " for every worker"


def still_missing(cfg: RayConfig) -> str:
    """What a worker that was not placed so far waits for; empty where enough is free."""
    free = ray.available_resources()
    short = [f"{r} ({x:g} wanted, {free.get(r, 0):g} free)" for r, x in wanted(cfg).items() if free.get(r, 0) < x]
    return ", ".join(short)
