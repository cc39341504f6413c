"""What a container is born with, on the real engine."""

import json
import platform

import pytest
from boxes import opened

from cabochon.verifiers.sandbox import rootfs
from cabochon.verifiers.sandbox.base import python_program
from cabochon.verifiers.sandbox.container import scripts
from cabochon.verifiers.sandbox.docker import DockerSandbox
from cabochon.verifiers.sandbox.engine import connect
from cabochon.verifiers.sandbox.image import AGENT_LABEL, build
from cabochon.verifiers.sandbox.seccomp_profile import profile
from cabochon.verifiers.sandbox.testing import host_image

pytestmark = pytest.mark.docker

REFUSED = {  # of x86_64 and of aarch64
    "unshare": (272, 97), "ptrace": (101, 117), "mount": (165, 40), "bpf": (321, 280), "keyctl": (250, 219),
    "process_vm_readv": (310, 270), "io_uring_setup": (425, 425), "perf_event_open": (298, 241),
    "open_by_handle_at": (304, 265), "personality": (135, 92), "timer_create": (222, 107), "mq_open": (240, 180),
    "setns": (308, 268), "userfaultfd": (323, 282), "io_setup": (206, 0),
}  # fmt: skip
TRIES = """
import ctypes, errno, os, socket, sys, threading
c = ctypes.CDLL(None, use_errno=True)
def call(*args):
    ctypes.set_errno(0)
    return 'allowed' if c.syscall(*args) >= 0 else errno.errorcode[ctypes.get_errno()]
found = {name: call(number, 0, 0, 0, 0, 0) for name, number in NUMBERS.items()}
found['namespace'] = call(CLONE, 0x10000011, 0, 0, 0, 0)
for family in (16, 17, 38, 40):
    try:
        socket.socket(family, socket.SOCK_RAW if family == 16 else socket.SOCK_STREAM)
        found[family] = 'allowed'
    except OSError as e:
        found[family] = errno.errorcode[e.errno]
for family in (socket.AF_UNIX, socket.AF_INET):
    socket.socket(family).close()
threading.Thread(target=os.getpid).start()
assert os.waitstatus_to_exitcode(os.waitpid(os.fork() or os._exit(3), 0)[1]) == 3
print(found)
"""
OLD_CALL = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')  # mov eax, 20; int 0x80 (getpid of 32-bit programs); ret
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""


def under_the_profile(source):
    """Output and exit code of a program that has this profile and no filter besides."""
    api = connect(None)
    host = api.create_host_config(
        network_mode="none", cap_drop=["ALL"], security_opt=["no-new-privileges", f"seccomp={profile()}"]
    )
    name = api.create_container(
        host_image(), ["python3", "-I", "-S", "-c", source], user="65534:65534", host_config=host
    )["Id"]
    try:
        stream = api.attach(name, stream=True, logs=False)
        api.start(name)
        out = b"".join(stream)
        return out.decode(), api.wait(name, timeout=60)["StatusCode"]
    finally:
        api.remove_container(name, force=True)
        api.close()


def test_the_profile_refuses_by_itself():
    opened("docker").close()
    which = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    numbers = {name: both[which] for name, both in REFUSED.items()}
    out, code = under_the_profile(f"NUMBERS = {numbers}\nCLONE = {(56, 220)[which]}\n{TRIES}")
    assert code == 0, out
    found = eval(out)
    assert found == dict.fromkeys([*REFUSED, "namespace", 16, 17, 38, 40], "EPERM")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit calls of x86")
def test_calls_of_another_architecture_end_the_program():
    opened("docker").close()
    out, code = under_the_profile(OLD_CALL)
    assert (out, code) == ("", 128 + 31)  # SIGSYS


def test_a_program_is_under_the_profile_and_the_filter():
    with opened("docker") as box:
        status = box.run(python_program("print(open('/proc/self/status').read())")).stdout.decode()
        assert "Seccomp_filters:\t2" in status
        api = connect(None)
        box.fill()
        options = api.inspect_container(box._waiting[0].container)["HostConfig"]["SecurityOpt"]
        assert f"seccomp={profile()}" in options
        api.close()


def test_the_profile_names_each_call_once():
    rules = json.loads(profile())["syscalls"]
    names = [name for rule in rules for name in rule["names"]]
    assert len(set(names)) == len(names) - 2  # `socket`: one rule for each of three families
    assert not set(REFUSED) & set(names)


def test_each_container_is_a_user_of_its_own():
    with opened("docker") as box:
        program = python_program("import os; print(os.getuid())")
        assert len({box.run(program).stdout for _ in range(3)}) > 1


def test_an_image_with_a_package():
    opened("docker").close()
    build("cabochon-sandbox:test-package", ("yaml",))
    try:
        with DockerSandbox(image="cabochon-sandbox:test-package", warm=1) as box:
            assert box.run(python_program("import yaml; print(yaml.safe_load('a: 1'))")).stdout == b"{'a': 1}\n"
    finally:
        api = connect(None)
        api.remove_image("cabochon-sandbox:test-package", force=True)
        api.close()


def test_an_image_without_our_modules_is_given_their_source(monkeypatch):
    opened("docker").close()
    carries = {"Config": {"Labels": {AGENT_LABEL: rootfs.agent_key()}}}
    assert scripts(carries)[1] == b""
    for image in ({"Config": {"Labels": None}}, {"Config": None}, {"Config": {"Labels": {AGENT_LABEL: "older"}}}):
        first, source = scripts(image)
        assert len(first) < 500 < len(source)
    where = "import sys; print(sys.modules['cabochon.verifiers.sandbox.inside'].__spec__.origin)"
    for known, origin in ((True, b"/agent/cabochon/verifiers/sandbox/inside.py\n"), (False, b"None\n")):
        if not known:
            host_image()
            monkeypatch.setattr(rootfs, "agent_key", lambda: "newer")
        with DockerSandbox(image="cabochon-sandbox:host", warm=1) as box:
            assert box.run(python_program(where)).stdout == origin
