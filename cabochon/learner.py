"""The learner: one jitted, sharded train step made from a loss that sees log-probs, masks and a Batch, never a model.

Legend: B rows, T tokens, L sparse layers, E experts. Every stage (SFT, distillation, reward model, RL) is this step
with another loss. Losses are sums and counts; counts depend on the batch alone, so the step knows the global divisor
before it starts, and micro-batches and devices add up to exactly the loss and gradient of one big batch. A micro-batch
that is all padding is skipped as it runs, so a fixed shape that is rarely full costs no compute and no second compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from cabochon import heap, micro, parallel
from cabochon.batch import Batch
from cabochon.config import AuxLossConfig, LoraConfig, OptimConfig, PrecisionConfig, StepConfig
from cabochon.errors import UserError
from cabochon.model import moe, value
from cabochon.model import transformer as tf
from cabochon.model.config import ModelConfig
from cabochon.model.lora import add_lora
from cabochon.ops import Leaf, Mean, TokenOutputs, token_outputs
from cabochon.optim import join, make_optimizer, schedule, split_trained


class Loss(NamedTuple):
    """Terms are minimised, each divided by its own count over the whole batch; the rest is only reported."""

    terms: dict[str, Mean]
    metrics: dict[str, Mean]
    tokens: dict[str, Array] = {}
    """[B, T] f32 each: what the loss saw at every token, for those who look at single ones"""


LossFn = Callable[[TokenOutputs, Batch], Loss]
"""Pure. Each term's count may depend on the batch alone, never on the outputs."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that an update changes. `params` is the whole tree; with LoRA only lora leaves and a value head change."""

    step: Leaf
    params: tf.Params
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step measured, on device until someone looks."""

    loss: dict[str, Mean]
    metrics: dict[str, Mean]
    tokens: dict[str, Leaf]
    """[B, T] as the loss has them, before the update; rows of a micro-batch that is all padding read 0"""
    grad_norm: Leaf
    learning_rate: Leaf
    router: moe.RouterStats | None
    finite_terms: dict[str, Leaf]
    finite_grads: Any
    """a bool per trained tensor"""


class Forward(NamedTuple):
    """A forward pass: what losses see, the routes used [B, T, L, C], router statistics. None in a dense model."""

    tokens: TokenOutputs
    routes_BTLC: Array | None
    stats: moe.RouterStats | None


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not finite. The state is that before the step."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """What shapes the step, gathered from a recipe."""

    model: ModelConfig
    step: StepConfig = field(default_factory=StepConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    aux: AuxLossConfig = field(default_factory=AuxLossConfig)
    lora: LoraConfig | None = None
    entropy: bool = False
    """compute `TokenOutputs.entropy_BT`, one more pass over the logits"""
    value: bool = False
    """a scalar head, `params["value"]`, and `TokenOutputs.value_BT`"""
    seed: int = 0
    """of LoRA's A"""
    freeze_router: bool = False
    """routers keep their weights; gradients still pass through the gates"""
    temperature: float = 1.0
    """logits are divided by it, so that the policy that learns is the one that was sampled from"""

    @property
    def lora_matrices(self) -> tf.Lora | None:
        return tf.Lora(rank=self.lora.rank, alpha=self.lora.alpha, targets=self.lora.targets) if self.lora else None


class Learner:
    """Builds and holds the compiled step for one shape of model, batch and mesh; owns no state.

    Raises UserError where the rows do not divide over micro-batches and devices, or a router key has nothing to act on.
    """

    def __init__(self, cfg: LearnerConfig, loss_fn: LossFn, mesh: Mesh | None = None):
        self.cfg, self.loss_fn, self.mesh = cfg, loss_fn, mesh
        self.tx = make_optimizer(cfg.optim)
        shards = 1 if mesh is None else parallel.row_shards(mesh)
        if cfg.step.batch_size % (cfg.step.micro_batches * shards):
            raise UserError(
                f"step.batch_size={cfg.step.batch_size} must be a multiple of step.micro_batches="
                f"{cfg.step.micro_batches} x {shards} row shards of the mesh (data x fsdp x expert)"
            )
        for key in ("balance", "router_z", "simbal", "bias_update_rate"):
            if getattr(cfg.aux, key) and cfg.model.moe is None:
                value = getattr(cfg.aux, key)
                raise UserError(f"aux.{key}={value} needs a sparse model, this one is dense; set it to 0")
        if cfg.aux.bias_update_rate and not (cfg.model.moe and cfg.model.moe.aux_free_bias):
            raise UserError(
                f"aux.bias_update_rate={cfg.aux.bias_update_rate} needs a model with moe.aux_free_bias; set it to 0"
            )
        if cfg.freeze_router and cfg.model.moe is None:
            raise UserError("router.freeze=true needs a sparse model, this one is dense; set it to false")
        heap.fit(self._abstract_params())
        self.step = jax.jit(self.step_fn, donate_argnums=0)
        self.score = jax.jit(self.score_fn)

    # -- state ---------------------------------------------------------------------------------------------------------

    def init_state(self, params: tf.Params) -> TrainState:
        """Step 0 from parameters, placed on the mesh; adds lora leaves and a value head where the config asks for them.

        A value head that the config does not ask for is left behind.
        """
        lora = self.cfg.lora_matrices
        if lora is not None:
            params = add_lora(self.cfg.model, params, lora, self.cfg.seed)
        params = value.with_head(self.cfg.model, params) if self.cfg.value else value.without_head(params)

        def make(params: tf.Params) -> TrainState:
            trained, _ = self._split(params)
            return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=self.tx.init(trained))

        if self.mesh is None:
            return jax.jit(make)(params)
        shardings = self.state_shardings()
        return jax.jit(make, out_shardings=shardings)(jax.device_put(params, shardings.params))

    def abstract_state(self) -> TrainState:
        """The state as shapes, with shardings where there is a mesh: what a checkpoint is restored into."""
        params = self._abstract_params()
        trained, _ = self._split(params)
        state = TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32), params=params, opt_state=jax.eval_shape(self.tx.init, trained)
        )
        if self.mesh is None:
            return state
        place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        return jax.tree.map(place, state, self.state_shardings())

    def state_shardings(self) -> TrainState:
        """NamedSharding per leaf: optimiser moments lie as their parameters do, everything else is replicated."""
        assert self.mesh is not None
        model, whole, params = self.cfg.model, parallel.replicated(self.mesh), self._abstract_params()
        axes = tf.logical_axes(model, self.cfg.lora_matrices)
        if self.cfg.value:
            axes = {**axes, value.KEY: value.logical_axes(model)}
        shardings = parallel.param_shardings(axes, params, self.mesh)
        trained, _ = self._split(params)
        trained_shardings, _ = self._split(shardings)
        opt = optax.tree_map_params(
            self.tx,
            lambda leaf, sharding, p: sharding if leaf.shape == p.shape else whole,
            jax.eval_shape(self.tx.init, trained),
            trained_shardings,
            trained,
            transform_non_params=lambda _: whole,
        )
        return TrainState(step=whole, params=shardings, opt_state=opt)

    def _abstract_params(self) -> tf.Params:
        params = tf.abstract(self.cfg.model, self.cfg.lora_matrices)
        return {**params, value.KEY: value.abstract(self.cfg.model)} if self.cfg.value else params

    def _split(self, params: tf.Params) -> tuple[Any, Any]:
        return split_trained(params, lora=self.cfg.lora is not None, freeze_router=self.cfg.freeze_router)

    # -- forward -------------------------------------------------------------------------------------------------------

    def outputs(self, params: tf.Params, batch: Batch) -> Forward:
        """The policy's forward pass over one part of a batch."""
        cfg = self.cfg
        run = tf.Runtime(remat=cfg.step.remat, mesh=self.mesh)
        # f32 means f32: an accelerator's default would multiply f32 in bf16 passes. Gradients inherit it.
        with jax.default_matmul_precision("float32" if cfg.precision.compute == "float32" else "default"):
            return self._outputs(params, batch, run)

    def _outputs(self, params: tf.Params, batch: Batch, run: tf.Runtime) -> Forward:
        cfg = self.cfg
        cast = tf.cast(params, jnp.dtype(cfg.precision.compute))
        out = tf.forward(
            cfg.model,
            cast,
            batch.tokens_BT,
            batch.position_BT,
            batch.segment_BT,
            prefix_BT=batch.prefix_BT,
            routes_BTLC=batch.routes_BTLC,
            lora=cfg.lora_matrices,
            run=run,
        )
        tokens = token_outputs(
            out.hidden_BTD,
            batch.tokens_BT,
            batch.segment_BT,
            lambda h: tf.logits(cfg.model, cast, h) / cfg.temperature,
            chunk=cfg.step.logit_chunk,
            entropy=cfg.entropy,
            candidates_BTK=batch.candidates_BTK,
        )
        if cfg.value:
            values_BT = value.values(cast[value.KEY], out.hidden_BTD)
            tokens = replace(tokens, value_BT=jnp.where(batch.segment_BT != 0, values_BT, 0.0))
        return Forward(tokens, out.routes_BTLC, out.stats)

    def score_fn(self, params: tf.Params, batch: Batch) -> Forward:
        """The forward pass alone, unjitted (`score` is jitted), in the micro-batches of the step.

        What the step takes as given is measured with this: proximal and reference log-probs, old values, routes.
        Rows of a micro-batch that is all padding read 0.
        """

        def one(part: Batch) -> tuple[moe.RouterStats | None, tuple[TokenOutputs, Array | None]]:
            tokens, routes, stats = self.outputs(params, part)
            return stats, (tokens, routes)

        stats, each = micro.over(one, self._micro_batches(batch))
        tokens, routes = micro.joined(each)
        return Forward(tokens, routes, stats)

    # -- the step ------------------------------------------------------------------------------------------------------

    def step_fn(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        """One update, unjitted. A non-finite loss or gradient leaves the state as it was; see `check`.

        Raises UserError where the batch has not the shape that the config says.
        """
        trained, frozen = self._split(state.params)
        parts = self._micro_batches(batch)
        counts = self._counts(batch)
        load_LE = self._global_load(state.params, parts) if self._needs_global_load else None

        def objective(trained: Any, part: Batch) -> tuple[Array, tuple[Loss, moe.RouterStats | None]]:
            params = join(trained, frozen)
            outputs, _, stats = self.outputs(params, part)
            loss = self.loss_fn(outputs, part)
            total = sum(term.total / counts[name] for name, term in loss.terms.items())
            aux, aux_terms = self._aux(params, stats, parts, load_LE)
            loss = loss._replace(terms={**loss.terms, **aux_terms})
            return jnp.asarray(total + aux, jnp.float32), (loss, stats)

        def measure(part: Batch) -> tuple[Any, Any]:
            (_, (loss, stats)), grads = jax.value_and_grad(objective, has_aux=True)(trained, part)
            return (grads, loss._replace(tokens={}), stats), loss.tokens

        (grads, loss, stats), tokens = micro.over(measure, parts)
        return self._apply(state, trained, frozen, grads, loss._replace(tokens=micro.joined(tokens)), stats)

    def _apply(
        self, state: TrainState, trained: Any, frozen: Any, grads: Any, loss: Loss, stats: moe.RouterStats | None
    ) -> tuple[TrainState, StepReport]:
        finite_grads = jax.tree.map(lambda g: jnp.isfinite(g).all(), grads)
        finite_terms = {name: jnp.isfinite(term.total) for name, term in loss.terms.items()}
        grad_norm = optax.global_norm(grads)  # may overflow where no gradient does; such a step would be a silent no-op
        ok = jnp.stack([*jax.tree.leaves((finite_grads, finite_terms)), jnp.isfinite(grad_norm)]).all()
        updates, opt_state = self.tx.update(grads, state.opt_state, trained)
        params = join(optax.apply_updates(trained, updates), frozen)
        if self.cfg.aux.bias_update_rate and stats is not None:
            params = moe.step_biases(self.cfg.model, params, stats, self.cfg.aux.bias_update_rate)
        new = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)
        report = StepReport(
            loss=loss.terms,
            metrics=loss.metrics,
            tokens=loss.tokens,
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(schedule(self.cfg.optim)(state.step), jnp.float32),
            router=stats,
            finite_terms=finite_terms,
            finite_grads=finite_grads,
        )
        return new, report

    def _micro_batches(self, batch: Batch) -> Batch:
        """[M, B/M, ...], see `micro.cut`."""
        expected = (self.cfg.step.batch_size, self.cfg.step.sequence_length)
        if batch.tokens_BT.shape != expected:
            raise UserError(
                f"the batch is {batch.tokens_BT.shape}, expected step.batch_size, step.sequence_length {expected}"
            )
        return micro.cut(batch, self.cfg.step.micro_batches, self.mesh)

    def _counts(self, batch: Batch) -> Mapping[str, Array]:
        """Each term's divisor over the whole batch, at least a safe 1: from a dry call of the loss on zeros."""
        zero = jnp.zeros(batch.tokens_BT.shape, jnp.float32)
        entropy, head = (zero if on else None for on in (self.cfg.entropy, self.cfg.value))
        terms = self.loss_fn(TokenOutputs(zero, zero, entropy, head, batch.teacher_BTK), batch).terms
        return {k: jnp.where(m.count == 0, 1.0, m.count) for k, m in terms.items()}

    @property
    def _needs_global_load(self) -> bool:
        aux = self.cfg.aux
        return bool(aux.balance and aux.balance_scope == "global" and self.cfg.step.micro_batches > 1)

    def _global_load(self, params: tf.Params, parts: Batch) -> Array:
        """[L, E] fraction of slots over the whole batch: one more forward pass, the price of exactness."""
        assert self.cfg.model.moe is not None

        def count(part: Batch) -> tuple[tuple[Array, Array], None]:
            stats = self.outputs(params, part).stats
            assert stats is not None
            return (stats.natural_E, stats.tokens), None

        (natural_LE, tokens_L), _ = micro.over(count, parts)
        return natural_LE / jnp.maximum(tokens_L * self.cfg.model.moe.top_k, 1.0)[:, None]

    def _aux(
        self, params: tf.Params, stats: moe.RouterStats | None, parts: Batch, load_LE: Array | None
    ) -> tuple[Array, dict[str, Mean]]:
        """This part's share of the router losses, weighted, and the unweighted terms for the report."""
        aux, total = self.cfg.aux, jnp.zeros(())
        terms: dict[str, Mean] = {}
        if stats is None or self.cfg.model.moe is None:
            return total, terms
        real_MBT = parts.segment_BT != 0
        tokens = jnp.maximum(real_MBT.sum().astype(jnp.float32), 1.0)
        if aux.balance:
            terms["balance"] = Mean(*moe.balance_loss(stats, self.cfg.model.moe.top_k, load_LE))
            total += aux.balance * terms["balance"].total / tokens
        if aux.router_z:
            terms["router_z"] = Mean(*moe.z_loss(stats))
            total += aux.router_z * terms["router_z"].total / tokens
        if aux.simbal:
            routers = [b["moe"]["router"]["w"] for g in params["blocks"].values() for b in g.values() if "moe" in b]
            terms["simbal"] = Mean(moe.simbal_loss(jnp.concatenate(routers)), jnp.ones(()))
            total += aux.simbal * terms["simbal"].total / jnp.maximum(real_MBT.any((1, 2)).sum(), 1)
        return total, terms


def check(report: StepReport, step: int) -> None:
    """Raises NonFiniteError naming the step, the loss term and the first tensor whose gradient is not finite."""
    terms = [name for name, ok in jax.device_get(report.finite_terms).items() if not ok]
    flags = jax.tree_util.tree_leaves_with_path(jax.device_get(report.finite_grads))
    tensors = [".".join(str(k.key) for k in path) for path, ok in flags if not ok]
    if terms or tensors or not np.isfinite(report.grad_norm):
        term = f"loss term {terms[0]!r} is not finite" if terms else "every loss term is finite"
        tensor = (
            f"first of {len(tensors)} tensors with a non-finite gradient: {tensors[0]}"
            if tensors
            else f"gradients are finite, their global norm is {float(report.grad_norm)}"
        )
        raise NonFiniteError(f"step {step}: {term}; {tensor}; the state is that of before the step")


def cross_entropy(outputs: TokenOutputs, batch: Batch) -> Loss:
    """Masked next-token cross-entropy over the global batch (algorithms.md section 1), nats per token."""
    nll = Mean((-outputs.logp_BT * batch.mask_BT).sum(), batch.mask_BT.sum())
    return Loss({"nll": nll}, {})
