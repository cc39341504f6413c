"""A seccomp filter as plain bytes: what a Python program never needs and an escape does is refused with EPERM.

Classic BPF over `struct seccomp_data` (nr at 0, arch at 4, args from 16), as seccomp(2) describes; no libseccomp.
Refused: mounting, namespaces, tracing, keys, BPF, perf, io_uring, handles, modules, clocks, and sockets other than
local and internet ones (AF_VSOCK would reach the host of a virtual machine, for it is not namespaced); what the kernel
counts per user, whom all sandboxes and perhaps the host's own programs share, or for all of the machine (io_setup);
limits and priorities of any process but the caller, for process 1 must stay able to end the others. `clone3`, whose
flags a filter cannot see, and any system call newer than this table are ENOSYS, so libc falls back.
"""

from __future__ import annotations

import errno
import platform
import struct
from functools import cache

_LD_W_ABS, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
NEW_NAMESPACES = 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000 | 0x00000080
"""CLONE_NEW{CGROUP,UTS,IPC,USER,PID,NET,NS,TIME}"""
FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6: the last two reach nothing but the namespace's own, empty, network"""

_COMMON = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "process_madvise": 440, "mount_setattr": 442,
    "quotactl_fd": 443, "pidfd_getfd": 438,
}  # fmt: skip
_X86_64 = {
    "io_setup": 206,
    "ptrace": 101, "syslog": 103, "personality": 135, "ustat": 136, "vhangup": 153, "modify_ldt": 154,
    "pivot_root": 155,
    "_sysctl": 156, "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166,
    "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173,
    "create_module": 174, "init_module": 175, "delete_module": 176, "quotactl": 179, "nfsservctl": 180,
    "lookup_dcookie": 212, "clock_settime": 227, "mbind": 237, "set_mempolicy": 238, "kexec_load": 246, "add_key": 248,
    "request_key": 249, "keyctl": 250, "migrate_pages": 256, "unshare": 272, "move_pages": 279, "perf_event_open": 298,
    "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308,
    "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "kexec_file_load": 320,
    "bpf": 321, "userfaultfd": 323,
}  # fmt: skip
_AARCH64 = {
    "io_setup": 0, "lookup_dcookie": 18,
    "umount2": 39, "mount": 40, "pivot_root": 41, "nfsservctl": 42, "chroot": 51, "vhangup": 58,
    "quotactl": 60, "acct": 89, "personality": 92, "unshare": 97, "kexec_load": 104, "init_module": 105,
    "delete_module": 106, "clock_settime": 112, "syslog": 116, "ptrace": 117, "reboot": 142, "sethostname": 161,
    "setdomainname": 162, "settimeofday": 170, "adjtimex": 171, "add_key": 217, "request_key": 218, "keyctl": 219,
    "swapon": 224, "swapoff": 225, "mbind": 235, "set_mempolicy": 237, "migrate_pages": 238, "move_pages": 239,
    "perf_event_open": 241, "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265,
    "clock_adjtime": 266,
    "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "bpf": 280,
    "userfaultfd": 282, "kexec_file_load": 294,
}  # fmt: skip
_OF_OTHERS = {"x86_64": [142, 144, 203, 302, 314], "aarch64": [118, 119, 122, 261, 274]}
"""sched_setparam, sched_setscheduler, sched_setaffinity, prlimit64, sched_setattr: of a process, 0 for the caller"""
_SET_PRIORITY = {"x86_64": 141, "aarch64": 140}
"""of (kind, whom): kind 0 is one process; a group or a user may have process 1 in it"""
_PER_USER = {"x86_64": [222, 240, 253, 294], "aarch64": [26, 107, 180]}
"""timer_create (of the user's pending signals), mq_open, inotify_init, inotify_init1"""
MACHINES = ("x86_64", "aarch64")
_HIDDEN_MEMORY = {"x86_64": [29, 319, 447], "aarch64": [194, 279, 447]}
"""shmget, memfd_create, memfd_secret"""
_NEWEST = 462
"""The last number this table has looked at (mseal)."""


def _op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, k)


@cache
def filter_bytes(machine: str | None = None, *, hidden_memory: bool = True) -> bytes:
    """The filter for this machine, in the form `bwrap --seccomp FD` reads. Raises ValueError for an unknown machine.

    `hidden_memory=False` also refuses memory that belongs to no process (memfd, System V): only a control group can
    count it.
    """
    machine = machine or platform.machine()
    known = {"x86_64": (0xC000003E, _X86_64, 56, 41), "aarch64": (0xC00000B7, _AARCH64, 220, 198)}
    if machine not in known:
        raise ValueError(f"no seccomp table for {machine!r}; known are {sorted(known)}")
    arch, table, clone, socket = known[machine]
    refuse = _op(_RET, _ERRNO | errno.EPERM)
    out = [_op(_LD_W_ABS, 4), _op(_JEQ, arch, 1, 0), _op(_RET, _KILL), _op(_LD_W_ABS, 0)]
    out += [_op(_JGE, _NEWEST + 1, 0, 1), _op(_RET, _ERRNO | errno.ENOSYS)]  # x32 calls, with bit 30 set, end here too
    out += [_op(_JEQ, 435, 0, 1), _op(_RET, _ERRNO | errno.ENOSYS)]  # clone3
    hidden = [] if hidden_memory else _HIDDEN_MEMORY[machine]
    for number in sorted([*_COMMON.values(), *table.values(), *_PER_USER[machine], *hidden]):
        out += [_op(_JEQ, number, 0, 1), refuse]
    for number in _OF_OTHERS[machine]:
        out += [_op(_JEQ, number, 0, 4), _op(_LD_W_ABS, 16), _op(_JEQ, 0, 0, 1), _op(_RET, _ALLOW), refuse]
    out += [_op(_JEQ, _SET_PRIORITY[machine], 0, 6), _op(_LD_W_ABS, 16), _op(_JEQ, 0, 0, 3), _op(_LD_W_ABS, 24)]
    out += [_op(_JEQ, 0, 0, 1), _op(_RET, _ALLOW), refuse]
    out += [_op(_JEQ, clone, 0, 4), _op(_LD_W_ABS, 16), _op(_JSET, NEW_NAMESPACES, 0, 1), refuse, _op(_RET, _ALLOW)]
    out += [_op(_JEQ, socket, 0, 2 + len(FAMILIES)), _op(_LD_W_ABS, 16)]
    for i, family in enumerate(FAMILIES):
        out.append(_op(_JEQ, family, len(FAMILIES) - i, 0))
    out += [refuse, _op(_RET, _ALLOW)]
    return b"".join(out)
