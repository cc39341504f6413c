"""Set before JAX is imported anywhere: several devices on one CPU, and a compile cache that outlives the run."""

import gc
import os
import pathlib
import signal
import threading

import pytest

if threading.current_thread() is threading.main_thread():
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so would all they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["XLA_FLAGS"] = " ".join(
    [*(f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f),
     "--xla_force_host_platform_device_count=8"]
)
import cabochon.model  # noqa: F401 (adds a flag of its own, which XLA hears before its first program only)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="module")
def _memory_is_given_back():
    """What compiling took is free after it, in the heap's holes: without this a worker grew to 9 GB over the suite."""
    from cabochon import heap  # not before the environment above is set

    yield
    gc.collect()
    heap.trim()
