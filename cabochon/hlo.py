"""Reading a compiled program's text: which collectives it runs, how often, and how many bytes each device moves.

The compiler's own cost analysis counts a loop's body once; here each loop counts as often as it runs, where that is
known when it is compiled (`lax.scan`), and once where only the run decides (`lax.while_loop` on data).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_MANY_CALLED = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


class Collective(NamedTuple):
    """All collectives of one kind in a program."""

    kind: str
    runs: int
    """times it is run, by each device"""
    bytes: int
    """moved in and out of one device by a ring: (n - 1)/n of what is gathered or scattered, twice that to reduce"""


@dataclass
class _Computation:
    """One function of the program."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    """(name, times per run)"""
    collectives: list[tuple[str, int]] = field(default_factory=list)
    """(kind, bytes moved)"""
    constants: dict[str, int] = field(default_factory=dict)
    root: str = ""
    loops: list[tuple[str, str, str]] = field(default_factory=list)
    """(body, condition, line)"""


def collectives(text: str) -> list[Collective]:
    """By kind, of optimised HLO text with its entry computation; those within one device's group of one are none."""
    computations, entry = _parse(text)
    runs: dict[str, int] = defaultdict(int)

    def run(name: str, times: int) -> None:
        runs[name] += times
        for called, each in computations[name].calls:
            run(called, times * each)

    run(entry, 1)
    count: dict[str, int] = defaultdict(int)
    moved: dict[str, int] = defaultdict(int)
    for name, times in runs.items():
        for kind, size in computations[name].collectives:
            count[kind] += times
            moved[kind] += times * size
    return [Collective(kind, count[kind], moved[kind]) for kind in KINDS if count[kind]]


def kernels(text: str) -> dict[str, int]:
    """Hand-written TPU kernels in the program's text, by name, such as the grouped matmul of `lax.ragged_dot`."""
    names = re.findall(r'%?([\w.\-]+) = [^\n]*? custom-call\([^\n]*custom_call_target="tpu_custom_call"', text)
    return dict(sorted(Counter(re.sub(r"[.\d]+$", "", name) for name in names).items()))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            computations[name] = _Computation()
            entry = name if head[1] else entry
        elif name and " = " in line:
            _instruction(computations[name], name, line)
    for computation in computations.values():
        for body, condition, line in computation.loops:
            computation.calls.append((body, _trips(computations, condition, line)))
    return computations, entry


def _instruction(into: _Computation, name: str, line: str) -> None:
    left, _, right = line.strip().partition(" = ")
    kind_of_result, rest = _type_and_rest(right)
    opcode = rest.partition("(")[0].strip()
    if left.startswith("ROOT "):
        into.root = rest
    if opcode == "constant" and (value := re.match(r"constant\((-?\d+)\)", rest)):
        into.constants[left.removeprefix("ROOT ").lstrip("%")] = int(value[1])
    called = {key: callee for key, callee in _CALLED.findall(rest)}
    if opcode == "while":
        into.loops.append((called["body"], called["condition"], rest))
    else:
        into.calls += [(callee, 1) for callee in called.values()]
        branches = ",".join(_MANY_CALLED.findall(rest))
        into.calls += [(callee, 1) for callee in re.findall(r"[\w.\-]+", branches)]
    base = opcode.removesuffix("-start")
    if base in KINDS and (n := _group(base, rest)) > 1:
        # a TPU fuses "reduce, keep my part" into one operation, which still says all-reduce inside
        scatter = base == "all-reduce" and name.startswith("all-reduce-scatter")
        kind = "reduce-scatter" if scatter else base
        whole = _bytes(kind_of_result)
        if opcode != base:  # the result of a start is (operands, results)
            whole = {"all-gather": whole * n // (n + 1), "collective-permute": whole // 2}.get(base, whole)
        if base == "reduce-scatter":
            whole *= n
        into.collectives.append((kind, _moved(kind, whole, n)))


def _moved(kind: str, whole: int, n: int) -> int:
    if kind == "collective-permute":
        return whole
    return (2 if kind == "all-reduce" else 1) * whole * (n - 1) // n


def _type_and_rest(right: str) -> tuple[str, str]:
    """`(f32[2]{0:T(8,128)}, s32[]) while(...)` -> the type, and what follows it."""
    if not right.startswith("("):
        return right.partition(" ")[0], right.partition(" ")[2]
    depth = 0
    for i, c in enumerate(right):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return right[: i + 1], right[i + 2 :]
    return right, ""


def _bytes(type_text: str) -> int:
    return sum(math.prod(shape) * width for width, shape in _arrays(type_text))


def _arrays(type_text: str) -> Iterator[tuple[int, list[int]]]:
    for dtype, dims in _ARRAY.findall(type_text):
        bits = re.search(r"\d+", dtype)
        width = 1 if dtype == "pred" else 0 if bits is None else max(int(bits[0]) // 8, 1)
        yield width, [int(d.removeprefix("<=")) for d in dims.split(",") if d]


def _group(kind: str, rest: str) -> int:
    """Devices that take part together."""
    if kind == "collective-permute":
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    raise ValueError(f"a collective whose replica groups cannot be read: {rest[:200]}")


def _trips(computations: dict[str, _Computation], condition: str, line: str) -> int:
    """How often a loop runs: as the compiler noted, or what its counter is compared with; 1 where the run decides."""
    if known := re.search(r'known_trip_count"?\s*:\s*\{\s*"?n"?\s*:\s*"?(\d+)', line):
        return int(known[1])
    test = computations[condition]
    root = test.root
    if fused := re.match(r"fusion\((.*?)\).*calls=%?([\w.\-]+)", root):
        inner = computations[fused[2]].root
        root = f"compare({fused[1]}), direction=LT" if "compare(" in inner and "direction=LT" in inner else ""
    if root.startswith("compare(") and "direction=LT" in root:
        operands = root[len("compare(") :].partition(")")[0].split(",")
        limits = [test.constants[o] for o in (x.split()[-1].lstrip("%") for x in operands) if o in test.constants]
        return limits[0] if limits else 1
    return 1
