"""In a process of its own: the allocator's settings are for good."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

PROGRAM = """
import resource, sys, threading
if sys.argv[1] == "keep":
    from cabochon.heap import keep_pages
    assert keep_pages()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    bytearray(40 << 20)
def elsewhere():
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
use()
before = faults()
for _ in range(5):
    use()
    elsewhere()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_buffers_used_again_are_not_faulted_in_again():
    kept, default = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "default")
    )
    assert kept < 500, "ten buffers of 40 MB, half of them another thread's, all in pages the first one touched"
    assert default > 20 * kept + 10_000, "and what is avoided: glibc maps each anew"


HUGE = """
import re, sys
from pathlib import Path
from cabochon.heap import ask_for_huge_pages
ask_for_huge_pages()
buffer = bytearray(256 << 20)
buffer[:] = b"1" * len(buffer)
print(sys.argv[1], re.search(r"AnonHugePages: *(\\d+) kB", Path("/proc/self/smaps_rollup").read_text()).group(1))
"""


@pytest.mark.skipif(not THP.exists() or "[madvise]" not in THP.read_text(), reason="huge pages are not asked for here")
def test_large_buffers_lie_in_huge_pages_and_arguments_survive():
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    run = lambda more: subprocess.run(  # noqa: E731
        [sys.executable, "-c", HUGE, "a b"], capture_output=True, text=True, check=True, env={**environment, **more}
    ).stdout.rsplit(maxsplit=1)
    huge_kb = 0
    for _ in range(20):  # free memory lies in small pieces while others work: the kernel finds large ones or does not
        with contextlib.suppress(OSError):  # root's
            Path("/proc/sys/vm/compact_memory").write_text("1")
        words, found = run({})
        assert words == "a b"
        huge_kb = max(huge_kb, int(found))
        if huge_kb > 200 << 10:
            break
        time.sleep(1)
    assert huge_kb > 200 << 10
    assert int(run({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})[1]) < 50 << 10, "the user's own setting stands"


RESERVED = """
import sys
import jax
from cabochon.heap import fit, keep_pages
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
keep_pages()
fit({"w": jax.ShapeDtypeStruct((int(sys.argv[1]),), "uint8")})
held, before = [], resident()
for step in range(4):
    temporary = b"1" * ((300 << 20) + step * (8 << 20))  # more than lies ready at the heap's end, and touched
    held.append(bytearray(64 << 10))  # what outlives the step and lies behind it
    del temporary
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_large_model_s_temporaries_of_growing_size_do_not_add_up():
    small, large = (
        int(subprocess.run([sys.executable, "-c", RESERVED, str(n)], capture_output=True, text=True, check=True).stdout)
        for n in (1 << 20, 1 << 30)
    )
    assert small > 500 << 20, "the one heap keeps the holes"
    assert large < 300 << 20, "no more than what lay ready"


HOLES = """
import sys
import jax
from cabochon.heap import fit, give_back, keep_pages
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
shapes = {"w": jax.ShapeDtypeStruct((int(sys.argv[1]),), "uint8")}
keep_pages()
fit(shapes)
before = resident()
old, held = [], []
for matrix in range(40):
    old.append(b"1" * (10 << 20))
    held.append(bytearray(64 << 10))  # what stays, and lies between
del old
freed = resident()
give_back(shapes)
print(freed - before, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_large_model_s_old_matrices_go_back_to_the_system():
    ask = lambda n: subprocess.run(  # noqa: E731
        [sys.executable, "-c", HOLES, str(n)], capture_output=True, text=True, check=True
    ).stdout.split()
    (small_before, small), (large_before, large) = (map(int, ask(n)) for n in (1 << 20, 1 << 30))
    assert min(small_before, large_before) > 350 << 20, "matrices below 32 MB stay when they are freed"
    assert small > 350 << 20, "of a small model they are kept for the next"
    assert large < 60 << 20
