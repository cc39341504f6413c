"""Maths verifications per second on one core: ours in a killable worker against plain math-verify in this process.

Rounds are interleaved, so that a busy machine slows all arms alike. One item at a time: while the worker judges, this
process waits, so the rate is that of one core. Data: GSM8K's test answers, each once right and once wrong, in prose.

Run: python benchmarks/verifiers_math.py [--rows 400] [--rounds 5]      (GSM8K from $CABOCHON_DATA, or 20 rows of it)
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable

from math_verify import parse, verify

from cabochon.types import Task
from cabochon.verifiers.math import MathVerifier
from cabochon.verifiers.workers import WorkerConfig

HERE = pathlib.Path(__file__).resolve().parent


def load(rows: int) -> list[tuple[str, str, bool]]:
    """(gold, completion, right)."""
    folder = pathlib.Path(os.environ.get("CABOCHON_DATA", HERE.parents[1] / "shared" / "data"))
    path = folder / "gsm8k_test.jsonl"
    if not path.is_file():
        path = HERE.parent / "tests" / "verifiers" / "data" / "gsm8k_slice.jsonl"
    golds = [json.loads(line)["answer"].rpartition("####")[2].strip() for line in path.read_text().splitlines()]
    items = []
    for number in range(rows):
        gold = golds[number % len(golds)]
        right = number % 2 == 0
        shown = gold if right else str(int(gold.replace(",", "")) + 1)
        items.append((gold, f"She has 3 times as many, so in all there are $\\boxed{{{shown}}}$ of them.", right))
    return items


def ours(verifier: MathVerifier, items: list[tuple[str, str, bool]]) -> None:
    for gold, text, right in items:
        task = Task(id="b", prompt="How many?", verifier="math", payload={"answer": gold})
        assert (verifier.verify(task, text).score == 1.0) is right, (gold, text)


def plain(seconds: int | None, items: list[tuple[str, str, bool]]) -> None:
    for gold, text, right in items:
        found = verify(
            parse(f"${gold}$", parsing_timeout=seconds), parse(text, parsing_timeout=seconds), timeout_seconds=seconds
        )
        assert found is right, (gold, text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    items = load(options.rows)
    symbolic = [("x^2+2x+1", f"so $\\boxed{{(x+{1 + n % 2})^2}}$", n % 2 == 0) for n in range(options.rows)]
    verifier = MathVerifier(
        workers=WorkerConfig(size=1, preload=("cabochon.verifiers.math_judge:warm",), memory_mib=1024)
    )
    arms: dict[str, Callable[[], None]] = {
        "ours, killable worker": lambda: ours(verifier, items),
        "math-verify, timeouts off": lambda: plain(None, items),
        "math-verify, timeouts of 5 s": lambda: plain(5, items),
        "ours, symbolic answers": lambda: ours(verifier, symbolic),
    }
    for arm in arms.values():
        arm()  # warm-up
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            rates[name].append(options.rows / (time.perf_counter() - start))
    first = statistics.median(rates["ours, killable worker"])
    for name, seen in rates.items():
        middle = statistics.median(seen)
        print(
            f"{name:30} {middle:9.0f}/s   (from {min(seen):.0f} to {max(seen):.0f})   ours is {first / middle:6.2f} x"
        )


if __name__ == "__main__":
    main()
