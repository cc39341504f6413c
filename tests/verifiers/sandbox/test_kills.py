"""What is left, and what is said, when the owner, the launcher or the engine is killed in the middle of a run."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from cabochon.errors import UserError
from cabochon.types import Task
from cabochon.verifiers.code import CodeVerifier
from cabochon.verifiers.sandbox.base import Limits, SandboxError, python_program
from cabochon.verifiers.sandbox.container import LABEL, reap
from cabochon.verifiers.sandbox.docker import DockerSandbox
from cabochon.verifiers.sandbox.engine import connect
from cabochon.verifiers.sandbox.image import build
from cabochon.verifiers.sandbox.testing import host_image, sandbox

OWNER = """
import sys, threading, time
from cabochon.verifiers.sandbox.base import Limits, python_program
from cabochon.verifiers.sandbox.testing import sandbox
box = sandbox(sys.argv[1], Limits(wall_seconds=600.0), warm=2)
forks = "import os, time\\nfor _ in range(3):\\n    if os.fork() == 0: os.setsid()\\ntime.sleep(600)"
threading.Thread(target=lambda: box.run(python_program(forks))).start()
time.sleep(1.5)
print("running", getattr(box, "_launcher", None) and box._launcher.process.pid, flush=True)
time.sleep(600)
"""


def need(kind):
    try:
        sandbox(kind, warm=1).close()
    except UserError as e:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no {kind} here: {e}")


def owner(kind):
    process = subprocess.Popen([sys.executable, "-c", OWNER, kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline().split()
    assert said[0] == "running"
    return process, said[1]


def descendants(pid):
    """Every process below `pid`, by number."""
    children = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = set(), [pid]
    while todo:
        mine = children.get(todo.pop(), [])
        found.update(mine)
        todo += mine
    return found


def living(pids):
    left = set()
    for pid in pids:
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            left.add(pid)
    return left


def until(check, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.bubblewrap
@pytest.mark.parametrize("whom", ["owner", "launcher"])
def test_bubblewrap_leaves_nothing_when_killed(whom):
    need("bubblewrap")
    process, launcher = owner("bubblewrap")
    below = descendants(process.pid)
    assert len(living(below)) >= 8  # the launcher, three sandboxes of two, three forks
    os.kill(process.pid if whom == "owner" else int(launcher), signal.SIGKILL)
    if whom == "launcher":
        time.sleep(0.5)
    process.kill()
    process.wait()
    assert until(lambda: not living(below)), living(below)


@pytest.mark.bubblewrap
def test_groups_of_a_killed_launcher_go_with_the_next_one():
    need("bubblewrap")

    def groups(pid):
        """By os.walk, which does not mind that other tests' groups go while it looks."""
        folders = (pathlib.Path(at, name) for at, names, _ in os.walk("/sys/fs/cgroup") for name in names)
        return [path for path in folders if path.name.startswith(f"cabochon-{pid}-")]

    process, launcher = owner("bubblewrap")
    made = groups(launcher)
    if not made:
        process.kill()
        pytest.skip("no control groups here")
    os.kill(int(launcher), signal.SIGKILL)
    process.kill()
    process.wait()
    assert groups(launcher)

    def swept():
        sandbox("bubblewrap", warm=1).close()
        return not groups(launcher)

    assert until(swept), groups(launcher)


def containers(api, pid):
    return [c for c in api.containers(all=True, filters={"label": f"{LABEL}=1"})
            if c["Labels"][f"{LABEL}.owner"].split(":")[1] == str(pid)]  # fmt: skip


@pytest.mark.docker
def test_docker_leaves_nothing_when_the_owner_is_killed():
    need("docker")
    api = connect(None)
    process, _ = owner("docker")
    mine = containers(api, process.pid)
    pids = {api.inspect_container(c["Id"])["State"]["Pid"] for c in mine}
    assert len(mine) >= 3
    assert living(pids) == pids
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert until(lambda: not containers(api, process.pid)), "containers are left"
    assert not living(pids)
    api.close()


@pytest.mark.docker
def test_docker_reaps_containers_of_the_dead():
    need("docker")
    api = connect(None)
    gone = subprocess.Popen(["true"])
    gone.wait()
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    left = api.create_container(
        host_image(), ["python3"], labels={LABEL: "1", f"{LABEL}.owner": f"{boot}:{gone.pid}:1"}
    )["Id"]
    elsewhere = api.create_container(
        host_image(), ["python3"], labels={LABEL: "1", f"{LABEL}.owner": f"another:{gone.pid}:1"}
    )["Id"]
    try:
        assert reap(api) >= 1
        known = {c["Id"] for c in api.containers(all=True)}
        assert left not in known
        assert elsewhere in known
    finally:
        api.remove_container(elsewhere, force=True)
        api.close()


def engine(folder, *words):
    script = pathlib.Path(__file__).parents[3] / ".ci" / "dockerd.sh"
    env = {**os.environ, "CABOCHON_DOCKER_RUN": str(folder / "run"), "CABOCHON_DOCKER_DATA": str(folder / "data")}
    return subprocess.run(["bash", str(script), *words], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.docker
@pytest.mark.timeout(300)
def test_docker_engine_killed_in_the_middle(tmp_path_factory):
    """An engine of its own is killed while a program runs: the verdict is the machine's failure, nothing is left, and
    with the engine back the run goes on."""
    if os.geteuid() != 0:
        pytest.skip("only root can start an engine of its own")
    folder = tmp_path_factory.mktemp("engine")
    started = engine(folder)
    if started.returncode:
        if os.environ.get("CI") == "true":
            pytest.fail(started.stderr)
        pytest.skip(f"no engine can be started here: {started.stderr[-300:]}")
    address = started.stdout.strip()
    try:
        image = build(base_url=address) and "cabochon-sandbox:host"
        box = DockerSandbox(image=image, base_url=address, warm=2, limits=Limits(wall_seconds=20.0))
        box.fill()
        pids = {box._api().inspect_container(c["Id"])["State"]["Pid"] for c in box._api().containers()}
        results = []
        sleeper = Task(id="t", prompt="", verifier="code", payload={"tests": ["assert f() == 1"]})
        thread = threading.Thread(
            target=lambda: results.append(
                CodeVerifier(box, limits=box.limits).verify(
                    sleeper, "```python\nimport time\ndef f(): time.sleep(60)\n```"
                )
            )
        )
        thread.start()
        time.sleep(1.5)
        pids |= {box._api().inspect_container(c["Id"])["State"]["Pid"] for c in box._api().containers()}
        assert len(living(pids)) >= 3
        os.kill(int((folder / "run" / "docker.pid").read_text()), signal.SIGKILL)
        thread.join(45)
        assert [(r.status, r.score) for r in results] == [("infra_error", None)]
        assert until(lambda: not living(pids), 40), f"processes are left: {living(pids)}"
        with pytest.raises(SandboxError, match="after 3 attempts"):
            box.run(python_program("print(1)"))
        assert engine(folder).returncode == 0
        assert box.run(python_program("print(2)")).stdout == b"2\n"
        box.close()
        api = connect(address)
        assert until(lambda: not api.containers(all=True)), api.containers(all=True)
        api.close()
    finally:
        engine(folder, "wipe")
