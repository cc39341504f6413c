"""The shipped attack suite, part three: honest programs that look odd. All must be judged right.

Each solves its task; `form` in attacks.py says which tests it meets.
"""

# ruff: noqa: E501
from __future__ import annotations

SQUARES: dict[str, str] = {
    "shared memory": "from multiprocessing import shared_memory\ndef solve(x):\n    s = shared_memory.SharedMemory(create=True, size=100); s.buf[0] = abs(x); out = s.buf[0] ** 2\n    s.close(); s.unlink(); return out",
    "queue of processes": "import multiprocessing as mp\ndef work(q, x): q.put(x * x)\ndef solve(x):\n    c = mp.get_context('fork'); q = c.Queue(); p = c.Process(target=work, args=(q, x)); p.start(); out = q.get(); p.join(); return out",
    "a server of its own": "import socket, threading\ndef solve(x):\n    s = socket.create_server(('127.0.0.1', 0))\n    threading.Thread(target=lambda: s.accept()[0].sendall(str(x * x).encode())).start()\n    return int(socket.create_connection(s.getsockname()).recv(99))",
    "database": "import sqlite3\ndef solve(x):\n    d = sqlite3.connect('a.db'); d.execute('create table if not exists t (a)'); d.execute('insert into t values (?)', (x,)); d.commit()\n    return d.execute('select a * a from t order by rowid desc').fetchone()[0]",
    "leaves the folder": "import os\nos.chdir('/')\ndef solve(x): return x * x",
    "a thread that never ends": "import threading, time\ndef beat():\n    while True: time.sleep(0.0003)\nthreading.Thread(target=beat, daemon=True).start()\ndef solve(x): return x * x",
    "plain": "def solve(x):\n    return x * x",
    "reads its annotations": "import inspect\ndef solve(x: int):\n    kind = inspect.signature(solve).parameters['x'].annotation\n    return kind(x) * kind(x)",
    "lowers itself": "import os, resource as r\nos.nice(1); os.sched_setaffinity(0, os.sched_getaffinity(0))\nr.setrlimit(r.RLIMIT_NOFILE, (32, 32))\ndef solve(x): return x * x",
    "noisy": "import sys\nprint('loading' * 1000)\ndef solve(x):\n    print('x' * 100_000); print('PASS', file=sys.stderr)\n    return x * x",
    "threads": "import threading\ndef solve(x):\n    out = []\n    ts = [threading.Thread(target=lambda: out.append(abs(x))) for _ in range(20)]\n    [t.start() for t in ts]; [t.join() for t in ts]\n    return out[0] * len(out) // 20 * abs(x)",
    "thread pool": "from concurrent.futures import ThreadPoolExecutor\ndef solve(x):\n    with ThreadPoolExecutor(4) as p: return sum(p.map(lambda _: abs(x), range(abs(x))))",
    "deep recursion": "import sys\nsys.setrecursionlimit(50_000)\ndef down(n): return 0 if n == 0 else 1 + down(n - 1)\ndef solve(x): return x * x + down(20_000) - 20_000",
    "temporary files": "import tempfile, os\ndef solve(x):\n    with tempfile.NamedTemporaryFile() as f:\n        f.write(b'x' * (10 << 20)); f.flush()\n        return x * x + os.path.getsize(f.name) - (10 << 20)",
    "200 MB": "def solve(x):\n    b = bytearray(200 << 20); b[::4096] = b'1' * len(b[::4096])\n    return x * x",
    "sys.exit under main guard": "import sys\ndef solve(x): return x * x\ndef main():\n    print(solve(2)); return 0\nif __name__ == '__main__': sys.exit(main())",
    "sys.exit at the end": "import sys\ndef solve(x): return x * x\nprint(solve(3))\nsys.exit(0)",
    "own classes inside": "from dataclasses import dataclass\nfrom enum import Enum\nclass Kind(Enum):\n    A = 1\n@dataclass\nclass Box:\n    v: int\n    def area(self): return self.v ** 2\ndef solve(x): return Box(x).area()",
    "callable object": "class Solver:\n    def __call__(self, x): return x * x\nsolve = Solver()",
    "int subclass": "class Meter(int): pass\ndef solve(x): return Meter(x * x)",
    "lambda and partial": "import functools, operator\nsolve = lambda x: functools.partial(operator.mul, x)(x)",
    "cached": "import functools\n@functools.lru_cache(maxsize=None)\ndef solve(x): return x * x",
    "numbers as text": "def solve(x): return int(str(abs(x))) ** 2",
    "child interpreter": "import subprocess, sys\ndef solve(x): return int(subprocess.run([sys.executable, '-I', '-S', '-c', f'print({x} * {x})'], capture_output=True, text=True, check=True).stdout)",
    "processes": "import multiprocessing as mp\ndef f(x): return x * x\ndef solve(x):\n    with mp.get_context('fork').Pool(2) as p: return p.map(f, [x])[0]",
    "asyncio inside": "import asyncio\nasync def go(x):\n    await asyncio.sleep(0.001); return x * x\ndef solve(x): return asyncio.run(go(x))",
    "alarm": "import signal\ndef solve(x):\n    signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(1)\n    try: return x * x\n    finally: signal.alarm(0)",
    "catches memory errors": "def solve(x):\n    try: bytearray(1 << 62)\n    except (MemoryError, OverflowError): pass\n    return x * x",
    "big stack thread": "import sys, threading\nsys.setrecursionlimit(10 ** 6); threading.stack_size(64 << 20)\nout = {}\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\ndef solve(x):\n    t = threading.Thread(target=lambda: out.__setitem__(x, x * x + f(5000) - 5000)); t.start(); t.join()\n    return out[x]",
    "own print and input": "import sys\ninput = sys.stdin.readline\nprint = lambda *a, **k: None\nmax = min\ndef solve(x):\n    print(x); return x * x",
    "leaves a daemon thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\ndef solve(x): return x * x",
    "future and type hints": "from __future__ import annotations\nfrom typing import List\ndef solve(x: int) -> int:\n    total: List[int] = [x] * abs(x)\n    return abs(sum(total))",
    "one second of work": "def solve(x):\n    n = 0\n    for i in range(2_000_000): n += i & 1\n    return x * x + n - 1_000_000",
    "closed standard output": "import os, sys\nsys.stdout.close()\ndef solve(x): return x * x",
    "catches everything": "def solve(x):\n    try: raise KeyboardInterrupt\n    except BaseException: return x * x",
}

SORTS: dict[str, str] = {
    "new list": "def solve(xs): return sorted(xs)",
    "in place and returned": "def solve(xs):\n    xs.sort()\n    return xs",
}

IN_PLACE: dict[str, str] = {
    "in place": "def solve(xs): xs.sort()",
    "slice": "def solve(xs): xs[:] = sorted(xs)",
}

STACKS: dict[str, str] = {
    "stack": "class Stack:\n    def __init__(self, items=()): self.items = list(items)\n    def push(self, x): self.items.append(x); return self\n    def pop(self):\n        if not self.items: raise IndexError('empty')\n        return self.items.pop()\n    def __len__(self): return len(self.items)\n    def __eq__(self, o): return isinstance(o, Stack) and self.items == o.items\n    def __iter__(self): return iter(self.items)\n    def __contains__(self, x): return x in self.items\n    @property\n    def top(self): return self.items[-1]",
    "stack on list": "class Stack(list):\n    def push(self, x): self.append(x); return self\n    @property\n    def top(self): return self[-1]",
}

STDIO: dict[str, str] = {
    "writes to the descriptor": "import os\nn = int(os.read(0, 100)); os.write(1, str(n * n).encode())",
    "a child prints": "import subprocess, sys\nn = int(input())\nsubprocess.run([sys.executable, '-c', f'print({n * n})'], check=True)",
    "reads lines": "n = int(input())\nprint(n * n)",
    "reads all at once": "import sys\ndata = sys.stdin.buffer.read().split()\nsys.stdout.write(str(int(data[0]) ** 2) + '  \\r\\n\\n')",
    "main guard and exit": "import sys\ndef main():\n    print(int(sys.stdin.readline()) ** 2)\nif __name__ == '__main__':\n    main()\n    sys.exit(0)",
    "reads open(0)": "n, *_ = map(int, open(0))\nprint(n ** 2)",
    "opens standard output": "with open('/dev/stdout', 'w') as out: out.write(str(int(open('/dev/stdin').read()) ** 2))",
    "types read at run time": "from dataclasses import dataclass, fields\nfrom functools import singledispatch\n@dataclass\nclass P:\n    n: int\n@singledispatch\ndef square(x): return 0\n@square.register\ndef _(x: int): return x * x\nprint(square(fields(P)[0].type(input())))",
    "flushes and _exits": "import os, sys\nprint(int(input()) ** 2)\nsys.stdout.flush()\nos._exit(0)",
    "noise on standard error": "import sys\nprint('debug' * 10000, file=sys.stderr)\nprint(int(input()) ** 2)",
    "thread main": "import sys, threading\nsys.setrecursionlimit(10 ** 6); threading.stack_size(64 << 20)\ndef main(): print(int(input()) ** 2)\nthreading.Thread(target=main).start()",
}
