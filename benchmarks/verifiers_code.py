"""Code execution: the sandboxes against a bare interpreter and against `docker run` per execution, interleaved.

    python benchmarks/verifiers_code.py                      # both sandboxes, about eight minutes
    python benchmarks/verifiers_code.py --rounds 20 --no-docker

Bare is `subprocess.run([python, "-I", "main.py"])` with the very interpreter the sandboxes copy; `-S` (no site) is
shown too, for that is what a sandbox's interpreter does. Latency is measured one call after another with pauses that
let the pool refill, the contenders in turn within each round, so that a busy machine slows all alike. Throughput is
sustained, the pool's refilling included, and taken in turns too: what a ratio compares was measured within a minute or
two. Judgements are whole two-process ones on MBPP-like tasks.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from cabochon.errors import UserError
from cabochon.types import Task
from cabochon.verifiers.code import CodeVerifier
from cabochon.verifiers.sandbox.base import Limits, Sandbox, python_program
from cabochon.verifiers.sandbox.testing import host_image, sandbox

SOURCE = "print(sum(range(100)))\n"
PROGRAM = python_program(SOURCE)
WANT = b"4950\n"
TASK = Task(id="b", prompt="", verifier="code", payload={
    "test_list": ["assert f([1, 2, 3]) == 6", "assert f([]) == 0", "assert f([-1, 1, 5]) == 5"]})  # fmt: skip
THREADS = (1, 2, 4)
ANSWER = "```python\ndef f(xs):\n    return sum(xs)\n```"


def bare(*flags: str) -> Callable[[], None]:
    """The interpreter alone, the program in a file."""
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "main.py").write_text(SOURCE)
    python = getattr(sys, "_base_executable", sys.executable)

    def run() -> None:
        done = subprocess.run([python, "-I", *flags, str(folder / "main.py")], capture_output=True, check=True)
        assert done.stdout == WANT

    return run


def docker_run(image: str) -> Callable[[], None]:
    """A cold container per execution, by the command line, with the same restrictions."""
    words = ["docker", "run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL", "--user", "65534:65534",
             "--security-opt", "no-new-privileges", "--memory", "512m", "--memory-swap", "512m", "--pids-limit", "64",
             "--cpus", "1",
             "--tmpfs", "/tmp:size=64m", "--log-driver", "none", image, "python3", "-I", "-S", "-c",
             SOURCE]  # fmt: skip

    def run() -> None:
        assert subprocess.run(words, capture_output=True, check=True).stdout == WANT

    return run


def sandboxed(box: Sandbox) -> Callable[[], None]:
    def run() -> None:
        result = box.run(PROGRAM)
        assert result.stdout == WANT, result

    return run


def judged(box: Sandbox) -> Callable[[], None]:
    verifier = CodeVerifier(box, limits=Limits(wall_seconds=30.0))

    def run() -> None:
        verdict = verifier.verify(TASK, ANSWER)
        assert verdict.status == "ok", verdict

    return run


def timed(work: Callable[[], None], threads: int) -> list[float]:
    """Seconds of one call in each of `threads` threads that start together."""
    seconds = [0.0] * threads
    gate = threading.Barrier(threads)

    def one(i: int) -> None:
        gate.wait()
        began = time.perf_counter()
        work()
        seconds[i] = time.perf_counter() - began

    workers = [threading.Thread(target=one, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return seconds


def latencies(
    contenders: dict[str, Callable[[], None]], threads: int, rounds: int, pause: float
) -> dict[str, list[float]]:
    """Each contender once a round, in turn; the order is turned round by round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(pause)
            found[name] += timed(contenders[name], threads)
    return found


def throughput(work: Callable[[], None], threads: int, seconds: float) -> float:
    """Calls per second, sustained: the first second, which the full pool would flatter, does not count."""
    counts = [0] * threads
    start = time.perf_counter() + 1.0
    end = start + seconds

    def one(i: int) -> None:
        while time.perf_counter() < end:
            work()
            counts[i] += time.perf_counter() >= start

    workers = [threading.Thread(target=one, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - start)


def sustained(
    contenders: dict[str, Callable[[], None]], rounds: int, seconds: float, pause: float
) -> dict[str, dict[int, list[float]]]:
    """Calls per second of each contender with so many threads, one figure a round; the order is turned round by
    round."""
    found: dict[str, dict[int, list[float]]] = {name: {threads: [] for threads in THREADS} for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            for threads in THREADS:
                time.sleep(pause)
                found[name][threads].append(throughput(contenders[name], threads, seconds))
    return found


def show_sustained(found: dict[str, dict[int, list[float]]]) -> None:
    print(f"\nsustained, per second{'':31}" + "  ".join(f"{n} thread{'s' * (n > 1)}" for n in THREADS))
    for name, rates in found.items():
        print(f"  {name:50}{''.join(f'{statistics.mean(rates[n]):10.1f}' for n in THREADS)}")


def best(rates: dict[int, list[float]]) -> list[float]:
    """The rounds at the number of threads that did most."""
    return max(rates.values(), key=statistics.mean)


def ratio(over: list[float], under: list[float]) -> str:
    """Of the means, with the least and the most that one round gave."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.mean(over) / statistics.mean(under):.2f} ({min(each):.2f} to {max(each):.2f} by the round)"


def percentile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, round(q * (len(values) - 1)))]


def show_latencies(found: dict[str, list[float]], threads: int) -> None:
    print(f"\nlatency at concurrency {threads}, ms{'':22}p50     p99    p50 / bare   p50 - bare")
    base = statistics.median(found["bare python -I"])
    for name, values in found.items():
        middle = statistics.median(values)
        print(
            f"  {name:44}{1e3 * middle:8.1f}{1e3 * percentile(values, 0.99):8.1f}{middle / base:10.2f} x"
            f"{1e3 * (middle - base):10.1f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="of the latency measurements")
    parser.add_argument("--turns", type=int, default=4, help="rounds of the throughput measurements")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each throughput measurement")
    parser.add_argument("--rest", type=float, default=1.0, help="seconds before each of those, for the pools to refill")
    parser.add_argument(
        "--pause", type=float, default=0.25, help="before each latency measurement, for the pools to refill"
    )
    parser.add_argument("--no-docker", action="store_true")
    options = parser.parse_args()
    boxes: dict[str, Sandbox] = {}
    cold: dict[str, Callable[[], None]] = {}
    for kind in ("bubblewrap",) if options.no_docker else ("bubblewrap", "docker"):
        try:
            boxes[kind] = sandbox(kind, warm=6)
        except UserError as e:
            print(f"{kind}: not measured: {e}")
            continue
        if kind == "docker":
            cold["docker run"] = docker_run(host_image())
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}")
    contenders = {"bare python -I": bare(), "bare python -I -S": bare("-S"), **cold}
    for kind, box in boxes.items():
        contenders[f"{kind}, warm"] = sandboxed(box)
    for threads in (1, 2):
        show_latencies(latencies(contenders, threads, options.rounds, options.pause), threads)
    judgements = {f"{kind}, two-process judgement": judged(box) for kind, box in boxes.items()}
    rates = sustained({**contenders, **judgements}, options.turns, options.seconds, options.rest)
    show_sustained(rates)
    print("\ntargets")
    print("  docker p50 <= bare + 20 ms; bubblewrap p50 <= 1.5 x bare: see the latency tables")
    if "docker" in boxes:
        ours, cold_rates = best(rates["docker, warm"]), rates["docker run"]
        print(f"  docker, sustained, over docker run per execution: {ratio(ours, cold_rates[1])}, >= 3")
        print(f"  over docker run, several at once, at its best: {ratio(ours, best(cold_rates))}")
    if "bubblewrap" in boxes:
        judged_rate = statistics.mean(best(rates["bubblewrap, two-process judgement"]))
        print(f"  two-process judgements with bubblewrap: {judged_rate:.1f}/s (>= 25)")
    for box in boxes.values():
        box.close()


if __name__ == "__main__":
    main()
