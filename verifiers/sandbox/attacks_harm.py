"""The shipped attack suite, part two: programs that try to get out, to exhaust, to linger, to read others' runs.

`solve()` says 'escaped' where it got what it was after. {canary}, {port}, {socket}, {pid} and {secret_name} are filled in by
attacks.py: a file and folder of the host, a port and an abstract socket it listens on, its process, and the name of a
variable in its environment.
"""

# ruff: noqa: E501
from __future__ import annotations

_LIBC = "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"

ESCAPES: dict[str, str] = {
    "io_uring": _LIBC + "def solve():\n    b = ctypes.create_string_buffer(256)\n    return 'escaped' if c.syscall(425, 4, b) >= 0 else ''",
    "host of the virtual machine": "import socket\ndef solve():\n    socket.socket(40, socket.SOCK_STREAM)\n    return 'escaped'",
    "others' descriptors": "import os\ndef solve():\n    out = ''\n    for p in os.listdir('/proc'):\n        if not p.isdigit() or int(p) == os.getpid(): continue\n        for f in range(10):\n            try: os.write(os.open(f'/proc/{p}/fd/{f}', os.O_WRONLY), b'x'); out = 'escaped'\n            except OSError: pass\n    return out",
    "more processor time": "import resource as r\ndef solve():\n    top = r.getrlimit(r.RLIMIT_CPU)[1]\n    r.setrlimit(r.RLIMIT_CPU, (top + 100, top + 100))\n    return 'escaped'",
    "reads a host file": "def solve():\n    return 'escaped' if open('{canary}/secret').read() else ''",
    "writes a host file": "def solve():\n    open('{canary}/written', 'w').write('x')\n    return 'escaped'",
    "reads shadow": "def solve():\n    return 'escaped' if open('/etc/shadow').read() else ''",
    "lists home folders": "import os\ndef solve():\n    return 'escaped' if os.listdir('/root') or os.listdir('/home') else ''",
    "climbs": "import os\ndef solve():\n    os.chdir('/tmp')\n    for _ in range(50): os.chdir('..')\n    return 'escaped' if os.path.exists('.' + '{canary}') else ''",
    "through process 1": "import os\ndef solve():\n    return 'escaped' if os.path.exists('/proc/1/root{canary}') or os.path.exists('/proc/self/root{canary}') else ''",
    "through descriptors": "import os\ndef solve():\n    for n in range(256):\n        try:\n            if os.path.exists(os.path.join(f'/proc/self/fd/{n}', '..', '{canary}'.lstrip('/'))): return 'escaped'\n            os.fchdir(n)\n            for _ in range(20): os.chdir('..')\n            if os.path.exists('.' + '{canary}'): return 'escaped'\n        except OSError: pass\n    return ''",
    "symlink out": "import os\ndef solve():\n    os.symlink('{canary}/secret', '/tmp/link')\n    return 'escaped' if open('/tmp/link').read() else ''",
    "symlink to write": "import os\ndef solve():\n    os.symlink('{canary}', '/tmp/dir')\n    open('/tmp/dir/written', 'w').write('x')\n    return 'escaped'",
    "host port": "import socket\ndef solve():\n    s = socket.create_connection(('127.0.0.1', {port}), 2)\n    return 'escaped'",
    "host abstract socket": "import socket\ndef solve():\n    s = socket.socket(socket.AF_UNIX); s.connect('\\0{socket}')\n    return 'escaped'",
    "interfaces": "import socket\ndef solve():\n    return 'escaped' if [n for _, n in socket.if_nameindex() if n not in ('lo', 'sit0', 'tunl0', 'ip6tnl0', 'gre0', 'gretap0', 'erspan0', 'ip_vti0', 'ip6_vti0', 'ip6gre0')] else ''",
    "raw packets": "import socket\ndef solve():\n    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\n    return 'escaped'",
    "engine socket": "import os\ndef solve():\n    return 'escaped' if os.path.exists('/var/run/docker.sock') or os.path.exists('/run/docker.sock') else ''",
    "becomes root": "import os\ndef solve():\n    os.setuid(0)\n    return 'escaped' if os.getuid() == 0 else ''",
    "new user namespace": _LIBC + "def solve():\n    return 'escaped' if c.unshare(0x10000000) == 0 else ''",
    "new user namespace by clone": _LIBC + "def solve():\n    r = c.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)\n    if r == 0: os._exit(0)\n    return 'escaped' if r > 0 else ''",
    "mounts": _LIBC + "def solve():\n    return 'escaped' if c.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 else ''",
    "remounts root writable": _LIBC + "def solve():\n    return 'escaped' if c.mount(b'', b'/', b'', 32 | 4096, None) == 0 else ''",
    "unmounts": _LIBC + "def solve():\n    return 'escaped' if c.umount2(b'/proc', 2) == 0 or c.umount2(b'/tmp', 2) == 0 else ''",
    "chroot": "import os\ndef solve():\n    os.chroot('/tmp')\n    return 'escaped'",
    "traces process 1": _LIBC + "def solve():\n    return 'escaped' if c.ptrace(16, 1, 0, 0) == 0 else ''",
    "memory of process 1": "import re\ndef solve():\n    want = b'HOST' + b'-SECRET'\n    m = open('/proc/1/mem', 'rb', 0)\n    for line in open('/proc/1/maps'):\n        a, b = (int(n, 16) for n in line.split()[0].split('-'))\n        try: m.seek(a); d = m.read(min(b - a, 1 << 24))\n        except (OSError, OverflowError, ValueError): continue\n        if d and want in d: return 'escaped'\n    return ''",
    "joins process 1's namespaces": _LIBC + "def solve():\n    for n in ('user', 'mnt', 'net', 'pid'):\n        try: fd = os.open('/proc/1/ns/' + n, 0)\n        except OSError: continue\n        if c.setns(fd, 0) == 0: return 'escaped'\n    return ''",
    "device node": "import os, stat\ndef solve():\n    os.mknod('/tmp/disk', 0o600 | stat.S_IFBLK, os.makedev(254, 0))\n    open('/tmp/disk', 'rb').read(16)\n    return 'escaped'",
    "raw devices": "import os\ndef solve():\n    for p in ('/dev/mem', '/dev/kmsg', '/dev/vda', '/dev/sda', '/dev/kvm', '/dev/fuse'):\n        try: open(p, 'rb').read(1); return 'escaped'\n        except OSError: pass\n    return ''",
    "kernel settings": "def solve():\n    for p in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/proc/sys/kernel/hostname', '/proc/sys/vm/drop_caches'):\n        try: open(p, 'w').write('x'); return 'escaped'\n        except OSError: pass\n    return ''",
    "release agent": "import glob\ndef solve():\n    for p in glob.glob('/sys/fs/cgroup/**/release_agent', recursive=True) + glob.glob('/sys/fs/cgroup/**/*max*', recursive=True) + glob.glob('/sys/fs/cgroup/*/*limit_in_bytes'):\n        try: open(p, 'w').write('-1'); return 'escaped'\n        except OSError: pass\n    return ''",
    "setuid copy": "import os, shutil, subprocess, sys\ndef solve():\n    shutil.copy(sys.executable, '/tmp/py'); os.chmod('/tmp/py', 0o4755)\n    out = subprocess.run(['/tmp/py', '-I', '-S', '-c', 'import os; print(os.geteuid())'], capture_output=True).stdout\n    return 'escaped' if out.strip() == b'0' else ''",
    "clock": "import time\ndef solve():\n    time.clock_settime(time.CLOCK_REALTIME, 0)\n    return 'escaped'",
    "keyring": _LIBC + "def solve():\n    return 'escaped' if c.syscall(248, b'user', b'x', b'y', 1, -3) > 0 else ''",
    "BPF and perf": _LIBC + "def solve():\n    b = ctypes.create_string_buffer(128)\n    return 'escaped' if c.syscall(321, 0, b, 72) > 0 or c.syscall(298, b, 0, -1, -1, 0) > 0 else ''",
    "what its user may have": _LIBC + "def solve():\n    got = [c.inotify_init() for _ in range(200)]\n    return 'escaped' if max(got) >= 0 else ''",
    "what the machine may have": _LIBC + "def solve():\n    got = [c.syscall({'x86_64': 206, 'aarch64': 0}[os.uname().machine], 1000, ctypes.byref(ctypes.c_ulong())) for _ in range(60)]\n    return 'escaped' if max(got) >= 0 else ''",
    "signals the owner": "import os\ndef solve():\n    os.kill({pid}, 0)\n    return 'escaped'",
    "signals everyone": "import os, signal\nsignal.signal(15, signal.SIG_IGN)\ndef solve():\n    os.kill(-1, 9); os.kill(1, 9); os.killpg(0, 9)\n    return ''",
    "interrupts process 1": "import os, time\ndef solve():\n    for _ in range(50): os.kill(1, 2)\n    time.sleep(0.5)\n    return ''",
    "limits of process 1": "import resource as r, time\ndef solve():\n    for n in (r.RLIMIT_NOFILE, r.RLIMIT_CPU, r.RLIMIT_AS):\n        try: r.prlimit(1, n, (0, 0)); return 'escaped'\n        except OSError: pass\n    time.sleep(0.5)\n    return ''",
    "priority of process 1": "import os\ndef solve():\n    todo = [lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)), lambda: os.sched_setparam(1, os.sched_param(0)), lambda: os.sched_setaffinity(1, {0})]\n    todo += [lambda w=w: os.setpriority(*w, 19) for w in ((0, 1), (1, 0), (1, 1), (2, 0))]\n    for do in todo:\n        try: do(); return 'escaped'\n        except OSError: pass\n    return ''",
    "signals its parents": "import os\ndef solve():\n    for p in (os.getppid(), 1, 2, 3):\n        for s in (15, 9, 19):\n            try: os.kill(p, s)\n            except OSError: pass\n    return ''",
    "environment": "import os, glob\ndef solve():\n    if '{secret_name}' in os.environ: return 'escaped'\n    for p in glob.glob('/proc/[0-9]*/environ'):\n        try:\n            if b'{secret_name}' in open(p, 'rb').read(): return 'escaped'\n        except OSError: pass\n    return ''",
    "types into the terminal": "import fcntl, os\ndef solve():\n    for n in (0, 1, 2):\n        try: fcntl.ioctl(n, 0x5412, b'x'); return 'escaped'\n        except OSError: pass\n    fcntl.ioctl(os.open('/dev/tty', 2), 0x5412, b'x')\n    return 'escaped'",
    "writes its root": "def solve():\n    for p in ('/x', '/usr/x', '/etc/passwd', '/agent/x', '/dev/x', '/usr/bin/python3'):\n        try: open(p, 'w').write('x'); return 'escaped'\n        except OSError: pass\n    return ''",
}  # fmt: skip

SPIES: dict[str, str] = {
    "others' files": "import os\ndef solve():\n    for d in ('/tmp', '/dev/shm', '/var/tmp', '/run'):\n        for r, _, fs in os.walk(d):\n            for f in fs:\n                try:\n                    if b'NEIGHBOUR' + b'-SECRET' in open(os.path.join(r, f), 'rb').read(): return 'escaped'\n                except OSError: pass\n    return ''",
    "others' processes": "import glob, os\ndef solve():\n    seen = [p for p in glob.glob('/proc/[0-9]*') if int(os.path.basename(p)) not in (1, 2, 3, os.getpid(), os.getppid())]\n    for p in seen:\n        if b'python' in open(p + '/cmdline', 'rb').read(): return 'escaped'\n    return ''",
    "leaves a note": "import os\ndef solve():\n    for p in ('/tmp/note', '/dev/shm/note', '/var/tmp/note'):\n        if os.path.exists(p): return 'escaped'\n        try: open(p, 'w').write('x')\n        except OSError: pass\n    return ''",
    "listens for others": "import socket\ndef solve():\n    s = socket.socket(socket.AF_UNIX)\n    try: s.bind('\\0cabochon-meeting')\n    except OSError: return 'escaped'\n    t = socket.socket(socket.AF_UNIX); t.settimeout(0.1)\n    try: t.connect('\\0neighbour-meeting'); return 'escaped'\n    except OSError: return ''",
    "shared memory segments": "def solve():\n    return 'escaped' if len(open('/proc/sysvipc/shm').read().splitlines()) > 1 else ''",
}  # fmt: skip

EXHAUSTION: dict[str, str] = {
    "fork bomb": "import os\ndef solve():\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "fork bomb at load": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import threading, time\ndef solve():\n    while True:\n        try: threading.Thread(target=time.sleep, args=(60,)).start()\n        except RuntimeError: pass",
    "memory": "def solve():\n    x = []\n    while True: x.append(bytearray(1 << 24))",
    "memory by many children": "import os, time\ndef solve():\n    for _ in range(30):\n        if os.fork() == 0:\n            x = bytearray(60 << 20); x[::4096] = b'x' * len(x[::4096]); time.sleep(60)\n    time.sleep(60)",
    "shared memory": "import mmap\ndef solve():\n    x = []\n    while True:\n        m = mmap.mmap(-1, 1 << 24); m.write(b'x' * (1 << 24)); x.append(m)",
    "memory files": "import os\ndef solve():\n    fds = []\n    while True:\n        fd = os.memfd_create('x'); fds.append(fd); os.write(fd, b'x' * (1 << 24))",
    "pipes": "import os\ndef solve():\n    keep = []\n    while True:\n        keep.append(os.pipe()); os.set_blocking(keep[-1][1], False); os.write(keep[-1][1], b'x' * 65536)",
    "descriptors": "import os\ndef solve():\n    while True: os.open('/dev/null', 0)",
    "disk": "def solve():\n    with open('/tmp/big', 'wb') as f:\n        while True: f.write(b'x' * (1 << 20))",
    "disk by many files": "def solve():\n    i = 0\n    while True:\n        i += 1\n        open(f'/tmp/{i}', 'wb').write(b'x' * (1 << 20))",
    "files without content": "def solve():\n    i = 0\n    while True:\n        i += 1\n        open(f'/tmp/{i}', 'wb').close()",
    "shared memory folder": "def solve():\n    with open('/dev/shm/big', 'wb') as f:\n        while True: f.write(b'x' * (1 << 20))",
    "spins": "def solve():\n    while True: pass",
    "sleeps": "import time\ndef solve():\n    time.sleep(1000)",
    "sleeps at load": "import time\ntime.sleep(1000)",
    "ignores signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ndef solve():\n    while True: pass",
    "regular expression": "import re\ndef solve():\n    return re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "big power": "def solve():\n    return 10 ** 10 ** 9",
    "C stack": "import sys, ctypes\nsys.setrecursionlimit(10 ** 9)\ndef solve():\n    class A:\n        def __repr__(self): return repr(self)\n    return repr(A())",
    "null pointer": "import ctypes\ndef solve():\n    ctypes.string_at(0)",
    "floods standard output": "import sys\ndef solve():\n    while True: sys.stdout.write('x' * 65536)",
    "floods standard error": "import os\ndef solve():\n    while True: os.write(2, b'x' * 65536)",
    "floods every descriptor": "import os\ndef solve():\n    while True:\n        for fd in range(1, 16):\n            try: os.set_blocking(fd, False); os.write(fd, b'\\x00' * 65536)\n            except OSError: pass",
    "drips on every descriptor": "import os, time\ndef solve():\n    while True:\n        for fd in range(3, 16):\n            try: os.write(fd, b'\\x01')\n            except OSError: pass\n        time.sleep(0.3)",
    "a frame of four gigabytes": "import os\ndef solve():\n    for fd in range(3, 16):\n        try: os.write(fd, b'\\xff\\xff\\xff\\xffx')\n        except OSError: pass\n    return ''",
    "zombies": "import os\ndef solve():\n    for _ in range(10 ** 6):\n        if os.fork() == 0: os._exit(0)",
}  # fmt: skip

LINGERING: dict[str, str] = {
    "daemon": "import os, time\ndef solve():\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork(): os._exit(0)\n        while True: time.sleep(1)\n    return 'done'",
    "busy daemon": "import os\ndef solve():\n    if os.fork() == 0:\n        os.setsid(); os.closerange(0, 256)\n        while True: pass\n    return 'done'",
    "child that keeps the streams": "import os, time\ndef solve():\n    if os.fork() == 0:\n        time.sleep(1000)\n    return 'done'",
    "thread that stays": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\ndef solve(): return 'done'",
    "respawning child": "import os, time\ndef solve():\n    if os.fork() == 0:\n        os.setsid()\n        while True:\n            if os.fork(): os._exit(0)\n            time.sleep(0.01)\n    return 'done'",
    "stopped child": "import os, signal\ndef solve():\n    if os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)\n    return 'done'",
}  # fmt: skip
