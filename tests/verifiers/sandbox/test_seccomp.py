"""The filter's decisions, from a small interpreter of classic BPF, and that the kernel agrees."""

import errno
import struct

import pytest
from boxes import opened

from cabochon.verifiers.sandbox import seccomp
from cabochon.verifiers.sandbox.base import python_program

ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
X86, ARM = 0xC000003E, 0xC00000B7


def decide(program, nr, arch, arg0=0, arg1=0):
    data = struct.pack("<IIQ6Q", nr, arch, 0, arg0, arg1, 0, 0, 0, 0)
    at, a = 0, 0
    while True:
        code, yes, no, k = struct.unpack_from("<HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            (a,) = struct.unpack_from("<I", data, k)
        elif code == 0x06:
            return k
        else:
            at += yes if {0x15: a == k, 0x35: a >= k, 0x45: bool(a & k)}[code] else no


@pytest.mark.parametrize(
    ("nr", "arg0", "want"),
    [(0, 0, ALLOW), (59, 0, ALLOW), (101, 0, "EPERM"), (165, 0, "EPERM"), (272, 0, "EPERM"), (321, 0, "EPERM"),
     (425, 0, "EPERM"), (435, 0, "ENOSYS"), (463, 0, "ENOSYS"), (0x40000000, 0, "ENOSYS"), (56, 0x1200011, ALLOW),
     (56, 0x10000011, "EPERM"), (56, 0x40000000, "EPERM"), (41, 1, ALLOW), (41, 2, ALLOW), (41, 16, "EPERM"), (41, 17,
     "EPERM"),
     (41, 40, "EPERM"), (319, 0, ALLOW), (206, 0, "EPERM"),
     (222, 0, "EPERM"), (240, 0, "EPERM"), (253, 0, "EPERM"), (294, 0, "EPERM")],
)  # fmt: skip
def test_x86_decisions(nr, arg0, want):
    expected = want if want == ALLOW else ERRNO | getattr(errno, want)
    assert decide(seccomp.filter_bytes("x86_64"), nr, X86, arg0) == expected


def test_other_architectures():
    program = seccomp.filter_bytes("aarch64")
    assert decide(program, 117, ARM) == ERRNO | errno.EPERM
    assert decide(program, 220, ARM, 0x20000000) == ERRNO | errno.EPERM
    assert [decide(program, nr, ARM) for nr in (26, 107, 180)] == [ERRNO | errno.EPERM] * 3
    assert decide(program, 198, ARM, 1) == ALLOW
    assert decide(program, 117, X86) == KILL
    assert decide(seccomp.filter_bytes("x86_64"), 20, 0x40000003) == KILL  # 32-bit calls
    with pytest.raises(ValueError, match="no seccomp table for 'vax'"):
        seccomp.filter_bytes("vax")


@pytest.mark.parametrize(("arch", "machine", "calls", "priority"), [
    (X86, "x86_64", (142, 144, 203, 302, 314), 141), (ARM, "aarch64", (118, 119, 122, 261, 274), 140),
])  # fmt: skip
def test_limits_and_priorities_are_the_callers_own_only(arch, machine, calls, priority):
    program = seccomp.filter_bytes(machine)
    refused = ERRNO | errno.EPERM
    for nr in calls:
        assert [decide(program, nr, arch, pid) for pid in (0, 1, 77)] == [ALLOW, refused, refused]
    whom = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert [decide(program, priority, arch, *w) for w in whom] == [ALLOW, *[refused] * 4]


def test_memory_without_an_owner_can_be_refused():
    program = seccomp.filter_bytes("x86_64", hidden_memory=False)
    assert [decide(program, nr, X86) for nr in (29, 319, 447)] == [ERRNO | errno.EPERM] * 3


@pytest.mark.bubblewrap
def test_the_kernel_agrees():
    source = """
import ctypes, errno, os, socket
c = ctypes.CDLL(None, use_errno=True)
def call(*args):
    ctypes.set_errno(0)
    r = c.syscall(*args)
    return errno.errorcode.get(ctypes.get_errno(), 'OK')
print(call(101, 0, 0, 0, 0), call(272, 0x10000000), call(321, 0, 0, 0), call(425, 1, 0), call(435, 0, 0), call(463))
print(call(294, 0), call(240, b'/q', 0o102, 0o600, 0), call(222, 1, 0, ctypes.byref(ctypes.c_int())))
for family in (40, 16, 17, 38):
    try: socket.socket(family, socket.SOCK_RAW if family == 17 else socket.SOCK_STREAM); print('opened', family)
    except OSError as e: print(errno.errorcode[e.errno])
socket.socketpair(); socket.socket(socket.AF_INET)
"""
    with opened("bubblewrap") as box:
        lines = box.run(python_program(source)).stdout.decode().splitlines()
    assert lines == ["EPERM EPERM EPERM EPERM ENOSYS ENOSYS", "EPERM EPERM EPERM", "EPERM", "EPERM", "EPERM", "EPERM"]
