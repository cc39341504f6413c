"""Compiling a recipe's programs for devices that are not here, and reading off what they need: the child of `tpu_plan`.

    python -m cabochon.tpu_compile RESULT.json < order.json

A process of its own, because a compiler for another machine may abort, hang or fill the memory, and because libtpu must
not be loaded into one that trains. Nothing is ever materialised: parameters are shapes.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from cabochon import hlo, metrics, parallel
from cabochon.batch import Batch
from cabochon.cli_stages import load_recipe
from cabochon.config import StepConfig, TrainConfig
from cabochon.errors import UserError
from cabochon.learner import Learner, cross_entropy
from cabochon.optim import split_trained
from cabochon.plan import abstract_batch, device_bytes
from cabochon.policy import learner_config
from cabochon.reward.config import RewardModelConfig
from cabochon.reward.loss import bradley_terry
from cabochon.reward.train import scored_model
from cabochon.rl.advantages import Advantages
from cabochon.rl.batching import minibatches
from cabochon.rl.recipe import RlConfig
from cabochon.rl.train import learners_of, slot_config
from cabochon.rl.update import Update, plan_update
from cabochon.rollouts.engine_plan import engine_programs
from cabochon.target import compiling_for
from cabochon.types import Completion, Rollout, Task

ROOM_FOR_COMPILER = 1 << 38
"""elements of an array that no device holds: the compiler's complaint says what a device has"""


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program, and what the device that runs it holds."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    resident: dict[str, int]
    """bytes on a device of what it is given, by name"""
    inside: dict[str, int] = field(default_factory=dict)
    """bytes of what lives while it runs, as far as it has a name"""
    beside: dict[str, int] = field(default_factory=dict)
    """bytes of what the same device holds and this program is not given"""
    flops_per_token: float
    devices: int

    @property
    def floor(self) -> int:
        """What it takes at the least, known before anything is compiled."""
        return sum(self.resident.values()) + sum(self.beside.values()) + self.inside.get("gradients", 0)


# -- the programs of a recipe ------------------------------------------------------------------------------------------


def programs_of(cfg: Any, devices: Sequence[jax.Device]) -> Iterator[Program]:
    """Of any recipe that trains. Raises UserError for one that does not, or whose numbers cannot work together."""
    mesh = parallel.make_mesh(cfg.mesh, list(devices)) if isinstance(cfg, TrainConfig) else None
    match cfg:
        case RlConfig():
            assert mesh is not None
            yield from _rl(cfg, mesh, devices)
        case RewardModelConfig():
            loss = bradley_terry(centre=cfg.loss.centre, margin_scale=cfg.loss.margin_scale)
            learner = Learner(scored_model(cfg), loss, mesh)
            batch = abstract_batch(learner)
            yield _step("step", learner, replace(batch, margin_BT=batch.mask_BT))
        case TrainConfig():
            learner = Learner(learner_config(cfg), cross_entropy, mesh)
            yield _step("step", learner, abstract_batch(learner))
        case _:
            raise UserError("this recipe trains nothing: expected one of stage sft, rm or rl, or of a model alone")


def _rl(cfg: RlConfig, mesh: Mesh, devices: Sequence[jax.Device]) -> Iterator[Program]:
    sparse = learner_config(cfg).model.moe is not None
    update = plan_update(cfg.update, sparse=sparse)
    learners = learners_of(cfg, update, mesh)
    policy, critic = learners.policy, learners.critic
    batch = rl_batch(policy, update)
    beside: dict[str, int] = {}
    if update.needs_reference:
        beside["reference policy"] = device_bytes(policy.abstract_state().params)
    if critic is not None:
        state = critic.abstract_state()
        beside["critic and its optimiser"] = device_bytes((state.params, state.opt_state))
    yield _step("step", policy, batch, beside)
    if update.needs_proximal or update.needs_routes or update.needs_reference or update.critic != "none":
        yield _score("score", policy, replace(batch, logp_proximal_BT=None), beside)
    if critic is not None:
        state = policy.abstract_state()
        held = {k: v for k, v in beside.items() if k != "critic and its optimiser"}
        held["policy and its optimiser"] = device_bytes((state.params, state.opt_state))
        yield _step("critic step", critic, replace(batch, routes_BTLC=None), held)
    model, slots = policy.cfg.model, slot_config(cfg)
    for part in engine_programs(model, slots, list(devices)):
        flops = metrics.flops_per_token(model, slots.length) / 3
        yield Program(
            name=part.name, lower=part.lower, resident=part.resident, beside=part.beside, flops_per_token=flops,
            devices=part.devices,
        )  # fmt: skip


def _step(name: str, learner: Learner, batch: Batch, beside: dict[str, int] | None = None) -> Program:
    state = learner.abstract_state()
    cfg = learner.cfg
    trained, _ = split_trained(state.params, lora=cfg.lora is not None, freeze_router=cfg.freeze_router)
    return Program(
        name=name,
        lower=lambda: learner.step.lower(state, batch),
        resident={
            "parameters": device_bytes(state.params),
            "optimiser state": device_bytes(state.opt_state),
            "batch": device_bytes((batch, state.step)),
        },
        inside={"gradients": device_bytes(trained), "activations kept for the backward pass": kept(learner, batch)},
        beside=beside or {},
        flops_per_token=metrics.flops_per_token(learner.cfg.model, learner.cfg.step.sequence_length),
        devices=1 if learner.mesh is None else learner.mesh.size,
    )


def _score(name: str, learner: Learner, batch: Batch, beside: dict[str, int]) -> Program:
    state = learner.abstract_state()
    return Program(
        name=name,
        lower=lambda: learner.score.lower(state.params, batch),
        resident={"parameters": device_bytes(state.params), "batch": device_bytes(batch)},
        beside={"optimiser state": device_bytes(state.opt_state), **beside},
        flops_per_token=metrics.flops_per_token(learner.cfg.model, learner.cfg.step.sequence_length) / 3,
        devices=1 if learner.mesh is None else learner.mesh.size,
    )


def kept(learner: Learner, batch: Batch) -> int:
    """Bytes on a device of what the forward pass of one micro-batch leaves for the backward pass, weights apart."""
    state, step = learner.abstract_state(), learner.cfg.step
    rows = step.batch_size // step.micro_batches
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)

    def residuals(params: Any, part: Batch) -> Any:
        return jax.vjp(lambda p: learner.outputs(p, part).tokens, params)[1]

    left = jax.tree.leaves(jax.eval_shape(residuals, state.params, part))
    weights = {x.shape for x in jax.tree.leaves(state.params)}
    shards = 1 if learner.mesh is None else parallel.row_shards(learner.mesh)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in left if x.shape not in weights) // shards


def rl_batch(learner: Learner, update: Update) -> Batch:
    """What an update of the recipe's algorithm is given, as shapes: made by the stage's own code out of two tiny
    completions, then stretched to the step's rows and tokens.
    """
    step, model = learner.cfg.step, learner.cfg.model
    rows, length = 2, 8
    layers, used = len(model.moe_layers), model.moe.top_k if model.moe else 1

    def rollout(i: int) -> Rollout:
        routes = np.tile(np.arange(used, dtype=np.int32), (2, layers, 1)) if model.moe else None
        completion = Completion(
            tokens=np.array([1, 2], np.int32), logprobs=np.zeros(2, np.float32), mask=np.ones(2, bool), text=str(i),
            finish="stop", policy_version=np.zeros(2, np.int32), routes=routes, prompt_routes=routes,
            prompt_tokens=np.array([1, 2], np.int32),
        )  # fmt: skip
        return Rollout(task=Task(id=str(i), prompt="", verifier=""), completion=completion, group=0)

    rollouts = [rollout(0), rollout(1)]
    per_token = [np.ones(2, np.float32)] * 2
    with_critic = update.critic != "none"
    advantages = Advantages(tokens=per_token, keep_N=np.ones(2, bool), returns=per_token if with_critic else None)
    tiny = StepConfig(batch_size=rows, sequence_length=length)
    batch = minibatches(
        rollouts, advantages, update, tiny, 1, np.random.default_rng(0),
        reference=per_token if update.needs_reference else None,
        values=[np.ones(3, np.float32)] * 2 if with_critic else None,
    )[0].batch  # fmt: skip
    if update.needs_proximal:
        batch = replace(batch, logp_proximal_BT=batch.mask_BT)
    if update.needs_routes:
        batch = replace(batch, routes_BTLC=np.zeros((rows, length, layers, used), np.int32))
    sharding = None if learner.mesh is None else parallel.rows(learner.mesh)

    def stretched(x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (step.batch_size, step.sequence_length, *x.shape[2:])[: x.ndim]
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    return jax.tree.map(stretched, batch)


# -- compiling and measuring -------------------------------------------------------------------------------------------


def available(device: jax.Device) -> int:
    """Bytes of memory the compiler may use of one device; 0 where it sets no limit."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    huge = jax.ShapeDtypeStruct((ROOM_FOR_COMPILER,), jnp.float32, sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"exceeds available HBM \(([\d.]+)([KMGT])\)", str(error)):
            return _binary(*found.groups())
        raise
    return 0


def measure(program: Program, hbm: int) -> dict[str, Any]:
    """Compile it, and what a device needs for it. `memory` adds up to `total`; what the compiler itself said is
    `compiler`. Where it does not fit, `needed` says how much it is at the least and the rest may be missing.
    """
    out: dict[str, Any] = {
        "program": program.name, "devices": program.devices, "flops_per_token": program.flops_per_token
    }  # fmt: skip
    if hbm and program.floor > hbm:
        return {**out, "fits": False, "needed": program.floor, "memory": {**program.resident, **program.beside},
                "beside": program.beside}  # fmt: skip
    start = time.monotonic()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error)):
            needed = _binary(*found.groups()) + sum(program.beside.values())
            return {**out, "fits": False, "needed": needed, "memory": {**program.resident, **program.beside},
                    "beside": program.beside, "compile_seconds": time.monotonic() - start}  # fmt: skip
        raise
    seconds = time.monotonic() - start
    said = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    compiler = {name: int(getattr(said, f"{name}_size_in_bytes")) for name in names}
    memory = dict(program.resident)
    memory["padding, less what goes unread"] = compiler["argument"] - sum(program.resident.values())
    left = compiler["temp"]
    for name, size in program.inside.items():
        memory[name] = min(size, left)
        left -= memory[name]
    memory["temporary"] = left
    memory["results"] = compiler["output"] - compiler["alias"]
    memory["program"] = compiler["generated_code"]
    memory |= program.beside
    total = sum(memory.values())
    text = compiled.as_text() or ""
    return {
        **out, "fits": not hbm or total <= hbm, "needed": total, "memory": memory, "compiler": compiler,
        "beside": program.beside, "compile_seconds": seconds,
        "collectives": [c._asdict() for c in hlo.collectives(text)], "kernels": hlo.kernels(text),
    }  # fmt: skip


def _binary(number: str, unit: str) -> int:
    return int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit])


def compile_recipe(parts: list[str], devices: Sequence[jax.Device], only: Sequence[str] = ()) -> dict[str, Any]:
    """Every program of a recipe, or `only` some of them, for these devices."""
    cfg = load_recipe(parts)
    with compiling_for(devices):
        hbm = available(devices[0]) if devices[0].platform == "tpu" else 0
        programs = [measure(p, hbm) for p in programs_of(cfg, devices) if not only or p.name in only]
    return {"device": devices[0].device_kind, "devices": len(devices), "hbm": hbm, "programs": programs}


def slice_devices(topology: str) -> list[jax.Device]:
    """The devices of a slice by its name (v5p:4x4x4). Raises UserError where libtpu knows none of that name."""
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"--topology {topology}: {str(error).strip().splitlines()[0]}") from None


def main() -> None:
    """Reads the order from stdin, writes the result, or the user's mistake as `error`, to the path given."""
    order = json.load(sys.stdin)
    try:
        result = compile_recipe(order["parts"], slice_devices(order["topology"]), order["only"])
    except UserError as error:
        result = {"error": str(error)}
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
