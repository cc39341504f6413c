"""In a process of its own: the allocator's settings are for good."""

import subprocess
import sys

import pytest

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
