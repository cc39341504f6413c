"""The seccomp profile that containers are started with: a list of what is allowed, everything else is refused.

The engine's own default allows the same kinds of calls, some that this one does not (tracing, io_uring, timers and
queues that the kernel counts per user), and each of them for 32-bit programs too, which nobody runs here and which make
it the dearest part of a container's start after the processes themselves. The program gets the filter of `seccomp.py`
on top, which is a list of what is refused, so neither list's mistake is alone.

Format: the engine's own (docs.docker.com, "Seccomp security profiles for Docker").
"""

from __future__ import annotations

import errno
import json
from functools import cache

from cabochon.verifiers.sandbox.seccomp import FAMILIES, NEW_NAMESPACES

_ALLOWED = {
    "files": """
        open openat openat2 creat close close_range read write readv writev pread64 pwrite64 preadv pwritev preadv2
        pwritev2 lseek stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat
        getdents getdents64 rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat mkdir mkdirat rmdir
        mknod mknodat chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat
        truncate ftruncate fallocate fadvise64 readahead sync fsync fdatasync syncfs sync_file_range flock umask getcwd
        chdir fchdir sendfile splice tee vmsplice copy_file_range memfd_create getxattr lgetxattr fgetxattr setxattr
        lsetxattr fsetxattr listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr""",
    "descriptors": """
        dup dup2 dup3 fcntl ioctl pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait
        epoll_pwait epoll_pwait2 eventfd eventfd2 signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime
        inotify_add_watch inotify_rm_watch""",
    "memory": """
        brk mmap munmap mremap mprotect madvise msync mincore mlock mlock2 mlockall munlock munlockall membarrier
        pkey_alloc pkey_free pkey_mprotect remap_file_pages shmget shmat shmdt shmctl semget semop semtimedop semctl
        msgget msgsnd msgrcv msgctl""",
    "processes": """
        fork vfork execve execveat exit exit_group wait4 waitid kill tkill tgkill pidfd_open pidfd_send_signal getpid
        getppid gettid getpgid setpgid getpgrp getsid setsid getuid geteuid getgid getegid getresuid getresgid getgroups
        setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capget capset prctl arch_prctl
        set_tid_address set_robust_list get_robust_list rseq seccomp landlock_create_ruleset landlock_add_rule
        landlock_restrict_self getpriority setpriority ioprio_get ioprio_set getrlimit setrlimit prlimit64 getrusage
        restart_syscall""",
    "threads": """
        futex futex_waitv sched_yield sched_getaffinity sched_setaffinity sched_getparam sched_setparam
        sched_getscheduler sched_setscheduler sched_getattr sched_setattr sched_get_priority_max sched_get_priority_min
        sched_rr_get_interval getcpu""",
    "signals": """
        rt_sigaction rt_sigprocmask rt_sigpending rt_sigsuspend rt_sigtimedwait rt_sigqueueinfo rt_tgsigqueueinfo
        rt_sigreturn sigaltstack pause alarm getitimer setitimer""",
    "time": """
        time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep times""",
    "sockets": """
        socketpair bind connect listen accept accept4 shutdown getsockname getpeername getsockopt setsockopt sendto
        recvfrom sendmsg recvmsg sendmmsg recvmmsg""",
    "the machine": """
        uname sysinfo getrandom""",
}


@cache
def profile() -> str:
    """The profile as the engine reads it. Architectures without an entry get their native calls as well."""
    allow = "SCMP_ACT_ALLOW"
    rules: list[dict[str, object]] = [{"names": " ".join(_ALLOWED.values()).split(), "action": allow}]
    rules += [{"names": ["socket"], "action": allow, "args": [{"index": 0, "value": family, "op": "SCMP_CMP_EQ"}]}
              for family in FAMILIES]  # fmt: skip
    no_namespace = {"index": 0, "value": NEW_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    rules.append({"names": ["clone"], "action": allow, "args": [no_namespace]})
    rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS})  # so libc falls back
    machines = [{"architecture": f"SCMP_ARCH_{name}", "subArchitectures": []} for name in ("X86_64", "AARCH64")]
    return json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "archMap": machines, "syscalls": rules})
