"""`cabochon plan RECIPE --topology v5p:4x4x4`: does it fit a slice that is not here, and if not, what does.

The compiling is done by a child (`cabochon.tpu_compile`); this side has no jax. What does not fit is tried again with
settings that give the same result and take less memory, then on larger slices, and the first that fits is named.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cabochon.cli_stages import load_recipe
from cabochon.config import TrainConfig
from cabochon.errors import MachineError, UserError
from cabochon.rl.recipe import RlConfig

LIBTPU = "libtpu==0.0.42.1"
"""what jax 0.10.2 asks for; the extra `tpu` installs it"""
SLICES: dict[str, tuple[str, ...]] = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "tpu7x": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}
"""by generation, the smallest first: where a larger one is looked for"""

Compile = Callable[[list[str], str, Sequence[str]], dict[str, Any]]
"""(recipe and settings, topology, programs or none for all) -> the child's answer"""
Told = Callable[[str], None]


def checked_topology(text: str) -> str:
    """`v5p:4x4x4`. Raises UserError with examples."""
    kind, _, shape = text.partition(":")
    if kind not in SLICES or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology {text}: expected a generation ({', '.join(SLICES)}) and a shape, such as v5p:4x4x4 or v6e:4x4"
        )
    return text


def compile_elsewhere(parts: list[str], topology: str, only: Sequence[str] = (), *, seconds: float) -> dict[str, Any]:
    """Ask a child. Raises UserError for what the user can change, MachineError where the compiler fails or is late."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"the compiler for TPUs is not installed: pip install {LIBTPU} (or the extra cabochon[tpu])")
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory(prefix="cabochon-plan-") as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "cabochon.tpu_compile", str(answer)]
        order = json.dumps({"parts": parts, "topology": topology, "only": list(only)})
        try:
            child = subprocess.run(command, input=order, env=env, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise MachineError(
                f"the compiler had not finished after {seconds:g} s; give it more with --seconds"
            ) from None
        if not answer.exists():
            last = [line for line in child.stderr.splitlines() if line.strip()][-1:] or ["it said nothing"]
            raise MachineError(f"the compiler ended with exit code {child.returncode}: {last[0][:300]}")
        found = json.loads(answer.read_text())
    if "error" in found:
        raise UserError(found["error"])
    return found


def plan(parts: list[str], topology: str, compile_for: Compile, told: Told = lambda line: None) -> dict[str, Any]:
    """The child's answer, with `topology`, `fits`, and `remedies`: for each program that does not fit, the nearest
    settings that do, or None where nothing on the ladder does.
    """
    cfg = load_recipe(parts)
    if not isinstance(cfg, TrainConfig):
        raise UserError("this recipe trains nothing: expected one of stage sft, rm or rl, or of a model alone")
    told(f"compiling for {topology}")
    found = compile_for(parts, topology, ())
    missing = [p for p in found["programs"] if not p["fits"]]
    remedies: dict[str, dict[str, Any] | None] = {}
    for program in missing:
        name = program["program"]
        same_place = next((r for r in remedies.values() if r and name in r["programs"]), None)
        remedies[name] = same_place or _remedy(cfg, parts, topology, name, compile_for, told)
    return {**found, "topology": topology, "fits": not missing, "remedies": remedies}


def _remedy(
    cfg: TrainConfig, parts: list[str], topology: str, name: str, compile_for: Compile, told: Told
) -> dict[str, Any] | None:
    engine = name in ("prefill", "decode")
    names = ("prefill", "decode") if engine else (name,)
    rungs = engine_rungs(cfg, topology) if isinstance(cfg, RlConfig) and engine else learner_rungs(cfg, topology)
    for settings, where in rungs:
        told(f"{name}: trying {' '.join(settings) or 'the same'} on {where}")
        try:
            found = compile_for([*parts, *settings], where, names)
        except UserError:  # numbers that do not divide: the next one may
            continue
        if found["programs"] and all(p["fits"] for p in found["programs"]):
            most = max(found["programs"], key=lambda p: p["needed"])
            return {"settings": settings, "topology": where, "programs": names, "needed": most["needed"]}
    return None


def learner_rungs(cfg: TrainConfig, topology: str) -> Iterator[tuple[list[str], str]]:
    """(settings, topology), each taking less than the one before: the same result by smaller passes, parameters split
    further, a larger slice; last, what changes the result.
    """
    step, settings = cfg.step, []
    if step.remat != "full":
        settings.append("step.remat=full")
        yield list(settings), topology
    if not step.logit_chunk:
        settings.append(f"step.logit_chunk={max(step.batch_size * step.sequence_length // 32, 1024)}")
        yield list(settings), topology
    kind, _, shape = topology.partition(":")

    def passes(chips: int) -> list[str]:  # as many as leave each chip a row
        most = step.batch_size * cfg.mesh.tensor // chips
        return [f"step.micro_batches={most}"] if most > step.micro_batches and step.batch_size % most == 0 else []

    most = passes(_chips(shape))
    parts = step.micro_batches * 2
    while most and parts < int(most[0].partition("=")[2]) and step.batch_size % parts == 0:
        yield [*settings, f"step.micro_batches={parts}"], topology
        parts *= 2
    yield [*settings, *most], topology
    if cfg.mesh.data != 1:
        settings = [*settings, "mesh.data=1", "mesh.fsdp=-1"]
        yield [*settings, *most], topology
    for where in (s for s in SLICES[kind] if _chips(s) > _chips(shape)):
        yield list(settings), f"{kind}:{where}"
        if narrow := passes(_chips(where)):
            yield [*settings, *narrow], f"{kind}:{where}"
    most = [*settings, *most]
    if cfg.optim.kind != "adafactor":
        yield [*most, "optim.kind=adafactor"], topology
    if cfg.lora is None:
        yield [*most, "lora.rank=16"], topology


def engine_rungs(cfg: RlConfig, topology: str) -> Iterator[tuple[list[str], str]]:
    """The same for a rollout worker: more devices to an engine, then fewer sequences at a time."""
    tensor, wide = cfg.engine.tensor, []
    while (tensor := tensor * 2) <= 8:
        wide = [f"engine.tensor={tensor}"]
        yield list(wide), topology
    slots = cfg.engine.slots
    while (slots := slots // 2) >= 1:
        yield [*wide, f"engine.slots={slots}"], topology


def _chips(shape: str) -> int:
    n = 1
    for side in shape.split("x"):
        n *= int(side)
    return n


# -- telling -----------------------------------------------------------------------------------------------------------


def as_lines(found: dict[str, Any]) -> list[str]:
    """What a person reads: bytes per device of each program, what it sends, and what does not fit."""
    hbm = found["hbm"]
    lines = [f"{found['topology']}: {found['devices']} devices, {found['device']}, {_gb(hbm)} of memory each"]
    for p in found["programs"]:
        seconds = f", compiled in {p['compile_seconds']:.0f} s" if "compile_seconds" in p else ""
        lines += ["", f"{p['program']} on {p['devices']} device{'s' * (p['devices'] > 1)}{seconds}, each:"]
        for name, size in p["memory"].items():
            if size:
                lines.append(f"  {name + (' (beside it)' if name in p['beside'] else ''):56}{_gb(size):>13}")
        verdict = "fits" if p["fits"] else "DOES NOT FIT"
        least = "" if "compiler" in p else "at least "
        lines.append(f"  {'together':56}{least + _gb(p['needed']):>13}  {p['needed'] / hbm:.0%} of memory, {verdict}"
                     if hbm else f"  {'together':56}{_gb(p['needed']):>13}")  # fmt: skip
        for c in p.get("collectives", []):
            lines.append(f"  {c['kind']:42}{c['runs']:>7} times{_gb(c['bytes']):>14}")
        if named := p.get("kernels"):
            lines.append(f"  kernels: {', '.join(f'{n} x {name}' for name, n in named.items())}")
        lines.append(f"  {'operations per token':56}{p['flops_per_token'] / 1e9:>7.2f} GFLOP")
    return [*lines, "", *assumptions(found)]


def assumptions(found: dict[str, Any]) -> list[str]:
    """What the numbers take for granted."""
    lines = [
        "Bytes are the compiler's; a loop that the run ends (decode) counts as one turn, a token of each slot.",
        "Operations are those of the model; what is computed again for the backward pass is not counted.",
    ]
    if engine := next((p for p in found["programs"] if p["program"] == "decode"), None):
        n = engine["devices"]
        lines.append(
            f"Each rollout worker has {n} device{'s' * (n > 1)} of its own, of this kind, beside the learner's slice."
        )
    return lines


def refusal(found: dict[str, Any]) -> str:
    """One line: what does not fit, and the nearest that does."""
    said = []
    for p in found["programs"]:
        if p["fits"]:
            continue
        remedy = found["remedies"].get(p["program"])
        if remedy is None:
            way = "nothing that was tried does: a smaller model or shorter sequences"
        else:
            where = "" if remedy["topology"] == found["topology"] else f" --topology {remedy['topology']}"
            way = f"this does, with {_gb(remedy['needed'])}:{where} {' '.join(remedy['settings'])}".rstrip()
        least = "" if "compiler" in p else "at least "
        said.append(f"{p['program']} needs {least}{_gb(p['needed'])} of {_gb(found['hbm'])} on each device; {way}")
    return f"does not fit {found['topology']}: " + "; ".join(said)


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f} GB" if size < 1e12 else f"{size / 1e12:.2f} TB"
